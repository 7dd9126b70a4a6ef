"""Flower's SuperNode as a site runs it: short pauses, each message in the audit log, failures told at once.

Started by `clients.node`, one process a site. Flower 1.41 has no options for any of this, so a handful of its functions
are wrapped here, by name; the exact version is pinned, and an integration test goes through each of them.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clients.site_config import AUDIT_NAME, load_site
from dermaflow import storage
from dermaflow.audit import AuditLog

STATE_NAME = "run/supernode.json"
SECRET_NAME = "run/secret"
PAUSES = {3: 1.0, 0.5: 0.1}  # seconds: Flower's pauses without a message and without a reply, and those used here
DIED = "the app was ended by"
UNANSWERED = (DIED, "ClientApp task failed due to unknown reason")
"""How a task's details begin when its app ended without an answer: by a signal, or asked to end."""
LONGEST_RETRY = 3.0  # seconds between two tries while the hub is away; Flower waits up to 20
BAD_SIGNATURE = "401: the hub takes no signature of this site; is this machine's clock right, the key still registered?"
HEARTBEAT = 15  # seconds; the hub takes a site for gone after twice that. Flower has 30; the least it allows is 10


def main(folder: Path, port: int) -> None:
    """Run until SIGTERM.

    Args:
        folder: Of the site.
        port: On loopback, where the process that runs the app asks for work.
    """
    end_with_parent()
    site = load_site(folder)
    import flwr.supernode.start_client_internal as loop
    from flwr.supernode.cli.flower_supernode import flower_supernode

    _hurry(loop)
    _audit(loop, folder, AuditLog(folder / AUDIT_NAME))
    _tell_failures(folder)
    write_state(folder, state="connecting")
    sys.argv = [
        "flower-supernode", "--superlink", site.superlink, "--root-certificates", str(site.root_certificate),
        "--auth-supernode-private-key", str(site.key), "--node-config", f'site="{site.name}" site-folder="{folder}"',
        "--isolation", "process", "--superexec-auth-secret-file", str(folder / SECRET_NAME),
        "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    flower_supernode()
    # It returns after an error that it has logged, but its server's thread would keep this process as it is for ever
    write_state(folder, state="ended", reason="the connection broke")
    os._exit(1)


def end_with_parent() -> None:
    """End this process soon after the one that started it, however that ended."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent").start()


def write_state(folder: Path, **state: object) -> None:
    """Say how things are, for `clients.node` and `dermaflow site status`."""
    storage.write_bytes(folder / STATE_NAME, json.dumps({**state, "since": time.time()}).encode())


def _hurry(loop: Any) -> None:
    import flwr.supercore.heartbeat as heartbeat
    import flwr.supernode.fleet_http_connection as connection
    from flwr.supercore.retry import http_retry

    impatient = types.SimpleNamespace(**vars(time))
    impatient.sleep = lambda seconds: time.sleep(PAUSES.get(seconds, seconds))
    loop.time = impatient
    http_retry.MAX_RETRY_DELAY = LONGEST_RETRY  # type: ignore[attr-defined]
    heartbeat.HEARTBEAT_DEFAULT_INTERVAL = HEARTBEAT  # type: ignore[attr-defined]
    connection.HEARTBEAT_DEFAULT_INTERVAL = HEARTBEAT  # type: ignore[attr-defined]


def _audit(loop: Any, folder: Path, log: AuditLog) -> None:
    """Log the way in and out of every message; what cannot be logged is not done."""
    connect, pull_and_store, push = loop._init_connection, loop._pull_and_store_message, loop._push_messages
    had: set[str] = set()  # a hub that was killed hands over again what it is not sure of

    @contextmanager
    def connected(*args: Any, **options: Any) -> Iterator[Any]:
        with connect(*args, **options) as connection:
            node_id = str(connection[0])
            log.append("joined", node_id=node_id, hub=options.get("server_address"))
            write_state(folder, state="online", node_id=node_id)
            try:
                yield connection
            finally:
                log.append("left", node_id=node_id)

    def pulled(**calls: Any) -> int | None:
        received, sizes = [], []  # objects are pulled by several threads; appending is atomic

        def receive() -> Any:
            found = calls["receive"]()
            if found is None or found[0].metadata.message_id in had:
                return None
            received.append(found[0])
            return found

        def pull_object(run_id: int, object_id: str) -> bytes:
            content: bytes = calls["pull_object"](run_id, object_id)
            sizes.append(len(content))
            return content

        run_id: int | None = pull_and_store(**calls | {"receive": receive, "pull_object": pull_object})
        for message in received:
            if run_id is not None:
                had.add(message.metadata.message_id)
            log.append("message in", **_described(message), bytes=sum(sizes), taken=run_id is not None)
        return run_id

    def pushed(**calls: Any) -> None:
        sent, sizes = [], []

        def send(message: Any, *rest: Any) -> Any:
            sent.append(message)
            return calls["send"](message, *rest)

        def push_object(run_id: int, session: str, object_id: str, content: bytes) -> None:
            sizes.append(len(content))
            calls["push_object"](run_id, session, object_id, content)

        push(**calls | {"send": send, "push_object": push_object})
        for message in sent:
            log.append("message out", **_described(message), bytes=sum(sizes), error=_error(message))

    loop._init_connection, loop._pull_and_store_message, loop._push_messages = connected, pulled, pushed


def _described(message: Any) -> dict[str, Any]:
    about = message.metadata
    return {
        "run": str(about.run_id), "group": about.group_id, "type": about.message_type,
        "sha256": about.message_id,  # Flower names a message by the hash of its content
    }  # fmt: skip


def _error(message: Any) -> str | None:
    return str(message.error.reason) if message.has_error() else None


def _tell_failures(folder: Path) -> None:
    """Leave the reason of a failed start where others find it; answer for an app whose process died."""
    import flwr.supernode.fleet_http_connection as connection
    from flwr.common.constant import SubStatus
    from flwr.supercore.constant import TaskType
    from flwr.supercore.retry import http_retry
    from flwr.supernode.nodestate import in_memory_nodestate as states

    leave: Callable[..., Any] = connection.flwr_exit

    def tell_and_leave(code: int, message: str | None = None, *args: Any, **options: Any) -> None:
        write_state(folder, state="refused", reason=" ".join((message or "").split()))
        leave(code, message, *args, **options)

    connection.flwr_exit = tell_and_leave  # type: ignore[assignment]
    unsaid = types.SimpleNamespace(**vars(os))

    def tell_and_kill(process: int, number: int) -> None:
        write_state(folder, state="refused", reason=BAD_SIGNATURE)
        os.kill(process, number)

    unsaid.kill = tell_and_kill  # at the hub's 401 Flower interrupts itself without a word
    http_retry.os = unsaid  # type: ignore[attr-defined]
    connection.os = unsaid  # type: ignore[attr-defined]  # likewise when a heartbeat is not taken
    finish, expire = states.InMemoryNodeState.finish_task, states.InMemoryNodeState._on_task_tokens_expired

    def finish_and_answer(self: Any, task_id: int, sub_status: str, details: str) -> bool:
        # Flower waits for a minute of silence before it answers for an app that was killed
        finished = finish(self, task_id, sub_status, details)
        if finished and sub_status == SubStatus.FAILED and details.startswith(UNANSWERED):
            runs = {task.run_id for task in self.get_tasks(task_ids=[task_id]) if task.type == TaskType.CLIENT_APP}
            _count_as_begun(self, runs)
            self._store_error_replies(runs, states.CLIENT_APP_CRASHED_ERROR)
        return finished

    def expire_and_answer(self: Any, tasks: list[Any]) -> None:
        _count_as_begun(self, {task.run_id for task in tasks})
        expire(self, tasks)

    states.InMemoryNodeState.finish_task = finish_and_answer  # type: ignore[method-assign]
    states.InMemoryNodeState._on_task_tokens_expired = expire_and_answer  # type: ignore[method-assign]


def _count_as_begun(state: Any, runs: set[int]) -> None:
    """Flower answers only for messages that the dead app had fetched, and waits for ever for the answer to others."""
    with state.lock_msg_store:
        for entry in state.msg_store.values():
            about = entry.message.metadata
            if about.run_id in runs and not about.reply_to_message_id:
                entry.is_retrieved = True


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
