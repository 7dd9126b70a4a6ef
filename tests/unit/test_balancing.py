"""Each strategy's numbers by hand, what is drawn, and that only the training split is balanced."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tiny_data import draw, prepare_here

from dermaflow.learning import local
from dermaflow.learning.backbones import BackboneConfig, build
from dermaflow.learning.local import class_counts, fit_here, memory_feed
from dermaflow.learning.loop import Run
from dermaflow.learning.optimisation import OptimConfig
from dermaflow.learning.recipe import Recipe, SizeConfig
from dermaflow.preparation.balancing import Balance, BalanceConfig, balance, draw_epoch, epoch_length
from dermaflow.preparation.reading import ShardFolder, labels_of

COUNTS = np.array([10, 40, 0, 50])
LABELS = np.repeat(np.arange(4), COUNTS)


def rule(strategy: str, **choices: float) -> Balance:
    return balance(COUNTS, BalanceConfig.model_validate({"strategy": strategy, **choices}))


def test_nothing_is_changed_by_default() -> None:
    found = balance(COUNTS, BalanceConfig())
    assert found.loss_weights.tolist() == found.draws.tolist() == [1, 1, 1, 1] and not found.replacement


def test_class_weights() -> None:
    # inverse frequencies 10, 2.5, 2; their mean over the 100 images is (10*10 + 40*2.5 + 50*2) / 100 = 3
    np.testing.assert_allclose(rule("class_weights").loss_weights, [10 / 3, 2.5 / 3, 0, 2 / 3])
    roots = np.array([10**0.5, 2.5**0.5, 0, 2**0.5])
    mean = (10 * roots[0] + 40 * roots[1] + 50 * roots[3]) / 100
    np.testing.assert_allclose(rule("class_weights", power=0.5).loss_weights, roots / mean)
    assert rule("class_weights", power=0).loss_weights.tolist() == [1, 1, 0, 1]
    assert rule("class_weights").draws.tolist() == [1, 1, 1, 1]


def test_effective_number() -> None:
    # with beta = 0.5 the effective numbers are (1 - 0.5^n) / 0.5, which is 2 for every class but for 2^-10
    expected = np.array([1 / (1 - 2.0**-10), 1 / (1 - 2.0**-40), 0, 1 / (1 - 2.0**-50)])
    expected /= (10 * expected[0] + 40 * expected[1] + 50 * expected[3]) / 100
    np.testing.assert_allclose(rule("effective_number", beta=0.5).loss_weights, expected, rtol=1e-12)
    near_one = rule("effective_number", beta=1 - 1e-9).loss_weights  # tends to the inverse frequencies
    np.testing.assert_allclose(near_one, rule("class_weights").loss_weights, rtol=1e-6)


@pytest.mark.parametrize("strategy", ["class_weights", "effective_number"])
def test_the_mean_loss_weight_of_an_image_is_one(strategy: str) -> None:
    assert rule(strategy).loss_weights[LABELS].mean() == pytest.approx(1)


def test_weighted_sampling_makes_the_classes_equal_in_an_epoch_of_the_same_length() -> None:
    found = rule("weighted_sampling")
    np.testing.assert_allclose(found.draws, [10 / 3, 2.5 / 3, 0, 2 / 3])
    assert found.replacement and found.loss_weights.tolist() == [1, 1, 1, 1]
    rng = np.random.default_rng(0)
    drawn = np.concatenate([draw_epoch(LABELS, found, rng) for _ in range(300)])
    assert len(drawn) == 300 * 100 == 300 * epoch_length(LABELS, found)
    shares = np.bincount(LABELS[drawn], minlength=4) / len(drawn)
    np.testing.assert_allclose(shares, [1 / 3, 1 / 3, 0, 1 / 3], atol=0.01)


def test_oversampling_holds_every_image_and_repeats_the_rare() -> None:
    found = rule("oversampling")
    np.testing.assert_allclose(found.draws, [5, 1.25, 0, 1])
    assert not found.replacement and epoch_length(LABELS, found) == 50 + 50 + 50
    rng = np.random.default_rng(0)
    lengths = []
    for _ in range(50):
        order = draw_epoch(LABELS, found, rng)
        times = np.bincount(order, minlength=100)
        assert times.min() == 1, "an image is left out"
        assert set(times[:10]) == {5} and set(times[10:50]) <= {1, 2} and set(times[50:]) == {1}
        lengths.append(len(order))
    assert np.mean(lengths) == pytest.approx(150, abs=1.5)
    np.testing.assert_allclose(rule("oversampling", power=0.5).draws, [5**0.5, 1.25**0.5, 0, 1])


def test_an_epoch_without_balancing_is_a_shuffle() -> None:
    order = draw_epoch(LABELS, balance(COUNTS, BalanceConfig()), np.random.default_rng(0))
    assert sorted(order) == list(range(100)) and list(order) != list(range(100))


@pytest.mark.parametrize("wrong", [{"strategy": "smote"}, {"power": -1}, {"power": 3}, {"beta": 1}, {"betta": 0.9}])
def test_impossible_choices(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        BalanceConfig.model_validate(wrong)


# --- through the feed ----------------------------------------------------------------------------------------------


def recipe(strategy: str, batch_size: int = 16) -> Recipe:
    return Recipe(
        name="feed", input=SizeConfig(height=24, width=32), backbone=BackboneConfig(name="seed_cnn"),
        balance=BalanceConfig.model_validate({"strategy": strategy}),
        optim=OptimConfig(batch_size=batch_size, head_epochs=0, epochs=1),
    )  # fmt: skip


@pytest.mark.parametrize("strategy", ["none", "weighted_sampling", "oversampling"])
def test_a_feed_gives_what_is_drawn_in_whole_batches(strategy: str) -> None:
    chosen = recipe(strategy)
    found = balance(COUNTS, chosen.balance)
    pixels = np.arange(100, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)  # tell images apart
    feed = memory_feed(pixels, LABELS, found, chosen)
    assert feed.steps == epoch_length(LABELS, found) // 16
    for epoch in (0, 1):
        batches = list(feed.epoch(epoch))
        assert [len(targets) for _, targets in batches] == [16] * feed.steps
        images = torch.cat([images for images, _ in batches])[:, 0, 0, 0].numpy()
        order = draw_epoch(LABELS, found, np.random.default_rng([chosen.seed, epoch]))
        assert (images == order[: len(images)]).all()
        assert (torch.cat([targets for _, targets in batches]).numpy() == LABELS[images]).all()
    first = [next(iter(feed.epoch(epoch)))[0] for epoch in (0, 0, 1)]
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])


def test_a_feed_of_fewer_images_than_a_batch() -> None:
    chosen = recipe("none", batch_size=512)
    feed = memory_feed(np.zeros((100, 2, 2, 3), np.uint8), LABELS, balance(COUNTS, chosen.balance), chosen)
    assert [len(targets) for _, targets in feed.epoch(0)] == [100]


def test_only_train_is_balanced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_here(draw(tmp_path / "data"), tmp_path / "shards")
    folder = ShardFolder(tmp_path / "shards")
    runs: list[Run] = []
    monkeypatch.setattr(local, "fit", lambda network, run, state: (runs.append(run) or network, []))
    chosen = recipe("oversampling", batch_size=8)
    network = build(chosen.backbone)
    fit_here(network, chosen, folder, tmp_path / "checkpoints", lambda *progress: None)
    (run,) = runs

    train = labels_of(folder.metadata("train")["dx"])
    counts = class_counts(train)
    drawn = Counter(torch.cat([targets for _, targets in run.feed.epoch(0)]).tolist())
    assert counts.max() > 10 * counts.min() and max(drawn.values()) < 1.2 * min(drawn.values())
    np.testing.assert_allclose(run.priors, counts / counts.sum())  # those of the data, not of the draws
    seen: list[np.ndarray] = []
    monkeypatch.setattr(local, "predict", lambda network, pixels, spec: (seen.append(pixels) or zeros(pixels), None))
    assert run.validate is not None
    run.validate(network)
    assert (seen[0] == folder.pixels("calibration", 24, 32)).all()  # every image once


def zeros(pixels: np.ndarray) -> np.ndarray:
    return np.zeros((len(pixels), 7), np.float32)
