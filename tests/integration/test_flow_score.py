"""The flow `score`: findings and artifacts; a second run does nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("prefect")

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, FlowRunFilter
from prefect_here import own_prefect
from small_archives import lesion_jpegs, scoring_bundle
from tiny_data import snapshot

from dermaflow import monitoring
from dermaflow.errors import DataError
from flows.score import score

pytestmark = pytest.mark.timeout(600)  # a first start of Prefect's database takes a busy machine minutes


def test_score_makes_findings_and_artifacts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DERMAFLOW_THREADS", "1")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for i, data in enumerate(lesion_jpegs()):
        (source / f"{i}.jpg").write_bytes(data)
    (source / "bad.jpg").write_bytes(b"no image")
    model = scoring_bundle(tmp_path / "model")

    def runs(state: str) -> float:
        labels = {"flow": "score", "state": state}
        return monitoring.FLOWS.registry.get_sample_value("dermaflow_flow_runs_total", labels) or 0.0

    before_all = runs("completed"), runs("failed")
    with own_prefect(tmp_path / "prefect"):
        first = score(str(source), str(out), model=str(model))
        before = snapshot(out)
        assert score(str(source), str(out), model=str(model)) == first and snapshot(out) == before
        with get_client(sync_client=True) as client:
            runs = sorted(client.read_flow_runs(), key=lambda run: run.created)
            made = client.read_artifacts(
                artifact_filter=ArtifactFilter(), flow_run_filter=FlowRunFilter(id={"any_": [runs[-1].id]})
            )
        data = {artifact.key: str(artifact.data) for artifact in made}
        assert set(data) == {"class-mix", "failures", "scoring-summary"}
        assert "not_an_image" in data["failures"] and "melanoma" in data["class-mix"]
        assert (out / "summary.html").as_uri() in data["scoring-summary"]
        (source / "new.jpg").write_bytes(lesion_jpegs()[0])
        with pytest.raises(DataError, match="another content of the source"):
            score(str(source), str(out), model=str(model))
    assert (runs("completed"), runs("failed")) == (before_all[0] + 2, before_all[1] + 1)
