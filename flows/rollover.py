"""Wait until a running service has a new champion. It looks at the registry by itself; here one only asks it."""

from __future__ import annotations

import os
import time

import httpx

from flows.cycle import Served

WAIT = 180.0
"""Seconds: the service looks every 15, and loads the model beside the old one."""


def await_service(url: str, version: str, wait: float = WAIT) -> Served:
    """Ask a service for its model until it names the new champion.

    A service that does not is no reason to fail: the decision stands, and says what is wrong with the service.

    Args:
        url: Its address, for instance ``https://dermaflow.example``. A key, where it asks for one, is taken from
            ``DERMAFLOW_SERVE_KEY``, never from a parameter, which everybody sees in Prefect's pages.
        version: Id of the champion in the registry.
        wait: Seconds.
    """
    key = os.environ.get("DERMAFLOW_SERVE_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    begun, version_there, problem = time.monotonic(), None, ""
    with httpx.Client(base_url=url, headers=headers, timeout=10) as client:
        while True:
            try:
                answer = client.get("/v1/model")
                problem = f"status {answer.status_code}" if answer.is_error else ""
                version_there = None if problem else answer.json().get("version")
            except (httpx.HTTPError, ValueError) as error:
                problem = f"no answer ({type(error).__name__})"
            seconds = time.monotonic() - begun
            if version_there == version:
                return Served(url=url, version=version, seconds=round(seconds, 1), problem=None)
            if seconds > wait:
                break
            time.sleep(2)
    said = problem or f"still answers as {version_there}"
    return Served(url=url, version=version_there, seconds=None, problem=f"{said}, {wait:.0f} s after the promotion")
