"""Flower's own commands, as DermaFlow calls them: submit a run, follow it, stop it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psutil

from clients.offline import environment
from dermaflow.errors import FederationError

if TYPE_CHECKING:  # it imports torch, for which a hub would wait
    from clients.plan import Plan


ASK_EVERY = 15.0
"""Seconds between two questions to Flower whether a run still goes on."""


def command(name: str) -> str:
    """Path of one of Flower's commands, those of this Python first.

    Raises:
        FederationError: Flower is not installed.
    """
    beside = str(Path(sys.executable).parent)
    found = shutil.which(name, path=os.pathsep.join([beside, os.environ.get("PATH", "")]))
    if found is None:
        raise FederationError(f"no command {name}", todo="pip install 'dermaflow[federated]'")
    return found


def flwr(home: Path, *arguments: str, timeout: float = 120) -> dict[str, Any]:
    """One call of Flower's command line.

    Args:
        home: Flower's folder, with the connection.
        arguments: For instance ``list hub``.
        timeout: Seconds.

    Returns:
        Its answer.

    Raises:
        FederationError: It failed; what it said is in the error.
    """
    done = subprocess.run(
        [command("flwr"), *arguments, "--format", "json"], capture_output=True, text=True, timeout=timeout,
        env=environment(home), check=False,
    )  # fmt: skip
    with contextlib.suppress(ValueError):  # a line for people may stand before the JSON
        found: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
        if done.returncode == 0 and found.get("success", True):
            return found
    said = (done.stdout + done.stderr).strip()
    raise FederationError(f"flwr {' '.join(arguments)}: {said[-600:]}", where=home, todo="does the hub run?")


def submit(home: Path, connection: str, plan: Plan, *options: str) -> int:
    """Start a run on a SuperLink; its id."""
    with tempfile.TemporaryDirectory() as scratch:
        app = Path(scratch) / "app"  # a copy: Flower rewrites the pyproject of what it is given
        shutil.copytree(str(resources.files("clients") / "app"), app, ignore=shutil.ignore_patterns("__pycache__"))
        config = Path(scratch) / "run.toml"
        config.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in plan.run_config().items()))
        return int(flwr(home, "run", str(app), connection, "--run-config", str(config), *options)["run-id"])


def follow(
    home: Path, connection: str, run: int, look: Callable[[], None], ended: Callable[[], bool]
) -> None:  # fmt: skip
    """Wait for the end of a run, and stop it if this process is stopped.

    Args:
        home: Flower's folder with the connection.
        connection: Name of the SuperLink.
        run: Its id.
        look: Called twice a second, to show progress.
        ended: Whether the run has written its result; Flower itself, whose command line takes a second of a core, is
            asked seldom until then.

    Raises:
        FederationError: The run failed; the end of its log is in the error.
    """
    asked = time.monotonic()
    try:
        while True:
            look()
            if ended() or time.monotonic() - asked > ASK_EVERY:
                found: dict[str, Any] = flwr(home, "list", connection, "--run-id", str(run))["runs"][0]
                asked = time.monotonic()
                if found["status"].startswith("finished"):
                    break
            time.sleep(0.5)
    except BaseException:
        stop = [command("flwr"), "stop", str(run), connection]
        subprocess.run(stop, env=environment(home), capture_output=True, check=False)
        raise
    look()
    if found["status"] != "finished:completed":
        raise FederationError(
            f"{found['status']}: {found.get('status-details', '')}\n{log_of(home, connection, run)}",
            where=f"run {run}", todo="cure that and run the same command again: finished rounds are kept",
        )  # fmt: skip


def log_of(home: Path, connection: str, run: int, lines: int = 30) -> str:
    """The last lines of a run's log."""
    done = subprocess.run(
        [command("flwr"), "log", str(run), connection, "--show"], capture_output=True, text=True, timeout=60,
        env=environment(home), check=False,
    )  # fmt: skip
    return "\n".join(done.stdout.splitlines()[-lines:])


@contextmanager
def simulation_engine(home: Path, sites: int, gpus: float = 0.0) -> Iterator[tuple[str, tuple[str, ...]]]:
    """A SuperLink on this machine that plays all sites itself, on Ray (``RAY_ADDRESS``, or one of its own).

    Yields:
        The name of its connection, and the options for `submit`.
    """
    home.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    log = home / "superlink.log"
    cpus = os.cpu_count() or 1
    actors = max(1, min(sites, cpus))
    settings = {"DERMAFLOW_THREADS": str(cpus // actors), "RAY_USAGE_STATS_ENABLED": "0"} | environment(home)
    if not os.environ.get("RAY_ADDRESS"):
        settings["RAY_ADDRESS"] = "local"  # not some cluster that `ray start` left a note of on this machine
    elif Path("~/.ray/auth_token").expanduser().exists():
        settings = {"RAY_AUTH_MODE": "token"} | settings  # `ray start` asks for it; Flower's process would not send it
    with log.open("w") as stream:
        link = subprocess.Popen(
            [command("flower-superlink"), "--insecure", "--simulation", "--isolation", "subprocess",
             "--host", "127.0.0.1", "--port", str(port), "--disable-runtime-dependency-installation"],
            env=settings, stdout=stream, stderr=stream, start_new_session=True,
        )  # fmt: skip
    try:
        _until_healthy(link, port, log)
        options = {
            "num-supernodes": sites, "client-resources-num-cpus": cpus // actors, "client-resources-num-gpus": gpus,
        }  # fmt: skip
        if not os.environ.get("RAY_ADDRESS"):  # a cluster that is there has its own CPUs
            options["init-args-num-cpus"] = cpus
        yield "here", ("--federation-config", " ".join(f"{key}={value}" for key, value in options.items()))
    finally:
        _end(link)


def _until_healthy(link: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end and link.poll() is None:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=2).is_success:
                return
        except httpx.HTTPError:
            time.sleep(0.2)
    raise FederationError("Flower's SuperLink did not start", where=log, todo="read its log")


def _end(link: subprocess.Popen[bytes]) -> None:
    """End a process and everything it started; Flower gives some of it, the coordinator's app, a session of its own."""
    started: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        started = psutil.Process(link.pid).children(recursive=True)
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(link.pid, number)
        except ProcessLookupError:
            break
        try:
            link.wait(10)
        except subprocess.TimeoutExpired:
            continue
        time.sleep(0.5)
    for process in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
