"""Membership inference: what an attack must find, and what it must not."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from dermaflow.errors import DataError
from dermaflow.evaluation.membership import Part, area, attack


def part(seed: int, push: float, images: int = 600) -> Part:
    """Two images a lesion; rare classes are harder; `push` is what a model learnt by heart."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(rng.choice(7, images // 2, p=[0.1, 0.1, 0.1, 0.05, 0.1, 0.5, 0.05]), 2)
    logits = rng.normal(size=(images, 7))
    logits[np.arange(images), labels] += np.where(labels == 5, 4.0, 0.0) + push
    return Part(logits, labels, np.repeat(np.arange(images // 2), 2))


def test_the_area_is_sklearns_also_with_ties_and_weights() -> None:
    rng = np.random.default_rng(0)
    score, truth = rng.integers(0, 9, 80).astype(float), rng.random(80) < 0.4
    weights = rng.integers(0, 4, (5, 80)).astype(float)
    expected = [roc_auc_score(truth, score, sample_weight=w) for w in weights]
    assert np.allclose(area(score, truth, weights), expected)


def test_a_model_that_learnt_by_heart_is_found_out() -> None:
    found = attack(part(0, 2.0), part(1, 0.0), resamples=200)
    assert found["loss of its class"].value > 0.8
    # the classes' own difficulty hides part of it from the plain attack
    assert found["loss of its class"].value > found["loss"].value + 0.03
    for one in found.values():
        assert one.low < one.value < one.high and one.low > 0.5


def test_a_model_that_learnt_nothing_by_heart_is_not() -> None:
    for one in attack(part(0, 0.0), part(1, 0.0), resamples=200).values():
        assert one.low < 0.5 < one.high


def test_the_interval_counts_lesions_and_not_images() -> None:
    """The same images ten times over are no more evidence."""
    members, others = part(0, 0.3), part(1, 0.0)
    wide = attack(members, others, resamples=300)["loss"]
    many = [Part(np.tile(p.logits, (10, 1)), np.tile(p.labels, 10), np.tile(p.lesions, 10)) for p in (members, others)]
    same = attack(*many, resamples=300)["loss"]
    assert same.high - same.low == pytest.approx(wide.high - wide.low, rel=0.05)


def test_there_must_be_something_to_compare() -> None:
    with pytest.raises(DataError, match="nothing to compare"):
        attack(part(0, 0.0), Part(np.zeros((0, 7)), np.zeros(0, int), np.zeros(0, int)))
