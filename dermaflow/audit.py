"""An audit log that shows when it was changed: one JSON line an event, each with the hash of the line before it.

A line that is altered, inserted, moved or taken out breaks the chain at that place. Lines cut off the end leave a
shorter chain that is whole: keep the last hash elsewhere (`dermaflow site status` prints it) to notice that, too.
No ids of patients, lesions or images belong here.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dermaflow.errors import DermaflowError

FIRST = "0" * 64
"""What the first entry names as the hash of the entry before it."""
RESERVED = frozenset({"n", "at", "previous", "hash"})
TAIL = 1 << 16  # bytes read from the end to find the last line; lines are far shorter


class AuditError(DermaflowError):
    """The log was changed, cut short or cannot be read or written."""


class AuditLog:
    """Appends to one log; several processes may do so at once.

    Args:
        path: JSON lines; made with its folder when the first entry is written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def append(self, event: str, **fields: Any) -> str:
        """Write one entry; when this returns, it is on the disk.

        Args:
            event: What happened, in a few words.
            fields: What JSON can say of it.

        Returns:
            Hash of the entry.

        Raises:
            AuditError: The disk is full, the last line belongs to no log of this kind, or a field has a reserved name.
        """
        if taken := RESERVED & fields.keys():
            raise AuditError(f"fields {sorted(taken)}", where=self.path, expected="other names: the log sets these")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o640)
        except OSError as error:
            raise AuditError(str(error), where=self.path, expected="a writable file") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed
            number, previous, torn = self._last(file)
            if torn:  # a power failure in mid-line; what never was an entry must not spoil the next one
                fields["torn_bytes_removed"] = torn
                os.ftruncate(file, os.fstat(file).st_size - torn)
            entry = {"n": number + 1, "at": _now(), "event": event, **fields, "previous": previous}
            entry["hash"] = entry_hash(entry)
            os.write(file, _line(entry))
            os.fsync(file)
        except OSError as error:
            raise AuditError(f"could not write: {error.strerror}", where=self.path, todo="free space") from error
        finally:
            os.close(file)
        return str(entry["hash"])

    def _last(self, file: int) -> tuple[int, str, int]:
        """Number and hash of the last entry, and bytes of an unfinished line after it."""
        size = os.fstat(file).st_size
        tail = os.pread(file, min(size, TAIL), max(size - TAIL, 0))
        whole, newline, torn = tail.rpartition(b"\n")
        if not newline:
            if size > TAIL:
                raise AuditError(f"a line longer than {TAIL} bytes", where=self.path, expected="an audit log")
            return 0, FIRST, len(torn)
        try:
            entry = json.loads(whole.rpartition(b"\n")[2])
            return int(entry["n"]), str(entry["hash"]), len(torn)
        except (ValueError, TypeError, KeyError) as error:
            raise AuditError(
                "the last line is no entry", where=self.path, todo="keep the file as evidence and name another one"
            ) from error


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry, separators=(",", ":"), ensure_ascii=True).encode() + b"\n"


def entry_hash(entry: dict[str, Any]) -> str:
    """SHA-256 over all of an entry but its own hash, keys sorted."""
    content = {key: value for key, value in entry.items() if key != "hash"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def entries(path: str | Path) -> Iterator[dict[str, Any]]:
    """The entries in order, each checked against the one before it.

    Raises:
        AuditError: The first line that is no entry, was changed, or does not follow the line before it.
    """
    previous, number = FIRST, 0
    try:
        with Path(path).open("rb") as stream:
            for line in stream:
                number += 1
                yield (entry := _checked(line, number, previous, path))
                previous = entry["hash"]
    except OSError as error:
        raise AuditError(str(error), where=path, expected="a readable audit log") from error


def _checked(line: bytes, number: int, previous: str, path: str | Path) -> dict[str, Any]:
    def broken(what: str) -> AuditError:
        return AuditError(
            f"line {number} {what}", where=path, expected="an unbroken chain",
            todo="keep the file as evidence: what stands before this line is as it was written",
        )  # fmt: skip

    if not line.endswith(b"\n"):
        raise broken("is cut short")
    try:
        entry = json.loads(line)
        found = entry["hash"], entry["previous"], entry["n"]
    except (ValueError, TypeError, KeyError):
        raise broken("is no entry") from None
    if found[0] != entry_hash(entry):
        raise broken("was changed after it was written")
    if found[1:] != (previous, number):
        raise broken("does not follow the line before it")
    return dict(entry)


def verify(path: str | Path) -> int:
    """Check the whole chain.

    Returns:
        Number of entries; 0 for an empty log.

    Raises:
        AuditError: The first bad line, by number, and what is wrong with it.
    """
    return sum(1 for _ in entries(path))
