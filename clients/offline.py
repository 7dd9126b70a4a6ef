"""Flower without calls to the outside, for every process of it: the environment it must be started with.

Flower reads the first switch when it is imported, so this comes before any import of it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

SWITCHES = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",  # or each run calls a package index
}


def environment(home: Path) -> dict[str, str]:
    """Environment of a Flower process.

    Args:
        home: Where it keeps its connections and unpacked apps.
    """
    # its own processes on loopback are not reached through a hospital's proxy
    proxied = {name: _without_loopback(os.environ.get(name, "")) for name in ("NO_PROXY", "no_proxy")}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {**os.environ, **SWITCHES, **proxied, "FLWR_HOME": str(home), "PATH": path}


def _without_loopback(hosts: str) -> str:
    known = [host for host in hosts.split(",") if host]
    return ",".join([*known, *(host for host in ("127.0.0.1", "localhost", "::1") if host not in known)])


def go_offline(home: Path) -> None:
    """Set the switches in this process; before Flower is imported."""
    os.environ.update(environment(home))
