"""Batches: an archive is uploaded or named, scored beside Serve, watched, cancelled and fetched."""

from __future__ import annotations

import asyncio
import posixpath
import time
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import unquote

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, Response, StreamingResponse

from dermaflow import storage
from dermaflow.errors import DermaflowError
from serve import results
from serve.bodies import content_type, read_json
from serve.errors import Refused, busy
from serve.ingress import Service, body_of, needs, service_of, visit_of
from serve.jobs import Job, new_id
from serve.schemas import Batch, BatchList, BatchRequest, Failures, Format
from serve.uploads import receive

router = APIRouter(prefix="/v1/batches", tags=["batches"], dependencies=[needs("batches")])

_FORM = {
    "type": "object",
    "properties": {
        "archive": {"type": "string", "contentMediaType": "application/octet-stream",
                    "description": ".zip .tar .tar.gz .tar.zst .parquet .dcm"},
        "images": {"type": "array", "items": {"type": "string", "contentMediaType": "application/octet-stream"}},
        "patients": {"type": "string", "contentMediaType": "application/octet-stream",
                     "description": ".csv .tsv .json .jsonl .parquet, see `dermaflow pathways fields`"},
    },
}  # fmt: skip
MAX_JSON = 1 << 16
KEEP_ALIVE = 15  # seconds after which a stream says that it is there
LOOK = 0.5  # seconds between two looks at a batch that is watched
_MEDIA = {"parquet": "application/vnd.apache.parquet", "csv": "text/csv; charset=utf-8",
          "jsonl": "application/x-ndjson", "fhir": "application/fhir+ndjson"}  # fmt: skip
_SUFFIX = {"parquet": "parquet", "csv": "csv", "jsonl": "jsonl", "fhir": "ndjson"}


@router.post("", operation_id="create_batch", status_code=202, response_model=Batch,
             openapi_extra=body_of(BatchRequest, form=_FORM))  # fmt: skip
async def create(request: Request) -> Batch:
    """Queue a batch: upload an archive or images, with a table of patients, or name a source. Answers at once."""
    service, visit = service_of(request), visit_of(request)
    if (await asyncio.to_thread(service.jobs.counts)).get("queued", 0) >= service.options.limits.queued:
        raise busy("as many batches as can wait are waiting", retry_after=60)
    facts = await service.model()
    id = new_id()
    folder = service.options.state / "batches" / id
    if content_type(request) == "application/json":
        body = await read_json(request, BatchRequest, MAX_JSON, service.options.limits.idle)
        source = allowed(body.source, service.options.sources)
        patients = None if body.patients is None else allowed(body.patients, service.options.sources)
        name = posixpath.basename(source.rstrip("/")) or "batch"
        await asyncio.to_thread(_refuse_missing, source, patients)
    else:
        upload = await receive(request, folder / "upload", service.options.limits)
        source, name = str(upload.source), upload.name
        patients = None if upload.patients is None else str(upload.patients)
    model = {key: facts[key] for key in ("name", "version", "sha256", "uri")}
    visit.model = facts["version"]
    caller = visit.caller.name if visit.caller else ""
    job = await asyncio.to_thread(
        lambda: service.jobs.add(id=id, name=name[:200], source=source, patients=patients, out=str(folder / "out"),
                                 model=model, caller=caller)
    )  # fmt: skip
    service.backend.batch_added()
    return await asyncio.to_thread(shown, job)


@router.get("", operation_id="list_batches")
async def list_batches(request: Request, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> BatchList:
    """The newest first."""
    service = service_of(request)

    def read() -> list[Batch]:
        return [shown(job) for job in service.jobs.list(limit=limit)]

    return BatchList(batches=await asyncio.to_thread(read))


@router.get("/{batch_id}", operation_id="get_batch")
async def get_batch(request: Request, batch_id: str) -> Batch:
    """State and progress."""
    return await asyncio.to_thread(shown, await job_of(request, batch_id))


@router.delete("/{batch_id}", operation_id="cancel_batch", status_code=202)
async def cancel(request: Request, batch_id: str) -> Batch:
    """Cancel; what was scored so far stays. A batch that has ended stays as it is."""
    service = service_of(request)
    job = await job_of(request, batch_id)
    if job.state in ("queued", "running"):
        await asyncio.to_thread(service.jobs.ask_to_cancel, job.id)
        service.backend.batch_added()
    return await asyncio.to_thread(shown, await job_of(request, batch_id))


@router.get("/{batch_id}/events", operation_id="watch_batch", response_class=StreamingResponse,
            responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}})  # fmt: skip
async def events(request: Request, batch_id: str) -> StreamingResponse:
    """Progress as server-sent events (``progress``, data: the batch), until the batch has ended."""
    service = service_of(request)
    await job_of(request, batch_id)
    if service.streams >= service.options.limits.streams:
        service.metrics.refused.labels("streams").inc()
        raise busy("as many clients as can watch are watching", retry_after=10)
    return StreamingResponse(_watch(service, request, batch_id), media_type="text/event-stream",
                             headers={"x-accel-buffering": "no"})  # fmt: skip


async def _watch(service: Service, request: Request, batch_id: str) -> AsyncIterator[bytes]:
    service.streams += 1
    service.metrics.streams.set(service.streams)
    try:
        before, said = "", time.monotonic()
        while True:
            batch = await asyncio.to_thread(shown, await job_of(request, batch_id))
            text = batch.model_dump_json()
            if text != before:
                before, said = text, time.monotonic()
                yield f"event: progress\ndata: {text}\n\n".encode()
            elif time.monotonic() - said > KEEP_ALIVE:
                said = time.monotonic()
                yield b": still here\n\n"
            if batch.state not in ("queued", "running"):
                return
            await asyncio.sleep(LOOK)
    finally:
        service.streams -= 1
        service.metrics.streams.set(service.streams)


@router.get("/{batch_id}/failures", operation_id="list_failures")
async def list_failures(
    request: Request, batch_id: str, limit: Annotated[int, Query(ge=1, le=100_000)] = 10_000
) -> Failures:
    """Images that gave no class, each with its reason."""
    job = await job_of(request, batch_id)
    total, found = await asyncio.to_thread(results.failures, job.out, limit)
    return Failures.model_validate({"total": total, "failures": found})


@router.get("/{batch_id}/results", operation_id="get_results", response_class=Response,
            responses={200: {"content": {media.partition(";")[0]: {} for media in _MEDIA.values()}}})  # fmt: skip
async def get_results(request: Request, batch_id: str, format: Format = "parquet") -> Response:
    """All findings of a finished batch, or the FHIR Bundles of its patients."""
    job = await job_of(request, batch_id)
    if job.state != "finished":
        raise Refused(409, "not_finished", f"the batch is {job.state}", expected="a finished batch",
                      todo="watch it until it has ended")  # fmt: skip
    name = f"dermaflow-{job.id}.{_SUFFIX[format]}"
    if format == "parquet":
        return FileResponse(Path(job.out) / results.FINDINGS, media_type=_MEDIA[format], filename=name)
    if format == "fhir" and not results.fhir_there(job.out):
        raise Refused(409, "no_patients", "the batch has no pathways", expected="a batch with a table of patients")
    rows: Iterator[bytes] = {"csv": results.as_csv, "jsonl": results.as_jsonl, "fhir": results.as_fhir}[format](job.out)
    return StreamingResponse(rows, media_type=_MEDIA[format],
                             headers={"content-disposition": f'attachment; filename="{name}"'})  # fmt: skip


async def job_of(request: Request, batch_id: str) -> Job:
    """The batch of a request.

    Raises:
        Refused: 404, there is none.
    """
    job = await asyncio.to_thread(service_of(request).jobs.get, batch_id)
    if job is None:
        raise Refused(404, "no_batch", "there is no such batch", expected="an id of GET /v1/batches")
    visit_of(request).model = job.model["version"]
    return job


def shown(job: Job) -> Batch:
    """A batch as it is answered: its row, and the progress that its folder says."""
    progress: dict[str, Any] = {}
    if job.state != "queued":
        progress = _progress(job.out) if job.finished is None else _ended(job.out, job.finished)
    running = job.state == "running"
    return Batch.model_validate({
        "id": job.id, "state": job.state, "created": _time(job.created), "finished": _time(job.finished),
        "name": job.name, "error": job.error, "model": job.model,
        "total": progress.get("total"), "done": progress.get("done", 0), "ok": progress.get("ok", 0),
        "not_assessable": progress.get("not_assessable", 0), "failed": progress.get("failed", 0),
        "images_per_second": progress.get("images_per_second"),
        "eta_seconds": progress.get("eta_seconds") if running else None,
        "has_pathways": job.state == "finished" and results.has_pathways(job.out),
    })  # fmt: skip


def _progress(out: str) -> dict[str, Any]:
    from dermaflow.scoring.plan import read_status

    try:
        return read_status(out).model_dump()
    except (DermaflowError, OSError):  # nothing was planned yet, or a part is being written
        return {}


@lru_cache(1024)
def _ended(out: str, _finished: float) -> dict[str, Any]:
    """Of a batch that has ended: a list of batches does not read every commit of each again."""
    return _progress(out)


def _time(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


def allowed(source: str, roots: tuple[str, ...]) -> str:
    """The address a batch may name, in full.

    Raises:
        Refused: 403, it lies outside the folders and prefixes that the service was started with.
    """
    refused = Refused(403, "source", "the service may not read this source",
                      expected="a place under one that it may read",
                      todo="upload the images, or start the service with --source PLACE")  # fmt: skip
    if storage.is_remote(source):
        if not source.startswith("s3://") or ".." in unquote(source).split("/") or "?" in source or "@" in source:
            raise refused
        if any(
            storage.is_remote(root) and f"{source.rstrip('/')}/".startswith(f"{root.rstrip('/')}/") for root in roots
        ):
            return source
        raise refused
    try:
        place = Path(source).resolve()
    except (OSError, ValueError):
        raise refused from None
    if any(not storage.is_remote(root) and place.is_relative_to(Path(root).resolve()) for root in roots):
        return str(place)
    raise refused


def _refuse_missing(source: str, patients: str | None) -> None:
    for place in filter(None, (source, patients)):
        try:
            there = storage.exists(place)
        except DermaflowError:
            raise Refused(503, "source", "the source cannot be reached", todo="try again", retry_after=30) from None
        if not there:
            raise Refused(404, "no_source", "there is no such source")
