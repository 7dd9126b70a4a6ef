"""Waiting for what other processes do."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import TypeVar

import httpx

T = TypeVar("T")


def until(holds: Callable[[], T], seconds: float = 200, what: str = "it holds", every: float = 0.2) -> T:
    """Wait until something holds; what it gave."""
    end = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(every)
    return found


def until_it_answers(url: str, seconds: float = 180, below: int = 400) -> None:
    """Wait until a server answers with a status below this one."""

    def answers() -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(url, timeout=10).status_code < below
        return False

    until(answers, seconds, f"{url} answers")
