"""Scoring, lifecycle and serving side by side while parts of them die: the short version of ``tests/soak.py``."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("prefect")
pytest.importorskip("ray.serve")

import soak

pytestmark = pytest.mark.timeout(1200)


def test_nothing_is_lost_while_parts_die(tmp_path: Path) -> None:
    chosen = [
        "a replica of the service is killed",
        "a node of Ray dies while it scores",
        "Prefect's worker is killed",
    ]
    found, text = soak.run(tmp_path, 0.75, chosen)
    assert not found.problems, text
    assert len(found.faults) == 3 and found.scored and found.batches and found.answers["200"] > 10, text
    assert found.runs["lifecycle COMPLETED"] >= 1, text
