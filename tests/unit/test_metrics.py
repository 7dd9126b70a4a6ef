"""The weighted figures against scikit-learn and torchmetrics, the intervals against a loop, the decision rule."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
from torchmetrics.functional.classification import multiclass_calibration_error

from dermaflow.evaluation import metrics
from dermaflow.evaluation.intervals import estimate, lesion_weights
from dermaflow.schemas.bundle import OperatingPoint
from dermaflow.taxonomy import CODES, INDEX, MELANOMA
from dermaflow.trust.decision import decide

EXACT = 1e-9


@pytest.fixture(scope="module")
def case() -> dict[str, np.ndarray]:
    """300 images of 120 lesions, scores with ties, and 20 resamples; every class is present."""
    rng = np.random.default_rng(3)
    truth = np.concatenate([np.arange(7), rng.integers(0, 7, 293)])
    p = rng.dirichlet(np.full(7, 0.5), 300)
    p[np.arange(300), truth] += 0.5
    p = np.round(p / p.sum(axis=1, keepdims=True), 2) + 1e-4
    p /= p.sum(axis=1, keepdims=True)
    lesions = np.concatenate([np.arange(120), rng.integers(0, 120, 180)])
    return {
        "truth": truth,
        "p": p,
        "predicted": p.argmax(axis=1),
        "lesions": lesions,
        "weights": lesion_weights(lesions, 20, rng),
    }


def by_loop(figure, weights: np.ndarray) -> np.ndarray:
    return np.array([figure(row) for row in weights])


def test_class_figures_are_those_of_scikit_learn(case) -> None:
    truth, predicted, weights = case["truth"], case["predicted"], case["weights"]
    matrices = metrics.confusion_matrices(truth, predicted, weights)
    every = {"average": None, "labels": range(7), "zero_division": np.nan}
    pairs = [
        (metrics.accuracy(matrices), lambda w: sk.accuracy_score(truth, predicted, sample_weight=w)),
        (metrics.sensitivities(matrices), lambda w: sk.recall_score(truth, predicted, sample_weight=w, **every)),
        (metrics.precisions(matrices), lambda w: sk.precision_score(truth, predicted, sample_weight=w, **every)),
        (
            metrics.macro_f1(matrices),
            lambda w: sk.f1_score(truth, predicted, sample_weight=w, average="macro", labels=np.unique(truth[w > 0])),
        ),
        (
            metrics.specificities(matrices),
            lambda w: [sk.recall_score(truth != k, predicted != k, sample_weight=w) for k in range(7)],
        ),
    ]
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, by_loop(theirs, weights), atol=EXACT, rtol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a resample may miss a class that is predicted
        theirs = by_loop(
            lambda w: sk.balanced_accuracy_score(truth[w > 0], predicted[w > 0], sample_weight=w[w > 0]), weights
        )
    np.testing.assert_allclose(metrics.balanced_accuracy(matrices), theirs, atol=EXACT, rtol=0)


def test_balanced_accuracy_and_f1_leave_out_a_class_that_a_resample_misses() -> None:
    truth, predicted = np.array([0, 0, 1, 2]), np.array([0, 1, 1, 0])
    matrices = metrics.confusion_matrices(truth, predicted, np.array([[1.0, 1, 1, 0]]))
    assert metrics.balanced_accuracy(matrices)[0] == pytest.approx((0.5 + 1) / 2)
    assert metrics.macro_f1(matrices)[0] == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert np.isnan(metrics.sensitivities(matrices)[0, 2])


@pytest.mark.parametrize("k", range(7))
def test_auc_is_that_of_scikit_learn_with_ties(case, k: int) -> None:
    positive, score = case["truth"] == k, case["p"][:, k]
    assert len(np.unique(score)) < len(score)
    ours = metrics.area(*metrics.roc_curves(positive, score, case["weights"]))
    theirs = by_loop(lambda w: sk.roc_auc_score(positive, score, sample_weight=w), case["weights"])
    np.testing.assert_allclose(ours, theirs, atol=EXACT, rtol=0)


def test_sensitivity_at_specificity_is_read_from_scikit_learns_curve(case) -> None:
    positive, score, weights = case["truth"] == MELANOMA, case["p"][:, MELANOMA], case["weights"]

    def from_curve(w: np.ndarray) -> list[float]:
        fpr, tpr, _ = sk.roc_curve(positive, score, sample_weight=w, drop_intermediate=False)
        return [
            max(t for f, t in zip(fpr, tpr, strict=True) if 1 - f >= 0.90 - 1e-9),
            max(t for f, t in zip(fpr, tpr, strict=True) if 1 - f >= 0.95 - 1e-9),
            max(1 - f for f, t in zip(fpr, tpr, strict=True) if t >= 0.95 - 1e-9),
        ]

    fpr, tpr = metrics.roc_curves(positive, score, weights)
    ours = np.stack(
        [
            metrics.sensitivity_at_specificity(fpr, tpr, 0.90),
            metrics.sensitivity_at_specificity(fpr, tpr, 0.95),
            metrics.specificity_at_sensitivity(fpr, tpr, 0.95),
        ],
        axis=1,
    )
    np.testing.assert_allclose(ours, by_loop(from_curve, weights), atol=EXACT, rtol=0)


def test_a_resample_with_one_side_only_has_no_curve() -> None:
    fpr, tpr = metrics.roc_curves(np.array([True, False]), np.array([0.9, 0.1]), np.array([[1.0, 0], [0, 1], [1, 1]]))
    assert np.isnan(metrics.area(fpr, tpr)).tolist() == [True, True, False]
    assert np.isnan(metrics.sensitivity_at_specificity(fpr, tpr, 0.9)).tolist() == [True, True, False]
    assert np.isnan(metrics.specificity_at_sensitivity(fpr, tpr, 0.9)).tolist() == [True, True, False]


def test_calibration_error_is_that_of_torchmetrics_on_the_repeated_images(case) -> None:
    p, truth = case["p"], case["truth"]
    ours = metrics.expected_calibration_error(p.max(axis=1), p.argmax(axis=1) == truth, case["weights"])
    for row, value in zip(case["weights"].astype(int), ours, strict=True):
        again = np.repeat(np.arange(len(p)), row)
        theirs = multiclass_calibration_error(torch.from_numpy(p[again]), torch.from_numpy(truth[again]), 7, n_bins=15)
        assert value == pytest.approx(float(theirs), abs=1e-6)  # torchmetrics computes in float32


def test_calibration_error_of_honest_confidence_is_near_zero_and_of_boasting_is_the_boast() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.2, 1, 200_000)
    correct = rng.random(200_000) < confidence
    one = np.ones((1, 200_000))
    assert metrics.expected_calibration_error(confidence, correct, one)[0] < 0.005
    assert metrics.expected_calibration_error(np.ones(4), np.array([1, 1, 1, 0]), np.ones((1, 4)))[0] == 0.25


def test_a_resample_is_whole_lesions_and_as_many_as_there_are(case) -> None:
    lesions, weights = case["lesions"], lesion_weights(case["lesions"], 500, np.random.default_rng(1))
    for lesion in range(120):
        images = weights[:, lesions == lesion]
        assert (images == images[:, :1]).all()
    first = np.unique(lesions, return_index=True)[1]
    assert (weights[:, first].sum(axis=1) == 120).all()
    assert weights[:, first].mean() == pytest.approx(1)
    assert weights[:, 0].std() == pytest.approx(1, abs=0.15)  # a multinomial count of mean 1


def test_the_interval_is_that_of_a_plain_loop_over_the_same_draws(case) -> None:
    truth, predicted, weights = case["truth"], case["predicted"], case["weights"]
    draws = []
    for row in weights.astype(int):
        again = np.repeat(np.arange(len(truth)), row)
        draws.append(np.mean(truth[again] == predicted[again]))
    ours = estimate(0.5, metrics.accuracy(metrics.confusion_matrices(truth, predicted, weights)), 120)
    assert (ours.low, ours.high) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])), abs=EXACT)


def test_lesion_bootstrap_is_wider_than_image_bootstrap_where_images_of_a_lesion_agree() -> None:
    rng = np.random.default_rng(5)
    lesions = np.repeat(np.arange(50), 10)
    correct = np.repeat(rng.random(50) < 0.7, 10)  # all ten images of a lesion are right, or none

    def width(unit: np.ndarray) -> float:
        interval = estimate(0.7, metrics.mean(correct, lesion_weights(unit, 2000, np.random.default_rng(0))), 50)
        return interval.high - interval.low

    assert width(lesions) / width(np.arange(500)) == pytest.approx(np.sqrt(10), rel=0.15)


def test_an_interval_that_would_only_pretend_is_null_with_the_reason() -> None:
    few = estimate(0.5, np.array([0.1, 0.9]), 4)
    assert (few.value, few.low, few.high) == (0.5, None, None)
    assert "4 lesions" in few.reason
    alike = estimate(1.0, np.ones(1000), 30)
    assert alike.low is None
    assert "all resamples agree" in alike.reason
    undefined = estimate(np.nan, np.full(1000, np.nan), 30, "no image is df")
    assert (undefined.value, undefined.reason) == (None, "no image is df")


ROW = dict(zip(CODES, [0.02, 0.03, 0.10, 0.05, 0.30, 0.48, 0.02], strict=True))
PRIORS = dict(zip(CODES, [0.03, 0.05, 0.11, 0.01, 0.11, 0.67, 0.02], strict=True))


@pytest.mark.parametrize(
    ("point", "expected"),
    [
        (OperatingPoint(name="accuracy", tau=0), "nv"),
        (OperatingPoint(name="balanced", tau=1), "df"),  # 0.05 / 0.01 is the largest ratio
        (OperatingPoint(name="balanced", tau=0.5), "mel"),  # 0.30 / sqrt(0.11) = 0.90 > 0.48 / sqrt(0.67) = 0.59
        (OperatingPoint(name="melanoma_safe", tau=0, mel_threshold=0.30), "mel"),  # reaching the threshold is enough
        (OperatingPoint(name="melanoma_safe", tau=0, mel_threshold=0.31), "nv"),
        (OperatingPoint(name="melanoma_safe", tau=1, mel_threshold=0.2), "mel"),  # the threshold outranks the score
    ],
)
def test_decision_at_an_operating_point(point: OperatingPoint, expected: str) -> None:
    assert decide(np.array([list(ROW.values())]), point, list(PRIORS.values())).tolist() == [INDEX[expected]]


def test_a_class_without_a_prior_gets_no_boost_and_a_zero_probability_never_wins() -> None:
    priors = [0.0, 0.1, 0.1, 0.1, 0.1, 0.6, 0.0]
    p = np.array([[0.01, 0.0, 0.0, 0.0, 0.0, 0.99, 0.0], [0.9, 0.0, 0.0, 0.0, 0.05, 0.05, 0.0]])
    assert decide(p, OperatingPoint(name="balanced", tau=1), priors).tolist() == [INDEX["nv"], INDEX["akiec"]]
