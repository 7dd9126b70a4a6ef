"""Train on a cluster: Ray Train runs the loop on one or more workers, Ray Data feeds it.

What is drawn is planned (`dermaflow.preparation.epochs`): an epoch is the same images whatever the number of workers,
the same as in `dermaflow.learning.local`, and the same after a restart. References to images travel to tasks that read,
decode and resize a block each, and the splitter deals the blocks out to the workers.
"""

from __future__ import annotations

import logging
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import ray.train
import torch
from ray.train import Checkpoint, CheckpointConfig, DataConfig, FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchTrainer, prepare_model
from ray.util.queue import Queue

from dermaflow import monitoring, storage
from dermaflow.bundles.bundle import LoadedBundle
from dermaflow.errors import CheckpointError, DataError, DermaflowError, RecipeError
from dermaflow.learning.backbones import Network, build
from dermaflow.learning.local import CHECKPOINT_NAME, class_counts, load_checkpoint, taught_by, validator
from dermaflow.learning.loop import Batch, Feed, Run, State, check_state, fit
from dermaflow.learning.optimisation import pick_device
from dermaflow.learning.recipe import Recipe
from dermaflow.logs import join_run, run_id
from dermaflow.preparation.balancing import balance
from dermaflow.preparation.cluster import connect, own_error
from dermaflow.preparation.epochs import EpochPlan, read_images
from dermaflow.preparation.reading import RowGroup, ShardFolder, labels_of
from dermaflow.settings import settings, start_logging

log = logging.getLogger(__name__)

RUN_NAME = "ray"
"""Folder within the checkpoint folder in which Ray Train keeps its records and checkpoints."""
WORKER_FAILURES = 3
"""Lost workers (a node taken away, a process killed for memory) that a run survives."""
ALLOCATOR = {"GLIBC_TUNABLES": "glibc.malloc.arena_max=1:glibc.malloc.hugetlb=1"}
"""Environment of a worker. Ray Train runs the loop in a thread, and there glibc gives large tensors back to the system
at every step: four times the page faults, a third more time an epoch on two cores. One arena and huge pages end that;
other C libraries ignore it."""


@dataclass(frozen=True)
class Job:
    """What every worker is given.

    Attributes:
        recipe: The recipe.
        plan: The epochs.
        watched_groups: Row groups that hold the images to validate on.
        watched: int64, places of these images in the row groups.
        data_hash: Of the shards.
    """

    recipe: Recipe
    plan: EpochPlan
    watched_groups: list[RowGroup]
    watched: np.ndarray
    data_hash: str


def fit_on_cluster(
    network: Network, recipe: Recipe, folder: ShardFolder, checkpoints: Path, workers: int,
    teacher: LoadedBundle | None = None,
) -> tuple[Network, list[dict[str, float]], str]:  # fmt: skip
    """Train with Ray Train, a checkpoint an epoch; survives lost workers, and resumes a run that was cut off.

    Args:
        network: With its first weights.
        recipe: Its batch size is that of all workers together.
        folder: Shards; on a cluster of several machines, reachable from all of them.
        checkpoints: Folder of the run's records; likewise.
        workers: Processes, each with a GPU if this machine has one.
        teacher: Model to learn from.

    Returns:
        The trained network on the CPU, the history and the workers' device.

    Raises:
        RecipeError: The batch size does not divide among the workers.
        DataError: Fewer training images than workers, or none in the validation fold.
        CheckpointError: The checkpoints belong to another recipe or other data.
        DermaflowError: Too few GPUs or CPUs, or what a worker raised.
    """
    job = _job(recipe, folder, workers)
    place = checkpoints.absolute() / RUN_NAME
    if (earlier := _earlier(place)) is not None:
        state = _state_in(earlier.checkpoint)
        check_state(state, recipe, job.data_hash)
        log.info("resuming after epoch %d from %s", state["epoch"], place)
    use_gpu = pick_device().type == "cuda"
    connect(cpus=workers + 2)
    found = ray.cluster_resources()
    if use_gpu and found.get("GPU", 0) < workers:
        raise DermaflowError(
            f"{workers} workers and {found.get('GPU', 0):g} GPUs", expected="a GPU for each worker",
            todo="use fewer workers, or DERMAFLOW_DEVICE=cpu",
        )  # fmt: skip
    if found["CPU"] < 2:
        raise DermaflowError("Ray has 1 CPU", expected="2, one of them to decode images", todo="let it have more CPUs")
    # Less than a CPU each where Ray has few: workers that cannot be placed, or leave none to decode images, would wait
    # for ever.
    share = min(1.0, int(1000 * (found["CPU"] - 1) / workers) / 1000)
    with _epoch_log() as progress:
        trainer = TorchTrainer(
            _work,
            train_loop_config={
                "job": job,
                "weights": ray.put(network.state_dict()),
                "teacher": ray.put(teacher and replace(teacher, reference=None)),
                "run": run_id(),
            },
            # A function, so that after a lost worker the images start at the epoch that is resumed.
            datasets={"train": lambda: _images(job, place)},
            dataset_config=DataConfig(execution_options=ray.data.ExecutionOptions(preserve_order=True)),
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu, resources_per_worker={"CPU": share}),
            run_config=RunConfig(
                name=RUN_NAME,
                storage_path=str(place.parent),
                failure_config=FailureConfig(max_failures=WORKER_FAILURES),
                checkpoint_config=CheckpointConfig(num_to_keep=2),
                callbacks=[_Watch(progress)],
                worker_runtime_env={"env_vars": ALLOCATOR},
            ),
        )
        try:
            result = trainer.fit()
        except ray.train.TrainingFailedError as error:
            cause = own_error(getattr(error, "controller_failure", error))
            raise (cause if isinstance(cause, DermaflowError) else error) from None
        except SystemExit:  # what Ray makes of Ctrl-C, when it has stopped the workers
            log.warning("stopped; the same command goes on after the last epoch")
            raise
    log.info("trained on %d workers, device: %s", workers, result.return_value)
    state = _state_in(result.checkpoint)
    network.load_state_dict(_kept_weights(state, recipe))
    return network.cpu(), state["history"], result.return_value


def _job(recipe: Recipe, folder: ShardFolder, workers: int) -> Job:
    if workers < 1 or recipe.optim.batch_size % workers:
        raise RecipeError(
            f"{recipe.optim.batch_size} images a step do not divide among {workers} workers", where="optim.batch_size",
            expected=f"a multiple of {workers}", todo="change the batch size or the number of workers",
        )  # fmt: skip
    if not storage.is_remote(folder.uri):  # Ray's processes run in folders of their own
        folder = ShardFolder(Path(folder.uri).absolute())
    meta, groups = folder.metadata("train"), folder.row_groups("train")
    held = folder.held_out(recipe.validation_fold)
    if recipe.validation_fold is None:  # a curve to look at; nothing is chosen on it
        watched_groups = folder.row_groups("calibration")
        watched = np.arange(sum(group.rows for group in watched_groups))
    else:
        watched_groups, watched = groups, np.flatnonzero(held)
    learnt = ~held & folder.drawn(recipe.train_share)
    labels = labels_of(meta["dx"])[learnt]
    if len(labels) < workers:
        raise DataError(f"{len(labels)} training images", expected=f"at least one for each of {workers} workers")
    plan = EpochPlan(
        groups, np.flatnonzero(learnt), labels, balance(class_counts(labels), recipe.balance), recipe.seed, workers,
        min(recipe.optim.batch_size, len(labels)) // workers, recipe.input.height, recipe.input.width,
    )  # fmt: skip
    return Job(recipe, plan, watched_groups, watched, folder.manifest.data_hash)


def _images(job: Job, place: Path) -> ray.data.Dataset:
    """The images of all epochs that are left, in order and in one stream: no epoch waits for its first images."""
    connect()  # this is Ray Train's controller, and here too Ray Data should be quiet and own up to errors
    plan, optim = job.plan, job.recipe.optim
    earlier = _earlier(place)
    first = 0 if earlier is None else int(earlier.metrics["epoch"]) + 1
    epochs = range(first, optim.head_epochs + optim.epochs)
    blocks = [pa.table({"number": block}) for epoch in epochs for block in plan.blocks(epoch)]
    # Not from_arrow, which starts a task for each table.
    references = ray.data.from_blocks(blocks or [pa.table({"number": pa.array([], pa.int64())})])
    read = partial(read_images, groups=plan.groups, height=plan.height, width=plan.width)
    return references.map_batches(read, batch_format="numpy", batch_size=None)


def _earlier(place: Path) -> ray.train.Result | None:
    """The last epoch in the records of a run, the one that Ray Train resumes after; None without records."""
    try:
        return ray.train.Result.from_path(str(place))
    except RuntimeError:  # no records yet
        return None
    except Exception as error:  # records cut short: Ray raises several kinds
        raise CheckpointError(f"unreadable: {error}", where=place, todo="remove the folder to start anew") from error


def _work(config: dict[str, Any]) -> str:
    """What every worker runs; returns the name of its device."""
    join_run(config["run"])
    start_logging()
    job: Job = config["job"]
    recipe, plan = job.recipe, job.plan
    context = ray.train.get_context()
    rank = context.get_world_rank()
    torch.set_num_threads(max(1, settings().threads // context.get_local_world_size()))  # Ray leaves a worker one
    device = ray.train.torch.get_device()
    log.info("worker %d, device: %s (%d threads)", rank, device, torch.get_num_threads())
    network = build(recipe.backbone.model_copy(update={"weights": None}))
    network.load_state_dict(ray.get(config["weights"]))
    checkpoint = ray.train.get_checkpoint()
    # Only rank 0 validates, but every worker must know that it does: the others wait for its figures.
    watched = {"number": job.watched if rank == 0 else job.watched[:0]}
    seen = read_images(watched, job.watched_groups, plan.height, plan.width)
    run = Run(
        recipe, _feed(plan), plan.rule, class_counts(plan.labels) / len(plan.labels), job.data_hash, device,
        validate=validator(seen["image"], seen["label"], recipe) if len(job.watched) else None,
        on_epoch=_report, wrap=lambda network: prepare_model(network, move_to_device=False), rank=rank,
        **taught_by(ray.get(config["teacher"])),
    )  # fmt: skip
    fit(network, run, _state_in(checkpoint) if checkpoint else None)
    return str(device)


def _feed(plan: EpochPlan) -> Feed:
    """This worker's batches: one stream, in which an epoch goes on where the one before ended."""
    shard = ray.train.get_dataset_shard("train")
    batches: Iterator[Batch] = (
        (batch["image"], batch["label"])
        for batch in shard.iter_torch_batches(batch_size=plan.batch_size, prefetch_batches=2, drop_last=True)
    )
    return Feed(plan.steps, lambda epoch: batches)


def _report(entry: dict[str, float], state: Callable[[], State]) -> None:
    """Tell Ray Train of an epoch, all workers together; rank 0 with the checkpoint."""
    if ray.train.get_context().get_world_rank() > 0:
        ray.train.report(entry)
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.save(state(), Path(folder) / CHECKPOINT_NAME)
        ray.train.report(entry, checkpoint=Checkpoint.from_directory(folder))


def _state_in(checkpoint: Checkpoint) -> State:
    with checkpoint.as_directory() as folder:
        state = load_checkpoint(Path(folder) / CHECKPOINT_NAME)
    if state is None:
        raise CheckpointError("is empty", where=checkpoint.path, todo="remove the checkpoints to start anew")
    return state


def _kept_weights(state: State, recipe: Recipe) -> dict[str, torch.Tensor]:
    """The weights of the network that `fit` returns, out of its last state."""
    if recipe.optim.patience is not None and state["best"]["network"]:
        return state["best"]["network"]
    averaged = {name.removeprefix("module."): tensor for name, tensor in state["average"].items()}
    averaged.pop("n_averaged", None)
    return averaged or state["network"]


class _Watch(UserCallback):
    """Lives in Ray Train's controller: passes epochs on, and ends the run at an error that no restart cures."""

    def __init__(self, progress: Queue) -> None:
        self.progress = progress

    def after_report(self, run_context: Any, metrics: list[dict[str, float]], checkpoint: Checkpoint | None) -> None:
        self.progress.put(metrics[0])

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for error in map(own_error, worker_exceptions.values()):
            if isinstance(error, DermaflowError):
                raise error


@contextmanager
def _epoch_log() -> Iterator[Queue]:
    """A queue whose entries are logged here, where Ray's logs do not come; gives Ctrl-C back, which Ray takes."""
    progress = Queue(actor_options={"num_cpus": 0})

    def follow() -> None:
        while (entry := progress.get()) is not None:
            figures = ", ".join(f"{name} {value:.4g}" for name, value in entry.items() if name != "epoch")
            log.info("epoch %d: %s", entry["epoch"], figures)
            monitoring.epoch_ended(entry)

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        yield progress
    finally:
        progress.put(None)
        follower.join()
        progress.shutdown()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, interrupt)
