"""Bulk scoring from archive and bucket to findings, pathways and summary, in one process; connections that drop."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3_here import own_s3
from small_archives import hostile_zip, lesion_jpegs, scoring_bundle
from tiny_data import snapshot

from dermaflow import storage
from dermaflow.errors import DataError, StorageError
from dermaflow.scoring import files
from dermaflow.scoring.bulk import score
from dermaflow.scoring.plan import Options, Status, read_failures, read_status


class Proxy:
    """Between a client and a server on loopback; while `drop` is set, every third download is cut off.

    Uploads are not: the server of these tests keeps half of one, which a real store refuses.
    """

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
            download = client.recv(4, socket.MSG_PEEK) == b"GET "
            number += download
            server = socket.create_connection(("127.0.0.1", self._target))
            limit = 300 if self.drop and download and number % 3 == 0 else None  # bytes of the answer
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


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A bucket behind a proxy."""
    with own_s3("hospital") as address:
        proxy = Proxy(int(address.rpartition(":")[2]))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
        yield proxy
        proxy.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(scoring_bundle(tmp_path_factory.mktemp("bundle") / "model"))


def test_an_archive_with_patients_and_again_and_with_another_model(tmp_path: Path, model: str) -> None:
    said = hostile_zip(tmp_path / "in.zip")
    with zipfile.ZipFile(tmp_path / "in.zip", "a") as archive:
        for i, data in enumerate(lesion_jpegs()):
            archive.writestr(f"lesion{i}.jpg", data)
    patients = tmp_path / "patients.csv"
    patients.write_text("patient_id,lesion_id,image_id,age\nP1,L1,lesion0,71\nP1,L1,lesion1,71\nP2,L2,lesion2,33\n")
    out = tmp_path / "out"
    seen: list[Status] = []
    found = score(
        str(tmp_path / "in.zip"), str(out), model=model, patients=str(patients), progress=seen.append, use_ray=False
    )
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
    assert score(str(tmp_path / "in.zip"), str(out), model=model, patients=str(patients), use_ray=False) == found
    assert snapshot(out) == before, "what is done is not done again"
    other = scoring_bundle(tmp_path / "other", "other", 1)
    with pytest.raises(DataError, match="a run with another model"):
        score(str(tmp_path / "in.zip"), str(out), model=str(other), patients=str(patients), use_ray=False)
    assert snapshot(out) == before


def test_from_a_bucket_to_a_bucket_with_connections_that_drop(
    model: str, store: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "PAUSES", (0.0, 0.1, 0.1))
    client = boto3.client("s3")
    for i in range(40):
        content = b"no image" if i == 7 else lesion_jpegs()[i % 12]
        client.put_object(Bucket="hospital", Key=f"in/a/image{i:03}.jpg", Body=content)
    storage.write_bytes("s3://hospital/p.csv", b"patient_id,lesion_id,image_id\nP1,L1,image000\n")
    store.drop = True
    try:
        found = score(
            "s3://hospital/in", "s3://hospital/out", model=model, patients="s3://hospital/p.csv",
            options=Options(part_size=16), use_ray=False,
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


def test_a_process_that_is_killed_and_run_again(model: str, tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for i in range(300):
        (source / f"image{i:03}.jpg").write_bytes(b"no image" if i == 70 else lesion_jpegs()[i % 12])
    code = (
        "from dermaflow.scoring.bulk import Options, score\n"
        f"score({str(source)!r}, {str(out)!r}, model={model!r}, options=Options(part_size=3), use_ray=False)"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    while len(list((out / "log").glob("*.json"))) < 3:
        assert process.poll() is None, "it must not end before it is killed"
        time.sleep(0.01)
    process.kill()
    process.wait()
    done = {path.name: path.stat().st_mtime_ns for path in (out / "log").glob("*.json")}
    assert 3 <= len(done) < 100 and read_status(str(out)).state == "scoring"
    found = score(str(source), str(out), model=model, options=Options(part_size=3), use_ray=False)
    assert (found.images, found.failed) == (300, 1)
    table = pq.read_table(out / "findings.parquet")
    assert table["image_id"].to_pylist() == [f"image{i:03}" for i in range(300)], "each once, in order"
    after = {path.name: path.stat().st_mtime_ns for path in (out / "log").iterdir()}
    assert len(after) == 100 and {name: after[name] for name in done} == done, "only what was missing was done"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 384 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=384k", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("may not mount a small disk here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_disk_that_fills_stops_the_work_and_a_larger_one_lets_it_go_on(
    model: str, tmp_path: Path, small_disk: Path
) -> None:
    source, out = tmp_path / "in", small_disk / "out"
    source.mkdir()
    for i in range(120):
        (source / f"image{i:03}.jpg").write_bytes(lesion_jpegs()[i % 12])

    def run() -> None:
        score(str(source), str(out), model=model, options=Options(part_size=3), use_ray=False)

    with pytest.raises(StorageError, match="No space left on device"):
        run()
    done = {path.name: path.stat().st_mtime_ns for path in (out / "log").glob("*.json")}
    assert 0 < len(done) < 40, "it fills in the middle"
    with pytest.raises(StorageError, match="No space left on device"):
        run()
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    run()
    table = pq.read_table(out / "findings.parquet")
    assert table["image_id"].to_pylist() == [f"image{i:03}" for i in range(120)]
    after = {path.name: path.stat().st_mtime_ns for path in (out / "log").iterdir()}
    assert {name: after[name] for name in done} == done, "what was committed before stays"
