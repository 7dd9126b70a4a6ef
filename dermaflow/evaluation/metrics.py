"""Weighted figures over many resamples at once: the twins of scikit-learn's metrics that the intervals are drawn from.

``weights`` is always [R, N] float64, one row a resample, and a figure is [R], NaN where a resample does not define it.
The tests hold each equal to scikit-learn or torchmetrics with the same weights.
"""

from __future__ import annotations

import numpy as np

from dermaflow.taxonomy import CODES

ECE_BINS = 15  # Guo et al. 2017, arXiv 1706.04599
_TINY = 1e-9  # forgives rounding where a rate is compared with a declared one; far below one image's share


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)


def mean_of_defined(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis without the NaN, [R, K] -> [R]; NaN where nothing is defined."""
    defined = np.isfinite(values)
    return _ratio(np.where(defined, values, 0.0).sum(axis=-1), defined.sum(axis=-1).astype(np.float64))


def mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted mean of one value an image: [N], [R, N] -> [R]."""
    return _ratio(weights @ values.astype(np.float64), weights.sum(axis=1))


def confusion_matrices(truth: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted confusion matrices [R, 7, 7]; the row is the true class.

    Args:
        truth: [N] int, indices into `CODES`.
        predicted: [N] int.
        weights: [R, N].
    """
    classes = len(CODES)
    cell = np.eye(classes * classes)[truth * classes + predicted]
    return (weights @ cell).reshape(-1, classes, classes)


def accuracy(matrices: np.ndarray) -> np.ndarray:
    """Share of images called right: [R, 7, 7] -> [R]."""
    return _ratio(np.trace(matrices, axis1=1, axis2=2), matrices.sum(axis=(1, 2)))


def sensitivities(matrices: np.ndarray) -> np.ndarray:
    """By class, [R, 7, 7] -> [R, 7]; NaN for a class with no image."""
    return _ratio(np.diagonal(matrices, axis1=1, axis2=2).copy(), matrices.sum(axis=2))


def specificities(matrices: np.ndarray) -> np.ndarray:
    """By class against the rest, [R, 7, 7] -> [R, 7]; NaN where every image is of the class."""
    right = np.diagonal(matrices, axis1=1, axis2=2)
    total, truly, called = matrices.sum(axis=(1, 2))[:, None], matrices.sum(axis=2), matrices.sum(axis=1)
    return _ratio(total - truly - called + right, total - truly)


def precisions(matrices: np.ndarray) -> np.ndarray:
    """By class (positive predictive value), [R, 7, 7] -> [R, 7]; NaN for a class that is never called."""
    return _ratio(np.diagonal(matrices, axis1=1, axis2=2).copy(), matrices.sum(axis=1))


def balanced_accuracy(matrices: np.ndarray) -> np.ndarray:
    """Mean sensitivity over the classes present in the resample: [R, 7, 7] -> [R]."""
    return mean_of_defined(sensitivities(matrices))


def macro_f1(matrices: np.ndarray) -> np.ndarray:
    """Mean F1 over the classes present in the resample: [R, 7, 7] -> [R]."""
    right, truly = np.diagonal(matrices, axis1=1, axis2=2), matrices.sum(axis=2)
    f1 = _ratio(2 * right, truly + matrices.sum(axis=1))
    return mean_of_defined(np.where(truly > 0, f1, np.nan))


def roc_curves(positive: np.ndarray, score: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One ROC curve a resample, on the thresholds of the whole sample.

    Args:
        positive: [N] bool.
        score: [N]; equal scores share a threshold.
        weights: [R, N].

    Returns:
        False and true positive rate, [R, T] each, from (0, 0) to (1, 1); NaN where a resample holds one side only.
    """
    order = np.argsort(-score, kind="stable")
    starts = np.flatnonzero(
        np.append(np.append(True, np.diff(score[order]) != 0), True)
    )  # of each threshold, and the end
    tp, fp = np.zeros((2, len(weights), len(order) + 1))
    sorted_weights = weights[:, order]
    np.cumsum(sorted_weights, axis=1, out=fp[:, 1:])
    np.cumsum(sorted_weights * positive[order], axis=1, out=tp[:, 1:])
    if len(starts) < tp.shape[1]:
        tp, fp = tp[:, starts], fp[:, starts]
    fp -= tp
    one_sided = (tp[:, -1] == 0) | (fp[:, -1] == 0)
    tp[one_sided] = fp[one_sided] = np.nan
    tp /= tp[:, -1:].copy()
    fp /= fp[:, -1:].copy()
    return fp, tp


def area(fpr: np.ndarray, tpr: np.ndarray) -> np.ndarray:
    """Area under each ROC curve by the trapezoid rule: [R, T], [R, T] -> [R]."""
    return np.trapezoid(tpr, fpr, axis=1)


def sensitivity_at_specificity(fpr: np.ndarray, tpr: np.ndarray, specificity: float) -> np.ndarray:
    """Best sensitivity among the thresholds with at least this specificity: [R, T], [R, T] -> [R]."""
    return np.where(fpr > 1 - specificity + _TINY, 0.0, tpr).max(axis=1)


def specificity_at_sensitivity(fpr: np.ndarray, tpr: np.ndarray, sensitivity: float) -> np.ndarray:
    """Best specificity among the thresholds with at least this sensitivity: [R, T], [R, T] -> [R]."""
    return np.where(tpr < sensitivity - _TINY, 0.0, 1 - fpr).max(axis=1)


def calibration_bins(confidence: np.ndarray) -> np.ndarray:
    """Bin of each confidence in [0, 1]: [N] -> [N] int in 0 .. 14; a bin holds its lower edge, the last one also 1."""
    edges = np.linspace(0, 1, ECE_BINS + 1)
    return np.minimum(np.searchsorted(edges, confidence, side="right") - 1, ECE_BINS - 1)


def expected_calibration_error(confidence: np.ndarray, correct: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean gap between confidence and accuracy over the bins: [N], [N] bool, [R, N] -> [R]."""
    gap = np.eye(ECE_BINS)[calibration_bins(confidence)] * (confidence - correct)[:, None]
    return _ratio(np.abs(weights @ gap).sum(axis=1), weights.sum(axis=1))
