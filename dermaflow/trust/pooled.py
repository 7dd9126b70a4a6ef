"""Calibration from counts: what `calibrate` fits on images, fitted on sums over sites that keep their images.

Temperature and bias need sums of the loss, its gradient and its curvature, a few times (Newton's method); everything
after them is a quantile or a best threshold, and needs histograms, once. Sums of sites are sums over all images, so the
result is that of pooled images: temperature and bias to rounding, thresholds and quantiles to a bin, always towards
the safe side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
from scipy.special import log_softmax, softmax

from dermaflow.errors import DataError
from dermaflow.schemas.bundle import Calibration, OodSpec, OperatingPoint, SafetyPolicy
from dermaflow.taxonomy import CODES, MALIGNANT, MELANOMA
from dermaflow.trust.decision import decide
from dermaflow.trust.ood import QUANTILE
from dermaflow.trust.temperature import PRIOR_SD, scale
from dermaflow.trust.thresholds import (
    MAX_MELANOMA_THRESHOLD,
    MELANOMA_SENSITIVITY,
    SAFE_QUANTILE,
    TAUS,
    entropy,
    resample,
)

EDGES = np.concatenate([[0.0], np.geomspace(1e-5, 1.0, 500)])
"""Of the bins of probabilities, 2.3 % of the value wide: a threshold of 0.10 is met to 0.002."""
DISTANCES = np.linspace(0.0, 10.0, 1001)
"""Of the bins of the out-of-distribution distance, which is about 1 for a training image."""
ENTROPIES = np.linspace(0.0, float(np.log(len(CODES))), 401)
RESAMPLES = 200

_MALIGNANT = np.array(MALIGNANT)


@dataclass(frozen=True)
class Sums:
    """Arrays that add up over sites."""

    def __add__(self, other: Sums) -> Sums:
        return type(self)(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class ScalingSums(Sums):
    """Of the log loss at one temperature and bias.

    Attributes:
        images: Their number.
        loss: Sum of the log loss.
        gradient: float64 [8], by log temperature and bias.
        curvature: float64 [8, 8], the Fisher information.
    """

    images: np.ndarray
    loss: np.ndarray
    gradient: np.ndarray
    curvature: np.ndarray


def scaling_sums(logits: np.ndarray, labels: np.ndarray, parameters: np.ndarray) -> ScalingSums:
    """What one site says of a temperature and a bias.

    Args:
        logits: [N, 7], of its calibration split.
        labels: int [N].
        parameters: [8], log temperature and bias.
    """
    scaled = np.asarray(logits, np.float64) * np.exp(-parameters[0])
    shifted = scaled + parameters[1:]
    p, truth = softmax(shifted, axis=1), np.eye(len(CODES))[labels]
    # d logits / d parameters: -scaled for the log temperature, 1 for each bias
    slopes = np.concatenate([-scaled[:, None, :], np.broadcast_to(np.eye(len(CODES)), (len(p), 7, 7))], axis=1)
    mean = (slopes * p[:, None, :]).sum(2)
    curvature = np.einsum("nik,nk,njk->ij", slopes, p, slopes) - mean.T @ mean
    return ScalingSums(
        np.array(float(len(p))), -(log_softmax(shifted, axis=1) * truth).sum(),
        np.einsum("nik,nk->i", slopes, p - truth), curvature,
    )  # fmt: skip


def fit_scaling(ask: Callable[[np.ndarray], ScalingSums], most: int = 15) -> tuple[float, np.ndarray]:
    """Temperature and bias with the largest likelihood under the prior of `trust.temperature`.

    Args:
        ask: Gives the sums of all sites at [8] parameters; one exchange with every site.
        most: Exchanges at most.

    Returns:
        Temperature, and float64 [7] bias.

    Raises:
        DataError: No site has a calibration image.
    """

    def objective(sums: ScalingSums, at: np.ndarray) -> float:
        return float(sums.loss + at @ at / (2 * PRIOR_SD**2))

    at = np.zeros(1 + len(CODES))
    sums = ask(at)
    if not sums.images:
        raise DataError("no site has a calibration image", todo="prepare with more lesions")
    best, asked = objective(sums, at), 1
    while asked < most:
        gradient = sums.gradient + at / PRIOR_SD**2
        step = np.linalg.solve(sums.curvature + np.eye(len(at)) / PRIOR_SD**2, gradient)
        if np.abs(step).max() < 1e-5:
            break
        share = 1.0
        while asked < most:
            found = ask(at - share * step)
            asked += 1
            value = objective(found, at - share * step)
            if value <= best + 1e-9:
                at, sums, best = at - share * step, found, value
                break
            share /= 2
    return float(np.exp(at[0])), at[1:]


@dataclass(frozen=True)
class CalibrationCounts(Sums):
    """Histograms of the calibration split. B bins of `EDGES`, R resamples of a site's lesions, T of `TAUS`.

    Attributes:
        images: [7], by class.
        lesions: [7].
        true: [7, B], probability of the true class; each lesion of m images gives each of them 1 / m.
        melanoma: [R, B], p_mel of melanomas.
        malignant: [R, B], p_malignant of malignant images.
        entropies: [E].
        distances: [D], of the out-of-distribution score; zeros without it.
        right: [T, 7], images named rightly.
        right_resampled: [R, T, 7].
        drawn: [R, 7], images in each resample.
    """

    images: np.ndarray
    lesions: np.ndarray
    true: np.ndarray
    melanoma: np.ndarray
    malignant: np.ndarray
    entropies: np.ndarray
    distances: np.ndarray
    right: np.ndarray
    right_resampled: np.ndarray
    drawn: np.ndarray


def calibration_counts(
    logits: np.ndarray, labels: np.ndarray, lesions: np.ndarray, temperature: float, bias: np.ndarray,
    priors: list[float], distances: np.ndarray | None = None, seed: int = 0,
) -> CalibrationCounts:  # fmt: skip
    """What one site says of its calibration split.

    Args:
        logits: [N, 7].
        labels: int [N].
        lesions: [N], lesion of each image.
        temperature: Of all sites.
        bias: [7], of all sites.
        priors: [7], class frequencies of all sites' calibration splits.
        distances: [N], out-of-distribution scores.
        seed: Of the resamples.
    """
    p = scale(logits, temperature, bias)
    bins, classes = len(EDGES) - 1, np.eye(len(CODES))[labels]
    of_class, mates = np.zeros(len(CODES)), np.ones(len(labels))
    for k in range(len(CODES)):
        _, lesion, count = np.unique(lesions[labels == k], return_inverse=True, return_counts=True)
        of_class[k], mates[labels == k] = len(count), count[lesion]
    true = np.zeros((len(CODES), bins))
    np.add.at(true, (labels, _bin(p[np.arange(len(labels)), labels], EDGES)), 1 / mates)
    drawn = resample(lesions, seed, RESAMPLES).astype(float) if len(labels) else np.zeros((RESAMPLES, 0))

    def resampled(score: np.ndarray, among: np.ndarray) -> np.ndarray:
        return drawn[:, among] @ np.eye(bins)[_bin(score[among], EDGES)]

    right = np.stack([decide(p, OperatingPoint(name="balanced", tau=float(t)), priors) == labels for t in TAUS], axis=1)
    far = np.zeros(len(DISTANCES) - 1) if distances is None else _histogram(distances, DISTANCES)
    return CalibrationCounts(
        images=classes.sum(0), lesions=of_class, true=true,
        melanoma=resampled(p[:, MELANOMA], labels == MELANOMA),
        malignant=resampled(p[:, _MALIGNANT].sum(1), _MALIGNANT[labels]),
        entropies=_histogram(entropy(p), ENTROPIES), distances=far, right=right.T.astype(float) @ classes,
        right_resampled=np.stack([drawn @ (right[:, [t]] * classes) for t in range(len(TAUS))], axis=1),
        drawn=drawn @ classes,
    )  # fmt: skip


def calibration_of(counts: CalibrationCounts, temperature: float, bias: np.ndarray, alpha: float = 0.10) -> Calibration:
    """Everything of a bundle's calibration, out of the counts of all sites.

    The safety policy is the two thresholds of 95 % sensitivity; the one with a budget of flagged benign lesions needs
    images (`trust.policy`), and a site fits it on its own by `dermaflow calibrate`.

    Args:
        counts: Of all sites.
        temperature: As the counts were made with.
        bias: [7].
        alpha: Allowed share of misses of the conformal sets.
    """
    priors = (counts.images / counts.images.sum()).tolist()
    mel = _sensitive(counts.melanoma)
    mel = MAX_MELANOMA_THRESHOLD if mel is None else min(mel, MAX_MELANOMA_THRESHOLD)
    malignant = _sensitive(counts.malignant)
    malignant = MAX_MELANOMA_THRESHOLD if malignant is None else malignant
    ood = None
    if counts.distances.sum():
        ood = OodSpec(quantile=QUANTILE, threshold=_upper(counts.distances, DISTANCES, QUANTILE))
    return Calibration(
        temperature=temperature, bias=list(map(float, bias)), priors=priors, conformal_alpha=alpha,
        conformal_quantiles=_conformal(counts, alpha), mel_threshold=mel, malignant_threshold=malignant,
        entropy_threshold=_upper(counts.entropies, ENTROPIES, 0.95),
        policy=SafetyPolicy(mel_threshold=mel, malignant_threshold=malignant),
        operating_points=[
            OperatingPoint(name="accuracy", tau=_accurate_tau(counts)),
            OperatingPoint(name="balanced", tau=_balanced_tau(counts)),
            OperatingPoint(name="melanoma_safe", tau=0.0, mel_threshold=mel),
        ],
        ood=ood, images=int(counts.images.sum()), lesions=int(counts.lesions.sum()),
    )  # fmt: skip


def _bin(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    return np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)


def _histogram(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    return np.bincount(_bin(values, edges), minlength=len(edges) - 1).astype(float)


def _upper(histogram: np.ndarray, edges: np.ndarray, quantile: float) -> float:
    """Upper edge of the bin in which a quantile lies."""
    reached = np.searchsorted(np.cumsum(histogram) / histogram.sum(), quantile - 1e-12)
    return float(edges[min(int(reached) + 1, len(edges) - 1)])


def _conformal(counts: CalibrationCounts, alpha: float) -> list[float]:
    """As `fit_conformal`, from the largest probability of the true class down, rounded towards larger sets."""
    quantiles = []
    for weights, lesions in zip(counts.true, counts.lesions, strict=True):
        gathered = np.cumsum(weights[::-1]) / (lesions + 1)
        reached = int(np.searchsorted(gathered, 1 - alpha - 1e-12))
        quantiles.append(1.0 if reached >= len(weights) else float(1 - EDGES[len(weights) - 1 - reached]))
    return quantiles


def _sensitive(resampled: np.ndarray) -> float | None:
    """As the melanoma threshold of `trust.thresholds`, rounded down."""
    resampled = resampled[resampled.sum(1) > 0]
    if not len(resampled):
        return None
    total = resampled.sum(1, keepdims=True)
    below = np.cumsum(resampled, axis=1) - resampled
    allowed = below <= (1 - MELANOMA_SENSITIVITY) * total + 1e-9
    places = np.where(allowed & (resampled > 0), np.arange(resampled.shape[1]), 0).max(1)
    return float(np.quantile(EDGES[places], SAFE_QUANTILE, method="lower"))


def _accurate_tau(counts: CalibrationCounts) -> float:
    total, all_right = counts.drawn.sum(1), counts.right_resampled.sum(2)
    chosen = 0.0
    for place, tau in enumerate(TAUS):
        if 0 < tau <= 1:
            loss = (counts.right[0] - counts.right[place]).sum() / counts.images.sum()
            if loss > ((all_right[:, 0] - all_right[:, place]) / total).std():
                break
            chosen = float(tau)
    return chosen


def _balanced_tau(counts: CalibrationCounts) -> float:
    with np.errstate(invalid="ignore", divide="ignore"):
        recalls = counts.right_resampled / counts.drawn[:, None, :]
    balanced = np.nanmean(recalls[:, :, counts.images > 0], axis=2)
    return float(np.quantile(TAUS[balanced.argmax(axis=1)], 0.5, method="nearest"))
