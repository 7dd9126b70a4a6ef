"""Calibrated probabilities for a site where the diagnoses are rarer or more common than in the calibration split.

Bayes' rule with other priors, and the priors of unlabelled images by expectation maximisation: Saerens, Latinne,
Decaestecker, Adjusting the outputs of a classifier to new a priori probabilities, Neural Computation 14, 21 (2002). It
holds where the images of a diagnosis look alike in both places and only their frequencies differ.

Conformal sets and the thresholds for 95 % sensitivity are to be taken from the uncorrected probabilities: what they
promise, they promise within each class, whatever the frequencies are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dermaflow.errors import DataError
from dermaflow.taxonomy import CODES

MAX_ROUNDS = 1000
TOLERANCE = 1e-6
"""Largest change of a prior in the last round of expectation maximisation."""


def correct(p: np.ndarray, old: Sequence[float], new: Sequence[float]) -> np.ndarray:
    """Probabilities under other class frequencies.

    Args:
        p: [N, 7], calibrated, rows sum to 1.
        old: [7], class frequencies the probabilities were calibrated on (``calibration.priors``).
        new: [7], class frequencies of the site, in the order of `taxonomy.CODES`, sum 1.

    Returns:
        float64 [N, 7]; rows sum to 1.

    Raises:
        DataError: Priors that are none, or a class of the site that the calibration split never held.
    """
    before, after = check_priors(old, "calibration priors"), check_priors(new, "site priors")
    unknown = [code for code, was, now in zip(CODES, before, after, strict=True) if now > 0 and was == 0]
    if unknown:
        raise DataError(
            f"{' '.join(unknown)} above 0, but the calibration split held none", where="site priors",
            expected="0 for classes that were never calibrated", todo="calibrate on images that hold every class",
        )  # fmt: skip
    weighted = np.asarray(p, dtype=np.float64) * np.divide(after, before, out=np.zeros(len(CODES)), where=before > 0)
    total = weighted.sum(axis=1, keepdims=True)
    # A row that is all in classes the site says it never sees keeps what it said.
    return np.where(total > 0, weighted / np.where(total > 0, total, 1.0), p)


def estimate_priors(p: np.ndarray, old: Sequence[float]) -> np.ndarray:
    """Class frequencies of unlabelled images, by expectation maximisation.

    Args:
        p: [N, 7], calibrated probabilities of the site's images, one row a lesion, not selected by the model.
        old: [7], class frequencies they were calibrated on.

    Returns:
        float64 [7], sum 1; the maximum-likelihood estimate.

    Raises:
        DataError: No image, rows that are no probabilities, or priors that are none.
    """
    before = check_priors(old, "calibration priors")
    p = np.asarray(p, dtype=np.float64)
    if p.ndim != 2 or len(p) == 0 or not np.allclose(p.sum(axis=1), 1, atol=1e-3) or (p < 0).any():
        raise DataError(
            f"an array of {p.shape}", where="probabilities", expected=f"at least one row of {len(CODES)} that sums to 1"
        )
    priors = before
    for _ in range(MAX_ROUNDS):
        found = correct(p, before.tolist(), priors.tolist()).mean(axis=0)
        if np.abs(found - priors).max() < TOLERANCE:
            break
        priors = found / found.sum()
    return priors


def check_priors(priors: Sequence[float], where: str) -> np.ndarray:
    """The priors as float64 [7] with sum 1.

    Raises:
        DataError: Another number of values, one that is negative or not finite, or another sum.
    """
    found = np.asarray(priors, dtype=np.float64)
    if found.shape != (len(CODES),):
        raise DataError(
            f"{found.size} values", where=where, expected=f"{len(CODES)}, one for each of {' '.join(CODES)}"
        )
    if not np.isfinite(found).all() or (found < 0).any() or abs(found.sum() - 1) > 1e-3:
        raise DataError(
            f"sum {found.sum():.4g}, smallest {found.min():.4g}", where=where,
            expected="shares of the diagnoses, none negative, that sum to 1",
        )  # fmt: skip
    return found / found.sum()
