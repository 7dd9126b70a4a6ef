"""The 149 rules, against the reference they come from and one by one through the engine."""

from __future__ import annotations

import csv
import re
from functools import cache
from pathlib import Path

import pytest
from pathway_persons import person, read

from dermaflow.pathways.decision import Decisions, decide, make_plan
from dermaflow.pathways.knowledge import load_knowledge
from dermaflow.schemas.pathway import URGENCIES, URGENCY_TEXT

KNOWLEDGE = load_knowledge()
RULES = {rule.id: rule for rule in KNOWLEDGE.rules}
ROW = {rule_id: r for r, rule_id in enumerate(RULES)}
OPTION = {option: o for o, option in enumerate(KNOWLEDGE.options)}
CASES = read("pathway_cases.yaml")
REFERENCE = {
    row["id"]: row for row in csv.DictReader((Path(__file__).parents[1] / "pathway_reference.csv").open(newline=""))
}

CHANGES = [(rule_id, kind) for rule_id, case in CASES["rules"].items() for kind in ("fires", "spares") if kind in case]


@cache
def decided(rule_id: str, kind: str) -> Decisions:
    return decide(person(CASES["base"], CASES["rules"][rule_id][kind]).frame(), make_plan(KNOWLEDGE))


def holds(rule_id: str, decisions: Decisions) -> bool:
    return bool(decisions.holds[ROW[rule_id], 0])


def test_every_rule_of_the_reference_is_there_once_and_nothing_else() -> None:
    assert len(KNOWLEDGE.rules) == len(RULES) == len(REFERENCE) == 149
    assert list(RULES) == list(REFERENCE)


@pytest.mark.parametrize("rule_id", REFERENCE)
def test_strength_mark_and_urgency_are_those_of_the_reference(rule_id: str) -> None:
    rule, said = RULES[rule_id], REFERENCE[rule_id]
    assert (rule.strength, rule.verification, rule.urgency) == (said["strength"], said["verification"], said["urgency"])


@pytest.mark.parametrize("rule_id", REFERENCE)
def test_the_effect_gives_the_urgency_of_the_reference(rule_id: str) -> None:
    rule = RULES[rule_id]
    given = {*(a.urgency for a in rule.effect.urgency_when), *([rule.effect.urgency] if rule.effect.urgency else [])}
    match REFERENCE[rule_id]["urgency"]:
        case "-":  # F10 goes with the rules that reassure
            assert not given and not rule.effect.raise_ and rule.effect.reassure == (rule_id == "F10")
        case "+1":
            assert rule.effect.raise_ == 1 and not given
        case "as clinician":
            assert given == {"U1"}
        case "U1-U3":
            assert given == {"U1", "U2", "U3"}
        case "U4 (3 mo)":  # N02, see its note
            assert given == {"U3", "U4"}
        case text:
            allowed = re.findall(r"U\d", text)
            assert given <= set(allowed)
            assert min(allowed) in given  # the most urgent alternative can be reached
            assert rule.effect.reassure == (text == "U5")


def test_marks_add_up_to_those_of_the_reference() -> None:
    marks = [rule.verification for rule in KNOWLEDGE.rules]
    assert {mark: marks.count(mark) for mark in "VPM"} == {"V": 76, "P": 29, "M": 44}


def test_every_rule_is_a_draft_until_a_clinician_has_reviewed_it() -> None:
    assert all(rule.reviewed_by is None and rule.review_date is None for rule in KNOWLEDGE.rules)
    assert KNOWLEDGE.version == "149 rules, draft, 0 reviewed"


def test_every_rule_has_a_case_that_fires_it_and_one_that_does_not() -> None:
    assert list(CASES["rules"]) == list(RULES)
    for rule_id, case in CASES["rules"].items():
        assert set(case) == ({"always"} if RULES[rule_id].when == "always" else {"fires", "spares"}), rule_id


@pytest.mark.parametrize("rule_id", [r for r, case in CASES["rules"].items() if "fires" in case])
def test_its_case_fires_a_rule_and_the_near_miss_does_not(rule_id: str) -> None:
    for kind in ("fires", "spares"):
        decisions = decided(rule_id, kind)
        assert not decisions.unknown[ROW[rule_id], 0], f"the case that {kind} {rule_id} leaves it open"
        assert holds(rule_id, decisions) == (kind == "fires"), kind


def test_rules_without_a_near_miss_hold_in_every_case() -> None:
    for rule_id in [r for r, case in CASES["rules"].items() if "always" in case]:
        assert all(holds(rule_id, decided(*change)) for change in CHANGES), rule_id


@pytest.mark.parametrize("rule_id", [r for r, rule in RULES.items() if rule.effect.urgency])
def test_a_case_is_at_least_as_urgent_as_the_rule_that_it_fires(rule_id: str) -> None:
    assert URGENCIES[decided(rule_id, "fires").level[0] - 1] <= str(RULES[rule_id].effect.urgency)


@pytest.mark.parametrize("rule_id", [r for r, rule in RULES.items() if rule.effect.reassure])
def test_the_case_of_a_rule_that_reassures_is_reassured(rule_id: str) -> None:
    assert decided(rule_id, "fires").level[0] == 5
    assert decided(rule_id, "spares").level[0] < 5


@pytest.mark.parametrize(
    ("rule_id", "changes", "level"),
    [
        ("S03", {"lesion": {"changing": True}, "finding": {"set": ["mel", "nv"]}}, 1),
        ("S03", {"finding": {"set": ["mel", "nv"]}}, 2),
        (
            "S05",
            {"finding": {"p": {"nv": 0.8, "bcc": 0.15}, "set": ["bcc", "nv"]}, "lesion": {"clinician": "unknown"}},
            3,
        ),
        ("S05", {"finding": {"p": {"nv": 0.6, "bcc": 0.3}, "set": ["akiec", "bcc", "nv"]}}, 2),
        ("S05", {"finding": {"p": {"nv": 0.6, "bcc": 0.3}, "set": ["bcc", "mel", "nv"]}}, 1),
        ("S06", {"finding": {"set": ["bkl", "df", "nv", "vasc"]}}, 3),
        ("S06", {"finding": {"set": ["bkl", "df", "mel", "nv"]}}, 2),
        ("M10", {"patient": {"prior_melanoma": True}, "lesion": {"histology": "mel"}}, 1),
        (
            "M10",
            {
                "patient": {"prior_melanoma": True},
                "lesion": {"histology": "mel", "treated_with": "surgery", "treatment_response": "complete"},
            },
            3,
        ),
        ("N02", {"lesion": {"irregular_shape": True}}, 4),
        ("N02", {"lesion": {"irregular_shape": True}, "finding": {"set": ["bkl", "nv"]}}, 3),
        ("N05", {"patient": {"pregnant": True}, "lesion": {"changing": True}}, 2),
        ("N05", {"patient": {"pregnant": True}, "lesion": {"changing": True, "clinician": "suspicious"}}, 1),
        ("N06", {"lesion": {"congenital": True, "diameter_mm": 210, "site": "back"}}, 2),
        ("K03", {"lesion": {"solitary": True}, "finding": {"p": {"bkl": 0.97}}}, 2),
        ("K03", {"finding": {"p": {"bkl": 0.97}, "set": ["bkl", "mel"]}}, 1),
        ("D03", {"lesion": {"site": "scalp"}, "finding": {"p": {"df": 0.97}}}, 2),
        ("D03", {"lesion": {"diameter_mm": 30}, "finding": {"p": {"df": 0.97}}}, 1),
        ("D04", {"lesion": {"irregular_colour": True}, "finding": {"p": {"df": 0.97}}}, 2),
        ("D04", {"finding": {"p": {"df": 0.97}, "set": ["df", "mel"]}}, 1),
    ],
)
def test_a_rule_with_two_urgencies_gives_each_of_them(rule_id: str, changes: dict[str, object], level: int) -> None:
    decisions = decide(person(CASES["base"], changes).frame(), make_plan(KNOWLEDGE))
    assert holds(rule_id, decisions)
    assert decisions.level[0] == level


def test_immunosuppression_makes_a_case_one_level_more_urgent() -> None:
    quiet = person(CASES["base"], {"lesion": {"histology": "bkl"}})
    raised = person(CASES["base"], {"lesion": {"histology": "bkl"}, "patient": {"immunosuppression": "cll"}})
    levels = [decide(case.frame(), make_plan(KNOWLEDGE)).level[0] for case in (quiet, raised)]
    assert levels == [5, 4]


@pytest.mark.parametrize("rule_id", [r for r, rule in RULES.items() if rule.effect.block])
def test_what_a_rule_blocks_is_blocked_where_it_is_offered(rule_id: str) -> None:
    blocked = [OPTION[name] for name in KNOWLEDGE.members(RULES[rule_id].effect.block)]
    for change in CHANGES:
        decisions = decided(*change)
        if holds(rule_id, decisions):
            offered = decisions.place[blocked, 0] < 2**30
            assert (decisions.blocked[blocked, 0] == offered).all(), change


@pytest.mark.parametrize(
    ("rule_id", "option", "changes", "status"),
    [
        ("C10", "tirbanibulin", {"lesion": {"ulcerated": True}}, "blocked"),
        ("C10", "tirbanibulin", {"patient": {"immunosuppression": "drug"}}, "caution"),
        ("C10", "tirbanibulin", {"patient": {"immunosuppression": "unknown"}}, "locked"),
        ("C16", "curettage", {"patient": {"anticoagulant": "warfarin", "inr": 3.6}}, "blocked"),
        ("C16", "curettage", {"patient": {"anticoagulant": "warfarin", "inr": 3.5}}, "caution"),
        ("C16", "curettage", {"patient": {"anticoagulant": "warfarin"}}, "locked"),
    ],
)  # fmt: skip
def test_a_rule_may_block_in_one_case_and_call_for_caution_in_another(
    rule_id: str, option: str, changes: dict[str, dict[str, object]], status: str
) -> None:
    """On a confirmed field of actinic keratoses, where everything else is known."""
    field = {"lesion": {"histology": "ak", "site": "face", "multiple": True, "hyperkeratotic": option == "curettage"}}
    decisions = decide(person(CASES["base"], field, changes).frame(), make_plan(KNOWLEDGE))
    o = OPTION[option]
    assert decisions.place[o, 0] < 2**31 - 1, "not offered"
    found = {"blocked": decisions.blocked, "locked": decisions.locked, "caution": decisions.caution}
    assert [name for name, column in found.items() if column[o, 0]] == [status]


def test_melanoma_is_suspected_wherever_the_rules_that_m01_names_fire() -> None:
    named = [change for change in CHANGES if any(holds(r, decided(*change)) for r in ("S01", "S07", "S08"))]
    assert len(named) > 10
    assert all(holds("M01", decided(*change)) for change in named)


def test_a_rule_without_an_effect_says_what_in_the_tool_keeps_it() -> None:
    silent = [rule for rule in KNOWLEDGE.rules if not rule.effect.model_dump(exclude_defaults=True)]
    assert [rule.id for rule in silent] == ["S12", "S13", "S14", "X01", "X02", "X03", "X04", "X05"]
    assert all(rule.honoured_by for rule in silent)


def test_every_text_and_every_option_is_used() -> None:
    effects = [rule.effect for rule in KNOWLEDGE.rules]
    assert {key for effect in effects for key in effect.text} == set(KNOWLEDGE.texts)
    assert {name for effect in effects for name in KNOWLEDGE.members(effect.offer)} == set(KNOWLEDGE.options)


def test_nothing_that_is_shown_calls_a_lesion_benign_or_no_cancer() -> None:
    """Rule X02, which names the words itself and is not shown."""
    shown = [rule.action for rule in KNOWLEDGE.rules if rule.id != "X02"]
    shown += [text for option in KNOWLEDGE.options.values() for text in (option.title, option.detail)]
    shown += [*KNOWLEDGE.texts.values(), *URGENCY_TEXT.values()]
    assert not [text for text in shown if re.search(r"\bbenign\b|\bno cancer\b|\bnot cancer\b", text, re.IGNORECASE)]
    for rule in KNOWLEDGE.rules:
        if rule.urgency == "U5" and rule.id != "A15":  # a keratosis left alone; nobody calls it low risk
            assert "low estimated risk, which does not rule out cancer" in rule.action.lower()
