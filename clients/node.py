"""A site's process: starts Flower's SuperNode and the process that runs the app, starts them again when they end.

A SuperNode ends when the hub refuses it: its key is not registered, or it was killed and the hub still counts on the
session before, for up to half a minute. So it is tried again, ever more slowly, until the site leaves.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from clients.offline import environment
from clients.policy import load_policy
from clients.site_config import AUDIT_NAME, SiteError, load_site
from clients.supernode import SECRET_NAME, STATE_NAME
from dermaflow import storage
from dermaflow.audit import AuditLog
from dermaflow.locks import is_locked, locked
from dermaflow.ports import free_port

log = logging.getLogger(__name__)

NODE_NAME, LOCK_NAME, LOG_NAME = "run/node.json", "run/node.lock", "run/node.log"
PRELOAD = ("torch", "torchvision", "clients.client_app")
LONGEST_WAIT = 8.0  # seconds between two starts
STEADY = 60.0  # seconds after which a process has proved itself, and its next start is not delayed
PATIENCE = 12.0  # seconds to leave in; Flower itself takes up to 5
LARGEST_LOG = 16 << 20


class Supervised:
    """A process that is started again whenever it ends.

    Args:
        name: For people.
        command: Its arguments.
        folder: Of the site; also its working folder.
        output: Where it writes.
    """

    def __init__(self, name: str, command: Sequence[str], folder: Path, output: Any) -> None:
        self.name, self._command, self._folder, self._output = name, list(command), folder, output
        self._process: subprocess.Popen[bytes] | None = None
        self._started, self._due, self._failures = 0.0, 0.0, 0

    def look(self) -> None:
        """Start it if it does not run and it is time."""
        now = time.monotonic()
        if self._process is not None:
            if (code := self._process.poll()) is None:
                return
            self._process = None
            self._failures = 0 if now - self._started > STEADY else self._failures + 1
            wait = min(LONGEST_WAIT, 2.0 ** min(self._failures, 5) / 2)
            self._due = now + wait
            log.warning("%s ended (status %d); starts again in %.0f s", self.name, code, wait)
        if now >= self._due:
            self._started = now
            # a session of its own, so that Ctrl-C reaches only the supervisor, which then ends things in order
            self._process = subprocess.Popen(
                self._command, cwd=self._folder, env=environment(self._folder / "run/flower"), stdin=subprocess.DEVNULL,
                stdout=self._output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def stop(self) -> None:
        """End it, gently first."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            log.warning("%s does not end by itself", self.name)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def run_node(folder: str | Path, preload: Sequence[str] = PRELOAD) -> None:
    """Take part until SIGTERM or Ctrl-C. Call it in the main thread.

    Args:
        folder: Of the site.
        preload: Modules that the app needs, imported once.

    Raises:
        SiteError: The folder is incomplete, or the site has joined already.
        PolicyError: The policy cannot be read.
    """
    folder = Path(folder).absolute()
    site = load_site(folder)
    load_policy(folder)
    if '"' in str(folder):  # Flower's own configuration of a node could not carry it
        raise SiteError("a quotation mark in the path", where=folder, todo="move the folder")
    for file in (site.key, site.root_certificate):
        if not file.is_file():
            raise SiteError("no such file", where=file, todo="run dermaflow site check")
    stopped = threading.Event()
    audit = AuditLog(folder / AUDIT_NAME)
    busy = SiteError("this site has joined already", where=folder, todo="run dermaflow site leave")
    with locked(folder / LOCK_NAME, busy), _log_file(folder) as output, _signals(stopped):
        storage.write_bytes(folder / NODE_NAME, json.dumps({"pid": os.getpid(), "started": time.time()}).encode())
        _write_secret(folder / SECRET_NAME)
        (folder / STATE_NAME).unlink(missing_ok=True)
        audit.append("node started", site=site.name)
        # The port is chosen once: the launcher keeps it when the SuperNode starts again
        port = str(free_port())
        python = [sys.executable, "-m"]
        node = Supervised("SuperNode", [*python, "clients.supernode", str(folder), port], folder, output)
        launcher = Supervised(
            "launcher", [*python, "clients.launcher", str(folder), f"127.0.0.1:{port}", *preload], folder, output
        )
        try:
            _mind(folder, [launcher, node], stopped)
        finally:
            for process in (node, launcher):  # first say goodbye to the hub, then end the app
                process.stop()
            audit.append("node stopped")


def _mind(folder: Path, processes: list[Supervised], stopped: threading.Event) -> None:
    said: tuple[Any, ...] = ()
    while not stopped.wait(0.2):
        for process in processes:
            process.look()
        state = read_state(folder)
        if state and said != (now := (state["state"], state.get("reason"))):
            said = now
            log.info("%s%s", state["state"], _explained(state))


def _explained(state: dict[str, Any]) -> str:
    if state["state"] == "online":
        return f" as node {state['node_id']}"
    if not (reason := state.get("reason", "")):
        return ""
    if "timed out" in reason.lower():
        return ": the hub took the connection and said nothing; run dermaflow site check"
    if "certificate" in reason.lower() or "ssl" in reason.lower():
        return ": the hub's certificate does not hold; run dermaflow site check"
    if "2004" in reason or "activat" in reason.lower():
        return ": the hub does not know this key, or still counts on the session before, for up to half a minute"
    return f": {reason}"


def read_state(folder: Path) -> dict[str, Any]:
    """What the SuperNode last said of itself: state, since (Unix time), node_id, reason; empty if it said nothing."""
    try:
        return dict(json.loads((folder / STATE_NAME).read_text()))
    except (OSError, ValueError):
        return {}


def running(folder: Path) -> int | None:
    """Process id of the node of this folder, or None if none runs."""
    try:
        return int(json.loads((folder / NODE_NAME).read_text())["pid"]) if is_locked(folder / LOCK_NAME) else None
    except (OSError, ValueError, KeyError):
        return None


def stop_node(folder: Path, timeout: float = 3 * PATIENCE) -> bool:
    """Have the node of this folder leave, and wait for it.

    Returns:
        Whether one ran.

    Raises:
        SiteError: It does not end.
    """
    if (pid := running(folder)) is None:
        return False
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + timeout
    while running(folder) is not None:
        if time.monotonic() > deadline:
            raise SiteError(f"process {pid} does not end", where=folder, todo=f"end it: kill -9 {pid}")
        time.sleep(0.1)
    return True


@contextlib.contextmanager
def _log_file(folder: Path) -> Iterator[Any]:
    path = folder / LOG_NAME
    if path.exists() and path.stat().st_size > LARGEST_LOG:
        path.replace(path.with_suffix(".log.1"))
    with path.open("ab") as stream:
        yield stream


@contextlib.contextmanager
def _signals(stopped: threading.Event) -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, lambda *_: stopped.set())
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _write_secret(path: Path) -> None:
    """The secret that the launcher shows to take work; new with every start, for the eyes of this user only."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
        stream.write(secrets.token_bytes(32))
