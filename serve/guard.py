"""What happens to every request, whatever it asks for: limits before it, headers, audit and figures after it.

Plain ASGI, outside the routes: an answer that a route streams is passed on as it comes.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
import traceback
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dermaflow.logs import log_ids
from serve.access import Caller, is_loopback
from serve.errors import Refused, busy

if TYPE_CHECKING:
    from serve.ingress import Service

log = logging.getLogger(__name__)

KEY = "dermaflow.visit"
SECURITY = {
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}
ALWAYS = ("/healthz", "/readyz", "/metrics")  # answered however much waits
UPLOAD = "/v1/batches"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass
class Visit:
    """One request, as audit and figures see it."""

    request_id: str
    started: float
    caller: Caller | None = None
    counts: dict[str, int] = field(default_factory=dict)
    model: str | None = None


class Guard:
    """Wraps the routes of an ingress.

    Args:
        app: The routes.
        service: What they share.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service
        self._in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(16)
        visit = scope[KEY] = Visit(request_id, time.monotonic())
        answer = _Answer(self, scope, visit, send)
        with log_ids(request_id=request_id):
            await self._answer(scope, receive, answer, visit)

    async def _answer(self, scope: Scope, receive: Receive, answer: _Answer, visit: Visit) -> None:
        try:
            self._refuse_strangers(Headers(scope=scope))
            with self._place(scope["path"]):
                async with asyncio.timeout(self._seconds(scope)):
                    await self.app(scope, receive, answer)
        except Refused as error:
            await answer.refuse(error)
        except TimeoutError:
            await answer.refuse(Refused(503, "timeout", "the answer took too long", todo="try again with less at once",
                                        retry_after=5))  # fmt: skip
        except Exception as error:
            # where, not what: a message may repeat what was sent
            place = "".join(traceback.format_tb(error.__traceback__, limit=-4))
            log.error("request %s failed: %s\n%s", visit.request_id, type(error).__name__, place)
            await answer.refuse(Refused(500, "internal", "something went wrong here", todo="report the request id"))

    def _seconds(self, scope: Scope) -> float | None:
        limits = self.service.options.limits
        if scope["path"].endswith("/events"):
            return None  # goes on as long as the batch
        return limits.upload_time if scope["path"] == UPLOAD and scope["method"] == "POST" else limits.timeout

    def _place(self, path: str) -> _Place:
        return _Place(self, path not in ALWAYS and not path.endswith("/events"))

    def _refuse_strangers(self, headers: Headers) -> None:
        """Without keys, a page of elsewhere in a browser here must not reach the service (DNS rebinding, CSRF)."""
        options = self.service.options
        if not options.open:
            return
        for name, text in (("host", headers.get("host", "")), ("origin", headers.get("origin", ""))):
            if not text:
                continue
            host = urlsplit(text if "://" in text else f"//{text}").hostname or ""
            if not is_loopback(host) and host not in options.hosts:
                raise Refused(403, "stranger", f"this service answers to this machine only, not to {name} of elsewhere",
                              expected="localhost or 127.0.0.1",
                              todo="start it with keys to serve other machines")  # fmt: skip

    def finish(self, scope: Scope, visit: Visit, status: int) -> None:
        """Count and write down an answer that is about to be given.

        Raises:
            Refused: 503, the audit log cannot be written.
        """
        route = getattr(scope.get("route"), "path", None) or "unknown"
        metrics = self.service.metrics
        metrics.requests.labels(scope["method"], route, status).inc()
        metrics.seconds.labels(route).observe(time.monotonic() - visit.started)
        if not route.startswith(("/v1", "/cds-services")) and status < 400:
            return
        try:
            self.service.audit.write(
                request_id=visit.request_id, caller=visit.caller.name if visit.caller else None,
                method=scope["method"], route=route, status=status, counts=visit.counts, model=visit.model,
                ms=round((time.monotonic() - visit.started) * 1000, 1),
            )  # fmt: skip
        except OSError as error:
            log.error("the audit log cannot be written: %s", error.strerror)
            if status < 400:
                raise Refused(503, "audit", "the audit log cannot be written, so nothing is answered",
                              todo="free space on the disk of the service", retry_after=30) from None  # fmt: skip


class _Place:
    """One of the places for requests that are worked on at once."""

    def __init__(self, guard: Guard, counted: bool) -> None:
        self._guard, self._counted = guard, counted

    def __enter__(self) -> None:
        if self._counted:
            if self._guard._in_flight >= self._guard.service.options.limits.in_flight:
                self._counted = False
                self._guard.service.metrics.refused.labels("ingress").inc()
                raise busy()
            self._guard._in_flight += 1
            self._guard.service.metrics.in_flight.set(self._guard._in_flight)

    def __exit__(self, *_: object) -> None:
        if self._counted:
            self._guard._in_flight -= 1
            self._guard.service.metrics.in_flight.set(self._guard._in_flight)


class _Answer:
    """`send` with the headers that every answer has."""

    def __init__(self, guard: Guard, scope: Scope, visit: Visit, send: Send) -> None:
        self._guard, self._scope, self._visit, self._send = guard, scope, visit, send
        self._started = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._guard.finish(self._scope, self._visit, message["status"])
            self._started = True
            self._dress(message)
        await self._send(message)

    async def refuse(self, error: Refused) -> None:
        """Answer with an error, unless an answer has begun."""
        if self._started:
            return
        await error.response(self._visit.request_id)(self._scope, _no_body, self)

    def _dress(self, message: Message) -> None:
        headers = MutableHeaders(scope=message)
        for name, text in SECURITY.items():
            headers.setdefault(name, text)
        headers.setdefault("cache-control", "no-store")
        service = self._guard.service
        if not service.behind_proxy:  # Serve's proxy adds its own, the one that the request already bears
            headers["x-request-id"] = self._visit.request_id
        headers.setdefault("x-model-version", self._visit.model or service.version or "none")


async def _no_body() -> dict[str, Any]:
    return {"type": "http.request", "body": b"", "more_body": False}
