"""Scoring, lifecycle and serving for a while, with one fault after another: ``python tests/soak.py --minutes 30``.

On one machine, as processes of their own: PostgreSQL, a Prefect server on it and a worker, an object store, a Ray
cluster of a head and two workers for the flows, and the service with a Ray of its own. Meanwhile folders of images
arrive in the store and are scored by the deployment ``score/nightly``, labelled images arrive and ``lifecycle/retrain``
makes new champions of them, and a client asks the service for single images and for batches. Each part is killed or
paused once.

In the end every image that arrived has exactly one finding, every batch of the service has each of its images once, and
no answer to the client was wrong; what had to be asked for again is counted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import httpx
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from lifecycle_here import Ward, arrive
from postgres_here import a_postgres
from ray_nodes import Nodes, ray_nodes
from serve_parts import a_jpeg, a_zip
from waiting import until, until_it_answers

from dermaflow import storage
from dermaflow.bundles.registry import Registry
from dermaflow.ports import free_ports

IMAGES = 60  # of a folder that arrives, and of a batch
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


@dataclass
class Soak:
    """What runs, and what was seen of it."""

    root: Path
    environment: dict[str, str]
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    commands: dict[str, tuple[list[str], dict[str, str]]] = field(default_factory=dict)
    memory: list[tuple[float, dict[str, float]]] = field(default_factory=list)  # seconds, MB by name
    answers: Counter[str] = field(default_factory=Counter)
    runs: Counter[str] = field(default_factory=Counter)
    scored: list[str] = field(default_factory=list)
    batches: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def start(self, name: str, *command: object, **environment: str) -> None:
        words = [sys.executable, "-m", *map(str, command)]
        self.commands[name] = (words, self.environment | environment)
        self.restart(name)

    def restart(self, name: str) -> None:
        words, environment = self.commands[name]
        with (self.root / f"{name}.log").open("ab") as said:
            self.processes[name] = subprocess.Popen(
                words, env=environment, cwd=self.root, stdout=said, stderr=said, start_new_session=True
            )

    def kill(self, name: str) -> None:
        self.processes[name].kill()
        self.processes[name].wait()

    def stop(self) -> None:
        for process in self.processes.values():
            with contextlib.suppress(psutil.Error):
                family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
                for pid in family:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
        for process in self.processes.values():
            process.wait()

    def measure(self, seconds: float) -> None:
        """Memory that the long-lived parts hold; the service by the parts that it consists of."""
        held: Counter[str] = Counter()
        for name, process in self.processes.items():
            with contextlib.suppress(psutil.Error):
                own = psutil.Process(process.pid)
                held[name] = own.memory_full_info().pss / 1e6
                for child in own.children(recursive=True) if name == "service" else ():
                    with contextlib.suppress(psutil.Error):
                        title = (child.cmdline() or [child.name()])[0].split("/")[-1]  # one that just ended has none
                        held[f"service, {title}"] += child.memory_full_info().pss / 1e6
        held["service, all"] = sum(size for name, size in held.items() if name.startswith("service"))
        self.memory.append((seconds, dict(held)))


class Api:
    """Prefect's API, asked again while the server or its database is away."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=30)

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        def answer() -> httpx.Response | None:
            with contextlib.suppress(httpx.HTTPError):
                found = self._client.request(method, path, json=body)
                return None if found.status_code >= 500 else found
            return None

        return until(answer, 300, f"{method} {path}", every=1).raise_for_status().json()

    def run(self, deployment: str, parameters: dict[str, Any]) -> str:
        """Ask for a run and wait for its end; its state."""
        id = self.ask("GET", f"/deployments/name/{deployment}")["id"]
        run = self.ask("POST", f"/deployments/{id}/create_flow_run", {"parameters": parameters})["id"]
        end = time.monotonic() + 1200  # more than the automation takes to give up a run that never began
        while (state := self.ask("GET", f"/flow_runs/{run}")["state"]["type"]) not in ENDED:
            if time.monotonic() > end:
                return f"STUCK IN {state}"
            time.sleep(1)
        return str(state)


# --- the work --------------------------------------------------------------------------------------------------------


def keep_scoring(soak: Soak, api: Api) -> None:
    """One folder after another; a run that did not complete is asked for again, and goes on."""
    client = boto3.client("s3")
    while not soak.over.is_set():
        name = f"day{len(soak.scored):03}"
        for i in range(IMAGES):
            client.put_object(Bucket="hospital", Key=f"landing/{name}/{name}i{i:02}.jpg", Body=a_jpeg(i % 12))
        where = {"source": f"s3://hospital/landing/{name}", "output": f"s3://hospital/scored/{name}"}
        for _ in range(3):
            state = api.run("score/nightly", where)
            soak.runs[f"score {state}"] += 1
            if state == "COMPLETED":
                break
        else:
            soak.problems.append(f"{name} was never scored")
        soak.scored.append(name)


def keep_learning(soak: Soak, api: Api, ward: Ward) -> None:
    """New labelled images, and a challenger that is promoted whatever it can: the service is to change its model."""
    margins = {"balanced_accuracy_margin": 1.0, "melanoma_sensitivity_margin": 1.0, "safe_accuracy_margin": 1.0}
    chosen = {name: str(value) for name, value in ward.arguments(out=ward.root / "lifecycle").items()}
    turn = 0
    while not soak.over.is_set():
        arrive(ward, 16, seed=100 + turn, name=f"turn{turn}x")
        for _ in range(3):
            state = api.run("lifecycle/retrain", chosen | {"resamples": 50, "new_lesions": 4, **margins})
            soak.runs[f"lifecycle {state}"] += 1
            if state == "COMPLETED":
                break
        else:
            soak.problems.append(f"turn {turn} of the lifecycle never ended")
        turn += 1
        soak.over.wait(60)


def keep_asking(soak: Soak, url: str) -> None:
    """A few single images a second, and a batch whenever the one before has ended."""
    waiting: str | None = None
    with httpx.Client(base_url=url, timeout=60) as client:
        while not soak.over.is_set():
            try:
                answer = client.post("/v1/classify", files={"images": ("L1.jpg", a_jpeg(1))})
                right = answer.status_code != 200 or answer.json()["findings"][0]["image_id"] == "L1"
                soak.answers[str(answer.status_code) if right else "wrong"] += 1
                if waiting is None:
                    sent = client.post("/v1/batches", files={"archive": ("clinic.zip", a_zip(IMAGES))})
                    if sent.status_code == 202:
                        waiting = sent.json()["id"]
                        soak.batches.append(str(waiting))
                elif client.get(f"/v1/batches/{waiting}").json().get("state") not in ("queued", "running"):
                    waiting = None
            except httpx.HTTPError as error:
                soak.answers[type(error).__name__] += 1
            time.sleep(0.5)


# --- the faults ------------------------------------------------------------------------------------------------------


def faults(soak: Soak, nodes: Nodes, postgres: Path, prefect: str) -> dict[str, Callable[[], None]]:
    """What goes wrong, by name, in this order."""

    def worker() -> None:
        soak.kill("worker")
        time.sleep(3)
        soak.restart("worker")

    def replica() -> None:
        family = psutil.Process(soak.processes["service"].pid).children(recursive=True)
        found = [process for process in family if "ServeReplica" in process.name() + " ".join(process.cmdline())]
        [classifier, *_] = [process for process in found if "Classifier" in " ".join(process.cmdline())] or found
        classifier.kill()

    def server() -> None:
        soak.kill("prefect")
        time.sleep(5)
        soak.restart("prefect")
        until_it_answers(f"{prefect}/health")

    def database() -> None:
        first = int((postgres / "data/postmaster.pid").read_text().split()[0])
        family = [psutil.Process(first), *psutil.Process(first).children(recursive=True)]
        with contextlib.suppress(psutil.Error):
            for process in family:
                process.suspend()
        time.sleep(15)
        for process in family:
            with contextlib.suppress(psutil.Error):
                process.resume()

    def store() -> None:
        process = psutil.Process(soak.processes["store"].pid)
        process.suspend()
        time.sleep(15)
        process.resume()

    def node() -> None:
        until(nodes.kill_one, 300, "a node scores and is ended", every=0.05)

    return {
        "Prefect's worker is killed": worker, "a replica of the service is killed": replica,
        "Prefect's server is killed, and is back after 5 s": server, "PostgreSQL stands still for 15 s": database,
        "the object store stands still for 15 s": store, "a node of Ray dies while it scores": node,
    }  # fmt: skip


# --- the end ---------------------------------------------------------------------------------------------------------


def check(soak: Soak, url: str) -> None:
    """Everything that arrived is there once."""
    for name in soak.scored:
        data = storage.read_bytes(f"s3://hospital/scored/{name}/findings.parquet")
        ids = pq.read_table(pa.BufferReader(data))["image_id"].to_pylist()
        if sorted(ids) != [f"{name}i{i:02}" for i in range(IMAGES)]:
            soak.problems.append(f"{name}: {len(ids)} findings of {len(set(ids))} images")
    with httpx.Client(base_url=url, timeout=60) as client:
        for batch in soak.batches:
            until(lambda batch=batch: client.get(f"/v1/batches/{batch}").json()["state"] == "finished", 300, batch)
            found = client.get(f"/v1/batches/{batch}/results", params={"format": "parquet"})
            ids = pq.read_table(pa.BufferReader(found.content))["image_id"].to_pylist()
            if sorted(ids) != sorted(f"L{i}" for i in range(IMAGES)):
                soak.problems.append(f"batch {batch}: {len(ids)} findings of {len(set(ids))} images")
    if soak.answers["wrong"]:
        soak.problems.append(f"{soak.answers['wrong']} wrong answers")


def report(soak: Soak, minutes: float, champions: int) -> str:
    """What happened, in Markdown."""
    lines = [f"{minutes:.0f} minutes. Faults:", ""]
    lines += [f"- {fault}" for fault in soak.faults]
    lines += [
        "",
        f"{len(soak.scored)} folders and {len(soak.batches)} batches of {IMAGES} images, {champions} champions.",
    ]
    lines += [f"Runs: {dict(sorted(soak.runs.items()))}. Answers to single images: {dict(soak.answers)}.", ""]
    lines += ["| memory, MB (PSS) | second quarter | last quarter |", "|---|---|---|"]
    quarter = soak.memory[-1][0] / 4 if soak.memory else 0
    names = {name: max(held.get(name, 0) for _, held in soak.memory) for name in soak.memory[-1][1]}
    for name in sorted(name for name, most in names.items() if most > 100):
        parts = [
            [held[name] for at, held in soak.memory if low * quarter <= at < high * quarter + 1 and name in held]
            for low, high in ((1, 2), (3, 4))
        ]
        figures = " | ".join(f"{statistics.median(part):.0f}" if part else "-" for part in parts)
        lines.append(f"| {name} | {figures} |")
    return "\n".join([*lines, "", *(soak.problems or ["Nothing was lost and nothing doubled."])])


@contextlib.contextmanager
def running(root: Path) -> Iterator[tuple[Soak, Nodes, Path, Ward, str, str]]:
    """Everything, until the block ends."""
    store, prefect, service = free_ports(3)
    bare = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "RAY_", "AWS_"))}
    api = f"http://127.0.0.1:{prefect}/api"
    ward = Ward.build(root / "ward")
    environment = bare | {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{store}", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true", "PREFECT_HOME": str(root / "prefect"),
        "PREFECT_API_URL": api, "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1",
        "DERMAFLOW_REGISTRY": str(ward.registry), "OMP_NUM_THREADS": "1", "PREFECT_CLIENT_MAX_RETRIES": "8",
    }  # fmt: skip
    os.environ.update({name: value for name, value in environment.items() if name.startswith("AWS_")})
    soak = Soak(root, environment)
    with a_postgres() as postgres, ray_nodes(2, root / "nodes.log") as nodes:
        try:
            database = f"postgresql+asyncpg://dermaflow@/postgres?host={postgres}"
            soak.start("store", "moto.server", "-H", "127.0.0.1", "-p", store)
            soak.start("prefect", "prefect", "server", "start", "--host", "127.0.0.1", "--port", prefect,
                       PREFECT_SERVER_DATABASE_CONNECTION_URL=database)  # fmt: skip
            soak.start("service", "dermaflow.cli.main", "serve", "--port", service, "--state", root / "state")
            until_it_answers(environment["AWS_ENDPOINT_URL"])
            boto3.client("s3").create_bucket(Bucket="hospital")
            until_it_answers(f"{api}/health", 300)
            subprocess.run(
                [sys.executable, "-m", "flows", "deploy", "--home", ward.root], env=environment, check=True,
                stdout=subprocess.DEVNULL,
            )  # fmt: skip
            soak.start("worker", "prefect", "worker", "start", "--pool", "dermaflow", **{
                name: value for name, value in nodes.environment.items() if name.startswith("RAY_")
            })  # fmt: skip
            until_it_answers(f"http://127.0.0.1:{service}/readyz", 300)
            yield soak, nodes, postgres, ward, api, f"http://127.0.0.1:{service}"
        finally:
            soak.stop()


def run(root: Path, minutes: float, chosen: list[str] | None = None) -> tuple[Soak, str]:
    """Work for so long, with the faults (all of them by default) spread over the first three quarters."""
    with running(root) as (soak, nodes, postgres, ward, api, url):
        began = time.monotonic()
        all_faults = faults(soak, nodes, postgres, api)
        work = [
            threading.Thread(target=keep_scoring, args=(soak, Api(api)), name="scoring"),
            threading.Thread(target=keep_learning, args=(soak, Api(api), ward), name="lifecycle"),
            threading.Thread(target=keep_asking, args=(soak, url), name="asking"),
        ]
        for thread in work:
            thread.start()

        def watch(until_seconds: float) -> None:
            while (now := time.monotonic() - began) < until_seconds:
                soak.measure(now)
                time.sleep(min(10, max(0.1, until_seconds - now)))

        names = list(all_faults) if chosen is None else chosen
        try:
            for number, name in enumerate(names, start=1):
                watch(minutes * 60 * 0.75 * number / len(names))
                soak.faults.append(f"{(time.monotonic() - began) / 60:.1f} min: {name}")
                print(soak.faults[-1], flush=True)
                all_faults[name]()
            watch(minutes * 60)
        except AssertionError as error:
            soak.problems.append(f"a fault could not be made: {error}")
        finally:
            soak.over.set()
            for thread in work:
                thread.join()
        (root / "memory.json").write_text(json.dumps(soak.memory))
        check(soak, url)
        return soak, report(soak, (time.monotonic() - began) / 60, len(Registry(ward.registry).history()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--no-faults", action="store_true", help="Only the work, to look at the memory.")
    parser.add_argument("--keep", type=Path, help="Folder for everything, logs among it, that stays.")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found, text = run(given.keep or Path(scratch), given.minutes, [] if given.no_faults else None)
    print(text)
    sys.exit(1 if found.problems else 0)
