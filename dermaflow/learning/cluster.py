"""Train on a cluster: Ray Train runs the loop on one or more workers, Ray Data feeds it.

What is drawn is planned, not left to chance: an epoch is the same images whatever the number of workers, the same as in
`dermaflow.learning.local`, and the same after a restart. Only references travel; each task reads, decodes and resizes a
block of images, and the splitter deals the blocks out to the workers in turn.
"""

from __future__ import annotations

import logging
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from dermaflow import storage
from dermaflow.errors import DataError, DermaflowError, RecipeError
from dermaflow.learning.backbones import Network, build
from dermaflow.learning.local import CHECKPOINT_NAME, class_counts, load_checkpoint, validator
from dermaflow.learning.loop import Batch, Feed, Run, State, fit
from dermaflow.learning.optimisation import pick_device
from dermaflow.learning.recipe import Recipe
from dermaflow.preparation.balancing import Balance, balance, draw_epoch, epoch_length
from dermaflow.preparation.cluster import connect, own_error
from dermaflow.preparation.reading import RowGroup, ShardFolder, labels_of
from dermaflow.preparation.transforms import pixel_batch
from dermaflow.settings import settings, start_logging

import ray  # isort: skip  # after preparation.cluster, which sets Ray's environment
import ray.data
import ray.train
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    DataConfig,
    FailureConfig,
    Result,
    RunConfig,
    ScalingConfig,
    UserCallback,
)
from ray.train.torch import TorchTrainer, prepare_model
from ray.util.queue import Queue

log = logging.getLogger(__name__)

RUN_NAME = "ray"
"""Folder within the checkpoint folder in which Ray Train keeps its records and checkpoints."""
WORKER_FAILURES = 3
"""Lost workers (a node taken away, a process killed for memory) that a run survives."""
BLOCK_BYTES = 32 << 20
"""Aimed-at pixels of a block: large enough to mix some 400 images of 144x192, well under Ray Data's limit of 128 MiB."""


@dataclass(frozen=True)
class Plan:
    """Which images an epoch draws and which worker gets them: a pure function of data, recipe and number of workers.

    Attributes:
        recipe: The recipe.
        workers: How many.
        groups: Row groups of the training split.
        numbers: int64 [N], places in the training split of the images to train on.
        labels: int64 [N], their classes.
    """

    recipe: Recipe
    workers: int
    groups: list[RowGroup]
    numbers: np.ndarray
    labels: np.ndarray

    @cached_property
    def rule(self) -> Balance:
        """Balancing of the images to train on."""
        return balance(class_counts(self.labels), self.recipe.balance)

    @property
    def batch_size(self) -> int:
        """Images of one worker's batch."""
        return min(self.recipe.optim.batch_size, len(self.labels)) // self.workers

    @property
    def steps(self) -> int:
        """Batches of an epoch, the same on every worker."""
        return max(1, epoch_length(self.labels, self.rule) // (self.batch_size * self.workers))

    def blocks(self, epoch: int) -> Iterator[np.ndarray]:
        """The images of an epoch, a block a task: int64 places in the training split.

        Blocks come in rounds, one for each worker, all of one length, so that dealing them out in turn gives every worker
        whole batches and ends the epoch for all at once. A block takes neighbouring images of a new order of the row
        groups, so that it reads few of them, and is shuffled.
        """
        size = self.workers * self.batch_size
        rng = np.random.default_rng([self.recipe.seed, epoch])
        drawn = np.resize(draw_epoch(self.labels, self.rule, rng), self.steps * size)
        owners = _owners(self.groups, self.numbers)[drawn]
        drawn = drawn[np.argsort(rng.permutation(len(self.groups))[owners], kind="stable")]
        image_bytes = self.recipe.input.height * self.recipe.input.width * 3
        batches = max(1, BLOCK_BYTES // (image_bytes * self.batch_size))
        for a_round in np.split(drawn, range(batches * size, len(drawn), batches * size)):
            for block in np.split(a_round, self.workers):
                yield self.numbers[rng.permutation(block)]


@dataclass(frozen=True)
class Job:
    """What a worker is given.

    Attributes:
        plan: The epochs.
        weights: Reference to the state dict of the network's first weights.
        data_hash: Of the shards.
        watched_groups: Row groups that hold the images to validate on.
        watched: int64, places of these images.
    """

    plan: Plan
    weights: ray.ObjectRef
    data_hash: str
    watched_groups: list[RowGroup]
    watched: np.ndarray


def fit_on_cluster(
    network: Network, recipe: Recipe, folder: ShardFolder, checkpoints: Path, workers: int
) -> tuple[Network, list[dict[str, float]], str]:
    """Train with Ray Train, a checkpoint an epoch; survives lost workers, and resumes a run that was cut off.

    Args:
        network: With its first weights.
        recipe: Its batch size is that of all workers together.
        folder: Shards; on a cluster of several machines, reachable from all of them.
        checkpoints: Folder of the run's records; likewise.
        workers: Processes, each with a GPU if there are any.

    Returns:
        The trained network on the CPU, the history and the workers' device.

    Raises:
        RecipeError: The batch size does not divide among the workers, or the validation fold is empty.
        DataError: Fewer training images than workers.
        CheckpointError: The checkpoints belong to another recipe or other data.
        DermaflowError: Too few GPUs, or what a worker raised.
    """
    use_gpu = pick_device().type == "cuda"
    job = _job(network, recipe, folder, workers)
    connect(cpus=workers + 2)
    found = ray.cluster_resources()
    if use_gpu and found.get("GPU", 0) < workers:
        raise DermaflowError(
            f"{workers} workers and {found.get('GPU', 0):g} GPUs", expected="a GPU for each worker",
            todo="use fewer workers, or DERMAFLOW_DEVICE=cpu",
        )  # fmt: skip
    # Shares, not whole CPUs, where Ray has few: a worker group that cannot be placed would wait for ever, and so would
    # workers whose images cannot be decoded for want of a free CPU.
    share = min(1.0, int(1000 * found["CPU"] / (workers + 1)) / 1000)
    place = checkpoints.absolute() / RUN_NAME

    def images() -> ray.data.Dataset:
        return _images(job.plan, first_epoch=_epochs_done(place), cpus=share)

    with _epoch_log() as progress:
        trainer = TorchTrainer(
            _work,
            train_loop_config={"job": job},
            datasets={"train": images},  # a function: after a lost worker the images start at the epoch that resumes
            dataset_config=DataConfig(execution_options=ray.data.ExecutionOptions(preserve_order=True)),
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu, resources_per_worker={"CPU": share}),
            run_config=RunConfig(
                name=RUN_NAME, storage_path=str(place.parent), callbacks=[_Watch(progress)],
                failure_config=FailureConfig(max_failures=WORKER_FAILURES),
                checkpoint_config=CheckpointConfig(num_to_keep=2),
            ),
        )  # fmt: skip
        try:
            result = trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise _cause(error) from None
    with result.checkpoint.as_directory() as last:
        state = load_checkpoint(Path(last) / CHECKPOINT_NAME)
    assert state is not None
    network.load_state_dict(_kept_weights(state, recipe))
    log.info("trained on %d workers, device %s", workers, result.return_value)
    return network.cpu(), state["history"], result.return_value


def _job(network: Network, recipe: Recipe, folder: ShardFolder, workers: int) -> Job:
    if workers < 1 or recipe.optim.batch_size % workers:
        raise RecipeError(
            f"{recipe.optim.batch_size} images a step do not divide among {workers} workers", where="optim.batch_size",
            expected=f"a multiple of {workers}", todo="change the batch size or --workers",
        )  # fmt: skip
    if not storage.is_remote(folder.uri):  # Ray's processes run in folders of their own
        folder = ShardFolder(Path(folder.uri).absolute())
    meta = folder.metadata("train")
    labels, groups = labels_of(meta["dx"]), folder.row_groups("train")
    held = (meta["fold"] == recipe.validation_fold).to_numpy()
    if recipe.validation_fold is None:  # a curve to look at; nothing is chosen on it
        watched_groups, watched = folder.row_groups("calibration"), np.arange(len(folder.metadata("calibration")))
    elif 0 < held.sum() < len(held):
        watched_groups, watched = groups, np.flatnonzero(held)
    else:
        raise RecipeError(
            f"{held.sum()} of {len(held)} training images are in fold {recipe.validation_fold}", where="validation_fold",
            expected=f"a fold of the shards, 0 to {folder.manifest.folds - 1}",
        )  # fmt: skip
    plan = Plan(recipe, workers, groups, np.flatnonzero(~held), labels[~held])
    if plan.batch_size == 0:
        raise DataError(f"{len(plan.labels)} training images", expected=f"at least one for each of {workers} workers")
    connect(cpus=workers + 2)
    return Job(plan, ray.put(network.state_dict()), folder.manifest.data_hash, watched_groups, watched)


def _owners(groups: list[RowGroup], numbers: np.ndarray) -> np.ndarray:
    """Which row group holds each image."""
    return np.searchsorted(np.cumsum([group.rows for group in groups]), numbers, side="right")


def _read(batch: dict[str, np.ndarray], groups: list[RowGroup], height: int, width: int) -> dict[str, np.ndarray]:
    """Read, decode and resize images in one step; the one place where a training image has pixels before the network.

    Args:
        batch: ``number``, int64 [N]: places of images in the row groups taken together; they may repeat.
        groups: The row groups.
        height: Pixels.
        width: Pixels.

    Returns:
        ``image`` uint8 [N, height, width, 3] and ``label`` int64 [N].
    """
    numbers = batch["number"]
    images, labels = np.empty((len(numbers), height, width, 3), np.uint8), np.empty(len(numbers), np.int64)
    owners, ends = _owners(groups, numbers), np.cumsum([group.rows for group in groups])
    for owner in np.unique(owners):
        group, here = groups[owner], np.flatnonzero(owners == owner)
        rows, places = np.unique(numbers[here] - (ends[owner] - group.rows), return_inverse=True)
        table = group.read(["image", "dx"]).take(rows)
        images[here] = pixel_batch(table["image"].to_pylist(), height, width)[places]
        labels[here] = labels_of(table["dx"].to_pylist())[places]
    return {"image": images, "label": labels}


def _images(plan: Plan, first_epoch: int, cpus: float) -> ray.data.Dataset:
    """The images of all epochs that are left, in order, as one stream: the next epoch is decoded while one is validated."""
    optim, size = plan.recipe.optim, plan.recipe.input
    epochs = range(first_epoch, optim.head_epochs + optim.epochs)
    blocks = [pa.table({"number": block}) for epoch in epochs for block in plan.blocks(epoch)]
    references = ray.data.from_arrow(blocks or [pa.table({"number": pa.array([], pa.int64())})])
    return references.map_batches(
        _read, fn_args=(plan.groups, size.height, size.width), batch_format="numpy", batch_size=None, num_cpus=cpus
    )


def _epochs_done(place: Path) -> int:
    """Epochs with a checkpoint in the records of a run."""
    try:
        result = Result.from_path(str(place))
    except RuntimeError:  # no records yet
        return 0
    return int(result.metrics["epoch"]) + 1


def _work(config: dict[str, Any]) -> str:
    """What every worker runs; returns the name of its device."""
    start_logging()
    job: Job = config["job"]
    plan, recipe = job.plan, job.plan.recipe
    context = ray.train.get_context()
    rank = context.get_world_rank()
    torch.set_num_threads(max(1, settings().threads // context.get_local_world_size()))  # Ray leaves a worker one
    device = ray.train.torch.get_device()
    log.info("worker %d: device %s, %d threads", rank, device, torch.get_num_threads())
    network = build(recipe.backbone.model_copy(update={"weights": None}))
    network.load_state_dict(ray.get(job.weights))
    state = None
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            state = load_checkpoint(Path(folder) / CHECKPOINT_NAME)
    # Only rank 0 validates, but every worker must know that it does: they wait for its figures.
    watched = {"number": job.watched if rank == 0 else job.watched[:0]}
    seen = _read(watched, job.watched_groups, recipe.input.height, recipe.input.width)
    run = Run(
        recipe, Feed(plan.steps, _stream(plan.batch_size)), plan.rule, class_counts(plan.labels) / len(plan.labels),
        job.data_hash, device, validate=validator(seen["image"], seen["label"], recipe) if len(job.watched) else None,
        on_epoch=_report, wrap=lambda network: prepare_model(network, move_to_device=False), rank=rank,
    )  # fmt: skip
    fit(network, run, state)
    return str(device)


def _stream(batch_size: int) -> Callable[[int], Iterator[Batch]]:
    """The worker's share of the images. There is one stream for all epochs, so an epoch goes on where the last one ended."""
    shard = ray.train.get_dataset_shard("train")
    batches = (
        (batch["image"], batch["label"])
        for batch in shard.iter_torch_batches(batch_size=batch_size, prefetch_batches=2, drop_last=True)
    )
    return lambda epoch: batches


def _report(entry: dict[str, float], state: Callable[[], State]) -> None:
    """Tell Ray Train of an epoch, all workers together; rank 0 with the checkpoint."""
    if ray.train.get_context().get_world_rank() > 0:
        ray.train.report(entry)
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.save(state(), Path(folder) / CHECKPOINT_NAME)
        ray.train.report(entry, checkpoint=Checkpoint.from_directory(folder))


def _kept_weights(state: State, recipe: Recipe) -> dict[str, torch.Tensor]:
    """The weights that `fit` returns at the end, out of its last state."""
    if recipe.optim.patience is not None and state["best"]["network"]:
        return state["best"]["network"]
    averaged = {
        name.removeprefix("module."): tensor for name, tensor in state["average"].items() if name != "n_averaged"
    }
    return averaged or state["network"]


class _Watch(UserCallback):
    """Lives in Ray Train's controller: passes epochs on, and ends the run at an error that a restart cannot cure."""

    def __init__(self, progress: Queue) -> None:
        self.progress = progress

    def after_report(self, run_context: Any, metrics: list[dict[str, float]], checkpoint: Checkpoint | None) -> None:
        self.progress.put(metrics[0])

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for error in map(own_error, worker_exceptions.values()):
            if isinstance(error, DermaflowError):
                raise error


def _cause(error: ray.train.TrainingFailedError) -> BaseException:
    """The DermaFlow error behind a failed run, or else the run's own."""
    cause = own_error(getattr(error, "controller_failure", error))
    return cause if isinstance(cause, DermaflowError) else error


@contextmanager
def _epoch_log() -> Iterator[Queue]:
    """A queue whose history entries are logged here, where Ray's own logs do not reach; restores Ctrl-C, which Ray takes."""
    progress = Queue(actor_options={"num_cpus": 0})

    def follow() -> None:
        while (entry := progress.get()) is not None:
            log.info(
                "epoch %d: %s", entry["epoch"], ", ".join(f"{k} {v:.4g}" for k, v in entry.items() if k != "epoch")
            )

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield progress
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)
        progress.put(None)
        follower.join()
        progress.shutdown()
