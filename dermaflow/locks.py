"""A lock is a file that one process holds; the end of the process, however it comes, gives it free."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from dermaflow.errors import DermaflowError, StorageError


@contextlib.contextmanager
def locked(path: Path, busy: DermaflowError | None = None) -> Iterator[None]:
    """Hold a lock until the block ends.

    Args:
        path: A local file, made with its folder where there is none, and left there.
        busy: Raised where the lock is held already; None waits until it is free.

    Raises:
        StorageError: The file system keeps no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))  # closing the file gives it free
        except BlockingIOError:
            assert busy is not None
            raise busy from None
        except OSError as error:
            raise StorageError(
                f"cannot be locked: {error.strerror}", where=path, expected="a file system that keeps locks",
                todo="choose a folder on another disk, or mount this one with them (Lustre: -o flock)",
            ) from error  # fmt: skip
        yield


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock."""
    if not path.exists():
        return False
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
