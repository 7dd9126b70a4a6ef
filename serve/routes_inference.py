"""Images to findings, findings and patients to pathways, both in one call, and why."""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from dermaflow.datasets.images import ImageProblem, dimensions
from serve.bodies import content_type, parts, read_json
from serve.errors import Refused, too_large
from serve.ingress import Service, body_of, needs, service_of, visit_of
from serve.schemas import (
    AssessRequest,
    AssessResponse,
    ClassifyRequest,
    ClassifyResponse,
    ExplainRequest,
    ExplainResponse,
    RecommendRequest,
    RecommendResponse,
)

router = APIRouter(prefix="/v1", tags=["inference"])

MAX_ID = 200
_FORM = {
    "type": "object", "required": ["images"],
    "properties": {"images": {"type": "array", "minItems": 1,
                              "items": {"type": "string", "contentMediaType": "application/octet-stream"}}},
}  # fmt: skip


@router.post("/classify", operation_id="classify", dependencies=[needs("classify")], response_model=ClassifyResponse,
             openapi_extra=body_of(ClassifyRequest, form=_FORM))  # fmt: skip
async def classify(request: Request) -> Response:
    """Findings of images, one each, in their order. An image that cannot be read is a finding with its reason.

    As a form, an image's id is its file name without suffix.
    """
    service = service_of(request)
    limits = service.options.limits
    if content_type(request) == "application/json":
        body = await read_json(request, ClassifyRequest, limits.body, limits.idle)
        images = [image.data for image in body.images]
        image_ids, lesion_ids = [i.image_id for i in body.images], [i.lesion_id for i in body.images]
    else:
        images, image_ids = await _form_images(request, service)
        lesion_ids = [None] * len(images)
    answer = await _classified(request, images, image_ids, lesion_ids)
    return _json(_joined(model=_dump(answer["model"]), findings=answer["findings"]))


@router.post("/recommend", operation_id="recommend", dependencies=[needs("recommend")],
             response_model=RecommendResponse, openapi_extra=body_of(RecommendRequest))  # fmt: skip
async def recommend(request: Request) -> Response:
    """Pathways of lesions, from what is known of the person and what the model said of the images."""
    service = service_of(request)
    limits = service.options.limits
    body = await read_json(request, RecommendRequest, limits.body, limits.idle)
    _count(len(body.cases), limits.cases, "cases")
    models = {finding.model_sha256 for case in body.cases for finding in case.findings}
    if len(models) > 1:
        raise Refused(422, "invalid", f"findings of {len(models)} models", expected="one model in a request")
    facts = await service.model()
    sha256 = models.pop() if models else facts["sha256"]
    thresholds = await service.thresholds(sha256)
    visit_of(request).model = facts["version"]
    pathways = await _recommended(
        request, body.model_dump_json(exclude_unset=True).encode(), thresholds, len(body.cases)
    )
    return _json(_joined(model=_dump({key: facts[key] for key in ("name", "version", "sha256")}), pathways=pathways))


@router.post("/assess", operation_id="assess", dependencies=[needs("classify", "recommend")],
             response_model=AssessResponse, openapi_extra=body_of(AssessRequest))  # fmt: skip
async def assess(request: Request) -> Response:
    """Images and patients in, findings and pathways out."""
    service = service_of(request)
    limits = service.options.limits
    body = await read_json(request, AssessRequest, limits.body, limits.idle)
    _count(len(body.cases), limits.cases, "cases")
    rows = [(image.data, image.image_id, case.lesion.lesion_id) for case in body.cases for image in case.images]
    answer = await _classified(request, [r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows])
    findings = iter(json.loads(answer["findings"]))
    cases = [
        {"patient": case.patient.model_dump(exclude_unset=True), "lesion": case.lesion.model_dump(exclude_unset=True),
         "findings": [next(findings) for _ in case.images]}
        for case in body.cases
    ]  # fmt: skip
    pathways = await _recommended(request, _dump({"cases": cases}), answer["thresholds"], len(cases))
    return _json(_joined(model=_dump(answer["model"]), findings=answer["findings"], pathways=pathways))


@router.post("/explain", operation_id="explain", dependencies=[needs("classify")], response_model=ExplainResponse,
             openapi_extra=body_of(ExplainRequest))  # fmt: skip
async def explain(request: Request) -> Response:
    """Where the model looked, and which training lesions look alike."""
    limits = service_of(request).options.limits
    body = await read_json(request, ExplainRequest, limits.body, limits.idle)
    return await explained(request, body.image.data, body.image.image_id, body.diagnosis)


async def explained(request: Request, image: bytes, image_id: str, diagnosis: str | None) -> Response:
    """The explanation of one image, as an answer."""
    service, visit = service_of(request), visit_of(request)
    _measure(service, [image])
    answer = await service.backend.explain(image, image_id, diagnosis)
    visit.model, visit.counts = answer["model"]["version"], {"images": 1}
    overlay = None if answer["overlay"] is None else base64.b64encode(answer["overlay"]).decode()
    return _json(_joined(
        model=_dump(answer["model"]), finding=answer["finding"], diagnosis=_dump(answer["diagnosis"]),
        overlay=_dump(overlay), neighbours=_dump(answer["neighbours"]),
    ))  # fmt: skip


async def _classified(
    request: Request, images: list[bytes], image_ids: list[str], lesion_ids: Sequence[str | None]
) -> dict[str, Any]:
    service, visit = service_of(request), visit_of(request)
    _measure(service, images)
    answer = await service.backend.classify(images, image_ids, list(lesion_ids))
    service.heard(answer["model"], answer["thresholds"])
    counts = Counter(answer["statuses"])
    visit.model, visit.counts = answer["model"]["version"], {"images": len(images), **counts}
    for status, count in counts.items():
        service.metrics.images.labels(status).inc(count)
    service.metrics.batch.observe(answer["together"])
    return answer


async def _recommended(request: Request, body: bytes, thresholds: dict[str, float], cases: int) -> bytes:
    service, visit = service_of(request), visit_of(request)
    answer = await service.backend.recommend(body, thresholds)
    if problem := answer.get("problem"):
        raise Refused(422, "invalid", problem["what"], expected=problem["expected"], todo=problem["todo"])
    visit.counts = {**visit.counts, "cases": cases}
    for urgency, count in Counter(answer["urgencies"]).items():
        service.metrics.pathways.labels(urgency).inc(count)
    return answer["pathways"]  # type: ignore[no-any-return]


def _measure(service: Service, images: Sequence[bytes]) -> None:
    """Refuse what would cost too much, from the headers of the images alone."""
    limits = service.options.limits
    _count(len(images), limits.images, "images")
    pixels = 0
    for image in images:
        if len(image) > limits.image:
            raise too_large("an image", limits.image)
        try:
            width, height = dimensions(image)
        except ImageProblem:
            continue  # the finding will say so, and nothing is decoded
        pixels += width * height
    if pixels > limits.pixels:
        raise too_large("the pixels of all images together", limits.pixels, "pixels")


def _count(found: int, limit: int, what: str) -> None:
    if found > limit:
        raise too_large(f"the number of {what}", limit, what)


async def _form_images(request: Request, service: Service) -> tuple[list[bytes], list[str]]:
    """The files of the fields ``images``."""
    limits = service.options.limits
    images: list[bytes] = []
    names: list[str] = []
    pieces: list[bytes] = []
    size = 0
    async for part, piece in parts(request, limits.body, limits.idle):
        if part.name != "images" or part.filename is None:
            raise Refused(422, "form", "a field that is not known", expected="files in the field images")
        if piece is not None:
            size += len(piece)
            if size > limits.image:
                raise too_large("an image", limits.image)
            pieces.append(piece)
            continue
        _count(len(images) + 1, limits.images, "images")
        images.append(b"".join(pieces))
        names.append(part.filename)
        pieces, size = [], 0
    if not images:
        raise Refused(422, "form", "no image", expected="at least one file in the field images")
    return images, ids_of(names)


def ids_of(names: Sequence[str]) -> list[str]:
    """Ids from file names: without folder and suffix, each once, printable."""
    found: list[str] = []
    seen: Counter[str] = Counter()
    for name in names:
        plain = "".join(c for c in PurePath(name.replace("\\", "/")).stem if c.isprintable())[: MAX_ID - 8] or "image"
        seen[plain] += 1
        found.append(plain if seen[plain] == 1 else f"{plain}-{seen[plain]}")
    if len(set(found)) != len(found):  # somebody calls a file "a-2" beside two that are called "a"
        found = [f"{plain}-{place}" for place, plain in enumerate(found, 1)]
    return found


def _dump(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def _joined(**parts: bytes) -> bytes:
    """An object of parts that are JSON already: findings come as bytes and leave as they are."""
    return b"{" + b",".join(b'"%s":%s' % (name.encode(), part) for name, part in parts.items()) + b"}"


def _json(content: bytes) -> Response:
    return Response(content, media_type="application/json")
