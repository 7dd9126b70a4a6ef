"""Measure contestants side by side: rounds in turn, medians, ratios. Shared by the benchmarks of this folder."""

from __future__ import annotations

import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path


def machine() -> str:
    """Processor, cores and load, for the head of a result."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor()
    return f"{name}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}"


def seconds(job: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def in_process(stack: ExitStack, job: Callable[..., None]) -> Callable[..., float]:
    """A process of its own for a contestant, which stays up between the rounds as a cluster does.

    Contestants that fork (a DataLoader does) must not share a process with Ray's driver: its tasks would wait for ever.

    Args:
        stack: Ends the process when it closes.
        job: Picklable; what it starts stays up.

    Returns:
        Gives the seconds of ``job(*order)``, measured in that process.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_wait_for_orders, args=(there, job))
    process.start()
    stack.callback(process.join)
    stack.callback(here.send, None)

    def run(*order: object) -> float:
        here.send(order)
        return here.recv()

    return run


def _wait_for_orders(orders: Connection, job: Callable[..., None]) -> None:
    while (order := orders.recv()) is not None:
        orders.send(seconds(lambda: job(*order)))


def compare(contestants: dict[str, Callable[[], float]], rounds: int, unit: str, images: int) -> dict[str, float]:
    """Run every contestant once a round, in turn, and print medians and ratios to the first.

    Args:
        contestants: Name to a function that does the job once and gives its seconds.
        rounds: Number of rounds.
        unit: What a result is, for the head of the table.
        images: Images a call, for the rate.

    Returns:
        Median seconds by name.
    """
    results: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds):
        for name, job in contestants.items():
            results[name].append(job())
        print(
            f"round {number + 1}: " + ", ".join(f"{name} {values[-1]:.2f}" for name, values in results.items()),
            flush=True,
        )
    first = statistics.median(next(iter(results.values())))
    print(f"\n| {unit} | median s | min - max s | images/s | ratio of medians to the first |\n|---|---|---|---|---|")
    medians = {name: statistics.median(values) for name, values in results.items()}
    for name, values in results.items():
        middle = medians[name]
        spread = f"{min(values):.2f} - {max(values):.2f}"
        print(f"| {name} | {middle:.2f} | {spread} | {images / middle:.0f} | {middle / first:.2f} |")
    return medians
