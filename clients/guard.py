"""What stands before the hub's application: what sites may call, and a line in the audit log for what they did.

Flower 1.41 answers sites, operators and its own processes on one port, and asks only sites who they are. Sites reach a
listener of their own, where nothing but their calls exists.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from dermaflow.audit import AuditLog

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

FLEET, CONTROL = "/v1/fleet/", "/v1/control/"
ENTER = "activate-node"
CALLS = frozenset(
    {
        ENTER, "deactivate-node", "send-node-heartbeat", "pull-messages", "push-messages", "get-run", "get-fab",
        "push-object", "pull-object", "confirm-message-received",
    }
)  # fmt: skip
"""What a site calls. Registering is no business of the public listener."""
LARGEST = 32 << 20  # bytes of a request; Flower sends arrays in pieces of 5 MiB
LARGEST_UNKNOWN = 64 << 10  # of a request of somebody whose key is not registered
KNOWN_FOR = 10.0  # seconds that a key is taken for registered without looking again
QUIET_FOR = 60.0  # seconds in which refusals of one address are counted, not logged one by one
CHANGES = {
    "start-run": "run started", "stop-run": "run stopped", "register-node": "site registered",
    "unregister-node": "site unregistered",
}  # fmt: skip


class Public:
    """The listener that sites reach: their calls and ``/health``; to everything else there is nothing here.

    Args:
        app: Flower's application.
        log: Of the hub.
        node_of: Node id of a public key, or None if it is not registered.
    """

    def __init__(self, app: App, log: AuditLog, node_of: Callable[[bytes], int | None]) -> None:
        self.app, self.log, self._node_of = app, log, node_of
        self._known: dict[bytes, tuple[float, int]] = {}
        self._moved: dict[int, list[int]] = {}  # bytes in and out of each node since its last entry
        self._refused: dict[str, tuple[float, int]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = str(scope["path"])
        call = path.removeprefix(FLEET) if path.startswith(FLEET) else ""
        if path == "/health" and scope["method"] in ("GET", "HEAD"):
            await self.app(scope, receive, send)
        elif call not in CALLS or scope["method"] != "POST":
            await self._refuse(scope, send, 404, path)
        else:
            await self._fleet(call, scope, receive, send)

    async def _fleet(self, call: str, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        node = await self._node(headers.get(b"flwr-public-key", b""))
        if node is None and call != ENTER:
            await self._refuse(scope, send, 401, call)
            return
        length = headers.get(b"content-length", b"")
        if not length.isdigit():
            await self._refuse(scope, send, 411, call)
            return
        if int(length) > (LARGEST if node is not None else LARGEST_UNKNOWN):
            await self._refuse(scope, send, 413, call)
            return
        status, sent = 0, 0

        async def counted(message: MutableMapping[str, Any]) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
            sent += len(message.get("body", b""))
            await send(message)

        await self.app(scope, receive, counted)
        if status >= 400:
            await self._log_refusal(scope, status, call, node)
        elif node is not None:
            await self._log_call(call, scope, node, int(length), sent)

    async def _node(self, encoded: bytes) -> int | None:
        if not encoded or len(encoded) > 1024:
            return None
        seen = self._known.get(encoded)
        if seen and time.monotonic() - seen[0] < KNOWN_FOR:
            return seen[1]
        try:
            key = base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError):
            return None
        node = await asyncio.to_thread(self._node_of, key)
        if node is None:
            self._known.pop(encoded, None)
        else:
            self._known[encoded] = time.monotonic(), node
        return node

    async def _log_call(self, call: str, scope: Scope, node: int, received: int, sent: int) -> None:
        moved = self._moved.setdefault(node, [0, 0])
        if call in ("push-messages", "push-object"):
            moved[0] += received
        elif call == "pull-object":
            moved[1] += sent
        # A message is one call and a call for each of its parts. It is whole, outwards, when the site confirms it, and
        # inwards, when the site turns to something else
        elif moved[0] and call in ("pull-messages", "deactivate-node"):
            await self._append("message from site", node_id=str(node), bytes=moved[0])
            moved[0] = 0
        if call == "confirm-message-received":
            await self._append("message to site", node_id=str(node), bytes=moved[1])
            moved[1] = 0
        elif call in (ENTER, "deactivate-node"):
            event = "site joined" if call == ENTER else "site left"
            await self._append(event, node_id=str(node), peer=_peer(scope))

    async def _refuse(self, scope: Scope, send: Send, status: int, what: str) -> None:
        await self._log_refusal(scope, status, what, None)
        # the body was not read, so the connection cannot be used again
        headers = [(b"content-length", b"0"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

    async def _log_refusal(self, scope: Scope, status: int, what: str, node: int | None) -> None:
        """One line a minute and address at most: nobody fills the hub's disk from outside."""
        peer, now = _peer(scope), time.monotonic()
        since, count = self._refused.get(peer, (-QUIET_FOR, 0))
        if now - since < QUIET_FOR:
            self._refused[peer] = since, count + 1
            return
        if len(self._refused) > 10_000:
            self._refused.clear()
        self._refused[peer] = now, 0
        known = {} if node is None else {"node_id": str(node)}
        await self._append("refused", peer=peer, status=status, call=what[:100], others_since_last=count, **known)

    async def _append(self, event: str, **fields: Any) -> None:
        await asyncio.to_thread(self.log.append, event, **fields)


class Admin:
    """The listener on loopback: everything; what an operator changes is logged.

    Args:
        app: Flower's application.
        log: Of the hub.
    """

    def __init__(self, app: App, log: AuditLog) -> None:
        self.app, self.log = app, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        event = CHANGES.get(str(scope.get("path", "")).removeprefix(CONTROL)) if scope["type"] == "http" else None
        if event is None:
            await self.app(scope, receive, send)
            return
        asked, said, status = bytearray(), bytearray(), 0

        async def heard() -> MutableMapping[str, Any]:
            message = await receive()
            asked.extend(message.get("body", b""))
            return message

        async def answered(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            status = message.get("status", status)
            said.extend(message.get("body", b""))
            await send(message)

        await self.app(scope, heard, answered)
        if status < 400:
            await asyncio.to_thread(self.log.append, event, **_what_changed(event, bytes(asked), bytes(said)))


def _what_changed(event: str, asked: bytes, said: bytes) -> dict[str, Any]:
    from flwr.proto import control_pb2 as messages
    from google.protobuf.message import DecodeError

    try:
        if event == "run started":
            request = messages.StartRunRequest.FromString(asked)
            run = messages.StartRunResponse.FromString(said).run_id
            return {"run": str(run), "app": request.fab.hash_str, "app_bytes": len(request.fab.content)}
        if event == "run stopped":
            return {"run": str(messages.StopRunRequest.FromString(asked).run_id)}
        if event == "site registered":
            node = messages.RegisterNodeResponse.FromString(said).node_id
            return {"node_id": str(node), "name": messages.RegisterNodeRequest.FromString(asked).name}
        return {"node_id": str(messages.UnregisterNodeRequest.FromString(asked).node_id)}
    except (DecodeError, AttributeError) as error:  # the log must not stop what it describes
        return {"unreadable": str(error)}


def _peer(scope: Scope) -> str:
    return str(scope["client"][0]) if scope.get("client") else ""
