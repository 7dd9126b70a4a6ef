"""A small data set, and shards of few rows."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny_data import draw

from dermaflow.preparation import layout


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many shards of few rows, each of several row groups."""
    monkeypatch.setattr(layout, "ROWS_A_SHARD", 16)
    monkeypatch.setattr(layout, "ROWS_A_GROUP", 6)


@pytest.fixture(scope="package")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("drawn") / "data")


@pytest.fixture
def data(drawn: Path, tmp_path: Path) -> Path:
    shutil.copytree(drawn, tmp_path / "data", ignore=shutil.ignore_patterns("*segmentations"))
    return tmp_path / "data"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "shards"
