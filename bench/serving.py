"""Throughput and latency of `dermaflow serve` against the same predictor behind bare FastAPI, and behind LitServe.

    python bench/serving.py [--rounds 5] [--seconds 8] [--clients 1 8 32 64] [--networks mobilenet_v2 resnet18]

Each server runs in turn, alone, with the same model at 224x224 and the same micro-batching; clients post one 600x450
JPEG after the other to /v1/classify. Medians over the rounds; the first two seconds of each run do not count.
LitServe takes part where it is installed (pip install litserve).
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import httpx
import psutil
from preparation import make_images
from rounds import machine
from scoring import SIZE, make_model

WARM = 2.0  # seconds that do not count
HERE = Path(__file__).parent


def commands(model: Path, port: int, state: Path) -> dict[str, list[str]]:
    ways = {
        "dermaflow serve": f"-m serve --model {model} --port {port} --state {state} --rate 1000000/minute".split(),
        "FastAPI + uvicorn": [str(HERE / "bare_app.py"), str(model), str(port)],
        "LitServe": [str(HERE / "litserve_app.py"), str(model), str(port)],
    }
    if not importlib.util.find_spec("litserve"):
        del ways["LitServe"]
    return {name: [sys.executable, *arguments] for name, arguments in ways.items()}


@contextmanager
def running(command: list[str], port: int, log: Path) -> Iterator[psutil.Process]:
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, start_new_session=True)
        try:
            for _ in range(600):
                try:
                    if httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=2).status_code == 200:
                        break
                except httpx.HTTPError:
                    pass
                assert process.poll() is None, log.read_text()[-2000:]
                time.sleep(0.5)
            else:
                raise TimeoutError(log.read_text()[-2000:])
            yield psutil.Process(process.pid)
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def cpu_seconds(server: psutil.Process) -> Counter[str]:
    """CPU seconds so far of a server's processes, by what they are."""
    spent: Counter[str] = Counter()
    for process in [server, *server.children(recursive=True)]:
        try:
            name = " ".join(process.cmdline())
            times = process.cpu_times()
        except psutil.Error:
            continue
        kinds = ("Classifier", "Ingress", "ProxyActor")
        kind = next((kind for kind in kinds if name.startswith("ray::") and kind in name), "others")
        spent[kind] += times.user + times.system
    return spent


async def load(port: int, images: list[bytes], clients: int, seconds: float) -> tuple[float, list[float], Counter[int]]:
    """Requests a second, seconds of each, and their statuses; of those that began after the warm-up."""
    taken: list[float] = []
    statuses: Counter[int] = Counter()
    start = time.perf_counter()
    limits = aiohttp.TCPConnector(limit=clients)
    async with aiohttp.ClientSession(connector=limits, timeout=aiohttp.ClientTimeout(total=120)) as session:

        async def client(number: int) -> None:
            turn = number
            while (began := time.perf_counter()) < start + WARM + seconds:
                form = aiohttp.FormData()
                form.add_field("images", images[turn % len(images)], filename="a.jpg", content_type="image/jpeg")
                async with session.post(f"http://127.0.0.1:{port}/v1/classify", data=form) as answer:
                    await answer.read()
                    if began > start + WARM:
                        statuses[answer.status] += 1
                        if answer.status == 200:
                            taken.append(time.perf_counter() - began)
                turn += clients

        await asyncio.gather(*(client(number) for number in range(clients)))
    return len(taken) / (time.perf_counter() - start - WARM), sorted(taken), statuses


def main(rounds: int, seconds: float, clients: list[int], networks: list[str]) -> None:
    print(f"{machine()}\none 600x450 JPEG a request, network at {SIZE}x{SIZE}, {seconds:.0f} s a run", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = [Path(path).read_bytes() for path in make_images(folder, 64)]
        for network in networks:
            model = make_model(folder, network)
            found: dict[tuple[str, int], list[tuple[float, float, float, float]]] = {}
            costs: dict[tuple[str, int], list[dict[str, float]]] = {}
            statuses: Counter[int] = Counter()
            for number in range(rounds):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", 0))
                    port = probe.getsockname()[1]
                for way, command in commands(model, port, folder / f"state-{network}-{number}").items():
                    with running(command, port, folder / "server.log") as server:
                        for count in clients:
                            before = cpu_seconds(server)
                            rate, taken, seen = asyncio.run(load(port, images, count, seconds))
                            statuses += seen
                            requests = rate * (seconds + WARM)
                            spent = {k: 1e3 * (v - before[k]) / requests for k, v in cpu_seconds(server).items()}
                            costs.setdefault((way, count), []).append(spent)
                            p50, p95, p99 = (taken[min(int(len(taken) * q), len(taken) - 1)] for q in (0.5, 0.95, 0.99))
                            found.setdefault((way, count), []).append((rate, p50, p95, p99))
                print(f"{network}: round {number + 1} of {rounds}", flush=True)
            print(f"\n{network}; statuses {dict(statuses)}\n")
            print("| server | clients | requests/s | p50 ms | p95 ms | p99 ms | throughput, ratio to FastAPI |")
            print("|---|---|---|---|---|---|---|")
            for (way, count), values in found.items():
                rate, p50, p95, p99 = (statistics.median(column) for column in zip(*values, strict=True))
                ratio = rate / statistics.median(value[0] for value in found["FastAPI + uvicorn", count])
                times = " | ".join(f"{value * 1e3:.0f}" for value in (p50, p95, p99))
                print(f"| {way} | {count} | {rate:.1f} | {times} | {ratio:.2f} |")
            print("\nCPU ms a request, warm-up included:")
            for (way, count), spent in costs.items():
                middle = {kind: statistics.median(one.get(kind, 0.0) for one in spent) for kind in spent[0]}
                print(f"{way}, {count} clients: " + ", ".join(f"{k} {v:.1f}" for k, v in sorted(middle.items())))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--networks", nargs="+", default=["mobilenet_v2", "resnet18"])
    chosen = parser.parse_args()
    main(chosen.rounds, chosen.seconds, chosen.clients, chosen.networks)
