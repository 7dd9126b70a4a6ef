"""A site's images: all of its shards, or its part of a simulation's."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pandas as pd

from clients.partition import POOLED, site_names, site_of_lesions
from dermaflow.learning.local import class_counts
from dermaflow.preparation.reading import ShardFolder, labels_of
from dermaflow.schemas.bundle import Copies
from dermaflow.schemas.shard import SPLITS, Split
from dermaflow.settings import settings


@dataclass(frozen=True)
class SiteData:
    """One site's images, read when they are asked for.

    Attributes:
        name: Of the site.
        shards: Shard folder.
        partition: Part of the folder that is the site's; None for all of it.
        seed: Of a drawn partition.
    """

    name: str
    shards: str
    partition: str | None = None
    seed: int = 0

    def metadata(self, split: Split) -> pd.DataFrame:
        """Metadata of the site's images of a split."""
        frame = _metadata(self.shards)[split]
        return frame[self._mine(split)].reset_index(drop=True)

    def labels(self, split: Split) -> np.ndarray:
        """Class indices, int64 [N]."""
        return labels_of(self.metadata(split)["dx"])

    def pixels(self, split: Split, height: int, width: int, copies: Copies | None = None) -> np.ndarray:
        """Pixels, uint8 [N, height, width, 3], in the order of `metadata`; `copies` is that of a finished model."""
        whole = _pixels(self.shards, split, height, width, copies)
        mine = self._mine(split)
        return whole if mine.all() else whole[mine]

    def counts(self) -> dict[str, list[int]]:
        """Images of each class in each split."""
        return {split: class_counts(self.labels(split)).tolist() for split in SPLITS}

    def copies(self) -> np.ndarray:
        """How the training images of the shards are stored: int64 [height, width, quality], zeros if not as copies."""
        found = _copies(self.shards)
        return np.array([found.height, found.width, found.quality] if found else [0, 0, 0], np.int64)

    @property
    def data_hash(self) -> str:
        """Of the shard folder."""
        return ShardFolder(self.shards).manifest.data_hash

    def _mine(self, split: Split) -> np.ndarray:
        if self.partition is None or self.name == POOLED:
            return np.ones(len(_metadata(self.shards)[split]), bool)
        return (_sites(self.shards, self.partition, self.seed)[split] == self.name).to_numpy()


def simulated_sites(shards: str, partition: str) -> list[str]:
    """Names of the sites that a shard folder is divided among."""
    return site_names(partition, pd.concat(_metadata(shards).values()))


@lru_cache(maxsize=4)
def _metadata(shards: str) -> dict[Split, pd.DataFrame]:
    folder = ShardFolder(shards)
    return {split: folder.metadata(split) for split in SPLITS}


@lru_cache(maxsize=4)
def _copies(shards: str) -> Copies | None:
    return ShardFolder(shards).copies()


@lru_cache(maxsize=4)
def _sites(shards: str, partition: str, seed: int) -> dict[Split, pd.Series]:
    parts = _metadata(shards)
    whole = pd.concat(parts.values(), ignore_index=True)  # a drawn partition divides the lesions of all splits
    sites = site_of_lesions(partition, whole, seed)
    ends = np.cumsum([len(part) for part in parts.values()])
    return dict(
        zip(
            parts,
            (sites.iloc[end - len(part) : end] for end, part in zip(ends, parts.values(), strict=True)),
            strict=True,
        )
    )


@lru_cache(maxsize=6)
def _pixels(shards: str, split: Split, height: int, width: int, copies: Copies | None) -> np.ndarray:
    return ShardFolder(shards).pixels(split, height, width, copies, threads=settings().threads)
