"""A hub and four sites as real processes on loopback, with TLS and registered keys: what they refuse and survive."""

from __future__ import annotations

import os
import random
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from federation_processes import (
    MAKE_CERTIFICATES,
    Federation,
    family,
    federation,
    kill_all,
    rounds,
    serve_tls,
    write_app,
)
from typer.testing import CliRunner
from waiting import until

from clients.hub import HubError, HubOptions, ask_hub, is_locked, run_hub
from clients.node import read_state, running
from clients.offline import environment
from clients.site_checks import CertificateError, look_at_hub
from clients.site_cli import app as site_app
from clients.site_config import load_site
from dermaflow.audit import entries, verify
from dermaflow.errors import FederationError

NAMES = ("site-a", "site-b", "site-c", "site-d")


@pytest.fixture(scope="module")
def fed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """A hub with four sites online; nothing is approved anywhere yet. Its path has a blank, as paths have."""
    with federation(tmp_path_factory.mktemp("federation of four")) as here:
        here.start_hub()
        for name in (*NAMES, "site-e"):
            here.make(name)
        here.wait_for_hub()
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(here.register, NAMES))
        for name in NAMES:
            here.join(name)
        online(here, *NAMES)
        yield here


@pytest.fixture(scope="module")
def adding(fed: Federation) -> Path:
    """The app, approved at all sites but the last."""
    from clients.site_checks import fab_hash

    app = write_app(fed.folder / "app")
    fed.approve(fab_hash(app), *NAMES[:3])
    return app


def online(fed: Federation, *names: str) -> None:
    for name in names:
        until(lambda name=name: read_state(fed.folder / name).get("state") == "online", 90)


def joined(fed: Federation, name: str) -> Path:
    """The folder of a site that is online now, whatever was before."""
    if name not in fed.ids:
        fed.register(name)
    if name not in fed.nodes:
        (fed.folder / name / "run/supernode.json").unlink(missing_ok=True)
        fed.join(name)
    online(fed, name)
    return fed.folder / name


def events(log: Path, event: str) -> list[dict[str, Any]]:
    return [entry for entry in entries(log) if entry["event"] == event]


def finished(fed: Federation, run: str, seconds: float = 90) -> str:
    return until(lambda: (s := fed.status(run)).startswith("finished") and s, seconds, every=1)


def test_sites_train_and_the_one_that_did_not_approve_the_app_says_so(fed: Federation, adding: Path) -> None:
    (fed.folder / "site-b/raises").touch()
    run, out = fed.run(adding, rounds=2)
    until(lambda: len(rounds(out)) == 2, 60)
    (fed.folder / "site-b/raises").unlink()
    for done in rounds(out):
        assert done["answers"] == 2 and set(done["failed"]) == {fed.ids["site-b"], fed.ids["site-d"]}
        assert "is not approved at this site" in done["failed"][fed.ids["site-d"]]
        # the text of an error at a site can name persons
        raised = done["failed"][fed.ids["site-b"]]
        assert "ValueError" in raised and "HAM" not in raised and "Doe" not in raised
    assert [done["value"] for done in rounds(out)] == [1, 2]

    hub = fed.state / "audit.jsonl"
    sent = rounds(out)[0]["asked"] * 2
    until(lambda: len(events(hub, "message from site")) >= sent, 10)
    started = events(hub, "run started")[-1]
    assert started["run"] == run and started["app"] in (fed.folder / "site-a/policy.yaml").read_text()
    assert {entry["node_id"] for entry in events(hub, "message to site")} == set(fed.ids.values())
    assert all(entry["bytes"] > 300 for entry in events(hub, "message from site"))
    refused = events(fed.folder / "site-d/audit.jsonl", "app refused")
    assert refused and refused[0]["app"] == started["app"]
    log = fed.folder / "site-a/audit.jsonl"
    came, went = events(log, "message in"), events(log, "message out")
    assert [entry["group"] for entry in came] == [entry["group"] for entry in went] == ["1", "2"]
    # Flower sends content that the hub has already, for instance of another site, only once
    assert all(len(entry["sha256"]) == 64 and entry["run"] == run and entry["bytes"] > 100 for entry in came + went)
    assert all(entry["error"] is None for entry in went)


def test_nobody_unpacked_the_app_that_was_not_approved(fed: Federation, adding: Path) -> None:
    assert list((fed.folder / "site-a/run/flower/apps").iterdir())
    assert not (fed.folder / "site-d/run/flower/apps").exists()


def test_an_outsider_can_start_nothing(fed: Federation, adding: Path) -> None:
    tls = ssl.create_default_context(cafile=str(fed.certificates / "ca.crt"))
    started = len(events(fed.state / "audit.jsonl", "run started"))
    with httpx.Client(base_url=f"https://localhost:{fed.port}", verify=tls, trust_env=False) as outside:
        assert outside.get("/health").status_code == 200
        for path in (
            "/docs", "/openapi.json", "/v1/runtime/acquire-task", "/v1/control/start-run", "/v1/fleet/register-node",
            "/v1/fleet/../control/start-run", "/v1/fleet/%2e%2e/control/list-runs", "//v1/control/list-runs",
        ):  # fmt: skip
            assert outside.post(path, content=b"").status_code == 404, path
            assert outside.get(path).status_code in (404, 405), path
        for call in ("pull-messages", "get-run", "get-fab", "push-object", "pull-object", "send-node-heartbeat"):
            answer = outside.post(f"/v1/fleet/{call}", content=b"x", headers={"flwr-public-key": "AAAA"})
            assert answer.status_code == 401, call
        large = outside.post("/v1/fleet/activate-node", content=bytes(1 << 20), headers={"flwr-public-key": "AAAA"})
        assert large.status_code == 413
    with httpx.Client(base_url=f"https://localhost:{fed.admin_port}", verify=tls, trust_env=False) as beside:
        # on the hub's own machine: without the secret, nobody takes the token of a run
        headers = {"content-type": "application/protobuf"}
        assert beside.post("/v1/runtime/acquire-task", content=b"", headers=headers).status_code in (401, 403)
    assert events(fed.state / "audit.jsonl", "refused")
    home = fed.folder / "outsider"
    home.mkdir()
    text = (fed.state / "flower/config.toml").read_text().replace(f":{fed.admin_port}", f":{fed.port}")
    (home / "config.toml").write_text(text)
    tried = subprocess.run(
        [Path(sys.executable).parent / "flwr", "run", adding, "hub", "--format", "json"], env=environment(home),
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "run-id" not in tried.stdout
    assert len(events(fed.state / "audit.jsonl", "run started")) == started


def test_a_key_is_refused_until_it_is_registered_and_then_joins_by_itself(fed: Federation) -> None:
    fed.join("site-e")
    state = until(lambda: (s := read_state(fed.folder / "site-e")).get("state") == "refused" and s, 40)
    assert "2004" in state["reason"] or "activat" in state["reason"]
    fed.register("site-e")
    online(fed, "site-e")


def test_leaving_leaves_no_process_and_the_hub_knows(fed: Federation) -> None:
    folder = joined(fed, "site-e")
    processes = family(fed.nodes["site-e"].pid)
    assert len(processes) >= 3 and running(folder) == processes[0]
    shown = CliRunner().invoke(site_app, ["status", "--site", str(folder)])
    assert shown.exit_code == 0 and "online as node" in shown.output and "unbroken" in shown.output
    assert "left" in CliRunner().invoke(site_app, ["leave", "--site", str(folder)]).output
    fed.nodes.pop("site-e").wait(5)
    assert not [pid for pid in processes if Path(f"/proc/{pid}").exists()]
    assert running(folder) is None
    assert events(fed.state / "audit.jsonl", "site left")[-1]["node_id"] == fed.ids["site-e"]


def test_no_process_outlives_a_killed_node(fed: Federation) -> None:
    joined(fed, "site-e")
    processes = family(fed.nodes["site-e"].pid)
    assert len(processes) >= 3
    os.kill(fed.nodes.pop("site-e").pid, signal.SIGKILL)
    until(lambda: not [pid for pid in processes[1:] if Path(f"/proc/{pid}").exists()], 20)


def test_a_site_killed_in_a_round_and_an_app_killed_in_it_delay_nobody_for_long(fed: Federation, adding: Path) -> None:
    for name in NAMES[:3]:
        (fed.folder / name / "run/app.pid").unlink()
    run, out = fed.run(adding, rounds=1, seconds=4.0)
    for name in NAMES[:3]:
        until(lambda name=name: (fed.folder / name / "run/app.pid").exists(), 40)
    os.kill(int((fed.folder / "site-b/run/app.pid").read_text()), signal.SIGKILL)
    kill_all(family(fed.nodes["site-c"].pid))
    fed.nodes.pop("site-c").wait()
    fed.join("site-c")  # at once: the hub refuses it until the session before has lapsed
    (done,) = until(lambda: rounds(out), 60)
    assert done["answers"] == 1 and set(done["failed"]) == {fed.ids[name] for name in NAMES[1:]}
    assert "ClientApp stopped responding" in done["failed"][fed.ids["site-b"]]
    assert "navailable" in done["failed"][fed.ids["site-c"]]
    assert done["seconds"] < 60
    assert events(fed.folder / "site-b/audit.jsonl", "app died")[0]["signal"] == "SIGKILL"
    online(fed, "site-c")
    assert finished(fed, run) == "finished:completed"


def test_a_hub_killed_in_a_round_loses_no_round(fed: Federation, adding: Path) -> None:
    run, out = fed.run(adding, rounds=2, seconds=1.0)
    until(lambda: len(rounds(out)) == 1, 60)
    assert fed.hub is not None
    fed.hub.kill()
    fed.hub.wait()
    fed.start_hub()
    fed.wait_for_hub()
    until(lambda: len(rounds(out)) == 2)
    assert [(done["answers"], done["value"]) for done in rounds(out)] == [(3, 1), (3, 2)]
    assert finished(fed, run) == "finished:completed"
    assert verify(fed.state / "audit.jsonl")


def test_a_second_hub_or_node_in_the_same_folder_is_refused(fed: Federation) -> None:
    again = subprocess.run(
        [sys.executable, "-c", f"from clients.node import run_node; run_node({str(fed.folder / 'site-a')!r}, ())"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "has joined already" in again.stderr
    assert running(fed.folder / "site-a")
    certs = fed.certificates
    options = HubOptions(
        state=fed.folder / "second", host="127.0.0.1", port=fed.port, ca=certs / "ca.crt",
        certificate=certs / "server.crt", key=certs / "server.key",
    )  # fmt: skip
    with pytest.raises(HubError, match=f"port {fed.port}"):
        run_hub(options)


def test_the_hub_leaves_no_process_and_tells_when_it_is_not_there(fed: Federation) -> None:
    for name in [*fed.nodes]:
        fed.nodes[name].terminate()
    assert fed.hub is not None
    for name in [*fed.nodes]:
        fed.nodes.pop(name).wait(30)
    fed.hub.terminate()
    fed.hub.wait(30)
    assert not is_locked(fed.state / "runs.lock")
    with pytest.raises(FederationError, match="Does the hub run"):
        ask_hub(fed.state, "list", "hub")
    for log in [fed.state / "audit.jsonl", *(fed.folder / name / "audit.jsonl" for name in NAMES)]:
        assert verify(log)


def expire(certificates: Path) -> None:
    """Replace the hub's certificate by one of the same authority that ended yesterday."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

    old = x509.load_pem_x509_certificate((certificates / "server.crt").read_bytes())
    key = load_pem_private_key((certificates / "ca.key").read_bytes(), None)
    new = x509.CertificateBuilder(
        old.issuer, old.subject, old.public_key(), x509.random_serial_number(), datetime.now(UTC) - timedelta(9),
        datetime.now(UTC) - timedelta(1), [*old.extensions],
    )  # fmt: skip
    (certificates / "server.crt").write_bytes(new.sign(key, hashes.SHA384()).public_bytes(Encoding.PEM))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fault", "said"),
    [("wrong authority", "certificate"), ("expired", "expired"), ("other name", "mismatch"), ("none", "")],
)
def test_a_hub_that_cannot_prove_who_it_is(tmp_path: Path, fault: str, said: str) -> None:
    here = Federation(tmp_path)
    folder = here.make("site-a")
    certificates = here.certificates
    if fault == "wrong authority":
        certificates = tmp_path / "others"
        subprocess.run([MAKE_CERTIFICATES, certificates, "localhost"], check=True, capture_output=True)
    elif fault == "expired":
        expire(certificates)
    host = "127.0.0.2" if fault == "other name" else "localhost"
    server = serve_tls(certificates, host)
    text = (folder / "site.yaml").read_text().replace(f"localhost:{here.port}", f"{host}:{server.server_port}")
    (folder / "site.yaml").write_text(text)
    try:
        if fault == "none":
            view = look_at_hub(load_site(folder))
            assert view.status == 200 and abs(view.ahead) < 2 and view.certificate_ends > datetime.now(UTC)
            return
        with pytest.raises(CertificateError, match=said):
            look_at_hub(load_site(folder))
        joined = CliRunner().invoke(site_app, ["join", "--site", str(folder)])
        assert joined.exit_code == 1 and running(folder) is None
        if fault != "other name":
            # the same for the node itself: nothing goes out, and the reason is there to read
            (folder / "run").mkdir(exist_ok=True)
            (folder / "run/secret").write_bytes(b"secret")
            node = subprocess.run(
                [sys.executable, "-m", "clients.supernode", folder, str(here.admin_port)], cwd=folder,
                env=environment(folder / "run/flower"), capture_output=True, timeout=60, check=False,
            )  # fmt: skip
            assert node.returncode != 0 and "certificate" in read_state(folder)["reason"].lower()
    finally:
        server.shutdown()


def test_the_authority_is_made_once(tmp_path: Path) -> None:
    def make(*names: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([MAKE_CERTIFICATES, tmp_path / "c", *names], capture_output=True, text=True, check=False)

    assert make("localhost").returncode == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / "c").iterdir()}
    assert make("localhost").returncode == 0
    assert {file.name: file.read_bytes() for file in (tmp_path / "c").iterdir()} == before
    assert make("localhost", "hub.example.org").returncode == 0
    assert (tmp_path / "c/ca.crt").read_bytes() == before["ca.crt"]
    assert (tmp_path / "c/server.crt").read_bytes() != before["server.crt"]
    (tmp_path / "c/ca.key").unlink()
    lost = make("localhost")
    assert lost.returncode == 1 and "ca.key" in lost.stderr
    assert (tmp_path / "c/ca.crt").read_bytes() == before["ca.crt"]


@contextmanager
def two_sites(folder: Path) -> Iterator[tuple[Federation, Path]]:
    """A hub with two sites online, and the app, approved."""
    from clients.site_checks import fab_hash

    with federation(folder) as here:
        here.start_hub()
        app = write_app(folder / "app")
        for name in NAMES[:2]:
            here.make(name)
            here.approve(fab_hash(app), name)
        here.wait_for_hub()
        for name in NAMES[:2]:
            here.register(name)
            here.join(name)
        online(here, *NAMES[:2])
        yield here, app


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", [7, 8])
def test_a_hub_killed_again_and_again_loses_no_round(tmp_path: Path, seed: int) -> None:
    """At moments drawn by chance, while 20 MB travel to and from each site in pieces: no answer may be missing."""
    chance = random.Random(seed)
    with two_sites(tmp_path) as (here, app):
        run, out = here.run(app, rounds=10, numbers=5_000_000)
        kills = 0
        while len(rounds(out)) < 10 and kills < 15:
            # soon after a round has begun or gone on: that is when messages travel
            seen = len(rounds(out))
            until(lambda: len(rounds(out)) > seen or chance.random() < 0.03, 60)  # noqa: B023
            time.sleep(chance.uniform(0, 3))
            assert here.hub is not None
            here.hub.kill()
            here.hub.wait()
            kills += 1
            here.start_hub()
            here.wait_for_hub()
        until(lambda: len(rounds(out)) == 10, 200)
        print(f"{kills} kills, a round in {[int(done['seconds']) for done in rounds(out)]} s")
        assert kills >= 4
        assert [(done["answers"], done["failed"], done["value"]) for done in rounds(out)] == [
            (2, {}, number) for number in range(1, 11)
        ]
        assert finished(here, run) == "finished:completed"
        verify(here.state / "audit.jsonl")


@pytest.mark.slow
def test_a_launcher_killed_with_its_app_is_answered_for_and_replaced(tmp_path: Path) -> None:
    with two_sites(tmp_path) as (here, app):
        _, out = here.run(app, rounds=2, seconds=5.0)
        pid = until(lambda: (path := tmp_path / "site-a/run/app.pid").exists() and int(path.read_text()), 40)
        launcher = psutil.Process(pid).parent()
        assert launcher is not None and "clients.launcher" in launcher.cmdline()
        launcher.kill()
        until(lambda: len(rounds(out)) == 2, 60)
        first, second = rounds(out)
        assert first["failed"] == {here.ids["site-a"]: "ClientApp stopped responding."} and first["seconds"] < 20
        assert second["answers"] == 2


@pytest.mark.slow
def test_everything_killed_at_once_comes_back(tmp_path: Path) -> None:
    """The database still counts on all sites; each is refused until its session lapses, then the run goes on."""
    with two_sites(tmp_path) as (here, app):
        run, out = here.run(app, rounds=3, seconds=2.0)
        until(lambda: len(rounds(out)) == 1, 60)
        assert here.hub is not None
        kill_all([here.hub.pid, *(pid for node in here.nodes.values() for pid in family(node.pid))])
        here.hub.wait()
        here.start_hub()
        for name in NAMES[:2]:
            here.nodes.pop(name).wait()
            (here.folder / name / "run/supernode.json").unlink()
            here.join(name)
        online(here, *NAMES[:2])
        assert finished(here, run, 200) == "finished:completed"
        print(rounds(out))
        _, out = here.run(app, rounds=1)
        (done,) = until(lambda: rounds(out), 60)
        assert done["answers"] == 2
