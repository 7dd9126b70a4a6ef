"""The steps that the flows are made of: a task that runs once for the same input, then its artifacts.

Artifacts are made after the task and from the disk, so that a run that skips the work shows them all the same.
"""

from __future__ import annotations

from pathlib import Path

from prefect.runtime import flow_run

from dermaflow import storage
from dermaflow.bundles.registry import Registry
from dermaflow.learning.recipe import Recipe
from dermaflow.scoring.planning import model_of_run
from dermaflow.scoring.sources import fingerprint, identify
from flows import artifacts
from flows.agreed import Rule
from flows.caching import (
    Output,
    archive_identity,
    cache_key,
    model_identity,
    report_identity,
    run_once,
    scoring_identity,
    shards_identity,
    weights_identity,
)
from flows.promotion import Decision
from flows.tasks import (
    evaluate_model,
    prepare_shards,
    promote_on_test,
    register_model,
    report_federation,
    score_source,
    train_federated,
    train_model,
)


def prepared(data: Path, shards: str, *, seed: int, hours: float) -> Output:
    """Shards of an archive, in `shards`."""
    data, shards = data.absolute(), _absolute(shards)
    key = cache_key("prepare", archive_identity(data), seed, shards)
    output = run_once(prepare_shards, shards_identity, key, hours, data=data, shards=shards, seed=seed)
    artifacts.show_splits(shards)
    return output


def trained(
    shards: str, recipe: Recipe, model: Path, *,
    weights: Path | None, workers: int | None, hours: float, teacher: str | None = None,
) -> Output:  # fmt: skip
    """A model of these shards by this recipe, in `model`. Other workers are no reason to train again."""
    shards, model = _absolute(shards), model.absolute()
    first = weights_identity(recipe, weights)
    taught = [model_identity(teacher := _absolute(teacher))] if teacher else []
    key = cache_key("train", shards_identity(shards), recipe.digest, first, *taught, model)
    output = run_once(
        train_model, model_identity, key, hours,
        shards=shards, recipe=recipe, model=model, weights=weights, teacher=teacher, workers=workers,
    )  # fmt: skip
    artifacts.show_training(str(model))
    return output


def evaluated(model: str, shards: str, report: Path, *, seed: int, resamples: int, hours: float) -> Output:
    """The report of a model on the test split of these shards, in `report`."""
    model, shards, report = _absolute(model), _absolute(shards), report.absolute()
    key = cache_key("evaluate", model_identity(model), shards_identity(shards), seed, resamples, report)
    output = run_once(
        evaluate_model, report_identity, key, hours,
        model=model, shards=shards, report=report, seed=seed, resamples=resamples,
    )  # fmt: skip
    artifacts.show_figures(str(report))
    return output


def scored(source: str, output: str, *, model: str, patients: str | None, hours: float) -> Output:
    """Findings and summary of every image of a source, and the pathways of its patients, in `output`."""
    source, output = _absolute(source), _absolute(output)
    patients = None if patients is None else _absolute(patients)
    chosen = model_of_run(model, output)  # a run keeps the champion it was begun with
    content = fingerprint(identify(source), lambda uri: uri in (output, patients))
    people = None if patients is None else storage.sha256_file(patients)
    key = cache_key("score", source, content, chosen.sha256, people, output)
    result = run_once(
        score_source, scoring_identity, key, hours,
        source=source, output=output, model=chosen.uri, patients=patients,
    )  # fmt: skip
    artifacts.show_scoring(output)
    return result


def registered(model: str, registry: str) -> Decision:
    """An evaluated model in the registry, and the champion if it is the better one."""
    decision = register_model(model, _absolute(registry), by=f"flow run {flow_run.name}")
    artifacts.show_decision(decision, registry)
    return decision


def federated(arguments: list[str], out: Path, *, hours: float) -> Output:
    """The model of a federated run, in the folder `out`; the command itself knows what is done."""
    output = train_federated.with_options(timeout_seconds=hours * 3600)(arguments, out)
    artifacts.show_rounds(out)
    return output


def reported(out: Path, *, registry: str | None, shards: str | None, hours: float) -> Output:
    """The page and the matrix of a federated run; beside its model the champion, where its images are here."""
    champion = Registry(registry).champion() if registry and shards else None
    place = storage.join(_absolute(str(registry)), "models", champion.id) if champion else None
    output = report_federation.with_options(timeout_seconds=hours * 3600)(out, place)
    artifacts.show_matrix(out)
    return output


def agreed(model: str, registry: str, test: str, evaluation: str, rule: Rule, *, hours: float) -> Decision:
    """A federated model in the registry, and the champion if it is better by the rule's margin on the agreed test."""
    decision = promote_on_test.with_options(timeout_seconds=hours * 3600)(
        model, _absolute(registry), _absolute(test), evaluation, rule, by=f"flow run {flow_run.name}"
    )
    artifacts.show_decision(decision, registry)
    return decision


def _absolute(address: str) -> str:
    return address if storage.is_remote(address) else str(Path(address).absolute())
