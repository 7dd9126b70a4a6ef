"""Prefect keeps its results on S3: what one machine has done, another one does not do again."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("prefect_aws")
pytest.importorskip("ray")

import boto3
from prefect_here import a_server
from s3_here import own_s3
from tiny_data import draw

from dermaflow.preparation.reading import ShardFolder

pytestmark = pytest.mark.timeout(600)

# As in docs/deployment.md; keys and address come from the environment, the block holds none.
BLOCK = 'from prefect_aws import S3Bucket; S3Bucket(bucket_name="results", bucket_folder="prefect").save("results")'


def test_what_one_machine_did_another_one_knows(tmp_path: Path) -> None:
    data, shards = draw(tmp_path / "data"), "s3://results/shards"
    with own_s3("results"), a_server(tmp_path / "server") as server:
        subprocess.run([sys.executable, "-c", BLOCK], env=server.environment, check=True)
        states = []
        for machine in ("first", "second"):  # each with a folder of Prefect's of its own
            here = replace(server, environment=server.environment | {
                "PREFECT_HOME": str(tmp_path / machine), "PREFECT_DEFAULT_RESULT_STORAGE_BLOCK": "s3-bucket/results",
            })  # fmt: skip
            assert here.python("flows", "prepare", "--data", data, "--shards", shards).wait(300) == 0, server.said()
            run = server.latest_run("prepare")
            [task] = server.post("/task_runs/filter", {"flow_runs": {"id": {"any_": [run]}}})
            states.append(task["state"]["name"])
        assert states == ["Completed", "Cached"], server.said()
        assert sum(sum(counts.values()) for counts in ShardFolder(shards).manifest.counts.values()) == 120
        kept = boto3.client("s3").list_objects_v2(Bucket="results", Prefix="prefect/")["Contents"]
        assert len(kept) >= 1
