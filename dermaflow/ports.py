"""Ports for servers that have to be told one."""

from __future__ import annotations

import contextlib
import random
import socket

RANGE = range(20_000, 32_768)
"""Above the ports of Ray's workers (from 10,002), below those that Linux gives to who asks for any (from 32,768)."""


def free_ports(count: int) -> list[int]:
    """Different TCP ports of loopback that nobody has.

    A port that the system itself chose could be given to another process before its server listens, or while the server
    is started again; one of these could not.

    Raises:
        OSError: There are not so many.
    """
    found: list[int] = []
    for port in random.SystemRandom().sample(RANGE, len(RANGE)):  # never what another process with this seed draws
        if len(found) == count:
            return found
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
    raise OSError(f"{len(found)} of {count} ports from {RANGE.start} to {RANGE.stop - 1} are free")


def free_port() -> int:
    """A TCP port of loopback that nobody has; see `free_ports`."""
    return free_ports(1)[0]
