"""Read shards back: metadata, encoded images, pixels. No Ray here, so that a hospital site can train without it."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from dermaflow import storage
from dermaflow.datasets.images import jpeg_quality
from dermaflow.errors import DataError, ShardError
from dermaflow.preparation.layout import read_lesions, read_manifest
from dermaflow.preparation.transforms import pixel_batch
from dermaflow.schemas.bundle import Copies
from dermaflow.schemas.shard import SHARD_SCHEMA, Manifest, ShardFile, Split
from dermaflow.taxonomy import INDEX

FEW_TRACES = 90
"""From this JPEG quality on, a copy is taken to be as good as its original."""

_METADATA = [name for name in SHARD_SCHEMA.names if name != "image"]


@dataclass(frozen=True)
class RowGroup:
    """A reference to some rows of a shard: small enough to send to another process, read there in one piece."""

    uri: str
    index: int
    rows: int

    def read(self, columns: Sequence[str] = tuple(SHARD_SCHEMA.names)) -> pa.Table:
        """The rows; raises ShardError when the file is gone or damaged."""
        with _open_shard(self.uri) as file:
            return file.read_row_group(self.index, columns=list(columns), use_threads=False)


def read_shard(uri: str, columns: Sequence[str]) -> pa.Table:
    """Some columns of a whole shard; raises ShardError when the file is gone or damaged."""
    with _open_shard(uri) as file:
        return file.read(columns=list(columns), use_threads=False)


@contextlib.contextmanager
def _open_shard(uri: str) -> Iterator[pq.ParquetFile]:
    filesystem, path = storage.locate(uri)
    try:
        with pq.ParquetFile(path, filesystem=filesystem) as file:
            yield file
    except (OSError, pa.ArrowException) as error:
        raise ShardError(
            f"unreadable shard: {error}", where=uri, todo="delete the file and run dermaflow prepare again"
        ) from error


class ShardFolder:
    """A finished folder of shards.

    Args:
        uri: Local folder or ``s3://`` address.

    Raises:
        ShardError: The folder has no manifest, or a shard that it names is missing or has another size.
    """

    def __init__(self, uri: str | Path) -> None:
        self.uri = str(uri)
        self.manifest: Manifest = read_manifest(uri)
        for shard in self.manifest.shards:
            self._check(shard)

    def _check(self, shard: ShardFile) -> None:
        place = storage.join(self.uri, shard.path)
        found = storage.info(place).size  # None if it is not there
        if found != shard.bytes:
            raise ShardError(
                "missing" if found is None else f"{found} bytes", where=place, expected=f"{shard.bytes} bytes",
                todo="run dermaflow prepare again: it writes what is missing",
            )  # fmt: skip

    def row_groups(self, split: Split) -> list[RowGroup]:
        """Every row group of a split, in order."""
        groups = []
        for shard in self.manifest.shards:
            if shard.split == split:
                uri = storage.join(self.uri, shard.path)
                with _open_shard(uri) as file:
                    sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
                groups += [RowGroup(uri, i, rows) for i, rows in enumerate(sizes)]
        return groups

    def metadata(self, split: Split) -> pd.DataFrame:
        """All columns but the image, and ``fold``, of a split; rows in the order of `pixels`."""
        tables = [group.read(_METADATA) for group in self.row_groups(split)]
        table = pa.concat_tables(tables) if tables else SHARD_SCHEMA.empty_table().drop(["image"])
        return table.to_pandas().merge(read_lesions(self.uri)[["lesion_id", "fold"]], on="lesion_id", how="left")

    def held_out(self, part: int | str | None) -> np.ndarray:
        """Which training images a recipe keeps out of training: bool [N], in the order of `metadata`.

        Args:
            part: A lesion fold, a source (``site``), or None for no image.

        Raises:
            DataError: The part holds no training image, or all of them.
        """
        meta = self.metadata("train")
        if part is None:
            return np.zeros(len(meta), bool)
        held: np.ndarray = (meta["fold" if isinstance(part, int) else "site"] == part).to_numpy()
        if not 0 < held.sum() < len(held):
            sources = ", ".join(sorted(meta["site"].dropna().unique()))
            named = f"fold {part}" if isinstance(part, int) else f"source {part}"
            raise DataError(
                f"{held.sum()} of {len(held)} training images are in {named}", where="validation_fold",
                expected=f"a fold of the shards, 0 to {self.manifest.folds - 1}, or one of several sources ({sources})",
            )  # fmt: skip
        return held

    def drawn(self, share: float | None) -> np.ndarray:
        """Which training images belong to a share of the training lesions: bool [N], in the order of `metadata`.

        A lesion is in or out by a hash of its id, whatever else there is: a smaller share is part of a larger one.

        Args:
            share: Above 0 to 1, or None for all lesions.

        Raises:
            DataError: No lesion is left.
        """
        lesions = self.metadata("train")["lesion_id"]
        if share is None:
            return np.ones(len(lesions), bool)
        rank = lesions.map(lambda lesion: int.from_bytes(hashlib.sha256(lesion.encode()).digest()[:8]) / 2**64)
        drawn: np.ndarray = (rank < share).to_numpy()
        if not drawn.any():
            raise DataError("no training lesion is left", where=f"train_share {share}", expected="a larger share")
        return drawn

    def images(self, split: Split, wanted: set[str] | None = None) -> Iterator[tuple[str, bytes]]:
        """Image ids and encoded images of a split, all or the wanted ids."""
        for group in self.row_groups(split):
            table = group.read(["image_id", "image"])
            for image_id, data in zip(table["image_id"].to_pylist(), table["image"], strict=True):
                if wanted is None or image_id in wanted:
                    yield image_id, data.as_py()

    def copies(self) -> Copies | None:
        """How the training images are stored, if all are small JPEG copies alike.

        Sizes are those of all training images; the quality is looked up in the first of each row group.
        """
        sizes = self.metadata("train")[["height", "width"]].drop_duplicates()
        first = (group.read(["image"])["image"][0].as_py() for group in self.row_groups("train"))
        if len(sizes) != 1 or len(qualities := {jpeg_quality(data) for data in first}) != 1:
            return None
        quality = qualities.pop()
        if quality is None or quality >= FEW_TRACES:
            return None
        return Copies(height=int(sizes["height"].iloc[0]), width=int(sizes["width"].iloc[0]), quality=quality)

    def pixels(
        self, split: Split, height: int, width: int, copies: Copies | None = None, *, threads: int = 1,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> np.ndarray:  # fmt: skip
        """Decode a whole split into memory: uint8 [N, height, width, 3], rows in the order of `metadata`.

        `copies` is that of a finished model (`transforms.pixels`).
        """
        groups = self.row_groups(split)
        batch = np.empty((sum(group.rows for group in groups), height, width, 3), np.uint8)
        ends = np.cumsum([group.rows for group in groups])
        with ThreadPoolExecutor(threads) as pool:
            decoded = pool.map(lambda group: decode_group(group, height, width, copies)[0], groups)
            for end, part in zip(ends, decoded, strict=True):
                batch[end - len(part) : end] = part
                progress(int(end), len(batch))
        return batch


def decode_group(
    group: RowGroup, height: int, width: int, copies: Copies | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Read and decode one row group.

    Returns:
        Pixels, uint8 [N, height, width, 3], and class indices, int64 [N].
    """
    table = group.read(["image", "dx"])
    return pixel_batch(table["image"].to_pylist(), height, width, copies), labels_of(table["dx"].to_pylist())


def labels_of(diagnoses: Iterable[str]) -> np.ndarray:
    """Class indices (int64) of diagnosis codes."""
    return np.array([INDEX[dx] for dx in diagnoses], np.int64)
