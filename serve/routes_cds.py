"""CDS Hooks 2.0: what a health record asks while a clinician works.

Source: HL7 CDS Hooks 2.0, https://cds-hooks.hl7.org/2.0/.
"""

from __future__ import annotations

import asyncio
import json
import os
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request

from dermaflow.errors import DataError, DermaflowError
from dermaflow.pathways.outputs.cards import SERVICE, cards, discovery
from dermaflow.schemas.pathway import Pathway
from serve import results
from serve.bodies import read_json
from serve.errors import Refused, of_library
from serve.ingress import Service, body_of, needs, service_of, visit_of
from serve.schemas import CaseIn, CdsFeedback, CdsRequest

router = APIRouter(prefix="/cds-services", tags=["cds-hooks"])

MAX_JSON = 8 << 20
SEARCHED = 50  # newest finished batches in which a person is looked for
MAX_LESIONS = 100  # of one person


@router.get("", operation_id="cds_discovery")
async def services() -> dict[str, Any]:
    """The services there are, one a hook."""
    return discovery()


@router.post(
    "/{service_id}", operation_id="cds_call", dependencies=[needs("recommend")], openapi_extra=body_of(CdsRequest)
)
async def call(request: Request, service_id: str) -> dict[str, Any]:
    """Cards of one person: from what the record says now where it sends lesions, and what was found in their images.

    A person whom no batch knows and whose record names no lesion gets no card.
    """
    hook = _hook(service_id)
    service = service_of(request)
    body = await read_json(request, CdsRequest, MAX_JSON, service.options.limits.idle)
    if body.hook != hook:
        raise Refused(400, "hook", "the hook is not the one of this service", expected=hook)
    patient = body.context.get("patientId")
    if not isinstance(patient, str) or not 0 < len(patient) <= 200:
        raise Refused(400, "context", "no patient", expected="context.patientId")
    stored = await asyncio.to_thread(_stored, service, patient)
    pathways = list(stored.values())
    if body.prefetch:
        cases = await asyncio.to_thread(_cases, body.prefetch, patient)
        if cases:
            pathways = await _anew(service, cases, stored)
    visit_of(request).counts = {"cards": len(pathways)}
    return {"cards": [card.model_dump(exclude_none=True) for card in cards(pathways, f"Patient/{patient}")]}


@router.post("/{service_id}/feedback", operation_id="cds_feedback", dependencies=[needs("recommend")],
             openapi_extra=body_of(CdsFeedback))  # fmt: skip
async def feedback(request: Request, service_id: str) -> dict[str, Any]:
    """What became of a card: kept without the words of the clinician, which may name a person."""
    _hook(service_id)
    service = service_of(request)
    body = await read_json(request, CdsFeedback, MAX_JSON, service.options.limits.idle)
    await asyncio.to_thread(_keep, service, body)
    return {}


def _hook(service_id: str) -> str:
    for known in discovery()["services"]:
        if known["id"] == service_id:
            return str(known["hook"])
    raise Refused(404, "no_service", "there is no such service", expected=f"{SERVICE}-…, see GET /cds-services")


def _stored(service: Service, patient: str) -> dict[str, Pathway]:
    """The newest pathway of each lesion of a person."""
    found: dict[str, Pathway] = {}
    for job in service.jobs.list(("finished",), limit=SEARCHED):
        for pathway in results.patient_pathways(job.out, patient):
            found.setdefault(pathway.lesion_id, pathway)
    return found


def _cases(prefetch: dict[str, Any], patient: str) -> list[Any]:
    """What the record says of the person and their lesions; empty where it names no lesion."""
    from dermaflow.pathways.intake import cases_of
    from dermaflow.pathways.intake_fhir import rows_from_bundle

    resources: dict[str, dict[str, Any]] = {}
    for content in prefetch.values():
        if not isinstance(content, dict):
            continue
        entries = content.get("entry") if content.get("resourceType") == "Bundle" else [{"resource": content}]
        for entry in entries if isinstance(entries, list) else []:
            resource = entry.get("resource") if isinstance(entry, dict) else None
            if isinstance(resource, dict):
                resources[f"{resource.get('resourceType')}/{resource.get('id')}"] = resource
    if not any(key.startswith("BodyStructure/") for key in resources):
        return []
    bundle = {"resourceType": "Bundle", "type": "collection",
              "entry": [{"fullUrl": key, "resource": resource} for key, resource in resources.items()]}  # fmt: skip
    today = datetime.now(UTC).date()
    try:
        found = cases_of(rows_from_bundle(bundle, where="prefetch", as_of=today), where="prefetch", as_of=today)
    except DataError as error:
        raise of_library(error) from None
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        raise Refused(422, "prefetch", "the prefetched resources are no valid FHIR R4") from None
    if len(found) > MAX_LESIONS:
        raise Refused(413, "too_large", "too many lesions", expected=f"at most {MAX_LESIONS}")
    return [case for case in found if case.patient.patient_id == patient]


async def _anew(service: Service, cases: list[Any], stored: dict[str, Pathway]) -> list[Pathway]:
    """Pathways from what the record says, with what was found in the images of the same lesions."""
    findings = await asyncio.to_thread(_findings, service, [case.lesion.lesion_id for case in cases])
    by_model: dict[str, list[CaseIn]] = {}
    facts = await service.model()
    pathways = []
    for case in cases:
        own, sha256 = findings.get(case.lesion.lesion_id, ([], facts["sha256"]))
        before = stored.get(case.lesion.lesion_id)
        if before is not None and before.sign_off is not None:
            pathways.append(before)  # what a clinician has signed stands
            continue
        made = CaseIn.model_validate({"patient": case.patient.model_dump(), "lesion": case.lesion.model_dump(),
                                      "findings": own})  # fmt: skip
        by_model.setdefault(sha256, []).append(made)
    for sha256, group in by_model.items():
        body = json.dumps({"cases": [case.model_dump(mode="json") for case in group]}).encode()
        try:
            thresholds = await service.thresholds(sha256)
        except Refused:  # of a model that is not in use any more: the strictest there are
            thresholds = {**facts["thresholds"], "mel": 0.10, "malignant": 0.10, "entropy": 1.0}
        answer = await service.backend.recommend(body, thresholds)
        if problem := answer.get("problem"):
            raise Refused(422, "invalid", problem["what"])
        pathways += [Pathway.model_validate(one) for one in json.loads(answer["pathways"])]
    return pathways


def _findings(service: Service, lesion_ids: list[str]) -> dict[str, tuple[list[dict[str, Any]], str]]:
    """The newest findings of lesions, and the model that made them."""
    found: dict[str, tuple[list[dict[str, Any]], str]] = {}
    for job in service.jobs.list(("finished",), limit=SEARCHED):
        for lesion_id in lesion_ids:
            if lesion_id in found:
                continue
            try:
                own = results.lesion_findings(job.out, lesion_id)
            except (DermaflowError, OSError):
                continue
            rows = [{**finding.model_dump(), "lesion_id": lesion_id} for finding in own]
            found[lesion_id] = rows, own[0].model_sha256
    return found


def _keep(service: Service, body: CdsFeedback) -> None:
    lines = b""
    for item in body.feedback:
        reason = (item.overrideReason or {}).get("reason") or {}
        code = reason.get("code") if isinstance(reason, dict) else None
        record = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "card": item.card, "outcome": item.outcome,
                  "reason": code if isinstance(code, str) and len(code) <= 100 else None}  # fmt: skip
        lines += json.dumps(record).encode() + b"\n"
    file = os.open(service.audit.path.with_name("cds-feedback.jsonl"), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
    try:
        os.write(file, lines)
    finally:
        os.close(file)
