"""What a dermatologist does with a batch: the work list, one lesion, its pictures, its case, the signature."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from dermaflow.datasets.images import ImageProblem
from dermaflow.errors import DermaflowError, SignOffError
from dermaflow.pathways.outputs.folder import sign_folder
from serve import results
from serve.bodies import read_json
from serve.errors import Refused, of_library
from serve.ingress import body_of, needs, service_of
from serve.jobs import Job
from serve.results import NotThere
from serve.revisions import revise
from serve.routes_batches import job_of
from serve.routes_inference import explained
from serve.schemas import CaseUpdate, ExplainResponse, LesionView, ReviewRequest, ReviewResponse, Worklist

router = APIRouter(prefix="/v1", tags=["lesions"])

MAX_JSON = 1 << 18


@router.get("/batches/{batch_id}/worklist", operation_id="get_worklist", dependencies=[needs("batches")])
async def worklist(
    request: Request, batch_id: str, limit: Annotated[int, Query(ge=1, le=100_000)] = 10_000,
    offset: Annotated[int, Query(ge=0, le=100_000_000)] = 0,
) -> Worklist:  # fmt: skip
    """The lesions of a batch, the most urgent first; of a batch under way, those scored so far."""
    job = await job_of(request, batch_id)
    thresholds = await _policy(request, job)
    found = await _read(results.worklist, job.out, thresholds)
    return Worklist.model_validate({"total": len(found), "lesions": found[offset : offset + limit]})


@router.get("/batches/{batch_id}/lesions/{lesion_id:path}", operation_id="get_lesion", dependencies=[needs("batches")])
async def lesion(request: Request, batch_id: str, lesion_id: str) -> LesionView:
    """Findings, pathway and case of one lesion."""
    return await _read(_view, (await job_of(request, batch_id)).out, lesion_id)


@router.put("/batches/{batch_id}/lesions/{lesion_id:path}/case", operation_id="put_case",
            dependencies=[needs("batches", "recommend")], openapi_extra=body_of(CaseUpdate))  # fmt: skip
async def put_case(request: Request, batch_id: str, lesion_id: str) -> LesionView:
    """Say what is known of person and lesion; the pathway is computed anew and stored. A signature on it lapses."""
    limits = service_of(request).options.limits
    job = await _finished(request, batch_id)
    body = await read_json(request, CaseUpdate, MAX_JSON, limits.idle)
    if body.lesion.lesion_id != lesion_id:
        raise Refused(409, "other_lesion", "the case is of another lesion", expected="the lesion_id of the address")
    await _read(revise, job, body)
    return await _read(_view, job.out, lesion_id)


@router.get("/batches/{batch_id}/images/{image_id:path}/explanation", operation_id="explain_batch_image",
            response_model=ExplainResponse, dependencies=[needs("batches")])  # fmt: skip
async def explanation(request: Request, batch_id: str, image_id: str) -> Response:
    """Where the model in use looks in an image of the batch, and which training lesions look alike."""
    job = await job_of(request, batch_id)
    data = await _read(results.image_bytes, job.out, image_id)
    return await explained(request, data, image_id, None)


@router.get("/batches/{batch_id}/images/{image_id:path}", operation_id="get_image", dependencies=[needs("batches")],
            response_class=Response, responses={200: {"content": {"image/jpeg": {}}}})  # fmt: skip
async def image(request: Request, batch_id: str, image_id: str) -> Response:
    """An image of the batch, encoded anew as JPEG."""
    job = await job_of(request, batch_id)

    def read() -> bytes:
        try:
            return results.picture(results.image_bytes(job.out, image_id))
        except ImageProblem as problem:
            raise NotThere(f"the image cannot be shown: {problem.reason}") from None

    return Response(await _read(read), media_type="image/jpeg", headers={"cache-control": "private, max-age=3600"})


@router.post("/reviews", operation_id="create_review", dependencies=[needs("review")], status_code=201,
             openapi_extra=body_of(ReviewRequest))  # fmt: skip
async def review(request: Request) -> ReviewResponse:
    """Accept, edit or reject a pathway by name; it is final or rejected then, and the decision stays in the log."""
    limits = service_of(request).options.limits
    body = await read_json(request, ReviewRequest, MAX_JSON, limits.idle)
    job = await _finished(request, body.batch_id)
    if not await asyncio.to_thread(results.has_pathways, job.out):
        raise Refused(409, "no_pathways", "the batch has no pathways", todo="put the case of the lesion first")
    if (await _read(results.lesion_case, job.out, body.lesion_id))[0] is None:
        raise Refused(404, "no_lesion", "the batch has no pathway of this lesion")

    def sign() -> ReviewResponse:
        entry, pathway = sign_folder(
            results.pathways_folder(job.out), body.lesion_id, by=body.by, decision=body.decision, reason=body.reason
        )
        return ReviewResponse(entry=entry.model_dump(), pathway=pathway, sequence=entry.sequence, sha256=entry.sha256)

    try:
        return await asyncio.to_thread(sign)
    except SignOffError as error:
        raise of_library(error, 409 if "line" in str(error.what) else 422) from None


def _view(out: str, lesion_id: str) -> LesionView:
    pathway, patient, lesion = results.lesion_case(out, lesion_id)
    try:
        findings = results.lesion_findings(out, lesion_id)
    except NotThere:
        if pathway is None:
            raise
        findings = []
    return LesionView(findings=findings, pathway=pathway, patient=patient, lesion=lesion)


async def _finished(request: Request, batch_id: str) -> Job:
    job = await job_of(request, batch_id)
    if job.state != "finished":
        raise Refused(409, "not_finished", f"the batch is {job.state}", expected="a finished batch")
    return job


async def _policy(request: Request, job: Job) -> dict[str, float]:
    """The thresholds of the model of a batch; those of the model in use where its bundle is gone."""
    service = service_of(request)
    try:
        return await service.thresholds(job.model["sha256"])
    except Refused:
        return (await service.model())["thresholds"]  # type: ignore[no-any-return]


async def _read(function, *arguments):  # type: ignore[no-untyped-def]
    """A call of the library in a thread, its errors as answers."""
    try:
        return await asyncio.to_thread(function, *arguments)
    except NotThere as error:
        raise of_library(error, 404) from None
    except DermaflowError as error:
        raise of_library(error) from None
