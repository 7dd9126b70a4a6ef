"""Read bodies of requests, counted while they come: what a header says of their length is not believed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import NamedTuple, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from serve.errors import Refused, of_validation, too_large

M = TypeVar("M", bound=BaseModel)
MAX_HEADER = 4096  # bytes of the headers of one part
MAX_NAME = 1000  # characters of a file name as sent


class Part(NamedTuple):
    """One field of a form: its name, and the name of the file as the client calls it."""

    name: str
    filename: str | None


def content_type(request: Request) -> str:
    """The media type of the body, without parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def unsupported(expected: str) -> Refused:
    return Refused(415, "content_type", "the body has a type that is not read here", expected=expected)


async def pieces(request: Request, limit: int, idle: float) -> AsyncIterator[bytes]:
    """The body as it comes.

    Raises:
        Refused: 413 beyond the limit, 400 when nothing comes for a while or the client has gone.
    """
    said = request.headers.get("content-length", "")
    if said.isdigit() and int(said) > limit:
        raise too_large("the body", limit)
    seen = 0
    stream = request.stream().__aiter__()
    while True:
        try:
            async with asyncio.timeout(idle):
                piece = await anext(stream)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise Refused(
                400, "stalled", "the body did not come to its end", expected=f"a byte in {idle:g} s"
            ) from None
        except ClientDisconnect:
            raise Refused(400, "gone", "the client went away before the body's end") from None
        seen += len(piece)
        if seen > limit:
            raise too_large("the body", limit)
        yield piece


async def read_body(request: Request, limit: int, idle: float) -> bytes:
    """The whole body; raises as `pieces`."""
    return b"".join([piece async for piece in pieces(request, limit, idle)])


async def read_json(request: Request, model: type[M], limit: int, idle: float) -> M:
    """A typed body.

    Raises:
        Refused: 415 for another type, 400 for no JSON, 413 beyond the limit, 422 for what does not fit the model.
    """
    if content_type(request) != "application/json":
        raise unsupported("application/json")
    return await parse(await read_body(request, limit, idle), model)


async def parse(body: bytes, model: type[M]) -> M:
    """A body as a model, in a thread where it is large; raises as `read_json`."""
    try:
        if len(body) < 1 << 18:
            return model.model_validate_json(body, strict=True)
        return await asyncio.to_thread(model.model_validate_json, body, strict=True)
    except ValidationError as error:
        raise of_validation(error) from None


async def parts(request: Request, limit: int, idle: float) -> AsyncIterator[tuple[Part, bytes | None]]:
    """A form as it comes: a part with each of its pieces, then with None at its end.

    Raises:
        Refused: 415 when it is no form, 400 when it is damaged or cut short, and as `pieces`.
    """
    from python_multipart.exceptions import FormParserError
    from python_multipart.multipart import MultipartParser, parse_options_header

    kind, parameters = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data":
        raise unsupported("multipart/form-data or application/json")
    if not parameters.get(b"boundary"):
        raise Refused(400, "form", "the form names no boundary")
    events: list[tuple[Part, bytes | None]] = []
    reader = _PartReader(events, parse_options_header)
    try:
        parser = MultipartParser(parameters[b"boundary"], reader.callbacks())  # type: ignore[arg-type]
        async for piece in pieces(request, limit, idle):
            parser.write(piece)
            for event in events:
                yield event
            events.clear()
        parser.finalize()
    except FormParserError:
        raise Refused(400, "form", "the form is damaged", expected="multipart/form-data of RFC 7578") from None
    if not reader.ended:
        raise Refused(400, "form", "the form is cut short", todo="send it again")


class _PartReader:
    """Turns the callbacks of the parser into events."""

    def __init__(self, events: list[tuple[Part, bytes | None]], options: object) -> None:
        self._events, self._options = events, options
        self._field, self._value, self._size = b"", b"", 0
        self._headers: dict[bytes, bytes] = {}
        self._part = Part("", None)
        self.ended = False

    def callbacks(self) -> dict[str, object]:
        return {
            "on_part_begin": self._begin, "on_header_field": self._header_field, "on_header_value": self._header_value,
            "on_header_end": self._header_end, "on_headers_finished": self._headers_finished,
            "on_part_data": self._data, "on_part_end": self._end, "on_end": self._finish,
        }  # fmt: skip

    def _begin(self) -> None:
        self._headers, self._field, self._value, self._size = {}, b"", b"", 0

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += self._counted(data[start:end])

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += self._counted(data[start:end])

    def _counted(self, text: bytes) -> bytes:
        self._size += len(text)
        if self._size > MAX_HEADER:
            raise Refused(400, "form", "the headers of a part are too long", expected=f"at most {MAX_HEADER} bytes")
        return text

    def _header_end(self) -> None:
        self._headers[self._field.lower()] = self._value
        self._field = self._value = b""

    def _headers_finished(self) -> None:
        _, found = self._options(self._headers.get(b"content-disposition", b""))  # type: ignore[operator]
        filename = found.get(b"filename")
        self._part = Part(
            found.get(b"name", b"").decode("utf-8", "replace")[:100],
            None if filename is None else filename.decode("utf-8", "replace")[:MAX_NAME],
        )

    def _data(self, data: bytes, start: int, end: int) -> None:
        self._events.append((self._part, data[start:end]))

    def _end(self) -> None:
        self._events.append((self._part, None))

    def _finish(self) -> None:
        self.ended = True
