"""An object store that is busy, and commands that write into one."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import httpx
import pytest
from s3_here import own_s3
from sample_pathways import write_findings
from serve_parts import a_jpeg, save_servable
from tiny_data import draw, prepare_here
from typer.testing import CliRunner

from dermaflow import storage
from dermaflow.bundles.bundle import load_bundle
from dermaflow.cli.main import app
from dermaflow.forgetting.forget import Places, Records, forget, look
from dermaflow.forgetting.places import Ids
from dermaflow.preparation.reading import ShardFolder

CLIENT = httpx.Client(timeout=60)


class Front(BaseHTTPRequestHandler):
    """In front of the store: counts requests, and answers the first of each kind with 503 SlowDown."""

    protocol_version = "HTTP/1.1"
    behind = ""
    seen: Counter[str]

    def _answer(self) -> None:
        body = self._body()
        kind = f"{self.command} {self.path.partition('=')[0]}"
        type(self).seen[kind] += 1
        if type(self).seen[kind] == 1:
            found, status, headers = b"<Error><Code>SlowDown</Code></Error>", 503, {}
        else:
            kept = {k: v for k, v in self.headers.items() if k.lower() not in ("connection", "transfer-encoding")}
            answer = CLIENT.request(self.command, self.behind + self.path, content=body, headers=kept)
            found, status, headers = answer.content, answer.status_code, dict(answer.headers)
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        size = len(found) if self.command != "HEAD" else int(headers.get("content-length", 0))
        self.send_header("Content-Length", str(size))
        self.end_headers()
        self.wfile.write(found if self.command != "HEAD" else b"")

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("transfer-encoding", ""):
            return self.rfile.read(int(self.headers.get("content-length") or 0))
        body = b""
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _answer

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    with own_s3("hospital") as address:
        yield address


def test_a_store_that_is_busy_is_asked_again_and_large_files_go_in_parts(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    front = type("Counting", (Front,), {"behind": store, "seen": Counter()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), front)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    content = bytes(range(256)) * (12 << 12)  # 12 MiB
    try:
        storage.write_bytes("s3://hospital/busy/large", content)
        assert storage.read_bytes("s3://hospital/busy/large") == content
        assert storage.list_folder("s3://hospital/busy") == ["large"]
    finally:
        server.shutdown()
    asked: Counter[str] = front.seen  # type: ignore[attr-defined]
    parts = {kind: count for kind, count in asked.items() if kind.startswith("PUT") and "partNumber" in kind}
    assert sum(parts.values()) >= 3, asked  # two parts, one of them twice
    assert all(count >= 2 for kind, count in asked.items()), asked  # every kind was refused once, and asked again


@pytest.fixture(scope="module")
def shards(store: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("archive")
    prepare_here(draw(folder / "data"), "s3://hospital/shards")
    return "s3://hospital/shards"


def test_shards_are_opened_by_their_manifest_and_nothing_is_listed(
    store: str, shards: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    front = type("Counting", (Front,), {"behind": store, "seen": Counter()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), front)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    try:
        assert len(ShardFolder(shards).metadata("train")) > 50
    finally:
        server.shutdown()
    asked: Counter[str] = front.seen  # type: ignore[attr-defined]
    assert asked and not [kind for kind in asked if "list-type" in kind or "?prefix" in kind], asked


def test_training_evaluating_and_calibrating_into_a_bucket(shards: str, tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        "name: tiny\ninput: {height: 24, width: 32}\nbackbone: {name: seed_cnn, weights: none}\n"
        "optim: {batch_size: 16, head_epochs: 0, epochs: 1, layer_decay: 1.0}\n"
    )

    def run(*arguments: str) -> None:
        done = CliRunner().invoke(app, list(arguments))
        assert done.exit_code == 0, done.output

    model, report = "s3://hospital/model", "s3://hospital/report"
    run("train", "--shards", shards, "--recipe", str(recipe), "--out", model)
    trained = load_bundle(model)
    run("evaluate", "--model", model, "--shards", shards, "--out", report, "--resamples", "20")
    assert "report.html" in storage.list_folder(report)
    storage.write_bytes("s3://hospital/again/stale.txt", b"of an earlier run")
    run("calibrate", "--model", model, "--shards", shards, "--out", "s3://hospital/again")
    assert load_bundle("s3://hospital/again").bundle.weights_sha256 == trained.bundle.weights_sha256
    assert "stale.txt" not in storage.list_folder("s3://hospital/again")
    run("models", "add", model, "--registry", "s3://hospital/registry")


def test_pathways_are_written_into_a_bucket_and_signed_on_a_disk(store: str, tmp_path: Path) -> None:
    write_findings(tmp_path / "findings.parquet", {"I1": "L1", "I2": "L2"}, {})
    (tmp_path / "patients.csv").write_text("patient_id,lesion_id\nP1,L1\nP2,L2\n")
    out = "s3://hospital/pathways"
    command = [
        "recommend",
        "--findings",
        str(tmp_path / "findings.parquet"),
        "--patients",
        str(tmp_path / "patients.csv"),
    ]
    done = CliRunner().invoke(app, [*command, "--out", out])
    assert done.exit_code == 0 and "to sign, copy the folder to a disk" in done.output
    assert len(storage.list_folder(f"{out}/patients")) == 2

    refused = CliRunner().invoke(app, ["sign", out, "--lesion", "L1", "--by", "Ada Byron", "--decision", "accepted"])
    assert refused.exit_code == 1 and "s3://hospital/pathways; expected a local path" in refused.output
    storage.copy_folder(out, tmp_path / "local")
    signed = ["sign", str(tmp_path / "local"), "--lesion", "L1", "--by", "Ada Byron", "--decision", "accepted"]
    assert CliRunner().invoke(app, signed).exit_code == 0

    (tmp_path / "patients.csv").write_text("patient_id,lesion_id\nP1,L1\n")  # P2 has gone, and so does their page
    again = CliRunner().invoke(app, [*command, "--out", out, "--allow-unmatched"])
    assert again.exit_code == 0, again.output
    assert not [name for name in storage.list_folder(f"{out}/patients") if "P2" in name]


@pytest.mark.parametrize(
    "command",
    [
        ["serve", "--state", "s3://hospital/state"],
        ["federate", "--simulate", "--out", "s3://hospital/federated"],
        ["data", "synth", "--out", "s3://hospital/synthetic"],
        ["explain", "a.jpg", "--model", "m", "--out", "s3://hospital/explained"],
        ["data", "forget", "--by", "A", "--image", "i", "--shards", "s", "--log", "s3://hospital/log"],
    ],
)
def test_what_must_be_local_says_so(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 1 and "expected a local path" in refused.output, refused.output
    assert list(tmp_path.iterdir()) == []


def test_someone_is_forgotten_in_a_bucket(shards: str, tmp_path: Path) -> None:
    image = next(iter(ShardFolder(shards).images("train")))[0]
    records = Records(tmp_path / "log")
    ask = Ids(images=frozenset({image})), Places(shards=(shards,)), records
    forget(look(*ask, registry="none", by="Ada"), records)
    assert image not in dict(ShardFolder(shards).images("train"))
    assert look(*ask, registry="none", by="Ada").empty


def test_a_run_is_scored_into_a_bucket_and_forgotten_there(store: str, tmp_path: Path) -> None:
    from dermaflow.scoring.bulk import score

    (tmp_path / "images").mkdir()
    for i in range(3):
        (tmp_path / f"images/i{i}.jpg").write_bytes(a_jpeg(i))
    model = save_servable(tmp_path / "model")
    storage.copy_folder(tmp_path / "images", "s3://hospital/images")
    out = "s3://hospital/scored"
    summary = score("s3://hospital/images", out, model=str(model), use_ray=False)
    assert summary.images == 3
    records = Records(tmp_path / "log")
    ask = Ids(images=frozenset({"i1"})), Places(runs=(out,)), records
    forget(look(*ask, registry="none", by="Ada"), records)
    import pyarrow as pa
    import pyarrow.parquet as pq

    assert pq.read_table(pa.BufferReader(storage.read_bytes(f"{out}/findings.parquet")))["image_id"].to_pylist() == [
        "i0", "i2"
    ]  # fmt: skip
    keys = [entry["Key"] for entry in boto3.client("s3").list_objects_v2(Bucket="hospital")["Contents"]]
    assert not [key for key in keys if ".partial" in key]
