"""The hub's public listener: what exists there, for whom, and what the log says of it."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path
from typing import Any

import pytest

from clients.guard import CALLS, LARGEST, LARGEST_UNKNOWN, Public
from dermaflow.audit import AuditLog, entries

KEY = base64.b64encode(b"a registered key")
NODE = 18_000_000_000_000_000_000


class Hub:
    """A guard before an application that answers everything with 200 and four bytes."""

    def __init__(self, folder: Path, status: int = 200) -> None:
        self.reached: list[str] = []
        self.log = AuditLog(folder / "audit.jsonl")
        self.guard = Public(self._app, self.log, lambda key: NODE if key == b"a registered key" else None)
        self.status = status

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        self.reached.append(scope["path"])
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": b"four"})

    def call(self, path: str, key: bytes = b"", length: int | None = 10, method: str = "POST") -> int:
        headers = [(b"flwr-public-key", key)] if key else []
        headers += [(b"content-length", str(length).encode())] if length is not None else []
        scope = {"type": "http", "path": path, "method": method, "headers": headers, "client": ("192.0.2.7", 1)}
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        async def receive() -> Any:
            raise AssertionError("the guard reads no body")

        asyncio.run(self.guard(scope, receive, send))
        return int(sent[0]["status"])

    def told(self) -> list[dict[str, Any]]:
        return list(entries(self.log.path)) if self.log.path.exists() else []


@pytest.mark.parametrize(
    "path",
    ["/", "/docs", "/openapi.json", "/v1/control/start-run", "/v1/runtime/acquire-task", "/v1/fleet/register-node",
     "/v1/fleet/unregister-node", "/v1/fleet/", "/v1/fleet/pull-messages/", "/V1/fleet/pull-messages", "/health/x",
     "/v1/fleet//pull-messages", "/x/v1/fleet/pull-messages"],
)  # fmt: skip
def test_all_else_is_not_there_not_even_for_a_site(tmp_path: Path, path: str) -> None:
    hub = Hub(tmp_path)
    assert hub.call(path, KEY) == 404
    assert hub.reached == []


@pytest.mark.parametrize("call", sorted(CALLS - {"activate-node"}))
def test_calls_of_a_site_need_a_registered_key(tmp_path: Path, call: str) -> None:
    hub = Hub(tmp_path)
    assert hub.call(f"/v1/fleet/{call}", KEY) == 200
    for key in (b"", b"AAAA", b"no base64!", b"A" * 5000):
        assert hub.call(f"/v1/fleet/{call}", key) == 401
    assert hub.call(f"/v1/fleet/{call}", KEY, method="GET") == 404
    assert len(hub.reached) == 1


def test_sizes(tmp_path: Path) -> None:
    hub = Hub(tmp_path)
    assert hub.call("/v1/fleet/push-object", KEY, LARGEST) == 200
    assert hub.call("/v1/fleet/push-object", KEY, LARGEST + 1) == 413
    assert hub.call("/v1/fleet/push-object", KEY, None) == 411
    assert hub.call("/v1/fleet/activate-node", b"AAAA", LARGEST_UNKNOWN) == 200
    assert hub.call("/v1/fleet/activate-node", b"AAAA", LARGEST_UNKNOWN + 1) == 413


def test_health_is_for_all(tmp_path: Path) -> None:
    hub = Hub(tmp_path)
    assert hub.call("/health", method="GET") == 200
    assert hub.told() == []


def test_a_message_is_one_entry_with_all_its_bytes(tmp_path: Path) -> None:
    hub = Hub(tmp_path)
    for call in ("activate-node", "pull-messages", "pull-object", "pull-object", "confirm-message-received"):
        hub.call(f"/v1/fleet/{call}", KEY)
    for length in (100, 20, 3):
        hub.call("/v1/fleet/push-messages" if length == 100 else "/v1/fleet/push-object", KEY, length)
    hub.call("/v1/fleet/send-node-heartbeat", KEY)
    for call in ("pull-messages", "pull-messages", "deactivate-node"):
        hub.call(f"/v1/fleet/{call}", KEY)
    told = [(entry["event"], entry.get("bytes")) for entry in hub.told()]
    assert told == [("site joined", None), ("message to site", 8), ("message from site", 123), ("site left", None)]
    assert {entry["node_id"] for entry in hub.told()} == {str(NODE)}


def test_refusals_do_not_fill_the_disk(tmp_path: Path) -> None:
    hub = Hub(tmp_path)
    for number in range(50):
        hub.call(f"/{number}" + "x" * 1000)
    (entry,) = hub.told()
    assert entry["event"] == "refused" and entry["peer"] == "192.0.2.7" and len(entry["call"]) <= 100


def test_what_flower_refuses_is_told(tmp_path: Path) -> None:
    hub = Hub(tmp_path, status=412)
    assert hub.call("/v1/fleet/activate-node", b"AAAA") == 412
    assert [entry["status"] for entry in hub.told()] == [412]
