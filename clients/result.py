"""From the commands to a plan, and from a finished run to a bundle and a table."""

from __future__ import annotations

import json
from dataclasses import fields
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import ValidationError
from safetensors.numpy import load_file

from clients.coordinator import REFERENCE, RESULT, network_of_result
from clients.plan import PRESETS, Plan, PresetName
from dermaflow import storage
from dermaflow.bundles.bundle import load_bundle, save_bundle
from dermaflow.errors import BundleError, DataError, RecipeError
from dermaflow.evaluation.crosssite import TestCounts, cell_of
from dermaflow.evaluation.figures import Estimate
from dermaflow.learning.recipe import load_recipe
from dermaflow.preparation.reading import ShardFolder
from dermaflow.schemas.bundle import Bundle, Calibration, Copies, FederationRecord, Reference, TrainingRecord

MODEL = "model"
"""Folder of the bundle within that of the run."""


def make_plan(
    choices: dict[str, Any], recipe: str, weights: Path | None, changes: list[str], recipe_changes: list[str], *,
    real: bool, preset: PresetName = "plain",
) -> Plan:  # fmt: skip
    """The plan of a command.

    Args:
        choices: Fields of the plan; None for what the preset or the plan's default says.
        recipe: Name or file.
        weights: First weights, in place of the recipe's.
        changes: ``key=value`` of further fields.
        recipe_changes: ``key=value`` of the recipe.
        real: Whether hospitals take part, rather than a simulation.
        preset: What holds where nothing else is said.

    Raises:
        RecipeError: An unknown key or an impossible value, or a preset that needs first weights has none.
        DataError: No shards, or no sites.
    """
    usual = PRESETS[preset]
    loaded = load_recipe(recipe, usual.recipe | _parsed(recipe_changes))
    if weights is not None:
        backbone = loaded.backbone.model_copy(update={"weights": str(weights.absolute())})
        loaded = loaded.model_copy(update={"backbone": backbone})
    if usual.plan.get("norm") == "frozen" and loaded.backbone.weights in (None, "none"):
        raise RecipeError(
            f"no first weights, whose normalisation {preset} keeps", where="--preset", expected="pretrained weights",
            todo="give --weights FILE, or --recipe-set backbone.weights=imagenet",
        )  # fmt: skip
    if real and not choices["sites"]:
        raise DataError(
            "no site", expected="--site NAME=NODE-ID for each, as `dermaflow federate register` printed it",
            todo="name the sites, or play them here: --simulate",
        )  # fmt: skip
    if not real:
        if not choices["shards"]:
            raise DataError("no shards", expected="--shards DIR", todo="prepare some: dermaflow prepare")
        ShardFolder(choices["shards"])  # a clear error now rather than in Flower's processes
    try:
        said = {key: value for key, value in choices.items() if value is not None} | _parsed(changes)
        return Plan.model_validate(usual.plan | {"recipe": loaded.model_dump_json()} | said)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:  # choices that do not go together; the message says what to do
            raise RecipeError(first["msg"].removeprefix("Value error, "), where="--set") from error
        raise RecipeError(
            f"{'.'.join(map(str, first['loc']))}: {first['msg']}, found {first['input']!r}", where="--set",
            expected="one of " + ", ".join(Plan.model_fields),
        ) from error  # fmt: skip


def _parsed(changes: list[str]) -> dict[str, Any]:
    found = {}
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise RecipeError(f"{change!r} is no change", where="--set", expected="key=value")
        found[key] = yaml.safe_load(value)
    return found


def save_model(plan: Plan) -> Path:
    """Write the model of a finished run as a bundle, unless it is there; returns its folder.

    A finished run makes one bundle: its evaluation stays, and a registry sees one version.
    """
    folder = Path(plan.out)
    try:
        load_bundle(folder / MODEL)
        return folder / MODEL
    except BundleError:  # not there yet, or damaged
        pass
    result = json.loads((folder / RESULT).read_text())
    recipe = plan.parsed_recipe
    counts = np.sum(list(result["counts"].values()), axis=0)
    history = [
        {"epoch": float(number), "seconds": record["seconds"], **_mean_loss(record)}
        for number, record in enumerate(result["rounds"])
    ]
    privacy = guarantee_in_words(result)
    record = TrainingRecord(
        recipe_name=recipe.name, recipe=recipe.model_dump(mode="json"), recipe_hash=recipe.digest, seed=plan.seed,
        data_hash=data_hash(result), started=result["started"], seconds=result["seconds"],
        epochs=len(history), device=f"{len(result['training_sites'])} sites, {plan.strategy}",
        workers=len(result["training_sites"]), history=history, initial_weights=recipe.backbone.weights,
        versions=result["versions"],
        federation=FederationRecord(
            origin="simulation" if plan.shards else "deployment", strategy=plan.strategy,
            sites=result["training_sites"], rounds=len(history), data=result["data"],
            plan_sha256=storage.sha256(json.dumps(result["plan"], sort_keys=True).encode()),
            privacy=privacy, run=plan.name,
        ),
    )  # fmt: skip
    copies = Copies.model_validate(result["copies"]) if result.get("copies") else None  # older runs do not say
    bundle = Bundle(
        name=f"{recipe.name}-federated", backbone=recipe.backbone.name,
        input=recipe.input_spec.model_copy(update={"copies": copies}),
        dropout=recipe.backbone.dropout, train_priors=(counts / counts.sum()).tolist(), training=record,
        calibration=Calibration.model_validate(result["calibration"]) if result["calibration"] else None,
    )  # fmt: skip
    calibrated = "Calibrated on sums of the sites' calibration splits"
    if bundle.calibration is None:
        command = "dermaflow site model" if plan.norm == "local" else "dermaflow calibrate"
        calibrated = f"Not calibrated: sites do that on their own images ({command})"
    card = (
        f"# {bundle.name}\n\nTrained by {plan.strategy} over {', '.join(result['training_sites'])}, "
        f"{len(history)} rounds. {calibrated}; not evaluated yet.\n"
        + (f"Differential privacy: {privacy}.\n" if privacy else "")
    )
    reference = None
    if bundle.calibration is not None:
        tensors = load_file(folder / REFERENCE)
        none = np.zeros((0, len(tensors["mean"])), np.float16)
        reference = Reference(none, tensors["mean"], tensors["whitener"], (), (), ())
    save_bundle(folder / MODEL, bundle, network_of_result(plan, folder).state_dict(), reference, card)
    return folder / MODEL


def _mean_loss(record: dict[str, Any]) -> dict[str, float]:
    """Of all sites; none under differential privacy, where no site tells it."""
    sites = [site for site in record["sites"].values() if "loss" in site]
    images = sum(site["images"] for site in sites)
    return {"loss": sum(site["loss"] * site["images"] for site in sites) / images} if sites else {}


def guarantee_in_words(result: dict[str, Any]) -> str | None:
    """What differential privacy guarantees; None without it."""
    given = result.get("privacy")
    return f"epsilon {given['epsilon']:.2f} at delta {given['delta']:g} for {given['unit']}" if given else None


def data_hash(result: dict[str, Any]) -> str:
    """What the run learned from: the hash of the divided shards, or one over those of the sites."""
    hashes = result["data"]
    if result["plan"]["shards"]:
        return str(next(iter(hashes.values())))
    return storage.sha256("".join(f"{site} {hashes[site]}\n" for site in sorted(hashes)).encode())


def tests_of(result: dict[str, Any]) -> dict[str, TestCounts]:
    """What each site sent of the final model on its test split, by site."""
    names = [field.name for field in fields(TestCounts)]
    return {
        site: TestCounts(*(np.array(part[name], np.int64) for name in names))
        for site, part in sorted(result["sites"].items())
    }


def left_out(result: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Why a site was not in rounds or in answers, and in which: ``{site: {reason: "round 1, 3 to 5, evaluate"}}``."""
    rounds: dict[tuple[str, str], list[int]] = {}
    questions: dict[tuple[str, str], list[str]] = {}
    for record in result["rounds"]:
        for pair in record["failed"].items():
            rounds.setdefault(pair, []).append(record["round"])
    for question, reasons in result.get("unanswered", {}).items():  # older runs do not say
        for pair in reasons.items():
            questions.setdefault(pair, []).append(question)
    found: dict[str, dict[str, str]] = {}
    for pair in [*rounds, *(pair for pair in questions if pair not in rounds)]:
        where = [f"round {ranges(rounds[pair])}"] if pair in rounds else []
        found.setdefault(pair[0], {})[pair[1]] = ", ".join([*where, *questions.get(pair, ())])
    return found


def ranges(numbers: list[int]) -> str:
    """``1, 3 to 5``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]} to {part[-1]}" for part in parts)


def table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: each site, and all together, with images, lesions and the 95 % interval over lesions."""
    tests = tests_of(result)
    everything = reduce(add, tests.values())
    return ["site", "trained", "images", "lesions", "balanced accuracy", "95 %"], [
        *(_row(name, test, name in result["training_sites"]) for name, test in tests.items()),
        _row("all", everything, True),
    ]


def _row(name: str, test: TestCounts, trained: bool) -> list[str]:
    cell = cell_of(test)
    counts = [str(cell.counts.images), str(cell.counts.lesions)]
    return [name, "yes" if trained else "no", *counts, *figure(cell.balanced_accuracy)]


def figure(found: Estimate) -> tuple[str, str]:
    """A share and its interval as text; a dash for what there is not."""
    between = "-" if found.low is None or found.high is None else f"{found.low:.3f} to {found.high:.3f}"
    return "-" if found.value is None else f"{found.value:.3f}", between
