"""What goes wrong in a request, in the one shape that callers get: never a stack trace, never what they sent."""

from __future__ import annotations

import math
from typing import Any

from pydantic import BaseModel, ValidationError
from starlette.responses import JSONResponse

from dermaflow.errors import DermaflowError

SHOWN = 5  # problems of a body that are named; the rest is counted


class Refused(Exception):
    """A request that is answered with an error.

    Args:
        status: HTTP status.
        code: One word for programs.
        message: For people; must not repeat a person's data.
        retry_after: Seconds after which to try again.
    """

    def __init__(
        self, status: int, code: str, message: str, *, expected: str | None = None, todo: str | None = None,
        retry_after: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.expected, self.todo, self.retry_after = expected, todo, retry_after

    def response(self, request_id: str) -> JSONResponse:
        headers = {} if self.retry_after is None else {"Retry-After": str(max(1, math.ceil(self.retry_after)))}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        error = {"code": self.code, "message": self.message, "expected": self.expected, "todo": self.todo,
                 "request_id": request_id}  # fmt: skip
        return JSONResponse({"error": error}, self.status, headers)


class ErrorBody(BaseModel):
    """Why a request was refused."""

    code: str
    message: str
    expected: str | None
    todo: str | None
    request_id: str


class ErrorResponse(BaseModel):
    """The answer to every request that was refused."""

    error: ErrorBody


def busy(message: str = "as many requests as can be worked on are waiting", retry_after: float = 1) -> Refused:
    return Refused(503, "busy", message, expected="fewer requests at once", todo="try again", retry_after=retry_after)


def too_large(what: str, limit: int, unit: str = "bytes") -> Refused:
    return Refused(413, "too_large", f"{what} is larger than allowed", expected=f"at most {limit} {unit}",
                   todo="send less at once, or make it a batch")  # fmt: skip


def of_library(error: DermaflowError, status: int = 422) -> Refused:
    """An error of the library; its place stays out where it is a path of this machine."""
    return Refused(status, type(error).__name__.removesuffix("Error").lower(), str(error.what), expected=error.expected,
                   todo=error.todo)  # fmt: skip


def of_validation(error: ValidationError) -> Refused:
    """What does not fit in a body: the place and what was expected, not the value."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    if found and found[0]["type"] == "json_invalid":
        return Refused(400, "not_json", "the body is no JSON", expected="UTF-8 JSON without NaN or Infinity")
    return Refused(422, "invalid", problems_text(found), todo="see /openapi.json for the fields")


def problems_text(found: list[Any]) -> str:
    """The first problems in words. A key that the caller made up is not repeated: it could be anything."""
    parts = []
    for problem in found[:SHOWN]:
        place = problem["loc"][:-1] if problem["type"] == "extra_forbidden" else problem["loc"]
        parts.append(f"{'.'.join(map(str, place)) or 'body'}: {problem['msg']}")
    more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return "; ".join(parts) + more
