"""Locks between real processes."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dermaflow.errors import StorageError
from dermaflow.locks import is_locked, locked

HOLD = """
import sys, time
from pathlib import Path
from dermaflow.locks import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
    Path(sys.argv[1]).with_name("ended").touch()
"""


def hold(lock: Path, seconds: float) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(lock), str(seconds)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_held_lock_is_seen_and_refused_and_the_end_of_its_process_gives_it_free(tmp_path: Path) -> None:
    lock = tmp_path / "folder/lock"
    assert not is_locked(lock)
    with hold(lock, 60) as process:
        assert is_locked(lock)
        with pytest.raises(StorageError, match="busy"), locked(lock, StorageError("busy")):
            pytest.fail("two hold it")
        process.kill()
    assert not is_locked(lock)
    with locked(lock, StorageError("busy")):
        assert is_locked(lock)
    assert not is_locked(lock)


def test_without_an_error_to_raise_it_waits(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with hold(lock, 0.5), locked(lock):
        assert (tmp_path / "ended").exists()


def test_an_error_in_the_block_gives_it_free(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with pytest.raises(ZeroDivisionError), locked(lock):
        raise ZeroDivisionError
    assert not is_locked(lock)


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*how: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    said = r"lock: cannot be locked: No locks available; expected a file system"
    with pytest.raises(StorageError, match=said), locked(tmp_path / "lock"):
        pytest.fail("not locked")
