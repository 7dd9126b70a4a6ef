"""The bytes behind references, a few at a time, so that memory does not depend on the size of the source."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dermaflow import storage
from dermaflow.errors import StorageError
from dermaflow.scoring.archives import read_tar_member, read_zip_member
from dermaflow.scoring.dicom import DicomFile
from dermaflow.scoring.files import RandomFile, read_file
from dermaflow.scoring.references import BadMember, Limits

CHUNK_IMAGES = 64
"""Images handed on at a time: what the network takes at once."""
CHUNK_BYTES = 32 << 20
"""Bytes handed on at a time; one that is larger by itself comes alone."""
REMOTE_READS = 8
"""Objects fetched at the same time: a store answers after tens of milliseconds, which a reader alone would wait."""
_BATCH = 16  # rows of a Parquet file decoded at a time

Content = bytes | BadMember


class Reader:
    """Reads inputs; keeps the archive open that it read last.

    Args:
        limits: What is accepted.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._file: RandomFile | None = None
        self._dicom: tuple[tuple[str, Any], DicomFile | BadMember] | None = None
        self._shard: _ShardCursor | None = None
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back what is open."""
        if self._file is not None:
            self._file.close()
        if self._pool is not None:
            self._pool.shutdown()
        self._file = self._pool = None

    def chunks(self, rows: Sequence[Any]) -> Iterator[list[tuple[Any, Content]]]:
        """Rows with their bytes, or with the reason why there are none, in order.

        Args:
            rows: With the columns of `INPUT_SCHEMA` as attributes.

        Raises:
            StorageError: The store does not answer; nothing is said of any input then.
        """
        chunk: list[tuple[Any, Content]] = []
        size = 0
        for row, content in zip(rows, self._contents(rows), strict=True):
            length = 0 if isinstance(content, BadMember) else len(content)
            if chunk and (len(chunk) == CHUNK_IMAGES or size + length > CHUNK_BYTES):
                yield chunk
                chunk, size = [], 0
            chunk.append((row, content))
            size += length
        if chunk:
            yield chunk

    def head(self, row: Any, count: int) -> bytes:
        """The first bytes of an input.

        Raises:
            BadMember: It cannot be read.
        """
        if row.member is None:
            with RandomFile(row.uri) as file:
                return file.read_at(0, count)
        if row.method is None:
            return read_tar_member(self._open(row.uri), row, count)
        return read_zip_member(self._open(row.uri), row, count)

    def _contents(self, rows: Sequence[Any]) -> Iterator[Content]:
        archives = {row.uri for row in rows if row.member is not None and row.problem is None}
        one_after_the_other = len(archives) > 1 or any(row.frame is not None or _in_shard(row) for row in rows)
        if one_after_the_other or not any(storage.is_remote(row.uri) for row in rows):
            yield from map(self._content, rows)
            return
        self._pool = self._pool or ThreadPoolExecutor(REMOTE_READS)
        for archive in archives:
            self._open(archive)  # before the threads share it
        waiting = iter(rows)
        running = [self._pool.submit(self._content, row) for row in islice(waiting, REMOTE_READS)]
        while running:
            content = running.pop(0).result()
            running += [self._pool.submit(self._content, row) for row in islice(waiting, 1)]
            yield content

    def _content(self, row: Any) -> Content:
        if row.problem is not None:
            reason, _, what = row.problem.partition(": ")
            return BadMember(reason, what)
        try:
            if row.frame is not None:
                return self._frame(row)
            if _in_shard(row):
                return self._row(row)
            return self._whole(row, self.limits.image_bytes)
        except BadMember as error:
            return error

    def _whole(self, row: Any, most: int) -> bytes:
        if row.member is None:
            return read_file(row.uri, most)
        if row.method is None:
            return read_tar_member(self._open(row.uri), row)
        return read_zip_member(self._open(row.uri), row)

    def _open(self, uri: str) -> RandomFile:
        if self._file is None or self._file.uri != uri:
            if self._file is not None:
                self._file.close()
            try:
                self._file = RandomFile(uri)
            except BadMember as error:  # the archive itself, not a member of it
                self._file = None
                raise StorageError(
                    error.what, where=uri, expected="the archive that was listed",
                    todo="bring it back, then run the same command again",
                ) from error  # fmt: skip
        return self._file

    def _frame(self, row: Any) -> bytes:
        key = (row.uri, row.member)
        if self._dicom is None or self._dicom[0] != key:  # the frames of a file follow each other
            self._dicom = None  # not two large files at a time
            try:
                self._dicom = key, DicomFile(self._whole(row, self.limits.dicom_bytes))
            except BadMember as error:
                self._dicom = key, error
        found = self._dicom[1]
        if isinstance(found, BadMember):
            raise found
        return found.image(row.frame)

    def _row(self, row: Any) -> bytes:
        if self._shard is None or self._shard.uri != row.uri:
            self._shard = _ShardCursor(row.uri)
        data = self._shard.read(row.offset)
        if data is None:
            raise BadMember("empty", "no bytes")
        if len(data) > self.limits.image_bytes:
            raise BadMember("too_many_bytes", f"{len(data):,} bytes, the limit is {self.limits.image_bytes:,}")
        return data


def _in_shard(row: Any) -> bool:
    return row.offset is not None and row.member is None


class _ShardCursor:
    """The column ``image`` of a Parquet file, read forwards a few rows at a time: a row group may hold gigabytes."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        filesystem, path = storage.locate(uri)
        try:
            self._file = pq.ParquetFile(path, filesystem=filesystem, buffer_size=1 << 20)
        except (pa.ArrowException, OSError) as error:
            raise StorageError(
                f"cannot be read: {error}", where=uri, expected="the shard that was listed",
                todo="bring it back, then run the same command again",
            ) from error  # fmt: skip
        self._rows: Iterator[bytes | None] = iter(())
        self._next = -1

    def read(self, row: int) -> bytes | None:
        """The image of a row of the file."""
        try:
            if row != self._next:
                self._seek(row)
            self._next = row + 1
            return next(self._rows)
        except (pa.ArrowException, OSError, StopIteration) as error:
            self._next = -1
            if storage.is_remote(self.uri) and isinstance(error, OSError):
                raise StorageError(str(error), where=self.uri, expected="a store that answers") from error
            raise BadMember("damaged", "the row of the Parquet file cannot be read") from error

    def _seek(self, row: int) -> None:
        group, first = 0, 0
        while row >= first + (rows := self._file.metadata.row_group(group).num_rows):
            first += rows
            group += 1
            if group == self._file.num_row_groups:
                raise StopIteration
        self._rows = self._from(group, row - first)

    def _from(self, group: int, skip: int) -> Iterator[bytes | None]:
        groups = list(range(group, self._file.num_row_groups))
        for batch in self._file.iter_batches(_BATCH, row_groups=groups, columns=["image"]):
            yield from (value.as_py() for value in batch.column(0)[skip:])
            skip = max(0, skip - len(batch))
