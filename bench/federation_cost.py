"""What a federated round costs beside the training in it, and what stock Flower costs in the same run.

    python bench/federation_cost.py deployed --shards SHARDS --weights FILE [--rounds 4]
    python bench/federation_cost.py growing --shards SHARDS --weights FILE [--sites 4 8 16 32]
    python bench/federation_cost.py bytes
    python bench/federation_cost.py head --shards SHARDS --weights FILE --rounds 11

deployed: three sites as processes on loopback, each with all the shards given, one epoch a round; ours with TLS, keys,
policy and audit logs, in float32 and with precision=bfloat16, then stock Flower (`bench/stock_flower_app`: state dict,
FedAvg) without any of it. Overhead of a round: its wall time less the slowest site's own training. The first round, in
which everything starts, is left out. growing: a simulation; the same images among more and more sites. head: the head
from class sums beside rounds of FedAvg on the head at two rates, every class weighed alike.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
from rounds import machine

from clients.coordinator import read_rounds
from clients.engine import command, flwr
from clients.hub import register_site
from clients.node import read_state
from clients.offline import environment
from clients.plan import Order, Plan
from clients.policy import approve
from clients.simulation import simulate, submit_to_hub
from clients.site import Layouts, empty_network
from clients.site_checks import installed_app
from clients.site_config import SiteConfig, make_site
from clients.wire import Precision
from dermaflow.learning.backbones import BackboneConfig
from dermaflow.learning.recipe import Recipe, load_recipe
from dermaflow.ports import free_port, free_ports

HERE = Path(__file__).parent
CERTIFICATES = HERE.parent / "deploy/federation/make_certificates.sh"
SITES = 3
RATES = (1e-3, 3e-3)
"""Of the head, for `head`; constant within a round, a cosine over the rounds."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["deployed", "growing", "bytes", "head"])
    parser.add_argument("--shards", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--size", type=int, nargs=2, default=[96, 128], help="Height and width of the input.")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--sites", type=int, nargs="+", default=[4, 8, 16, 32])
    chosen = parser.parse_args()
    print(machine(), flush=True)
    if chosen.what == "bytes":
        show_bytes()
        return
    changes = {
        "backbone.weights": str(chosen.weights.absolute()) if chosen.weights else "none",
        "input.height": chosen.size[0], "input.width": chosen.size[1], "input.views": 1,
    }  # fmt: skip
    recipe = load_recipe("ham10000-cpu", changes)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = recipe, chosen.shards.absolute(), Path(scratch), chosen
        {"deployed": deployed, "growing": growing, "head": head}[chosen.what](*arguments)


def deployed(recipe: Recipe, shards: Path, scratch: Path, chosen: argparse.Namespace) -> None:
    """Ours in both precisions and stock Flower, one after the other."""
    os.environ |= {"DERMAFLOW_THREADS": "1", "OMP_NUM_THREADS": "1"}  # three sites on the cores of one machine
    one_epoch = recipe.model_copy(
        update={"optim": recipe.optim.model_copy(update={"head_epochs": 0, "epochs": 1, "ema": 0.0})}
    )
    print("| way | round s | of it the slowest site's training | overhead s | hub's CPU s a round | rounds |")
    print("|---|---|---|---|---|---|")
    found = {
        "dermaflow": ours(one_epoch, shards, scratch / "float32", chosen.rounds, "float32"),
        "dermaflow, bfloat16": ours(one_epoch, shards, scratch / "bfloat16", chosen.rounds, "bfloat16"),
        "stock Flower": stock(one_epoch, shards, scratch, chosen.rounds),
    }
    costs = {}
    for way, (seconds, training, cpu) in found.items():
        over = [a - b for a, b in zip(seconds, training, strict=True)]
        middle = [statistics.median(values) for values in (seconds, training, over)]
        print(f"| {way} | {' | '.join(f'{value:.1f}' for value in middle)} | {cpu:.2f} | {len(seconds)} |")
        costs[way] = (middle[2], middle[1], cpu)
    stock_overhead, _, stock_cpu = costs.pop("stock Flower")
    for way, (overhead, trained, cpu) in costs.items():
        print(f"{way}: overhead {overhead / trained:.1%} of a site's training; ", end="")
        print(
            f"stock has {stock_overhead / overhead:.1f} times the overhead, {stock_cpu / cpu:.1f} times the hub's CPU"
        )


Found = tuple[list[float], list[float], float]
"""Seconds of each round but the first, the slowest site's training in each, and the hub's CPU seconds a round."""


def ours(recipe: Recipe, shards: Path, scratch: Path, rounds: int, precision: Precision) -> Found:
    """The hub and three sites as hospitals run them."""
    scratch.mkdir()
    state, certs = scratch / "hub", scratch / "certs"
    subprocess.run([CERTIFICATES, certs, "localhost"], check=True, capture_output=True)
    port, admin = free_ports(2)
    with running(scratch) as start:
        hub = start(
            "hub", command("dermaflow"), "federate", "hub", "--state", state, "--ca", certs / "ca.crt", "--certificate",
            certs / "server.crt", "--key", certs / "server.key", "--host", "127.0.0.1", "--port", port,
            "--admin-port", admin,
        )  # fmt: skip
        wait_for(port)
        wait_for(admin)
        named = []
        for name in ("one", "two", "three"):
            folder = scratch / name
            site = SiteConfig(name=name, shards=str(shards), superlink=f"localhost:{port}")
            make_site(folder, site, certs / "ca.crt")
            approve(folder, installed_app(), "bench")
            named.append(f"{name}={register_site(state, folder / 'key.pub', name)}")
            start(name, command("dermaflow"), "site", "join", "--site", folder)
        for name in ("one", "two", "three"):
            until(lambda name=name: read_state(scratch / name).get("state") == "online")
        plan = Plan(
            recipe=recipe.model_dump_json(), rounds=rounds, sites=",".join(named), out=str(scratch / "ours"),
            precision=precision,
            monitor_every=1000, resamples=1,
        )  # fmt: skip
        marks: list[tuple[float, float]] = []

        def look(label: str, done: int, total: int) -> None:
            if done > len(marks):
                marks.append((time.time(), cpu_seconds(hub.pid)))

        submit_to_hub(plan, state, look)
        training = [max(site["seconds"] for site in row["sites"].values()) for row in read_rounds(scratch / "ours")]
    ends = [at for at, _ in marks]
    return differences(ends), training[1:], (marks[-1][1] - marks[0][1]) / (len(marks) - 1)


def stock(recipe: Recipe, shards: Path, scratch: Path, rounds: int) -> Found:
    """Flower's own commands, as its documentation starts them."""
    home, out = scratch / "stock", scratch / "stock.jsonl"
    home.mkdir()
    port = free_port()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "stock"\n\n[superlink.stock]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    with running(scratch, environment(home)) as start:
        hub = start("link", command("flower-superlink"), "--insecure", "--host", "127.0.0.1", "--port", port)
        wait_for(port)
        for number, own in enumerate(free_ports(SITES)):
            start(
                f"node{number}", command("flower-supernode"), "--insecure", "--superlink", f"127.0.0.1:{port}",
                "--port", own, "--node-config", f'shards="{shards}"',
            )  # fmt: skip
        config = home / "run.toml"
        values = {"recipe": recipe.model_dump_json(), "rounds": rounds, "sites": SITES, "out": str(out)}
        config.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
        flwr(home, "run", str(HERE / "stock_flower_app"), "stock", "--run-config", str(config))
        marks: list[float] = []

        def done() -> bool:
            lines = out.read_text().splitlines() if out.exists() else []
            while len(marks) < len(lines):
                marks.append(cpu_seconds(hub.pid))
            return len(lines) > rounds

        until(done, 3600)
    rows = [json.loads(line) for line in out.read_text().splitlines()][1:]
    training = [row["site"] for row in rows]
    return differences([row["at"] for row in rows]), training[1:], (marks[-1] - marks[1]) / (len(rows) - 1)


def growing(recipe: Recipe, shards: Path, scratch: Path, chosen: argparse.Namespace) -> None:
    """The same images among more and more simulated sites: wall time of a round against the training in it."""
    print("| sites | round s | training, all sites together s | overhead s a site |\n|---|---|---|---|")
    for sites in chosen.sites:
        out = scratch / f"{sites}"
        simulate(
            Plan(
                recipe=recipe.model_dump_json(), shards=str(shards), partition=f"iid:{sites}", out=str(out),
                rounds=chosen.rounds, monitor_every=1000, resamples=1,
            )
        )  # fmt: skip
        rows = read_rounds(out)[1:]
        wall = statistics.median(row["seconds"] for row in rows)
        work = statistics.median(sum(site["seconds"] for site in row["sites"].values()) for row in rows)
        actors = min(sites, os.cpu_count() or 1)
        print(f"| {sites} | {wall:.1f} | {work:.1f} | {(wall - work / actors) / sites:.2f} |", flush=True)


def head(recipe: Recipe, shards: Path, scratch: Path, chosen: argparse.Namespace) -> None:
    """One exchange of class sums against rounds of FedAvg at several rates, both for the head on a frozen backbone."""
    common = {"shards": str(shards), "scope": "head", "resamples": 1}
    sums = Plan(
        **common,
        recipe=recipe.model_dump_json(),
        loss="adjusted",
        head="statistics",
        rounds=1,
        out=str(scratch / "sums"),
    )  # type: ignore[arg-type]
    simulate(sums)
    aim = read_rounds(scratch / "sums")[0]["balanced_accuracy"]  # of the model that the round began with
    width = empty_network(recipe.backbone).head.in_features
    print("balanced accuracy on the calibration splits\n")
    looks = sorted({2, 1 + chosen.rounds // 2, chosen.rounds})
    print(f"| way | {' | '.join(f'after {look - 1}' for look in looks)} | MB up a site |\n|{'---|' * (len(looks) + 2)}")
    once = 8 * (7 + 7 * width + width**2) / 1e6
    print(f"| class sums, one exchange | {aim:.3f} |{' |' * (len(looks) - 1)} {once:.1f} |")
    balance = recipe.balance.model_copy(update={"power": 1.0})  # as the sums: every class the same
    for rate in RATES:
        own = recipe.model_copy(
            update={"optim": recipe.optim.model_copy(update={"head_lr": rate}), "balance": balance}
        ).model_dump_json()
        simulate(Plan(**common, recipe=own, rounds=chosen.rounds, out=str(scratch / f"{rate}")))  # type: ignore[arg-type]
        rows = {row["round"]: row for row in read_rounds(scratch / f"{rate}")}
        sent = sum(statistics.mean(site["sent"] for site in row["sites"].values()) for row in rows.values())
        seen = " | ".join(f"{rows[look]['balanced_accuracy']:.3f}" for look in looks)
        print(f"| FedAvg, rate {rate:g} | {seen} | {sent / 1e6:.2f} |", flush=True)


def show_bytes() -> None:
    """Bytes of the arrays of a round, from their layouts."""
    backbone = BackboneConfig(name="mobilenet_v2", weights=None)
    whole = sum(tensor.nbytes for tensor in empty_network(backbone).state_dict().values())
    print(f"MobileNetV2's state dict: {whole / 1e6:.2f} MB each way\n")
    print("| scope | MB each way | in bfloat16 | in bfloat16, of the state dict |")
    print("|---|---|---|---|")
    recipe = Recipe(name="bytes", backbone=backbone)
    for scope in ("head", "last_block", "all"):
        order = Order(run="bytes", round=1, rounds=1, strategy="fedavg", recipe=recipe, scope=scope)
        layouts = Layouts.of(order)
        norm = 4 * layouts.norm.size
        full, half = 4 * layouts.weights.size + norm, 2 * layouts.weights.size + norm
        print(f"| {scope} | {full / 1e6:.2f} | {half / 1e6:.2f} | {half / whole:.1%} |")


def differences(ends: list[float]) -> list[float]:
    return [b - a for a, b in pairwise(ends)]


def cpu_seconds(pid: int) -> float:
    """Of a process and all below it, so far."""
    total = 0.0
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


@contextlib.contextmanager
def running(folder: Path, env: dict[str, str] | None = None) -> Iterator[Any]:
    """Starts processes, and ends them at the end."""
    started: list[psutil.Popen] = []

    def start(name: str, *words: object) -> psutil.Popen:
        with (folder / f"{name}.log").open("w") as log:
            started.append(psutil.Popen([str(word) for word in words], stdout=log, stderr=log, env=env))
        return started[-1]

    try:
        yield start
    finally:
        family = [child for process in started for child in process.children(recursive=True)]
        for process in started:
            process.terminate()
        _, alive = psutil.wait_procs([*started, *family], timeout=20)
        for process in alive:
            process.kill()


def wait_for(port: int) -> None:
    def listens() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    until(listens)


def until(holds: Any, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            sys.exit(f"not within {seconds} s")
        time.sleep(0.2)


if __name__ == "__main__":
    main()
