"""A finished run of bulk scoring: list of inputs, parts and their commits, all findings, pathways, summary."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dermaflow import storage
from dermaflow.bundles.bundle import parse_bundle, read_description
from dermaflow.errors import DataError, DermaflowError, StorageError
from dermaflow.forgetting.pathways import Pathways
from dermaflow.forgetting.places import Ids, Link
from dermaflow.schemas.finding import FINDING_SCHEMA
from dermaflow.scoring.plan import (
    FINDINGS,
    INPUTS,
    PATHWAYS,
    SUMMARY,
    Commit,
    Plan,
    Progress,
    commit_file,
    part_file,
    read_commit,
    read_plan,
    write_plan,
)
from dermaflow.scoring.references import INPUT_SCHEMA
from dermaflow.scoring.summary import Summary, read_summary, summarise, write_summary

_ROWS = 8192  # findings held at a time


class ScoredRun:
    """A folder that `dermaflow score` wrote, local or s3://.

    Args:
        uri: The folder.
        pseudonym: What stands for an id in its log of sign-offs.
        by: Who has it done, for that log.

    Raises:
        DataError: It is no run, or one that is not finished; or its pathways lie in an object store.
    """

    def __init__(self, uri: str, pseudonym: Callable[[str], str], by: str) -> None:
        self.name = uri
        plan = read_plan(uri)
        if plan is None or not storage.exists(storage.join(uri, SUMMARY)):
            raise DataError(
                "no finished run" if plan is None else "the run is not finished", where=uri,
                expected="a folder that dermaflow score finished",
                todo="run dermaflow score again to its end, or delete the folder",
            )  # fmt: skip
        self._plan: Plan = plan
        place = storage.join(uri, PATHWAYS)
        if storage.is_remote(uri) and storage.exists(place):
            raise DataError(
                "pathways in an object store", where=place, expected="a local folder, whose log can be locked",
                todo="copy the run to a disk, forget there, copy it back and delete what is gone",
            )  # fmt: skip
        self._pathways = Pathways(place, pseudonym, by)

    def links(self) -> list[Link]:
        table = self._findings()
        found = [Link(None, lesion, image) for lesion, image in _pairs(table)]
        return found + (self._pathways.links() if self._with_pathways else [])

    @property
    def _with_pathways(self) -> bool:
        return not storage.is_remote(self.name) and self._pathways.there

    def _findings(self) -> pa.Table:
        return pq.read_table(
            pa.BufferReader(storage.read_bytes(storage.join(self.name, FINDINGS))), columns=["lesion_id", "image_id"]
        )

    def holds(self, ids: Ids) -> dict[str, int]:
        counts = {"findings": int(pc.sum(_rows(self._findings(), ids)).as_py() or 0)}
        counts["inputs"] = int(pc.sum(_rows(self._inputs(), ids)).as_py() or 0)
        counts |= self._pathways.holds(ids) if self._with_pathways else {}
        return {kind: count for kind, count in counts.items() if count}

    def inputs(self, ids: Ids) -> list[dict[str, object]]:
        """Where the images that go lie: rows of `INPUT_SCHEMA`."""
        table = self._inputs()
        return table.filter(_rows(table, ids)).to_pylist()

    def _inputs(self) -> pa.Table:
        return pq.read_table(pa.BufferReader(storage.read_bytes(storage.join(self.name, INPUTS))))

    def remove(self, ids: Ids) -> None:
        """Parts, then the file of all findings, pathways, the list of inputs and the plan, the summary last."""
        commits = [self._part(number, ids) for number in range(self._plan.parts)]
        self._filter_findings(ids)
        if self._with_pathways:
            self._pathways.remove(ids)
        self._filter_inputs(ids)
        plan = self._plan.model_copy(update={"inputs": sum(commit.rows for commit in commits)})
        if plan != self._plan:
            write_plan(self.name, plan)
        self._plan = plan
        self._summarise(commits, ids)

    def _part(self, number: int, ids: Ids) -> Commit:
        """Write a part without its rows; its commit is made to fit what is there, also after a kill between the two."""
        old = read_commit(self.name, number)
        if old is None:
            raise StorageError("a part of a finished run is not committed", where=commit_file(self.name, number))
        content = storage.read_bytes(part_file(self.name, number))
        table = pq.read_table(pa.BufferReader(content))
        if pc.any(mask := _rows(table, ids)).as_py():
            table, stream = table.filter(pc.invert(mask)), io.BytesIO()
            pq.write_table(table, stream, compression="zstd")
            content = stream.getvalue()
            storage.write_bytes(part_file(self.name, number), content)
        statuses = Counter(table["status"].to_pylist())
        failed = (str(r) for r, s in zip(table["reason"].to_pylist(), table["status"].to_pylist(), strict=True)
                  if s == "failed")  # fmt: skip
        new = old.model_copy(
            update={
                "rows": table.num_rows, "ok": statuses["ok"], "not_assessable": statuses["not_assessable"],
                "failed": statuses["failed"], "sha256": storage.sha256(content),
                "reasons": dict(Counter(reason.partition(":")[0] for reason in failed)),
            }
        )  # fmt: skip
        if new != old:
            storage.write_bytes(commit_file(self.name, number), new.model_dump_json().encode())
        return new

    def _filter_findings(self, ids: Ids) -> None:
        place = storage.join(self.name, FINDINGS)
        if not pc.any(_rows(self._findings(), ids)).as_py():
            return
        filesystem, path = storage.locate(place)
        with (
            pq.ParquetFile(path, filesystem=filesystem) as file,
            storage.open_atomic(place) as stream,
            pq.ParquetWriter(stream, FINDING_SCHEMA, compression="zstd") as writer,
        ):
            for batch in file.iter_batches(_ROWS):
                table = pa.Table.from_batches([batch])
                writer.write_table(table.filter(pc.invert(_rows(table, ids))))

    def _filter_inputs(self, ids: Ids) -> None:
        """One row group a part stays, an empty one too."""
        place = storage.join(self.name, INPUTS)
        if not pc.any(_rows(self._inputs(), ids)).as_py():
            return
        with (
            pq.ParquetFile(pa.BufferReader(storage.read_bytes(place))) as file,
            storage.open_atomic(place) as stream,
            pq.ParquetWriter(stream, INPUT_SCHEMA, compression="zstd") as writer,
        ):
            for number in range(file.num_row_groups):
                table = file.read_row_group(number)
                writer.write_table(table.filter(pc.invert(_rows(table, ids))))

    def _summarise(self, commits: list[Commit], ids: Ids) -> None:
        old = read_summary(self.name)
        progress = Progress(self.name, self._plan)
        for commit in commits:
            progress.add(commit)
        new: Summary | None = None
        with contextlib.suppress(DermaflowError):  # a model that is gone must not keep anybody's data here
            content, sha256 = read_description(self._plan.model_uri)
            if sha256 == self._plan.model_sha256:
                bundle = parse_bundle(content, where=self._plan.model_uri)
                new = summarise(self.name, self._plan, bundle, progress)
        if new is None and old is not None:  # counts stay those of the run as it was; nobody is named
            flagged = [f for f in old.flagged if f.lesion_id not in ids.lesions and f.image_id not in ids.images]
            new = old.model_copy(update={"flagged": flagged})
        if new is None:
            storage.delete(storage.join(self.name, SUMMARY))
            return
        urgencies = old.urgencies if old else None
        if self._with_pathways and urgencies is not None:
            from dermaflow.pathways.outputs.folder import read_folder

            found = Counter(p.urgency for p in read_folder(Path(self._pathways.name))[0])
            urgencies = {urgency: found[urgency] for urgency in urgencies}  # type: ignore[index]
        write_summary(self.name, new.model_copy(update={"urgencies": urgencies}))


def _pairs(table: pa.Table) -> list[tuple[str | None, str]]:
    return list(zip(table["lesion_id"].to_pylist(), table["image_id"].to_pylist(), strict=True))


def _rows(table: pa.Table, ids: Ids) -> pa.ChunkedArray:
    """Which rows go; an image without a lesion is a lesion of its own."""
    lesions = pc.is_in(pc.coalesce(table["lesion_id"], table["image_id"]), pa.array(sorted(ids.lesions), pa.string()))
    return pc.or_(lesions, pc.is_in(table["image_id"], pa.array(sorted(ids.images), pa.string())))
