"""A federation of real processes on loopback: TLS, registered keys, and an app that adds up numbers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
from waiting import until

from clients.hub import ask_hub, register_site
from clients.policy import approve
from clients.site_config import SiteConfig, make_site
from dermaflow.errors import FederationError
from dermaflow.ports import free_ports

MAKE_CERTIFICATES = Path(__file__).parents[1] / "deploy/federation/make_certificates.sh"

PYPROJECT = """\
[project]
name = "adding"
version = "1.0.0"
license = { file = "LICENSE" }
dependencies = ["flwr>=1.41.0,<1.42"]
[tool.flwr.app]
publisher = "dermaflow"
fab-format-version = 1
flwr-version-target = "1.41.0"
[tool.flwr.app.components]
serverapp = "adding.server_app:app"
clientapp = "adding.client_app:app"
[tool.flwr.app.config]
out = ""
rounds = 2
numbers = 1000
seconds = 0.0
"""
CLIENT = """\
import os, time
from pathlib import Path
import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()

@app.train()
def train(message, context):
    folder = Path(context.node_config["site-folder"])
    (folder / "run" / "app.pid").write_text(str(os.getpid()))
    if (folder / "raises").exists():
        raise ValueError("lesion HAM_0001234 of patient Doe cannot be read")
    time.sleep(context.run_config["seconds"])
    new = message.content["arrays"]["flat"].numpy() + 1
    return Message(RecordDict({"arrays": ArrayRecord({"flat": Array(new)})}), reply_to=message)
"""
SERVER = """\
import json, os, time
import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()

@app.main()
def main(grid, context):
    asked = context.run_config
    flat, done = np.zeros(asked["numbers"], np.float32), []
    for round in range(1, asked["rounds"] + 1):
        nodes = sorted(grid.get_node_ids())
        content = RecordDict({"arrays": ArrayRecord({"flat": Array(flat)})})
        ids = list(grid.push_messages(
            [Message(content, dst_node_id=n, message_type="train", group_id=str(round)) for n in nodes]))
        node = dict(zip(ids, nodes))
        began, waiting, sums, failed = time.time(), set(ids), [], {}
        while waiting and time.time() - began < 100:
            for reply in grid.pull_messages(waiting):
                number = reply.metadata.reply_to_message_id
                waiting.discard(number)
                if reply.has_error():
                    failed[str(node[number])] = reply.error.reason
                else:
                    sums.append(reply.content["arrays"]["flat"].numpy())
            time.sleep(0.1)
        flat = np.mean(sums, axis=0) if sums else flat
        done.append({"round": round, "asked": len(ids), "answers": len(sums), "failed": failed,
                     "value": float(flat[0]), "seconds": time.time() - began})
        with open(asked["out"] + ".new", "w") as stream:
            json.dump(done, stream)
        os.replace(asked["out"] + ".new", asked["out"])
"""


def write_app(folder: Path) -> Path:
    """The app's folder."""
    (folder / "adding").mkdir(parents=True)
    (folder / "LICENSE").write_text("free\n")
    (folder / "pyproject.toml").write_text(PYPROJECT)
    (folder / "adding/__init__.py").touch()
    (folder / "adding/client_app.py").write_text(CLIENT)
    (folder / "adding/server_app.py").write_text(SERVER)
    return folder


class Federation:
    """A hub and its sites, all below one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.state, self.certificates = folder, folder / "hub", folder / "certs"
        self.port, self.admin_port = free_ports(2)
        self.hub: subprocess.Popen[bytes] | None = None
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}
        self.ids: dict[str, str] = {}
        subprocess.run([MAKE_CERTIFICATES, self.certificates, "localhost"], check=True, capture_output=True)

    def _python(self, name: str, code: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as output:
            return subprocess.Popen([sys.executable, "-c", code], stdout=output, stderr=output, start_new_session=True)

    def start_hub(self) -> None:
        certs = self.certificates
        self.hub = self._python(
            "hub",
            f"from clients.hub import HubOptions, run_hub; run_hub(HubOptions(state={str(self.state)!r},"
            f"host='127.0.0.1', port={self.port}, admin_port={self.admin_port}, ca={str(certs / 'ca.crt')!r},"
            f"certificate={str(certs / 'server.crt')!r}, key={str(certs / 'server.key')!r}))",
        )

    def wait_for_hub(self) -> None:
        until(lambda: listens(self.port) and listens(self.admin_port), 30)

    def make(self, name: str, shards: str = "shards") -> Path:
        """A new site's folder."""
        site = SiteConfig(name=name, shards=shards, superlink=f"localhost:{self.port}")
        make_site(self.folder / name, site, self.certificates / "ca.crt")
        return self.folder / name

    def register(self, name: str) -> None:
        self.ids[name] = register_site(self.state, self.folder / name / "key.pub", name)

    def join(self, name: str, preload: tuple[str, ...] = ("numpy",)) -> None:
        self.nodes[name] = self._python(
            name,
            "import logging; logging.basicConfig(level=20); from clients.node import run_node;"
            f"run_node({str(self.folder / name)!r}, preload={list(preload)!r})",
        )

    def run(self, app: Path, **config: Any) -> tuple[str, Path]:
        """Start a run; its id and where its rounds are written."""
        out = self.folder / f"rounds-{time.time_ns()}.json"
        values = " ".join(f"{key}={json.dumps(value)}" for key, value in {**config, "out": str(out)}.items())
        return str(ask_hub(self.state, "run", str(app), "hub", "--run-config", values)["run-id"]), out

    def status(self, run: str) -> str:
        try:
            return str(ask_hub(self.state, "list", "hub", "--run-id", run)["runs"][0]["status"])
        except FederationError:  # it may be away for a moment
            return ""

    def approve(self, sha256: str, *names: str) -> None:
        for name in names:
            approve(self.folder / name, sha256, "test")

    def stop(self) -> None:
        processes = [*self.nodes.values(), *([self.hub] if self.hub else [])]
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                kill_all(family(process.pid))


@contextlib.contextmanager
def federation(folder: Path) -> Iterator[Federation]:
    """A federation that is stopped at the end, whatever happened."""
    here = Federation(folder)
    try:
        yield here
    finally:
        here.stop()


def rounds(out: Path) -> list[dict[str, Any]]:
    """What a run has written so far."""
    return list(json.loads(out.read_text())) if out.exists() else []


def family(process: int) -> list[int]:
    """A process and all below it."""
    return [process, *(child.pid for child in psutil.Process(process).children(recursive=True))]


def kill_all(processes: list[int]) -> None:
    for pid in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def serve_tls(certificates: Path, host: str = "127.0.0.1", behind: float | None = 0.0) -> ThreadingHTTPServer:
    """Something that looks like a hub, whose clock is so many seconds behind that of this machine, or is not told."""

    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response_only(200)
            if behind is not None:
                self.send_header("date", self.date_time_string(time.time() - behind))
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer((host, 0), Health)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "server.crt", certificates / "server.key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
