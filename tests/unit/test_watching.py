"""What is measured, shown and alerted on: every name exists in the code, every expression parses, dashboards fit the
schema of Grafana, alerts fire when they should."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry
from tiny_data import draw, prepare_here

from dermaflow import monitoring
from dermaflow.learning.recipe import Recipe
from dermaflow.learning.train import train
from dermaflow.monitoring import JOBS

ROOT = Path(__file__).parents[2]
DASHBOARDS = sorted((ROOT / "deploy/grafana").glob("*.json"))
ALERTS = ROOT / "deploy/prometheus/alerts.yaml"
OTHERS = {"up", "push_time_seconds"}  # made by Prometheus and by the Pushgateway


def sample_names(registry: CollectorRegistry) -> dict[str, set[str]]:
    """Names that Prometheus stores, each with its own labels."""
    found = {}
    for collector in registry._collector_to_names:
        kind, name = collector._type, collector._name
        endings = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"], "gauge": [""]}[kind]
        for ending in endings:
            found[name + ending] = {*collector._labelnames, *(["le"] if ending == "_bucket" else [])}
    return found


@lru_cache
def measured() -> dict[str, set[str]]:
    service = pytest.importorskip("serve.metrics").Metrics()
    found = sample_names(service.registry)
    for job in JOBS:
        found |= sample_names(job.registry)
    return found


def expressions() -> dict[str, str]:
    """Every expression of dashboards and alerts, by where it stands."""
    found = {}
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                found[f"{path.stem}: {panel['title']} {target['refId']}"] = target["expr"]
    for group in yaml.safe_load(ALERTS.read_text())["groups"]:
        for rule in group["rules"]:
            found[f"alert {rule['alert']}"] = rule["expr"]
    return found


def selectors(expression: str) -> list[tuple[str, set[str]]]:
    """Names and the labels that are asked for in an expression, by a real parser of PromQL."""
    parser = pytest.importorskip("promql_parser")
    found, waiting = [], [parser.parse(expression)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, parser.MatrixSelector):
            node = node.vector_selector
        if isinstance(node, parser.VectorSelector):
            found.append((node.name, {matcher.name for matcher in node.matchers.matchers}))
            continue
        for name in ("expr", "lhs", "rhs", "args", "param"):
            inner = getattr(node, name, None)
            if inner is not None:
                waiting.extend(inner if isinstance(inner, list) else [inner])
    return found


@pytest.mark.parametrize(("where", "expression"), expressions().items(), ids=expressions().keys())
def test_every_name_and_label_exists(where: str, expression: str) -> None:
    found = selectors(expression)
    assert found
    for name, labels in found:
        assert name in measured() or name in OTHERS, f"{where}: {name} is measured nowhere"
        assert labels - {"job"} <= measured().get(name, set()), f"{where}: {name} has no label {labels}"


def test_everything_that_is_measured_is_shown() -> None:
    def figure(name: str) -> str:
        return re.sub(r"_(bucket|sum|count)$", "", name)

    asked = {figure(name) for expression in expressions().values() for name, _ in selectors(expression)}
    assert {figure(name) for name in measured()} <= asked


def test_names_follow_the_convention() -> None:
    """https://prometheus.io/docs/practices/naming: prefix, base units, _total of counters and of nothing else."""
    for name in measured():
        assert re.fullmatch(r"dermaflow_[a-z_]+", name)
        assert not re.search(r"_(ms|milliseconds|minutes|hours|kb|mb|percent)(_|$)", name)
    for job in JOBS:
        for collector in job.registry._collector_to_names:
            assert not set(collector._labelnames) & {"patient", "lesion", "image", "run", "job", "instance"}
            assert collector._documentation


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_fits_the_schema_of_grafana(path: Path) -> None:
    """Read into the classes that Grafana generates from its schema and written again: what it does not know is lost."""
    models = pytest.importorskip("grafana_foundation_sdk.models.dashboard")
    runtime = pytest.importorskip("grafana_foundation_sdk.cog.plugins")
    encoder = pytest.importorskip("grafana_foundation_sdk.cog.encoder").JSONEncoder
    runtime.register_default_plugins()
    given = json.loads(path.read_text())
    again = json.loads(encoder().encode(models.Dashboard.from_json(given)))
    assert list(_lost(given, again)) == []
    given["panels"][0]["titel"] = "x"
    given["panels"][0]["targets"][0]["expression"] = "x"
    again = json.loads(encoder().encode(models.Dashboard.from_json(given)))
    assert list(_lost(given, again)) == ["panels.0.targets.0.expression", "panels.0.titel"]
    ids = [panel["id"] for panel in given["panels"]]
    assert len(ids) == len(set(ids))
    for panel in given["panels"]:
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24


def _lost(given: Any, again: Any, at: str = "") -> Any:
    """Paths of what stands in `given` and not in `again`."""
    if isinstance(given, dict) and isinstance(again, dict):
        for key, value in sorted(given.items()):
            yield from _lost(value, again[key], f"{at}{key}.") if key in again else [f"{at}{key}"]
    elif isinstance(given, list) and isinstance(again, list) and len(given) == len(again):
        for i, value in enumerate(given):
            yield from _lost(value, again[i], f"{at}{i}.")
    elif given != again:
        yield at.rstrip(".")


def test_dashboards_ask_the_source_that_is_provisioned() -> None:
    [source] = yaml.safe_load((ROOT / "deploy/compose/grafana/datasources.yaml").read_text())["datasources"]
    for path in DASHBOARDS:
        named = re.findall(r'"uid": "(\w+)"', path.read_text())
        assert set(named) == {source["uid"]}, path


def test_every_alert_says_what_to_do() -> None:
    for group in yaml.safe_load(ALERTS.read_text())["groups"]:
        for rule in group["rules"]:
            assert rule["labels"]["severity"] in ("page", "ticket")
            runbook = rule["annotations"]["runbook"]
            assert len(runbook) > 40 and "\n" not in runbook, rule["alert"]


def test_commands_of_runbooks_exist() -> None:
    from typer.main import get_command

    from dermaflow.cli.main import app

    for found in re.findall(r"dermaflow ((?:[a-z]+ )?[a-z]+)", ALERTS.read_text()):
        command: Any = get_command(app)
        for word in found.split():
            inner = getattr(command, "commands", {}).get(word)
            assert inner is not None, f"dermaflow {found}"
            command = inner


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (Debian's prometheus)")
def test_promtool_agrees() -> None:
    folder = ROOT / "deploy/prometheus"
    for command in (
        ["check", "rules", str(ALERTS)],
        ["check", "config", "--syntax-only", str(folder / "prometheus.yaml")],
        ["check", "config", "--syntax-only", str(folder / "one-machine.yaml")],
        ["test", "rules", str(ROOT / "tests/alerts_test.yaml")],
    ):
        done = subprocess.run(["promtool", *command], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


def test_without_a_gateway_nothing_is_sent_and_one_that_is_dead_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    job = monitoring.Job("dermaflow-test")
    made = job.counter("dermaflow_test_images", "Images")
    job.push()
    monkeypatch.setattr(monitoring.settings(), "pushgateway", "http://127.0.0.1:9")
    made.inc()
    job.push()
    job.push()
    assert caplog.text.count("could not be sent") == 1, "not at every image again"


def test_the_work_itself_counts(tmp_path: Path) -> None:
    """Preparing and training on drawn images, and a round as the coordinator notes it."""

    def value(job: monitoring.Job, name: str, **labels: str) -> float:
        return job.registry.get_sample_value(name, labels) or 0.0

    def counted() -> dict[str, float]:
        return {
            "inspected": value(monitoring.PREPARATION, "dermaflow_preparation_images_total", outcome="inspected"),
            "shards": value(monitoring.PREPARATION, "dermaflow_preparation_shards_total"),
            "epochs": value(monitoring.TRAINING, "dermaflow_training_epochs_total"),
            "images": value(monitoring.TRAINING, "dermaflow_training_images_total"),
        }

    before = counted()
    done = prepare_here(draw(tmp_path / "data"), tmp_path / "shards")
    choices = {"name": "tiny", "input": {"height": 24, "width": 32}, "backbone": {"name": "seed_cnn"}}
    optim = {"batch_size": 16, "head_epochs": 1, "epochs": 1}
    loaded = train(str(tmp_path / "shards"), Recipe.model_validate({**choices, "optim": optim}), tmp_path / "model")
    history = loaded.bundle.training.history
    assert {name: after - before[name] for name, after in counted().items()} == {
        "inspected": done.inspected, "shards": done.written, "epochs": 2,
        "images": sum(entry["images"] for entry in history),
    }  # fmt: skip
    assert value(monitoring.TRAINING, "dermaflow_training_loss") == history[-1]["loss"]
    assert value(monitoring.TRAINING, "dermaflow_training_validation_loss") == history[-1]["val_loss"]

    coordinator = pytest.importorskip("clients.coordinator")
    record = importlib.import_module("clients.rounds").RoundRecord(1, "all", seconds=4.0)
    record.sites["here"] = {"loss": 0.5, "sent": 100.0, "received": 300.0}
    record.failed["there"] = "no answer"
    rounds = value(monitoring.FEDERATION, "dermaflow_federation_rounds_total")
    coordinator.Coordinator._note(SimpleNamespace(plan=SimpleNamespace(rounds=2)), record)
    assert value(monitoring.FEDERATION, "dermaflow_federation_rounds_total") == rounds + 1
    sent = value(monitoring.FEDERATION, "dermaflow_federation_bytes_total", site="here", direction="sent")
    failed = value(monitoring.FEDERATION, "dermaflow_federation_site_failures_total", site="there")
    assert sent == 100 and failed == 1
