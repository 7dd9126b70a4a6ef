"""What a run of bulk scoring is to do, what of it is done, and how it stands: the files of its folder.

    plan.json               source, model, options, number of inputs and parts; written before any work
    inputs.parquet          every input in order, one row group a part
    parts/part-00000.parquet    findings of a part, one row an input
    log/part-00000.json     its commit, written after the part: a part without one does not count
    findings.parquet        all parts in order, once all are committed
    summary.json            written last: with it, the run is finished

Every file appears whole or not at all, so the folder says at any moment what is missing; nothing else keeps a state.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dermaflow import storage
from dermaflow.errors import DataError, StorageError
from dermaflow.schemas.versions import check_format
from dermaflow.scoring.references import LIMITS, Limits

PLAN, INPUTS, PARTS, LOG = "plan.json", "inputs.parquet", "parts", "log"
FINDINGS, SUMMARY, PAGE, PATHWAYS = "findings.parquet", "summary.json", "summary.html", "pathways"
UNPACKED = "unpacked.tar"
RATE_WINDOW = 60.0
"""Seconds of the latest work that the rate is taken from: long against a part, short against a slow network."""

State = Literal["planning", "scoring", "finishing", "finished"]


class Options(BaseModel):
    """Choices of a run.

    Attributes:
        part_size: Inputs a part, the unit that is done or not done; by default 16 to 512, by the size of the source.
        views: 1, or 4 for the mean over the image and its flips; by default as the model was calibrated.
        workers: Processes that score; by default as many as there are free CPUs. No part of the plan.
        limits: What is accepted of the source.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    part_size: int | None = Field(None, ge=1, le=100_000)
    views: Literal[1, 4] | None = None
    workers: int | None = Field(None, ge=1)
    limits: Limits = LIMITS


class Plan(BaseModel):
    """The content of ``plan.json``; `same_run` says which of it must agree to go on."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    format: Literal["dermaflow-scoring/1"] = "dermaflow-scoring/1"
    source: str
    kind: str
    fingerprint: str
    model: str  # name
    model_uri: str
    model_sha256: str
    patients: str | None
    patients_sha256: str | None
    options: Options
    inputs: int
    parts: int
    ignored: int  # files that systems leave behind
    created: str  # ISO 8601, UTC
    dermaflow_version: str


class Commit(BaseModel):
    """A part that is done.

    Attributes:
        reasons: Failed inputs by the code of their reason.
        sha256: Of the part's file.
        seconds: From the first byte read to the last written.
        finished: Seconds since 1970, UTC.
    """

    model_config = ConfigDict(extra="forbid")

    part: int
    rows: int
    ok: int
    not_assessable: int
    failed: int
    reasons: dict[str, int]
    sha256: str
    seconds: float
    finished: float


class Status(BaseModel):
    """How a run stands. Counts are of images; the rate is of the last minute of work, None before there is one."""

    total: int = 0
    done: int = 0
    ok: int = 0
    not_assessable: int = 0
    failed: int = 0
    images_per_second: float | None = None
    eta_seconds: float | None = None
    state: State = "planning"


def part_file(out: str, part: int) -> str:
    """Where the findings of a part lie."""
    return storage.join(out, PARTS, f"part-{part:05d}.parquet")


def commit_file(out: str, part: int) -> str:
    """Where the commit of a part lies."""
    return storage.join(out, LOG, f"part-{part:05d}.json")


def read_plan(out: str) -> Plan | None:
    """The plan of a folder, None if there is none yet.

    Raises:
        StorageError: It is damaged, or the store cannot be reached.
    """
    place = storage.join(out, PLAN)
    if not storage.exists(place):
        return None
    content = storage.read_bytes(place)
    check_format(content, Plan.model_fields["format"].default, place, StorageError)
    try:
        return Plan.model_validate_json(content)
    except ValidationError as error:
        raise StorageError(
            f"no plan of this version ({error.errors()[0]['msg']})", where=place, expected="a plan of bulk scoring",
            todo="choose another folder",
        ) from error  # fmt: skip


def check_same_run(old: Plan, new: Plan, out: str) -> None:
    """Refuse to go on with something else than was begun.

    Raises:
        DataError: Source, model, options or patients differ.
    """
    first, second = (
        {
            "source": plan.source,
            "content of the source": plan.fingerprint[:12],
            "model": f"{plan.model} {plan.model_sha256[:12]}",
            "patients": (plan.patients_sha256 or "none")[:12],
            "options": plan.options.model_dump(exclude={"workers"}),
        }
        for plan in (old, new)
    )
    for what, value in first.items():
        if value != second[what]:
            raise DataError(
                f"holds a run with another {what}: {value}, now {second[what]}", where=out,
                expected="the source, model, options and patients that it was begun with",
                todo="choose another folder to score anew",
            )  # fmt: skip


def committed(out: str) -> set[int]:
    """Numbers of the parts that are done."""
    names = storage.list_folder(storage.join(out, LOG))
    return {int(name[5:-5]) for name in names if name.startswith("part-") and name.endswith(".json")}


def read_commit(out: str, part: int) -> Commit | None:
    """The commit of a part; None if it is not done, or the file is damaged, so that it is done again."""
    place = commit_file(out, part)
    if not storage.exists(place):
        return None
    try:
        return Commit.model_validate_json(storage.read_bytes(place))
    except ValidationError:
        return None


class Progress:
    """Counts commits, each once.

    Args:
        out: Folder of the run.
        plan: Its plan, None while there is none.
    """

    def __init__(self, out: str, plan: Plan | None) -> None:
        self.out, self.plan = out, plan
        self.commits: dict[int, Commit] = {}

    def add(self, commit: Commit) -> None:
        """A part was done."""
        self.commits[commit.part] = commit

    def look(self) -> None:
        """Read the commits that are new in the folder."""
        for part in sorted(committed(self.out) - self.commits.keys()):
            if commit := read_commit(self.out, part):
                self.add(commit)

    @property
    def reasons(self) -> Counter[str]:
        """Failed inputs by the code of their reason."""
        return sum((Counter(commit.reasons) for commit in self.commits.values()), Counter())

    def status(self) -> Status:
        """How the run stands."""
        if self.plan is None:
            return Status()
        commits = self.commits.values()
        counts = {name: sum(getattr(c, name) for c in commits) for name in ("ok", "not_assessable", "failed")}
        done = sum(counts.values())
        state: State = "scoring"
        if len(self.commits) >= self.plan.parts:
            state = "finished" if storage.exists(storage.join(self.out, SUMMARY)) else "finishing"
        rate = _rate(commits)
        return Status(
            total=self.plan.inputs, done=done, **counts, state=state, images_per_second=rate,
            eta_seconds=(self.plan.inputs - done) / rate if rate else None,
        )  # fmt: skip


def _rate(commits: Iterable[Commit]) -> float | None:
    """Images a second over the last `RATE_WINDOW` seconds in which parts were done."""
    ordered = sorted(commits, key=lambda commit: commit.finished)
    if not ordered:
        return None
    latest = ordered[-1].finished
    recent = [commit for commit in ordered if commit.finished > latest - RATE_WINDOW]
    begun = min(commit.finished - commit.seconds for commit in recent)
    return sum(commit.rows for commit in recent) / max(latest - begun, 1e-3)


def read_status(out: str) -> Status:
    """How a run stands, from its folder alone; a folder that is not there yet is being planned.

    Raises:
        StorageError: The store cannot be reached.
    """
    progress = Progress(out, read_plan(out))
    if progress.plan is not None:
        progress.look()
    return progress.status()


def read_failures(out: str, most: int = 1000) -> list[dict[str, str]]:
    """Images that are done and not ``ok``, in order: image_id, status, reason.

    Args:
        out: Folder of the run.
        most: Stop after so many.
    """
    found: list[dict[str, str]] = []
    for part in sorted(committed(out)):
        if len(found) >= most:
            break
        commit = read_commit(out, part)
        if commit is None or commit.ok == commit.rows:
            continue
        table = pq.read_table(
            pa.BufferReader(storage.read_bytes(part_file(out, part))), columns=["image_id", "status", "reason"]
        )
        found += table.filter(pc.not_equal(table["status"], "ok")).to_pylist()
    return found[:most]


def write_plan(out: str, plan: Plan) -> None:
    """Write ``plan.json``: from now on the folder belongs to this run."""
    storage.write_bytes(storage.join(out, PLAN), plan.model_dump_json(indent=1).encode())


class Inputs:
    """The list of inputs of a run, read part by part.

    Args:
        out: Folder of the run.
    """

    def __init__(self, out: str) -> None:
        self.uri = storage.join(out, INPUTS)
        filesystem, path = storage.locate(self.uri)
        try:
            self._file = pq.ParquetFile(path, filesystem=filesystem)
        except (pa.ArrowException, OSError) as error:
            raise StorageError(
                f"cannot be read: {error}", where=self.uri, todo=f"delete {storage.join(out, PLAN)} and run again"
            ) from error

    def part(self, number: int) -> pa.Table:
        """Rows of `INPUT_SCHEMA`."""
        try:
            return self._file.read_row_group(number)
        except (pa.ArrowException, OSError) as error:
            raise StorageError(f"cannot be read: {error}", where=self.uri) from error

    def rows(self, number: int) -> int:
        """How many inputs a part has."""
        return int(self._file.metadata.row_group(number).num_rows)

    def close(self) -> None:
        """Give the handle back."""
        self._file.close()


def parts_of(out: str, plan: Plan) -> Iterator[tuple[int, Commit | None]]:
    """Every part with its commit."""
    done = committed(out)
    for part in range(plan.parts):
        yield part, read_commit(out, part) if part in done else None


def now() -> float:
    """Seconds since 1970, UTC."""
    return time.time()
