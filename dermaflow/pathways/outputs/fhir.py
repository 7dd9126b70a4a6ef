"""One person's pathways as a FHIR R4B Bundle, validated by ``fhir.resources``.

Source: HL7 FHIR 4.3.0, https://hl7.org/fhir/R4B/. Only elements that R4 and R4B share are written. Everything is
preliminary, a proposal or a draft until a clinician signs. Codes are our own, except that a histology that a clinician
signed for is written in SNOMED CT too: a picture never makes a diagnosis.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from fhir.resources.R4B.bundle import Bundle

from dermaflow.pathways.outputs import fhir_parts as parts
from dermaflow.pathways.outputs.fhir_parts import Resource, code, code_text, ref
from dermaflow.pathways.outputs.identity import BASE, pathway_key, stable_id
from dermaflow.pathways.outputs.reading import most_urgent_first, overtaken
from dermaflow.schemas.pathway import URGENCY_TEXT, Option, Pathway, Urgency
from dermaflow.schemas.patient import Lesion

REVIEW_DAYS: dict[Urgency, int] = {"U1": 1, "U2": 7, "U3": 14, "U4": 28, "U5": 28}
"""Days until a clinician should have looked at it. No guideline says this: a site sets its own."""

REFERRAL_GROUPS = ("referral", "diagnostic", "surgery")
HISTOLOGY_SNOMED: dict[str, tuple[str, str]] = {
    "mel": ("93655004", "Malignant melanoma of skin"),
    "bcc_superficial": ("254701007", "Basal cell carcinoma of skin"),
    "bcc_nodular": ("254701007", "Basal cell carcinoma of skin"),
    "bcc_infiltrative": ("254701007", "Basal cell carcinoma of skin"),
    "bcc_other": ("254701007", "Basal cell carcinoma of skin"),
    "ak": ("201101007", "Actinic keratosis"),
    "scc": ("254651007", "Squamous cell carcinoma of skin"),
}
"""Only codes that published sources agree on. Seborrhoeic keratosis, dermatofibroma and others are disputed or
unverified and stay out; a site checks all of them on its terminology server."""

RESEARCH = {"system": f"{BASE}/CodeSystem/use", "code": "research", "display": "Research and education only"}


def patient_bundle(
    pathways: Sequence[Pathway], *, recorded: datetime, lesions: Mapping[str, Lesion] | None = None
) -> Bundle:
    """The Bundle (type ``collection``) of one person.

    Args:
        pathways: All of one person.
        recorded: When they were computed, with time zone. With the same time, the same pathways give the same bytes.
        lesions: What was known of each lesion, by its id: adds the place on the body and the histology.

    Returns:
        A validated Bundle. Ids depend on person, lesion, model and knowledge base alone.

    Raises:
        ValueError: The pathways are of several people or there is none, or the time has no zone.
    """
    [patient_id] = {pathway.patient_id for pathway in pathways}
    if recorded.tzinfo is None:
        raise ValueError("recorded needs a time zone")
    time = recorded.astimezone(UTC).isoformat(timespec="seconds")
    patient = parts.patient(patient_id)
    resources: dict[str, Resource] = {patient["id"]: patient}
    for pathway in sorted(pathways, key=most_urgent_first):
        lesion = (lesions or {}).get(pathway.lesion_id)
        resources |= {r["id"]: r for r in _resources(pathway, patient, lesion, recorded, time)}
    content = {
        "resourceType": "Bundle",
        "id": stable_id(patient_id, "bundle", *sorted("/".join(pathway_key(p)) for p in pathways)),
        "meta": {"tag": [RESEARCH]},
        "type": "collection",
        "timestamp": time,
        "entry": [{"fullUrl": f"urn:uuid:{key}", "resource": filled(resource)} for key, resource in resources.items()],
    }
    return Bundle.model_validate_json(json.dumps(content))


def service_request(pathway: Pathway) -> Resource | None:
    """The proposal to refer, without the references that only hold in a Bundle; None for U4 and U5."""
    if pathway.urgency not in ("U1", "U2", "U3"):
        return None
    accepted = _accepted(pathway)
    first = next((o for o in pathway.options if o.group in REFERRAL_GROUPS and o.status == "available"), None)
    what = first.title if first else URGENCY_TEXT[pathway.urgency]
    return {
        "resourceType": "ServiceRequest",
        "id": stable_id(*pathway_key(pathway), "request"),
        "status": "revoked" if pathway.status == "rejected" else "active" if accepted else "draft",
        "intent": "order" if accepted else "proposal",
        "priority": "urgent" if pathway.urgency == "U1" else "routine",
        "code": {"coding": [code("option", first.option, first.title)] if first else [], "text": what},
        "reasonCode": [code_text("urgency", pathway.urgency, f"{pathway.urgency} {URGENCY_TEXT[pathway.urgency]}")],
        "note": [{"text": parts.cited(line)} for line in (first.offered_by if first else [])]
        + [{"text": f"Urgency from rules {', '.join(pathway.urgency_rules) or '-'}"}],
    }


def filled(content: Any) -> Any:
    """The same without empty texts, lists and objects, which FHIR does not allow."""
    if isinstance(content, dict):
        parts = {name: filled(part) for name, part in content.items()}
        return {name: part for name, part in parts.items() if part not in ("", None) and part != [] and part != {}}
    if isinstance(content, list):
        return [part for part in map(filled, content) if part not in ("", None) and part != [] and part != {}]
    return content


def _resources(
    pathway: Pathway, patient: Resource, lesion: Lesion | None, recorded: datetime, time: str
) -> Iterable[Resource]:
    key = pathway_key(pathway)
    subject = ref(patient)
    device = parts.device(pathway.versions)
    structure = parts.body_structure(key, pathway, subject, lesion)
    observation = parts.observation(key, pathway, subject, structure, device, time)
    risk = parts.risk_assessment(key, pathway, subject, observation, device, time)
    report = _report(key, pathway, subject, observation, risk, lesion, time)
    plan = _care_plan(key, pathway, subject, risk, device, time)
    made = [structure, observation, risk, report]
    request = service_request(pathway)
    if request is not None:
        requester = _signer(pathway) or ref(device)
        made.append(request | {"subject": subject, "authoredOn": time, "requester": requester,
                               "reasonReference": [ref(report)], "supportingInfo": [ref(risk)]})  # fmt: skip
    issues = [_issue(key, pathway, option, subject, device, time) for option in pathway.options
              if option.status == "blocked" and not overtaken(option)]  # fmt: skip
    made += [plan, *issues, _task(key, pathway, subject, report, recorded, time)]
    return [device, *made, *_provenance(key, pathway, made, device, time)]


def _report(
    key: tuple[str, ...], pathway: Pathway, subject: Resource, observation: Resource, risk: Resource,
    lesion: Lesion | None, time: str,
) -> Resource:  # fmt: skip
    status = {"preliminary": "preliminary", "final": "final", "rejected": "cancelled"}[pathway.status]
    report = {
        "resourceType": "DiagnosticReport",
        "id": stable_id(*key, "report"),
        "extension": [
            {"url": "http://hl7.org/fhir/StructureDefinition/diagnosticReport-risk", "valueReference": ref(risk)}
        ],
        "status": status,
        "code": code_text("report", "pathway", "Decision support for a skin lesion, by dermoscopy"),
        "subject": subject,
        "effectiveDateTime": time,
        "issued": time,
        "result": [ref(observation)],
        "conclusion": f"{_signed_text(pathway)} {pathway.urgency} {URGENCY_TEXT[pathway.urgency]} "
        f"(rules {', '.join(pathway.urgency_rules) or '-'}). " + " ".join(map(parts.cited, pathway.notices)),
    }
    histology = lesion.histology if lesion else "unknown"
    if pathway.status == "final" and pathway.basis == "histology" and histology in HISTOLOGY_SNOMED:
        value, display = HISTOLOGY_SNOMED[histology]
        coding = {"system": "http://snomed.info/sct", "code": value, "display": display}
        report["conclusionCode"] = [{"coding": [coding, code("histology", histology, histology)], "text": display}]
    if signer := _signer(pathway):
        report["resultsInterpreter"] = [signer]
    return report


def _care_plan(
    key: tuple[str, ...], pathway: Pathway, subject: Resource, risk: Resource, device: Resource, time: str
) -> Resource:
    accepted = _accepted(pathway)  # what was edited stands in words that only a person can read: still a draft
    follow_up = [
        {"detail": {"status": "not-started", "description": parts.cited(line),
                    "instantiatesUri": [parts.rule_address(line)]}}
        for line in pathway.follow_up
    ]  # fmt: skip
    return {
        "resourceType": "CarePlan",
        "id": stable_id(*key, "plan"),
        "status": "revoked" if pathway.status == "rejected" else "active" if accepted else "draft",
        "intent": "plan" if accepted else "proposal",
        "title": f"Options and follow-up for lesion {pathway.lesion_id}",
        "subject": subject,
        "created": time,
        "author": ref(device),
        "supportingInfo": [ref(risk)],
        "activity": [{"detail": _option(option)} for option in pathway.options] + follow_up,
        "note": [{"text": f"Unknown and would matter: {m.question} ({', '.join(m.rules)})"} for m in pathway.missing]
        + [{"text": f"Draft for the shared decision, a clinician edits it before use ({name}): {text}"}
           for name, text in pathway.patient_texts.items()],
    }  # fmt: skip


def _option(option: Option) -> Resource:
    why = " ".join(map(parts.cited, option.restrictions))
    if option.confirm:
        why = f"Confirm first: {', '.join(option.confirm)}. {why}".strip()
    lines = [*option.offered_by, *option.restrictions]
    return {
        "instantiatesUri": list(dict.fromkeys(map(parts.rule_address, lines))),
        "code": code_text("option", option.option, option.title),
        "status": "on-hold" if option.status == "locked" else "not-started",
        "statusReason": code_text("option-status", option.status, f"{option.status}: {why}" if why else option.status),
        "doNotPerform": option.status == "blocked",
        "description": " ".join(map(parts.cited, option.offered_by)) or option.title,
    }


def _issue(
    key: tuple[str, ...], pathway: Pathway, option: Option, subject: Resource, device: Resource, time: str
) -> Resource:
    return {
        "resourceType": "DetectedIssue",
        "id": stable_id(*key, "issue", option.option),
        "status": {"preliminary": "preliminary", "final": "final", "rejected": "cancelled"}[pathway.status],
        "code": code_text("issue", "contraindication", "Contraindication"),
        "severity": "high",
        "patient": subject,
        "identifiedDateTime": time,
        "author": ref(device),
        "implicated": [{"display": option.title, "reference": f"urn:uuid:{stable_id(*key, 'plan')}"}],
        "detail": f"{option.title} is blocked: " + " ".join(map(parts.cited, option.restrictions)),
    }


def _task(
    key: tuple[str, ...], pathway: Pathway, subject: Resource, report: Resource, recorded: datetime, time: str
) -> Resource:
    due = (recorded.astimezone(UTC) + timedelta(days=REVIEW_DAYS[pathway.urgency])).isoformat(timespec="seconds")
    task = {
        "resourceType": "Task",
        "id": stable_id(*key, "task"),
        "status": "requested" if pathway.sign_off is None else "completed",
        "businessStatus": {"text": pathway.status},
        "intent": "order",  # to look at it; not to do what it proposes
        "priority": "urgent" if pathway.urgency == "U1" else "routine",
        "code": code_text("task", "review", "Review and sign the pathway"),
        "description": "Accept, edit or reject. Until then nothing is ordered.",
        "focus": ref(report),
        "for": subject,
        "authoredOn": time,
        "lastModified": pathway.sign_off.at if pathway.sign_off else time,
        "performerType": [{"text": "clinician"}],
        "restriction": {"period": {"start": time, "end": due}},
    }
    if signer := _signer(pathway):
        task["owner"] = signer
    return task


def _provenance(
    key: tuple[str, ...], pathway: Pathway, targets: list[Resource], device: Resource, time: str
) -> list[Resource]:
    versions = pathway.versions
    computed = parts.provenance(
        stable_id(*key, "provenance"), targets, time, "assembler", ref(device),
        entities={f"model {versions.model}": versions.model_sha256 or "none",
                  "knowledge-base": versions.knowledge_sha256, **{f"image {i}": i for i in pathway.image_ids}},
    )  # fmt: skip
    sign_off, signer = pathway.sign_off, _signer(pathway)
    if sign_off is None or signer is None:
        return [computed]
    signed = parts.provenance(
        stable_id(*key, "sign-off", sign_off.at, sign_off.decision), targets, sign_off.at, "verifier", signer,
        entities={},
    )  # fmt: skip
    signed["activity"] = code_text("decision", sign_off.decision, sign_off.decision)
    if sign_off.reason:
        signed["reason"] = [{"text": sign_off.reason}]
    return [computed, signed]


def _signed_text(pathway: Pathway) -> str:
    sign_off = pathway.sign_off
    if sign_off is None:
        return "PRELIMINARY, no clinician has signed."
    return f"{sign_off.decision.upper()} by {sign_off.by}" + (f": {sign_off.reason}." if sign_off.reason else ".")


def _accepted(pathway: Pathway) -> bool:
    return pathway.sign_off is not None and pathway.sign_off.decision == "accepted"


def _signer(pathway: Pathway) -> Resource | None:
    return {"type": "Practitioner", "display": pathway.sign_off.by} if pathway.sign_off else None
