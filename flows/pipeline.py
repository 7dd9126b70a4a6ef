"""The flow `pipeline`: the main job, from an archive to an evaluated and registered model."""

from __future__ import annotations

from pathlib import Path

from prefect import flow

from dermaflow.learning.recipe import load_recipe
from flows.caching import Output
from flows.running import library_run
from flows.steps import evaluated, prepared, registered, trained


@flow
def pipeline(
    data: Path,
    out: Path,
    recipe: str = "ham10000-cpu",
    weights: Path | None = None,
    teacher: str | None = None,
    workers: int | None = None,
    seed: int = 0,
    registry: str | None = None,
    shards: str | None = None,
    model: Path | None = None,
    report: Path | None = None,
    resamples: int = 1000,
    hours: float = 72,
) -> dict[str, Output]:
    """Prepare, train, evaluate and, with a registry, register. What is done already is not done again.

    Args:
        data: HAM10000 folder.
        out: Folder for shards, model and report.
        recipe: Name of a shipped recipe, or a .yaml file.
        weights: First weights of the backbone, in place of the recipe's.
        teacher: Model to learn from, local or s3://, for a recipe with `distillation`.
        workers: Ray Train workers; without it, the flow's own process trains.
        seed: Seed of the splits and of the bootstrap; that of training stands in the recipe.
        registry: Model registry, a folder or s3://. The model is added, and promoted if it is better than the champion.
        shards: Shard folder, local or s3://, if not in the folder out.
        model: Model folder, if not in the folder out.
        report: Report folder, if not in the folder out.
        resamples: Resamples of the lesion bootstrap.
        hours: Longest time that each step may take.
    """
    with library_run():
        chosen = load_recipe(recipe)  # first: a misspelt recipe shall not cost a preparation
        ready = prepared(data, shards or str(out / "shards"), seed=seed, hours=hours)
        fitted = trained(
            ready.path, chosen, model or out / "model", weights=weights, teacher=teacher, workers=workers, hours=hours
        )
        measured = evaluated(
            fitted.path, ready.path, report or out / "report", seed=seed, resamples=resamples, hours=hours
        )
        if registry:
            registered(fitted.path, registry)
    return {"shards": ready, "model": fitted, "report": measured}
