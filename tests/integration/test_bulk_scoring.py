"""Bulk scoring on Ray: whatever is killed or cannot be written, every input is scored exactly once."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import ray
from small_archives import lesion_jpegs, scoring_bundle

from dermaflow.errors import StorageError
from dermaflow.preparation.cluster import connect
from dermaflow.scoring.bulk import score
from dermaflow.scoring.plan import Options, Status, read_status


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """One Ray of two CPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("OMP_NUM_THREADS", "1")
        connect(cpus=2)
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(scoring_bundle(tmp_path_factory.mktemp("bundle") / "model"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 files, a few of them bad."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(200):
        (folder / f"image{i:03}.jpg").write_bytes(b"no image" if i % 50 == 7 else lesion_jpegs()[i % 12])
    return folder


def check_exactly_once(out: Path, images: int, failed: int) -> None:
    found = pq.read_table(out / "findings.parquet")
    assert sorted(found["image_id"].to_pylist()) == [f"image{i:03}" for i in range(images)]
    assert Counter(found["status"].to_pylist())["failed"] == failed
    status = read_status(str(out))
    assert (status.state, status.total, status.done, status.failed) == ("finished", images, images, failed)
    parts = sorted((out / "parts").iterdir())
    assert len(parts) == len(list((out / "log").iterdir())) and not list(out.rglob("*.partial"))


pytestmark = pytest.mark.timeout(300)


def test_a_driver_that_is_killed_and_run_again(tmp_path: Path, model: str, images: Path) -> None:
    out = tmp_path / "out"
    command = [
        sys.executable, "-m", "dermaflow.cli.main", "score", str(images), "--out", str(out), "--model", model,
        "--part-size", "4", "--workers", "1",
    ]  # fmt: skip
    address = ray.get_runtime_context().gcs_address
    driver = subprocess.Popen(command, env=os.environ | {"RAY_ADDRESS": address}, stdout=subprocess.DEVNULL)
    while read_status(str(out)).done < 12:
        assert driver.poll() is None, "it must not end before it is killed"
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    done = {p.name: p.stat().st_mtime_ns for p in (out / "log").iterdir()}
    assert 3 <= len(done) < 50 and not (out / "summary.json").exists()
    time.sleep(1.0)  # its actor may be at its last part
    done = {p.name: p.stat().st_mtime_ns for p in (out / "log").iterdir()}
    score(str(images), str(out), model=model, options=Options(part_size=4, workers=1))
    check_exactly_once(out, 200, 4)
    after = {p.name: p.stat().st_mtime_ns for p in (out / "log").iterdir()}
    assert {name: after[name] for name in done} == done, "only what was missing was done"


def test_a_worker_that_is_killed(tmp_path: Path, model: str, images: Path) -> None:
    killed: list[int] = []

    def kill(status: Status) -> None:
        if status.state == "scoring" and 20 < status.done < 150 and not killed:
            for process in psutil.Process().children(recursive=True):  # those of this test's own Ray
                with contextlib.suppress(psutil.Error):  # one that has just ended by itself
                    if "_Actor" in " ".join(process.cmdline()):
                        process.send_signal(signal.SIGKILL)
                        killed.append(process.pid)
                        return

    out = tmp_path / "out"
    score(str(images), str(out), model=model, options=Options(part_size=4, workers=2), progress=kill)
    assert killed
    check_exactly_once(out, 200, 4)


def test_a_place_that_cannot_be_written_stops_the_run_and_the_next_goes_on(
    tmp_path: Path, model: str, images: Path
) -> None:
    out = tmp_path / "out"
    in_the_way = out / "parts" / "part-00002.parquet"
    options = Options(part_size=40, workers=1)
    from dermaflow.scoring.planning import begin, resolve_model

    begin(str(images), str(out), resolve_model(model), None, options)
    (in_the_way / "x").mkdir(parents=True)
    with pytest.raises(StorageError, match=r"part-00002\.parquet: could not write.*run the same command again"):
        score(str(images), str(out), model=model, options=options)
    assert read_status(str(out)).state == "scoring"
    shutil.rmtree(in_the_way)
    # A part that the disk lost after its commit is noticed and done again.
    (out / "parts" / "part-00000.parquet").write_bytes(b"")
    score(str(images), str(out), model=model, options=options)
    check_exactly_once(out, 200, 4)
