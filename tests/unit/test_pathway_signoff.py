"""Sign-off: who may sign what, and a log in which every change is found."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sample_pathways import a_pathway

from dermaflow.errors import SignOffError
from dermaflow.pathways.signoff import (
    HEAD_NAME,
    LOG_NAME,
    apply_sign_offs,
    fingerprint,
    open_log,
    outdated,
    read_log,
)

AT = datetime(2026, 3, 1, 9, 30, tzinfo=UTC)


def sign_three(folder: Path) -> list[str]:
    with open_log(folder) as log:
        for lesion in ("L1", "L2", "L3"):
            log.sign(a_pathway(lesion_id=lesion), by="Dr Ada Byron", decision="accepted", at=AT)
    return (folder / LOG_NAME).read_text().splitlines(keepends=True)


def test_accepting_makes_a_pathway_final_and_says_who_and_when(tmp_path: Path) -> None:
    pathway = a_pathway()
    with open_log(tmp_path) as log:
        log.sign(pathway, by="  Dr Ada   Byron ", decision="accepted", at=AT)
    [signed] = apply_sign_offs([pathway], read_log(tmp_path))
    assert (pathway.status, signed.status) == ("preliminary", "final")
    assert signed.sign_off is not None
    assert (signed.sign_off.by, signed.sign_off.at) == ("Dr Ada Byron", "2026-03-01T09:30:00+00:00")
    assert fingerprint(signed) == fingerprint(pathway)


def test_edited_is_final_and_rejected_is_rejected_each_with_its_reason(tmp_path: Path) -> None:
    first, second = a_pathway(lesion_id="L1"), a_pathway(lesion_id="L2")
    with open_log(tmp_path) as log:
        log.sign(first, by="Dr Ada Byron", decision="edited", reason="Mohs instead")
        log.sign(second, by="Dr Ada Byron", decision="rejected", reason="wrong lesion")
    signed = apply_sign_offs([first, second, a_pathway(lesion_id="L3")], read_log(tmp_path))
    assert [p.status for p in signed] == ["final", "rejected", "preliminary"]
    assert [p.sign_off and p.sign_off.reason for p in signed] == ["Mohs instead", "wrong lesion", None]


@pytest.mark.parametrize("decision", ["edited", "rejected"])
@pytest.mark.parametrize("reason", [None, "  \n"])
def test_without_a_reason_nothing_is_edited_or_rejected(tmp_path: Path, decision: str, reason: str | None) -> None:
    with open_log(tmp_path) as log, pytest.raises(SignOffError, match="without a reason"):
        log.sign(a_pathway(), by="Dr Ada Byron", decision=decision, reason=reason)
    assert read_log(tmp_path) == []


@pytest.mark.parametrize("name", ["", "  ", "7", "A", "Dr \x1b[31mRed", "x" * 121])
def test_only_a_named_person_signs(tmp_path: Path, name: str) -> None:
    with open_log(tmp_path) as log, pytest.raises(SignOffError, match="no name"):
        log.sign(a_pathway(), by=name, decision="accepted")


def test_an_unknown_decision_is_refused(tmp_path: Path) -> None:
    with open_log(tmp_path) as log, pytest.raises(SignOffError, match="'ok'; expected accepted, edited or rejected"):
        log.sign(a_pathway(), by="Dr Ada Byron", decision="ok")


def test_an_amendment_is_a_new_entry_with_a_reason_and_the_old_one_stays(tmp_path: Path) -> None:
    pathway = a_pathway()
    with open_log(tmp_path) as log:
        old = log.sign(pathway, by="Dr Ada Byron", decision="accepted")
        with pytest.raises(SignOffError, match="already accepted by Dr Ada Byron"):
            log.sign(pathway, by="Dr Bo Lind", decision="accepted")
        new = log.sign(pathway, by="Dr Bo Lind", decision="rejected", reason="histology is back")
    assert read_log(tmp_path) == [old, new]
    assert (old.amends, new.amends) == (None, old.sha256)
    assert apply_sign_offs([pathway], read_log(tmp_path))[0].status == "rejected"


def test_a_sign_off_holds_for_the_pathway_that_was_seen_only(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        log.sign(a_pathway(), by="Dr Ada Byron", decision="accepted")
    changed = a_pathway(urgency="U3")
    [again] = apply_sign_offs([changed], read_log(tmp_path))
    assert again.status == "preliminary"
    assert outdated([again], read_log(tmp_path)) == [again]
    assert outdated(apply_sign_offs([a_pathway()], read_log(tmp_path)), read_log(tmp_path)) == []


def change_the_reason(lines: list[str]) -> list[str]:
    return [lines[0], lines[1].replace('"reason":null', '"reason":"as agreed"'), lines[2]]


def change_and_rehash_nothing_else(lines: list[str]) -> list[str]:
    entry = json.loads(lines[1])
    return [lines[0], json.dumps(entry | {"by": "Dr Mallory"}) + "\n", lines[2]]


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (change_the_reason, "line 2 was changed"),
        (change_and_rehash_nothing_else, "line 2 was changed"),
        (lambda lines: lines[1:], "line 1 does not follow"),
        (lambda lines: [lines[0], lines[2]], "line 2 does not follow"),
        (lambda lines: [lines[0], lines[2], lines[1]], "line 2 does not follow"),
        (lambda lines: lines[:2], "line 3 is missing"),
        (lambda lines: [], "line 1 is missing"),
        (lambda lines: [*lines[:2], lines[2][:40]], "line 3 is missing"),
        (lambda lines: [lines[0], "{}\n", *lines[1:]], "line 2 is no entry"),
    ],
)
def test_a_changed_or_removed_line_is_found_and_nothing_is_signed_any_more(
    tmp_path: Path, tamper: Callable[[list[str]], list[str]], message: str
) -> None:
    lines = sign_three(tmp_path)
    tampered = "".join(tamper(lines))
    assert tampered != "".join(lines)
    (tmp_path / LOG_NAME).write_text(tampered)
    with pytest.raises(SignOffError, match=message):
        read_log(tmp_path)
    with pytest.raises(SignOffError, match=message), open_log(tmp_path):
        pass
    assert (tmp_path / LOG_NAME).read_text() == tampered


def test_the_log_removed_as_a_whole_is_found(tmp_path: Path) -> None:
    sign_three(tmp_path)
    (tmp_path / LOG_NAME).unlink()
    with pytest.raises(SignOffError, match="3 entries were written"):
        read_log(tmp_path)


def test_a_damaged_head_is_an_error(tmp_path: Path) -> None:
    sign_three(tmp_path)
    (tmp_path / HEAD_NAME).write_text("{}")
    with pytest.raises(SignOffError, match="not readable"):
        read_log(tmp_path)


def test_a_write_that_was_cut_off_harms_nothing(tmp_path: Path) -> None:
    sign_three(tmp_path)
    with (tmp_path / LOG_NAME).open("a") as stream:
        stream.write('{"sequence": 4, "at"')
    assert len(read_log(tmp_path)) == 3
    with open_log(tmp_path) as log:
        log.sign(a_pathway(lesion_id="L4"), by="Dr Ada Byron", decision="accepted")
    assert [entry.lesion_id for entry in read_log(tmp_path)] == ["L1", "L2", "L3", "L4"]


def test_a_crash_between_log_and_head_harms_nothing(tmp_path: Path) -> None:
    sign_three(tmp_path)
    head = (tmp_path / HEAD_NAME).read_bytes()
    with open_log(tmp_path) as log:
        log.sign(a_pathway(lesion_id="L4"), by="Dr Ada Byron", decision="accepted")
    (tmp_path / HEAD_NAME).write_bytes(head)
    assert len(read_log(tmp_path)) == 4


def _sign_many(folder: Path, worker: int) -> None:
    for number in range(5):
        with open_log(folder) as log:
            log.sign(a_pathway(lesion_id=f"L{worker}-{number}"), by="Dr Ada Byron", decision="accepted")


def test_processes_that_sign_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("fork")) as pool:
        list(pool.map(_sign_many, [tmp_path] * 4, range(4)))
    lesions = [entry.lesion_id for entry in read_log(tmp_path)]
    assert sorted(lesions) == sorted(f"L{worker}-{number}" for worker in range(4) for number in range(5))


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SignOffError, match="no such folder"), open_log(tmp_path / "nowhere"):
        pass
