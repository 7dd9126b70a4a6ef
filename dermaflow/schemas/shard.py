"""Parquet shards: the columns of a row and the manifest that makes a folder of them whole."""

from __future__ import annotations

from typing import Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict

Split = Literal["train", "calibration", "test"]
SPLITS: tuple[Split, ...] = ("train", "calibration", "test")

SHARD_SCHEMA = pa.schema(
    [
        ("image", pa.binary()),  # encoded bytes, as received
        ("image_id", pa.string()),
        ("lesion_id", pa.string()),
        ("dx", pa.string()),
        ("dx_type", pa.string()),
        ("age", pa.float32()),  # years, null if unknown
        ("sex", pa.string()),
        ("localization", pa.string()),
        ("site", pa.string()),
        ("split", pa.string()),
        ("width", pa.int32()),  # pixels
        ("height", pa.int32()),
        ("sha256", pa.string()),  # of `image`
    ]
)
MANIFEST_NAME = "manifest.json"
LESIONS_NAME = "lesions.parquet"
"""Columns ``lesion_id``, ``dx``, ``site``, ``images``, ``split``, ``fold`` (-1 on test)."""
QUARANTINE_NAME = "quarantine.csv"


class ShardFile(BaseModel):
    """One Parquet file of the folder."""

    model_config = ConfigDict(extra="forbid")

    path: str  # relative to the folder; the name carries the content key
    split: Split
    rows: int
    bytes: int
    content_key: str  # SHA-256 over the rows' metadata and image hashes; the same rows give the same key anywhere


class Manifest(BaseModel):
    """What a shard folder holds. It is written last: a folder without it is unfinished."""

    model_config = ConfigDict(extra="forbid")

    format: Literal["dermaflow-shards/1"] = "dermaflow-shards/1"
    seed: int
    fractions: dict[Split, float]
    folds: int
    buckets: dict[Split, int]  # number of lesion buckets a split is divided into
    shards: list[ShardFile]
    counts: dict[Split, dict[str, int]]  # images by split and diagnosis
    lesions: dict[Split, int]
    quarantined: int
    data_hash: str  # SHA-256 over the sorted content keys: equal data, equal hash
    dermaflow_version: str
