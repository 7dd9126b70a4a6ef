"""From shards and a recipe to a calibrated bundle."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from dermaflow.bundles.bundle import LoadedBundle, load_bundle
from dermaflow.errors import DataError
from dermaflow.learning.backbones import build
from dermaflow.learning.calibration import calibrate_and_save
from dermaflow.learning.local import class_counts, fit_here
from dermaflow.learning.recipe import Recipe
from dermaflow.preparation.reading import ShardFolder, labels_of
from dermaflow.schemas.bundle import Bundle, TrainingRecord

StepProgress = Callable[[int, int, int, float], None]
"""Called with epoch, step, steps of the epoch and the mean loss so far."""


def train(
    shards: str | Path,
    recipe: Recipe,
    out: Path,
    *,
    weights: Path | None = None,
    workers: int | None = None,
    on_step: StepProgress = lambda epoch, step, steps, loss: None,
) -> LoadedBundle:
    """Train a network, calibrate it, write the bundle.

    A run that was cut off goes on from its last epoch when the same call is made again.

    Args:
        shards: Prepared shard folder.
        recipe: What to do.
        out: Folder of the bundle. Checkpoints lie beside it, in ``<out>.checkpoints``, until it is written.
        weights: First weights of the backbone, in place of the recipe's.
        workers: Ray Train workers; None trains in this process, without Ray.
        on_step: Called as the work goes on (in this process only).

    Raises:
        DataError: The training or the calibration split is empty.
        CheckpointError: The checkpoints beside `out` belong to another recipe or other data.
    """
    folder = ShardFolder(shards)
    for split in ("train", "calibration"):
        if not folder.manifest.counts[split]:
            raise DataError(f"no {split} image", where=shards, todo="prepare a larger data set")
    counts = class_counts(labels_of(folder.metadata("train")["dx"]))
    if weights is not None:
        backbone = recipe.backbone.model_copy(update={"weights": weights.name})
        recipe = recipe.model_copy(update={"backbone": backbone})
    torch.manual_seed(recipe.seed)
    network = build(recipe.backbone.model_copy(update={"weights": str(weights)}) if weights else recipe.backbone)
    checkpoints = out.absolute().with_name(out.name + ".checkpoints")
    started = datetime.now(UTC)
    if workers is None:
        network, history, device = fit_here(network, recipe, folder, checkpoints, on_step)
    else:
        from dermaflow.learning.cluster import fit_on_cluster  # a hospital site has no Ray

        network, history, device = fit_on_cluster(network, recipe, folder, checkpoints, workers)
    record = TrainingRecord(
        recipe_name=recipe.name, recipe=recipe.model_dump(mode="json"), recipe_hash=recipe.digest, seed=recipe.seed,
        data_hash=folder.manifest.data_hash, started=started.isoformat(timespec="seconds"),
        seconds=sum(entry["seconds"] for entry in history),  # also those before the run was cut off
        epochs=len(history), device=device, workers=workers or 1, history=history,
        initial_weights=recipe.backbone.weights, versions=versions(),
    )  # fmt: skip
    bundle = Bundle(
        name=recipe.name, backbone=recipe.backbone.name, input=recipe.input_spec, dropout=recipe.backbone.dropout,
        train_priors=(counts / counts.sum()).tolist(), training=record,
    )  # fmt: skip
    calibrate_and_save(network, bundle, folder, out)
    shutil.rmtree(checkpoints, ignore_errors=True)
    return load_bundle(out)


def versions() -> dict[str, str]:
    """Versions of what decides a training run, for its record."""
    found = {"python": platform.python_version()}
    for package in ("dermaflow", "torch", "torchvision", "numpy", "ray"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a hospital site has no Ray
            continue
    return found
