"""The flow `prepare`."""

from __future__ import annotations

from pathlib import Path

from prefect import flow

from flows.caching import Output
from flows.running import library_run
from flows.steps import prepared


@flow
def prepare(data: Path, shards: str, seed: int = 0, hours: float = 12) -> Output:
    """Split an archive by lesion and write Parquet shards.

    Args:
        data: HAM10000 folder.
        shards: Shard folder to write, local or s3://.
        seed: Seed of the splits.
        hours: Longest time it may take.
    """
    with library_run():
        return prepared(data, shards, seed=seed, hours=hours)
