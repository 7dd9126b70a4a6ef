"""Figures and log lines of a batch, with a real Pushgateway and Prometheus: what is counted, and what is not said."""

from __future__ import annotations

import io
import json
import logging
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from small_archives import lesion_jpegs, scoring_bundle
from waiting import until_it_answers

from dermaflow import monitoring
from dermaflow.logs import JsonLines
from dermaflow.ports import free_port
from dermaflow.scoring.bulk import score
from dermaflow.settings import settings

ROOT = Path(__file__).parents[2]
PATIENT = "Mueller_Erika_1954"

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    program = shutil.which("prometheus-pushgateway")
    if program is None:
        pytest.skip("needs prometheus-pushgateway (Debian has it)")
    port = free_port()
    folder = tmp_path_factory.mktemp("gateway")
    log = (folder / "log").open("wb")
    process = subprocess.Popen(  # Debian's keeps its figures in one place for all, unless it is told another
        [program, f"--web.listen-address=127.0.0.1:{port}", f"--persistence.file={folder / 'figures'}"],
        stdout=log, stderr=log,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        until_it_answers(f"{address}/-/ready", 60)
        yield address
    finally:
        process.terminate()
        process.wait(20)


def figures(gateway: str) -> dict[tuple[str, str], float]:
    """Values by name and the labels that are not the group's."""
    return {
        (
            sample.name,
            ",".join(v for k, v in sorted(sample.labels.items()) if k not in ("job", "instance")),
        ): sample.value
        for family in text_string_to_metric_families(httpx.get(f"{gateway}/metrics").text)
        for sample in family.samples
        if sample.name.startswith("dermaflow_")
    }


def test_scoring_counts_over_runs_and_names_nobody(
    tmp_path: Path, gateway: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings(), "pushgateway", gateway)
    monitoring.SCORING.push()  # what earlier tests of this process counted
    before = figures(gateway)
    source, model = tmp_path / "source", str(scoring_bundle(tmp_path / "model"))
    source.mkdir()
    for i in range(6):
        (source / f"{PATIENT}_{i}.jpg").write_bytes(lesion_jpegs()[i])
    (source / f"{PATIENT}_bad.jpg").write_bytes(b"no image")
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(JsonLines())
    library = logging.getLogger("dermaflow")
    level = library.level
    library.setLevel(logging.DEBUG)  # not by the attribute: loggers remember what was enabled
    library.addHandler(handler)
    scored = "dermaflow_scoring_images_total"
    try:
        score(str(source), str(tmp_path / "first"), model=model, use_ray=False)
        found = figures(gateway)

        def more(*key: str) -> float:
            return found[key] - before.get(key, 0)  # type: ignore[index, arg-type]

        assert more(scored, "failed") == 1 and more(scored, "ok") + more(scored, "not_assessable") == 6
        assert more("dermaflow_scoring_runs_total", "") == 1 and found["dermaflow_scoring_remaining_images", ""] == 0
        assert found["dermaflow_scoring_last_success_timestamp_seconds", ""] == pytest.approx(time.time(), abs=120)
        score(str(source), str(tmp_path / "second"), model=model, use_ray=False)
        twice = figures(gateway)
        assert all(twice[key] - found[key] == more(*key) for key in found if key[0] == scored)
        score(str(source), str(tmp_path / "second"), model=model, use_ray=False)  # is finished
        assert figures(gateway)[scored, "ok"] == twice[scored, "ok"], "what is not done again is not counted again"
    finally:
        library.removeHandler(handler)
        library.setLevel(level)
    lines = [json.loads(line) for line in written.getvalue().splitlines()]
    assert lines and all({"at", "level", "logger", "message", "run_id"} <= line.keys() for line in lines)
    assert PATIENT not in written.getvalue()


def test_processes_add_up_and_labels_of_others_stay(gateway: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings(), "pushgateway", gateway)

    def process() -> tuple[monitoring.Job, object, object]:
        job = monitoring.Job("dermaflow-test")
        return (
            job,
            job.counter("dermaflow_test_runs", "Runs", ("flow",)),
            job.gauge("dermaflow_test_at", "At", ("flow",)),
        )

    first, second = process(), process()
    for (job, runs, at), flow, times in ((first, "score", 3), (second, "train", 2), (first, "score", 1)):
        for _ in range(times):
            runs.labels(flow).inc()
            at.labels(flow).set(7)
            job.push()
    found = figures(gateway)
    assert found["dermaflow_test_runs_total", "score"] == 4 and found["dermaflow_test_runs_total", "train"] == 2
    assert found["dermaflow_test_at", "score"] == found["dermaflow_test_at", "train"] == 7
    job, runs, _ = process()  # threads of one process
    pushed = [threading.Thread(target=lambda: (runs.labels("both").inc(), job.push())) for _ in range(8)]
    for thread in pushed:
        thread.start()
    for thread in pushed:
        thread.join()
    assert figures(gateway)["dermaflow_test_runs_total", "both"] == 8


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs prometheus (Debian has it)")
def test_prometheus_reads_them_and_the_rules(tmp_path: Path, gateway: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the configuration of compose.yaml, hosts replaced."""
    monkeypatch.setattr(settings(), "pushgateway", gateway)
    monitoring.flow_ended("score", "completed", 12.5)
    text = (ROOT / "deploy/prometheus/prometheus.yaml").read_text()
    text = text.replace("pushgateway:9091", gateway.removeprefix("http://"))
    text = text.replace("/etc/prometheus/", f"{ROOT}/deploy/prometheus/").replace("15s", "1s").replace("30s", "1s")
    text = text.replace("/run/secrets/metrics_key", str(tmp_path / "key"))
    text = text.replace("[ray-head, ray-worker, flows]", "[localhost]").replace("ray-head:8000", "127.0.0.1:9")
    (tmp_path / "key").write_text("none")
    (tmp_path / "prometheus.yaml").write_text(text)
    port = free_port()
    process = subprocess.Popen(
        ["prometheus", f"--config.file={tmp_path}/prometheus.yaml", f"--storage.tsdb.path={tmp_path}/data",
         f"--web.listen-address=127.0.0.1:{port}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        until_it_answers(f"http://127.0.0.1:{port}/-/ready", 60)
        query = {"query": 'dermaflow_flow_runs_total{job="dermaflow-flows", flow="score", state="completed"}'}
        end = time.monotonic() + 60
        while True:
            answer = httpx.get(f"http://127.0.0.1:{port}/api/v1/query", params=query).json()["data"]["result"]
            if answer:
                break
            assert time.monotonic() < end, "the figure does not come"
            time.sleep(0.3)
        assert float(answer[0]["value"][1]) >= 1
        groups = httpx.get(f"http://127.0.0.1:{port}/api/v1/rules").json()["data"]["groups"]
        assert {rule["name"] for group in groups for rule in group["rules"]} >= {
            "FlowFailed",
            "ServiceDown",
            "SiteLeftOut",
        }
    finally:
        process.terminate()
        process.wait(30)
