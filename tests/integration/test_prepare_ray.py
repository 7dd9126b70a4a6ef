"""Preparation on Ray Data gives what it gives without, also on an object store, and fails in our own words."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray
from PIL import Image
from s3_here import own_s3
from tiny_data import add_image, draw, image_files, noise, prepare_here, snapshot

from dermaflow import storage
from dermaflow.datasets.images import ImageProblem
from dermaflow.errors import ShardError, StorageError
from dermaflow.preparation import layout
from dermaflow.preparation.cluster import connect, map_tables
from dermaflow.preparation.prepare import prepare
from dermaflow.preparation.reading import ShardFolder
from dermaflow.schemas.shard import SPLITS


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[str]:
    """A Ray of two CPUs, and the address of a bucket that its workers know, too."""
    with own_s3("hospital"), pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("OMP_NUM_THREADS", "1")
        ray.shutdown()  # one that an earlier test left knows nothing of this bucket
        connect(cpus=2)
        yield "s3://hospital"
        ray.shutdown()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = draw(tmp_path_factory.mktemp("drawn") / "data", 200)
    spoilt = list(image_files(folder).values())[5]
    spoilt.write_bytes(spoilt.read_bytes()[:-100])
    return folder


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several shards, which are planned here; row groups are cut on the workers, as always."""
    monkeypatch.setattr(layout, "ROWS_A_SHARD", 24)


def shard_files(folder: Path) -> dict[str, str]:
    return {name: sha256 for name, (_, sha256) in snapshot(folder).items() if name.endswith((".parquet", ".csv"))}


def test_ray_gives_what_one_process_gives(data: Path, tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    here = prepare_here(data, tmp_path / "here")
    there = prepare(data, tmp_path / "there", use_ray=True, progress=lambda *step: steps.append(step))
    assert there == here and here.manifest.quarantined == 1 and here.written > 6
    assert shard_files(tmp_path / "there") == shard_files(tmp_path / "here")
    assert ("inspect", 200, 200) in steps and ("write", here.written, here.written) in steps
    before = snapshot(tmp_path / "there")
    again = prepare(data, tmp_path / "there")  # Ray is installed, so it is used
    assert (again.inspected, again.written) == (0, 0) and snapshot(tmp_path / "there") == before


def test_shards_on_an_object_store(cluster: str, data: Path, tmp_path: Path) -> None:
    uri = f"{cluster}/team/shards"
    with pytest.raises(ShardError, match=r"s3://hospital/team/shards: no manifest"):
        ShardFolder(uri)
    local, remote = prepare_here(data, tmp_path / "here"), prepare(data, uri, use_ray=True)
    assert remote.manifest == local.manifest
    mine, theirs = ShardFolder(tmp_path / "here"), ShardFolder(uri)
    for split in SPLITS:
        assert theirs.metadata(split).equals(mine.metadata(split))
        np.testing.assert_array_equal(theirs.pixels(split, 24, 32, threads=2), mine.pixels(split, 24, 32))
        assert dict(theirs.images(split)) == dict(mine.images(split))

    again = prepare(data, uri, use_ray=True)
    assert (again.inspected, again.written) == (0, 0)
    shard = remote.manifest.shards[0]
    storage.delete(f"{uri}/{shard.path}")
    with pytest.raises(ShardError, match=rf"{uri}/{shard.path}: missing"):
        ShardFolder(uri)
    assert prepare(data, uri, use_ray=True).written == 1
    assert ShardFolder(uri).manifest == remote.manifest


def test_one_image_more_on_ray(data: Path, tmp_path: Path) -> None:
    copied = draw(tmp_path / "data", 60)
    prepare(copied, tmp_path / "shards", use_ray=True)
    stream = io.BytesIO()
    Image.fromarray(noise(0)).save(stream, "JPEG")
    add_image(copied, {"image_id": "ISIC_0000001", "lesion_id": "HAM_1"}, stream.getvalue())
    done = prepare(copied, tmp_path / "shards", use_ray=True)
    assert (done.inspected, done.written) == (1, 1)


# --- errors --------------------------------------------------------------------------------------------------------


def fail_with(error: Exception) -> Exception:
    """What `map_tables` raises when the mapped function raises `error` on a worker."""

    def function(table: pa.Table) -> pa.Table:
        raise error

    with pytest.raises(type(error)) as raised:
        list(map_tables([pa.table({"n": [1]})], function))
    return raised.value


def test_an_error_of_a_task_comes_back_as_itself(capfd: pytest.CaptureFixture[str]) -> None:
    for error in (
        ShardError("changed", where="a.jpg", expected="the same", todo="run the command again"),
        StorageError("could not write", where="/data"),
        ImageProblem("truncated", "cut short", where="a.jpg"),
    ):
        found = fail_with(error)
        assert type(found) is type(error) and str(found) == str(error)
        assert vars(found) == vars(error)
    found = fail_with(ValueError("of somebody else"))
    assert type(found) is ValueError and str(found).startswith("of somebody else")
    assert "".join(capfd.readouterr()) == "", "the message is the error's alone"


def test_an_image_that_changes_between_two_tasks(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = draw(tmp_path / "data", 60)
    path, plan = image_files(copied).popitem()[1], layout.plan_shards

    def meanwhile(*arguments: object) -> object:
        path.write_bytes(path.read_bytes() + b"more")
        return plan(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(layout, "plan_shards", meanwhile)
    with pytest.raises(ShardError, match=rf"^{path}: the image changed while it was being prepared. Run the command"):
        prepare(copied, tmp_path / "shards", use_ray=True)
    assert not (tmp_path / "shards" / "manifest.json").exists()


def test_a_store_that_refuses_is_named(data: Path) -> None:
    with pytest.raises(StorageError, match=r"s3://nobody/shards"):
        prepare(data, "s3://nobody/shards", use_ray=True)


def test_every_table_comes_back_once() -> None:
    tables = [pa.table({"n": [n] * (n % 3 + 1)}) for n in range(20)]

    def double(table: pa.Table) -> pa.Table:
        return pa.table({"n": [2 * n for n in table["n"].to_pylist()], "rows": [len(table)] * len(table)})

    found = list(map_tables(tables, double))
    assert sorted(table["n"][0].as_py() for table in found) == [2 * n for n in range(20)]
    assert all(len(table) == (table["n"][0].as_py() // 2) % 3 + 1 == table["rows"][0].as_py() for table in found)
