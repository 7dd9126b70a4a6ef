"""Uploads of batches: streamed into the state folder piece by piece, and only then given their place."""

from __future__ import annotations

import asyncio
import shutil
import struct
from contextlib import ExitStack
from pathlib import Path, PurePath
from typing import BinaryIO, NamedTuple

from fastapi import Request

from serve.bodies import parts
from serve.errors import Refused, too_large
from serve.options import Limits

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.zst", ".tzst", ".parquet", ".dcm")
"""A table of addresses is not among them: it would let a caller read what the service can."""
TABLES = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".ndjson", ".parquet", ".pq")
_BUFFER = 1 << 20
_TAIL = 22 + 65_535  # bytes in which the end record of a .zip lies


class Upload(NamedTuple):
    """What was uploaded, by path."""

    name: str  # as the sender calls it
    source: Path
    patients: Path | None


async def receive(request: Request, folder: Path, limits: Limits) -> Upload:
    """Stream a form into a folder: ``archive`` or ``images``, and ``patients``.

    Args:
        request: The form.
        folder: New folder; made here, and gone again if anything goes wrong.
        limits: What is accepted.

    Raises:
        Refused: Too large, no form, a field or type that is not known, the disk is full, or the client went away.
    """
    partial = folder.with_name(folder.name + ".partial")
    try:
        _check_space(folder, int(request.headers.get("content-length") or 0), limits)
        partial.mkdir(parents=True)
        found = await _receive(request, partial, limits)
        await asyncio.to_thread(_check_members, found.source, limits)
        partial.rename(folder)
        return Upload(found.name, folder / found.source.relative_to(partial),
                      found.patients and folder / found.patients.relative_to(partial))  # fmt: skip
    except OSError as error:
        raise Refused(503, "storage", f"the upload could not be kept: {error.strerror}", retry_after=60) from None
    finally:
        # also when the client went away, which cancels this
        shutil.rmtree(partial, ignore_errors=True)


async def _receive(request: Request, folder: Path, limits: Limits) -> Upload:
    archive: Path | None = None
    patients: Path | None = None
    images: list[str] = []
    names: set[str] = set()
    with ExitStack() as stack:
        file: _File | None = None
        async for part, piece in parts(request, limits.upload, limits.idle):
            if file is None:
                if part.filename is None:
                    raise Refused(422, "form", "a field that is no file", expected="archive or images, and patients")
                name = _plain(part.filename)
                match part.name:
                    case "archive" if archive is None and not images:
                        _check_suffix(name, ARCHIVES, "an archive")
                        place = archive = folder / _place(name, ARCHIVES, "archive")
                        shown = name
                        most = limits.upload
                    case "images" if archive is None:
                        _refuse_suffix(name)
                        if len(images) >= limits.files:
                            raise too_large("the number of images", limits.files, "images")
                        (folder / "images").mkdir(exist_ok=True)
                        place = folder / "images" / _once(name, names)
                        images.append(name)
                        most = limits.image
                    case "patients" if patients is None:
                        _check_suffix(name, TABLES, "a table of patients")
                        place = patients = folder / _place(name, TABLES, "patients")
                        most = limits.patients
                    case _:
                        raise Refused(422, "form", "a field that is not known, or stands twice",
                                      expected="one archive or several images, one table of patients")  # fmt: skip
                file = stack.enter_context(_File(place, most))
            if piece is not None:
                await file.write(piece)
                continue
            await file.finish()
            file = None
    if archive is not None:
        return Upload(shown, archive, patients)
    if not images:
        raise Refused(422, "form", "neither an archive nor images", expected="a file in the field archive or images")
    return Upload(images[0] if len(images) == 1 else f"{len(images)} images", folder / "images", patients)


class _File:
    """A file that is written in a thread, a megabyte at a time."""

    def __init__(self, path: Path, limit: int) -> None:
        self._path, self._limit = path, limit
        self._file: BinaryIO | None = None
        self._buffer = bytearray()
        self._size = 0

    def __enter__(self) -> _File:
        self._file = self._path.open("xb")
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    async def write(self, piece: bytes) -> None:
        self._size += len(piece)
        if self._size > self._limit:
            raise too_large("a file", self._limit)
        self._buffer += piece
        if len(self._buffer) >= _BUFFER:
            await self._flush()

    async def finish(self) -> None:
        await self._flush()
        self.__exit__()
        self._file = None

    async def _flush(self) -> None:
        if self._buffer and self._file is not None:
            content, self._buffer = bytes(self._buffer), bytearray()
            await asyncio.to_thread(self._file.write, content)


def _plain(name: str) -> str:
    """The last part of a file name, printable, of a length that every disk takes."""
    last = PurePath(name.replace("\\", "/")).name
    plain = "".join(c if c.isprintable() else "_" for c in last).strip().lstrip(".")
    while len(plain.encode()) > 180:
        stem, dot, suffix = plain.rpartition(".")
        plain = f"{stem[:-1]}{dot}{suffix}" if dot and len(stem) > 1 else plain[:-1]
    if not plain:
        raise Refused(422, "form", "a file without a name", todo="give every file its name")
    return plain


def _suffix(name: str, known: tuple[str, ...]) -> str | None:
    return next((suffix for suffix in sorted(known, key=len, reverse=True) if name.lower().endswith(suffix)), None)


def _check_suffix(name: str, known: tuple[str, ...], what: str) -> None:
    if _suffix(name, known) is None:
        raise Refused(415, "file_type", f"{what} of a type that is not read", expected=", ".join(known))


def _refuse_suffix(name: str) -> None:
    """A table or an archive among images would make the folder something else than images."""
    if _suffix(name, TABLES) is not None or _suffix(name, ARCHIVES) not in (None, ".dcm"):
        raise Refused(415, "file_type", "an archive or a table among the images",
                      expected="images in the field images, one archive in archive, a table in patients")  # fmt: skip


def _place(name: str, known: tuple[str, ...], stem: str) -> str:
    """Our own name for a file, with the suffix that tells its type."""
    return f"{stem}{_suffix(name, known)}"


def _once(name: str, names: set[str]) -> str:
    """A name that no other image of the upload has."""
    stem, dot, suffix = name.rpartition(".")
    found, number = name, 1
    while found.lower() in names:
        number += 1
        found = f"{stem}-{number}{dot}{suffix}"
    names.add(found.lower())
    return found


def _check_space(folder: Path, size: int, limits: Limits) -> None:
    if size > limits.upload:
        raise too_large("the upload", limits.upload)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder.parent).free - size < limits.spare:
        raise Refused(503, "storage", "the disk of the service is nearly full", todo="ask for old batches to go",
                      retry_after=300)  # fmt: skip


def _check_members(source: Path, limits: Limits) -> None:
    """Refuse a .zip that says it has too many members before anything reads its directory."""
    if source.suffix.lower() != ".zip":
        return
    size = source.stat().st_size
    with source.open("rb") as file:
        file.seek(max(0, size - _TAIL))
        tail = file.read()
        at = tail.rfind(b"PK\5\6")
        if at < 0 or len(tail) - at < 22:
            raise Refused(422, "archive", "the archive is no .zip, or is cut short", todo="send it again")
        count = struct.unpack_from("<H", tail, at + 10)[0]
        wide = tail.rfind(b"PK\6\6", 0, at)
        if count == 0xFFFF and wide >= 0 and len(tail) - wide >= 40:
            count = struct.unpack_from("<Q", tail, wide + 32)[0]
    if count > limits.members:
        raise too_large("the number of members of the archive", limits.members, "members")
