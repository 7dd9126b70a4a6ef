"""The doctor before a real Prefect server and a real Ray head, and after both went away."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from waiting import until_it_answers

from dermaflow.ports import free_port

pytest.importorskip("prefect")
pytest.importorskip("ray")

from dermaflow.doctor.services import Clocks, check_prefect, check_ray

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@contextlib.contextmanager
def process(folder: Path, *command: object, **environment: str) -> Iterator[None]:
    """A command in a process group of its own, which is gone at the end."""
    with (folder / f"{command[0]}.txt").open("wb") as said:
        started = subprocess.Popen(
            [str(Path(sys.executable).parent / str(command[0])), *map(str, command[1:])],
            env=os.environ | environment, stdout=said, stderr=said, start_new_session=True,
        )  # fmt: skip
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()


def test_a_prefect_server_is_reached_and_its_version_read(tmp_path: Path) -> None:
    import prefect

    port, clocks = free_port(), Clocks()
    chosen = {"PREFECT_HOME": str(tmp_path), "PREFECT_API_URL": f"http://127.0.0.1:{port}/api"}
    home = {"PREFECT_HOME": str(tmp_path), "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"}
    with process(tmp_path, "prefect", "server", "start", "--host", "127.0.0.1", "--port", port, **home):
        until_it_answers(f"http://127.0.0.1:{port}/api/health", below=500)
        [found] = check_prefect(clocks, chosen)
    assert found.state == "ok" and f"version {prefect.__version__}, here {prefect.__version__}" in found.found
    assert abs(clocks.ahead["Prefect"]) < 5
    [gone] = check_prefect(clocks, chosen)
    assert gone.state == "problem"


def test_a_ray_head_says_its_version_and_resources_to_who_has_the_token(tmp_path: Path) -> None:
    import ray

    port, dashboard, clocks = free_port(), free_port(), Clocks()
    short = tempfile.mkdtemp(prefix="ray")  # paths of sockets have at most 107 bytes
    token = "0" * 64
    chosen = {"RAY_ADDRESS": f"127.0.0.1:{port}", "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    start = ("ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=1",
             f"--dashboard-port={dashboard}", "--include-dashboard=true", f"--ray-client-server-port={free_port()}",
             f"--temp-dir={short}", "--disable-usage-stats")  # fmt: skip
    with process(tmp_path, *start, **own):
        until_it_answers(f"http://127.0.0.1:{dashboard}/api/version", below=500)
        end = time.monotonic() + 120  # until the head has told the dashboard what it has
        while (found := list(check_ray(clocks, chosen | own)))[-1].state != "ok" and time.monotonic() < end:
            time.sleep(1)
        [refused] = check_ray(clocks, chosen | {"RAY_AUTH_TOKEN": "1" * 64})
    assert [check.state for check in found] == ["ok", "ok"], found
    assert found[0].found.endswith(f"version {ray.__version__}")
    assert found[1].found == "0 of 1 CPUs and 0 of 0 GPUs are taken"
    assert refused.state == "problem" and "refuses the token" in refused.found
    shutil.rmtree(short, ignore_errors=True)
    [gone] = check_ray(clocks, chosen)
    assert gone.state == "problem"
