"""The flow `federate`: a finished run is measured, shown and promoted once; a run that is cancelled goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytest.importorskip("prefect")
pytest.importorskip("flwr")

from federation_here import run_here
from federation_processes import family
from flwr.app import Message
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, FlowRunFilter
from prefect.states import Failed
from prefect_here import own_prefect
from tiny_data import draw, prepare_here
from waiting import until

from clients.result import make_plan
from clients.simulation import claim
from dermaflow.bundles.registry import Registry
from dermaflow.errors import CheckpointError, DataError, FederationError, StorageError
from flows.federate import federate
from flows.tasks import can_go_on, train_federated

pytestmark = pytest.mark.timeout(900)  # a first start of Prefect's database takes a busy machine minutes

RECIPE = {
    "name": "tiny", "input": {"height": 24, "width": 32}, "backbone": {"name": "seed_cnn", "weights": "none"},
    "optim": {"batch_size": 16, "lr": 0.001, "layer_decay": 1.0},
}  # fmt: skip


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards and a recipe."""
    folder = tmp_path_factory.mktemp("federate")
    draw(folder / "data", 80, 1)
    prepare_here(folder / "data", folder / "shards")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(RECIPE))
    return folder


def _without_bins(node: str, asked: Message, reply: Message) -> Message:
    """The first site's answer to one of the questions beside the rounds lacks what was asked for."""
    if node == "100" and asked.metadata.message_type == "query.reliability":
        del reply.content.array_records["arrays"]["bins"]
    return reply


def test_a_run_is_measured_shown_and_promoted_once(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DERMAFLOW_THREADS", "1")
    out, shards, registry = tmp_path / "out", here / "shards", tmp_path / "registry"
    choices = {
        "strategy": "fedavg", "rounds": 2, "local_epochs": 1.0, "scope": "all", "out": str(out),
        "shards": str(shards), "partition": "natural",
    }  # fmt: skip
    plan = make_plan(choices, str(here / "tiny.yaml"), None, ["resamples=20"], [], real=False)
    plan = plan.model_copy(update={"name": "simulation"})
    claim(plan)  # the rounds are trained in this process: tests/e2e starts Flower's for that
    run_here(plan, spoil=_without_bins)
    given = {
        "out": out, "shards": str(shards), "registry": str(registry), "recipe": str(here / "tiny.yaml"), "rounds": 2,
        "choices": ["resamples=20"], "resamples": 50, "margin": 0.02,
    }  # fmt: skip
    with own_prefect(tmp_path / "prefect"):
        done = federate(**given)
        assert set(done) == {"model", "evaluation", "report"}
        models = Registry(registry)
        assert models.champion().bundle.training.federation.rounds == 2
        assert models.champion().bundle.metrics is not None
        page = (out / "report.html").read_text(encoding="utf-8")
        assert "Every model at every site" in page and "rosendahl" in page
        result = json.loads((out / "result.json").read_text())
        assert list(result["unanswered"]) == ["reliability"]
        again = federate(**given)
        assert again["model"] == done["model"] and len(models.list()) == len(models.history()) == 1
        assert "champion" in json.loads((out / "matrix.json").read_text())["rows"][-1]["model"]
        with get_client(sync_client=True) as client:
            run = max(client.read_flow_runs(), key=lambda run: run.created)
            made = client.read_artifacts(
                artifact_filter=ArtifactFilter(), flow_run_filter=FlowRunFilter(id={"any_": [run.id]})
            )
        data = {artifact.key: f"{artifact.data} {artifact.description}" for artifact in made}
        assert {"rounds", "cross-site", "federation-report", "headline-figures", "promotion"} <= set(data)
        assert "reliability: rosendahl: refused: the answer holds no bins" in data["rounds"]
        assert "vidir_molemax" in data["cross-site"] and "champion already" in data["promotion"]
        assert (out / "report.html").as_uri() in data["federation-report"]
        (out / "result.json").write_text(json.dumps({k: v for k, v in result.items() if k != "unanswered"}))
        assert federate(**given)["model"] == done["model"]  # a run that an older version finished
        for wrong in ({"shards": None}, {"sites": ["a=1"]}, {"shards": None, "sites": ["a=1"]}):
            with pytest.raises(DataError):
                federate(**given | wrong)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (FederationError("2 sites answered round 3"), True),
        (CheckpointError("another plan"), False),
        (DataError("no shards"), False),
        (StorageError("could not write"), False),
    ],
    ids=repr,
)
def test_a_run_is_tried_again_where_it_can_go_on(error: Exception, expected: bool) -> None:
    assert can_go_on(train_federated, None, Failed(data=error)) is expected  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_cancelled_run_leaves_no_process_and_goes_on(here: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    bare = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    command = [
        sys.executable, "-m", "flows", "federate", "--out", str(out), "--shards", str(here / "shards"), "--recipe",
        str(here / "tiny.yaml"), "--rounds", "150", "--choices", "resamples=20", "--resamples", "20",
        "--registry", str(tmp_path / "registry"),
    ]  # fmt: skip

    def rounds() -> list[str]:
        place = out / "rounds.jsonl"
        return place.read_text().splitlines() if place.exists() else []

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            command, env=bare | {"PREFECT_HOME": str(tmp_path / "prefect"), "DERMAFLOW_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    first = start()
    until(lambda: len(rounds()) >= 1 or first.poll() is not None, 400)
    assert first.poll() is None, first.communicate()[0]
    started = family(first.pid)
    first.send_signal(signal.SIGTERM)
    said, _ = first.communicate(timeout=200)
    kept = rounds()
    assert "fedavg: 0 of 150" in said and len(started) > 3 and 1 <= len(kept) < 150, (len(kept), said[-3000:])

    def alive() -> list[str]:  # one that ended and was not yet taken note of has no words
        words = [Path(f"/proc/{pid}/cmdline") for pid in started]
        return [place.read_text().replace("\0", " ") for place in words if place.exists() and place.read_bytes()]

    try:
        until(lambda: not alive(), 180)  # Ray's own agents end by themselves, some 70 s after its node
    except AssertionError:
        raise AssertionError(f"left behind: {alive()}") from None
    assert rounds() == kept  # nothing trains on
    second = start()
    said, _ = second.communicate(timeout=600)
    assert second.returncode == 0, said
    assert rounds()[: len(kept)] == kept and len(rounds()) == 150
    assert Registry(tmp_path / "registry").champion() is not None
