"""List a source, whatever it is, as references: a stream, without pixels, in an order that never changes.

A source is a folder, .zip, .tar, .tar.gz or .tar.zst, Parquet shards, a .csv of URIs, a DICOM file or an image, local
or on s3://. What cannot be used is a reference with its reason: a source has no gaps.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from dermaflow import storage
from dermaflow.errors import DataError, StorageError
from dermaflow.preparation.reading import ShardFolder
from dermaflow.schemas.shard import MANIFEST_NAME
from dermaflow.scoring import dicom
from dermaflow.scoring.archives import list_tar, list_zip, rest
from dermaflow.scoring.files import RandomFile, list_objects
from dermaflow.scoring.reading import Reader
from dermaflow.scoring.references import (
    LIMITS,
    BadMember,
    Limits,
    Reference,
    Source,
    is_litter,
    may_be_dicom,
    nested_problem,
    size_problem,
    suffix,
)

_PACKED = (".tar.gz", ".tgz", ".tar.zst", ".tzst")
_MAGIC = (
    (0, b"PK\3\4", "zip"),
    (257, b"ustar", "tar"),
    (0, b"\x1f\x8b", "packed_tar"),
    (0, b"\x28\xb5\x2f\xfd", "packed_tar"),
)
_ROWS = 1024  # of a Parquet file listed at a time
_CELL = 1 << 16  # characters of a cell of a .csv

Skip = Callable[[str], bool]


def identify(source: str) -> Source:
    """What a source is, by its name and where that says nothing by how it begins.

    Raises:
        DataError: It is not there.
        StorageError: The store cannot be reached.
    """
    uri = source if storage.is_remote(source) else str(Path(source).expanduser().absolute())
    found = storage.info(uri)
    if found.type == pafs.FileType.NotFound:
        raise DataError("no such source", where=source, expected="a folder, an archive, a table or an image")
    if found.type == pafs.FileType.Directory:
        return Source(uri, "shards" if _shards(uri) else "folder")
    name = uri.lower()
    if name.endswith(_PACKED):
        return Source(uri, "packed_tar")
    if (kind := {".zip": "zip", ".tar": "tar", ".csv": "csv", ".parquet": "shards"}.get(suffix(name))) is not None:
        return Source(uri, kind)
    with _WholeSource(uri), RandomFile(uri) as file:
        head = file.read_at(0, 512)
    for offset, magic, kind in _MAGIC:
        if head[offset : offset + len(magic)] == magic:
            return Source(uri, kind)
    return Source(uri, "file")


def fingerprint(source: Source, skip: Skip = lambda uri: False) -> str:
    """A hash that changes when the source does: by names, sizes and times of its files, not by their bytes.

    Args:
        source: From `identify`.
        skip: Files and folders that do not belong to it.
    """
    if source.kind in ("folder", "shards") and suffix(source.uri) != ".parquet":
        lines = [f"{uri} {facts}" for uri, _, facts in _walk(source.uri, skip)]
        return storage.sha256("\n".join(lines).encode(errors="surrogateescape"))
    found = storage.info(source.uri)
    return storage.sha256(f"{found.size} {found.mtime_ns}".encode())


def list_inputs(source: Source, limits: Limits = LIMITS, skip: Skip = lambda uri: False) -> Iterator[Reference | None]:
    """Every input of a source; None for a file that systems leave behind (`is_litter`).

    Args:
        source: From `identify`; a packed tar must be unpacked first.
        limits: What is accepted.
        skip: Files and folders that do not belong to the source.

    Raises:
        DataError: The source as a whole cannot be read.
        StorageError: The store does not answer.
    """
    with Reader(limits) as reader:
        for reference in _list(source, limits, skip):
            if is_litter(reference.path) and reference.image_id is None:
                yield None
            elif reference.problem is None and source.kind != "shards" and may_be_dicom(reference.path):
                yield from _expand(reference, reader)
            else:
                yield reference


def _list(source: Source, limits: Limits, skip: Skip) -> Iterator[Reference]:
    if source.kind == "folder":
        yield from _list_folder(source.uri, limits, skip)
    elif source.kind == "shards":
        yield from _list_shards(source.uri)
    elif source.kind == "csv":
        yield from _list_csv(source.uri, limits)
    elif source.kind == "file":
        size = storage.info(source.uri).size
        yield Reference(source.uri, _name(source.uri), bytes=size, problem=size_problem(source.uri, size, limits))
    else:
        with _WholeSource(source.uri), RandomFile(source.uri) as file:
            yield from (list_zip if source.kind == "zip" else list_tar)(file, limits)


def _expand(reference: Reference, reader: Reader) -> Iterator[Reference]:
    """The frames of a DICOM file; what has no suffix and is not DICOM either is taken for an image."""
    try:
        head = reader.head(reference, dicom.HEAD_BYTES if suffix(reference.path) else 132)
        if not suffix(reference.path) and not dicom.is_dicom(head):
            too_large = size_problem("image.jpg", reference.bytes or 1, reader.limits)
            yield reference.but(problem=too_large)
            return
        yield from dicom.expand(reference, reader.head(reference, dicom.HEAD_BYTES))
    except BadMember as error:
        yield reference.but(problem=error.problem)


class _WholeSource:
    """Within it, a file that cannot be read is an error and not a row: it is the source itself."""

    def __init__(self, uri: str) -> None:
        self._uri = uri

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if isinstance(error, BadMember):
            raise DataError(error.what, where=self._uri, expected="a source that can be read") from error


def _name(uri: str) -> str:
    return uri.rstrip("/").rpartition("/")[2]


# --- folders -------------------------------------------------------------------------------------------------------


def _walk(uri: str, skip: Skip, base: str | None = None) -> Iterator[tuple[str, str | None, str]]:
    """Address, problem, and facts by which a change is noticed, of everything in a folder that is no folder."""
    if storage.is_remote(uri):
        yield from _walk_objects(uri, skip)
        return
    try:
        entries = sorted(os.scandir(uri), key=lambda entry: entry.name)
    except OSError as error:
        if base is None:
            raise DataError(
                f"cannot be listed: {error.strerror}", where=uri, expected="a folder that may be read"
            ) from error
        yield uri, f"unreadable: the folder cannot be listed ({error.strerror})", ""
        return
    for entry in entries:
        place = os.path.join(uri, entry.name)  # noqa: PTH118 - a million times
        if skip(place):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(place, skip, base or uri)
        else:
            yield place, *_facts(entry)


def _facts(entry: os.DirEntry[str]) -> tuple[str | None, str]:
    try:
        found = entry.stat()
    except OSError as error:
        return f"unreadable: {error.strerror}", "gone"
    if entry.is_dir():
        return "link: a link to a folder is not followed; score that folder on its own", "link"
    if not entry.is_file():
        return "not_a_file: a device or pipe", "device"
    return None, f"{found.st_size} {found.st_mtime_ns}"


def _walk_objects(uri: str, skip: Skip) -> Iterator[tuple[str, str | None, str]]:
    for entry in list_objects(uri):
        place = storage.join(uri, entry.base_name)
        if skip(place):
            continue
        if entry.type == pafs.FileType.Directory:
            yield from _walk_objects(place, skip)
        else:
            yield place, None, f"{entry.size} {entry.mtime_ns}"


def _list_folder(uri: str, limits: Limits, skip: Skip) -> Iterator[Reference]:
    start = len(uri.rstrip("/")) + 1
    for number, (place, problem, facts) in enumerate(_walk(uri, skip)):
        if number == limits.members:
            yield rest(uri, number, f"too_many_members: the limit is {limits.members:,}")
            return
        path = place[start:]
        if not _is_text(place):
            problem = "unsafe_path: the name is not in UTF-8; rename the file"
            place, path = (text.encode(errors="surrogateescape").decode(errors="replace") for text in (place, path))
        size = int(facts.split()[0]) if problem is None else None
        if problem is None and size is not None:
            problem = nested_problem(path) or size_problem(path, size, limits)
        yield Reference(place, path, bytes=size, problem=problem)


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


# --- Parquet -------------------------------------------------------------------------------------------------------


def _shards(uri: str) -> list[str]:
    """The Parquet files of a folder that `dermaflow prepare` wrote, or that holds nothing else; else none."""
    names = [name for name in storage.list_folder(uri) if not is_litter(name)]
    if MANIFEST_NAME in names:
        return [storage.join(uri, shard.path) for shard in ShardFolder(uri).manifest.shards]
    return [storage.join(uri, name) for name in names] if names and all(suffix(n) == ".parquet" for n in names) else []


def _list_shards(uri: str) -> Iterator[Reference]:
    for place in [uri] if suffix(uri) == ".parquet" else _shards(uri):
        filesystem, path = storage.locate(place)
        row = 0
        try:
            with pq.ParquetFile(path, filesystem=filesystem) as file:
                names = [name for name in ("image_id", "lesion_id") if name in file.schema_arrow.names]
                if "image" not in file.schema_arrow.names or "image_id" not in names:
                    yield _damaged(place, row, "a Parquet file without the columns image and image_id")
                    continue
                for batch in file.iter_batches(_ROWS, columns=names):
                    for entry in batch.to_pylist():
                        name = f"{_name(place)}:{row}"
                        yield Reference(
                            place, name, image_id=_text(entry["image_id"]) or name, offset=row,
                            lesion_id=_text(entry.get("lesion_id")),
                        )  # fmt: skip
                        row += 1
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and storage.is_remote(place):
                raise StorageError(str(error), where=place, expected="a store that answers") from error
            yield _damaged(place, row, "a Parquet file that cannot be read")


def _damaged(place: str, row: int, what: str) -> Reference:
    return Reference(place, f"{_name(place)}:rest-after-{row}", problem=f"damaged: {what}")


def _text(value: object) -> str | None:
    return None if value is None else str(value)


# --- a table of URIs -----------------------------------------------------------------------------------------------


def _list_csv(uri: str, limits: Limits) -> Iterator[Reference]:
    folder = uri.rpartition("/")[0]
    with _WholeSource(uri), RandomFile(uri) as file, io.TextIOWrapper(file.stream(), "utf-8-sig", "replace") as text:
        csv.field_size_limit(_CELL)
        rows = csv.DictReader(text)
        try:
            columns = {name.strip().lower(): name for name in rows.fieldnames or () if name}
            if "uri" not in columns:
                raise DataError(
                    "no column uri", where=uri, expected="a header with uri, and if known image_id, lesion_id"
                )
            for number, row in enumerate(rows):
                if number == limits.members:
                    yield rest(uri, number, f"too_many_members: the limit is {limits.members:,}")
                    return
                cells = {name: (row[column] or "").strip() for name, column in columns.items()}
                place = cells["uri"].removeprefix("file://")
                problem = _uri_problem(place)
                if problem is None and not storage.is_remote(place) and not place.startswith("/"):
                    place = storage.join(folder, place)
                yield Reference(
                    place, cells["uri"] or f"row {number + 1}", image_id=cells.get("image_id") or None,
                    lesion_id=cells.get("lesion_id") or None, problem=problem,
                )  # fmt: skip
        except csv.Error as error:
            raise DataError(f"no table: {error}", where=uri, expected="a .csv with a column uri") from error


def _uri_problem(place: str) -> str | None:
    if not place:
        return "empty: no uri"
    if storage.is_remote(place) and not place.startswith("s3://"):
        return "unreadable: only paths and s3:// addresses are read"
    return nested_problem(place)
