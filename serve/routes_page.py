"""The page: its files as they lie in `serve/page/`, by name from a listing, never by a path that a client sends."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse, Response

from serve.errors import Refused

router = APIRouter(include_in_schema=False)

FOLDER = Path(__file__).parent / "page"
_MEDIA = {
    ".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8", ".svg": "image/svg+xml", ".png": "image/png", ".ico": "image/x-icon",
    ".woff2": "font/woff2", ".json": "application/json", ".webmanifest": "application/manifest+json",
}  # fmt: skip


@lru_cache(1)
def files() -> dict[str, Path]:
    """The files that are given out, by their path below the folder."""
    found = sorted(FOLDER.rglob("*")) if FOLDER.is_dir() else []
    return {path.relative_to(FOLDER).as_posix(): path for path in found if path.is_file() and path.suffix in _MEDIA}


@router.get("/")
async def index() -> Response:
    """The page."""
    return _file("index.html")


@router.get("/static/{name:path}")
async def static(name: str) -> Response:
    """A file of the page."""
    return _file(name)


def _file(name: str) -> Response:
    path = files().get(name)
    if path is None:
        raise Refused(404, "not_found", "there is no such page")
    # asked for again each time: a page of before an update would not fit the service
    return FileResponse(path, media_type=_MEDIA[path.suffix], headers={"cache-control": "no-cache"})
