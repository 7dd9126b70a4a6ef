"""What the doctor says of versions, disks, ports, certificates, clocks and storage, each made ill on purpose."""

from __future__ import annotations

import json
import os
import socket
import ssl
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from s3_here import own_s3
from typer.testing import CliRunner

from dermaflow.cli.main import app
from dermaflow.doctor import machine, packages, services
from dermaflow.doctor.checks import Check, looked, ok
from dermaflow.errors import DataError
from dermaflow.settings import settings


def one(checks: Iterator[Check]) -> Check:
    [check] = list(checks)
    return check


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Settings are read anew within the test and after it."""
    settings.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    settings.cache_clear()


# --- versions ------------------------------------------------------------------------------------------------------


def test_versions_that_are_missing_wrong_or_untested_are_told_apart(tmp_path: Path) -> None:
    pins = tmp_path / "constraints.txt"
    have = packages.installed()
    pins.write_text(f"# a comment\nnumpy=={have['numpy']}\nrich==0.1\n")
    found = {check.name: check for check in packages.check_packages(pins, have)}
    assert found["packages"].state == found["python"].state == "ok"
    assert (
        found["tested versions"].state == "warning"
        and f"rich {have['rich']} (tested 0.1)" in found["tested versions"].found
    )

    ill = {name: version for name, version in have.items() if name != "httpx"} | {"numpy": "1.26.0"}
    found = {check.name: check for check in packages.check_packages(pins, ill)}
    assert found["packages"].state == "problem"
    assert "missing httpx" in found["packages"].found and "numpy 1.26.0, needed" in found["packages"].found

    bare = {name: version for name, version in have.items() if name not in ("ray", "prefect", "limits")}
    assert (
        "not installed: cluster, flows, serve"
        in {c.name: c for c in packages.check_packages(pins, bare)}["packages"].found
    )


def test_a_file_that_pins_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("numpy>=2\n")
    with pytest.raises(DataError, match="line 1: 'numpy>=2'; expected name==version"):
        packages.read_constraints(tmp_path / "c.txt")


# --- the machine ---------------------------------------------------------------------------------------------------


def test_more_threads_than_processors_are_said(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("DERMAFLOW_THREADS", "4096")
    fresh.delenv("OMP_NUM_THREADS", raising=False)
    found = one(machine.check_processors())
    assert found.state == "warning" and "DERMAFLOW_THREADS=" in found.todo


def test_a_gpu_that_is_asked_for_and_not_there_is_a_problem(fresh: pytest.MonkeyPatch) -> None:
    import torch

    fresh.setattr(torch.cuda, "is_available", lambda: False)
    fresh.setenv("DERMAFLOW_DEVICE", "cuda")
    assert one(machine.check_gpus()).state == "problem"


def test_little_memory_and_a_full_disk_are_problems(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.setattr(machine, "free_memory", lambda: machine.GIB)
    assert next(machine.check_memory()).state == "problem"
    fresh.setattr(machine.shutil, "disk_usage", lambda path: _usage(100 << 20))
    found = one(machine.check_disk([tmp_path, tmp_path / "not" / "yet"]))  # one disk, one line
    assert found.state == "problem" and "0.1 GiB free" in found.found


def _usage(free: int) -> object:
    return type("Usage", (), {"free": free, "total": free})()


def test_a_port_is_free_or_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert one(machine.check_ports([port])).state == "warning"
    assert one(machine.check_ports([port])).state == "ok"


# --- certificates and clocks ---------------------------------------------------------------------------------------


def certificate(folder: Path, days: int) -> tuple[Path, Path]:
    """A self-signed certificate for localhost that ends in so many days, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(days + 9).not_valid_before(now - timedelta(days=30)).not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), False).sign(key, hashes.SHA256())
    )  # fmt: skip
    pem, private = folder / f"{days}.crt", folder / f"{days}.key"
    pem.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return pem, private


@pytest.mark.parametrize(("days", "state"), [(-2, "problem"), (5, "warning"), (200, "ok")])
def test_the_end_of_a_certificate_is_seen_in_a_file(tmp_path: Path, days: int, state: str) -> None:
    found = one(services.check_certificates([str(certificate(tmp_path, days)[0])]))
    assert found.state == state, found


class _Late(BaseHTTPRequestHandler):
    """A server whose clock is two minutes behind."""

    def do_GET(self) -> None:
        body = b'"3.7.0"' if self.path.endswith("version") else b"true"
        self.send_response_only(200)
        self.send_header("Date", format_datetime(datetime.now(UTC) - timedelta(minutes=2), usegmt=True))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def late(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Its https address, and the authority of its certificate."""
    pem, key = certificate(tmp_path, 100)
    server = ThreadingHTTPServer(("localhost", 0), _Late)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"https://localhost:{server.server_port}", pem
    server.shutdown()


def test_a_server_s_certificate_and_clock_are_seen(late: tuple[str, Path], tmp_path: Path) -> None:
    url, pem = late
    assert one(services.check_certificates([url], str(pem))).state == "ok"
    unknown = one(services.check_certificates([url]))
    assert unknown.state == "problem" and "self-signed" in unknown.found

    clocks = services.Clocks()
    chosen = {"PREFECT_HOME": str(tmp_path), "PREFECT_API_URL": url.replace("//", "//user:secret@") + "/api",
              "PREFECT_API_SSL_CERT_FILE": str(pem)}  # fmt: skip
    prefect = one(services.check_prefect(clocks, chosen))
    assert prefect.state == "warning" and "version 3.7.0" in prefect.found and "secret" not in prefect.found
    clock = next(services.check_clock(clocks, {}))
    assert clock.state == "problem" and "120 s ahead of Prefect" in clock.found


def test_prefect_s_profile_counts_and_the_environment_wins(tmp_path: Path) -> None:
    profiles = 'active = "ward"\n[profiles.ward]\nPREFECT_API_URL = "http://a/api"\nPREFECT_API_KEY = "k"\n'
    (tmp_path / "profiles.toml").write_text(profiles)
    found = services.prefect_settings({"PREFECT_HOME": str(tmp_path), "PREFECT_API_URL": "http://b/api"})
    assert (found["PREFECT_API_URL"], found["PREFECT_API_KEY"]) == ("http://b/api", "k")


def test_services_that_nobody_runs_are_problems(tmp_path: Path) -> None:
    clocks = services.Clocks()
    away = {"PREFECT_HOME": str(tmp_path), "PREFECT_API_URL": "http://127.0.0.1:9/api", "RAY_ADDRESS": "127.0.0.1:9"}
    assert one(services.check_prefect(clocks, away)).state == "problem"
    assert one(services.check_ray(clocks, away)).state == "problem"
    none = {"PREFECT_HOME": str(tmp_path)}
    assert one(services.check_prefect(clocks, none)).state == one(services.check_ray(clocks, none)).state == "ok"


# --- storage -------------------------------------------------------------------------------------------------------


def test_local_storage_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    assert one(services.check_writable("x", str(tmp_path))).state == "ok"
    assert list(tmp_path.iterdir()) == []
    assert one(services.check_writable("x", str(tmp_path / "new" / "one"))).found.endswith("can be made")
    assert one(services.check_readable("x", str(tmp_path / "none"))).state == "problem"


def test_a_bucket_is_tried_with_the_credentials_of_the_environment() -> None:
    import boto3

    with own_s3("hospital"):
        assert one(services.check_writable("registry", "s3://hospital/registry")).state == "ok"
        left = boto3.client("s3").list_objects_v2(Bucket="hospital").get("Contents", [])
        assert [entry["Key"] for entry in left if not entry["Key"].endswith("/")] == []
        [missing] = looked("registry", lambda: services.check_writable("registry", "s3://nobody/registry"))
        assert missing.state == "problem" and "s3://nobody/registry" in missing.found
        assert "AWS_ENDPOINT_URL" in missing.todo
        assert next(services.check_clock(services.Clocks())).found == "as that of the object store"


# --- the command ---------------------------------------------------------------------------------------------------


def test_the_command_ends_with_1_on_a_problem_and_speaks_json(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith(("PREFECT_", "RAY_", "AWS_"))]:
        fresh.delenv(name)
    fresh.setenv("PREFECT_HOME", str(tmp_path))
    fresh.setenv("DERMAFLOW_REGISTRY", str(tmp_path / "registry"))
    fresh.delenv("DERMAFLOW_DATA", raising=False)
    well = CliRunner().invoke(app, ["doctor", "--json", "--port", "0"])
    found = {line["name"]: line for line in json.loads(well.stdout)}
    assert set(found) >= {"python", "packages", "processors", "memory", "disk", "DERMAFLOW_REGISTRY", "prefect", "ray"}
    assert well.exit_code == any(line["state"] == "problem" for line in found.values())

    fresh.setenv("DERMAFLOW_DATA", str(tmp_path / "gone"))
    settings.cache_clear()
    ill = CliRunner().invoke(app, ["doctor", "--port", "0"])
    assert ill.exit_code == 1 and "problem DERMAFLOW_DATA" in ill.stdout and "correct the address" in ill.stdout


def test_a_look_that_breaks_is_a_line_of_its_own() -> None:
    def breaks() -> Iterator[Check]:
        yield ok("first", "fine")
        raise ZeroDivisionError

    first, second = looked("second", breaks)
    assert (first.state, second.name, second.state) == ("ok", "second", "problem")
