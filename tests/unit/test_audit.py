"""The audit log: whatever is done to a line is noticed at that line; writers do not get in each other's way."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest

from dermaflow.audit import FIRST, AuditError, AuditLog, entries, verify


def written(folder: Path, count: int = 4) -> Path:
    log = AuditLog(folder / "audit.jsonl")
    for i in range(count):
        log.append("message in", bytes=i, site="nörd")
    return log.path


def test_entries_follow_each_other(tmp_path: Path) -> None:
    path = written(tmp_path)
    found = list(entries(path))
    assert [entry["n"] for entry in found] == [1, 2, 3, 4]
    assert [entry["previous"] for entry in found] == [FIRST, *(entry["hash"] for entry in found[:-1])]
    assert all(entry["at"].endswith("+00:00") and entry["event"] == "message in" for entry in found)
    assert verify(path) == 4


def test_append_returns_the_hash_to_keep_elsewhere(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "deep" / "audit.jsonl")
    last = log.append("joined")
    assert [entry["hash"] for entry in entries(log.path)] == [last]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda lines: [lines[0], lines[1].replace(b'"bytes":1', b'"bytes":7'), *lines[2:]], 2),
        (lambda lines: [lines[0], *lines[2:]], 2),
        (lambda lines: [lines[1], lines[0], *lines[2:]], 1),
        (lambda lines: [*lines[:3], b"{}\n"], 4),
        (lambda lines: [*lines[:2], lines[1], *lines[2:]], 3),
        (lambda lines: [*lines[:3], lines[3][:-9]], 4),
        (lambda lines: [b"[1]\n", *lines[1:]], 1),
    ],
    ids=["altered", "taken out", "moved", "replaced", "repeated", "cut short", "another thing"],
)
def test_the_first_bad_line_is_named(tmp_path: Path, change: object, line: int) -> None:
    path = written(tmp_path)
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))  # type: ignore[operator]
    with pytest.raises(AuditError, match=f"line {line} "):
        verify(path)


def test_a_line_rewritten_with_its_hash_breaks_the_next(tmp_path: Path) -> None:
    from dermaflow.audit import entry_hash

    path = written(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    entry = json.loads(lines[1]) | {"bytes": 9}
    entry["hash"] = entry_hash(entry)
    lines[1] = json.dumps(entry).encode() + b"\n"
    path.write_bytes(b"".join(lines))
    with pytest.raises(AuditError, match="line 3 does not follow"):
        verify(path)


def test_a_line_torn_by_a_power_failure_makes_room_and_is_told(tmp_path: Path) -> None:
    path = written(tmp_path)
    with path.open("ab") as stream:
        stream.write(b'{"n":5,"at"')
    AuditLog(path).append("joined")
    assert verify(path) == 5
    assert list(entries(path))[-1]["torn_bytes_removed"] == 11


def test_nothing_is_appended_to_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("hello\n")
    with pytest.raises(AuditError, match="last line"):
        AuditLog(tmp_path / "notes").append("joined")
    assert (tmp_path / "notes").read_text() == "hello\n"


def test_reserved_fields_and_missing_logs(tmp_path: Path) -> None:
    with pytest.raises(AuditError, match="hash"):
        AuditLog(tmp_path / "a").append("joined", hash="0")
    with pytest.raises(AuditError):
        verify(tmp_path / "none")


def _append(path: Path, count: int) -> None:
    for i in range(count):
        AuditLog(path).append("from one of several", i=i)


def test_processes_share_a_log(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_append, args=(path, 25)) for _ in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert verify(path) == 100
