"""What DermaFlow 0.1.0 wrote (`tests/first_version`) is read; what a later one may write is refused in clear words."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa

from dermaflow import storage
from dermaflow.bundles.bundle import load_bundle
from dermaflow.bundles.registry import Registry
from dermaflow.errors import BundleError, ShardError, StorageError
from dermaflow.pathways.outputs.folder import read_folder, sign_folder
from dermaflow.preparation.reading import ShardFolder
from dermaflow.schemas.finding import findings_of
from dermaflow.schemas.shard import SPLITS
from dermaflow.scoring.plan import read_plan, read_status
from dermaflow.scoring.summary import read_summary
from serve import migrations
from serve.jobs import JobError, JobStore

FIRST = Path(__file__).parents[1] / "first_version"


def test_a_bundle_of_the_first_version_is_loaded_and_registered(tmp_path: Path) -> None:
    loaded = load_bundle(FIRST / "bundle")
    assert loaded.bundle.format == "dermaflow-bundle/2" and loaded.weights["count"].item() == 3
    assert loaded.reference is not None and loaded.reference.image_ids[0] == "image0"
    assert loaded.bundle.calibration is not None and loaded.bundle.calibration.temperature == 1.3
    assert Registry(tmp_path).add(FIRST / "bundle").sha256 == loaded.sha256


def test_shards_of_the_first_version_are_read() -> None:
    shards = ShardFolder(FIRST / "shards")
    assert sum(len(shards.metadata(split)) for split in SPLITS) == 10
    assert all(storage.sha256(image) for split in SPLITS for _, image in shards.images(split))
    assert shards.pixels("train", 24, 32).shape[1:] == (24, 32, 3)


def test_a_run_of_the_first_version_is_read_and_its_pathways_are_signed(tmp_path: Path) -> None:
    out = tmp_path / "scored"
    shutil.copytree(FIRST / "scored", out)
    plan, status, summary = read_plan(str(out)), read_status(str(out)), read_summary(str(out))
    assert plan is not None and plan.inputs == 3
    assert (status.state, status.done, status.failed) == ("finished", 3, 1)
    assert summary is not None and summary.images == 3
    assert [f.image_id for f in findings_of(pq.read_table(out / "findings.parquet"))] == ["i0", "i1", "i2"]
    assert len(read_folder(out / "pathways")[0]) == 3
    entry, signed = sign_folder(out / "pathways", "L1", by="Dr Ada Byron", decision="accepted")
    assert (entry.sequence, signed.status) == (1, "final")


@pytest.fixture
def old_table(tmp_path: Path) -> Path:
    """The batches' table as the first version left it: without a number."""
    path = tmp_path / "jobs.sqlite"
    with sqlite3.connect(path) as connection:
        connection.executescript((FIRST / "jobs.sql").read_text())
    return path


def version_of(path: Path) -> int:
    with sqlite3.connect(path) as connection:
        return int(connection.execute("SELECT version FROM dermaflow_schema").fetchone()[0])


def test_a_table_of_the_first_version_gets_its_number_and_goes_on(old_table: Path) -> None:
    store = JobStore(f"sqlite:///{old_table}")
    assert {job.id: job.state for job in store.list()} == {"b1": "finished", "b2": "queued"}
    assert version_of(old_table) == 1 and store.begin("b2")


def test_a_step_is_made_once_and_whole(old_table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def step(connection: sa.Connection) -> None:
        made.append(1)
        connection.execute(sa.text("ALTER TABLE batches ADD COLUMN note TEXT"))
        if len(made) == 1:
            raise RuntimeError("killed midway")

    monkeypatch.setattr(migrations, "STEPS", {1: step})
    with pytest.raises(RuntimeError):
        JobStore(f"sqlite:///{old_table}")
    assert version_of(old_table) == 1
    for _ in range(2):
        assert len(JobStore(f"sqlite:///{old_table}").list()) == 2
    assert version_of(old_table) == 2 and len(made) == 2


def test_a_newer_table_is_left_alone(old_table: Path) -> None:
    JobStore(f"sqlite:///{old_table}")
    with sqlite3.connect(old_table) as connection:
        connection.execute("UPDATE dermaflow_schema SET version = 9")
    with pytest.raises(JobError, match=r"version 9, this DermaFlow knows up to 1.*Install the DermaFlow"):
        JobStore(f"sqlite:///{old_table}")


def changed(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_what_a_newer_version_wrote_is_refused_with_what_to_do(tmp_path: Path) -> None:
    for name in ("bundle", "shards", "scored"):
        shutil.copytree(FIRST / name, tmp_path / name)
    changed(tmp_path / "shards/manifest.json", format="dermaflow-shards/2", shards="elsewhere")
    with pytest.raises(ShardError, match=r"manifest.json: format 'dermaflow-shards/2', of a newer DermaFlow"):
        ShardFolder(tmp_path / "shards")
    changed(tmp_path / "scored/plan.json", format="dermaflow-scoring/7")
    with pytest.raises(StorageError, match=r"of a newer DermaFlow.*Install the version"):
        read_plan(str(tmp_path / "scored"))
    changed(tmp_path / "bundle/bundle.json", format="dermaflow-bundle/9")
    digest = storage.sha256_file(tmp_path / "bundle/bundle.json")
    (tmp_path / "bundle/bundle.sha256").write_text(digest)
    with pytest.raises(BundleError, match=r"format 'dermaflow-bundle/9'.*Use the DermaFlow version that wrote it"):
        load_bundle(tmp_path / "bundle")
    changed(tmp_path / "shards/manifest.json", format="something/1")
    with pytest.raises(ShardError, match="Check the path"):
        ShardFolder(tmp_path / "shards")
