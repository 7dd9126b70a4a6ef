"""Score a whole source on Ray Data: every input once, every image that cannot be read with a reason, and resumable.

What travels through Ray are the numbers of parts and their commits. An actor loads the model once and does a part from
the first byte read to the last written (`dermaflow.scoring.parts`), so that no pixels enter the object store, and what
is done stands in the run's folder and not in the memory of a process. Kill any: the next run does what is missing.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dermaflow import monitoring, storage
from dermaflow.errors import DermaflowError, StorageError
from dermaflow.logs import join_run, run_id
from dermaflow.schemas.finding import FINDING_SCHEMA
from dermaflow.scoring.parts import PartScorer, verified_part
from dermaflow.scoring.patients import without_images
from dermaflow.scoring.plan import (
    FINDINGS,
    LOG,
    PARTS,
    PATHWAYS,
    SUMMARY,
    UNPACKED,
    Commit,
    Inputs,
    Options,
    Plan,
    Progress,
    Status,
    commit_file,
    parts_of,
)
from dermaflow.scoring.planning import begin, model_of_run
from dermaflow.scoring.summary import Summary, read_summary, summarise, write_summary
from dermaflow.settings import settings, start_logging

log = logging.getLogger(__name__)

ROUNDS = 3
"""Times that parts whose file does not fit their commit are done again, before the disk is blamed."""
ACTORS_A_GPU = 4
"""Processes that share a GPU: a small network takes less time than decoding what it is fed with."""

Report = Callable[[Status], None]


def score(
    source: str,
    out: str,
    *,
    model: str = "champion",
    patients: str | None = None,
    options: Options = Options(),
    progress: Report | None = None,
    use_ray: bool | None = None,
) -> Summary:
    """Score a source into a folder; run again after a stop, it does what is missing and no more.

    Args:
        source: Folder, .zip, .tar (.gz, .zst), Parquet shards, .csv of URIs, DICOM file or image; local or s3://.
        out: Folder of the run, local or s3://; see `dermaflow.scoring.plan`. On a cluster of several machines, all of
            them must reach source, model and folder.
        model: Bundle folder or address, ``champion``, or a version of the registry in the settings.
        patients: Table of patients (`dermaflow.pathways.intake.read_cases`); with it, pathways are written, too. Its
            column ``image_id``, where it has one, says which image shows which lesion.
        options: Choices.
        progress: Called when a part is done and when the state changes.
        use_ray: Score on Ray Data; by default where Ray is installed. Without it, this process scores.

    Raises:
        DataError: The source is empty or cannot be read as a whole, the folder belongs to another run, or the table of
            patients is wrong.
        RegistryError: There is no such model.
        BundleError: The model is damaged.
        StorageError: The disk is full or a store does not answer: what is done stays.
    """
    report = progress or (lambda status: None)
    out, patients = _absolute(out), _absolute(patients) if patients else None
    report(Status())
    chosen = model_of_run(model, out)
    plan = begin(
        source, out, chosen, patients, options, listed=lambda count: report(Status(total=count, state="planning"))
    )
    if (finished := read_summary(out)) is not None:
        report(Progress(out, plan).status().model_copy(update=_counts(finished)))
        return finished
    state = Progress(out, plan)
    _check_patients(patients)
    with_ray = importlib.util.find_spec("ray") is not None if use_ray is None else use_ray
    scorers = _score_parts if with_ray else _score_here
    for _ in range(ROUNDS):
        todo = []
        for part, commit in parts_of(out, plan):
            state.add(commit) if commit else todo.append(part)
        report(state.status())
        for commit in scorers(out, plan, todo, options) if todo else ():
            state.add(commit)
            report(status := state.status())
            monitoring.part_scored(
                ok=commit.ok, not_assessable=commit.not_assessable, failed=commit.failed, seconds=commit.seconds,
                remaining=status.total - status.done,
            )  # fmt: skip
        if _merge(out, plan, state):
            break
    else:
        raise StorageError(
            "parts do not stay as they were written", where=out, expected="a disk that keeps what it is given",
            todo="check the disk; is another run writing to this folder?",
        )  # fmt: skip
    summary = summarise(out, plan, chosen.bundle, state)
    if patients:
        summary = summary.model_copy(update={"urgencies": _pathways(out, plan, patients)})
    write_summary(out, summary)
    storage.delete(storage.join(out, UNPACKED))
    for folder in (PARTS, LOG):
        storage.remove_remains(storage.join(out, folder))
    monitoring.run_scored()
    report(state.status())
    return summary


def _absolute(address: str) -> str:
    return address if storage.is_remote(address) else str(Path(address).expanduser().absolute())


def _counts(summary: Summary) -> dict[str, object]:
    return {
        "total": summary.images, "done": summary.images, "ok": summary.ok, "not_assessable": summary.not_assessable,
        "failed": summary.failed, "state": "finished", "eta_seconds": 0.0,
        "images_per_second": summary.images_per_second,
    }  # fmt: skip


def _check_patients(patients: str | None) -> None:
    """A table of patients that cannot be read shall not cost a night of scoring first."""
    if patients is None:
        return
    from datetime import UTC, datetime

    from dermaflow.pathways.intake import read_cases

    with without_images(patients) as table:
        read_cases(table, as_of=datetime.now(UTC).date())


# --- Ray -----------------------------------------------------------------------------------------------------------


class _Actor:
    """A process that scores parts.

    Args:
        out: Folder of the run.
        plan: Its plan, as JSON.
        attempt: Names this try of the run.
        threads: CPU threads of the process.
        run: Id of the run, for its log lines.
    """

    def __init__(self, out: str, plan: str, attempt: str, threads: int, run: str) -> None:
        import torch

        join_run(run)
        start_logging()
        os.environ["DERMAFLOW_THREADS"] = str(threads)  # one process a CPU: more threads would only wait for each other
        settings.cache_clear()
        torch.set_num_threads(threads)
        self._scorer = PartScorer(out, Plan.model_validate_json(plan), attempt)

    def __call__(self, batch: pa.Table) -> pa.Table:
        commits = [self._scorer.score(part).model_dump_json() for part in batch["part"].to_pylist()]
        return pa.table({"commit": pa.array(commits, pa.string())})


def _score_here(out: str, plan: Plan, parts: list[int], options: Options) -> Iterator[Commit]:
    """Score parts in this process, one after the other, with as many threads as the settings say."""
    scorer = PartScorer(out, plan)
    yield from map(scorer.score, parts)


def _score_parts(out: str, plan: Plan, parts: list[int], options: Options) -> Iterator[Commit]:
    """Score parts on the cluster; commits come as they are done."""
    from dermaflow.preparation.cluster import connect, own_error

    connect(options.workers)
    import ray
    from ray.exceptions import RayError, RayTaskError

    cpus, gpus = (ray.cluster_resources().get(kind, 0.0) for kind in ("CPU", "GPU"))
    free = ray.available_resources().get("CPU", cpus)
    actors = options.workers or max(1, math.floor(free))
    threads, share = 1, None
    if gpus and settings().device != "cpu":
        actors = options.workers or max(1, min(math.floor(free), math.floor(gpus) * ACTORS_A_GPU))
        threads, share = max(1, math.floor(free / actors)), min(1.0, gpus / actors)
    actors = min(actors, len(parts))
    log.info("scoring %d of %d parts with %d processes", len(parts), plan.parts, actors)
    dataset = ray.data.from_arrow([pa.table({"part": [part]}) for part in parts]).map_batches(
        _Actor,
        fn_constructor_args=(out, plan.model_dump_json(), uuid.uuid4().hex, threads, run_id()),
        batch_format="pyarrow",
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=2),
        num_cpus=threads,
        num_gpus=share,
    )
    try:
        batch: Any
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield from (Commit.model_validate_json(text) for text in batch["commit"].to_pylist())
    except (RayTaskError, RayError) as error:
        raise _said(error, own_error, out) from None


def _said(error: BaseException, own_error: Callable[[BaseException], BaseException], out: str) -> BaseException:
    """An error of a worker in our words, as far as it has some."""
    cause: BaseException | None = own_error(error)
    while cause is not None:
        if isinstance(cause, DermaflowError):
            return cause
        cause = cause.__cause__
    return StorageError(
        f"a process that scored could not go on: {type(own_error(error)).__name__}", where=out,
        expected="enough memory for every process", todo="try with --workers 1; what is done stays",
    )  # fmt: skip


# --- the end -------------------------------------------------------------------------------------------------------


def _merge(out: str, plan: Plan, state: Progress) -> bool:
    """Write all parts into one file; a part that is not as it was committed is taken back, and nothing written."""
    inputs, broken = Inputs(out), []
    place = storage.join(out, FINDINGS)
    with (
        contextlib.suppress(_Incomplete),
        storage.open_atomic(place) as stream,
        pq.ParquetWriter(stream, FINDING_SCHEMA, compression="zstd") as writer,
    ):
        for part in range(plan.parts):
            commit = state.commits.get(part)
            content = verified_part(out, commit) if commit else None
            if content is None or commit is None or commit.rows != inputs.rows(part):
                broken.append(part)
            elif not broken:
                writer.write_table(pq.read_table(pa.BufferReader(content)))
        if broken:
            raise _Incomplete
    inputs.close()
    for part in broken:
        log.warning("part %d is not as it was committed and is done again", part)
        storage.delete(commit_file(out, part))
        state.commits.pop(part, None)
    return not broken


class _Incomplete(Exception):
    """The file of all findings must not be written."""


def _pathways(out: str, plan: Plan, patients: str) -> dict[str, int]:
    """Pathways of all patients, in a folder of the run; lesions by urgency."""
    from dermaflow.pathways.run import recommend_files

    findings, target = storage.join(out, FINDINGS), storage.join(out, PATHWAYS)
    with without_images(patients) as table:
        if not storage.is_remote(out):
            done = recommend_files(findings, table, Path(target), model=plan.model_uri, allow_unmatched=True)
            return done.urgencies
        with tempfile.TemporaryDirectory(prefix="dermaflow-pathways-") as folder:
            done = recommend_files(findings, table, Path(folder), model=plan.model_uri, allow_unmatched=True)
            storage.copy_folder(folder, target)
    return done.urgencies


__all__ = ["SUMMARY", "Options", "Status", "Summary", "score"]
