"""The flow `evaluate`."""

from __future__ import annotations

from pathlib import Path

from prefect import flow

from flows.caching import Output
from flows.running import library_run
from flows.steps import evaluated


@flow
def evaluate(model: str, shards: str, report: Path, seed: int = 0, resamples: int = 1000, hours: float = 12) -> Output:
    """Measure a model on the test split, with lesion-bootstrap intervals, and write the report.

    Args:
        model: Model bundle, local or s3://.
        shards: Shard folder that the model was trained from, local or s3://.
        report: Folder of the report.
        seed: Seed of the lesion bootstrap.
        resamples: Resamples of the lesion bootstrap.
        hours: Longest time it may take.
    """
    with library_run():
        return evaluated(model, shards, report, seed=seed, resamples=resamples, hours=hours)
