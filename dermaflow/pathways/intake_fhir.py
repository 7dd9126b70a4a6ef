"""Patients in from a FHIR R4 or R4B Bundle.

Read are: ``Patient`` (birth date, sex); ``BodyStructure``, one a lesion (its identifier or id is the lesion id);
``QuestionnaireResponse`` whose items are named ``patient.<field>`` or ``lesion.<field>``; ``Observation`` with a code
of our own system, of pregnancy (LOINC 82810-3) or INR (LOINC 6301-6); ``Condition`` in ICD-10; ``AllergyIntolerance``;
``MedicationStatement`` in ATC. Everything else is passed over. What is not recorded stays unknown, it never becomes no:
a list of conditions is no statement that there are no others.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import Any

from fhir.resources.R4B import get_fhir_model_class
from pydantic import ValidationError

from dermaflow.errors import DataError
from dermaflow.pathways.intake import Row, refuse
from dermaflow.pathways.intake_codes import (
    ANSWERS,
    ATC,
    CONDITIONS,
    ICD,
    MEDICATIONS,
    NO_ALLERGY,
    OBSERVED,
    SUBSTANCES,
)
from dermaflow.pathways.intake_fields import BIRTH_DATE, FIELDS, nearest
from dermaflow.pathways.outputs.identity import BASE
from dermaflow.schemas.patient import Lesion, Patient

logger = logging.getLogger(__name__)

FACT_SYSTEM = f"{BASE}/CodeSystem/fact"
SUBJECTS = {
    "BodyStructure": "patient", "QuestionnaireResponse": "subject", "Observation": "subject", "Condition": "subject",
    "AllergyIntolerance": "patient", "MedicationStatement": "subject",
}  # fmt: skip
"""The types that are read, beside Patient, and the element that names the person."""

DATES = ("effectiveDateTime", "authored", "onsetDateTime", "recordedDate", "dateAsserted")
VALID_DAYS = {("pregnant", "yes"): 280, ("pregnant", "no"): 28, ("third_trimester", "yes"): 90}
"""How long a dated observation holds; after that the field is unknown again. Ours, from no guideline."""

INR_DAYS = 28


@dataclass
class _Person:
    """What is gathered of one patient: (value, date, place) by field, for the person and each lesion."""

    facts: dict[str, list[tuple[Any, str, str]]] = field(default_factory=lambda: defaultdict(list))
    lesions: dict[str, dict[str, list[tuple[Any, str, str]]]] = field(default_factory=dict)
    allergies: list[str] = field(default_factory=list)


def rows_from_bundle(bundle: dict[str, Any], *, where: object, as_of: date) -> list[Row]:
    """The rows of a Bundle, one a lesion, to be checked by `cases_of` as those of every other format are.

    Args:
        bundle: Parsed JSON.
        where: Its file, for messages.
        as_of: Nothing may be dated after it.

    Raises:
        DataError: It is no whole Bundle, a resource in it is no valid FHIR, a reference leads nowhere, a date lies in
            the future, a fact of ours has an unknown name, a patient has no lesion, or facts contradict each other.
    """
    resources = _resources(bundle, where)
    index = _index(bundle, resources)
    _check_references(resources, index, where)
    _check_dates(resources, as_of, where)
    people: dict[int, _Person] = {id(r): _Person() for _, r in resources if r["resourceType"] == "Patient"}
    structures = [(place, r) for place, r in resources if r["resourceType"] == "BodyStructure"]
    for place, structure in structures:
        person = people[id(index[_subject(structure)])]
        facts = person.lesions.setdefault(_identifier(structure), defaultdict(list))
        if site := _text(structure.get("location")):
            facts["site"].append((site, "", place))
    problems: list[str] = []
    for place, resource in resources:
        if resource["resourceType"] in SUBJECTS and resource["resourceType"] != "BodyStructure":
            person = people[id(index[_subject(resource)])]
            for target, name, value in _facts(resource, index, place, problems):
                facts = person.facts if target is None else person.lesions.setdefault(target, defaultdict(list))
                if value is not None:
                    facts[name].append((value, _date(resource), place))
            person.allergies += _allergies(resource)
    refuse(problems, "are not understood", where=where, todo=f"use the names of the fields in {FACT_SYSTEM}")
    rows = []
    for place, resource in resources:
        if resource["resourceType"] == "Patient":
            rows += _rows(_identifier(resource), resource, people[id(resource)], place, as_of, problems)
    refuse(problems, "cannot be used", where=where, todo="complete or correct the Bundle")
    return rows


# --- the Bundle as a whole -----------------------------------------------------------------------------------------


def _resources(bundle: dict[str, Any], where: object) -> list[tuple[str, dict[str, Any]]]:
    """The resources that are read, valid and not withdrawn, each with its place."""
    if bundle["resourceType"] != "Bundle":
        raise DataError(f"a FHIR {bundle['resourceType']}", where=where, expected="a FHIR Bundle")
    if any(isinstance(link, dict) and link.get("relation") == "next" for link in bundle.get("link") or []):
        raise DataError(
            "one page of several", where=where, todo="fetch the other pages and put all entries into one Bundle"
        )
    found: list[tuple[str, dict[str, Any]]] = []
    problems = []
    passed: Counter[str] = Counter()
    for number, entry in enumerate(bundle.get("entry") or [], 1):
        resource = _resource(entry)
        kind = resource.get("resourceType")
        place = f"entry {number} ({kind})"
        if kind not in SUBJECTS and kind != "Patient":
            passed[str(kind)] += 1
            continue
        try:
            get_fhir_model_class(kind).model_validate(resource)
        except ValidationError as error:
            first = error.errors()[0]
            problems.append(f"{place}: {'.'.join(map(str, first['loc']))}: {first['msg']}")
            continue
        if not _withdrawn(resource):
            found.append((place, resource))
    refuse(problems, "are no valid FHIR", where=where, todo="correct them where they were written")
    if not any(resource["resourceType"] == "Patient" for _, resource in found):
        raise DataError("no Patient in the Bundle", where=where, expected="at least one, and a BodyStructure a lesion")
    if passed:
        logger.info("%s: passed over %s", where, ", ".join(f"{n} {kind}" for kind, n in sorted(passed.items())))
    return found


def _resource(entry: Any) -> dict[str, Any]:
    """The resource of an entry; an empty one where there is none."""
    resource = entry.get("resource") if isinstance(entry, dict) else None
    return resource if isinstance(resource, dict) else {}


def _withdrawn(resource: dict[str, Any]) -> bool:
    """Whether the record itself says that it does not hold, or does not hold any more."""
    verification = _codes(resource.get("verificationStatus"))
    clinical = _codes(resource.get("clinicalStatus"))
    status = resource.get("status")
    if status in ("entered-in-error", "cancelled", "not-taken") or "entered-in-error" in verification:
        return True
    if resource["resourceType"] == "MedicationStatement":
        return status in ("completed", "stopped", "intended", "on-hold")
    if resource["resourceType"] == "AllergyIntolerance":
        return bool({"refuted"} & verification or {"inactive", "resolved"} & clinical)
    # a suspected melanoma of today is no melanoma of the past
    return resource["resourceType"] == "Condition" and bool(verification - {"confirmed"})


def _index(bundle: dict[str, Any], resources: Iterable[tuple[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Resources by every address that a reference may give them."""
    kept = {id(resource) for _, resource in resources}
    index: dict[str, dict[str, Any]] = {}
    for entry in bundle.get("entry") or []:
        resource = _resource(entry)
        if id(resource) in kept:
            index[str(entry.get("fullUrl"))] = index[f"{resource['resourceType']}/{resource.get('id')}"] = resource
    return index


def _check_references(resources: Iterable[tuple[str, dict[str, Any]]], index: dict[str, Any], where: object) -> None:
    lost = []
    for place, resource in resources:
        kind = resource["resourceType"]
        named = [(SUBJECTS[kind], resource.get(SUBJECTS[kind]))] if kind in SUBJECTS else []
        named += [("focus", focus) for focus in resource.get("focus") or []]
        for element, reference in named:
            target = _address(reference)
            if target not in index or (element != "focus" and index[target]["resourceType"] != "Patient"):
                lost.append(f"{place}.{element} -> {target or 'no reference'}")
    refuse(lost, "lead nowhere", where=where, todo="put the resources they name into the Bundle")


def _check_dates(resources: Iterable[tuple[str, dict[str, Any]]], as_of: date, where: object) -> None:
    # a day of grace: the date of a resource is that of its own time zone
    late = [
        f"{place}.{element} lies in the future"
        for place, resource in resources
        for element in DATES
        if str(resource.get(element, ""))[:10] > (as_of + timedelta(days=1)).isoformat()
    ]
    refuse(late, "are dated in the future", where=where, todo=f"correct them; the date of assessment is {as_of}")


# --- facts ---------------------------------------------------------------------------------------------------------


def _facts(
    resource: dict[str, Any], index: dict[str, dict[str, Any]], place: str, problems: list[str]
) -> Iterator[tuple[str | None, str, Any]]:
    """Lesion id or None, field and value of everything that a resource says."""
    kind = resource["resourceType"]
    if kind == "QuestionnaireResponse":
        yield from _answers(resource, place, problems)
    elif kind == "Observation":
        targets = [_identifier(index[_address(r)]) for r in resource.get("focus") or []]
        for name in _observed(resource, place, problems):
            value = _value(resource)
            for target in targets if name in Lesion.model_fields else [None]:
                yield target, name, value
            if name in Lesion.model_fields and not targets:
                problems.append(f"{place}: {name} of no lesion; focus should name its BodyStructure")
    elif kind == "Condition":
        for system, value in _codings(resource.get("code")):
            if system in ICD:
                yield from _first_named(CONDITIONS, value)
    elif kind == "MedicationStatement":
        for system, value in _codings(resource.get("medicationCodeableConcept")):
            if system == ATC:
                yield from _first_named(MEDICATIONS, value)


def _first_named(table: Iterable[tuple[str, str, str]], code: str) -> Iterator[tuple[None, str, str]]:
    hit = next(((name, value) for beginning, name, value in table if code.startswith(beginning)), None)
    if hit:
        yield None, *hit


def _observed(resource: dict[str, Any], place: str, problems: list[str]) -> Iterator[str]:
    for system, value in _codings(resource.get("code")):
        if (system, value) in OBSERVED:
            yield OBSERVED[system, value]
        elif system == FACT_SYSTEM:
            if value in FIELDS:
                yield value
            else:
                problems.append(f"{place}: unknown fact {value!r}{nearest(value, tuple(FIELDS))}")


def _answers(resource: dict[str, Any], place: str, problems: list[str]) -> Iterator[tuple[str | None, str, Any]]:
    given: dict[str, list[Any]] = {}
    for item in _items(resource):
        prefix, _, name = str(item.get("linkId")).partition(".")
        if prefix not in ("patient", "lesion"):
            continue  # another questionnaire's item
        fields = tuple((Patient if prefix == "patient" else Lesion).model_fields)
        if name not in fields:
            problems.append(f"{place}: unknown item {prefix}.{name}{nearest(name, fields)}")
        elif values := [_value(answer) for answer in item.get("answer") or []]:
            given[name] = values
    lesion = next(iter(given.pop("lesion_id", [])), None)
    given.pop("patient_id", None)  # subject says it
    for name, values in given.items():
        if name in Lesion.model_fields and lesion is None:
            problems.append(f"{place}: {name} without an item lesion.lesion_id")
        yield (str(lesion) if name in Lesion.model_fields else None), name, values[0] if len(values) == 1 else values
    if lesion is not None and not any(name in Lesion.model_fields for name in given):
        yield str(lesion), "site", None


def _items(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for item in node.get("item") or []:
        yield item
        yield from _items(item)


def _allergies(resource: dict[str, Any]) -> list[str]:
    if resource["resourceType"] != "AllergyIntolerance":
        return []
    code = resource.get("code") or {}
    if NO_ALLERGY in set(_codings(code)):
        return ["none"]
    text = " ".join([str(code.get("text", "")), *(str(c.get("display", "")) for c in code.get("coding") or [])]).lower()
    found = [word for part, word in SUBSTANCES.items() if part in text]
    return [*(found or ["other"]), "unknown"]  # an unfamiliar name may be one that matters; lists are never complete


def _rows(
    patient_id: str, patient: dict[str, Any], person: _Person, place: str, as_of: date, problems: list[str]
) -> list[Row]:
    values = {name: _settle(name, facts, as_of, place, problems) for name, facts in person.facts.items()}
    values |= {"patient_id": patient_id, BIRTH_DATE: patient.get("birthDate"), "sex": patient.get("gender")}
    if "allergies" not in values and person.allergies:
        named = list(dict.fromkeys(person.allergies))
        values["allergies"] = [word for word in named if word != "none"] or ["none"]
    if not person.lesions:
        problems.append(f"{place}: patient {patient_id!r} has no lesion, that is no BodyStructure")
    rows = []
    for lesion, facts in person.lesions.items():
        of_lesion = {name: _settle(name, found, as_of, place, problems) for name, found in facts.items()}
        rows.append(Row(f"{place}, lesion {lesion}", values | of_lesion | {"lesion_id": lesion}))
    return rows


def _settle(name: str, facts: list[tuple[Any, str, str]], as_of: date, place: str, problems: list[str]) -> Any:
    """The newest of several statements; of undated codes of one list, the first named there."""
    latest = max(when for _, when, _ in facts)
    newest = [value for value, when, _ in facts if when == latest]
    if name in ("immunosuppression", "anticoagulant", "implant"):
        ranked = [value for _, other, value in (*CONDITIONS, *MEDICATIONS) if other == name]
        listed = [value for value, _, _ in facts if value in ranked]
        if listed:  # several conditions or drugs hold at the same time
            return min(listed, key=ranked.index)
    if any(value != newest[0] for value in newest):
        problems.append(f"{place}: {name} has two different values of the same date")
    days = INR_DAYS if name == "inr" else VALID_DAYS.get((name, {True: "yes", False: "no"}.get(newest[0], newest[0])))
    old = bool(days and latest and latest < (as_of - timedelta(days=days)).isoformat())
    return None if old else newest[0]


# --- elements ------------------------------------------------------------------------------------------------------


def _identifier(resource: dict[str, Any]) -> str:
    """What the sender calls it: the value of its first identifier, else its id."""
    values = [identifier.get("value") for identifier in resource.get("identifier") or []]
    return str(next((value for value in values if value), resource.get("id") or ""))


def _subject(resource: dict[str, Any]) -> str:
    return _address(resource.get(SUBJECTS[resource["resourceType"]]))


def _address(reference: Any) -> str:
    text = str((reference or {}).get("reference") or "")
    return text.partition("/_history/")[0]


def _codings(concept: Any) -> list[tuple[str, str]]:
    return [(str(c.get("system")), str(c.get("code"))) for c in (concept or {}).get("coding") or []]


def _codes(concept: Any) -> set[str]:
    return {code for _, code in _codings(concept)}


def _text(concept: Any) -> str | None:
    """A CodeableConcept in words; what it is called, not its code."""
    coding: dict[str, Any] = next(iter((concept or {}).get("coding") or []), {})
    return (concept or {}).get("text") or coding.get("display") or coding.get("code")


def _value(node: dict[str, Any]) -> Any:
    """``value[x]`` of an answer or an observation as a plain value; None where there is none."""
    for name in ("valueBoolean", "valueString", "valueInteger", "valueDecimal"):
        if name in node:
            return node[name]
    if "valueQuantity" in node:
        return node["valueQuantity"].get("value")
    concept = node.get("valueCodeableConcept") or {"coding": [node["valueCoding"]] if "valueCoding" in node else []}
    for coding in _codings(concept):
        if coding in ANSWERS:
            return ANSWERS[coding]
    own = [code for system, code in _codings(concept) if system.startswith(BASE)]
    return own[0] if own else _text(concept)


def _date(resource: dict[str, Any]) -> str:
    return next((str(resource[name])[:10] for name in DATES if resource.get(name)), "")
