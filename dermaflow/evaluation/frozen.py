"""A test that stays the same while the shards grow, so that figures of different years can be compared."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from dermaflow import storage
from dermaflow.bundles.bundle import LoadedBundle
from dermaflow.errors import DataError
from dermaflow.preparation.reading import ShardFolder

_COLUMNS = ["image_id", "lesion_id", "dx", "sha256"]


def freeze(shards: ShardFolder, path: Path) -> pd.DataFrame:
    """The frozen test of a file; written from the test split of the shards where there is none yet.

    Returns:
        ``image_id``, ``lesion_id``, ``dx``, ``sha256`` of every image.

    Raises:
        DataError: The test split is empty.
    """
    if not path.exists():
        table = shards.metadata("test")[_COLUMNS]
        if table.empty:
            raise DataError("no test image", where=shards.uri, todo="prepare a larger data set")
        with storage.open_atomic(path) as stream:
            pq.write_table(pa.Table.from_pandas(table, preserve_index=False), stream)
    return pq.read_table(path).to_pandas()


def only_frozen(predictions: pd.DataFrame, frozen: pd.DataFrame) -> pd.DataFrame:
    """The rows of the frozen test.

    Args:
        predictions: One row a test image, with ``image_id``, ``sha256`` and ``dx``.
        frozen: From `freeze`.

    Raises:
        DataError: An image of the frozen test is gone, or was changed.
    """
    rows = predictions.merge(frozen[["image_id", "sha256", "dx"]], on=["image_id", "sha256", "dx"])
    if len(rows) != len(frozen):
        gone = sorted(set(frozen["image_id"]) - set(rows["image_id"]))
        raise DataError(
            f"{len(gone)} of {len(frozen)} images of the frozen test are gone or changed, first {gone[0]}",
            where="test split", expected="every image as it was when the test was frozen",
            todo="restore them; a test that changes tells nothing over time",
        )  # fmt: skip
    return rows


def check_unseen(model: LoadedBundle, frozen: pd.DataFrame, data_hashes: set[str]) -> None:
    """Make sure that a model never learnt from a lesion of the frozen test.

    Args:
        model: The model.
        frozen: From `freeze`.
        data_hashes: Hashes of shard folders whose test split holds the frozen test.

    Raises:
        DataError: It did, or nobody can tell.
    """
    if model.bundle.training.data_hash in data_hashes:
        return
    ids = set(model.reference.lesion_ids) if model.reference is not None else set()
    seen = ids & set(frozen["lesion_id"])
    if seen or not ids:
        raise DataError(
            f"{len(seen)} lesions of the frozen test were trained on" if seen else "nobody can tell what it saw",
            where=model.bundle.name, expected="a model of these shards, or one whose reference names its images",
            todo="promote a model that was trained from these shards",
        )  # fmt: skip
