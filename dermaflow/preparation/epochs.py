"""Which images an epoch draws, and which of several workers gets them. No Ray here, and little else: every process that
decodes images imports this.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dermaflow.preparation.balancing import Balance, draw_epoch, epoch_length
from dermaflow.preparation.reading import RowGroup, labels_of
from dermaflow.preparation.transforms import pixel_batch

BLOCK_BYTES = 32 << 20
"""Aimed-at pixels of a block: enough to mix some 400 images of 144x192, well under Ray Data's limit of 128 MiB."""


@dataclass(frozen=True)
class EpochPlan:
    """The epochs of a run: a pure function of the data, the seed and the number of workers.

    Attributes:
        groups: Row groups of the training split.
        numbers: int64 [N], places in the training split of the images to train on.
        labels: int64 [N], their classes.
        rule: How often each class is drawn.
        seed: Of the draws.
        workers: How many.
        batch_size: Images of a batch of one worker.
        height: Pixels.
        width: Pixels.
    """

    groups: list[RowGroup]
    numbers: np.ndarray
    labels: np.ndarray
    rule: Balance
    seed: int
    workers: int
    batch_size: int
    height: int
    width: int

    @property
    def steps(self) -> int:
        """Batches of an epoch, the same on every worker."""
        return max(1, epoch_length(self.labels, self.rule) // (self.batch_size * self.workers))

    def blocks(self, epoch: int) -> Iterator[np.ndarray]:
        """The images of an epoch in blocks, int64 places in the training split.

        Blocks come in rounds, one for each worker, all of one length: dealt out in turn, they give every worker whole
        batches and end the epoch for all at once. A block takes neighbours in a new order of the row groups, so that
        few are read for it, and is shuffled.
        """
        size = self.workers * self.batch_size
        rng = np.random.default_rng([self.seed, epoch])
        drawn = np.resize(draw_epoch(self.labels, self.rule, rng), self.steps * size)
        owners = owning_groups(self.groups, self.numbers[drawn])
        drawn = drawn[np.argsort(rng.permutation(len(self.groups))[owners], kind="stable")]
        batches = max(1, BLOCK_BYTES // (self.height * self.width * 3 * self.batch_size))
        for dealt in np.split(drawn, range(batches * size, len(drawn), batches * size)):
            for block in np.split(dealt, self.workers):
                yield self.numbers[rng.permutation(block)]


def owning_groups(groups: list[RowGroup], numbers: np.ndarray) -> np.ndarray:
    """Which of the row groups, taken together, holds each row."""
    return np.searchsorted(np.cumsum([group.rows for group in groups]), numbers, side="right")


def read_images(batch: dict[str, np.ndarray], groups: list[RowGroup], height: int, width: int) -> dict[str, np.ndarray]:
    """Read, decode and resize images in one step, so that their encoded bytes go nowhere.

    Args:
        batch: ``number``, int64 [N]: places in the row groups taken together; they may repeat.
        groups: Row groups.
        height: Pixels.
        width: Pixels.

    Returns:
        ``image`` uint8 [N, height, width, 3] and ``label`` int64 [N].
    """
    numbers = batch["number"]
    images, labels = np.empty((len(numbers), height, width, 3), np.uint8), np.empty(len(numbers), np.int64)
    owners, ends = owning_groups(groups, numbers), np.cumsum([group.rows for group in groups])
    for owner in np.unique(owners):
        here = np.flatnonzero(owners == owner)
        rows, copies = np.unique(numbers[here] - (ends[owner] - groups[owner].rows), return_inverse=True)
        table = groups[owner].read(["image", "dx"]).take(rows)
        images[here] = pixel_batch(table["image"].to_pylist(), height, width)[copies]
        labels[here] = labels_of(table["dx"].to_pylist())[copies]
    return {"image": images, "label": labels}
