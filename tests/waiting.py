"""Ports of loopback, and waiting for what other processes do."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from typing import TypeVar

import httpx

T = TypeVar("T")


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody has."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def free_port() -> int:
    return free_ports(1)[0]


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
