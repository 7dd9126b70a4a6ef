"""Zip and tar: list the members of an archive of any size, and read one member from its middle.

Nothing is unpacked to disk, so a member's name can do no harm, and nothing is read beyond what the archive's own
directory declares and `Limits` allow. The directory of a zip is read as a stream: Python's own module keeps half a
kilobyte for every member, in every process.
"""

from __future__ import annotations

import io
import lzma
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow as pa

from dermaflow import storage
from dermaflow.errors import DataError
from dermaflow.scoring.files import RandomFile
from dermaflow.scoring.references import (
    FREE_BYTES,
    BadMember,
    Limits,
    Reference,
    nested_problem,
    size_problem,
    unsafe,
)

_END = struct.Struct("<4s4H2LH")  # end of central directory
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_ENTRY = struct.Struct("<4s6H3L5H2L")  # of the central directory
_LOCAL = struct.Struct("<4s5H3L2H")
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
_ENCRYPTED, _UTF8 = 0x1, 0x800
_HEADER_BYTES = 1 << 20
"""Longest header of a tar that is believed: real ones hold a path and some times."""
_PIECE = 1 << 20
_UNPACKED_PIECE = 4096
"""Bytes unpacked at a time: so much at most is lost before the place where a packed tar is damaged."""


class _Budget:
    """What an archive may still hold."""

    def __init__(self, limits: Limits) -> None:
        self._limits, self._bytes = limits, 0

    def problem(self, size: int, packed: int | None) -> str | None:
        """What is wrong with one more member of this size."""
        if packed is not None and size > FREE_BYTES and size > self._limits.ratio * packed:
            return f"compression_ratio: {size:,} bytes out of {packed:,}, the limit is {self._limits.ratio:g} to 1"
        self._bytes += size
        if self._bytes > self._limits.total_bytes:
            return f"total_bytes: the archive holds more than {self._limits.total_bytes:,} bytes"
        return None


def rest(uri: str, number: int, problem: str) -> Reference:
    """The row that stands for everything of a source that cannot be listed any more."""
    return Reference(uri, f"rest-after-{number}", member=f"(everything after entry {number})", problem=problem)


# --- zip -----------------------------------------------------------------------------------------------------------


class _Directory(NamedTuple):
    entries: int
    offset: int  # of the central directory within the file
    size: int
    shift: int  # bytes before the archive, which its offsets do not count


def list_zip(file: RandomFile, limits: Limits) -> Iterator[Reference]:
    """Every member but folders, in the order of the directory.

    Raises:
        DataError: It is no zip archive, is cut short, or is in several volumes.
    """
    directory = _find_directory(file)
    budget, position, end = _Budget(limits), directory.offset, directory.offset + directory.size
    buffer, at = b"", 0
    for number in range(directory.entries):
        if number == limits.members:
            yield rest(file.uri, number, f"too_many_members: {directory.entries:,}, the limit is {limits.members:,}")
            return
        if position < end and len(buffer) - at < _ENTRY.size + 3 * _FULL16:  # the longest entry there can be
            piece = file.read_at(position, min(_PIECE, end - position))
            position += len(piece)
            buffer, at = buffer[at:] + piece, 0
        entry = _parse_entry(buffer, at)
        if entry is None:
            yield rest(file.uri, number, f"damaged: the directory ends after {number:,} of {directory.entries:,}")
            return
        at += entry.length
        if not entry.name.endswith("/"):
            yield Reference(
                file.uri, entry.name, member=entry.name, bytes=entry.size, offset=entry.offset + directory.shift,
                packed=entry.packed, method=entry.method, crc=entry.crc,
                problem=_zip_problem(entry, limits) or budget.problem(entry.size, entry.packed),
            )  # fmt: skip


def _find_directory(file: RandomFile) -> _Directory:
    start = max(0, file.size - _END.size - _FULL16)
    tail = file.read_at(start, file.size - start)
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) - at < _END.size:
        raise DataError(
            "no zip archive, or cut short: its directory is missing", where=file.uri, expected="a whole .zip",
            todo="fetch it again, or repair it with `zip -FF`",
        )  # fmt: skip
    _, disk, _, _, entries, size, offset, _ = _END.unpack_from(tail, at)
    end, extra = start + at, 0
    locator = file.read_at(end - _LOCATOR.size, _LOCATOR.size) if end >= _LOCATOR.size else b""
    if locator.startswith(b"PK\6\7"):
        place = _LOCATOR.unpack(locator)[2]
        for where in (place, end - _LOCATOR.size - _END64.size):  # the second where something stands before the archive
            record = file.read_at(where, _END64.size)
            if record.startswith(b"PK\6\6") and len(record) == _END64.size:
                *_, entries, size, offset = _END64.unpack(record)
                disk, extra = 0, _LOCATOR.size + _END64.size
                break
    if disk not in (0, _FULL16):
        raise DataError("a part of an archive in several volumes", where=file.uri, todo="join the volumes first")
    shift = end - extra - size - offset
    if shift < 0 or offset + shift + size > file.size:
        raise DataError(
            "its directory does not fit into the file", where=file.uri, expected="a whole .zip", todo="fetch it again"
        )
    return _Directory(entries, offset + shift, size, shift)


class _Entry(NamedTuple):
    name: str
    flags: int
    method: int
    crc: int
    packed: int
    size: int
    mode: int  # of Unix, 0 where the archive was made elsewhere
    offset: int
    length: int  # of the entry itself


def _parse_entry(buffer: bytes, at: int) -> _Entry | None:
    if len(buffer) - at < _ENTRY.size or buffer[at : at + 4] != b"PK\1\2":
        return None
    (_, made, _, flags, method, _, _, crc, packed, size, name, extra, comment, _, _, attributes, offset) = (
        _ENTRY.unpack_from(buffer, at)
    )
    length = _ENTRY.size + name + extra + comment
    if len(buffer) - at < length:
        return None
    raw = buffer[at + _ENTRY.size : at + _ENTRY.size + name]
    fields = at + _ENTRY.size + name
    size, packed, offset = _wide(buffer[fields : fields + extra], size, packed, offset)
    text = raw.decode("utf-8" if flags & _UTF8 else "cp437", errors="replace").replace("\\", "/")
    return _Entry(text, flags, method, crc, packed, size, attributes >> 16 if made >> 8 == 3 else 0, offset, length)


def _wide(extra: bytes, *fields: int) -> list[int]:
    """Fields of 32 bits that are full stand in the extra field with 64 bits, in this order."""
    at, wide = 0, b""
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            wide = extra[at + 4 : at + 4 + length]
            break
        at += 4 + length
    found, position = [], 0
    for field in fields:
        if field == _FULL32 and position + 8 <= len(wide):
            field = struct.unpack_from("<Q", wide, position)[0]
            position += 8
        found.append(field)
    return found


def _zip_problem(entry: _Entry, limits: Limits) -> str | None:
    if problem := unsafe(entry.name):
        return problem
    if stat.S_ISLNK(entry.mode):
        return "link: a symbolic link is not followed"
    if stat.S_IFMT(entry.mode) not in (0, stat.S_IFREG):
        return "not_a_file: a device or pipe"
    if problem := nested_problem(entry.name):
        return problem
    if entry.flags & _ENCRYPTED:
        return "encrypted: needs a password; unpack the archive and score the folder"
    if entry.method not in _METHODS:
        return f"unsupported_compression: method {entry.method}"
    if entry.packed > max(2 * entry.size, FREE_BYTES):
        return f"damaged: {entry.packed:,} packed bytes for {entry.size:,}"
    return size_problem(entry.name, entry.size, limits)


def read_zip_member(file: RandomFile, reference: Any, most: int | None = None) -> bytes:
    """The bytes of a member, checked against its CRC-32.

    Args:
        file: The archive.
        reference: A `Reference` of `list_zip`, or a row of `INPUT_SCHEMA` with the same fields.
        most: Only so many bytes from its beginning, unchecked.

    Raises:
        BadMember: It is damaged.
    """
    fixed = file.read_at(reference.offset, _LOCAL.size)
    if len(fixed) < _LOCAL.size or not fixed.startswith(b"PK\3\4"):
        raise BadMember("damaged", "no member stands where the directory says")
    name, extra = _LOCAL.unpack(fixed)[-2:]
    start = reference.offset + _LOCAL.size + name + extra
    wanted = reference.packed if most is None else min(reference.packed, most + _PIECE)
    info = zipfile.ZipInfo("member")
    info.compress_type, info.compress_size, info.file_size = reference.method, reference.packed, reference.bytes
    info.CRC = reference.crc
    try:
        # It stops at the declared size, so a member that lies about its size cannot fill the memory.
        with zipfile.ZipExtFile(io.BytesIO(file.read_at(start, wanted)), "r", info) as stream:
            data = stream.read(most)
    except (zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError, OSError, NotImplementedError) as error:
        raise BadMember("damaged", f"cannot be unpacked ({type(error).__name__})") from error
    if most is None and len(data) != reference.bytes:
        raise BadMember("damaged", f"{len(data):,} bytes, the directory says {reference.bytes:,}")
    return data


# --- tar -----------------------------------------------------------------------------------------------------------


class _Headers:
    """A tar file for the one who reads its headers only."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream = stream
        self.seek, self.tell = stream.seek, stream.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._stream.read(size)


def list_tar(file: RandomFile, limits: Limits) -> Iterator[Reference]:
    """Every member but folders, in order. Where the archive is damaged, one row stands for the rest.

    Raises:
        DataError: It is no tar archive.
    """
    budget, number, cut = _Budget(limits), 0, False
    try:
        tar = tarfile.open(fileobj=_Headers(file.stream()), mode="r:")  # type: ignore[call-overload]  # noqa: SIM115
    except (tarfile.TarError, OSError, ValueError) as error:
        if file.size and not file.read_at(0, file.size if file.size <= _HEADER_BYTES else _HEADER_BYTES).strip(b"\0"):
            return
        raise DataError(
            f"no tar archive ({error})", where=file.uri, expected="a .tar, plain or packed with gzip or zstd",
            todo="fetch it again",
        ) from error  # fmt: skip
    with tar:
        while True:
            try:
                info = tar.next()
            except (tarfile.TarError, ValueError, UnicodeError) as error:
                if not cut:
                    yield rest(file.uri, number, f"damaged: the archive cannot be read on ({error})")
                return
            if info is None:
                break
            tar.members.clear()  # it keeps them all otherwise
            if number == limits.members:
                yield rest(file.uri, number, f"too_many_members: the limit is {limits.members:,}")
                return
            if info.isdir():
                continue
            number += 1
            problem = _tar_problem(info, limits) or budget.problem(info.size, None)
            cut = problem is None and info.offset_data + info.size > file.size
            if cut:
                problem = "truncated: the archive ends before the member does"
            yield Reference(
                file.uri, info.name, member=info.name, bytes=info.size, offset=info.offset_data, problem=problem
            )
        # The module ends without a word where there is no header; a whole archive ends with a block of zeros.
        if file.read_at(tar.offset, tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
            yield rest(file.uri, number, "damaged: the archive has no end, so members may be missing")


def _tar_problem(info: tarfile.TarInfo, limits: Limits) -> str | None:
    if problem := unsafe(info.name):
        return problem
    if info.issym() or info.islnk():
        return "link: a link within an archive is not followed"
    if not info.isreg():
        return "not_a_file: a device or pipe"
    if info.issparse():
        return "sparse: a file with holes"
    return nested_problem(info.name) or size_problem(info.name, info.size, limits)


def read_tar_member(file: RandomFile, reference: Any, most: int | None = None) -> bytes:
    """The bytes of a member, or the first `most` of them; raises BadMember when the archive ends before."""
    wanted = reference.bytes if most is None else min(reference.bytes, most)
    data = file.read_at(reference.offset, wanted)
    if len(data) != wanted:
        raise BadMember("truncated", "the archive ends before the member does")
    return data


def unpack(uri: str, to: str, limits: Limits) -> None:
    """Unpack a .tar.gz or .tar.zst to a plain tar: gzip and zstd can be read from the beginning only, a tar anywhere.

    What is damaged, or beyond the limits, is left out together with all that follows, and `list_tar` says so.

    Args:
        uri: Packed archive.
        to: File to write, which appears when it is whole.

    Raises:
        DataError: It is not packed in the way that its name says.
        StorageError: The disk is full, or the store does not answer.
    """
    kind = "zstd" if uri.lower().endswith(("zst", "zstd")) else "gzip"
    written = 0
    with RandomFile(uri) as file, storage.open_atomic(to) as target:
        most = min(limits.total_bytes, max(FREE_BYTES, int(limits.ratio * file.size)))
        stream = pa.CompressedInputStream(pa.PythonFile(file.stream(), mode="r"), kind)
        while written < most:
            try:
                piece = stream.read(min(_UNPACKED_PIECE, most - written))
            except OSError as error:
                if not written:
                    raise DataError(
                        f"not packed with {kind} ({error})", where=uri, expected=".tar.gz or .tar.zst",
                        todo="fetch it again",
                    ) from error  # fmt: skip
                break
            if not piece:
                break
            target.write(piece)
            written += len(piece)
