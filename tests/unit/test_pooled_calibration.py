"""Calibration from sums of sites is that of their images together."""

from __future__ import annotations

import numpy as np
import pytest

from dermaflow.errors import DataError
from dermaflow.schemas.bundle import Calibration
from dermaflow.taxonomy import MELANOMA
from dermaflow.trust.calibrate import calibrate
from dermaflow.trust.conformal import fit_conformal
from dermaflow.trust.pooled import (
    CalibrationCounts,
    ScalingSums,
    calibration_counts,
    calibration_of,
    fit_scaling,
    scaling_sums,
)
from dermaflow.trust.temperature import fit_temperature_and_bias, scale
from dermaflow.trust.thresholds import entropy

PRIORS = np.array([0.05, 0.08, 0.12, 0.03, 0.15, 0.54, 0.03])


@pytest.fixture(scope="module")
def images() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Logits that are too sure and lean to rare classes, labels, lesions, and the site of each image."""
    rng = np.random.default_rng(0)
    lesions = np.repeat(np.arange(1100), rng.integers(1, 3, 1100))
    truth = rng.choice(7, 1100, p=PRIORS)
    labels = truth[lesions]
    logits = 3 * rng.normal(size=(len(labels), 7)) + 4.5 * np.eye(7)[labels] - np.log(PRIORS)
    return logits, labels, lesions, lesions % 4


def ask(images: tuple[np.ndarray, ...], at: np.ndarray) -> ScalingSums:
    logits, labels, _, site = images
    parts = [scaling_sums(logits[site == s], labels[site == s], at) for s in range(4)]
    total = parts[0] + parts[1] + parts[2] + parts[3]
    assert isinstance(total, ScalingSums)
    return total


@pytest.fixture(scope="module")
def fitted(images: tuple[np.ndarray, ...]) -> tuple[float, np.ndarray, Calibration]:
    logits, labels, lesions, site = images
    temperature, bias = fit_scaling(lambda at: ask(images, at))
    priors = (np.bincount(labels, minlength=7) / len(labels)).tolist()
    parts = [
        calibration_counts(
            logits[site == s], labels[site == s], lesions[site == s], temperature, bias, priors,
            distances=np.abs(logits[site == s]).mean(1), seed=s,
        )
        for s in range(4)
    ]  # fmt: skip
    total = parts[0] + parts[1] + parts[2] + parts[3]
    assert isinstance(total, CalibrationCounts)
    return temperature, bias, calibration_of(total, temperature, bias)


def test_temperature_and_bias_are_those_of_pooled_images_in_a_few_exchanges(images: tuple[np.ndarray, ...]) -> None:
    asked = []

    def counted(at: np.ndarray) -> ScalingSums:
        asked.append(at)
        return ask(images, at)

    temperature, bias = fit_scaling(counted)
    wanted, wanted_bias = fit_temperature_and_bias(images[0], images[1])
    assert temperature == pytest.approx(wanted, abs=1e-4)
    assert np.allclose(bias, wanted_bias, atol=1e-3)
    assert len(asked) <= 10


def test_the_gradient_is_the_slope_of_the_loss(images: tuple[np.ndarray, ...]) -> None:
    at, small = np.linspace(-0.2, 0.3, 8), 1e-5
    sums = ask(images, at)
    for k in range(8):
        away = at.copy()
        away[k] += small
        assert (ask(images, away).loss - sums.loss) / small == pytest.approx(sums.gradient[k], rel=1e-3, abs=0.05)


def test_thresholds_and_sets_are_those_of_pooled_images_to_a_bin(
    images: tuple[np.ndarray, ...], fitted: tuple[float, np.ndarray, Calibration]
) -> None:
    logits, labels, lesions, _ = images
    temperature, bias, found = fitted
    p = scale(logits, temperature, bias)
    exact = 1 - fit_conformal(p, labels, lesions)
    assert np.allclose(1 - np.array(found.conformal_quantiles), exact, rtol=0.03)
    assert (1 - np.array(found.conformal_quantiles) <= exact + 1e-12).all()  # sets are never smaller
    central = calibrate(logits, None, labels, lesions)
    assert found.malignant_threshold == pytest.approx(central.malignant_threshold, rel=0.35)  # other resamples
    assert found.entropy_threshold == pytest.approx(np.quantile(entropy(p), 0.95), abs=0.01)
    assert found.images == len(labels) and found.lesions == 1100
    assert found.operating_points[1].tau == pytest.approx(central.operating_points[1].tau, abs=0.25)
    assert found.ood is not None
    far = np.abs(logits).mean(1)
    assert np.quantile(far, 0.98) <= found.ood.threshold <= np.quantile(far, 0.98) + 0.02


def test_the_melanoma_threshold_keeps_its_promise(
    images: tuple[np.ndarray, ...], fitted: tuple[float, np.ndarray, Calibration]
) -> None:
    logits, labels, _, _ = images
    temperature, bias, found = fitted
    p_mel = scale(logits, temperature, bias)[labels == MELANOMA, MELANOMA]
    assert (p_mel >= found.mel_threshold).mean() >= 0.95 and found.mel_threshold <= 0.10


def test_a_site_without_a_calibration_image_adds_nothing(images: tuple[np.ndarray, ...]) -> None:
    none = np.zeros((0, 7)), np.zeros(0, int), np.zeros(0, int)
    empty = calibration_counts(*none, 1.0, np.zeros(7), PRIORS.tolist())
    assert not any(np.asarray(getattr(empty, name)).any() for name in ("images", "true", "melanoma", "right_resampled"))
    assert scaling_sums(none[0], none[1], np.zeros(8)).images == 0
    with pytest.raises(DataError, match="calibration"):
        fit_scaling(lambda at: scaling_sums(none[0], none[1], at))
