"""Trials side by side as Ray tasks."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from pathlib import Path
from typing import TypeVar

import ray

from dermaflow.errors import DermaflowError
from dermaflow.experiments.sweep import run_trial
from dermaflow.learning.recipe import Recipe
from dermaflow.preparation.cluster import connect, own_error

Name = TypeVar("Name", bound=Hashable)


def run_trials(
    recipes: dict[Name, Recipe], shards: str, out: Path, at_once: int, on_trial: Callable[[int], None]
) -> dict[Name, Path]:
    """`run_trial` for each recipe, so many at a time; arguments as in `run_sweep`.

    On a cluster of several machines `shards` and `out` must be reachable from all of them. A trial whose machine is
    lost starts again on another one, after its last epoch.

    Raises:
        DermaflowError: What a trial raised; the others are stopped, and the same call goes on.
    """
    connect()
    found = ray.cluster_resources()
    cpus = max(1, int(found["CPU"] / at_once))
    task = ray.remote(run_trial).options(
        num_cpus=cpus,
        num_gpus=1 if found.get("GPU", 0) >= at_once else 0,
        max_retries=3,
        runtime_env={"env_vars": {"DERMAFLOW_THREADS": str(cpus), "OMP_NUM_THREADS": str(cpus)}},
    )
    place = out.absolute()  # Ray's processes run in folders of their own
    where = shards if "://" in shards else str(Path(shards).absolute())
    tasks = {task.remote(recipe, where, place): name for name, recipe in recipes.items()}
    waiting, done = list(tasks), {}
    while waiting:
        [ready], waiting = ray.wait(waiting)
        try:
            done[tasks[ready]] = ray.get(ready)
        except ray.exceptions.RayError as error:
            for other in waiting:
                ray.cancel(other)
            cause = own_error(error)
            raise (cause if isinstance(cause, DermaflowError) else error) from None
        on_trial(len(done))
    return {name: done[name] for name in recipes}
