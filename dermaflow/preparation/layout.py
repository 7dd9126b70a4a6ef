"""Where the rows of a shard folder lie: lesion buckets, content keys, file names, and the writing of one shard."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from dermaflow import storage
from dermaflow.errors import ShardError
from dermaflow.schemas.shard import LESIONS_NAME, MANIFEST_NAME, SHARD_SCHEMA, SPLITS, Manifest, ShardFile, Split
from dermaflow.schemas.versions import check_format

ROWS_A_SHARD = 256
"""Aimed-at rows of a shard: about 64 MB of 600x450 JPEGs, a task of some seconds."""
ROWS_A_GROUP = 64
"""Rows of a Parquet row group, the unit that a reading task decodes."""
_ROW_COLUMNS = [name for name in SHARD_SCHEMA.names if name != "image"]


@dataclass(frozen=True)
class PlannedShard:
    """A shard as it should be: its rows (`_ROW_COLUMNS` and the image's ``path``) and the name they give it."""

    split: Split
    path: str
    content_key: str
    rows: pd.DataFrame


def bucket_counts(images: pd.DataFrame, previous: Mapping[Split, int] | None) -> dict[Split, int]:
    """Number of buckets of each split; the earlier number stays until shards are twice too large or too small."""
    counts: dict[Split, int] = {}
    for split in SPLITS:
        rows = int((images["split"] == split).sum())
        wanted = max(1, round(rows / ROWS_A_SHARD))
        old = (previous or {}).get(split, wanted)
        counts[split] = old if wanted <= 2 * old and old <= 2 * wanted else wanted
    return counts


def plan_shards(images: pd.DataFrame, buckets: Mapping[Split, int]) -> list[PlannedShard]:
    """Put every lesion whole into a bucket of its split, by a hash of its id."""
    numbers = [
        int.from_bytes(hashlib.sha256(lesion.encode()).digest()[:8], "big") % buckets[split]
        for lesion, split in zip(images["lesion_id"], images["split"], strict=True)
    ]
    plan = []
    for (name, number), rows in images.groupby(["split", numbers], sort=True):
        split = cast(Split, name)
        rows = rows.sort_values("image_id", ignore_index=True)
        key = content_key(rows)
        plan.append(PlannedShard(split, shard_path(split, int(str(number)), key), key, rows))
    return plan


def content_key(rows: pd.DataFrame) -> str:
    """SHA-256 over the metadata and image hashes of a shard's rows, which are sorted by image id."""
    return hashlib.sha256(rows[_ROW_COLUMNS].to_csv(index=False).encode()).hexdigest()


def shard_path(split: str, bucket: int, key: str) -> str:
    """Path of a shard within its folder."""
    return f"{split}/{split}-{bucket:05d}-{key[:12]}.parquet"


def data_hash(shards: Iterable[ShardFile]) -> str:
    """SHA-256 over the sorted content keys: equal data, equal hash."""
    return storage.sha256("".join(sorted(shard.content_key for shard in shards)).encode())


def as_task(shard: PlannedShard) -> pa.Table:
    """A planned shard as the small table that travels to the task that writes it."""
    rows = shard.rows[[*_ROW_COLUMNS, "path"]]
    return pa.Table.from_pandas(rows.assign(shard_path=shard.path, content_key=shard.content_key), preserve_index=False)


def write_shards(tasks: pa.Table, out: str) -> pa.Table:
    """Write the shards whose rows are in the table; returns one row of `ShardFile` fields a shard.

    Raises:
        ShardError: An image changed or went away since it was inspected.
        StorageError: The disk is full.
    """
    written = []
    frame = tasks.to_pandas()
    for (path, key), rows in frame.groupby(["shard_path", "content_key"], sort=False):
        images = [_read_unchanged(Path(row.path), row.sha256) for row in rows.itertuples()]
        columns = {"image": pa.array(images, pa.binary())}
        columns |= {
            name: pa.array(rows[name], SHARD_SCHEMA.field(name).type, from_pandas=True) for name in _ROW_COLUMNS
        }
        table = pa.table(columns, SHARD_SCHEMA)
        size = write_shard(table, storage.join(out, path))
        split = rows["split"].iloc[0]
        written.append({"path": path, "split": split, "rows": len(rows), "bytes": size, "content_key": key})
    return pa.Table.from_pylist(written)


def write_shard(table: pa.Table, uri: str) -> int:
    """Write the rows of a shard (`SHARD_SCHEMA`); returns its size in bytes."""
    with storage.open_atomic(uri) as stream:
        # The images are compressed already; dictionary and statistics serve the small columns only.
        pq.write_table(
            table, stream, row_group_size=ROWS_A_GROUP, compression={"image": "none"}
            | dict.fromkeys(_ROW_COLUMNS, "zstd"), use_dictionary=["dx", "dx_type", "sex", "localization", "site"],
            write_statistics=["image_id", "lesion_id"],
        )  # fmt: skip
    return storage.file_size(uri)


def _read_unchanged(path: Path, sha256: str) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ShardError(
            f"the image could be read no more: {error.strerror}", where=path, todo="run the command again"
        ) from error
    if storage.sha256(data) != sha256:
        raise ShardError("the image changed while it was being prepared", where=path, todo="run the command again")
    return data


def complete_shards(out: str | Path, plan: list[PlannedShard], previous: Manifest | None) -> dict[str, ShardFile]:
    """Shards of the plan that lie in the folder whole: files appear only when complete, so being there is enough."""
    known = {shard.path: shard for shard in previous.shards} if previous else {}
    there: dict[str, ShardFile] = {}
    names = {split: set(storage.list_folder(storage.join(out, split))) for split in SPLITS}
    for shard in plan:
        if Path(shard.path).name not in names[shard.split]:
            continue
        size = storage.file_size(storage.join(out, shard.path))
        found = ShardFile(
            path=shard.path, split=shard.split, rows=len(shard.rows), bytes=size, content_key=shard.content_key
        )
        if known.get(shard.path, found) == found:  # a size that differs from the manifest's means damage: write again
            there[shard.path] = found
    return there


def remove_unnamed(out: str | Path, manifest: Manifest) -> None:
    """Delete shard files that the manifest does not name: those of earlier states and the halves of a killed run."""
    named = {shard.path for shard in manifest.shards}
    for split in SPLITS:
        for name in storage.list_folder(storage.join(out, split)):
            path = f"{split}/{name}"
            ours = re.fullmatch(rf"{split}-\d{{5}}-[0-9a-f]{{12}}\.parquet(\.[0-9a-f]{{8}}\.partial)?", name)
            if ours and path not in named:
                storage.delete(storage.join(out, path))


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a shard folder.

    Raises:
        ShardError: There is none (the folder is unfinished) or it is damaged.
        StorageError: The store cannot be reached.
    """
    place = storage.join(folder, MANIFEST_NAME)
    if not storage.exists(place):
        raise ShardError(
            "no manifest", where=folder, expected=f"a finished shard folder with {MANIFEST_NAME}",
            todo=f"run dermaflow prepare --data DIR --out {folder}",
        )  # fmt: skip
    content = storage.read_bytes(place)
    check_format(content, Manifest.model_fields["format"].default, place, ShardError)
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        raise ShardError(f"damaged manifest: {error}", where=place, todo="prepare the folder again") from error


def read_table(folder: str | Path, name: str) -> pa.Table:
    """A small Parquet table of the folder, such as `LESIONS_NAME`; raises ShardError when it is damaged."""
    place = storage.join(folder, name)
    try:
        return pq.read_table(pa.BufferReader(storage.read_bytes(place)))
    except (OSError, pa.ArrowException) as error:
        raise ShardError(f"unreadable: {error}", where=place, todo="delete the folder and prepare it again") from error


def write_table(folder: str | Path, name: str, table: pa.Table) -> None:
    """Write a small Parquet table of the folder atomically."""
    with storage.open_atomic(storage.join(folder, name)) as stream:
        pq.write_table(table, stream)


def read_lesions(folder: str | Path) -> pd.DataFrame:
    """Columns ``lesion_id``, ``dx``, ``site``, ``images``, ``split``, ``fold`` of every lesion of the folder."""
    return read_table(folder, LESIONS_NAME).to_pandas()
