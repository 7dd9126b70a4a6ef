"""The FHIR Bundle: valid, closed in itself, the same every time, and nothing more than a proposal before sign-off."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from fhir.resources.R4B.bundle import Bundle
from fhir_core.fhirabstractmodel import FHIRAbstractModel
from sample_pathways import PRELIMINARY, a_blurred_pathway, a_pathway

from dermaflow.pathways.outputs.fhir import HISTOLOGY_SNOMED, REVIEW_DAYS, patient_bundle
from dermaflow.schemas.pathway import Pathway, SignOff
from dermaflow.schemas.patient import Lesion

RECORDED = datetime(2026, 3, 1, 9, 30, tzinfo=UTC)


def signed(decision: str, **changes: Any) -> Pathway:
    status = "rejected" if decision == "rejected" else "final"
    sign_off = SignOff(by="Dr Ada Byron", at="2026-03-02T08:00:00+00:00", decision=decision, reason="after a look")  # type: ignore[arg-type]
    return a_pathway(status=status, sign_off=sign_off, **changes)


def content_of(*pathways: Pathway, lesions: dict[str, Lesion] | None = None) -> dict[str, Any]:
    return json.loads(patient_bundle(pathways, recorded=RECORDED, lesions=lesions).model_dump_json())


def of_type(content: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [e["resource"] for e in content["entry"] if e["resource"]["resourceType"] == kind]


def values(content: Any, key: str) -> Iterator[Any]:
    if isinstance(content, dict):
        if key in content:
            yield content[key]
        for value in content.values():
            yield from values(value, key)
    elif isinstance(content, list):
        for value in content:
            yield from values(value, key)


def outside_value_set(model: FHIRAbstractModel) -> Iterator[str]:
    """Codes that are not in the value set FHIR requires; fhir.resources lists the sets and does not check them."""
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, FHIRAbstractModel):
                yield from outside_value_set(part)
        allowed = field.json_schema_extra.get("enum_values") if isinstance(field.json_schema_extra, dict) else None
        if value is not None and isinstance(allowed, list) and "+" not in allowed and value not in allowed:
            yield f"{model.get_resource_type()}.{name}: {value} is not in {allowed}"


EXAMPLES = [
    [a_pathway()],
    [a_blurred_pathway()],
    [a_pathway(), a_blurred_pathway()],
    [a_pathway(urgency="U5", options=[], follow_up=[], missing=[], notices=[], patient_texts={})],
    [a_pathway(lesion_id="ä/ö " + "x" * 200, patient_id="Ünïcode #1")],
    [a_pathway(versions=a_pathway().versions.model_copy(update={"model": "none", "model_sha256": ""}), image_ids=[])],
    [a_pathway(notices=[PRELIMINARY.model_copy(update={"source": "", "text": ""})], patient_texts={"T-SN": ""})],
    *([signed(decision)] for decision in ("accepted", "edited", "rejected")),
]


@pytest.mark.parametrize("pathways", EXAMPLES)
def test_the_bundle_is_valid_and_every_reference_in_it_leads_somewhere(pathways: list[Pathway]) -> None:
    bundle = patient_bundle(pathways, recorded=RECORDED)
    assert Bundle.model_validate_json(bundle.model_dump_json()).model_dump_json() == bundle.model_dump_json()
    assert "[]" not in bundle.model_dump_json()  # FHIR allows no empty lists
    assert list(outside_value_set(bundle)) == []
    content = content_of(*pathways)
    addresses = [entry["fullUrl"] for entry in content["entry"]]
    assert len(addresses) == len(set(addresses))
    targets = [target for target in values(content, "reference") if isinstance(target, str)]
    assert targets
    assert set(targets) <= set(addresses)
    assert all(entry["fullUrl"] == f"urn:uuid:{entry['resource']['id']}" for entry in content["entry"])


def test_the_value_set_check_finds_a_wrong_code() -> None:
    bundle = patient_bundle([a_pathway()], recorded=RECORDED)
    content = json.loads(bundle.model_dump_json())
    of_type(content, "Task")[0]["intent"] = "wish"
    assert any("wish" in found for found in outside_value_set(Bundle.model_validate(content)))


def test_every_kind_of_resource_is_there_once_a_lesion_and_shared_ones_once() -> None:
    content = content_of(a_pathway(), a_blurred_pathway())
    counts = {kind: len(of_type(content, kind)) for kind in {e["resource"]["resourceType"] for e in content["entry"]}}
    assert counts == {
        "Patient": 1, "Device": 1, "BodyStructure": 2, "Observation": 2, "RiskAssessment": 2, "DiagnosticReport": 2,
        "ServiceRequest": 2, "CarePlan": 2, "DetectedIssue": 1, "Task": 2, "Provenance": 2,
    }  # fmt: skip


def test_before_sign_off_everything_is_preliminary_proposed_or_a_draft() -> None:
    content = content_of(a_pathway())
    [report], [request], [plan], [task] = (
        of_type(content, kind) for kind in ("DiagnosticReport", "ServiceRequest", "CarePlan", "Task")
    )
    assert (report["status"], "conclusionCode" in report) == ("preliminary", False)
    assert (request["status"], request["intent"], request["priority"]) == ("draft", "proposal", "urgent")
    assert (plan["status"], plan["intent"]) == ("draft", "proposal")
    assert (task["status"], "owner" in task) == ("requested", False)
    assert of_type(content, "RiskAssessment")[0]["status"] == "preliminary"
    assert of_type(content, "Observation")[0]["status"] == "preliminary"
    assert "no clinician has signed" in report["conclusion"]


def test_accepting_makes_it_final_and_names_the_clinician() -> None:
    content = content_of(signed("accepted"))
    [report], [request], [plan], [task] = (
        of_type(content, kind) for kind in ("DiagnosticReport", "ServiceRequest", "CarePlan", "Task")
    )
    assert (report["status"], report["resultsInterpreter"][0]["display"]) == ("final", "Dr Ada Byron")
    assert (request["status"], request["intent"]) == ("active", "order")
    assert request["requester"]["display"] == "Dr Ada Byron"
    assert (plan["status"], plan["intent"]) == ("active", "plan")
    assert (task["status"], task["owner"]["display"]) == ("completed", "Dr Ada Byron")
    verifier = of_type(content, "Provenance")[1]
    assert (verifier["recorded"], verifier["agent"][0]["who"]["display"]) == ("2026-03-02T08:00:00Z", "Dr Ada Byron")


def test_what_was_edited_stays_a_proposal_and_what_was_rejected_is_revoked() -> None:
    edited, rejected = content_of(signed("edited")), content_of(signed("rejected"))
    assert of_type(edited, "DiagnosticReport")[0]["status"] == "final"
    assert "EDITED by Dr Ada Byron: after a look" in of_type(edited, "DiagnosticReport")[0]["conclusion"]
    assert of_type(edited, "ServiceRequest")[0]["intent"] == of_type(edited, "CarePlan")[0]["intent"] == "proposal"
    assert of_type(rejected, "DiagnosticReport")[0]["status"] == "cancelled"
    assert of_type(rejected, "ServiceRequest")[0]["status"] == of_type(rejected, "CarePlan")[0]["status"] == "revoked"
    assert of_type(rejected, "Provenance")[1]["reason"] == [{"text": "after a look"}]


def test_a_diagnosis_in_snomed_needs_histology_and_a_signature() -> None:
    lesions = {"L1": Lesion(lesion_id="L1", site="back", histology="bcc_nodular")}
    unsigned = [a_pathway(), a_pathway(basis="histology")]
    for pathway in (*unsigned, signed("accepted"), signed("rejected", basis="histology")):
        content = json.dumps(content_of(pathway, lesions=lesions))
        assert "snomed" not in content
        assert not any(value in content for value, _ in HISTOLOGY_SNOMED.values())
    [report] = of_type(content_of(signed("accepted", basis="histology"), lesions=lesions), "DiagnosticReport")
    assert report["conclusionCode"][0]["coding"][0] == {
        "system": "http://snomed.info/sct", "code": "254701007", "display": "Basal cell carcinoma of skin",
    }  # fmt: skip


@pytest.mark.parametrize("histology", ["bkl", "df", "vasc", "nv", "mel_in_situ", "bowen", "other"])
def test_codes_that_sources_dispute_stay_out(histology: str) -> None:
    lesions = {"L1": Lesion(lesion_id="L1", histology=histology)}  # type: ignore[arg-type]
    assert "snomed" not in json.dumps(content_of(signed("accepted", basis="histology"), lesions=lesions))


def test_probabilities_come_with_set_quality_and_place() -> None:
    lesions = {"L1": Lesion(lesion_id="L1", site="lower extremity")}
    content = content_of(a_pathway(quality_flags=["occlusion"]), lesions=lesions)
    [risk], [observation], [place] = (of_type(content, k) for k in ("RiskAssessment", "Observation", "BodyStructure"))
    given = {p["outcome"]["coding"][0]["code"]: p["probabilityDecimal"] for p in risk["prediction"]}
    assert given == a_pathway().probabilities
    components = [(c["code"]["coding"][0]["code"], c) for c in observation["component"]]
    members = [c["valueCodeableConcept"]["coding"][0]["code"] for name, c in components if name == "conformal-set"]
    assert members == ["mel", "nv"]
    assert [c["valueString"] for name, c in components if name == "quality-flag"] == ["occlusion"]
    assert [c["valueString"] for name, c in components if name == "image"] == ["ISIC_1", "ISIC_2"]
    assert place["location"]["coding"][0]["display"] == "lower extremity"


def test_a_picture_that_cannot_be_assessed_shows_no_class() -> None:
    content = content_of(a_blurred_pathway(probabilities={"mel": 0.9}, conformal_set=["mel"]))
    assert "prediction" not in of_type(content, "RiskAssessment")[0]
    assert "conformal-set" not in json.dumps(of_type(content, "Observation"))
    assert "cannot be assessed" in of_type(content, "RiskAssessment")[0]["note"][0]["text"]


def test_a_referral_that_urgency_overtakes_is_no_contraindication() -> None:
    slow = a_pathway().options[2].model_copy(update={"option": "refer_soon", "group": "referral"})
    assert of_type(content_of(a_pathway(options=[slow])), "DetectedIssue") == []


def test_blocked_options_stay_visible_with_their_reason_and_source() -> None:
    content = content_of(a_pathway())
    [issue], [plan] = of_type(content, "DetectedIssue"), of_type(content, "CarePlan")
    assert issue["severity"] == "high"
    assert "Fluorouracil cream is blocked: Blocked in pregnancy. [C02; Efudex PI; V]" in issue["detail"]
    excision, cryotherapy, fluorouracil, follow_up = (activity["detail"] for activity in plan["activity"])
    assert (excision["status"], excision["doNotPerform"]) == ("not-started", False)
    assert (cryotherapy["status"], fluorouracil["doNotPerform"]) == ("on-hold", True)
    assert "Confirm first: lesion.pigmented" in cryotherapy["statusReason"]["text"]
    assert follow_up["instantiatesUri"][0].endswith("/rule/F06")


@pytest.mark.parametrize("urgency", ["U1", "U2", "U3", "U4", "U5"])
def test_the_review_is_due_by_urgency_and_low_urgency_is_not_referred(urgency: str) -> None:
    content = content_of(a_pathway(urgency=urgency))
    due = datetime.fromisoformat(of_type(content, "Task")[0]["restriction"]["period"]["end"])
    assert due - RECORDED == timedelta(days=REVIEW_DAYS[urgency])  # type: ignore[index]
    assert bool(of_type(content, "ServiceRequest")) == (urgency in ("U1", "U2", "U3"))


def test_the_same_pathways_give_the_same_bytes_and_another_model_other_ids() -> None:
    one, two = [patient_bundle([a_pathway()], recorded=RECORDED).model_dump_json() for _ in range(2)]
    assert one == two
    elsewhere = RECORDED.astimezone(timezone(timedelta(hours=5)))
    assert patient_bundle([a_pathway()], recorded=elsewhere).model_dump_json() == one
    versions = a_pathway().versions.model_copy(update={"model_sha256": "c" * 64})
    other = content_of(a_pathway(versions=versions))
    assert of_type(other, "RiskAssessment")[0]["id"] not in one
    assert of_type(other, "Patient")[0]["id"] in one


def test_the_person_is_an_id_and_nothing_else() -> None:
    [patient] = of_type(content_of(a_pathway()), "Patient")
    assert set(patient) == {"resourceType", "id", "identifier"}
    assert patient["identifier"][0]["value"] == "P1"


def test_two_people_or_a_time_without_zone_are_refused() -> None:
    with pytest.raises(ValueError, match="unpack"):
        patient_bundle([a_pathway(), a_pathway(patient_id="P2")], recorded=RECORDED)
    with pytest.raises(ValueError, match="time zone"):
        patient_bundle([a_pathway()], recorded=datetime(2026, 3, 1))
