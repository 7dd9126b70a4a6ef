"""Train in this process, without Ray: batches from memory, a checkpoint on disk after each epoch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import balanced_accuracy_score

from dermaflow import monitoring, storage
from dermaflow.bundles.bundle import LoadedBundle
from dermaflow.errors import CheckpointError
from dermaflow.learning.backbones import Network
from dermaflow.learning.inference import network_of, predict
from dermaflow.learning.loop import Batch, Feed, Run, State, fit
from dermaflow.learning.optimisation import keep_freed_memory, pick_device
from dermaflow.learning.recipe import Recipe
from dermaflow.preparation.balancing import Balance, balance, draw_epoch, epoch_length
from dermaflow.preparation.reading import ShardFolder, labels_of
from dermaflow.settings import settings
from dermaflow.taxonomy import CODES

log = logging.getLogger(__name__)

CHECKPOINT_NAME = "latest.pt"


def memory_feed(pixels: np.ndarray, labels: np.ndarray, rule: Balance, recipe: Recipe) -> Feed:
    """Batches from arrays in memory, drawn anew each epoch from the recipe's seed.

    Args:
        pixels: uint8 [N, H, W, 3].
        labels: int64 [N].
        rule: How often each class is drawn.
        recipe: Seed and batch size.
    """
    size = min(recipe.optim.batch_size, len(labels))
    steps = max(1, epoch_length(labels, rule) // size)

    def epoch(number: int) -> Iterator[Batch]:
        order = draw_epoch(labels, rule, np.random.default_rng([recipe.seed, number]))
        for chosen in np.resize(order, steps * size).reshape(steps, size):
            yield torch.from_numpy(pixels[chosen]), torch.from_numpy(labels[chosen])

    return Feed(steps, epoch)


def validator(pixels: np.ndarray, labels: np.ndarray, recipe: Recipe) -> Callable[[Network], dict[str, float]]:
    """A function that gives log loss, accuracy and balanced accuracy of a network on fixed images."""

    def validate(network: Network) -> dict[str, float]:
        logits, _ = predict(network, pixels, recipe.input_spec.model_copy(update={"views": 1}))
        loss = torch.nn.functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels))
        found = logits.argmax(1)
        return {
            "val_loss": float(loss),
            "val_accuracy": float((found == labels).mean()),
            "val_balanced_accuracy": float(balanced_accuracy_score(labels, found)),
        }

    return validate


def taught_by(teacher: LoadedBundle | None) -> dict[str, Any]:
    """What a `Run` needs of a teacher, if there is one."""
    if teacher is None:
        return {}
    size = teacher.bundle.input
    return {"teacher": network_of(teacher), "teacher_size": (size.height, size.width)}


def class_counts(labels: np.ndarray) -> np.ndarray:
    """Images of each class, int64 [7]."""
    return np.bincount(labels, minlength=len(CODES))


def fit_here(
    network: Network, recipe: Recipe, folder: ShardFolder, checkpoints: Path,
    on_step: Callable[[int, int, int, float], None], teacher: LoadedBundle | None = None,
) -> tuple[Network, list[dict[str, float]], str]:  # fmt: skip
    """Train in this process; resumes from `checkpoints` if a run was cut off there.

    Returns:
        The trained network, the history and the device's name.
    """
    torch.set_num_threads(settings().threads)
    keep_freed_memory()
    device = pick_device()
    height, width = recipe.input.height, recipe.input.width
    meta = folder.metadata("train")
    labels = labels_of(meta["dx"])
    pixels = folder.pixels("train", height, width, threads=settings().threads)
    held = folder.held_out(recipe.validation_fold)
    if recipe.validation_fold is None:  # a curve to look at; nothing is chosen on it
        watched = folder.pixels("calibration", height, width, threads=settings().threads)
        watched_labels = labels_of(folder.metadata("calibration")["dx"])
    else:
        watched, watched_labels = pixels[held], labels[held]
    learnt = ~held & folder.drawn(recipe.train_share)
    if not learnt.all():  # indexing copies: gigabytes at the published size
        pixels, labels = pixels[learnt], labels[learnt]
    rule = balance(class_counts(labels), recipe.balance)
    checkpoint = checkpoints / CHECKPOINT_NAME

    def keep(entry: dict[str, float], state: Callable[[], State]) -> None:
        with storage.open_atomic(checkpoint) as stream:
            torch.save(state(), stream)
        log.info("epoch %d: %s", entry["epoch"], ", ".join(f"{k} {v:.4g}" for k, v in entry.items() if k != "epoch"))
        monitoring.epoch_ended(entry)

    run = Run(
        recipe, memory_feed(pixels, labels, rule, recipe), rule, class_counts(labels) / len(labels),
        folder.manifest.data_hash, device, validate=validator(watched, watched_labels, recipe),
        on_step=on_step, on_epoch=keep, **taught_by(teacher),
    )  # fmt: skip
    state = load_checkpoint(checkpoint)
    if state is not None:
        log.info("resuming after epoch %d from %s", state["epoch"], checkpoint)
    network, history = fit(network, run, state)
    return network, history, str(device)


def load_checkpoint(path: Path) -> State | None:
    """The state of a run that was cut off, or None; raises CheckpointError for a file that is none."""
    if not path.exists():
        return None
    try:
        state: State = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise CheckpointError(f"unreadable: {error}", where=path, todo="remove the folder to start anew") from error
    if not isinstance(state, dict) or "epoch" not in state:
        raise CheckpointError("no checkpoint of a training run", where=path, todo="remove the folder to start anew")
    return state
