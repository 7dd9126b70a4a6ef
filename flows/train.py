"""The flow `train`."""

from __future__ import annotations

from pathlib import Path

from prefect import flow

from dermaflow.learning.recipe import load_recipe
from flows.caching import Output
from flows.running import library_run
from flows.steps import trained


@flow
def train(
    shards: str,
    model: Path,
    recipe: str = "ham10000-cpu",
    weights: Path | None = None,
    teacher: str | None = None,
    workers: int | None = None,
    hours: float = 72,
) -> Output:
    """Train a network and calibrate it. A run that was cut off goes on after its last finished epoch.

    Args:
        shards: Prepared shard folder, local or s3://.
        model: Folder of the model bundle to write.
        recipe: Name of a shipped recipe, or a .yaml file.
        weights: First weights of the backbone, in place of the recipe's.
        teacher: Model to learn from, local or s3://, for a recipe with `distillation`.
        workers: Ray Train workers; without it, the flow's own process trains.
        hours: Longest time it may take.
    """
    with library_run():
        return trained(
            shards, load_recipe(recipe), model, weights=weights, teacher=teacher, workers=workers, hours=hours
        )
