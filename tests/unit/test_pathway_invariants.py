"""What must hold for everybody, whatever the rules say: properties of the engine with the rules of DermaFlow.

Every example is one drawn case and all of its variants, decided together. Cases are drawn around somebody about whom
everything is known and nothing is wrong, because a case drawn at random has some reason to be urgent.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dermaflow.pathways.decision import NOT_OFFERED
from dermaflow.pathways.engine import Recommendations, Thresholds, recommend
from dermaflow.pathways.knowledge import load_knowledge
from dermaflow.schemas.finding import LesionFinding
from dermaflow.schemas.patient import Lesion, Patient, YesNo
from dermaflow.taxonomy import CODES, MALIGNANT, MELANOMA

KNOWLEDGE = load_knowledge()
OPTIONS = list(KNOWLEDGE.options)
THRESHOLDS = Thresholds(mel=0.06, malignant=0.2, entropy=1.2)
BEFORE_HISTOLOGY = [o for o, c in enumerate(KNOWLEDGE.options.values()) if c.group in ("destructive", "topical", "pdt")]

EXAMPLES = settings(max_examples=150, deadline=None)

NUMBERS = {
    "age": [1.0, 17.0, 30.0, 45.0, 70.0], "fitzpatrick": [1, 3, 4, 6], "inr": [2.0, 4.0], "family_melanoma": [0, 1, 2],
    "mole_count": [10, 60, 150], "atypical_moles": [0, 3], "bcc_count": [0, 2], "frailty": [2, 7],
    "diameter_mm": [4.0, 8.0, 25.0, 200.0], "duration_months": [1.0, 24.0], "breslow_mm": [0.5, 2.0],
}  # fmt: skip

QUIET_PATIENT = {
    **{name: "no" for name, field in Patient.model_fields.items() if field.annotation == YesNo},
    "age": 35.0, "sex": "female", "fitzpatrick": 2, "immunosuppression": "none", "anticoagulant": "none", "inr": 1.0,
    "implant": "none", "allergies": ("none",), "family_melanoma": 0, "mole_count": 10, "atypical_moles": 0,
    "syndrome": "none", "bcc_count": 0, "frailty": 2, "preference": "cure_first", "self_treatment": "yes",
}  # fmt: skip
QUIET_LESION = {
    **{name: "no" for name, field in Lesion.model_fields.items() if field.annotation == YesNo},
    "site": "back", "diameter_mm": 4.0, "morphology": "flat", "duration_months": 24.0, "well_defined": "yes",
    "treatment_response": "none_given", "treated_with": "none", "surgery": "suitable", "topicals": "suitable",
    "radiotherapy_suitable": "yes", "clinician": "benign", "clinically_certain": "yes", "dimple_sign": "yes",
    "subtype": "other",
}  # fmt: skip

RISKS_OF_PATIENT: dict[str, Any] = {
    "prior_melanoma": "yes", "prior_keratinocyte_cancer": "yes", "family_melanoma": 2, "mole_count": 150,
    "atypical_moles": 3, "syndrome": "fammm", "immunosuppression": "transplant", "bcc_count": 2,
    "jaw_cysts_or_pits": "yes", "weight_loss": "yes",
}  # fmt: skip
RISKS_OF_LESION: dict[str, Any] = {
    **dict.fromkeys(
        (
            "new", "changing", "growing", "fast_growing", "solitary", "very_dark", "grey_or_asymmetric", "firm",
            "change_in_size", "irregular_shape", "irregular_colour", "inflamed", "oozing", "sensation_changed", "itch",
            "pain", "bleeding", "ulcerated", "induration", "recurrent", "prior_radiotherapy", "multiple", "eruptive",
            "perineural", "advanced", "red_flag", "histology_high_risk",
        ),
        "yes",
    ),
    "morphology": "nodular", "diameter_mm": 25.0, "clinician": "suspicious", "well_defined": "no",
}  # fmt: skip
"""A risk factor and the answer that adds it."""

HARMLESS_ANSWER = {"no", "none", "unknown", None, "flat", "raised", "benign", "yes"}  # yes: of well_defined


@dataclass(frozen=True)
class Case:
    patient: Patient
    lesion: Lesion
    finding: LesionFinding

    def person(self, **changes: Any) -> Case:
        return replace(self, patient=self.patient.model_copy(update=changes))

    def spot(self, **changes: Any) -> Case:
        return replace(self, lesion=self.lesion.model_copy(update=changes))

    def picture(self, **changes: Any) -> Case:
        return replace(self, finding=self.finding.model_copy(update=changes))


def values(schema: type[Patient] | type[Lesion], name: str) -> st.SearchStrategy[Any]:
    field = schema.model_fields[name]
    if name == "allergies":
        return st.sampled_from([("none",), ("unknown",), ("peanut",), ("lidocaine", "unknown")])
    if name in NUMBERS:
        return st.sampled_from([*NUMBERS[name], None])
    return st.sampled_from(get_args(field.annotation))


def changes(schema: type[Patient] | type[Lesion], most: int) -> st.SearchStrategy[dict[str, Any]]:
    names = [name for name in schema.model_fields if not name.endswith("_id")]
    chosen = st.lists(st.sampled_from(names), max_size=most, unique=True)
    return chosen.flatmap(lambda some: st.fixed_dictionaries({name: values(schema, name) for name in some}))


def picture(p: np.ndarray, least: tuple[str, ...] = ()) -> LesionFinding:
    """A finding with these probabilities; in the set are classes from 0.1 on, melanoma from 0.05 on, and `least`."""
    chosen = [c for c, v in zip(CODES, p, strict=True) if v >= (0.05 if c == "mel" else 0.1) or c in least]
    return LesionFinding(
        lesion_id="L", image_ids=("I",), p=tuple(p.tolist()), prediction=CODES[int(p.argmax())], status="ok",
        conformal_set=tuple(chosen), p_malignant=float(p[list(MALIGNANT)].sum()), p_mel_max=float(p[MELANOMA]),
        model="test", model_sha256="0" * 64,
    )  # fmt: skip


PROBABILITIES = st.lists(st.sampled_from([0.0, 0.0, 0.01, 0.05, 0.3, 1.0, 8.0]), min_size=7, max_size=7).map(
    lambda weights: (np.array(weights) + 0.001) / (sum(weights) + 0.007)
)

CASES = st.builds(
    lambda person, spot, p: Case(
        Patient(patient_id="P", **QUIET_PATIENT | person), Lesion(lesion_id="L", **QUIET_LESION | spot), picture(p)
    ),
    changes(Patient, 4),
    changes(Lesion, 5),
    PROBABILITIES,
)
UNCONFIRMED = CASES.map(lambda case: case.spot(histology="unknown"))


def decided(*cases: Case) -> Recommendations:
    columns = ([c.patient for c in cases], [c.lesion for c in cases], [c.finding for c in cases])
    return recommend(*columns, KNOWLEDGE, THRESHOLDS, site_calibrated=True)


def never_less_urgent(before: Case, variants: dict[str, Case]) -> None:
    found = decided(before, *variants.values())
    levels = dict(zip(variants, found.decisions.level[1:].tolist(), strict=True))
    first = int(found.decisions.level[0])
    fallen = {name: f"U{first} -> U{level}" for name, level in levels.items() if level > first}
    assert not fallen, f"{fallen}, was by {found.pathway(0).urgency_rules}"


def quiet(harmless: str, *, also: tuple[str, ...] = (), **changes: Any) -> Case:
    """A case with nothing wrong but these changes, a probable harmless class, and other classes in the set."""
    person = {name: value for name, value in changes.items() if name in Patient.model_fields}
    spot = {name: value for name, value in changes.items() if name in Lesion.model_fields}
    p = np.array([0.994 if code == harmless else 0.001 for code in CODES])
    patient, lesion = Patient(patient_id="P", **QUIET_PATIENT | person), Lesion(lesion_id="L", **QUIET_LESION | spot)
    return Case(patient, lesion, picture(p, also))


@EXAMPLES
@given(CASES)
@example(quiet("bkl", immunosuppression="unknown"))
@example(quiet("nv", also=("bkl",)))
@example(quiet("akiec", histology="ak", frailty=7))
@example(quiet("bcc", histology="bcc_nodular", immunosuppression="transplant"))
def test_urgency_never_falls_when_a_risk_factor_is_added(case: Case) -> None:
    variants = {}
    for name, risk in RISKS_OF_PATIENT.items():
        now = getattr(case.patient, name)
        # an unknown syndrome may be any: only from none is one of them an addition
        if (name != "syndrome" or now == "none") and _adds(now, risk):
            variants[name] = case.person(**{name: risk})
    for name, risk in RISKS_OF_LESION.items():
        if _adds(getattr(case.lesion, name), risk):
            variants[name] = case.spot(**{name: risk})
    never_less_urgent(case, variants)


def _adds(now: Any, risk: Any) -> bool:
    return now != risk and (now in HARMLESS_ANSWER or (not isinstance(risk, str) and now < risk))


@EXAMPLES
@given(UNCONFIRMED, st.floats(0.05, 1.0))
@example(quiet("df", site="face"), 0.9)
@example(quiet("vasc", site="face", age=70.0, clinically_certain="no"), 0.9)
@example(quiet("akiec", bleeding="yes"), 0.9)
def test_urgency_never_falls_when_a_malignant_probability_rises(case: Case, share: float) -> None:
    """Probability moves from the harmless classes, from each the same share, to a malignant one. The set may gain that
    class and keeps the others: a set that loses a harmless class says that the model has become surer of another one, a
    change of its own.
    """
    variants = {}
    harmless = ~np.array(MALIGNANT)
    for malignant in np.flatnonzero(MALIGNANT).tolist():
        p = np.array(case.finding.p)
        p[malignant] += share * p[harmless].sum()
        p[harmless] *= 1 - share
        variants[CODES[malignant]] = replace(case, finding=picture(p, case.finding.conformal_set))
    never_less_urgent(case, variants)


@EXAMPLES
@given(CASES)
def test_a_darker_skin_type_never_lowers_urgency(case: Case) -> None:
    lighter = case.person(fitzpatrick=1)
    never_less_urgent(lighter, {f"type {t}": case.person(fitzpatrick=t) for t in (2, 3, 4, 5, 6)})
    never_less_urgent(case.person(fitzpatrick=3), {"not recorded": case.person(fitzpatrick=None)})


@EXAMPLES
@given(UNCONFIRMED)
def test_with_melanoma_in_the_set_nothing_that_destroys_the_evidence_is_unblocked(case: Case) -> None:
    chosen = tuple(code for code in CODES if code == "mel" or code in case.finding.conformal_set)
    decisions = decided(case.picture(conformal_set=chosen)).decisions
    usable = (decisions.place < NOT_OFFERED) & ~decisions.blocked
    assert [OPTIONS[o] for o in BEFORE_HISTOLOGY if usable[o, 0]] == []


@EXAMPLES
@given(CASES)
def test_only_u5_reassures(case: Case) -> None:
    pathway = decided(case).pathway(0)
    if pathway.urgency != "U5":
        assert not [o for o in pathway.options if o.option == "reassure" and o.status != "blocked"]
        assert not {"T-nv", "T-bkl", "T-df", "T-vasc"} & set(pathway.patient_texts)


NOT_ASKED = {"histology", "subtype"}
"""Unknown, they are not answers that somebody owes: no histology was done, and no subtype was seen."""

REASSURED = st.builds(
    lambda harmless, person, spot: quiet(harmless, **person, **spot),
    st.sampled_from(["nv", "bkl", "df"]),
    changes(Patient, 2),
    changes(Lesion, 2),
)


@EXAMPLES
@given(REASSURED)
def test_nobody_is_reassured_while_an_answer_could_forbid_it(case: Case) -> None:
    """A fact may only be unknown in a case that is reassured if the case would be so for each of its answers."""
    hidden = {
        (part, name): _with(case, part, name, schema.model_fields[name].default)
        for part, schema in (("person", Patient), ("spot", Lesion))
        for name in schema.model_fields
        if not name.endswith("_id") and name not in NOT_ASKED
    }
    found = decided(*hidden.values())
    still = [fact for fact, level in zip(hidden, found.decisions.level.tolist(), strict=True) if level == 5]
    answered = {(name, value): _with(case, part, name, value) for part, name in still for value in _answers(part, name)}
    levels = decided(*answered.values()).decisions.level.tolist()
    assert [answer for answer, level in zip(answered, levels, strict=True) if level < 5] == []


def _with(case: Case, part: str, name: str, value: Any) -> Case:
    return case.person(**{name: value}) if part == "person" else case.spot(**{name: value})


def _answers(part: str, name: str) -> list[Any]:
    annotation = (Patient if part == "person" else Lesion).model_fields[name].annotation
    if name == "allergies":
        return [("none",), ("peanut",), ("lidocaine",)]
    return NUMBERS[name] if name in NUMBERS else [word for word in get_args(annotation) if word != "unknown"]


def test_somebody_about_whom_nothing_is_known_is_not_reassured() -> None:
    somebody = quiet("nv")
    nobody = replace(somebody, patient=Patient(patient_id="P"), lesion=Lesion(lesion_id="L"))
    assert decided(nobody, somebody).urgency.tolist() == ["U3", "U5"]  # the picture is the same


@EXAMPLES
@given(CASES, st.sampled_from(["nv", "mel", "bcc_nodular", "ak", "scc", "bkl", "df", "vasc", "other"]), PROBABILITIES)
def test_histology_overrides_the_picture(case: Case, histology: str, other: np.ndarray) -> None:
    one = case.spot(histology=histology)
    blurred = LesionFinding(
        lesion_id="L", image_ids=("I",), status="not_assessable", quality_flags=("blur",), reason="blur", model="test",
        model_sha256="0" * 64,
    )  # fmt: skip
    pathways = [decided(replace(one, finding=f)).pathway(0) for f in (one.finding, picture(other), blurred)]
    decisions = [p.model_dump(exclude={"quality_flags", "trace"}) for p in pathways]
    assert decisions[0] == decisions[1] == decisions[2]
    assert pathways[0].basis == "histology" and pathways[0].probabilities == {}


@EXAMPLES
@given(CASES)
def test_every_line_names_a_rule_of_the_knowledge_base_and_its_source(case: Case) -> None:
    pathway = decided(case).pathway(0)
    rules = {rule.id: rule for rule in KNOWLEDGE.rules}
    offered = [line for o in pathway.options for line in (*o.offered_by, *o.restrictions)]
    for line in (*pathway.notices, *pathway.follow_up, *offered):
        assert (line.text, line.source) == (rules[line.rule].action, rules[line.rule].cited)
    assert pathway.urgency_rules
    for option in pathway.options:
        assert option.offered_by, option.option
        assert bool(option.restrictions) == (option.status != "available"), option.option
        assert bool(option.confirm) == (option.status == "locked"), option.option
