"""Runs a site's app: a process that has imported everything once, and forks for every message.

A fresh process would import PyTorch each time, 4 CPU seconds a message. It also is the site's gate: it alone takes work
from the SuperNode, and runs no app whose SHA-256 is not approved in the site's policy. Nothing here touches CUDA before
it forks.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from clients.policy import PolicyError, Refused, app_refusal, load_policy
from clients.site_config import AUDIT_NAME
from clients.supernode import DIED, SECRET_NAME, end_with_parent
from dermaflow.audit import AuditLog

log = logging.getLogger(__name__)

POLL = 0.15  # seconds between two looks for work, on loopback
PATIENCE = 5.0  # seconds that a running app has to end when the site leaves


class Launcher:
    """Takes tasks from the SuperNode and forks for each.

    Args:
        folder: Of the site.
        address: Of the SuperNode on loopback, host:port.
    """

    def __init__(self, folder: Path, address: str) -> None:
        from flwr.supercore.interceptors import SuperExecAuthHttpInterceptor

        self.folder, self.address = folder, address
        self.audit = AuditLog(folder / AUDIT_NAME)
        self._tokens: dict[int, str] = {}  # of running apps, by process id
        self._parent = os.getppid()
        self._client = self._connect(
            SuperExecAuthHttpInterceptor(
                master_secret=(folder / SECRET_NAME).read_bytes(), protected_methods={"/flwr.proto.Runtime/AcquireTask"}
            )
        )

    def _connect(self, identity: Any) -> Any:
        from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
        from flwr.supercore.runtime import RuntimeHttpClient

        return RuntimeHttpClient.from_server_address(
            server_address=self.address, insecure=True, root_certificates=None,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="SuperExec"), identity],
        )  # fmt: skip

    def run(self) -> None:
        """Until SIGTERM, or until the process that started this one is gone."""
        import httpx
        from flwr.proto.runtime_pb2 import AcquireTaskRequest
        from flwr.supercore.constant import TaskType

        try:
            while os.getppid() == self._parent:
                try:
                    found = self._client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
                    if found.HasField("task") and found.token:
                        self._fork(found.token)
                except httpx.HTTPStatusError as error:
                    log.warning("no work: %s", error)
                    time.sleep(5)
                except httpx.HTTPError:  # the SuperNode starts, or starts again
                    pass
                self._reap()
                time.sleep(POLL)
        finally:
            self._end_apps()

    def _fork(self, token: str) -> None:
        if (pid := os.fork()) == 0:
            code = 1
            try:
                code = run_app(self.folder, self.address, token)
            except BaseException:
                log.exception("the app's process failed")
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        self._tokens[pid] = token

    def _reap(self) -> None:
        for pid in list(self._tokens):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:
                continue
            token = self._tokens.pop(pid)
            if os.WIFSIGNALED(status):  # too little memory, for instance: it could not answer itself
                name = signal.Signals(os.WTERMSIG(status)).name
                self.audit.append("app died", signal=name)
                self._answer_for(token, f"{DIED} {name}")

    def _answer_for(self, token: str, details: str) -> None:
        import httpx
        from flwr.common.constant import SubStatus
        from flwr.proto.runtime_pb2 import PushTaskOutputRequest
        from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor

        with contextlib.suppress(httpx.HTTPError):
            client = self._connect(RuntimeTokenHttpInterceptor(token))
            client.PushTaskOutput(PushTaskOutputRequest(sub_status=SubStatus.FAILED, details=details))
            client.close()

    def _end_apps(self) -> None:
        deadline = time.monotonic() + PATIENCE
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in self._tokens:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, number)  # with whatever the app has started
            while self._tokens and (number == signal.SIGKILL or time.monotonic() < deadline):
                self._tokens = {pid: token for pid, token in self._tokens.items() if not os.waitpid(pid, os.WNOHANG)[0]}
                time.sleep(0.05)


def run_app(folder: Path, address: str, token: str) -> int:
    """Work on one message, in a process of its own.

    Args:
        folder: Of the site.
        address: Of the SuperNode.
        token: Of the task. It is in no command line, so nobody on this machine can read it there.

    Returns:
        Exit status.
    """
    os.setpgid(0, 0)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    end_with_parent()
    import flwr.supernode.runtime.run_clientapp as task
    from flwr.app.error import Error

    install = task.install_from_fab

    def install_approved(content: bytes, *args: Any, **options: Any) -> Path:
        check_app(folder, content)
        return install(content, *args, **options)

    def discreet(code: int, reason: str | None = None) -> Any:
        # The text of an error can hold paths, ids and values of the site; only what was worded for others leaves it
        if reason and not reason.startswith(f"{Refused}:"):
            kind = reason.partition(":<")[0]
            reason = f"{kind}; the text is in the log of the site"
        return Error(code, reason)

    task.install_from_fab, task.Error = install_approved, discreet  # type: ignore[assignment,misc]
    sys.argv = ["flwr-clientapp"]
    try:
        task.run_clientapp(runtime_api_address=address, token=token, insecure=True, runtime_dependency_install=False)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def check_app(folder: Path, content: bytes) -> None:
    """Refuse an app that is not approved, before a byte of it is unpacked.

    Raises:
        Refused: Its hash is not in the site's policy, or the policy cannot be read.
    """
    sha256 = hashlib.sha256(content).hexdigest()
    try:
        reason = app_refusal(load_policy(folder), sha256)
    except PolicyError as error:
        log.error("%s", error)
        reason = "the policy of this site cannot be read"
    if reason:
        AuditLog(folder / AUDIT_NAME).append("app refused", app=sha256, reason=reason)
        raise Refused(reason, todo=f"the site approves it with: dermaflow site approve {sha256}")


def preload(modules: list[str]) -> None:
    """Import what every app needs, so that no app waits for it."""
    # `torch.cuda.is_available()` in some library must not initialise CUDA here: no forked process could use it then
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            log.warning("%s is not imported beforehand: %s", name, error)


def main(folder: Path, address: str, modules: list[str]) -> None:
    """Import the modules, then serve until SIGTERM."""

    def leave(*_: object) -> NoReturn:
        raise SystemExit(0)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)
    preload(["flwr.supernode.runtime.run_clientapp", *modules])
    Launcher(folder, address).run()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("flwr").propagate = False  # it writes for itself
    logging.getLogger("httpx").setLevel(logging.WARNING)  # or it tells of every request
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
