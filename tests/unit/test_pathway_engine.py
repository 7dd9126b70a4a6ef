"""The engine on a small knowledge base: urgency, options, questions, words and tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from small_knowledge import THRESHOLDS, finding, rule, unusable, write

from dermaflow.errors import DataError
from dermaflow.pathways import engine
from dermaflow.pathways.engine import Recommendations, recommend
from dermaflow.pathways.knowledge import Knowledge, load_knowledge
from dermaflow.schemas.finding import LesionFinding
from dermaflow.schemas.pathway import Option, Pathway
from dermaflow.schemas.patient import Lesion, Patient

QUIET: dict[str, Any] = {
    "age": 40, "fitzpatrick": 2, "pregnant": "no", "immunosuppression": "none", "prior_melanoma": "no", "frailty": 1,
    "keloid": "no",
}  # fmt: skip
STABLE = {"changing": "no", "red_flag": "no", "fast_growing": "no"}
BCC = finding("bcc")


@pytest.fixture(scope="module")
def knowledge(tmp_path_factory: pytest.TempPathFactory) -> Knowledge:
    return load_knowledge(write(tmp_path_factory.mktemp("small")))


@pytest.fixture
def case(knowledge: Knowledge) -> Any:
    """Make a pathway: a person and a lesion about whom everything is known, with changes."""

    def make(found: LesionFinding | None = None, base: Knowledge = knowledge, **changes: Any) -> Pathway:
        person = {k: changes.pop(k, v) for k, v in QUIET.items()}
        lesion = {**STABLE, **changes}
        who = Patient(patient_id="P", **person)
        return recommend([who], [Lesion(lesion_id="L", **lesion)], [found], base, THRESHOLDS).pathway(0)

    return make


def option(pathway: Pathway, name: str) -> Option:
    return next(o for o in pathway.options if o.option == name)


def asked(pathway: Pathway) -> dict[str, list[str]]:
    return {missing.fact: missing.rules for missing in pathway.missing}


def test_a_rule_that_certainly_reassures_gives_u5(case: Any) -> None:
    pathway = case(finding())
    assert (pathway.urgency, pathway.urgency_rules, pathway.status) == ("U5", ["N01"], "preliminary")
    assert option(pathway, "reassure").status == "available"
    assert pathway.patient_texts == {"T-nv": "Low risk."} and pathway.missing == []


def test_a_case_nobody_says_anything_about_is_routine(case: Any) -> None:
    pathway = case(finding("df"))
    assert (pathway.urgency, pathway.urgency_rules) == ("U3", ["S12"])
    assert option(pathway, "refer_routine").offered_by[0].rule == "S12"


@pytest.mark.parametrize(
    ("unknown", "urgency", "rules"),
    [
        ({"changing": "unknown"}, "U3", ["S12"]),  # what N01 itself needs
        ({"red_flag": "unknown"}, "U3", ["G07"]),  # an answer that could make it U1
        ({"prior_melanoma": "unknown"}, "U3", ["N04"]),
        ({"immunosuppression": "unknown"}, "U4", ["C23"]),  # no further than the answer would take it
    ],
)
def test_nobody_is_reassured_while_an_answer_could_forbid_it(
    case: Any, unknown: dict[str, str], urgency: str, rules: list[str]
) -> None:
    pathway = case(finding(), **unknown)
    assert (pathway.urgency, pathway.urgency_rules) == (urgency, rules)
    assert all(o.status == "blocked" for o in pathway.options if o.option == "reassure")
    assert "no_treatment" not in [o.option for o in pathway.options] and pathway.patient_texts == {}
    fact = next(iter(unknown))
    assert any(name.endswith(fact) for name in asked(pathway))


def test_the_most_urgent_rule_wins_and_is_named(case: Any) -> None:
    pathway = case(finding(), red_flag="yes", prior_melanoma="yes")
    assert (pathway.urgency, pathway.urgency_rules) == ("U1", ["G07"])
    assert [line.rule for line in pathway.notices] == ["G07"] and [line.rule for line in pathway.follow_up] == ["N04"]
    held_back = option(pathway, "reassure")
    assert held_back.status == "blocked" and [line.rule for line in held_back.restrictions] == ["G07"]
    assert pathway.options[-1] == held_back  # blocked ones stay, at the end
    assert pathway.options[0].option == "refer_urgent"


def test_immunosuppression_raises_every_level_by_one_and_not_above_u1(case: Any) -> None:
    def level(found: LesionFinding, **changes: Any) -> str:
        return str(case(found, immunosuppression="transplant", **changes).urgency)

    assert [level(finding()), level(BCC), level(finding(), red_flag="yes")] == ["U4", "U1", "U1"]  # of U5, U2, U1
    assert "C23" in case(finding(), immunosuppression="transplant").urgency_rules
    assert level(finding("df")) == "U2"


def test_the_urgency_of_a_rule_with_alternatives(case: Any) -> None:
    weak = finding("bcc", 0.2, p_mel_max=0.0)  # expected utility asks for nothing
    assert case(weak, fast_growing="yes").urgency == "U1"
    assert case(weak, fast_growing="no").urgency == "U3"
    assert case(weak, fast_growing="unknown").urgency == "U1"  # the safe side while it is open


def test_what_is_less_urgent_than_routine_has_to_be_certain(tmp_path: Path, case: Any) -> None:
    effect = {"urgency_when": [{"when": "lesion.itch", "urgency": "U4"}]}
    base = load_knowledge(write(tmp_path, X01=("case.dx == df", effect)))
    assert [case(finding("df"), base, itch=x).urgency for x in ("yes", "unknown", "no")] == ["U4", "U3", "U3"]


def test_expected_utility_may_make_a_case_more_urgent_and_says_so(case: Any) -> None:
    pathway = case(BCC)
    assert (pathway.urgency, pathway.urgency_rules) == ("U2", ["S12"])
    (said,) = [fired.facts for fired in pathway.trace if fired.rule == "S12"]
    p = dict(pathway.probabilities)
    excise = sum(u * p[code] for u, code in zip([2, 4.5, -3, -3, 5, -3, -3], p, strict=True))
    assert said["best_action"] == "excise" and said["expected_utility"]["excise"] == pytest.approx(excise, abs=1e-5)
    assert case(BCC, histology="bcc_nodular").urgency == "U3"  # with histology there is nothing to expect


def test_a_contraindication_blocks_and_an_unknown_one_locks(case: Any) -> None:
    assert option(case(BCC), "fluorouracil").status == "available"
    blocked = option(case(BCC, pregnant="yes"), "fluorouracil")
    assert blocked.status == "blocked" and [line.rule for line in blocked.restrictions] == ["C02"]
    assert blocked.restrictions[0].text == "Says C02." and blocked.restrictions[0].source == "test"
    locked = option(case(BCC, pregnant="unknown", age=None), "fluorouracil")
    assert locked.status == "locked" and locked.confirm == ["patient.age", "patient.pregnant"]
    assert option(case(BCC, pregnant="unknown", age=12), "fluorouracil").status == "blocked"


def test_one_rule_may_block_and_caution_under_conditions_of_their_own(case: Any) -> None:
    def status(**changes: Any) -> str:
        return option(case(BCC, **changes), "imiquimod").status

    assert status(immunosuppression="cll") == "caution" and status(pregnant="yes") == "blocked"
    assert status(immunosuppression="cll", pregnant="unknown") == "locked" and status() == "available"


def test_a_block_that_holds_while_unknown(tmp_path: Path, case: Any) -> None:
    careful = rule("C02", "patient.pregnant", {"block": ["fluorouracil"]}, if_unknown="hold")
    base = load_knowledge(write(tmp_path, C02=careful))
    assert option(case(BCC, base, pregnant="unknown"), "fluorouracil").status == "blocked"
    assert "patient.pregnant" in asked(case(BCC, base, pregnant="unknown"))


def test_only_questions_that_could_change_something_are_asked(case: Any) -> None:
    everything = {name: None if isinstance(value, int) else "unknown" for name, value in QUIET.items()}
    naevus = asked(case(finding(), red_flag="yes", **everything))
    assert "patient.pregnant" not in naevus and "patient.fitzpatrick" not in naevus  # nothing is offered they concern
    assert naevus["patient.prior_melanoma"] == ["N04"]
    carcinoma = asked(case(BCC, **everything))
    assert carcinoma["patient.pregnant"] == ["C02", "C10"] and carcinoma["patient.fitzpatrick"] == ["C14"]
    assert "patient.prior_melanoma" not in carcinoma


def test_options_stand_in_order_and_a_modifier_moves_them(case: Any) -> None:
    def order(**changes: Any) -> list[str]:
        return [o.option for o in case(BCC, **changes).options]

    usual = ["refer_soon", "standard_excision", "fluorouracil", "imiquimod", "cryotherapy"]
    assert order() == usual
    assert order(keloid="yes") == [*(o for o in usual if o != "standard_excision"), "standard_excision"]
    assert order(pregnant="yes")[-2:] == ["fluorouracil", "imiquimod"]


def test_melanoma_blocks_what_destroys_the_evidence(case: Any) -> None:
    pathway = case(finding("bcc", 0.6))  # p_mel 0.067
    assert pathway.urgency == "U1" and "S01" in pathway.urgency_rules
    for name in ("fluorouracil", "imiquimod", "cryotherapy"):
        assert option(pathway, name).status == "blocked"


@pytest.mark.parametrize("found", [unusable(), None, unusable(status="failed", quality_flags=())])
def test_without_a_usable_picture_there_is_no_class_and_no_treatment(case: Any, found: LesionFinding | None) -> None:
    pathway = case(found)
    assert (pathway.assessable, pathway.basis, pathway.prediction) == (False, "none", None)
    assert pathway.urgency == "U2" and pathway.probabilities == {} and pathway.conformal_set == []
    assert {o.group for o in pathway.options} <= {"diagnostic", "referral"}
    assert case(found, red_flag="yes").urgency == "U1"  # the clinician still decides
    assert all("N01" not in rules for rules in asked(case(found, changing="unknown")).values())


def test_histology_overrides_the_picture(case: Any) -> None:
    pathway = case(finding("mel", conformal_set=("mel", "nv")), histology="nv")
    assert (pathway.urgency, pathway.basis, pathway.prediction) == ("U5", "histology", "nv")
    assert pathway.probabilities == {} and pathway.conformal_set == []
    assert case(unusable(), histology="bcc_nodular").basis == "histology"
    assert case(unusable(), histology="bcc_nodular").prediction == "bcc"


def test_the_trace_says_which_facts_made_a_rule_hold(case: Any) -> None:
    pathway = case(BCC, pregnant="yes", age=None)
    facts = {fired.rule: fired.facts for fired in pathway.trace}
    assert facts["C02"] == {"patient.pregnant": True}  # the unknown age had no part in it
    assert facts["B05"] == {"case.dx": "bcc"}
    assert set(facts) == {"S12", "B01", "B05", "C02", "C10"}


def test_versions_say_what_it_was_computed_with(case: Any, knowledge: Knowledge) -> None:
    versions = case(finding()).versions
    assert versions.knowledge_sha256 == knowledge.sha256 and versions.model == "test"
    assert versions.thresholds == {"mel": 0.06, "malignant": 0.2, "entropy": 1.2, "mel_review": 0.03, "set_size": 4}


def many(count: int, knowledge: Knowledge) -> Recommendations:
    rng = np.random.default_rng(0)
    patients, lesions, findings = [], [], []
    for i in range(count):
        words = rng.choice(["yes", "no", "unknown"], 4).tolist()
        patients.append(
            Patient(
                patient_id=f"P{i}", pregnant=words[0], prior_melanoma=words[1], fitzpatrick=int(rng.integers(1, 7)),
                immunosuppression=str(rng.choice(["none", "cll", "unknown"])),
            )
        )  # fmt: skip
        lesions.append(Lesion(lesion_id=f"L{i}", changing=words[2], red_flag=words[3]))
        found = finding(str(rng.choice(["nv", "bcc", "mel", "df"])), lesion_id=f"L{i}")
        findings.append([found, None, unusable(lesion_id=f"L{i}")][rng.choice(3, p=[0.8, 0.1, 0.1])])
    return recommend(patients, lesions, findings, knowledge, THRESHOLDS)


def test_a_case_has_the_same_pathway_in_whatever_company(knowledge: Knowledge, monkeypatch: pytest.MonkeyPatch) -> None:
    together = many(60, knowledge)
    monkeypatch.setattr(engine, "ROWS", 7)
    in_blocks = many(60, knowledge)
    assert together.table().equals(in_blocks.table())
    whole = together.context
    for i in (0, 13, 59):
        alone = recommend([whole.patients[i]], [whole.lesions[i]], [whole.findings[i]], knowledge, THRESHOLDS)
        assert alone.pathway(0) == together.pathway(i) == in_blocks.pathway(i)


def test_the_table_says_the_same_as_the_pathways(knowledge: Knowledge, tmp_path: Path) -> None:
    found = many(80, knowledge)
    pq.write_table(found.table(), tmp_path / "t.parquet")
    rows = pq.read_table(tmp_path / "t.parquet").to_pylist()
    assert len(rows) == len(found) == 80 and {row["urgency"] for row in rows} >= {"U1", "U2", "U3"}
    for i, row in enumerate(rows):
        pathway = found.pathway(i)
        usable = [o.option for o in pathway.options if o.status != "blocked"]
        assert row["urgency"] == pathway.urgency == found.urgency[i] and row["urgency_rules"] == pathway.urgency_rules
        assert (row["assessable"], row["basis"], row["prediction"]) == (
            pathway.assessable, pathway.basis, pathway.prediction,
        )  # fmt: skip
        assert row["rules"] == [fired.rule for fired in pathway.trace]
        assert row["options"] == usable and row["first_option"] == (usable[0] if usable else None)
        for status in ("blocked", "locked", "caution"):
            assert sorted(row[status]) == sorted(o.option for o in pathway.options if o.status == status)
        assert sorted(row["missing"]) == sorted(missing.fact for missing in pathway.missing)


def test_no_cases_give_an_empty_table(knowledge: Knowledge) -> None:
    assert recommend([], [], [], knowledge, THRESHOLDS).table().num_rows == 0


def test_what_does_not_belong_together_is_refused(knowledge: Knowledge) -> None:
    who, lesion = Patient(patient_id="P"), Lesion(lesion_id="L")
    with pytest.raises(DataError, match="2 patients, 1 lesions, 1 findings"):
        recommend([who, who], [lesion], [None], knowledge, THRESHOLDS)
    with pytest.raises(DataError, match="the finding is of lesion 'M'"):
        recommend([who], [lesion], [finding(lesion_id="M")], knowledge, THRESHOLDS)
