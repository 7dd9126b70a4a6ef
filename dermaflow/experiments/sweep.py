"""A sweep: variants of one recipe, each trained on the same lesion folds and seeds, none of them on the test split.

A trial is one variant, fold and seed. It lies in a folder named by its content (recipe, data, first weights), so one
that was run before is not run again, in this sweep or in another one with the same output folder.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dermaflow import storage
from dermaflow.errors import RecipeError
from dermaflow.learning.backbones import build
from dermaflow.learning.inference import predict
from dermaflow.learning.local import fit_here
from dermaflow.learning.recipe import Recipe, load_recipe
from dermaflow.learning.train import StepProgress, versions
from dermaflow.locks import is_locked, locked
from dermaflow.preparation.reading import ShardFolder, labels_of
from dermaflow.settings import settings
from dermaflow.taxonomy import CODES
from dermaflow.trust.temperature import fit_temperature, scale

log = logging.getLogger(__name__)

RECORD_NAME = "record.json"
PREDICTIONS_NAME = "predictions.parquet"


class Sweep(BaseModel):
    """A sweep file.

    Attributes:
        question: What is asked, in a sentence; stands above the table.
        recipe: Of which all are variants: a name, or a YAML file.
        variants: Name of each and its changes, dotted keys as in ``{"optim.epochs": 3}``. The first is what the others
            are compared with.
        folds: Lesion folds of the training split, or sources of its images, each held out in a trial of its own.
        seeds: Of the training.
    """

    model_config = ConfigDict(extra="forbid")

    question: str
    recipe: str
    variants: dict[str, dict[str, Any]] = Field(min_length=1)
    folds: list[int | str] = Field([0], min_length=1)
    seeds: list[int] = Field([0], min_length=1)

    @property
    def trials(self) -> list[tuple[str, int | str, int]]:
        """Variant, fold and seed of each trial: all variants of a fold before the next fold."""
        return [(name, fold, seed) for seed in self.seeds for fold in self.folds for name in self.variants]

    def recipe_of(self, variant: str, fold: int | str, seed: int) -> Recipe:
        """The recipe of a trial.

        Raises:
            RecipeError: A change names no key, or has an impossible value; or the recipe is not one network's.
        """
        recipe = load_recipe(self.recipe, self.variants[variant] | {"validation_fold": fold, "seed": seed})
        for key, what in (("members", "an ensemble"), ("distillation", "a taught network")):
            if getattr(recipe, key):
                raise RecipeError(
                    f"{what} is no trial", where=f"{variant}: {key}", expected="one network, taught by labels",
                    todo="try the members one by one; dermaflow train makes the whole",
                )  # fmt: skip
        return recipe


class Record(BaseModel):
    """What there is to know of a trial; written last, so that a folder with a record is whole.

    Attributes:
        recipe_hash: `Recipe.digest`.
        initial_weights: Name and SHA-256 of a file, or ``imagenet`` or ``none``.
        seconds: Of training.
        images: Held out.
        temperature: Fitted on the held-out images themselves: one number, the same freedom for every variant.
    """

    model_config = ConfigDict(extra="forbid")

    recipe: dict[str, Any]
    recipe_hash: str
    data_hash: str
    initial_weights: str
    fold: int | str
    seed: int
    started: str
    seconds: float
    device: str
    threads: int
    images: int
    temperature: float
    history: list[dict[str, float]]
    versions: dict[str, str]


def load_sweep(path: Path) -> Sweep:
    """Read a sweep file and check every recipe in it.

    Raises:
        RecipeError: No such file, no YAML, a misspelt key, or a variant that is no recipe.
    """
    if not path.is_file():
        raise RecipeError("no such file", where=path, expected="a sweep: question, recipe, variants, folds, seeds")
    try:
        sweep = Sweep.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, ValidationError) as error:
        raise RecipeError(
            f"no sweep: {error}", where=path, expected="question, recipe, variants (name: changes), folds, seeds"
        ) from error
    for trial in sweep.trials:
        sweep.recipe_of(*trial)
    return sweep


def trial_folder(recipe: Recipe, folder: ShardFolder, out: Path) -> Path:
    """Where the trial of a recipe lies."""
    content = f"{recipe.digest} {folder.manifest.data_hash} {_weights(recipe)}"
    return out / "trials" / hashlib.sha256(content.encode()).hexdigest()[:16]


def run_trial(
    recipe: Recipe, shards: str, out: Path, on_step: StepProgress = lambda epoch, step, steps, loss: None
) -> Path:
    """Train without the fold that the recipe holds out, predict that fold, and write both down.

    A trial that was run before is left as it is; one that another sweep runs is waited for; one that was cut off goes
    on after its last epoch.

    Args:
        recipe: With a validation fold.
        shards: Shard folder.
        out: Folder of the sweep.
        on_step: Called as the training goes on.

    Returns:
        Folder of the trial: ``record.json``, ``predictions.parquet`` (``image_id``, ``lesion_id``, ``dx`` and
        ``p_akiec`` ... ``p_vasc`` of each image of the fold).

    Raises:
        RecipeError: The recipe holds no fold out.
        DataError: The shards have no such fold or source.
    """
    if recipe.validation_fold is None:
        raise RecipeError("holds no fold out", where=recipe.name, expected="validation_fold")
    folder = ShardFolder(shards)
    place = trial_folder(recipe, folder, out)
    lock = place / "trial.lock"
    if is_locked(lock):
        log.info("waiting for another sweep that runs %s", place)
    with locked(lock):
        if not (place / RECORD_NAME).exists():
            _run(recipe, folder, place, on_step)
    return place


def _run(recipe: Recipe, folder: ShardFolder, place: Path, on_step: StepProgress) -> None:
    started = datetime.now(UTC).isoformat(timespec="milliseconds")  # two may start within a second
    torch.manual_seed(recipe.seed)
    network, history, device = fit_here(build(recipe.backbone), recipe, folder, place, on_step)
    meta = folder.metadata("train")
    held = folder.held_out(recipe.validation_fold)
    pixels = folder.pixels("train", recipe.input.height, recipe.input.width, threads=settings().threads)[held]
    meta = meta[held].reset_index(drop=True)
    logits, _ = predict(network.to(memory_format=torch.channels_last), pixels, recipe.input_spec)
    temperature = fit_temperature(logits, labels_of(meta["dx"]))
    p = pd.DataFrame(scale(logits, temperature, np.zeros(len(CODES))), columns=[f"p_{code}" for code in CODES])
    pd.concat([meta[["image_id", "lesion_id", "dx"]], p], axis=1).to_parquet(place / PREDICTIONS_NAME)
    record = Record(
        recipe=recipe.model_dump(mode="json"), recipe_hash=recipe.digest, data_hash=folder.manifest.data_hash,
        initial_weights=_weights(recipe), fold=recipe.validation_fold, seed=recipe.seed, started=started,
        seconds=sum(entry["seconds"] for entry in history), device=device, threads=settings().threads,
        images=len(meta), temperature=temperature, history=history, versions=versions(),
    )  # fmt: skip
    storage.write_bytes(place / RECORD_NAME, record.model_dump_json(indent=1).encode())
    for checkpoint in place.glob("*.pt"):
        checkpoint.unlink()


def run_sweep(
    sweep: Sweep,
    shards: str,
    out: Path,
    *,
    at_once: int | None = None,
    on_step: Callable[[str, int, int, float], None] = lambda trial, step, steps, loss: None,
    on_trial: Callable[[int], None] = lambda done: None,
) -> dict[tuple[str, int | str, int], Path]:
    """Run the trials that were not run yet.

    Args:
        sweep: What to try.
        shards: Shard folder.
        out: Folder of all trials.
        at_once: Trials at a time as Ray tasks, each with its share of the CPUs (and a GPU where there are any); None
            runs one after another in this process, without Ray.
        on_step: Called with the trial and epoch, the step, steps of the epoch and the loss (without Ray only).
        on_trial: Called with the number of trials that are done.

    Returns:
        The folder of each trial.

    Raises:
        DataError: A fold or a source that the shards do not have.
    """
    folder = ShardFolder(shards)
    for fold in sweep.folds:
        folder.held_out(fold)
    recipes = {trial: sweep.recipe_of(*trial) for trial in sweep.trials}
    if at_once is not None:
        from dermaflow.experiments.cluster import run_trials  # without it no Ray is needed

        return run_trials(recipes, shards, out, at_once, on_trial)
    found = {}
    for done, (trial, recipe) in enumerate(recipes.items(), start=1):
        name = "{} fold {} seed {}".format(*trial)
        epochs = recipe.optim.head_epochs + recipe.optim.epochs

        def show(epoch: int, step: int, steps: int, loss: float, name: str = name, epochs: int = epochs) -> None:
            on_step(f"{name}, epoch {epoch + 1}/{epochs}", step, steps, loss)

        found[trial] = run_trial(recipe, shards, out, show)
        log.info("trial %d of %d: %s in %s", done, len(recipes), name, found[trial])
        on_trial(done)
    return found


def _weights(recipe: Recipe) -> str:
    name = recipe.backbone.weights or "none"
    if name in ("none", "imagenet"):
        return name
    try:
        return f"{Path(name).name} {hashlib.sha256(Path(name).read_bytes()).hexdigest()}"
    except OSError as error:
        raise RecipeError(f"no such weights file: {error}", where="backbone.weights") from error
