"""Ray nodes that die while a command or a flow runs on a cluster of several: nothing is lost, nothing doubled."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from ray_nodes import ray_nodes
from small_archives import lesion_jpegs, scoring_bundle

from dermaflow.scoring.plan import read_status

pytestmark = pytest.mark.timeout(500)
IMAGES = 80


def source_of(folder: Path) -> Path:
    """Images, some of them bad."""
    folder.mkdir()
    for i in range(IMAGES):
        (folder / f"image{i:03}.jpg").write_bytes(b"no image" if i % 40 == 7 else lesion_jpegs()[i % 12])
    return folder


@pytest.mark.slow
def test_score_on_a_cluster_that_loses_a_node(tmp_path: Path) -> None:
    """The command on two workers with one CPU each; one of them is gone while it scores."""
    source, out, model = source_of(tmp_path / "source"), tmp_path / "out", scoring_bundle(tmp_path / "model")
    with ray_nodes(2, tmp_path / "nodes.log") as nodes, (tmp_path / "driver.log").open("w") as log:
        command = [
            sys.executable, "-m", "dermaflow.cli.main", "score", str(source), "--out", str(out), "--model", str(model),
            "--part-size", "2", "--workers", "2",
        ]  # fmt: skip
        driver = subprocess.Popen(command, env=nodes.environment, stdout=log, stderr=log)
        try:
            while read_status(str(out)).done < 6 or not nodes.kill_one():
                assert driver.poll() is None, (tmp_path / "driver.log").read_text()[-3000:]
                time.sleep(0.02)
            at = read_status(str(out)).done
            assert driver.wait(300) == 0, (tmp_path / "driver.log").read_text()[-3000:]
        finally:
            driver.kill()
            driver.wait()
    assert at < IMAGES, "there was work left when the node died"
    check(out)


def check(out: Path) -> None:
    found = pq.read_table(out / "findings.parquet")
    assert sorted(found["image_id"].to_pylist()) == [f"image{i:03}" for i in range(IMAGES)]
    assert Counter(found["status"].to_pylist())["failed"] == 2
    status = read_status(str(out))
    assert (status.state, status.total, status.done) == ("finished", IMAGES, IMAGES)


@pytest.mark.slow
def test_a_flow_on_a_cluster_that_loses_a_node(tmp_path: Path) -> None:
    """`python -m flows score` against the same cluster: the run is completed, its one task without another try."""
    pytest.importorskip("prefect")
    source, out, model = source_of(tmp_path / "source"), tmp_path / "out", scoring_bundle(tmp_path / "model")
    with ray_nodes(2, tmp_path / "nodes.log") as nodes, (tmp_path / "flow.log").open("w") as log:
        command = [
            sys.executable, "-m", "flows", "score", "--source", str(source), "--output", str(out), "--model", str(model)
        ]  # fmt: skip
        environment = nodes.environment | {"PREFECT_HOME": str(tmp_path / "prefect"), "DERMAFLOW_LOG_FORMAT": "json"}
        for name in [name for name in environment if name.startswith("PREFECT_API")]:
            del environment[name]
        flow = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            while read_status(str(out)).done < 6 or not nodes.kill_one():
                assert flow.poll() is None, (tmp_path / "flow.log").read_text()[-3000:]
                time.sleep(0.02)
            assert flow.wait(400) == 0, (tmp_path / "flow.log").read_text()[-3000:]
        finally:
            flow.kill()
            flow.wait()
    check(out)
    said = (tmp_path / "flow.log").read_text()
    assert "AwaitingRetry" not in said and "Completed" in said
