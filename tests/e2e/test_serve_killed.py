"""`dermaflow serve` as a process, over TLS: killed in the middle of a batch, and started again."""

from __future__ import annotations

import os
import shutil
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from serve_parts import a_zip, save_servable

from dermaflow.ports import free_port

pytest.importorskip("ray.serve")
pytestmark = [
    pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate with"),
    pytest.mark.slow,
    pytest.mark.timeout(900),  # two starts of Ray and Serve, on whatever is left of a busy machine
]

IMAGES = 1000


def make_certificate(folder: Path) -> tuple[Path, Path]:
    certificate, key = folder / "tls.crt", folder / "tls.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
         "-subj", "/CN=dermaflow", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    return certificate, key


@contextmanager
def serving(root: Path, port: int, client: httpx.Client) -> Iterator[subprocess.Popen[bytes]]:
    """The command in a process, once it answers."""
    command = [
        sys.executable, "-m", "serve", "--model", root / "model", "--state", root / "state", "--port", str(port),
        "--tls-cert", root / "tls.crt", "--tls-key", root / "tls.key",
    ]  # fmt: skip
    environment = os.environ | {"DERMAFLOW_THREADS": "1"}
    with (root / "serve.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        while not ready(client):
            assert process.poll() is None, (root / "serve.log").read_text()[-3000:]
            time.sleep(0.3)
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)


def ready(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz").status_code == 200
    except httpx.HTTPError:
        return False


def test_the_whole_service_is_killed_in_the_middle_of_a_batch(tmp_path: Path) -> None:
    save_servable(tmp_path / "model")
    certificate, _ = make_certificate(tmp_path)
    port = free_port()
    trusted = ssl.create_default_context(cafile=certificate)
    with httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=trusted, timeout=60, trust_env=False) as client:
        with serving(tmp_path, port, client) as process:
            with pytest.raises(httpx.HTTPError):
                httpx.get(f"http://127.0.0.1:{port}/healthz", trust_env=False)
            sent = client.post("/v1/batches", files={"archive": ("clinic.zip", a_zip(IMAGES))})
            assert sent.status_code == 202, sent.text
            at = f"/v1/batches/{sent.json()['id']}"
            while (before := client.get(at).json())["done"] == 0:
                assert before["state"] in ("queued", "running"), before
                time.sleep(0.05)
            process.send_signal(signal.SIGKILL)
            process.wait()
        while ready(client):  # what Ray started notices it and goes, too, a moment later
            time.sleep(0.3)
        assert before["done"] < IMAGES, "it must not end before it is killed"
        with serving(tmp_path, port, client):
            while (after := client.get(at).json())["state"] in ("queued", "running"):
                assert after["done"] >= before["done"], "what was done is not done again"
                time.sleep(0.3)
            assert after["state"] == "finished", after
            table = pq.read_table(pa.BufferReader(client.get(f"{at}/results").content))
            ids = table["image_id"].to_pylist()
            assert (len(ids), set(ids)) == (IMAGES, {f"L{i}" for i in range(IMAGES)})
