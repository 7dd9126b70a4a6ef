"""Run a plan: all sites on this machine, or on the Ray cluster of ``RAY_ADDRESS``; or those that joined a hub."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clients.coordinator import RESULT, read_rounds
from clients.engine import follow, simulation_engine, submit
from clients.hub import CONNECTION, HOME
from clients.plan import Plan
from clients.site_data import simulated_sites
from dermaflow import storage
from dermaflow.errors import CheckpointError

PLAN = "plan.json"
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
        CheckpointError: The folder belongs to another plan.
    """
    out = Path(plan.out).absolute()
    plan = plan.model_copy(
        update={"out": str(out), "shards": _absolute(plan.shards), "name": plan.name or "simulation"}
    )
    claim(plan)
    if not (out / RESULT).exists():
        sites = len(simulated_sites(plan.shards, plan.partition))
        with simulation_engine(out / "flower", sites, gpus) as (connection, options):
            run = submit(out / "flower", connection, plan, *options)
            _follow(out / "flower", connection, run, plan, progress)
    return _result(out)


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
        CheckpointError: The folder belongs to another plan.
    """
    out = Path(plan.out).absolute()
    name = plan.name or _own_name(out)
    plan = plan.model_copy(update={"out": str(out), "name": name})
    claim(plan)
    if not (out / RESULT).exists():
        home = state.absolute() / HOME
        run = submit(home, CONNECTION, plan)
        _follow(home, CONNECTION, run, plan, progress)
    return _result(out)


def claim(plan: Plan) -> None:
    """Mark the folder of a run as that of its plan.

    Raises:
        CheckpointError: It belongs to another plan.
    """
    path, text = Path(plan.out) / PLAN, plan.model_dump_json(indent=1)
    if not path.exists():
        storage.write_bytes(path, text.encode())
    elif path.read_text() != text:
        old = json.loads(path.read_text())
        other = [name for name, value in json.loads(text).items() if old.get(name) != value]
        raise CheckpointError(
            f"this folder belongs to a run with another {', '.join(other)}", where=plan.out,
            todo="choose another --out, or remove the folder to start anew",
        )  # fmt: skip


def _own_name(out: Path) -> str:
    """Of the run in a folder: new where none began there, so that no site remembers another run under it."""
    if (out / PLAN).exists():
        return str(json.loads((out / PLAN).read_text())["name"])
    return secrets.token_hex(6)


def _follow(home: Path, connection: str, run: int, plan: Plan, progress: Progress) -> None:
    out = Path(plan.out)
    follow(
        home, connection, run, look=lambda: progress(plan.strategy, len(read_rounds(out)), plan.rounds),
        ended=lambda: (out / RESULT).exists(),
    )  # fmt: skip


def _result(out: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((out / RESULT).read_text())
    return result


def _absolute(shards: str) -> str:
    return shards if "://" in shards else str(Path(shards).absolute())
