"""Files read from the middle, local or on an object store, with a bounded number of tries when a connection drops."""

from __future__ import annotations

import errno
import io
import logging
import os
import time
from collections.abc import Callable
from typing import TypeVar

from pyarrow import fs as pafs

from dermaflow import storage
from dermaflow.errors import StorageError
from dermaflow.scoring.references import BadMember

log = logging.getLogger(__name__)

PAUSES = (0.5, 2.0, 8.0)
"""Seconds before each further try, beyond those that the client of the object store makes on its own."""
BUFFER = 4 << 20
"""Bytes fetched at a time when a file is read from front to back."""
_OF_ONE_FILE = (
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EIO,
    errno.EINVAL,
)  # fmt: skip
"""Errors that concern one file; any other (a mount gone stale, no more handles) concerns all and ends the run."""

T = TypeVar("T")


def persistently(action: Callable[[], T], where: str) -> T:
    """Do something that may fail for the moment, again after each of `PAUSES`.

    Raises:
        BadMember: This one file cannot be read: it is gone or not ours to read.
        StorageError: The store does not answer. Nothing is said of the file then: a later run can read it.
    """
    for pause in (*PAUSES, None):
        try:
            return action()
        except (FileNotFoundError, PermissionError) as error:
            raise BadMember("unreadable", _short(error), where=where) from error
        except OSError as error:
            if storage.is_remote(where) and _refused(error):
                raise BadMember("unreadable", _short(error), where=where) from error
            if not storage.is_remote(where) and error.errno in _OF_ONE_FILE:
                raise BadMember("unreadable", _short(error), where=where) from error
            if pause is None:
                raise StorageError(
                    f"could not be read in {len(PAUSES) + 1} tries: {error}", where=where,
                    expected="a store that answers", todo="check the connection, then run the same command again",
                ) from error  # fmt: skip
            log.warning("reading failed, trying again in %g s", pause)
            time.sleep(pause)
    raise AssertionError


def _refused(error: OSError) -> bool:
    return any(word in str(error) for word in ("ACCESS_DENIED", "HTTP status 403", "NO_SUCH_KEY", "HTTP status 404"))


def _short(error: OSError) -> str:
    """Why, without the path: reasons are grouped and logged, and names of files may be names of people."""
    if error.strerror and error.errno is not None:
        return error.strerror
    if isinstance(error, FileNotFoundError):
        return os.strerror(errno.ENOENT)
    return "access denied" if isinstance(error, PermissionError) or _refused(error) else "cannot be read"


class RandomFile:
    """A file that can be read at any place, by several threads.

    Args:
        uri: Local path or s3:// address.

    Raises:
        BadMember: It is not there or may not be read.
        StorageError: The store does not answer.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._closed = False
        self._descriptor: int | None = None
        if storage.is_remote(uri):
            filesystem, path = storage.locate(uri)
            self._remote = persistently(lambda: filesystem.open_input_file(path), uri)
            self.size = int(self._remote.size())
        else:
            # Not to wait for the writer of a named pipe; it reads as empty.
            self._descriptor = persistently(lambda: os.open(uri, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), uri)
            self.size = os.fstat(self._descriptor).st_size

    def read_at(self, offset: int, count: int) -> bytes:
        """Up to `count` bytes from `offset` on; fewer at the end of the file."""
        count = max(0, min(count, self.size - offset))
        if self._descriptor is None:
            return bytes(persistently(lambda: self._remote.read_at(count, offset), self.uri))
        parts = []
        while count and (part := self._pread(offset, count)):
            parts.append(part)
            offset, count = offset + len(part), count - len(part)
        return b"".join(parts)

    def _pread(self, offset: int, count: int) -> bytes:
        descriptor = self._descriptor
        assert descriptor is not None
        return persistently(lambda: os.pread(descriptor, min(count, 1 << 30), offset), self.uri)

    def stream(self) -> io.BufferedReader:
        """The file from its beginning, buffered."""
        return io.BufferedReader(_Raw(self), BUFFER)

    def close(self) -> None:
        """Give the handle back; closing twice does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._descriptor is not None:
            os.close(self._descriptor)
        else:
            self._remote.close()

    def __enter__(self) -> RandomFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _Raw(io.RawIOBase):
    """A `RandomFile` with a position."""

    def __init__(self, file: RandomFile) -> None:
        self._file, self._position = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, target: memoryview) -> int:  # type: ignore[override]
        data = self._file.read_at(self._position, len(target))
        target[: len(data)] = data
        self._position += len(data)
        return len(data)


def read_file(uri: str, most: int) -> bytes:
    """The bytes of a file.

    Raises:
        BadMember: It is gone, not ours to read, or has more than `most` bytes.
        StorageError: The store does not answer.
    """
    with RandomFile(uri) as file:
        if file.size > most:
            raise BadMember("too_many_bytes", f"{file.size:,} bytes, the limit is {most:,}")
        return file.read_at(0, file.size)


def list_objects(uri: str) -> list[pafs.FileInfo]:
    """What lies directly under an s3:// prefix, sorted by name."""
    filesystem, path = storage.locate(uri)
    try:
        found = persistently(lambda: filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True)), uri)
    except BadMember as error:
        raise StorageError(error.what, where=uri, expected="a prefix that may be listed") from error
    return sorted(found, key=lambda entry: entry.path)
