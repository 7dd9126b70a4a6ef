"""Between a hub and its sites, real processes on loopback: clocks that are off, blocked ports, keys, refusals.

One hub; each test has sites of its own, and `site-a` stays online beside them all the time.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from cryptography.hazmat.primitives import serialization as form
from cryptography.hazmat.primitives.asymmetric import ec
from federation_here import a_recipe
from federation_processes import Federation, family, federation, serve_tls, write_app
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.supernode import node_auth_http_interceptor as signing
from flwr.supernode.fleet_http_client import FleetHttpClient
from tiny_data import tiny_shards
from typer.testing import CliRunner, Result
from waiting import until

from clients import node as node_module
from clients.node import read_state, running
from clients.plan import Order
from clients.site_checks import AHEAD, BEHIND, Check, check_site, fab_hash
from clients.site_cli import app as site_app
from dermaflow.audit import entries, verify


@pytest.fixture(scope="module")
def fed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """A hub, and `site-a` online with images and a policy that allows little."""
    with federation(tmp_path_factory.mktemp("network")) as here:
        here.start_hub()
        folder = here.make("site-a", str(tiny_shards(here.folder / "images")))
        policy = folder / "policy.yaml"
        text = re.sub(r"(?m)^allowed_strategies: .*$", "allowed_strategies: [fedavg]", policy.read_text())
        policy.write_text(text.replace("max_rounds: 100", "max_rounds: 5"))
        for name in ("early", "forged"):
            here.make(name)
        here.wait_for_hub()
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(here.register, ("site-a", "early", "forged")))
        here.join("site-a", preload=("clients.client_app",))
        online(folder)
        yield here
        assert verify(here.state / "audit.jsonl")


@pytest.fixture(autouse=True)
def others_stay_online(fed: Federation) -> Iterator[None]:
    """Whatever befalls another site, nothing happens to this one."""
    before = read_state(fed.folder / "site-a"), family(fed.nodes["site-a"].pid)
    yield
    assert before[0]["state"] == "online"
    assert (read_state(fed.folder / "site-a"), family(fed.nodes["site-a"].pid)) == before
    assert not [entry for entry in entries(fed.folder / "site-a/audit.jsonl") if entry["event"] == "left"]


def online(folder: Path, seconds: float = 90) -> None:
    until(lambda: read_state(folder).get("state") == "online", seconds, f"{folder.name} is online")


def said(fed: Federation, name: str) -> str:
    """What a site's command has printed."""
    return (fed.folder / f"{name}.log").read_text()


def site(*arguments: object) -> Result:
    return CliRunner().invoke(site_app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


# Clocks


@pytest.mark.parametrize(
    ("ahead", "line"),
    [
        (60.0, r"failed clock: (59|60|61) s ahead of the hub\n +synchronise this machine's clock"),
        (-600.0, r"failed clock: (599|600|601) s behind the hub\n +synchronise this machine's clock"),
        (2.0, r"ok     clock: [123] s ahead of the hub"),
        (-200.0, r"ok     clock: (199|200|201) s behind the hub"),
        (None, "ok     clock: cannot be compared"),
    ],
)
def test_check_compares_the_clocks(fed: Federation, tmp_path: Path, ahead: float | None, line: str) -> None:
    server = serve_tls(fed.certificates, behind=ahead)
    folder = shutil.copytree(fed.folder / "site-a", tmp_path / "site", ignore=shutil.ignore_patterns("run", "state"))
    text = (folder / "site.yaml").read_text().replace(f"localhost:{fed.port}", f"localhost:{server.server_port}")
    (folder / "site.yaml").write_text(text)
    try:
        done = site("check", "--site", folder)
    finally:
        server.shutdown()
        server.server_close()
    assert re.search(line, done.output), done.output
    assert done.exit_code == int(line.startswith("failed"))


def call_hub(fed: Federation, call: str, message: Any, *, key: Path, claims: Path, ahead: float = 0.0) -> int:
    """Status of a site's call that a key signed, at a time that is ahead, under the name of another site's key."""

    def private(path: Path) -> Any:
        return form.load_ssh_private_key(path.read_bytes(), None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signing, "now", lambda: datetime.now(UTC) + timedelta(seconds=ahead))
        signer = signing.NodeAuthHttpInterceptor(private(key), private(claims).public_key())
        authority = str(fed.certificates / "ca.crt")
        with FleetHttpClient.from_server_address(f"localhost:{fed.port}", False, authority, [signer]) as client:
            try:
                getattr(client, call)(message)
            except httpx.HTTPStatusError as error:
                return error.response.status_code
    return 200


@pytest.mark.parametrize(
    ("ahead", "status"), [(AHEAD - 0.5, 200), (-BEHIND, 200), (AHEAD + 2, 401), (-BEHIND - 70, 401)]
)
def test_the_hub_takes_the_signatures_of_every_clock_that_check_lets_pass(
    fed: Federation, ahead: float, status: int
) -> None:
    key = fed.folder / "site-a/key"
    beat = SendNodeHeartbeatRequest(node=Node(node_id=int(fed.ids["site-a"])), heartbeat_interval=15)
    assert call_hub(fed, "SendNodeHeartbeat", beat, key=key, claims=key, ahead=ahead) == status


OTHER_CLOCK = """\
import datetime, os, time

right, moment = time.time, datetime.datetime

def ahead():
    try:
        with open(os.environ["CLOCK_AHEAD"]) as stream:
            return float(stream.read() or 0)
    except OSError:
        return 0.0

class Moments(type):
    def __instancecheck__(cls, value):
        return isinstance(value, moment)

class Moment(moment, metaclass=Moments):
    __slots__ = ()

    @classmethod
    def now(cls, tz=None):
        return moment.now(tz) + datetime.timedelta(seconds=ahead())

time.time, datetime.datetime = lambda: right() + ahead(), Moment
"""
"""Python imports `sitecustomize` before all else: the processes of a site then live in another time."""


@pytest.fixture(scope="module")
def early(fed: Federation) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """What a site whose clock was a minute ahead said in print, and what it said of itself; now its clock is right."""
    clock, shim = fed.folder / "ahead", fed.folder / "shim"
    shim.mkdir()
    (shim / "sitecustomize.py").write_text(OTHER_CLOCK)
    clock.write_text("60")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(shim), os.environ.get("PYTHONPATH")])))
        patch.setenv("CLOCK_AHEAD", str(clock))
        fed.join("early")
    states: list[dict[str, Any]] = []

    def refused_twice() -> bool:
        if (state := read_state(fed.folder / "early")) and state not in states:
            states.append(state)
        return said(fed, "early").count("SuperNode ended") >= 2

    until(refused_twice, 40, every=0.02)
    words = said(fed, "early")
    clock.unlink()
    yield words, states
    fed.nodes.pop("early").terminate()


def test_a_site_whose_clock_is_off_is_refused_and_joins_when_it_is_right(
    fed: Federation, early: tuple[str, list[dict[str, Any]]]
) -> None:
    words, states = early
    assert "online" not in words and {state["state"] for state in states} <= {"connecting", "refused"}
    assert states[0]["since"] > time.time()  # it did live in another time
    online(fed.folder / "early", 30)
    assert read_state(fed.folder / "early")["node_id"] == fed.ids["early"]
    assert running(fed.folder / "early") == fed.nodes["early"].pid  # nobody had to start it again


def test_a_site_whose_clock_is_off_says_so(early: tuple[str, list[dict[str, Any]]]) -> None:
    words, states = early
    assert "clock" in words and any("clock" in state.get("reason", "") for state in states)


# Ports


class Gate:
    """A port before the hub, blocked at first.

    Args:
        kind: ``silent`` takes connections and never answers; ``dropping`` loses what comes, as a firewall does.
        hub: Port of the hub.
    """

    def __init__(self, kind: str, hub: int) -> None:
        self._hub, self._open = hub, True
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=0 if kind == "dropping" else 128)
        self.port = int(self._listener.getsockname()[1])
        self._fill: list[socket.socket] = []
        for _ in range(4 if kind == "dropping" else 0):  # a queue that is full lets the kernel drop what knocks
            knock = socket.socket()
            knock.setblocking(False)
            knock.connect_ex(("127.0.0.1", self.port))
            self._fill.append(knock)

    def open(self) -> None:
        """Let everything through from now on."""
        self.close()
        self._listener, self._open = socket.create_server(("127.0.0.1", self.port)), True
        threading.Thread(target=self._let_through, daemon=True).start()

    def close(self) -> None:
        self._open = False
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # or a thread that waits for the next would keep it
        for end in (self._listener, *self._fill):
            end.close()

    def _let_through(self) -> None:
        while self._open:
            try:
                outside = self._listener.accept()[0]
                inside = socket.create_connection(("127.0.0.1", self._hub))
            except OSError:
                return
            for pair in ((outside, inside), (inside, outside)):
                threading.Thread(target=_pass_on, args=pair, daemon=True).start()


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while part := source.recv(1 << 16):
            target.sendall(part)
    for end in (source, target):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def timed_check(folder: Path) -> tuple[Check, float]:
    """The last line of a check, and its seconds."""
    began = time.monotonic()
    *_, last = check_site(folder)
    return last, time.monotonic() - began


def test_a_blocked_port_is_said_in_time_and_waited_for(fed: Federation) -> None:
    gates = {kind: Gate(kind, fed.port) for kind in ("silent", "dropping")}
    try:
        for name, gate in gates.items():
            text = (fed.make(name) / "site.yaml").read_text()
            (fed.folder / name / "site.yaml").write_text(text.replace(f":{fed.port}", f":{gate.port}"))
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(fed.register, gates))
            checks = [pool.submit(timed_check, fed.folder / name) for name in gates]
            fed.join("silent")
            # as an operator does it: the command looks at the hub first
            join = "import functools; from clients import node, site_cli;"
            join += "node.run_node = functools.partial(node.run_node, preload=['numpy']);"
            join += f"site_cli.app(['join', '--site', {str(fed.folder / 'dropping')!r}])"
            fed.nodes["dropping"] = fed._python("dropping", join)
            for check in checks:
                found, seconds = check.result()
                assert (found.name, found.ok) == ("hub", False)
                assert "no connection" in found.found and "timed out" in found.found and "firewall" in found.todo
                assert seconds < 20
        until(lambda: read_state(fed.folder / "dropping").get("state") == "connecting", 30)
        time.sleep(1)  # it has knocked by now
        for name in gates:
            assert running(fed.folder / name) == fed.nodes[name].pid
            shown = site("status", "--site", fed.folder / name)
            assert shown.exit_code == 0 and f"{name}: connecting since" in shown.output
            assert "online" not in said(fed, name)
        assert re.search(r"WARNING.*no connection: timed out.*firewall", said(fed, "dropping"), re.DOTALL)
        for gate in gates.values():
            gate.open()
        for name in gates:
            online(fed.folder / name, 60)
            assert read_state(fed.folder / name)["node_id"] == fed.ids[name]
    finally:
        for name in gates.keys() & fed.nodes.keys():
            fed.nodes[name].terminate()
        for name in gates.keys() & fed.nodes.keys():
            fed.nodes.pop(name).wait(40)
        for gate in gates.values():
            gate.close()


def test_a_silent_port_is_no_bad_certificate() -> None:
    """What a node says of a port that took its connection and was silent for Flower's 30 seconds."""
    reason = "Failed to initialize the connection to the SuperLink. _ssl.c:989: The handshake operation timed out"
    assert "certificate" not in node_module._explained({"state": "refused", "reason": reason})


# Keys


def new_key(path: Path) -> Path:
    """A private key of the right kind that the hub has never seen."""
    key = ec.generate_private_key(ec.SECP384R1())
    path.write_bytes(key.private_bytes(form.Encoding.PEM, form.PrivateFormat.OpenSSH, form.NoEncryption()))
    return path


def test_a_registered_key_beside_another_private_one_opens_nothing(fed: Federation) -> None:
    folder = fed.folder / "forged"
    new_key(folder / "key")
    fed.join("forged")
    state = until(lambda: (s := read_state(folder)).get("state") == "refused" and s, 40)
    assert "2004" in state["reason"]
    until(lambda: "refused: the hub does not know this key" in said(fed, "forged"), 10)
    fed.nodes.pop("forged").terminate()
    assert "online" not in said(fed, "forged")


@pytest.mark.parametrize("signer", ["site-a", "forger"])
def test_a_signature_of_another_key_is_refused(fed: Federation, tmp_path: Path, signer: str) -> None:
    """Who knows a site's public key, which is no secret, cannot speak for the site."""
    key = fed.folder / "site-a/key" if signer == "site-a" else new_key(tmp_path / "key")
    beat = SendNodeHeartbeatRequest(node=Node(node_id=int(fed.ids["site-a"])), heartbeat_interval=15)
    found = call_hub(fed, "SendNodeHeartbeat", beat, key=key, claims=fed.folder / "site-a/key")
    assert found == (200 if signer == "site-a" else 401)


# Policy

ASKING = """\
import json, time
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()

@app.main()
def main(grid, context):
    with open(context.run_config["orders"]) as stream:
        orders = json.load(stream)
    node = int(context.run_config["node"])
    found = []
    for kind, order in orders:
        content = RecordDict({"config": ConfigRecord({"order": order})})
        ids = list(grid.push_messages([Message(content, dst_node_id=node, message_type=kind)]))
        end, answers = time.time() + 60, []
        while not answers and time.time() < end:
            time.sleep(0.1)
            answers = list(grid.pull_messages(ids))
        found += [answer.error.reason if answer.has_error() else "" for answer in answers]
    with open(context.run_config["out"], "w") as stream:
        json.dump(found, stream)
"""


def test_what_the_policy_refuses_is_in_the_sites_log_with_the_reason(fed: Federation) -> None:
    """The site's own app, asked by a coordinator that wants too much."""
    app = write_app(fed.folder / "asking")
    (app / "adding/client_app.py").write_text("import clients.client_app\n\napp = clients.client_app.app\n")
    (app / "adding/server_app.py").write_text(ASKING)
    (app / "pyproject.toml").write_text((app / "pyproject.toml").read_text() + 'orders = ""\nnode = ""\n')
    fed.approve(fab_hash(app), "site-a")

    def order(strategy: str, rounds: int) -> str:
        asked = {"run": "asked", "round": 1, "scope": "head", "recipe": a_recipe()}
        return Order.model_validate(asked | {"strategy": strategy, "rounds": rounds}).model_dump_json()

    orders = [
        ("query.describe", order("fedavg", 5)), ("query.describe", order("krum", 5)), ("train", order("fedavg", 500))
    ]  # fmt: skip
    (fed.folder / "orders.json").write_text(json.dumps(orders))
    folder = fed.folder / "site-a"
    assert yaml.safe_load((folder / "policy.yaml").read_text())["max_rounds"] == 5
    run, out = fed.run(app, orders=str(fed.folder / "orders.json"), node=fed.ids["site-a"])
    answers = until(lambda: out.exists() and out.read_text() and json.loads(out.read_text()), 60)
    reasons = [
        "strategy krum is not allowed at this site, only fedavg", "500 rounds are more than the 5 that this site allows"
    ]  # fmt: skip
    assert answers[0] == ""
    assert [reason in answer for reason, answer in zip(reasons, answers[1:], strict=True)] == [True, True]
    went = [entry for entry in entries(folder / "audit.jsonl") if entry["event"] == "message out"]
    assert [(entry["run"], entry["type"]) for entry in went] == [(run, kind) for kind, _ in orders]
    assert went[0]["error"] is None
    assert [reason in entry["error"] for reason, entry in zip(reasons, went[1:], strict=True)] == [True, True]
    shown = site("status", "--site", folder).output
    assert all(reason in shown for reason in reasons)
