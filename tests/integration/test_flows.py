"""The flows without a Prefect server: files, artifacts, what is skipped and what is not, errors, promotion."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("prefect")

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, FlowRunFilter, LogFilter
from prefect.client.schemas.objects import Artifact, FlowRun, TaskRun
from prefect.flows import load_flow_from_entrypoint
from prefect.states import Failed
from prefect.task_engine import TaskRunTimeoutError
from prefect.utilities.callables import parameter_schema
from prefect_here import own_prefect
from tiny_bundle import a_bundle, save_tiny
from tiny_data import METADATA, draw, snapshot

from dermaflow.bundles.bundle import load_bundle
from dermaflow.bundles.registry import Registry
from dermaflow.errors import DataError, RecipeError, StorageError
from dermaflow.preparation.prepare import prepare as prepare_archive
from flows import tasks
from flows.pipeline import pipeline
from flows.prepare import prepare
from flows.promotion import decide

pytestmark = pytest.mark.timeout(600)  # a first start of Prefect's database takes a busy machine minutes

RECIPE = """
name: tiny
input: {height: 24, width: 32}
backbone: {name: seed_cnn, weights: none}
optim: {batch_size: 16, head_epochs: 0, epochs: 2, layer_decay: 1.0}
"""


@dataclass
class World:
    """An archive, a recipe, and what a first run of the pipeline made of them in another process."""

    data: Path
    out: Path
    recipe: Path
    registry: Path
    said: str

    def run(self, **changes: Any) -> dict[str, list[str]]:
        """Run the pipeline here; returns the states that each task ended in, in order."""
        chosen = {"data": self.data, "out": self.out, "recipe": str(self.recipe), "registry": str(self.registry)}
        state = pipeline(**chosen | {"resamples": 20} | changes, return_state=True)
        assert state.is_completed(), state.message
        return states(last_run())

    @property
    def model(self) -> Path:
        return self.out / "model"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("flows")
    home, recipe = folder / "prefect", folder / "tiny.yaml"
    recipe.write_text(RECIPE)
    made = World(draw(folder / "data", 150), folder / "out", recipe, folder / "registry", "")
    bare = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    done = subprocess.run(
        [sys.executable, "-m", "flows", "pipeline", "--data", made.data, "--out", made.out, "--recipe", recipe,
         "--registry", made.registry, "--resamples", "20"],
        env=bare | {"PREFECT_HOME": str(home), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    made.said = done.stdout + done.stderr
    assert done.returncode == 0, made.said
    with own_prefect(home):
        yield made


def last_run() -> FlowRun:
    with get_client(sync_client=True) as client:
        return max(client.read_flow_runs(), key=lambda run: run.created)


def states(run: FlowRun) -> dict[str, list[str]]:
    """Names of the states in which the tasks of a run ended; Prefect records them a moment later."""
    found: dict[str, list[str]] = {}
    with get_client(sync_client=True) as client:
        for _ in range(120):
            runs = client.read_task_runs(flow_run_filter=FlowRunFilter(id={"any_": [run.id]}))
            if runs and all(run.state and run.state.is_final() for run in runs):
                break
            time.sleep(0.5)
    for one in sorted(runs, key=lambda run: run.start_time or run.created):
        found.setdefault(one.name.rsplit("-", 1)[0], []).append(one.state.name)
    return found


def artifacts(run: FlowRun) -> dict[str, Artifact]:
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(
            artifact_filter=ArtifactFilter(), flow_run_filter=FlowRunFilter(id={"any_": [run.id]})
        )
    return {artifact.key: artifact for artifact in found}


def test_one_command_without_a_server_makes_files_artifacts_and_logs(world: World) -> None:
    run = last_run()
    assert run.state.is_completed()
    assert load_bundle(world.model).bundle.metrics is not None
    assert (world.out / "report" / "report.html").stat().st_size > 10_000
    champion = Registry(world.registry).champion()
    assert champion is not None
    assert Registry(world.registry).history()[0].reason == "the first model of this registry"

    made = artifacts(run)
    assert set(made) == {"split-counts", "training-curve", "epochs", "headline-figures", "report", "promotion"}
    assert '"Melanoma-safe"' in made["headline-figures"].data
    assert "lesion-bootstrap" in made["headline-figures"].description
    assert made["training-curve"].data.startswith("data:image/svg+xml;base64,")
    assert (world.out / "report" / "report.html").as_uri() in made["report"].data
    assert "Promoted to champion" in made["promotion"].data

    assert "epoch 1: loss" in world.said
    with get_client(sync_client=True) as client:
        lines = client.read_logs(LogFilter(flow_run_id={"any_": [run.id]}))
    assert any(line.name == "dermaflow.learning.local" and "epoch 1: loss" in line.message for line in lines)


def test_second_run_skips_to_the_end(world: World) -> None:
    before = snapshot(world.out)
    ended = world.run()
    assert ended == {"prepare": ["Cached"], "train": ["Cached"], "evaluate": ["Cached"], "register": ["Completed"]}
    assert snapshot(world.out) == before
    shown = artifacts(last_run())
    assert "headline-figures" in shown
    assert "champion already" in shown["promotion"].data


def test_changed_recipe_trains_but_does_not_prepare(world: World, tmp_path: Path) -> None:
    before, old = snapshot(world.out / "shards"), load_bundle(world.model)
    other = tmp_path / "tiny.yaml"
    other.write_text(RECIPE.replace("epochs: 2,", "epochs: 3,"))
    ended = world.run(recipe=str(other), out=world.out)
    assert ended["prepare"] == ["Cached"]
    assert ended["train"] == ["Completed"]
    assert ended["evaluate"] == ["Completed"]
    assert snapshot(world.out / "shards") == before
    new = load_bundle(world.model)
    assert new.bundle.training.epochs == 3
    assert new.sha256 != old.sha256


def test_output_that_is_gone_or_changed_is_made_again(world: World) -> None:
    world.run()
    old = load_bundle(world.model)
    weights = world.model / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0\1")
    assert world.run()["train"] == ["Cached", "Completed"]
    shutil.rmtree(world.model)
    (world.out / "report" / "report.html").unlink()
    ended = world.run()
    assert ended["train"] == ["Cached", "Completed"]
    assert ended["prepare"] == ["Cached"]
    again = load_bundle(world.model)
    assert again.sha256 != old.sha256
    assert (world.out / "report" / "report.html").is_file()


def test_more_images_are_prepared(world: World, tmp_path: Path) -> None:
    data, out = shutil.copytree(world.data, tmp_path / "data"), tmp_path / "shards"
    first = prepare(data, str(out))
    image = next((data / "HAM10000_images_part_1").glob("*.jpg"))
    image.unlink()
    second = prepare(data, str(out))
    assert second.identity != first.identity


def test_flow_can_be_deployed_by_its_entrypoint() -> None:
    loaded = load_flow_from_entrypoint(f"{Path(tasks.__file__).with_name('pipeline.py')}:pipeline")
    schema = parameter_schema(loaded)
    assert schema.required == ["data", "out"]
    assert schema.properties["data"]["format"] == "path"
    assert all("title" in about and "description" in about for about in schema.properties.values())


def test_bad_recipe_fails_before_anything_is_done(world: World, tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(RECIPE.replace("batch_size", "bach_size"))
    with pytest.raises(RecipeError, match="did you mean 'batch_size'"):
        pipeline(world.data, tmp_path / "out", recipe=str(bad))
    assert not (tmp_path / "out").exists()
    run = last_run()
    assert run.state.is_failed()
    assert "did you mean" in run.state.message
    assert states_at_once(run) == []


def states_at_once(run: FlowRun) -> list[Any]:
    with get_client(sync_client=True) as client:
        return client.read_task_runs(flow_run_filter=FlowRunFilter(id={"any_": [run.id]}))


def test_bad_data_is_not_tried_again(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []
    monkeypatch.setattr(tasks, "prepare", lambda *given, **chosen: tries.append(1) or prepare_archive(*given, **chosen))
    data = shutil.copytree(world.data, tmp_path / "data")
    table = data / METADATA
    table.write_text(table.read_text().replace("lesion_id", "lesson_id"))
    with pytest.raises(DataError, match="lesion_id"):
        prepare(data, str(tmp_path / "out"))
    assert len(tries) == 1


def test_hiccup_of_the_disk_is_tried_again(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def hiccup(*given: Any, **chosen: Any) -> Any:
        tries.append(1)
        if len(tries) < 3:
            raise OSError(errno.EIO, "Input/output error")
        return prepare_archive(*given, use_ray=False, **chosen)

    monkeypatch.setattr(tasks, "prepare", hiccup)
    monkeypatch.setattr(tasks.prepare_shards, "retry_delay_seconds", 0)
    output = prepare(world.data, str(tmp_path / "out"))
    assert len(tries) == 3
    assert (Path(output.path) / "manifest.json").is_file()


def _stored(error: OSError) -> StorageError:
    """As the library raises it."""
    try:
        raise StorageError("could not write", where="x") from error
    except StorageError as stored:
        return stored


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.EIO, "Input/output error"), True),
        (ConnectionResetError(), True),
        (TimeoutError("store does not answer"), True),
        (_stored(OSError("AWS Error NETWORK_CONNECTION")), True),
        (_stored(OSError(errno.ENOSPC, "No space left on device")), False),
        (_stored(PermissionError(errno.EACCES, "denied")), False),
        (FileNotFoundError(), False),
        (TaskRunTimeoutError(), False),
        (RecipeError("bach_size"), False),
        (ValueError(), False),
    ],
    ids=repr,
)
def test_only_reading_and_writing_is_tried_again(error: Exception, expected: bool) -> None:
    assert (
        tasks.is_curable(tasks.train_model, TaskRun(task_key="train", dynamic_key="0"), Failed(data=error)) is expected
    )


def test_promotion_rule(tmp_path: Path) -> None:
    registry = str(tmp_path / "registry")

    def register(name: str, balanced_accuracy: float | None, data_hash: str = "d") -> tuple[bool, str]:
        metrics = None if balanced_accuracy is None else {"balanced_accuracy": balanced_accuracy}
        bundle = a_bundle(name=name, metrics=metrics, data_hash=data_hash)
        decision = decide(str(save_tiny(tmp_path / name, bundle)), registry, by="a test")
        return decision.promoted, decision.reason

    assert register("first", 0.70) == (True, "the first model of this registry")
    assert register("first", 0.70) == (False, "it is the champion already")
    assert register("worse", 0.69)[0] is False
    assert register("equal", 0.70)[0] is False
    assert register("unmeasured", None)[0] is False
    promoted, reason = register("elsewhere", 0.99, data_hash="e")
    assert not promoted
    assert "other data" in reason
    promoted, reason = register("better", 0.71)
    assert promoted
    assert "0.7100 against 0.7000" in reason
    assert Registry(registry).champion().bundle.name == "better"
    assert [(entry.by, entry.reason) for entry in Registry(registry).history()][-1] == ("a test", reason)
    assert len(Registry(registry).list()) == 6
