"""The condition language: what it refuses, and that it computes Kleene's logic on columns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_knowledge import THRESHOLDS, finding, unusable

from dermaflow.errors import KnowledgeError
from dermaflow.pathways.columns import Frame, build_frame
from dermaflow.pathways.conditions import MAX_LENGTH, parse
from dermaflow.pathways.facts import FACTS
from dermaflow.pathways.nodes import Node, open_questions, reasons
from dermaflow.schemas.finding import LesionFinding
from dermaflow.schemas.patient import Lesion, Patient

YES, NO, UNKNOWN = True, False, None


def frame(patient: dict[str, Any] | None = None, lesion: dict[str, Any] | None = None, found: Any = "ok") -> Frame:
    picture = finding() if found == "ok" else found
    return build_frame(
        [Patient(patient_id="P", **patient or {})], [Lesion(lesion_id="L", **lesion or {})], [picture], THRESHOLDS
    )


def value(text: str, cases: Frame, rules: dict[str, Node] | None = None) -> bool | None:
    truth = parse(text)(cases, rules or {})
    assert not (truth.yes & truth.no).any()
    return YES if truth.yes[0] else NO if truth.no[0] else UNKNOWN


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("patient.agee > 3", "did you mean patient.age?"),
        ("lesion.site == fase", "did you mean face?"),
        ("patient.pregnant == yes", "expected `patient.pregnant` or `not patient.pregnant`"),
        ("lesion.site == unknown", "write unknown(lesion.site)"),
        ("finding.set", "a yes/no fact"),
        ("patient.age", "a yes/no fact"),
        ("patient.age > young", "a number or a number fact"),
        ("3 > 2", "a fact on one side"),
        ("lesion.red_flag < 3", "a bool fact"),
        ("face in lesion.site", "a choice fact"),
        ("lesion.site in face", "[word, word] or a set fact"),
        ("known(case.mel_suspected)", "a fact that can be asked for"),
        ("__import__('os').system('true')", "a condition"),
        ("open('x')", "known(fact)"),
        ("lesion.red_flag if always else always", "a condition"),
        ("(lambda: always)()", "a condition"),
        ("True", "a condition"),
        ("lesion.red_flag and", "cannot be read"),
        ("lesion.red_flag) or (lesion.new", "cannot be read"),
        ("lesion.red_flag # and lesion.new", "outside the condition"),
        ("patient.age is 3", "== != < <= > >= in"),
        ("any()", "any(...)"),
        ("", "cannot be read"),
        ("not " * 500 + "always", "nested too deeply"),
        ("lesion.new or " * 400 + "lesion.new", f"at most {MAX_LENGTH}"),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_hint(text: str, said: str) -> None:
    with pytest.raises(KnowledgeError) as caught:
        parse(text, "x.yaml: rule X01")
    assert said.lower() in str(caught.value).lower()
    assert str(caught.value).startswith("x.yaml: rule X01: ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("patient.age >= 18", YES), ("patient.age < 18", NO), ("18 < patient.age <= 40", YES),
        ("patient.age == 40", YES), ("patient.age != 40", NO), ("patient.inr > 3.5", UNKNOWN),
        ("known(patient.inr)", NO), ("unknown(patient.inr)", YES),
        ("lesion.site == lower_extremity", YES), ("lesion.site == 'lower extremity'", YES),
        ("lesion.site in [face, lower_extremity]", YES), ("lesion.site not in [face]", YES),
        ("lesion.morphology == flat", UNKNOWN), ("lesion.morphology != flat", UNKNOWN), ("lesion.stage == 0", YES),
        ("peanut in patient.allergies", YES), ("soya in patient.allergies", UNKNOWN),
        ("overlaps(patient.allergies, [peanut, soya])", YES), ("known(patient.allergies)", NO),
        ("patient.allergies == {soya}", NO), ("patient.allergies == {peanut}", UNKNOWN),
        ("finding.set == {nv}", YES), ("finding.set == {nv, mel}", NO), ("finding.set != {}", YES),
        ("mel in finding.set", NO),
        ("finding.p_mel < threshold.mel", YES), ("finding.quality == {}", YES), ("case.zone == L", YES),
        ("case.dx == nv", YES), ("case.confirmed", NO), ("patient.immunosuppressed", UNKNOWN), ("always", YES),
    ],
)  # fmt: skip
def test_what_a_condition_means(text: str, expected: bool | None) -> None:
    cases = frame({"age": 40, "allergies": ("peanut", "unknown")}, {"site": "lower extremity", "stage": "0"})
    assert value(text, cases) is expected


ANSWERS = {"yes": YES, "no": NO, "unknown": UNKNOWN}
LEAVES = ["lesion.new", "lesion.firm", "lesion.itch"]


def kleene(tree: Any, answers: dict[str, bool | None]) -> bool | None:
    """The logic once more, one value at a time, from its truth tables."""
    if isinstance(tree, str):
        return answers[tree]
    if tree[0] == "not":
        inner = kleene(tree[1], answers)
        return None if inner is None else not inner
    values = [kleene(part, answers) for part in tree[1:]]
    decided = tree[0] == "or"  # the value that settles it
    return decided if decided in values else None if None in values else not decided


def written(tree: Any) -> str:
    if isinstance(tree, str):
        return tree
    return f"not ({written(tree[1])})" if tree[0] == "not" else "(" + f" {tree[0]} ".join(map(written, tree[1:])) + ")"


TREES = st.recursive(
    st.sampled_from(LEAVES),
    lambda inner: (
        st.tuples(st.just("not"), inner)
        | st.lists(inner, min_size=2, max_size=3).flatmap(
            lambda parts: st.sampled_from([("and", *parts), ("or", *parts)])
        )
    ),
    max_leaves=8,
)


@given(TREES)
def test_logic_is_that_of_kleene_for_every_combination(tree: Any) -> None:
    rows = [(a, b, c) for a in ANSWERS for b in ANSWERS for c in ANSWERS]
    names = [leaf.partition(".")[2] for leaf in LEAVES]
    lesions = [Lesion(lesion_id="L", **dict(zip(names, row, strict=True))) for row in rows]
    cases = build_frame([Patient(patient_id="P")] * 27, lesions, [None] * 27, THRESHOLDS)
    truth = parse(written(tree))(cases, {})
    expected = [kleene(tree, dict(zip(LEAVES, (ANSWERS[a] for a in row), strict=True))) for row in rows]
    assert truth.yes.tolist() == [e is True for e in expected]
    assert truth.no.tolist() == [e is False for e in expected]


def test_equal_conditions_are_one_object_so_that_they_are_computed_once() -> None:
    assert parse("lesion.new and lesion.firm") is parse("  lesion.new\n and (lesion.firm)")
    assert parse("lesion.new") is not parse("lesion.firm")


def test_the_seven_point_score_stays_unknown_while_open_items_could_decide_it() -> None:
    items = ("change_in_size", "irregular_shape", "irregular_colour", "inflamed", "oozing", "sensation_changed")
    no = dict.fromkeys(items, "no") | {"diameter_mm": 5.0}
    assert value("case.seven_point >= 3", frame(lesion=no)) is NO
    assert value("case.seven_point >= 3", frame(lesion=no | {"irregular_shape": "unknown"})) is NO  # 2 at most
    some = frame(lesion=no | {"irregular_shape": "yes", "diameter_mm": None})
    assert value("case.seven_point >= 3", some) is UNKNOWN
    assert value("case.seven_point_min >= 3", some) is NO and value("case.seven_point_max >= 3", some) is YES
    assert value("case.seven_point >= 3", frame(lesion=no | {"irregular_shape": "yes", "diameter_mm": 7.0})) is YES


@pytest.mark.parametrize(
    ("histology", "dx"),
    [("mel_in_situ", "mel"), ("scc", "akiec"), ("bowen", "akiec"), ("bcc_other", "bcc"), ("df", "df"), ("other", None)],
)
def test_histology_replaces_the_class_and_quietens_the_picture(histology: str, dx: str | None) -> None:
    loud = finding("mel", conformal_set=("mel", "bcc"), disagreement=True, ood=True, quality_flags=("blur",))
    cases = frame(lesion={"histology": histology}, found=loud)
    assert cases.value("case.dx", 0) == (dx or "unknown")
    raised = "finding.p_mel > 0 or finding.p_malignant > 0 or overlaps(finding.set, [mel, bcc, akiec]) or finding.ood"
    assert value(f"{raised} or finding.quality != {{}} or finding.disagreement or finding.entropy > 0", cases) is NO
    assert cases.value("finding.set", 0) == (["df"] if dx == "df" else [])


@pytest.mark.parametrize("found", [None, unusable(), finding(quality_flags=("blur",)), finding(ood=True)])
def test_a_picture_that_cannot_be_used_says_nothing(found: LesionFinding | None) -> None:
    cases = frame(found=found)
    for name in (
        "case.dx",
        "finding.set",
        "finding.set_size",
        "finding.p_mel",
        "finding.p_malignant",
        "finding.entropy",
    ):
        assert cases.value(name, 0) == "unknown", name


def test_a_flag_of_one_picture_does_not_spoil_the_others_of_the_lesion() -> None:
    cases = frame(found=finding(image_ids=("I", "J"), quality_flags=("blur",), ood=True))
    assert cases.value("case.dx", 0) == "nv"
    assert value("finding.quality != {} or finding.ood", cases) is NO


def test_reasons_name_the_facts_that_decide_and_questions_those_that_could() -> None:
    rules = {"S01": parse("lesion.red_flag")}
    cases = frame({"age": 50}, {"red_flag": "yes", "new": "no"})
    text = "(fired(S01) or lesion.firm) and patient.age > 40 and not lesion.new"
    assert reasons(parse(text), cases, rules) == ["lesion.red_flag", "patient.age", "lesion.new"]
    assert reasons(parse("lesion.new and patient.age > 40"), cases, rules) == ["lesion.new"]

    def asked(text: str) -> set[str]:
        found: dict[str, np.ndarray] = {}
        open_questions(parse(text), cases, rules, np.ones(1, bool), found)
        return set(found)

    assert asked("lesion.new and lesion.firm") == set()  # decided without it
    assert asked("(lesion.red_flag or lesion.oozing) and lesion.firm") == {"lesion.firm"}
    assert asked("patient.immunosuppressed or case.zone == H") == {"patient.immunosuppression", "lesion.site"}
    assert "lesion.oozing" in asked("case.seven_point >= 3")


def test_every_fact_of_a_person_or_lesion_has_a_question_and_derived_ones_a_meaning() -> None:
    for fact in FACTS.values():
        if fact.name.startswith(("patient.", "lesion.")):
            assert fact.question or fact.meaning, fact.name
        if fact.definition:
            parse(fact.definition)
