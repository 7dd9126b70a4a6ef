"""What the service is: health, figures, the model, and what may be known of a person and a lesion."""

from __future__ import annotations

import asyncio
from functools import lru_cache
from typing import Any, get_args, get_origin

from fastapi import APIRouter, Request
from fastapi.responses import Response

from dermaflow.schemas.patient import Lesion, Patient, YesNo
from serve.errors import busy
from serve.ingress import needs, service_of, visit_of
from serve.schemas import FieldsResponse, Health, ModelResponse

router = APIRouter(tags=["service"])

_UNITS = {"age": "years", "diameter_mm": "mm", "duration_months": "months", "breslow_mm": "mm"}


@router.get("/healthz", operation_id="healthz")
async def healthz() -> Health:
    """Whether the ingress lives."""
    return Health(status="ok")


@router.get("/readyz", operation_id="readyz")
async def readyz(request: Request) -> Health:
    """Whether a model is loaded and answers."""
    try:
        async with asyncio.timeout(5):
            await service_of(request).model()
    except TimeoutError:
        raise busy("the model does not answer yet", retry_after=5) from None
    return Health(status="ok")


@router.get("/metrics", operation_id="metrics", dependencies=[needs("metrics")],
            responses={200: {"content": {"text/plain": {}}}}, response_class=Response)  # fmt: skip
async def metrics(request: Request) -> Response:
    """Figures for Prometheus."""
    service = service_of(request)
    for state, count in (await asyncio.to_thread(service.jobs.counts)).items():
        service.metrics.batches.labels(state).set(count)
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/v1/model", operation_id="get_model", dependencies=[needs()])
async def model(request: Request) -> ModelResponse:
    """The model in use: version, figures, thresholds, card."""
    facts = await service_of(request).model()
    visit_of(request).model = facts["version"]
    metrics = facts["metrics"] and {name: _figure(value) for name, value in facts["metrics"].items()}
    return ModelResponse.model_validate({**facts, "metrics": metrics})


@router.get("/v1/fields", operation_id="get_fields", dependencies=[needs()])
async def fields() -> FieldsResponse:
    """What may be known of a person and a lesion, with the values that are understood."""
    return _fields()


def _figure(value: float) -> float | None:
    return value if value == value else None  # JSON has no NaN


@lru_cache(1)
def _fields() -> FieldsResponse:
    return FieldsResponse.model_validate({"patient": _of(Patient, "patient"), "lesion": _of(Lesion, "lesion")})


def _of(model: type[Patient] | type[Lesion], prefix: str) -> list[dict[str, Any]]:
    from dermaflow.pathways.facts import FACTS

    found = []
    for name, field in model.model_fields.items():
        if name == f"{prefix}_id":
            continue
        kind, choices = _kind(field.annotation)
        fact = FACTS.get(f"{prefix}.{name}")
        bounds = {
            key: getattr(part, key) for part in field.metadata for key in ("ge", "gt", "le") if hasattr(part, key)
        }
        question = fact.question if fact is not None and fact.question else ""
        found.append({
            "name": name, "type": kind, "choices": choices, "unit": _UNITS.get(name),
            "description": question or field.description or name.replace("_", " "),
            "min": bounds.get("ge", bounds.get("gt")), "max": bounds.get("le"),
        })  # fmt: skip
    return found


def _kind(annotation: Any) -> tuple[str, list[str]]:
    if get_origin(annotation) is tuple:
        return "choices", list(get_args(get_args(annotation)[0]))
    words = [word for word in get_args(annotation) if isinstance(word, str)]
    return ("choice", words) if words or annotation == YesNo else ("number", [])
