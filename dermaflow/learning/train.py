"""From shards and a recipe to a calibrated bundle."""

from __future__ import annotations

import logging
import platform
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from dermaflow.bundles.bundle import LoadedBundle, load_bundle
from dermaflow.errors import BundleError, CheckpointError, DataError, RecipeError
from dermaflow.learning.backbones import build
from dermaflow.learning.calibration import calibrate_and_save
from dermaflow.learning.ensemble import join_models
from dermaflow.learning.local import class_counts, fit_here
from dermaflow.learning.recipe import Recipe
from dermaflow.locks import locked
from dermaflow.preparation.reading import ShardFolder, labels_of
from dermaflow.schemas.bundle import Bundle, TrainingRecord

log = logging.getLogger(__name__)

StepProgress = Callable[[int, int, int, float], None]
"""Called with epoch, step, steps of the epoch and the mean loss so far."""


def train(
    shards: str | Path,
    recipe: Recipe,
    out: Path,
    *,
    weights: Path | None = None,
    teacher: str | Path | None = None,
    workers: int | None = None,
    on_step: StepProgress = lambda epoch, step, steps, loss: None,
) -> LoadedBundle:
    """Train a network, calibrate it, write the bundle; of an ensemble one member after the other, then join them.

    A run that was cut off goes on from its last epoch when the same call is made again.

    Args:
        shards: Prepared shard folder.
        recipe: What to do.
        out: Folder of the bundle. Checkpoints lie beside it, in ``<out>.checkpoints``, until it is written; the members
            of an ensemble in ``<out>.members``, where they stay.
        weights: First weights of the backbone, in place of the recipe's.
        teacher: Model to learn from, for a recipe with ``distillation``; it must have been trained from these shards.
        workers: Ray Train workers; None trains in this process, without Ray.
        on_step: Called as the work goes on (in this process only).

    Raises:
        DataError: The training or the calibration split is empty, or no image is in the validation fold.
        RecipeError: A teacher without ``distillation``, or the other way round.
        BundleError: The teacher is damaged, or was trained from other data.
        CheckpointError: The checkpoints beside `out` belong to another recipe, other data or a run that is at work.
    """
    if recipe.members:
        return _train_members(shards, recipe, out, weights=weights, teacher=teacher, workers=workers, on_step=on_step)
    folder = ShardFolder(shards)
    for split in ("train", "calibration"):
        if not folder.manifest.counts[split]:
            raise DataError(f"no {split} image", where=shards, todo="prepare a larger data set")
    folder.held_out(recipe.validation_fold)  # a fold that is not there is said before anything is written
    counts = class_counts(labels_of(folder.metadata("train")["dx"]))
    master = load_teacher(teacher, recipe, folder.manifest.data_hash)
    recipe = recipe.starting_from(weights)
    torch.manual_seed(recipe.seed)
    network = build(recipe.backbone.model_copy(update={"weights": str(weights)}) if weights else recipe.backbone)
    checkpoints = out.absolute().with_name(out.name + ".checkpoints")
    busy = CheckpointError(
        "another run trains this model", where=checkpoints, todo="wait until it ends, or train into another --out"
    )
    with locked(checkpoints / "train.lock", busy):
        started = datetime.now(UTC)
        if workers is None:
            network, history, device = fit_here(network, recipe, folder, checkpoints, on_step, master)
        else:
            from dermaflow.learning.cluster import fit_on_cluster  # a hospital site has no Ray

            network, history, device = fit_on_cluster(network, recipe, folder, checkpoints, workers, master)
        record = TrainingRecord(
            recipe_name=recipe.name, recipe=recipe.model_dump(mode="json"), recipe_hash=recipe.digest, seed=recipe.seed,
            data_hash=folder.manifest.data_hash, started=started.isoformat(timespec="seconds"),
            seconds=sum(entry["seconds"] for entry in history),  # also those before the run was cut off
            epochs=len(history), device=device, workers=workers or 1, history=history,
            initial_weights=recipe.backbone.weights, versions=versions(),
            teacher=master.sha256 if master else None,
        )  # fmt: skip
        bundle = Bundle(
            name=recipe.name, backbone=recipe.backbone.name, input=recipe.input_spec, dropout=recipe.backbone.dropout,
            train_priors=(counts / counts.sum()).tolist(), training=record,
        )  # fmt: skip
        calibrate_and_save(network, bundle, folder, out)
        shutil.rmtree(checkpoints, ignore_errors=True)
    return load_bundle(out)


def _train_members(shards: str | Path, recipe: Recipe, out: Path, **how: Any) -> LoadedBundle:
    """Train what is not there yet of an ensemble, and join it."""
    folder = out.absolute().with_name(out.name + ".members")
    members, models = recipe.member_recipes(), {}
    if how["weights"] is not None and len(kinds := {member.backbone.name for member in members.values()}) > 1:
        raise RecipeError(
            f"one file of first weights for {' and '.join(sorted(kinds))}", where="--weights", expected="one backbone",
            todo="name a file for each in the recipe: members: {NAME: {backbone.weights: FILE}}",
        )  # fmt: skip
    for name, member in members.items():
        place = folder / name
        if place.exists():
            models[name] = load_bundle(place)
            found, wanted = models[name].bundle.training, member.starting_from(how["weights"]).digest
            if found.recipe_hash != wanted:
                raise CheckpointError(
                    f"was trained by another recipe ({found.recipe_hash[:12]})", where=place, expected=wanted[:12],
                    todo="train into another --out, or remove the folder",
                )  # fmt: skip
            log.info("member %s is there already: %s", name, place)
        else:
            log.info("member %s of %d", name, len(recipe.members))
            models[name] = train(shards, member, place, **how)
    return join_models(models, shards, out, recipe.name, recipe=recipe.model_dump(mode="json"))


def load_teacher(teacher: str | Path | None, recipe: Recipe, data_hash: str) -> LoadedBundle | None:
    """The model to learn from, if the recipe has ``distillation``; raises as `train`."""
    if (teacher is None) != (recipe.distillation is None):
        raise RecipeError(
            "no teacher" if teacher is None else "a teacher, but the recipe does not say how to learn from it",
            where="distillation",
            expected="both a teacher and this section",
            todo="pass --teacher MODEL" if teacher is None else "take a recipe that has it: ham10000-distilled",
        )
    if teacher is None:
        return None
    loaded = load_bundle(teacher)
    if loaded.bundle.training.data_hash != data_hash:
        raise BundleError(
            f"was trained from other data ({loaded.bundle.training.data_hash[:12]})", where=teacher,
            expected=f"the shards ({data_hash[:12]}): what the teacher knows must be in nobody's test",
            todo="train the teacher from these shards",
        )  # fmt: skip
    return loaded


def versions() -> dict[str, str]:
    """Versions of what decides a training run, for its record."""
    found = {"python": platform.python_version()}
    for package in ("dermaflow", "torch", "torchvision", "numpy", "ray"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a hospital site has no Ray
            continue
    return found
