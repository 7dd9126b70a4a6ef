"""The safety policy: which lesions are suspicious although their most probable diagnosis is benign.

The most probable diagnosis is right most often, and dismisses half of the melanomas for that. So a lesion is flagged
when an image of it is called malignant, or when one of three triggers says so: ``p_mel`` or ``p_malignant`` from a
threshold on, or a malignant class in the conformal set. Thresholds carry the safety, not utilities: expected
utility alone moves the line only to p_mel of 0.2 to 0.56.

The thresholds of `trust.thresholds` aim at 95 % sensitivity whatever it costs. The policy fitted here has a budget
instead: as many melanomas as can be found while at most a fifth of the benign lesions are flagged.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from dermaflow.schemas.bundle import Calibration, SafetyPolicy
from dermaflow.taxonomy import MALIGNANT, MELANOMA
from dermaflow.trust.conformal import conformal_sets
from dermaflow.trust.thresholds import resample

MAX_FLAGGED = 0.20
"""Share of the benign lesions that may be flagged."""
SAFE_QUANTILE = 0.95
"""Of the bootstrap thresholds: in 19 of 20 resamples no more than `MAX_FLAGGED` of the benign lesions are flagged."""
SHARES = (0.02, 0.04, 0.07, 0.10, 0.13, 0.16, 0.20)
"""Of the benign lesions that p_mel by itself may flag, tried in turn; p_malignant gets the rest."""

_MALIGNANT = np.array(MALIGNANT)


def flag(p: np.ndarray, sets: np.ndarray, policy: SafetyPolicy) -> np.ndarray:
    """Which images are suspicious.

    Args:
        p: [N, 7], calibrated probabilities.
        sets: bool [N, 7], conformal sets.
        policy: Which triggers count, and from which probability on.

    Returns:
        bool [N]; an image whose most probable diagnosis is malignant always is. A lesion is suspicious if one of its
        images is.
    """
    flagged: np.ndarray = _MALIGNANT[p.argmax(axis=1)].copy()
    if policy.mel_threshold is not None:
        flagged |= p[:, MELANOMA] >= policy.mel_threshold
    if policy.malignant_threshold is not None:
        flagged |= p[:, _MALIGNANT].sum(axis=1) >= policy.malignant_threshold
    if policy.use_set:
        flagged |= sets[:, _MALIGNANT].any(axis=1)
    return flagged


def policies(calibration: Calibration) -> dict[str, SafetyPolicy]:
    """The policies that an evaluation compares: none, each trigger alone, all of them, and the bundle's own."""
    mel, malignant = calibration.mel_threshold, calibration.malignant_threshold
    return {
        "argmax": SafetyPolicy(),
        "p_mel": SafetyPolicy(mel_threshold=mel),
        "p_malignant": SafetyPolicy(malignant_threshold=malignant),
        "conformal_set": SafetyPolicy(use_set=True),
        "all_triggers": SafetyPolicy(mel_threshold=mel, malignant_threshold=malignant, use_set=True),
        "policy": calibration.policy,
    }


def fit_policy(
    p: np.ndarray,
    labels: np.ndarray,
    lesions: np.ndarray,
    quantiles: np.ndarray,
    seed: int,
    budget: float = MAX_FLAGGED,
) -> SafetyPolicy:
    """Choose triggers and thresholds on the calibration split.

    Every candidate keeps to the budget in `SAFE_QUANTILE` of the lesion bootstrap's resamples; the one that dismisses
    the fewest melanomas wins, then the one that dismisses the fewest malignant lesions, then the simplest.

    Args:
        p: [N, 7], calibrated probabilities.
        labels: [N], integers in 0..6.
        lesions: [N], lesion of each image.
        quantiles: [7], conformal quantiles.
        seed: Of the lesion bootstrap.
        budget: Share of the benign lesions that may be flagged.

    Returns:
        A policy; without a benign or a malignant lesion to learn from, every trigger stays off.
    """
    names, first, lesion = np.unique(lesions, return_index=True, return_inverse=True)
    truth = labels[first]
    benign = ~_MALIGNANT[truth]
    if benign.all() or not benign.any():
        return SafetyPolicy()

    def by_lesion(values: Any) -> np.ndarray:
        largest = np.full(len(names), -np.inf)
        np.maximum.at(largest, lesion, np.asarray(values, dtype=np.float64))
        return largest

    mel, malignant = by_lesion(p[:, MELANOMA]), by_lesion(p[:, _MALIGNANT].sum(axis=1))
    called = by_lesion(_MALIGNANT[p.argmax(axis=1)]) > 0
    in_set = called | (by_lesion(conformal_sets(p, quantiles)[:, _MALIGNANT].any(axis=1)) > 0)
    weights = resample(names[benign], seed).astype(np.float64)
    best, fewest = SafetyPolicy(), (np.inf, np.inf)
    for policy in _candidates(mel, malignant, called, in_set, benign, weights, budget):
        flagged = in_set if policy.use_set else called
        if policy.mel_threshold is not None:
            flagged = flagged | (mel >= policy.mel_threshold)
        if policy.malignant_threshold is not None:
            flagged = flagged | (malignant >= policy.malignant_threshold)
        dismissed = int((~flagged & (truth == MELANOMA)).sum()), int((~flagged & ~benign).sum())
        if dismissed < fewest:
            best, fewest = policy, dismissed
    return best


def _candidates(
    mel: np.ndarray, malignant: np.ndarray, called: np.ndarray, in_set: np.ndarray, benign: np.ndarray,
    weights: np.ndarray, budget: float,
) -> Iterator[SafetyPolicy]:  # fmt: skip
    """Policies within the budget, the simplest first. All arrays but `weights` [R, benign lesions] are by lesion."""
    for use_set, base in ((False, called), (True, in_set)):
        if np.quantile(_share(base[benign], weights), SAFE_QUANTILE) > budget:
            continue
        yield SafetyPolicy(use_set=use_set)
        yield SafetyPolicy(mel_threshold=_cut(mel[benign], base[benign], weights, budget), use_set=use_set)
        yield SafetyPolicy(malignant_threshold=_cut(malignant[benign], base[benign], weights, budget), use_set=use_set)
        for share in SHARES:
            if share >= budget:
                break
            first = float(np.quantile(mel[benign], 1 - share))
            both = base | (mel >= first)
            if np.quantile(_share(both[benign], weights), SAFE_QUANTILE) > budget:
                break
            rest = _cut(malignant[benign], both[benign], weights, budget)
            yield SafetyPolicy(mel_threshold=first, malignant_threshold=rest, use_set=use_set)


def _share(flagged: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Share of the benign lesions that are flagged, in each resample: [B], [R, B] -> [R]."""
    return weights @ flagged / weights.sum(axis=1)


def _cut(score: np.ndarray, flagged: np.ndarray, weights: np.ndarray, budget: float) -> float:
    """The smallest threshold that keeps the flagged benign lesions within the budget in most resamples.

    Args:
        score: [B], of the benign lesions.
        flagged: [B] bool, flagged already.
        weights: [R, B].
        budget: Share that may be flagged.
    """
    effective = np.where(flagged, np.inf, score)
    order = np.argsort(-effective, kind="stable")
    shares = np.cumsum(weights[:, order], axis=1) / weights.sum(axis=1, keepdims=True)
    most = np.quantile(shares, SAFE_QUANTILE, axis=0)  # if all down to here were flagged
    beyond = int(np.searchsorted(most, budget, side="right"))
    if beyond == len(order):
        return 0.0
    return float(np.nextafter(effective[order[beyond]], np.inf))  # that one is not flagged, all above are
