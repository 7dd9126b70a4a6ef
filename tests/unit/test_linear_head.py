"""The head from sums: the same wherever the images lie, and the same as scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import log_softmax
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from dermaflow.errors import DataError
from dermaflow.learning.linear_head import ABSENT, SCALES, class_sums, discriminant_head, scale_losses


def draw(images: int, classes: int = 7, width: int = 24, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, images)
    mixing = random.normal(size=(width, width)) / np.sqrt(width)
    return random.normal(size=(classes, width))[labels] + random.normal(size=(images, width)) @ mixing, labels


@pytest.mark.parametrize("sites", [2, 5, 16])
def test_sites_together_give_the_pooled_head(sites: int) -> None:
    features, labels = draw(700)
    site = labels % sites if sites > 2 else np.arange(700) % 2  # with many sites no site has all classes
    parts = [class_sums(features[site == s], labels[site == s]) for s in range(sites)]
    joined = parts[0]
    for part in parts[1:]:
        joined = joined + part
    for ours, pooled in zip(discriminant_head(joined), discriminant_head(class_sums(features, labels)), strict=True):
        np.testing.assert_allclose(ours, pooled, rtol=1e-9, atol=1e-9)


def test_it_is_the_head_of_scikit_learn() -> None:
    features, labels = draw(900)
    weight, bias = discriminant_head(class_sums(features, labels), shrinkage=0.0)
    theirs = LinearDiscriminantAnalysis(solver="lsqr").fit(features, labels)
    np.testing.assert_allclose(features @ weight.T + bias, theirs.decision_function(features), rtol=1e-6, atol=1e-6)


def test_a_class_without_images_is_never_predicted_and_one_class_is_refused() -> None:
    features, labels = draw(300, classes=5)
    weight, bias = discriminant_head(class_sums(features, labels))
    assert set((features @ weight.T + bias).argmax(1)) <= set(range(5))
    assert (bias[5:] == ABSENT).all() and not weight[5:].any()
    with pytest.raises(DataError, match="1 classes have images"):
        discriminant_head(class_sums(features[:9], np.zeros(9, int)))


def test_the_scale_of_least_loss_makes_logits_sure_as_they_are_right() -> None:
    features, labels = draw(600)
    features += np.random.default_rng(1).normal(0, 3, features.shape)
    few, rest = slice(0, 60), slice(60, None)
    weight, bias = discriminant_head(class_sums(features[few], labels[few]), shrinkage=0.0)
    logits = features[rest] @ weight.T + bias
    parts = scale_losses(logits[:200], labels[rest][:200]) + scale_losses(logits[200:], labels[rest][200:])
    whole = scale_losses(logits, labels[rest])
    np.testing.assert_allclose(parts, whole)
    by_hand = -log_softmax(0.5 * logits, axis=1)[np.arange(540), labels[rest]].sum()
    assert whole[list(SCALES).index(0.5)] == pytest.approx(by_hand)
    assert SCALES[whole.argmin()] < 1  # fitted on 60 images, it is too sure


def test_other_priors_move_only_the_bias() -> None:
    features, labels = draw(300)
    sums = class_sums(features, labels)
    plain, moved = discriminant_head(sums), discriminant_head(sums, priors=np.ones(7))
    np.testing.assert_array_equal(plain[0], moved[0])
    shares = sums.counts / sums.counts.sum()
    np.testing.assert_allclose(moved[1] - plain[1], np.log(1 / 7) - np.log(shares))
