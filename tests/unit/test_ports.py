"""Ports for servers that have to be told one."""

from __future__ import annotations

import random
import socket
from pathlib import Path

import pytest

from dermaflow import ports
from dermaflow.ports import free_port, free_ports


def test_ports_differ_and_nobody_has_them() -> None:
    found = free_ports(50)
    assert len(set(found)) == 50
    for port in found:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))


def test_the_system_gives_none_of_them_away() -> None:
    given = Path("/proc/sys/net/ipv4/ip_local_port_range")
    if not given.exists():
        pytest.skip("no Linux")
    lowest, highest = map(int, given.read_text().split())
    if lowest < 30_000:
        pytest.skip(f"this machine gives ports from {lowest}")
    assert all(not lowest <= port <= highest for port in free_ports(50))


def test_two_processes_with_one_seed_draw_different_ports() -> None:
    random.seed(0)
    first = free_ports(5)
    random.seed(0)
    assert free_ports(5) != first


def test_a_port_that_is_taken_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        monkeypatch.setattr(ports, "RANGE", range(port, port + 1))
        with pytest.raises(OSError, match="0 of 1 ports"):
            free_port()
