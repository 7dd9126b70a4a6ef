"""Other frequencies, other probabilities; and wrong frequencies are refused."""

from __future__ import annotations

import numpy as np
import pytest

from dermaflow.errors import DataError
from dermaflow.taxonomy import MELANOMA
from dermaflow.trust.prior_shift import correct, estimate_priors

OLD = (np.array([327, 514, 1099, 115, 1113, 6705, 142]) / 10015).tolist()
NEW = [0.10, 0.15, 0.20, 0.02, 0.03, 0.48, 0.02]


def exact_posteriors(images: int, priors: list[float], under: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Posteriors under the priors `under` of images drawn with `priors`, and their labels."""
    rng = np.random.default_rng(0)
    labels = rng.choice(7, size=images, p=priors)
    evidence = 2.0 * (rng.normal(size=(images, 7)) + 2.0 * np.eye(7)[labels])
    p = np.exp(evidence) * np.array(under)
    return p / p.sum(axis=1, keepdims=True), labels


def test_known_priors_give_the_exact_posterior() -> None:
    under_old, _ = exact_posteriors(500, NEW, OLD)
    under_new, _ = exact_posteriors(500, NEW, NEW)
    np.testing.assert_allclose(correct(under_old, OLD, NEW), under_new, atol=1e-12)
    np.testing.assert_allclose(correct(under_old, OLD, OLD), under_old, atol=1e-12)


def test_priors_are_found_without_labels() -> None:
    p, labels = exact_posteriors(20000, NEW, OLD)
    found = estimate_priors(p, OLD)
    assert found.sum() == pytest.approx(1)
    np.testing.assert_allclose(found, NEW, atol=0.01)
    assert abs(p.mean(axis=0)[MELANOMA] - NEW[MELANOMA]) > 0.02  # averaging the probabilities would not find them
    corrected = correct(p, OLD, found.tolist())
    assert corrected[:, MELANOMA].mean() == pytest.approx((labels == MELANOMA).mean(), abs=0.005)


def test_a_class_the_site_never_sees_vanishes() -> None:
    p, _ = exact_posteriors(50, OLD, OLD)
    without = [*OLD[:4], 0.0, OLD[5] + OLD[4], OLD[6]]
    corrected = correct(p, OLD, without)
    assert (corrected[:, MELANOMA] == 0).all()
    np.testing.assert_allclose(corrected.sum(axis=1), 1)


@pytest.mark.parametrize(
    ("priors", "message"),
    [
        ([0.5, 0.5], "2 values; expected 7, one for each of akiec"),
        ([0.5] * 7, r"sum 3\.5"),
        ([-0.1, 0.3, 0.2, 0.2, 0.2, 0.1, 0.1], r"smallest -0\.1"),
        ([float("nan")] * 7, "sum nan"),
        ([30, 50, 20, 0, 0, 0, 0], "sum 100"),  # per cent
    ],
)
def test_wrong_priors_are_refused(priors: list[float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        correct(np.full((1, 7), 1 / 7), OLD, priors)


def test_what_was_never_calibrated_cannot_be_corrected() -> None:
    old = [*OLD[:3], 0.0, *OLD[4:6], OLD[6] + OLD[3]]
    with pytest.raises(DataError, match="df above 0, but the calibration split held none"):
        correct(np.full((1, 7), 1 / 7), old, NEW)


def test_nothing_to_estimate_from() -> None:
    for p in (np.zeros((0, 7)), np.ones((3, 7))):
        with pytest.raises(DataError, match="an array of"):
            estimate_priors(p, OLD)
