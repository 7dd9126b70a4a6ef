"""The training loop: plain torch, read from top to bottom. It knows neither Ray nor where the batches come from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dermaflow.errors import CheckpointError, DermaflowError
from dermaflow.learning.augmentation import augment
from dermaflow.learning.backbones import Network
from dermaflow.learning.losses import distance, make_loss
from dermaflow.learning.optimisation import (
    make_optimizer,
    make_schedule,
    moments_of,
    pick_precision,
    put_moments,
    train_mode,
)
from dermaflow.learning.recipe import Recipe
from dermaflow.preparation.balancing import Balance
from dermaflow.preparation.transforms import normalise

Batch = tuple[torch.Tensor, torch.Tensor]
State = dict[str, Any]
"""Tensors, numbers, strings, lists and dicts only, so that it loads with ``weights_only=True``."""


@dataclass(frozen=True)
class Feed:
    """Where one worker's training batches come from.

    Attributes:
        steps: Batches an epoch, the same on every worker.
        epoch: Gives the batches of an epoch: pixels uint8 [N, H, W, 3] and class indices int64 [N].
    """

    steps: int
    epoch: Callable[[int], Iterable[Batch]]


@dataclass
class Run:
    """What a loop needs besides the network; the defaults are those of a single process.

    Attributes:
        recipe: The recipe.
        feed: Training batches.
        rule: Balancing of the training split.
        priors: float [7], class frequencies of the training split before balancing.
        data_hash: Of the shards, so that a checkpoint is not continued on other data.
        device: Where to compute.
        validate: Gives ``val_*`` figures of a network; called on rank 0 only.
        correct: Called between the gradient and the step, to change the gradient.
        on_step: Called with epoch, step, steps and loss.
        on_epoch: Called after each epoch with its history entry and a function that makes the state to keep.
        moments: What the optimiser remembered after an earlier call (`moments_of`); replaced at the end.
        teacher: A finished network to learn from, as the recipe's ``distillation`` says.
        teacher_size: Height and width that it was trained at.
        wrap: Puts the network into DDP.
        rank: Number of this worker.
    """

    recipe: Recipe
    feed: Feed
    rule: Balance
    priors: np.ndarray
    data_hash: str
    device: torch.device
    validate: Callable[[Network], dict[str, float]] | None = None
    correct: Callable[[Network], None] = lambda network: None
    on_step: Callable[[int, int, int, float], None] = lambda epoch, step, steps, loss: None
    on_epoch: Callable[[dict[str, float], Callable[[], State]], None] = lambda entry, state: None
    teacher: Network | None = None
    teacher_size: tuple[int, int] = (0, 0)
    wrap: Callable[[nn.Module], nn.Module] = lambda network: network
    rank: int = 0
    moments: dict[str, torch.Tensor] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)


def fit(network: Network, run: Run, state: State | None = None) -> tuple[Network, list[dict[str, float]]]:
    """Train a network: head epochs with a frozen backbone, then everything.

    The same recipe, data and seed give the same weights on the same machine, in one go or resumed after any epoch.

    Args:
        network: With its first weights.
        run: Recipe, batches, callbacks.
        state: Of an earlier, unfinished call, to go on from.

    Returns:
        The network to keep (averaged or best, as the recipe says) on the CPU, and one history entry an epoch.

    Raises:
        CheckpointError: The state belongs to another recipe or other data.
        DermaflowError: The loss is no longer finite.
    """
    recipe, optim = run.recipe, run.recipe.optim
    network.to(device=run.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    average: AveragedModel | None = None
    if optim.ema:
        average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(optim.ema), use_buffers=True)
    class_weights = torch.tensor(run.rule.loss_weights, dtype=torch.float32, device=run.device)
    loss_of = make_loss(recipe.loss, class_weights, torch.tensor(run.priors, dtype=torch.float32, device=run.device))
    precision = pick_precision(optim, run.device)
    if run.teacher is not None:
        run.teacher.to(device=run.device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    best: State = {"loss": math.inf, "epoch": -1, "network": {}}
    first_epoch, given = 0, run.moments
    if state is not None:
        check_state(state, recipe, run.data_hash)
        network.load_state_dict(state["network"])
        if average is not None:
            average.load_state_dict(state["average"])
        run.history[:], best, first_epoch = state["history"], state["best"], state["epoch"] + 1

    phases = ((0, optim.head_epochs, True), (optim.head_epochs, optim.head_epochs + optim.epochs, False))
    for start, end, head_only in phases:
        if first_epoch >= end or start == end:
            continue
        optimizer = make_optimizer(network, optim, head_only=head_only)
        schedule = make_schedule(optimizer, optim, (end - start) * run.feed.steps)
        if state is not None and first_epoch > start:
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
        elif given:
            put_moments(optimizer, network, given)
        model = run.wrap(network)

        for epoch in range(max(start, first_epoch), end):
            if not head_only and _patience_is_spent(run, best["epoch"], start):
                break
            began = time.perf_counter()
            torch.manual_seed(recipe.seed * 1_000_003 + epoch * 1009 + run.rank)  # dropout
            draws = torch.Generator().manual_seed(recipe.seed * 1_000_033 + epoch * 1013 + run.rank)  # augmentation
            train_mode(network, freeze_norm=optim.freeze_norm)
            total, images = 0.0, 0.0
            size = recipe.input.at_epoch(epoch)
            shown = max(size, run.teacher_size)  # a teacher never sees a small picture enlarged
            for step, (pixels, targets) in enumerate(islice(run.feed.epoch(epoch), run.feed.steps)):
                views = normalise(augment(pixels.to(run.device), recipe.augment, draws, shown), recipe.input_spec)
                inputs = _at_size(views, size)
                targets = targets.to(run.device)
                with torch.autocast(run.device.type, torch.bfloat16, enabled=precision == torch.bfloat16):
                    logits = model(inputs)
                loss = loss_of(logits, targets)
                if recipe.distillation is not None:
                    share = recipe.distillation.weight
                    taught = distance(logits, _taught(run, views, precision), recipe.distillation.temperature)
                    loss = (1 - share) * loss + share * taught
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                run.correct(network)
                nn.utils.clip_grad_norm_(network.parameters(), optim.clip)
                optimizer.step()
                schedule.step()
                if average is not None:
                    average.update_parameters(network)
                total, images = total + loss.item() * len(targets), images + len(targets)
                run.on_step(epoch, step + 1, run.feed.steps, total / images)

            kept: Network = network if average is None else average.module  # type: ignore[assignment]
            total, images = _sum_over_workers(total, images, run.device)
            entry = {"epoch": float(epoch), "loss": total / images}
            if not math.isfinite(entry["loss"]):
                raise DermaflowError(
                    f"the loss of epoch {epoch} is {entry['loss']}", expected="a finite number",
                    todo=f"lower optim.{'head_lr' if head_only else 'lr'} in the recipe",
                )  # fmt: skip
            entry |= {"lr": float(schedule.get_last_lr()[0]), "images": images}
            if run.validate is not None and ((epoch + 1) % recipe.monitor_every == 0 or epoch + 1 == end):
                entry |= _from_rank_0(run, lambda kept=kept: run.validate(kept))  # type: ignore[misc]
                if recipe.validation_fold is not None and entry["val_loss"] < best["loss"]:
                    best = {"loss": entry["val_loss"], "epoch": epoch, "network": _copy(kept.state_dict())}
            entry["seconds"] = time.perf_counter() - began
            run.history.append(entry)

            def snapshot(
                epoch: int = epoch, optimizer: Any = optimizer, schedule: Any = schedule, best: State = best
            ) -> State:
                return {
                    "recipe": recipe.digest, "data": run.data_hash, "epoch": epoch, "history": run.history,
                    "network": network.state_dict(), "average": average.state_dict() if average is not None else {},
                    "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "best": best,
                }  # fmt: skip

            run.on_epoch(entry, snapshot)

        run.moments = moments_of(optimizer, network)

    kept = network if average is None else average.module  # type: ignore[assignment]
    if optim.patience is not None and best["network"]:
        kept.load_state_dict(best["network"])
    return kept.cpu(), run.history


def _taught(run: Run, views: torch.Tensor, precision: torch.dtype) -> torch.Tensor:
    """What the teacher says of a batch, at the size it was trained at."""
    assert run.teacher is not None
    with torch.no_grad(), torch.autocast(run.device.type, torch.bfloat16, enabled=precision == torch.bfloat16):
        return run.teacher(_at_size(views, run.teacher_size))


def _at_size(views: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return views if tuple(views.shape[2:]) == size else nn.functional.interpolate(views, size, mode="bilinear")


def _patience_is_spent(run: Run, best: int, start: int) -> bool:
    """Whether the last look at the validation loss came `patience` epochs after the best one of this phase.

    Asked before an epoch and of the history, so that a run that is resumed after its last epoch ends there too.
    """
    patience = run.recipe.optim.patience
    if patience is None or not run.history or "val_loss" not in run.history[-1]:
        return False
    return run.history[-1]["epoch"] - max(best, start - 1) >= patience


def check_state(state: State, recipe: Recipe, data_hash: str) -> None:
    """Raise CheckpointError if a state belongs to another recipe or other data."""
    for what, found, wanted in (("recipe", state["recipe"], recipe.digest), ("data", state["data"], data_hash)):
        if found != wanted:
            raise CheckpointError(
                f"the checkpoint belongs to another {what} ({found[:12]})", expected=wanted[:12],
                todo="train into another --out, or remove the checkpoint to start anew",
            )  # fmt: skip


def _copy(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def _sum_over_workers(total: float, images: float, device: torch.device) -> tuple[float, float]:
    sums = torch.tensor([total, images], dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(sums)
    return float(sums[0]), float(sums[1])


def _from_rank_0(run: Run, compute: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Compute on rank 0 and give every worker the result, so that all of them stop at the same epoch."""
    box = [compute() if run.rank == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0, device=run.device)
    return box[0] or {}
