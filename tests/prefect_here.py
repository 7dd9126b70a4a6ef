"""Prefect for tests: a temporary server for flows in their own process, or a real one on loopback."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from prefect.logging.handlers import APILogHandler
from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_HOME,
    PREFECT_LOCAL_STORAGE_PATH,
    PREFECT_SERVER_ALLOW_EPHEMERAL_MODE,
    PREFECT_SERVER_ANALYTICS_ENABLED,
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS,
    temporary_settings,
)
from waiting import until_it_answers

from dermaflow.ports import free_port


@contextmanager
def own_prefect(home: Path) -> Iterator[None]:
    """Flows run here keep their records in `home`; at the end their server stops, which a process has only one of."""
    ephemeral = {
        PREFECT_HOME: home,
        PREFECT_LOCAL_STORAGE_PATH: home / "storage",
        PREFECT_SERVER_ALLOW_EPHEMERAL_MODE: True,
        PREFECT_SERVER_ANALYTICS_ENABLED: False,
        PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS: 200,
    }
    with temporary_settings(ephemeral, restore_defaults={PREFECT_API_URL}):
        try:
            yield
        finally:
            APILogHandler().flush()
            SubprocessASGIServer().stop()  # while what it says still has a place to go


@dataclass
class Server:
    """A Prefect server on loopback with a home of its own."""

    api: httpx.Client
    environment: dict[str, str]
    folder: Path

    def get(self, path: str) -> Any:
        return self._ask("GET", path)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        return self._ask("POST", path, json=body)

    def _ask(self, method: str, path: str, **content: Any) -> Any:
        """As Prefect's own client does, ask again while the server's database is busy."""
        for pause in (1, 2, 4, 8, 0):
            answer = self.api.request(method, path, **content)
            if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                break
            time.sleep(pause)
        return answer.raise_for_status().json()

    def python(self, *arguments: object) -> subprocess.Popen[bytes]:
        """Start a module in the background; what it says goes to a file."""
        with (self.folder / "said.txt").open("ab") as said:
            return subprocess.Popen(
                [sys.executable, "-m", *map(str, arguments)], env=self.environment, stdout=said, stderr=said
            )

    def logs(self, run: str) -> list[dict[str, Any]]:
        return self.post("/logs/filter", {"logs": {"flow_run_id": {"any_": [run]}}, "limit": 200})

    def latest_run(self, flow: str) -> str | None:
        body = {"flows": {"name": {"any_": [flow]}}, "sort": "START_TIME_DESC", "limit": 1}
        runs = self.post("/flow_runs/filter", body)
        return runs[0]["id"] if runs else None

    def state(self, run: str) -> str:
        return self.get(f"/flow_runs/{run}")["state"]["type"]

    def said(self) -> str:
        return (self.folder / "said.txt").read_text(errors="replace")[-6000:]


def stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextmanager
def a_server(folder: Path, **settings: str) -> Iterator[Server]:
    """A Prefect server in a process of its own, with its home in `folder`, until the block ends."""
    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    bare = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment = bare | {
        "PREFECT_HOME": str(folder / "prefect"), "PREFECT_API_URL": url, "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    made = Server(httpx.Client(base_url=url, timeout=60), environment | settings, folder)
    process = made.python("prefect", "server", "start", "--host", "127.0.0.1", "--port", port)
    try:
        until_it_answers(f"{url}/health", 240)
        yield made
    finally:
        stop(process)
