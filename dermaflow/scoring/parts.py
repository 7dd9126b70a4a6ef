"""Score one part: read, decode, predict, write and commit, in one step, so that no pixels travel between processes."""

from __future__ import annotations

import dataclasses
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, TypeVar

import pyarrow.parquet as pq

from dermaflow import storage
from dermaflow.bundles.bundle import LoadedBundle, load_bundle
from dermaflow.errors import BundleError, StorageError
from dermaflow.schemas.finding import Finding, findings_table
from dermaflow.scoring.plan import LOG, Commit, Inputs, Plan, commit_file, now, part_file
from dermaflow.scoring.predictor import Predictor
from dermaflow.scoring.reading import Content, Reader
from dermaflow.scoring.references import BadMember

MOST_TRIES = 4
"""Times that a run begins a part. One whose process dies is begun again by Ray, without end if nobody counts."""

T = TypeVar("T")


class PartScorer:
    """Scores parts of a run; loads the model once.

    Args:
        out: Folder of the run.
        plan: Its plan.
        attempt: Names this try of the run: how often a part killed its process is counted anew in the next one.

    Raises:
        BundleError: The model is damaged, or not the one of the plan any more.
        StorageError: The list of inputs cannot be read.
    """

    def __init__(self, out: str, plan: Plan, attempt: str = "") -> None:
        self._out, self._plan, self._attempt = out, plan, attempt
        loaded = load_bundle(plan.model_uri)
        if loaded.sha256 != plan.model_sha256:
            raise BundleError(
                f"the run was begun with model {plan.model_sha256[:12]}, this is {loaded.sha256[:12]}",
                where=plan.model_uri, expected="the same model to the end", todo="choose another folder to score anew",
            )  # fmt: skip
        self._loaded = _with_views(loaded, plan.options.views)
        self._predictor = Predictor(self._loaded)
        self._inputs = Inputs(out)

    def score(self, part: int) -> Commit:
        """Score a part, write its findings and then its commit. Doing it again gives the same.

        Raises:
            StorageError: The disk is full, or a store does not answer; the part stays undone.
        """
        begun = now()
        self._count(part)
        rows = [SimpleNamespace(**row) for row in self._inputs.part(part).to_pylist()]
        findings: list[Finding] = []
        with Reader(self._plan.options.limits) as reader:
            for chunk in _ahead(reader.chunks(rows)):
                self._check_source(chunk)
                findings += self._answer(chunk)
        content = io.BytesIO()
        pq.write_table(findings_table(findings), content, compression="zstd")
        storage.write_bytes(part_file(self._out, part), content.getvalue())
        statuses = Counter(finding.status for finding in findings)
        commit = Commit(
            part=part, rows=len(findings), ok=statuses["ok"], not_assessable=statuses["not_assessable"],
            failed=statuses["failed"], sha256=storage.sha256(content.getvalue()), finished=now(),
            seconds=now() - begun,
            reasons=Counter(str(f.reason).partition(":")[0] for f in findings if f.status == "failed"),
        )  # fmt: skip
        storage.write_bytes(commit_file(self._out, part), commit.model_dump_json().encode())
        storage.delete(storage.join(self._out, LOG, f"part-{part:05d}.begun"))
        return commit

    def _count(self, part: int) -> None:
        """Note that the part is begun; one that ends its process again and again ends the run."""
        place = storage.join(self._out, LOG, f"part-{part:05d}.begun")
        known = storage.read_bytes(place).decode() if storage.exists(place) else ""
        tries = known.count(self._attempt) + 1 if self._attempt else 1
        if tries > MOST_TRIES:
            raise StorageError(
                f"the process ended {MOST_TRIES} times while it scored part {part}", where=self._out,
                expected="enough memory for every process", todo="try with fewer workers; what is done stays",
            )  # fmt: skip
        storage.write_bytes(place, " ".join([self._attempt] * tries).encode())

    def _answer(self, chunk: Sequence[tuple[Any, Content]]) -> list[Finding]:
        readable = [(row, content) for row, content in chunk if isinstance(content, bytes)]
        found = iter(
            self._predictor.predict(
                [content for _, content in readable],
                [row.image_id for row, _ in readable],
                [row.lesion_id for row, _ in readable],
            )
            if readable
            else ()
        )
        return [
            next(found)
            if isinstance(content, bytes)
            else Finding(
                image_id=row.image_id, lesion_id=row.lesion_id, status="failed", reason=content.problem,
                model=self._loaded.bundle.name, model_sha256=self._loaded.sha256,
            )
            for row, content in chunk
        ]  # fmt: skip

    def _check_source(self, chunk: Sequence[tuple[Any, Content]]) -> None:
        """One file that is gone is one failed row; a folder that is gone (a drive that was unplugged) is not."""
        gone = any(isinstance(content, BadMember) and content.reason == "unreadable" for _, content in chunk)
        if gone and not storage.exists(self._plan.source):
            raise StorageError(
                "the source is gone", where=self._plan.source, expected="the source that was listed",
                todo="bring it back, then run the same command again",
            )  # fmt: skip


def _with_views(loaded: LoadedBundle, views: int | None) -> LoadedBundle:
    if views is None:
        return loaded
    spec = loaded.bundle.input.model_copy(update={"views": views})
    return dataclasses.replace(loaded, bundle=loaded.bundle.model_copy(update={"input": spec}))


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items; the next one is made while the present one is used."""
    end = object()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(next, items, end)
        while (item := waiting.result()) is not end:
            waiting = pool.submit(next, items, end)
            yield item  # type: ignore[misc]


def verified_part(out: str, commit: Commit) -> bytes | None:
    """The file of a committed part; None where it is gone or not the one that was committed."""
    place = part_file(out, commit.part)
    if not storage.exists(place):
        return None
    content = storage.read_bytes(place)
    return content if storage.sha256(content) == commit.sha256 else None
