"""Every model on every site's test lesions: counts that a site may send, and the matrix that is made of them.

A site counts its own images and resamples its own lesions, so that its intervals are known where no score of an image
is. All sites together are the sum of their counts, resample by resample (a bootstrap stratified by site).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel, ConfigDict

from dermaflow.evaluation import metrics
from dermaflow.evaluation.figures import Counts, Estimate
from dermaflow.evaluation.intervals import estimate, lesion_weights
from dermaflow.taxonomy import CODES, MELANOMA

NOT_HERE = "no test image here"


@dataclass(frozen=True)
class TestCounts:
    """One model on the test split of one site, or of several together.

    Attributes:
        confusion: int64 [7, 7] images, truth by the most probable class.
        lesions: int64 [7], lesions of each class.
        hits: int64 [R, 7], images called right, by class, in each resample of the lesions.
        totals: int64 [R, 7], images of each class in each resample.
    """

    __test__ = False  # it is no test of pytest's

    confusion: np.ndarray
    lesions: np.ndarray
    hits: np.ndarray
    totals: np.ndarray

    def __add__(self, other: TestCounts) -> TestCounts:
        return TestCounts(
            self.confusion + other.confusion, self.lesions + other.lesions, self.hits + other.hits,
            self.totals + other.totals,
        )  # fmt: skip


def count_test(
    labels: np.ndarray, predicted: np.ndarray, lesions: np.ndarray, *, seed: int, resamples: int
) -> TestCounts:
    """Count one model's answers on one site's test split.

    Args:
        labels: int [N], indices into `CODES`.
        predicted: int [N].
        lesions: [N], lesion of each image.
        seed: Of the draws: the same one resamples two models alike.
        resamples: Of the lesions.
    """
    confusion = np.zeros((7, 7), np.int64)
    np.add.at(confusion, (labels, predicted), 1)
    hits, totals = np.zeros((2, resamples, 7), np.int64)
    if len(labels):
        truth = np.eye(7, dtype=np.int64)[labels]
        drawn = lesion_weights(lesions, resamples, np.random.default_rng(seed)).astype(np.int64)
        hits, totals = drawn @ (truth * (predicted == labels)[:, None]), drawn @ truth
    of_class = [len(set(lesions[labels == k])) for k in range(7)]
    return TestCounts(confusion, np.array(of_class, np.int64), hits, totals)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Cell(_Strict):
    """One model on one site's test split, at its most probable class before calibration.

    Attributes:
        counts: What the figures rest on; the balanced accuracy is the mean over the classes listed there.
        absent: Codes of the classes that the site's test split does not hold, and that are not counted.
    """

    counts: Counts
    absent: list[str]
    accuracy: Estimate
    balanced_accuracy: Estimate
    melanoma_sensitivity: Estimate


class Row(_Strict):
    """One model everywhere.

    Attributes:
        model: Its name.
        trained_on: Names of the sites that trained it; empty where that is not known.
        cells: By site.
        everything: All sites' test images together.
        mean_of_sites: Mean of the sites' balanced accuracies, each over its own classes.
    """

    model: str
    trained_on: list[str]
    cells: dict[str, Cell]
    everything: Cell
    mean_of_sites: Estimate


class Matrix(_Strict):
    """Models by sites."""

    format: str = "dermaflow-matrix/1"
    resamples: int
    sites: list[str]
    rows: list[Row]


def cell_of(test: TestCounts) -> Cell:
    """Figures with intervals from counts."""
    images, lesions = test.confusion.sum(1), test.lesions
    there = images > 0
    value = test.confusion[None].astype(np.float64)
    return Cell(
        counts=Counts(
            images=int(images.sum()), lesions=int(lesions.sum()),
            images_by_class={CODES[k]: int(images[k]) for k in np.flatnonzero(there)},
            lesions_by_class={CODES[k]: int(lesions[k]) for k in np.flatnonzero(there)},
        ),
        absent=[CODES[k] for k in np.flatnonzero(~there)],
        accuracy=estimate(
            float(metrics.accuracy(value)[0]), _shares(test.hits.sum(1), test.totals.sum(1)), int(lesions.sum()),
            NOT_HERE,
        ),
        balanced_accuracy=estimate(
            float(metrics.balanced_accuracy(value)[0]), _balanced(test), int(lesions.sum()), NOT_HERE
        ),
        melanoma_sensitivity=estimate(
            float(metrics.sensitivities(value)[0, MELANOMA]),
            _shares(test.hits[:, MELANOMA], test.totals[:, MELANOMA]), int(lesions[MELANOMA]), "no melanoma here",
        ),
    )  # fmt: skip


def row_of(model: str, tests: dict[str, TestCounts], trained_on: Sequence[str] = ()) -> Row:
    """One model's row from its counts at each site, all with as many resamples."""
    first, *others = tests.values()
    whole = sum(others, first)
    there = [test for test in tests.values() if test.confusion.any()]
    values = [float(metrics.balanced_accuracy(test.confusion[None].astype(np.float64))[0]) for test in there]
    draws = metrics.mean_of_defined(np.stack([_balanced(test) for test in there], axis=1)) if there else np.zeros(0)
    return Row(
        model=model, trained_on=sorted(trained_on), cells={site: cell_of(test) for site, test in tests.items()},
        everything=cell_of(whole),
        mean_of_sites=estimate(
            float(np.mean(values)) if values else np.nan, draws, int(whole.lesions.sum()), NOT_HERE
        ),
    )  # fmt: skip


def _balanced(test: TestCounts) -> np.ndarray:
    """Balanced accuracy in each resample, over the classes that it holds: [R]."""
    return metrics.mean_of_defined(_shares(test.hits, test.totals))


def _shares(hits: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """Hits of totals, NaN where there is none."""
    found: np.ndarray = np.divide(hits, totals, out=np.full(hits.shape, np.nan), where=totals > 0)
    return found


@dataclass(frozen=True)
class Reliability:
    """How far one site can take the calibrated probabilities at their word, from its test split.

    Attributes:
        bins: float64 [15, 3]: images, sum of the largest probability, images called right, in equal bins of it.
        error: float64: expected calibration error and its 95 % interval [3]; without the interval where it cannot be
            had [1]; empty without an image.
    """

    bins: np.ndarray
    error: np.ndarray


def reliability_of(
    probabilities: np.ndarray, labels: np.ndarray, lesions: np.ndarray, *, seed: int, resamples: int
) -> Reliability:
    """Count the calibrated probabilities [N, 7] of one site; the other arguments as for `count_test`."""
    bins = np.zeros((metrics.ECE_BINS, 3))
    if not len(labels):
        return Reliability(bins, np.zeros(0))
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    np.add.at(bins, metrics.calibration_bins(confidence), np.stack([np.ones(len(right)), confidence, right], axis=1))
    weights = np.vstack([np.ones(len(right)), lesion_weights(lesions, max(resamples, 1), np.random.default_rng(seed))])
    found = metrics.expected_calibration_error(confidence, right, weights)
    error = estimate(float(found[0]), found[1:], len(np.unique(lesions)))
    return Reliability(bins, np.array([x for x in (error.value, error.low, error.high) if x is not None]))


def calibration_error(bins: np.ndarray) -> float:
    """Expected calibration error from bins [15, 3], of one site or the sum of several; NaN without an image."""
    images = bins[:, 0].sum()
    return float(np.abs(bins[:, 1] - bins[:, 2]).sum() / images) if images else np.nan
