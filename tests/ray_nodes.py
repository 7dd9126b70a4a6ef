"""A Ray cluster of several nodes on one machine, in a process of its own: ``python tests/ray_nodes.py WORKERS``.

The head takes no work, as in compose.yaml; each worker has one CPU. It prints the address, then waits for lines:
``kill`` ends a worker that scores at this moment as a loss of power would, and prints its process id, or ``none``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


def scores(raylet: int) -> bool:
    """Whether a process of this node scores."""
    for process in psutil.Process(raylet).children(recursive=True):
        try:
            if "_Actor" in " ".join(process.cmdline()):
                return True
        except psutil.Error:
            continue
    return False


def main(workers: int) -> None:
    """The cluster, until stdin is closed."""
    from ray.cluster_utils import Cluster

    # Beside Ray's usual place, where every other ``ray.init()`` of this machine would find its address; short, since
    # a socket's path may have 107 characters.
    place = tempfile.mkdtemp(prefix="ray-", dir="/tmp")

    given = {"object_store_memory": 100_000_000, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "temp_dir": place, **given})
    nodes = [cluster.add_node(num_cpus=1, **given) for _ in range(workers)]
    cluster.wait_for_nodes(timeout=120)
    print(cluster.address, flush=True)
    try:
        for _line in sys.stdin:
            raylets = {id(node): node.all_processes["raylet"][0].process.pid for node in nodes}
            busy = [node for node in nodes if scores(raylets[id(node)])]
            if busy:
                nodes.remove(busy[0])
                cluster.remove_node(busy[0], allow_graceful=False)
            print(raylets[id(busy[0])] if busy else "none", flush=True)
    finally:
        cluster.shutdown()
        shutil.rmtree(place, ignore_errors=True)


class Nodes:
    """The cluster as seen from outside."""

    def __init__(self, process: subprocess.Popen[str], environment: dict[str, str], address: str) -> None:
        self._process, self.environment, self.address = process, environment, address

    def kill_one(self) -> bool:
        """End a node that scores; False if none does at this moment."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("kill\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip() != "none"


@contextmanager
def ray_nodes(workers: int, log: Path) -> Iterator[Nodes]:
    """A head and so many workers; what drives them needs `environment`, RAY_ADDRESS and the token among it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": os.urandom(24).hex(), "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0",  # or a busy machine lets them starve
        "RAY_health_check_failure_threshold": "5", "RAY_health_check_period_ms": "1000",
    }  # fmt: skip
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, __file__, str(workers)], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=errors, text=True, start_new_session=True,
        )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    started: list[psutil.Process] = []
    try:
        address = process.stdout.readline().strip()
        assert ":" in address, log.read_text()[-2000:]
        started = psutil.Process(process.pid).children(recursive=True)
        yield Nodes(process, environment | {"RAY_ADDRESS": address}, address)
    finally:
        process.stdin.close()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
        for left in started:
            if left.is_running():
                left.kill()


if __name__ == "__main__":
    main(int(sys.argv[1]))
