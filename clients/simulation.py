"""Run a plan: all sites on this machine, or on the Ray cluster of ``RAY_ADDRESS``; or those that joined a hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clients.coordinator import RESULT, read_rounds
from clients.engine import follow, simulation_engine, submit
from clients.plan import Plan
from clients.site_data import simulated_sites

Progress = Callable[[str, int, int], None]
"""Called with a label, rounds done and rounds in all."""


def simulate(plan: Plan, *, gpus: float = 0.0, progress: Progress = lambda label, done, total: None) -> dict[str, Any]:
    """Run a plan with every site on this machine.

    A run that was cut off goes on after its last finished round when the same call is made again.

    Args:
        plan: The run; `shards` and `partition` say what the sites are.
        gpus: Share of a GPU for each site at work.
        progress: Called as the rounds go on.

    Returns:
        What `result.json` in the plan's folder holds.

    Raises:
        FederationError: The run failed.
    """
    out = Path(plan.out).absolute()
    plan = plan.model_copy(
        update={"out": str(out), "shards": _absolute(plan.shards), "name": plan.name or "simulation"}
    )
    sites = len(simulated_sites(plan.shards, plan.partition))

    def look() -> None:
        progress(plan.strategy, len(read_rounds(out)), plan.rounds)

    with simulation_engine(out / "flower", sites, gpus) as (connection, options):
        run = submit(out / "flower", connection, plan, *options)
        follow(out / "flower", connection, run, look)
    result: dict[str, Any] = json.loads((out / RESULT).read_text())
    return result


def submit_to_hub(plan: Plan, state: Path, progress: Progress = lambda label, done, total: None) -> dict[str, Any]:
    """Run a plan with the sites that have joined the hub of this machine.

    Args:
        plan: The run; `sites` names them.
        state: Folder of the hub.
        progress: Called as the rounds go on.

    Returns:
        What `result.json` in the plan's folder holds.

    Raises:
        FederationError: The hub does not answer, or the run failed.
    """
    out = Path(plan.out).absolute()
    name = plan.name or hashlib.sha256(str(out).encode()).hexdigest()[:12]
    plan = plan.model_copy(update={"out": str(out), "name": name})
    home = state.absolute() / "flower"
    run = submit(home, "hub", plan)
    follow(home, "hub", run, lambda: progress(plan.strategy, len(read_rounds(out)), plan.rounds))
    result: dict[str, Any] = json.loads((out / RESULT).read_text())
    return result


def _absolute(shards: str) -> str:
    return shards if "://" in shards else str(Path(shards).absolute())
