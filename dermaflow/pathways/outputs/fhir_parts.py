"""The FHIR resources that say what was measured, of whom and with what; `fhir` adds what should follow from it."""

from __future__ import annotations

from typing import Any

from dermaflow.pathways.outputs.identity import BASE, stable_id
from dermaflow.schemas.pathway import Line, Pathway, Versions
from dermaflow.schemas.patient import Lesion
from dermaflow.taxonomy import DIAGNOSES

Resource = dict[str, Any]
_NAMES = {diagnosis.code: diagnosis.name for diagnosis in DIAGNOSES}


def code(system: str, value: str, display: str) -> Resource:
    """A Coding of one of our own code systems."""
    return {"system": f"{BASE}/CodeSystem/{system}", "code": value, "display": display}


def code_text(system: str, value: str, text: str) -> Resource:
    """A CodeableConcept of one of our own code systems."""
    return {"coding": [code(system, value, text)], "text": text}


def ref(resource: Resource) -> Resource:
    """A Reference to a resource of the same Bundle."""
    return {"reference": f"urn:uuid:{resource['id']}", "type": resource["resourceType"]}


def cited(line: Line) -> str:
    """A sentence with its rule, source and how far the source was verified."""
    return f"{line.text} [{line.rule}; {line.source}; {line.verification}]"


def rule_address(line: Line) -> str:
    """The address of a rule."""
    return f"{BASE}/rule/{line.rule}"


def patient_identifier(patient_id: str) -> Resource:
    """The id that the sender gave a person."""
    return {"system": f"{BASE}/patient-id", "value": patient_id}


def patient(patient_id: str) -> Resource:
    """The person by id only: the receiver knows the rest."""
    return {
        "resourceType": "Patient",
        "id": stable_id(patient_id, "patient"),
        "identifier": [patient_identifier(patient_id)],
    }


def device(versions: Versions) -> Resource:
    """Model, knowledge base and program, each with its version; thresholds as properties."""
    version = [
        ("model", f"{versions.model} {versions.model_sha256}"),
        ("knowledge-base", f"{versions.knowledge_base} {versions.knowledge_sha256}"),
        ("dermaflow", versions.dermaflow),
    ]
    thresholds = sorted(versions.thresholds.items())
    return {
        "resourceType": "Device",
        "id": stable_id(versions.model_dump_json(), "device"),
        "status": "active",
        "manufacturer": "DermaFlow",
        "deviceName": [{"name": f"DermaFlow with model {versions.model}", "type": "model-name"}],
        "type": {"coding": [code("device", "decision-support", "Decision support software")]},
        "version": [{"type": {"coding": [code("version", name, name)]}, "value": value} for name, value in version],
        "property": [
            {"type": {"coding": [code("threshold", name, name)]}, "valueQuantity": [{"value": round(value, 6)}]}
            for name, value in thresholds
        ],
        "note": [{"text": "Research and education only; not cleared for clinical use."}],
    }


def body_structure(key: tuple[str, ...], pathway: Pathway, subject: Resource, lesion: Lesion | None) -> Resource:
    """The lesion."""
    structure: Resource = {
        "resourceType": "BodyStructure",
        "id": stable_id(*key[:2], "lesion"),
        "identifier": [{"system": f"{BASE}/lesion-id", "value": pathway.lesion_id}],
        "patient": subject,
    }
    if lesion and lesion.site != "unknown":
        structure["location"] = {"coding": [code("site", lesion.site.replace(" ", "-"), lesion.site)]}
    return structure


def observation(
    key: tuple[str, ...], pathway: Pathway, subject: Resource, structure: Resource, device: Resource, time: str
) -> Resource:
    """What the pictures gave: whether they can be assessed, the conformal set, quality flags, p of malignancy."""

    def component(name: str, text: str, **value: Any) -> Resource:
        return {"code": {"coding": [code("finding", name, text)]}, **value}

    shown = pathway.assessable and bool(pathway.probabilities)
    components = [component("assessable", "Can be assessed", valueBoolean=pathway.assessable)]
    components.append(component("basis", "Basis of the pathway", valueString=pathway.basis))
    if shown:
        components += [
            component("conformal-set", "In the conformal set",
                      valueCodeableConcept={"coding": [code("class", member, _NAMES[member])]})
            for member in pathway.conformal_set
        ]  # fmt: skip
        components.append(component("set-size", "Size of the conformal set", valueInteger=len(pathway.conformal_set)))
    if shown and pathway.p_malignant is not None:
        quantity = {"value": round(pathway.p_malignant, 6), "system": "http://unitsofmeasure.org", "code": "1"}
        components.append(component("p-malignant", "Estimated probability of malignancy", valueQuantity=quantity))
    components += [component("quality-flag", "Picture quality", valueString=flag) for flag in pathway.quality_flags]
    components += [component("image", "Image", valueString=image) for image in pathway.image_ids]
    return {
        "resourceType": "Observation",
        "id": stable_id(*key, "observation"),
        "status": {"preliminary": "preliminary", "final": "final", "rejected": "cancelled"}[pathway.status],
        "code": {"coding": [code("finding", "image-finding", "What a model says of pictures of a skin lesion")]},
        "subject": subject,
        "focus": [ref(structure)],
        "effectiveDateTime": time,
        "device": ref(device),
        "component": components,
    }


def risk_assessment(
    key: tuple[str, ...], pathway: Pathway, subject: Resource, observation: Resource, device: Resource, time: str
) -> Resource:
    """Calibrated probabilities of the seven classes; none where the pictures cannot be assessed."""
    shown = pathway.probabilities if pathway.assessable else {}
    risk: Resource = {
        "resourceType": "RiskAssessment",
        "id": stable_id(*key, "risk"),
        "status": {"preliminary": "preliminary", "final": "final", "rejected": "cancelled"}[pathway.status],
        "method": {"coding": [code("method", "calibrated-classifier", "Calibrated image classifier")]},
        "subject": subject,
        "occurrenceDateTime": time,
        "performer": ref(device),
        "basis": [ref(observation)],
        "prediction": [
            {
                "outcome": {"coding": [code("class", name, _NAMES[name])], "text": _NAMES[name]},
                "probabilityDecimal": round(p, 6),
            }
            for name, p in shown.items()
        ],
        "note": [{"text": "Estimated from pictures; does not rule out cancer."}],
    }
    if not shown:
        risk["note"] = [{"text": "No probabilities: the pictures cannot be assessed or there are none."}]
    return risk


def provenance(
    identity: str, targets: list[Resource], time: str, role: str, who: Resource, entities: dict[str, str]
) -> Resource:
    """Who or what made the targets, from what."""
    participant = "http://terminology.hl7.org/CodeSystem/provenance-participant-type"
    return {
        "resourceType": "Provenance",
        "id": identity,
        "target": [ref(target) for target in targets],
        "recorded": time,
        "agent": [{"type": {"coding": [{"system": participant, "code": role}]}, "who": who}],
        "entity": [
            {"role": "source", "what": {"identifier": {"value": value}, "display": name}}
            for name, value in entities.items()
        ],
    }
