"""The flows against a real Prefect server: asked for, watched and cancelled from outside, with no Ray left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest

pytest.importorskip("prefect")
pytest.importorskip("ray")

from tiny_data import draw, prepare_here

from dermaflow.bundles.bundle import load_bundle

pytestmark = pytest.mark.timeout(900)  # server, runner and Ray start in processes of their own; busy machines take long

RECIPE = """
name: tiny
input: {height: 24, width: 32}
backbone: {name: seed_cnn, weights: none}
optim: {batch_size: 16, head_epochs: 0, epochs: EPOCHS, layer_decay: 1.0}
"""
T = TypeVar("T")


@dataclass
class Server:
    """A Prefect server on loopback with a home of its own."""

    api: httpx.Client
    environment: dict[str, str]
    folder: Path

    def get(self, path: str) -> Any:
        return self.api.get(path).raise_for_status().json()

    def post(self, path: str, body: dict[str, Any]) -> Any:
        return self.api.post(path, json=body).raise_for_status().json()

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


def until(condition: Callable[[], T], seconds: float, what: str) -> T:
    """Wait until a condition holds; its value."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.5)
    raise AssertionError(f"not within {seconds} s: {what}")


def stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    bare = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment = bare | {
        "PREFECT_HOME": str(folder / "prefect"), "PREFECT_API_URL": url, "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    made = Server(httpx.Client(base_url=url, timeout=60), environment, folder)
    process = made.python("prefect", "server", "start", "--host", "127.0.0.1", "--port", port)
    try:
        until(lambda: _answers(made), 240, "the server answers")
        yield made
    finally:
        stop(process)


def _answers(server: Server) -> bool:
    try:
        return server.api.get("/health").is_success
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def runner(server: Server) -> Iterator[subprocess.Popen[bytes]]:
    """`python -m flows serve`: takes runs that others ask the server for."""
    process = server.python("flows", "serve")
    try:
        until(lambda: server.api.get("/deployments/name/pipeline/dermaflow").is_success, 240, "the flows are offered")
        yield process
    finally:
        stop(process)


@pytest.fixture(scope="module")
def data(server: Server) -> Path:
    return draw(server.folder / "data", 150)


@pytest.fixture(scope="module")
def shards(server: Server, data: Path) -> Path:
    prepare_here(data, server.folder / "shards")
    return server.folder / "shards"


@pytest.fixture(scope="module")
def long_recipe(server: Server) -> Path:
    """Hours of training."""
    recipe = server.folder / "long.yaml"
    recipe.write_text(RECIPE.replace("EPOCHS", "20000"))
    return recipe


def ask_for(server: Server, flow: str, **parameters: object) -> str:
    """Ask the server for a run; its id."""
    deployment = server.get(f"/deployments/name/{flow}/dermaflow")["id"]
    named = {name: value if isinstance(value, int) else str(value) for name, value in parameters.items()}
    return server.post(f"/deployments/{deployment}/create_flow_run", {"parameters": named})["id"]


def family(pid: int) -> dict[int, str]:
    """A process and all that descend from it, with their command lines; those that ended are left out."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text().rsplit(")", 1)[1].split()[:2]
            name = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if state != "Z":
            parents[int(folder.name)], names[int(folder.name)] = int(parent), name
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return {one: names[one] for one in found if one in names}


def training_on_ray(server: Server, starter: subprocess.Popen[bytes], run: str) -> dict[int, str]:
    """Wait until a run trains on Ray; the processes that Ray has for it."""
    until(
        lambda: any(line["name"] == "dermaflow.learning.cluster" and "epoch 1:" in line["message"]
                    for line in server.logs(run)),
        500, "an epoch of Ray Train in the run's logs",
    )  # fmt: skip
    processes = {pid: name for pid, name in family(starter.pid).items() if "ray" in name}
    assert any("raylet" in name for name in processes.values()), processes
    assert any("RayTrainWorker" in name for name in processes.values()), processes
    return processes


def all_gone(processes: dict[int, str]) -> bool:
    return not any(pid in family(pid) for pid in processes)


def nothing_half_written(model: Path) -> bool:
    return not model.exists() and not list(model.parent.glob(f".{model.name}.*"))


@pytest.mark.slow
def test_pipeline_asked_for_through_the_api(
    server: Server, runner: subprocess.Popen[bytes], data: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE.replace("EPOCHS", "2"))
    run = ask_for(server, "pipeline", data=data, out=tmp_path / "out", recipe=recipe, workers=1, resamples=20)
    ended = until(lambda: (state := server.state(run)) in ("COMPLETED", "FAILED", "CRASHED") and state, 500, "the end")
    assert ended == "COMPLETED", server.said()
    assert load_bundle(tmp_path / "out" / "model").bundle.metrics is not None

    def said() -> list[dict[str, Any]]:  # lines come in batches
        lines = [line for line in server.logs(run) if line["name"] == "dermaflow.learning.cluster"]
        return [line for line in lines if "epoch 1: loss" in line["message"]]

    assert until(said, 30, "the epochs of Ray Train in the run's logs")
    found = server.post("/artifacts/filter", {"flow_runs": {"id": {"any_": [run]}}})
    assert {artifact["key"] for artifact in found} == {
        "split-counts", "training-curve", "epochs", "headline-figures", "report",
    }  # fmt: skip


def test_cancelled_through_the_api_leaves_no_ray_behind(
    server: Server, runner: subprocess.Popen[bytes], shards: Path, long_recipe: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    run = ask_for(server, "train", shards=shards, model=model, recipe=long_recipe, workers=1)
    processes = training_on_ray(server, runner, run)
    server.post(f"/flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}})
    until(lambda: server.state(run) == "CANCELLED", 120, "the run is cancelled")
    until(lambda: all_gone(processes), 60, f"Ray's processes are gone: {processes}")
    assert runner.poll() is None
    assert nothing_half_written(model)


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_stopped_by_a_signal_leaves_no_ray_behind(
    server: Server, shards: Path, long_recipe: Path, tmp_path: Path, ending: signal.Signals
) -> None:
    model, before = tmp_path / "model", server.latest_run("train")
    process = server.python(
        "flows", "train", "--shards", shards, "--model", model, "--recipe", long_recipe, "--workers", 1
    )
    try:
        run = until(lambda: (new := server.latest_run("train")) != before and new, 240, "the run is known")
        processes = training_on_ray(server, process, run)
        process.send_signal(ending)
        assert process.wait(120) != 0
    finally:
        stop(process)
    until(lambda: all_gone(processes), 60, f"Ray's processes are gone: {processes}")
    until(lambda: server.state(run) in ("CRASHED", "CANCELLED"), 60, "the run is known to have ended")
    assert nothing_half_written(model)


@pytest.mark.slow
def test_time_limit_ends_training_on_ray(server: Server, shards: Path, long_recipe: Path, tmp_path: Path) -> None:
    model, before = tmp_path / "model", server.latest_run("train")
    process = server.python(
        "flows", "train", "--shards", shards, "--model", model, "--recipe", long_recipe, "--workers", 1,
        "--hours", 30 / 3600,
    )  # fmt: skip
    try:
        assert process.wait(400) != 0
    finally:
        stop(process)
    run = server.latest_run("train")
    assert run != before
    assert server.get(f"/flow_runs/{run}")["state"]["type"] == "FAILED", server.said()

    def task_states() -> list[str]:
        found = server.post("/task_runs/filter", {"flow_runs": {"id": {"any_": [run]}}})
        return [task["state"]["name"] for task in found]

    until(lambda: task_states() == ["TimedOut"], 30, "the server knows that the task timed out")
    assert nothing_half_written(model)
