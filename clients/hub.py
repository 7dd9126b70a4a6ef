"""The coordinator's hub: Flower's SuperLink behind two TLS listeners, and the process that starts runs.

Sites reach the public listener, which knows nothing but their calls; operators and runs reach the other one, on
loopback. Runs live in a process of their own that outlives the hub: after a crash, a hub that is back within a minute
finds every round where it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from clients.engine import flwr
from clients.offline import environment, go_offline
from clients.site_config import AUDIT_NAME
from dermaflow import storage
from dermaflow.audit import AuditLog
from dermaflow.errors import DermaflowError
from dermaflow.locks import is_locked, locked

log = logging.getLogger(__name__)

CONNECTION = "hub"
"""Name of the connection that the hub writes for operators: ``flwr list hub``."""
HOME = "flower"  # FLWR_HOME in the state folder
DATABASE = "hub.db"
ORPHAN = 120.0  # seconds without a hub after which the process of the runs ends; Flower gives a run up after 60


class HubError(DermaflowError):
    """The hub cannot be started or asked."""


class HubOptions(BaseModel):
    """How a hub runs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    state: Path = Field(Path("runs/hub"), description="folder: database, audit log, connection of operators")
    ca: Path = Field(description="certificate of the authority, PEM; sites have the same")
    certificate: Path = Field(description="certificate of the hub, PEM; it must name 127.0.0.1, too")
    key: Path = Field(description="its private key, PEM")
    host: str = Field("0.0.0.0", description="address that sites reach")
    port: int = Field(8443, ge=1, le=65535)
    admin_port: int = Field(9443, ge=1, le=65535, description="on loopback, for operators and runs")


def run_hub(options: HubOptions) -> None:
    """Run until SIGTERM or Ctrl-C. Call it in the main thread.

    Raises:
        HubError: A certificate is missing, a port is taken, or a hub with this state folder runs already.
    """
    options = options.model_copy(
        update={name: getattr(options, name).absolute() for name in ("state", "ca", "certificate", "key")}
    )
    for file in (options.ca, options.certificate, options.key):
        if not file.is_file():
            raise HubError("no such file", where=file, todo="make them: deploy/federation/make_certificates.sh")
    for host, port in ((options.host, options.port), ("127.0.0.1", options.admin_port)):
        _check_port(host, port)
    home = options.state / HOME
    home.mkdir(parents=True, exist_ok=True)
    go_offline(home)
    with locked(options.state / "hub.lock", HubError("a hub runs already", where=options.state, todo="stop it first")):
        _write_connection(options, home)
        secret = _secret(options.state / "secret")
        audit = AuditLog(options.state / AUDIT_NAME)
        audit.append("hub started", public=f"{options.host}:{options.port}")
        runs = _start_runs(options)
        try:
            asyncio.run(_serve(options, secret, audit))
        finally:
            _stop_runs(options.state, runs)
            audit.append("hub stopped")


def _check_port(host: str, port: int) -> None:
    """Raise HubError if something listens there: uvicorn would end the process and name neither file nor remedy."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise HubError(f"port {port}: {error.strerror}", where=host, todo="choose another port") from None


async def _serve(options: HubOptions, secret: bytes, audit: AuditLog) -> None:
    import uvicorn
    from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
    from flwr.superlink.main import create_app

    from clients.guard import Admin, Public
    from clients.hub_recovery import survive_kills

    survive_kills(options.state / DATABASE)
    app = create_app(_flower_config(options, secret), SuperLinkLifespan)
    links = app.state.linkstate_factory

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:  # two servers in one process: signals are handled below
            yield

    def server(guard: Any, host: str, port: int, lifespan: Any) -> Server:
        return Server(
            uvicorn.Config(
                guard, host=host, port=port, lifespan=lifespan, ssl_certfile=options.certificate,
                ssl_keyfile=options.key, access_log=False, server_header=False, log_level="warning",
                timeout_graceful_shutdown=5,
            )
        )  # fmt: skip

    admin = server(Admin(app, audit), "127.0.0.1", options.admin_port, "on")
    public = server(
        Public(app, audit, lambda key: links.state().get_node_id_by_public_key(key)),
        options.host, options.port, "off",
    )  # fmt: skip

    def leave() -> None:
        admin.should_exit = public.should_exit = True

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, leave)
    served = [asyncio.create_task(each.serve()) for each in (admin, public)]
    # One that ends, ends the other
    await asyncio.wait(served, return_when=asyncio.FIRST_COMPLETED)
    leave()
    await asyncio.gather(*served)


def _flower_config(options: HubOptions, secret: bytes) -> Any:
    from flwr.common.constant import ISOLATION_MODE_PROCESS, TRANSPORT_TYPE_GRPC_RERE
    from flwr.superlink.config_loader import SuperLinkLifespanConfig, load_control_authn_plugin

    files = (options.ca, options.certificate, options.key)
    return SuperLinkLifespanConfig(
        host="127.0.0.1", port=options.admin_port, control_address="", fleet_api_address=None,
        fleet_api_type=TRANSPORT_TYPE_GRPC_RERE, health_server_address=None, insecure=False,
        certificates=(files[0].read_bytes(), files[1].read_bytes(), files[2].read_bytes()),
        superexec_auth_secret=secret, authn_plugin=load_control_authn_plugin(), event_log_plugin=None,
        fleet_event_log_plugin=None, enable_event_log=False, artifact_provider=None, enable_supernode_auth=True,
        simulation=False, ssl_ca_certfile=str(options.ca), ssl_certfile=str(options.certificate),
        ssl_keyfile=str(options.key), database=str(options.state / DATABASE), isolation=ISOLATION_MODE_PROCESS,
        runtime_dependency_install=False,
    )  # fmt: skip


def _write_connection(options: HubOptions, home: Path) -> None:
    """What `flwr` needs to reach this hub; Flower's own service is not in it."""
    text = (
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
        f'address = "127.0.0.1:{options.admin_port}"\nroot-certificates = {json.dumps(str(options.ca))}\n'
    )
    storage.write_bytes(home / "config.toml", text.encode())


def _secret(path: Path) -> bytes:
    """Kept over restarts: the process of the runs, which may be older than this hub, knows it."""
    if not path.exists():
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
            stream.write(secrets.token_bytes(32))
    return path.read_bytes()


def _start_runs(options: HubOptions) -> subprocess.Popen[bytes] | None:
    """Start the process of the runs, unless that of a hub that crashed is still there and serves this one."""
    address, written = f"127.0.0.1:{options.admin_port}", options.state / "runs.json"
    if is_locked(options.state / "runs.lock"):
        found = json.loads(written.read_text())
        if found["address"] == address:
            log.info("runs go on in process %d", found["pid"])
            return None
        _end(found["pid"], options.state / "runs.lock")
    with (options.state / "runs.log").open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "clients.hub", str(options.state), address, str(options.ca)],
            env=environment(options.state / HOME) | {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "1"},
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def _stop_runs(state: Path, started: subprocess.Popen[bytes] | None) -> None:
    if is_locked(state / "runs.lock"):
        _end(json.loads((state / "runs.json").read_text())["pid"], state / "runs.lock")
    if started is not None:
        started.terminate()
        started.wait(10)


def _end(pid: int, lock: Path) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + 10
        while is_locked(lock) and time.monotonic() < deadline:
            time.sleep(0.1)
        if is_locked(lock):
            os.kill(pid, signal.SIGKILL)


def serve_runs(state: Path, address: str, ca: Path) -> None:
    """The process of the runs: asks the hub for runs to start, and starts a process for each. Until SIGTERM.

    Args:
        state: Folder of the hub.
        address: Its listener on loopback, host:port.
        ca: Certificate of the authority.
    """
    from flwr.supercore.superexec.run_superexec import run_superexec

    def watch() -> None:
        last = time.monotonic()
        while time.monotonic() - last < ORPHAN:
            time.sleep(1)
            if is_locked(state / "hub.lock"):
                last = time.monotonic()
        os.kill(os.getpid(), signal.SIGTERM)

    busy = HubError("the process of the runs runs already", where=state, todo="stop it first")
    with locked(state / "runs.lock", busy):
        storage.write_bytes(state / "runs.json", json.dumps({"pid": os.getpid(), "address": address}).encode())
        threading.Thread(target=watch, daemon=True, name="hub").start()
        run_superexec(
            runtime_api_address=address, insecure=False, root_certificates_path=str(ca),
            superexec_auth_secret=(state / "secret").read_bytes(), runtime_dependency_install=False,
        )  # fmt: skip


def ask_hub(state: Path, *arguments: str, timeout: float = 60) -> dict[str, Any]:
    """One call of Flower's own command line to the hub of this machine: `clients.engine.flwr`."""
    return flwr(state.absolute() / HOME, *arguments, timeout=timeout)


def register_site(state: Path, public_key: Path, name: str) -> str:
    """Let a site in.

    Args:
        state: Folder of the running hub.
        public_key: OpenSSH file that the site sent.
        name: Of the site.

    Returns:
        Its node id.

    Raises:
        FederationError: The hub does not answer, or the key is registered already.
    """
    found = ask_hub(state, "supernode", "register", str(public_key), CONNECTION, "--name", name)
    return str(found["node-id"])


if __name__ == "__main__":
    serve_runs(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
