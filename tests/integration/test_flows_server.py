"""The flows against a real Prefect server: asked for, watched and cancelled from outside, with no Ray left behind."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("prefect")
pytest.importorskip("ray")

from prefect_here import Server, a_server, stop
from tiny_data import draw, prepare_here
from waiting import until

from dermaflow.bundles.bundle import load_bundle

pytestmark = pytest.mark.timeout(900)  # server, runner and Ray start in processes of their own; busy machines take long

RECIPE = """
name: tiny
input: {height: 24, width: 32}
backbone: {name: seed_cnn, weights: none}
optim: {batch_size: 16, head_epochs: 0, epochs: EPOCHS, layer_decay: 1.0}
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with a_server(tmp_path_factory.mktemp("server")) as made:
        yield made


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


@pytest.mark.slow
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
