"""The plan of epochs: what several workers draw together, and who gets which images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dermaflow.datasets.synthetic import generate
from dermaflow.learning.local import class_counts
from dermaflow.preparation.balancing import BalanceConfig, balance, draw_epoch
from dermaflow.preparation.epochs import EpochPlan, owning_groups, read_images
from dermaflow.preparation.prepare import prepare
from dermaflow.preparation.reading import RowGroup, ShardFolder, labels_of

GROUPS = [RowGroup(f"shard-{i}", i % 4, 64) for i in range(16)]
LABELS = np.random.default_rng(0).integers(0, 7, 16 * 64)
NUMBERS = np.flatnonzero(np.arange(16 * 64) % 5 > 0)  # every fifth image is kept out, as by a validation fold


def plan(workers: int, *, batch_size: int = 32, side: int = 256, strategy: str = "none") -> EpochPlan:
    labels = LABELS[NUMBERS]
    rule = balance(class_counts(labels), BalanceConfig.model_validate({"strategy": strategy}))
    return EpochPlan(GROUPS, NUMBERS, labels, rule, 7, workers, batch_size // workers, side, side)


@pytest.mark.parametrize("strategy", ["none", "weighted_sampling", "oversampling"])
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_any_number_of_workers_draws_the_images_that_one_process_draws(workers: int, strategy: str) -> None:
    these = plan(workers, strategy=strategy)
    drawn = draw_epoch(these.labels, these.rule, np.random.default_rng([7, 3]))
    here = NUMBERS[np.resize(drawn, these.steps * 32)]
    assert sorted(np.concatenate(list(these.blocks(3)))) == sorted(here)


@pytest.mark.parametrize("workers", [2, 3])
def test_blocks_dealt_out_in_turn_give_every_worker_the_batches_of_an_epoch(workers: int) -> None:
    these = plan(workers, batch_size=30, side=384)
    blocks = list(these.blocks(0))
    assert len(blocks) > 2 * workers  # images so large that an epoch takes several rounds
    for worker in range(workers):
        mine = blocks[worker::workers]
        assert sum(map(len, mine)) == these.steps * these.batch_size
        assert all(len(block) % these.batch_size == 0 for block in mine)


def test_epochs_differ_and_are_the_same_when_planned_again() -> None:
    first, second = (np.concatenate(list(plan(2).blocks(epoch))) for epoch in (0, 1))
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(first, np.concatenate(list(plan(2).blocks(0))))


def test_a_block_reads_few_row_groups() -> None:
    for block in plan(2).blocks(0):
        assert len(np.unique(owning_groups(GROUPS, block))) <= len(block) // 48 + 2  # 51 of 64 rows are drawn


def test_read_images_gives_the_pixels_of_the_split_with_repeats(tmp_path: Path) -> None:
    generate(tmp_path / "ham", 90, 1, height=48, width=64)
    prepare(tmp_path / "ham", tmp_path / "shards", use_ray=False)
    folder = ShardFolder(tmp_path / "shards")
    whole, labels = folder.pixels("train", 24, 32), labels_of(folder.metadata("train")["dx"])
    numbers = np.array([5, 0, len(whole) - 1, 5, 17])
    found = read_images({"number": numbers}, folder.row_groups("train"), 24, 32)
    np.testing.assert_array_equal(found["image"], whole[numbers])
    np.testing.assert_array_equal(found["label"], labels[numbers])
