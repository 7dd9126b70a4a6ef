"""Twelve worked cases: what has to come out for each person, and that docs/pathways.md shows it as it is.

After a change of the rules, write the page again and read what changed before committing it:
``DERMAFLOW_WRITE_PAGES=1 pytest tests/unit/test_worked_cases.py``
"""

from __future__ import annotations

import os
import re

import pytest
from worked_cases import MARKER, PAGE, Worked, page, work

from dermaflow.pathways.knowledge import FOLDER

CASES = work()
PEOPLE = [pytest.param(one, id=f"{one.case}: {one.who}") for case in CASES for one in case.people]

KEYS = {
    "urgency", "assessable", "basis", "prediction", "rules", "no_rules", "options", "without", "notices", "texts",
    "no_texts", "follow_up", "missing",
}  # fmt: skip


@pytest.mark.parametrize("one", PEOPLE)
def test_the_pathway_is_as_expected(one: Worked) -> None:
    pathway, expect = one.pathway, one.expect
    assert set(expect) <= KEYS, "a misspelt expectation would expect nothing"
    assert pathway.urgency == expect["urgency"]
    assert pathway.assessable == expect.get("assessable", True)
    assert pathway.basis == expect.get("basis", pathway.basis)
    assert pathway.prediction == expect.get("prediction", pathway.prediction)
    assert not set(expect.get("rules", ())) - one.rules
    assert not set(expect.get("no_rules", ())) & one.rules
    status = {option.option: option.status for option in pathway.options}
    assert {name: status.get(name) for name in expect.get("options", {})} == expect.get("options", {})
    assert all(status.get(name) in (None, "blocked") for name in expect.get("without", ()))
    assert set(expect.get("notices", ())) <= {line.rule for line in pathway.notices}
    assert set(expect.get("follow_up", ())) <= {line.rule for line in pathway.follow_up}
    assert set(expect.get("texts", ())) <= set(pathway.patient_texts)
    assert not set(expect.get("no_texts", ())) & set(pathway.patient_texts)
    assert set(expect.get("missing", ())) <= {missing.fact for missing in pathway.missing}


@pytest.mark.parametrize("one", PEOPLE)
def test_every_line_names_its_rule_and_its_source(one: Worked) -> None:
    pathway = one.pathway
    assert pathway.status == "preliminary"
    assert any(line.rule == "G01" for line in pathway.notices)
    for option in pathway.options:
        assert option.offered_by, option.option
        assert bool(option.restrictions) == (option.status != "available"), option.option
        assert bool(option.confirm) == (option.status == "locked"), option.option
    for lines in (pathway.notices, pathway.follow_up, *(option.offered_by for option in pathway.options)):
        assert all(line.source and line.rule in one.rules for line in lines)


def test_there_are_twelve_cases_and_in_each_another_person_gets_another_pathway() -> None:
    assert len(CASES) == 12
    for case in CASES:
        outcomes = [
            (
                p.urgency,
                [(o.option, o.status) for o in p.options],
                [line.rule for line in p.notices],
                [*p.patient_texts],
            )
            for p in (one.pathway for one in case.people)
        ]
        assert len(outcomes) >= 2
        assert all(a != b for k, a in enumerate(outcomes) for b in outcomes[:k]), case.title


def test_in_most_cases_the_picture_stays_and_only_the_person_changes() -> None:
    """The seed's wish: skin type and history change the pathway."""
    by_person = [
        case.title
        for case in CASES
        if any(
            {**one.given, "patient": {}} == {**case.people[0].given, "patient": {}}
            and one.pathway.urgency != case.people[0].pathway.urgency
            for one in case.people[1:]
        )
    ]
    assert len(by_person) >= 4, by_person


def test_the_rule_that_the_page_explains_is_in_the_knowledge_base_word_for_word() -> None:
    excerpts = re.findall(r"```yaml\n(.+?)\n```", PAGE.read_text().partition(MARKER)[0], re.DOTALL)
    files = [path.read_text() for path in FOLDER.glob("*.yaml")]
    assert excerpts
    assert all(any(excerpt in file for file in files) for excerpt in excerpts)


def test_the_page_shows_the_cases_as_they_are() -> None:
    head, marker, shown = PAGE.read_text().partition(MARKER)
    assert marker, f"{PAGE} has lost the line {MARKER!r}"
    now = "\n" + page(CASES)
    if os.environ.get("DERMAFLOW_WRITE_PAGES"):
        PAGE.write_text(head + MARKER + now)
    else:
        assert shown == now, "the page is out of date; this file's docstring says how to write it again"
