"""The ingress: what the routes share (`Service`), all routes (`make_app`), and their deployment (`Ingress`)."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.security import APIKeyHeader, HTTPBearer
from starlette.exceptions import HTTPException

from dermaflow import __version__
from serve.access import Access, Caller, allow
from serve.audit import Audit
from serve.errors import ErrorResponse, Refused, problems_text
from serve.guard import KEY, Guard, Visit
from serve.jobs import JobStore
from serve.metrics import Metrics
from serve.options import Options

log = logging.getLogger(__name__)

REMEMBERED = 32  # models whose thresholds are known
FRESH = 5  # seconds for which the description of the model is believed

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": text}
    for status, text in (
        (400, "The body is no JSON or no form, or is cut short"),
        (401, "No key, or one that is not known or has expired"),
        (403, "The key may not do this"),
        (404, "There is no such thing"),
        (409, "Not in this state"),
        (413, "Larger than allowed"),
        (415, "A type that is not read here"),
        (422, "Does not fit the schema"),
        (429, "Too many requests with this key"),
        (503, "Too much at once, or not ready; Retry-After says when to try again"),
    )
}
"""Every route may answer with these."""


class Backend(Protocol):
    """What answers behind the routes; the tests put a small one here."""

    async def classify(
        self, images: list[bytes], image_ids: list[str], lesion_ids: list[str | None]
    ) -> dict[str, Any]: ...

    async def explain(self, image: bytes, image_id: str, diagnosis: str | None) -> dict[str, Any]: ...

    async def recommend(self, body: bytes, thresholds: dict[str, float]) -> dict[str, Any]: ...

    async def describe(self) -> dict[str, Any]: ...

    def batch_added(self) -> None: ...


class Service:
    """What the routes share.

    Args:
        options: How the service runs.
        backend: Who answers.
        behind_proxy: Whether Serve's proxy is in front, which adds X-Request-Id itself.
    """

    def __init__(self, options: Options, backend: Backend, *, behind_proxy: bool = False) -> None:
        options.state.mkdir(parents=True, exist_ok=True)
        self.options, self.backend, self.behind_proxy = options, backend, behind_proxy
        self.access, self.audit, self.metrics = Access(options), Audit(options.state), Metrics()
        self.jobs = JobStore(options.database_url)
        self.streams = 0
        self._facts: dict[str, Any] | None = None
        self._asked = float("-inf")
        self._thresholds: dict[str, dict[str, float]] = {}

    @property
    def version(self) -> str | None:
        """Of the model, as last heard."""
        return None if self._facts is None else self._facts["version"]

    async def model(self) -> dict[str, Any]:
        """The model in use, a few seconds old at most."""
        if self._facts is None or time.monotonic() - self._asked > FRESH:
            facts = await self.backend.describe()
            if self._facts is None or facts["sha256"] != self._facts["sha256"]:
                self.metrics.model.clear()
                self.metrics.model.labels(facts["name"], facts["version"]).set(1)
            self._facts, self._asked = facts, time.monotonic()
            self.remember(facts["sha256"], facts["thresholds"])
        return self._facts

    def heard(self, model: dict[str, str], thresholds: dict[str, float]) -> None:
        """Note the model of an answer: it may be newer than the description."""
        self.remember(model["sha256"], thresholds)
        if self._facts is not None and self._facts["sha256"] != model["sha256"]:
            self._asked = float("-inf")

    def remember(self, sha256: str, thresholds: dict[str, float]) -> None:
        self._thresholds.pop(sha256, None)
        self._thresholds[sha256] = thresholds
        while len(self._thresholds) > REMEMBERED:
            self._thresholds.pop(next(iter(self._thresholds)))

    async def thresholds(self, sha256: str) -> dict[str, float]:
        """Those of a model that is or was in use here.

        Raises:
            Refused: 409, another model made the findings.
        """
        if sha256 not in self._thresholds:
            facts = await self.model()
            if sha256 != facts["sha256"]:
                raise Refused(409, "other_model", f"findings of model {sha256[:12]}, here is {facts['version']}",
                              expected="findings of this service", todo="classify the images again")  # fmt: skip
        return self._thresholds[sha256]


def service_of(request: Request) -> Service:
    return request.app.state.service  # type: ignore[no-any-return]


def visit_of(request: Request) -> Visit:
    return request.scope[KEY]  # type: ignore[no-any-return]


_bearer = HTTPBearer(auto_error=False, scheme_name="bearer", description="A key, or a token of the identity provider")
_header = APIKeyHeader(name="X-API-Key", auto_error=False, scheme_name="key")


def needs(*scopes: str) -> Any:
    """The dependency of a route that only callers with these scopes may use; it runs before the body is read."""

    async def check(request: Request, _bearer: Any = Depends(_bearer), _key: Any = Depends(_header)) -> Caller:
        service, visit = service_of(request), visit_of(request)
        access = service.access
        found = (
            await asyncio.to_thread(access.caller, request.headers) if access.waits else access.caller(request.headers)
        )
        visit.caller = found
        allow(found, scopes)
        return found

    return Depends(check)


def body_of(*models: type[Any], form: dict[str, Any] | None = None) -> dict[str, Any]:
    """``openapi_extra`` of a route that reads its body itself: JSON of a model, or a form."""
    content: dict[str, Any] = {}
    if form is not None:
        content["multipart/form-data"] = {"schema": form}
    for model in models:
        content["application/json"] = {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}
    return {"requestBody": {"required": True, "content": content}}


def make_app(service: Service) -> FastAPI:
    """The routes, guarded, ready to run."""
    from serve import routes_batches, routes_cds, routes_inference, routes_info, routes_lesions, routes_page

    app = FastAPI(
        title="DermaFlow", version=__version__, docs_url=None, redoc_url=None,
        summary="Dermoscopy images to calibrated findings and guideline-based pathways. Research and education only.",
    )  # fmt: skip
    app.state.service = service
    for routes in (routes_info, routes_inference, routes_batches, routes_lesions, routes_cds, routes_page):
        app.include_router(routes.router, responses=ERRORS if routes is not routes_page else None)
    app.add_middleware(Guard, service=service)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


async def _invalid(request: Request, error: Exception) -> Any:
    assert isinstance(error, RequestValidationError)
    found = [{**problem, "loc": problem["loc"]} for problem in error.errors()]
    return Refused(422, "invalid", problems_text(found)).response(visit_of(request).request_id)


async def _http(request: Request, error: Exception) -> Any:
    assert isinstance(error, HTTPException)
    names = {404: ("not_found", "there is no such page"), 405: ("method", "this page does not take this method")}
    code, text = names.get(error.status_code, ("refused", "the request was refused"))
    response = Refused(error.status_code, code, text).response(visit_of(request).request_id)
    response.headers.update(error.headers or {})
    return response


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The schema of the routes with the bodies that they read themselves."""
    if app.openapi_schema is None:
        from fastapi.openapi.utils import get_openapi
        from pydantic.json_schema import models_json_schema

        from serve import schemas

        found = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
        read = [value for value in vars(schemas).values()
                if isinstance(value, type) and issubclass(value, schemas.BaseModel)
                and value.__name__.endswith(("Request", "Update", "Feedback"))]  # fmt: skip
        _, extra = models_json_schema([(model, "validation") for model in read],
                                      ref_template="#/components/schemas/{model}")  # fmt: skip
        parts = found.setdefault("components", {}).setdefault("schemas", {})
        for name, schema in extra.get("$defs", {}).items():
            parts.setdefault(name, schema)
        parts.pop("HTTPValidationError", None)
        parts.pop("ValidationError", None)
        app.openapi_schema = found
    return app.openapi_schema


class Handles:
    """The deployments behind the ingress, with Serve's own errors turned into answers."""

    RETRIES = 2  # of a request whose replica died; every one of these can be asked again without harm

    def __init__(self, classifier: Any, recommender: Any, options: Options) -> None:
        self._classifier, self._recommender, self._options = classifier, recommender, options
        self._dispatcher: Any = None

    async def classify(self, images: list[bytes], image_ids: list[str], lesion_ids: list[str | None]) -> dict[str, Any]:
        return await self._ask(lambda: self._classifier.classify.remote(images, image_ids, lesion_ids))

    async def explain(self, image: bytes, image_id: str, diagnosis: str | None) -> dict[str, Any]:
        return await self._ask(lambda: self._classifier.explain.remote(image, image_id, diagnosis))

    async def recommend(self, body: bytes, thresholds: dict[str, float]) -> dict[str, Any]:
        return await self._ask(lambda: self._recommender.recommend.remote(body, thresholds))

    async def describe(self) -> dict[str, Any]:
        return await self._ask(self._classifier.describe.remote)

    def batch_added(self) -> None:
        """Tell the dispatcher, which is started if there is none."""
        from serve.runner import start_dispatcher

        self._dispatcher = start_dispatcher(self._options.database_url, self._options.jobs)
        self._dispatcher.wake.remote()

    async def _ask(self, call: Callable[[], Awaitable[Any]]) -> Any:
        from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayTaskError
        from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

        from serve.errors import busy

        for attempt in range(self.RETRIES + 1):
            try:
                return await call()
            except BackPressureError:
                raise busy() from None
            except DeploymentUnavailableError:
                raise Refused(503, "not_ready", "the model could not be started", retry_after=10) from None
            except (ActorDiedError, ActorUnavailableError, RayActorError, ReplicaUnavailableError):
                log.warning("a replica died; attempt %d", attempt + 1)
                await asyncio.sleep(0.2 * (attempt + 1))
            except RayTaskError as error:
                log.error("a replica failed: %s", type(error.cause).__name__)
                raise Refused(503, "failed", "the model could not answer", todo="try again", retry_after=2) from None
        raise Refused(503, "restarting", "the model is being started again", todo="try again", retry_after=3)


class Ingress:
    """The deployment: takes HTTP, knows the others by their handles."""

    def __init__(self, options: dict[str, Any], classifier: Any, recommender: Any) -> None:
        from dermaflow.settings import start_logging

        start_logging()
        # Serve's own lines name the path of a request, and so a lesion or an image
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        self._options = Options.model_validate(options)
        self._handles = Handles(classifier, recommender, self._options)

    async def __serve_build_asgi_app__(self) -> FastAPI:
        service = Service(self._options, self._handles, behind_proxy=True)
        if await asyncio.to_thread(service.jobs.list, ("queued", "running")):  # left by a service before this one
            self._handles.batch_added()
        return make_app(service)


def bundle_thresholds(uri: str, sha256: str) -> dict[str, float]:
    """Thresholds of the bundle of a batch; raises BundleError if it is another by now."""
    from dermaflow.pathways.run import thresholds_of

    found = thresholds_of(uri, sha256)
    return {"mel": found.mel, "malignant": found.malignant, "entropy": found.entropy}
