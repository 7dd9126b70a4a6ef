"""Patients in from a FHIR Bundle: what is read, what stays unknown, and what is wrong with a bad one."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from dermaflow.errors import DataError
from dermaflow.pathways.intake import Case, read_cases
from dermaflow.pathways.outputs.identity import BASE

AS_OF = date(2026, 3, 1)
PATIENT = {"resourceType": "Patient", "id": "p1", "birthDate": "1990-03-02", "gender": "female"}
LESION = {
    "resourceType": "BodyStructure", "id": "l1", "patient": {"reference": "Patient/p1"}, "location": {"text": "back"},
}  # fmt: skip
ICD10, ATC, LOINC, SNOMED = (
    "http://hl7.org/fhir/sid/icd-10", "http://www.whocc.no/atc", "http://loinc.org", "http://snomed.info/sct",
)  # fmt: skip


def concept(system: str, code: str) -> dict[str, Any]:
    return {"coding": [{"system": system, "code": code}]}


PREGNANCY = concept(LOINC, "82810-3")


def about(kind: str, **elements: Any) -> dict[str, Any]:
    who = "patient" if kind == "AllergyIntolerance" else "subject"
    return {"resourceType": kind, who: {"reference": "Patient/p1"}} | elements


def observation(code: dict[str, Any], **elements: Any) -> dict[str, Any]:
    return about("Observation", status="final", code=code, **elements)


def own(fact: str, **elements: Any) -> dict[str, Any]:
    return observation(concept(f"{BASE}/CodeSystem/fact", fact), **elements)


def condition(code: str, **elements: Any) -> dict[str, Any]:
    return about("Condition", code=concept(ICD10, code), **elements)


def medication(code: str, status: str = "active") -> dict[str, Any]:
    return about("MedicationStatement", status=status, medicationCodeableConcept=concept(ATC, code))


def answers(**items: Any) -> dict[str, Any]:
    """A questionnaire's answers; the first underscore of a name stands for the dot."""
    item = [{"linkId": name.replace("_", ".", 1), "answer": [value]} for name, value in items.items()]
    return about("QuestionnaireResponse", status="completed", item=item, authored="2026-02-20T10:00:00Z")


def read(folder: Path, *resources: dict[str, Any], full_urls: bool = False, **bundle: Any) -> list[Case]:
    entries: list[dict[str, Any]] = [{"resource": resource} for resource in resources]
    if full_urls:
        for entry in entries:
            kind, identity = entry["resource"]["resourceType"], entry["resource"].get("id", "x")
            entry["fullUrl"] = f"https://hospital.example/fhir/{kind}/{identity}"
    path = folder / "bundle.json"
    path.write_text(json.dumps({"resourceType": "Bundle", "type": "collection", "entry": entries} | bundle))
    return read_cases(path, as_of=AS_OF)


def one(folder: Path, *resources: dict[str, Any]) -> Case:
    [case] = read(folder, PATIENT, LESION, *resources)
    return case


def error_of(folder: Path, *resources: dict[str, Any], **bundle: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(folder, *resources, **bundle)
    return str(caught.value)


def test_patient_and_lesion_are_read_and_the_birth_date_dropped(tmp_path: Path) -> None:
    case = one(tmp_path)
    assert (case.patient.patient_id, case.patient.age, case.patient.sex) == ("p1", 35, "female")
    assert (case.lesion.lesion_id, case.lesion.site) == ("l1", "back")
    assert "1990" not in case.patient.model_dump_json()
    assert case.patient.pregnant == case.patient.immunosuppression == "unknown"


def test_the_senders_identifier_is_the_id(tmp_path: Path) -> None:
    patient = PATIENT | {"identifier": [{"system": "urn:oid:1.2.3", "value": "MRN-7"}]}
    lesion = LESION | {"identifier": [{"value": "HAM_1"}]}
    [case] = read(tmp_path, patient, lesion)
    assert (case.patient.patient_id, case.lesion.lesion_id) == ("MRN-7", "HAM_1")


def test_references_may_be_full_addresses_or_urns(tmp_path: Path) -> None:
    address = "https://hospital.example/fhir/Patient/p1"
    [case] = read(tmp_path, PATIENT, LESION | {"patient": {"reference": address}}, full_urls=True)
    assert case.patient.age == 35
    lesion = LESION | {"patient": {"reference": "urn:uuid:1"}}
    entries = [{"fullUrl": "urn:uuid:1", "resource": PATIENT}, {"resource": lesion}]
    assert read(tmp_path, entry=entries)[0].patient.age == 35


@pytest.mark.parametrize(
    ("resource", "field", "value"),
    [
        (condition("Z94.0"), "immunosuppression", "transplant"),
        (condition("C91.10"), "immunosuppression", "cll"),
        (condition("C43.5"), "prior_melanoma", "yes"),
        (condition("C44.9"), "prior_keratinocyte_cancer", "yes"),
        (condition("E80.1"), "porphyria", "yes"),
        (condition("Z95.0"), "implant", "pacemaker"),
        (condition("Z95.810"), "implant", "icd"),
        (medication("B01AA03"), "anticoagulant", "warfarin"),
        (medication("B01AF02"), "anticoagulant", "doac"),
        (medication("B01AC06"), "anticoagulant", "antiplatelet"),
        (medication("L04AD01"), "immunosuppression", "drug"),
        (observation(PREGNANCY, valueCodeableConcept=concept(SNOMED, "77386006")), "pregnant", "yes"),
        (observation(PREGNANCY, valueCodeableConcept=concept(LOINC, "LA26683-5")), "pregnant", "no"),
        (observation(PREGNANCY, valueCodeableConcept=concept(LOINC, "LA4489-6")), "pregnant", "unknown"),
        (observation(concept(LOINC, "6301-6"), valueQuantity={"value": 2.4}), "inr", 2.4),
        (own("fitzpatrick", valueInteger=5), "fitzpatrick", 5),
        (own("dpd_deficiency", valueBoolean=True), "dpd_deficiency", "yes"),
        (own("preference", valueString="cosmesis"), "preference", "cosmesis"),
        (answers(patient_keloid={"valueBoolean": False}), "keloid", "no"),
        (answers(patient_frailty={"valueInteger": 7}), "frailty", 7),
        (about("AllergyIntolerance", code={"text": "Peanut protein"}), "allergies", ("peanut", "unknown")),
        (about("AllergyIntolerance", code={"text": "Erdnuss"}), "allergies", ("other", "unknown")),
        (about("AllergyIntolerance", code=concept(SNOMED, "716186003")), "allergies", ("none",)),
    ],
)  # fmt: skip
def test_what_is_recorded_of_a_person_is_known(
    tmp_path: Path, resource: dict[str, Any], field: str, value: Any
) -> None:
    assert getattr(one(tmp_path, resource).patient, field) == value


@pytest.mark.parametrize(
    ("resource", "field"),
    [
        (condition("Z94.7"), "immunosuppression"),  # cornea
        (condition("C43.5", verificationStatus=concept("x", "provisional")), "prior_melanoma"),
        (condition("C43.5", verificationStatus=concept("x", "refuted")), "prior_melanoma"),
        (condition("I10"), "prior_melanoma"),
        (medication("B01AA03", status="stopped"), "anticoagulant"),
        (medication("B01AA03", status="entered-in-error"), "anticoagulant"),
        (own("keloid", valueBoolean=True) | {"status": "entered-in-error"}, "keloid"),
        (observation(PREGNANCY, valueCodeableConcept=concept(SNOMED, "77386006"),
                     effectiveDateTime="2025-01-01"), "pregnant"),
        (observation(PREGNANCY, valueCodeableConcept=concept(SNOMED, "60001007"),
                     effectiveDateTime="2026-01-01"), "pregnant"),
        (observation(concept(LOINC, "6301-6"), valueQuantity={"value": 2.4}, effectiveDateTime="2025-12-01"), "inr"),
    ],
)  # fmt: skip
def test_what_is_withdrawn_suspected_or_old_stays_unknown(tmp_path: Path, resource: dict[str, Any], field: str) -> None:
    assert getattr(one(tmp_path, resource).patient, field) in ("unknown", None)


def test_a_refuted_allergy_is_none_of_the_allergies(tmp_path: Path) -> None:
    refuted = about("AllergyIntolerance", code={"text": "peanut"}, verificationStatus=concept("x", "refuted"))
    soya = about("AllergyIntolerance", code={"text": "soya"})
    assert one(tmp_path, refuted, soya).patient.allergies == ("soya", "unknown")


def test_the_gravest_of_several_conditions_and_drugs_counts(tmp_path: Path) -> None:
    drugs = [medication(code) for code in ("L04AD01", "B01AC06", "B01AA03")]
    patient = one(tmp_path, *drugs, condition("Z94.0")).patient
    assert (patient.immunosuppression, patient.anticoagulant) == ("transplant", "warfarin")


def test_the_newest_of_several_observations_counts(tmp_path: Path) -> None:
    old = own("fitzpatrick", valueInteger=2, effectiveDateTime="2019-01-01")
    new = own("fitzpatrick", valueInteger=5, effectiveDateTime="2025-01-01")
    assert one(tmp_path, new, old).patient.fitzpatrick == 5
    assert "fitzpatrick has two different values" in error_of(
        tmp_path, PATIENT, LESION, new, new | {"valueInteger": 3}
    )  # fmt: skip


def test_facts_of_a_lesion_come_by_focus_or_by_questionnaire(tmp_path: Path) -> None:
    second = LESION | {"id": "l2", "location": {"text": "face"}}
    by_focus = own("changing", valueBoolean=True, focus=[{"reference": "BodyStructure/l1"}])
    by_form = answers(lesion_lesion_id={"valueString": "l2"}, lesion_diameter_mm={"valueDecimal": 6.5})
    form_only = answers(lesion_lesion_id={"valueString": "l3"})
    first, other, third = read(tmp_path, PATIENT, LESION, second, by_focus, by_form, form_only)
    assert (first.lesion.changing, first.lesion.diameter_mm) == ("yes", None)
    assert (other.lesion.changing, other.lesion.diameter_mm, other.lesion.site) == ("unknown", 6.5, "face")
    assert (third.lesion.lesion_id, third.lesion.site) == ("l3", "unknown")


def test_other_resources_and_other_questionnaires_are_passed_over(tmp_path: Path) -> None:
    other = answers(phq9_1={"valueInteger": 2})
    assert one(tmp_path, {"resourceType": "Encounter", "nonsense": True}, other) == one(tmp_path)


def test_references_that_lead_nowhere_are_counted_and_named(tmp_path: Path) -> None:
    lost = [condition("Z94.0") | {"subject": {"reference": f"Patient/p{n}"}} for n in range(2, 9)]
    text = error_of(tmp_path, PATIENT, LESION, *lost)
    assert "7 entries lead nowhere: entry 3 (Condition).subject -> Patient/p2" in text
    assert "and 2 more" in text
    focus = own("changing", valueBoolean=True, focus=[{"reference": "BodyStructure/l9"}])
    assert "entry 3 (Observation).focus -> BodyStructure/l9" in error_of(tmp_path, PATIENT, LESION, focus)
    assert ".subject -> BodyStructure/l1" in error_of(
        tmp_path, PATIENT, LESION, condition("Z94.0") | {"subject": {"reference": "BodyStructure/l1"}}
    )


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        ([PATIENT | {"birthDate": "2031-01-01"}, LESION], "birth_date lies in the future"),
        ([PATIENT, LESION, own("keloid", valueBoolean=True, effectiveDateTime="2031-01-01")],
         "entry 3 (Observation).effectiveDateTime lies in the future"),
        ([PATIENT | {"birthDate": "long ago"}, LESION], "entry 1 (Patient): birthDate"),
        ([PATIENT | {"shoeSize": 43}, LESION], "entry 1 (Patient): shoeSize"),
        ([PATIENT, LESION, own("keloyd", valueBoolean=True)], "unknown fact 'keloyd'; did you mean 'keloid'?"),
        ([PATIENT, LESION, answers(patient_keloyd={"valueBoolean": True})],
         "unknown item patient.keloyd; did you mean 'keloid'?"),
        ([PATIENT, LESION, answers(lesion_itch={"valueBoolean": True})], "itch without an item lesion.lesion_id"),
        ([PATIENT, LESION, own("itch", valueBoolean=True)], "itch of no lesion"),
        ([PATIENT, LESION | {"location": {"text": "bak"}}], "site is 'bak'; the nearest is 'back'"),
        ([PATIENT, LESION, own("fitzpatrick", valueInteger=9)], "fitzpatrick is '9'; expected a whole number"),
        ([PATIENT], "patient 'p1' has no lesion"),
        ([LESION], "no Patient in the Bundle"),
        ([], "no Patient in the Bundle"),
        ([PATIENT, LESION, PATIENT | {"id": "p2"}, LESION | {"id": "l1", "patient": {"reference": "Patient/p2"}}],
         "lesion 'l1' in 2 rows"),
    ],
)  # fmt: skip
def test_a_bad_bundle_says_what_is_wrong_with_it(tmp_path: Path, resources: list[dict[str, Any]], message: str) -> None:
    assert message in error_of(tmp_path, *resources)


def test_one_page_of_several_and_no_bundle_are_refused(tmp_path: Path) -> None:
    text = error_of(tmp_path, PATIENT, LESION, type="searchset", link=[{"relation": "next", "url": "https://x"}])
    assert "one page of several" in text
    assert "a FHIR Patient; expected a FHIR Bundle" in error_of(tmp_path, resourceType="Patient")


def test_null_entries_are_passed_over(tmp_path: Path) -> None:
    assert read(tmp_path, entry=[None, {}, {"resource": None}, {"resource": PATIENT}, {"resource": LESION}])
