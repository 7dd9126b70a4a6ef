"""Bulk scoring on Ray: whatever is killed, fills up or drops its connection, every input is scored exactly once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import boto3
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from moto.server import ThreadedMotoServer
from small_archives import hostile_zip, lesion_jpegs, scoring_bundle
from tiny_data import snapshot

from dermaflow import storage
from dermaflow.errors import DataError, StorageError
from dermaflow.preparation.cluster import connect
from dermaflow.scoring.bulk import score
from dermaflow.scoring.plan import Options, Status, read_failures, read_status


class Proxy:
    """Between a client and a server on loopback; while `drop` is set, every third connection is cut off."""

    def __init__(self, port: int) -> None:
        self._target, self.drop, self.cut = port, False, 0
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        number = 0
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            number += 1
            server = socket.create_connection(("127.0.0.1", self._target))
            limit = 300 if self.drop and number % 3 == 0 else None  # bytes of the answer
            threading.Thread(target=self._pump, args=(client, server, None), daemon=True).start()
            threading.Thread(target=self._pump, args=(server, client, limit), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, limit: int | None) -> None:
        try:
            while data := source.recv(1 << 16):
                if limit is not None:
                    self.cut += 1
                    target.sendall(data[:limit])
                    break
                target.sendall(data)
        except OSError:
            pass
        for end in (source, target):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def close(self) -> None:
        self._server.close()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """One Ray of two CPUs, and a bucket behind a proxy that its workers know."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    _, port = server.get_host_and_port()
    proxy = Proxy(port)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            patch.setenv(name, value)
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("OMP_NUM_THREADS", "1")
        boto3.client("s3").create_bucket(Bucket="hospital")
        connect(cpus=2)
        yield proxy
        ray.shutdown()
    proxy.close()
    server.stop()


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


pytestmark = [pytest.mark.timeout(200), pytest.mark.usefixtures("store")]


def test_an_archive_with_patients_and_again_and_with_another_model(tmp_path: Path, model: str) -> None:
    said = hostile_zip(tmp_path / "in.zip")
    import zipfile

    with zipfile.ZipFile(tmp_path / "in.zip", "a") as archive:
        for i, data in enumerate(lesion_jpegs()):
            archive.writestr(f"lesion{i}.jpg", data)
    patients = tmp_path / "patients.csv"
    patients.write_text("patient_id,lesion_id,image_id,age\nP1,L1,lesion0,71\nP1,L1,lesion1,71\nP2,L2,lesion2,33\n")
    out = tmp_path / "out"
    seen: list[Status] = []
    found = score(str(tmp_path / "in.zip"), str(out), model=model, patients=str(patients), progress=seen.append)
    assert (found.images, found.failed) == (len(said) + 12, sum(reason is not None for reason in said.values()))
    assert found.reasons == Counter(reason for reason in said.values() if reason)
    assert found.ok > 5 and found.drift.psi is not None and found.images_per_second
    states = [status.state for status in seen]
    assert states[0] == "planning" and states[-1] == "finished" and sorted(set(states), key=states.index) == [
        "planning", "scoring", "finishing", "finished"
    ]  # fmt: skip
    table = pq.read_table(out / "findings.parquet").to_pylist()
    lesions = {row["image_id"]: row["lesion_id"] for row in table if row["lesion_id"]}
    assert lesions == {"lesion0": "L1", "lesion1": "L1", "lesion2": "L2"}
    reasons = {f["image_id"]: f["reason"] for f in read_failures(str(out)) if f["status"] == "failed"}
    assert reasons["secret"].startswith("encrypted: ") and reasons["passwd"].startswith("unsafe_path: ")
    pathways = pq.read_table(out / "pathways" / "pathways.parquet").to_pylist()
    assert {"L1", "L2", "lesion3"} <= {row["lesion_id"] for row in pathways}
    assert found.urgencies and sum(found.urgencies.values()) == found.lesions
    page = (out / "summary.html").read_text()
    assert "class mix" in page.lower() and "<script" not in page and "src=" not in page

    before = snapshot(out)
    assert score(str(tmp_path / "in.zip"), str(out), model=model, patients=str(patients)) == found
    assert snapshot(out) == before, "what is done is not done again"
    other = scoring_bundle(tmp_path / "other", "other", 1)
    with pytest.raises(DataError, match="a run with another model"):
        score(str(tmp_path / "in.zip"), str(out), model=str(other), patients=str(patients))
    assert snapshot(out) == before


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


def test_from_a_bucket_to_a_bucket_with_connections_that_drop(
    tmp_path: Path, model: str, store: Proxy, images: Path
) -> None:
    client = boto3.client("s3")
    for path in sorted(images.iterdir())[:40]:
        client.upload_file(str(path), "hospital", f"in/a/{path.name}")
    storage.write_bytes("s3://hospital/p.csv", b"patient_id,lesion_id,image_id\nP1,L1,image000\n")
    store.drop = True
    try:
        found = score(
            "s3://hospital/in", "s3://hospital/out", model=model, patients="s3://hospital/p.csv",
            options=Options(part_size=16, workers=1),
        )  # fmt: skip
    finally:
        store.drop = False
    assert store.cut > 0, "connections were cut"
    assert (found.images, found.failed, found.reasons) == (40, 1, {"not_an_image": 1})
    table = pq.read_table(pa.BufferReader(storage.read_bytes("s3://hospital/out/findings.parquet")))
    assert sorted(table["image_id"].to_pylist()) == [f"image{i:03}" for i in range(40)]
    assert json.loads(storage.read_bytes("s3://hospital/out/summary.json"))["images"] == 40
    assert storage.exists("s3://hospital/out/pathways/index.html")
    assert read_status("s3://hospital/out").state == "finished"
