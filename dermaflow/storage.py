"""Local paths and ``s3://`` addresses through one door (pyarrow.fs).

Credentials and endpoint of ``s3://`` come from the standard chain (``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL``, ...).
Nothing half-written is ever read as whole: a local file is written beside its place and renamed, an object store shows
an object only when its upload is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from pyarrow import fs as pafs

from dermaflow.errors import StorageError


def is_remote(uri: str | Path) -> bool:
    """Whether the address names an object store rather than a local path."""
    return "://" in str(uri)


def locate(uri: str | Path) -> tuple[pafs.FileSystem, str]:
    """The file system of an address and the path within it.

    Raises:
        StorageError: The scheme is not known, or the address holds keys.
    """
    text = str(uri)
    if not is_remote(text):
        return pafs.LocalFileSystem(), str(Path(text).absolute())
    at = urlsplit(text)
    if at.username or at.password:  # it would stand in plans, logs and parameters of flows
        raise StorageError(
            "keys in an address", where=f"{at.scheme}://…@{at.hostname}{at.path}", expected="s3://bucket/prefix",
            todo="give them as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or by a profile or a role",
        )  # fmt: skip
    try:
        return pafs.FileSystem.from_uri(text)
    except (OSError, ValueError) as error:
        raise StorageError(str(error), where=text, expected="a local path or s3://bucket/prefix") from error


def join(uri: str | Path, *parts: str) -> str:
    """Append path parts to an address."""
    return "/".join([str(uri).rstrip("/"), *parts])


@contextlib.contextmanager
def _readable(uri: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(str(error), where=uri, expected="a readable file or folder") from error


def exists(uri: str | Path) -> bool:
    """Whether a file or folder is there.

    Raises:
        StorageError: The store cannot be reached.
    """
    return info(uri).type != pafs.FileType.NotFound


def info(uri: str | Path) -> pafs.FileInfo:
    """Type, size in bytes and time of the last change of a file or folder; type ``NotFound`` if it is not there.

    Raises:
        StorageError: The store cannot be reached.
    """
    filesystem, path = locate(uri)
    with _readable(uri):
        return filesystem.get_file_info(path)


def file_size(uri: str | Path) -> int:
    """Size of a file in bytes; raises StorageError when it is not there."""
    filesystem, path = locate(uri)
    info = filesystem.get_file_info(path)
    if info.type != pafs.FileType.File:
        raise StorageError("no such file", where=uri)
    return int(info.size)


def list_folder(uri: str | Path) -> list[str]:
    """Names directly in a folder, sorted; empty if the folder is not there.

    Raises:
        StorageError: The store cannot be reached, or this is a file.
    """
    filesystem, path = locate(uri)
    with _readable(uri):
        found = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    return sorted(entry.base_name for entry in found)


def read_bytes(uri: str | Path) -> bytes:
    """The whole content of a file.

    Raises:
        StorageError: The file is not there or cannot be read.
    """
    filesystem, path = locate(uri)
    with _readable(uri), filesystem.open_input_stream(path) as stream:
        return stream.read()


@contextlib.contextmanager
def open_atomic(uri: str | Path) -> Iterator[BinaryIO]:
    """Open a file for writing that appears at its place only when the block ends without an error.

    Raises:
        StorageError: The disk is full or the place cannot be written. Nothing is left behind.
    """
    filesystem, path = locate(uri)
    if is_remote(uri):  # closing an upload completes it, so nothing is sent before the content is whole
        with tempfile.SpooledTemporaryFile(max_size=64 << 20) as whole:
            yield whole  # type: ignore[misc]
            whole.seek(0)
            try:
                with filesystem.open_output_stream(path) as stream:
                    shutil.copyfileobj(whole, stream, 8 << 20)
            except OSError as error:
                raise StorageError(str(error), where=uri, expected="a writable address") from error
        return
    partial = Path(f"{path}.{uuid.uuid4().hex[:8]}.partial")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except OSError as error:
        raise StorageError(
            f"could not write: {error.strerror or error}",
            where=path,
            expected="a writable disk with free space",
            todo="free space or choose another folder, then run the same command again",
        ) from error
    finally:
        with contextlib.suppress(OSError):  # the error above says more than this one would
            partial.unlink()


def remove_remains(uri: str | Path) -> None:
    """Delete what processes that were killed while writing left in a folder that nobody writes into now."""
    if is_remote(uri):  # there is nothing half-written on a store
        return
    for name in list_folder(uri):
        if name.endswith(".partial"):
            delete(join(uri, name))


def write_bytes(uri: str | Path, content: bytes) -> None:
    """Write a whole file atomically."""
    with open_atomic(uri) as stream:
        stream.write(content)


def delete(uri: str | Path) -> None:
    """Remove a file or a folder with its content, if it is there."""
    filesystem, path = locate(uri)
    kind = filesystem.get_file_info(path).type
    if kind == pafs.FileType.Directory:
        filesystem.delete_dir(path)
    elif kind == pafs.FileType.File:
        filesystem.delete_file(path)


def copy_folder(source: str | Path, target: str | Path) -> None:
    """Copy every file of a folder, across file systems, including sub-folders."""
    source_fs, source_path = locate(source)
    target_fs, target_path = locate(target)
    target_fs.create_dir(target_path, recursive=True)
    pafs.copy_files(source_path, target_path, source_filesystem=source_fs, destination_filesystem=target_fs)


@contextlib.contextmanager
def output_folder(uri: str | Path, last: str | None = None) -> Iterator[Path]:
    """A local folder to write into; what an address names is sent there when the block ends without an error.

    For a local path it is the folder itself. For an address it lies among the temporary files, under a name that the
    address gives: after an error it stays, so that the same command goes on with it.

    Args:
        uri: Local folder or ``s3://`` address.
        last: File that makes the folder whole to its readers; it is taken away first and sent last.

    Raises:
        StorageError: A file could not be sent; the local folder stays.
    """
    if not is_remote(uri):
        yield Path(uri)
        return
    name = str(uri).rstrip("/").rpartition("/")[2]
    work = Path(tempfile.gettempdir(), f"dermaflow-{sha256(str(uri).encode())[:16]}")
    work.mkdir(mode=0o700, exist_ok=True)
    yield work / name
    _mirror(work / name, uri, last)
    shutil.rmtree(work, ignore_errors=True)


def _mirror(folder: Path, uri: str | Path, last: str | None) -> None:
    """Make an address hold the files of a local folder and no others."""
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    if last is not None:
        delete(join(uri, last))
        files.sort(key=lambda file: file == last)
    for file in files:
        with open_atomic(join(uri, file)) as stream, (folder / file).open("rb") as content:
            shutil.copyfileobj(content, stream, 8 << 20)
    filesystem, path = locate(uri)
    with _readable(uri):
        there = filesystem.get_file_info(pafs.FileSelector(path, recursive=True, allow_not_found=True))
    for entry in there:
        if entry.is_file and entry.path[len(path.rstrip("/")) + 1 :] not in files:
            filesystem.delete_file(entry.path)


@contextlib.contextmanager
def folder_atomic(path: Path) -> Iterator[Path]:
    """A new local folder that appears at `path` only when the block ends without an error; replaces what was there.

    Raises:
        StorageError: A file stands at the place, or no folder can be made there.
    """
    partial, old = (path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.{kind}") for kind in ("partial", "old"))
    if path.is_file():
        raise StorageError(
            "is a file", where=path, expected="a folder to write or nothing", todo="choose another folder"
        )
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise StorageError(
            f"no folder can be made here: {error.strerror}", where=path, expected="a writable disk"
        ) from error
    try:
        yield partial
        if path.exists():
            path.rename(old)
        try:
            partial.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sha256(content: bytes) -> str:
    """Hex SHA-256 of some bytes."""
    return hashlib.sha256(content).hexdigest()


def sha256_file(uri: str | Path) -> str:
    """Hex SHA-256 of a file, read in pieces.

    Raises:
        StorageError: The file is not there or cannot be read.
    """
    filesystem, path = locate(uri)
    digest = hashlib.sha256()
    with _readable(uri), filesystem.open_input_stream(path) as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
