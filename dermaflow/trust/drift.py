"""How far new images are from those a model was trained on and calibrated with, and when that is too far.

Three looks, each with what chance alone would give, because a handful of images always differs from ten thousand:

- the mix of diagnoses: population stability index of the mean probabilities (`stability_index`);
- the pictures: share beyond the distance that one in fifty ordinary images exceeds (`dermaflow.trust.ood`), with
  Wilson's interval (J Am Stat Assoc 22, 209, 1927);
- calibration: what histology later said of lesions against the probability of malignancy they were given, by
  Spiegelhalter's z (Stat Med 5, 421, 1986), which needs no bins and is standard normal for a calibrated model.

Histology is known of lesions that somebody found suspicious. Within a probability that selection can raise the share of
malignant ones, so a crossed limit of calibration is a reason to look, not a proof.
"""

from __future__ import annotations

import math

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from dermaflow.taxonomy import CODES, MALIGNANT

FLOOR = 1e-3
"""Share that an absent class is given in the index, which would be endless otherwise."""
_MALIGNANT = np.array(MALIGNANT)
_Z95 = 1.959964  # two-sided 95 % of the normal distribution


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MixDrift(_Strict):
    """The mix of diagnoses; `chance` is what the index is on average for so few lesions of the very same mix."""

    lesions: int
    shares: dict[str, float]
    training: dict[str, float]
    psi: float
    chance: float


class DistanceDrift(_Strict):
    """Pictures unlike the training images: their share, its 95 % interval, and the share to be expected."""

    images: int
    share: float
    low: float
    high: float
    usual: float


class CalibrationDrift(_Strict):
    """Outcomes by histology against probabilities, one row a lesion.

    Attributes:
        malignant: Lesions that were malignant.
        expected: How many the probabilities had announced.
        z: Spiegelhalter's z of the probability of malignancy; beyond 2 in one calibrated model of twenty.
        brier: Multi-class Brier score, in [0, 2].
        accuracy: Share of lesions whose most probable diagnosis was right.
    """

    lesions: int
    malignant: int
    expected: float
    z: float
    brier: float
    accuracy: float


class Measures(_Strict):
    """What was measured on new images; None where there was nothing to measure it on."""

    images: int = Field(description="New images that were assessed or refused, without unreadable ones.")
    labelled_lesions: int = Field(description="Lesions with a diagnosis that no model has learnt from yet.")
    mix: MixDrift | None
    distance: DistanceDrift | None
    calibration: CalibrationDrift | None


class Limits(_Strict):
    """From where on something is done.

    Attributes:
        new_lesions: Newly labelled lesions that are reason enough to train again.
        few_lesions: With fewer of them, drift alone trains nothing: there is nothing new to learn from.
        mix: Population stability index beyond what chance gives; 0.25 is where credit scoring speaks of another
            population (Siddiqi, Credit Risk Scorecards, 2006).
        distance: Share of pictures unlike the training images, by the lower end of its interval.
        calibration: Absolute z of the outcomes; 3 happens to a calibrated model once in 370 looks.
        fewest: Lesions or images below which nothing is said about drift.
    """

    new_lesions: int = Field(100, ge=1)
    few_lesions: int = Field(20, ge=1)
    mix: float = Field(0.25, gt=0)
    distance: float = Field(0.10, gt=0, lt=1)
    calibration: float = Field(3.0, gt=0)
    fewest: int = Field(30, ge=1)


def stability_index(actual: np.ndarray, expected: np.ndarray) -> float:
    """Population stability index, the sum of ``(a - e) ln(a / e)``; 0 for equal mixes, without an upper end.

    Args:
        actual: [K] shares or counts.
        expected: [K].
    """
    a, e = (np.maximum(mix / mix.sum(), FLOOR) for mix in (np.asarray(actual, float), np.asarray(expected, float)))
    a, e = a / a.sum(), e / e.sum()
    return float(((a - e) * np.log(a / e)).sum())


def mix_drift(probabilities: np.ndarray, training: np.ndarray) -> MixDrift | None:
    """Compare the mean probabilities of new lesions with the mix of the training images.

    Args:
        probabilities: [N, 7] calibrated, one row a lesion.
        training: [7], sum 1.
    """
    if not len(probabilities):
        return None
    shares = probabilities.mean(axis=0)
    return MixDrift(
        lesions=len(probabilities),
        shares=dict(zip(CODES, shares.tolist(), strict=True)),
        training=dict(zip(CODES, np.asarray(training, float).tolist(), strict=True)),
        psi=stability_index(shares, training),
        chance=(len(CODES) - 1) / len(probabilities),
    )


def distance_drift(unlike: np.ndarray, usual: float) -> DistanceDrift | None:
    """The share of pictures unlike the training images.

    Args:
        unlike: [N] bool.
        usual: Share to be expected of pictures like them, ``1 - quantile`` of the model's distance.
    """
    if not len(unlike):
        return None
    low, high = _wilson(int(unlike.sum()), len(unlike))
    return DistanceDrift(images=len(unlike), share=float(unlike.mean()), low=low, high=high, usual=usual)


def calibration_drift(probabilities: np.ndarray, truth: np.ndarray) -> CalibrationDrift | None:
    """Outcomes against probabilities.

    Args:
        probabilities: [N, 7] calibrated, one row a lesion.
        truth: [N] int, indices into `CODES`.
    """
    if not len(truth):
        return None
    p, outcome = probabilities[:, _MALIGNANT].sum(axis=1).clip(0, 1), _MALIGNANT[truth]
    variance = float(((1 - 2 * p) ** 2 * p * (1 - p)).sum())
    surprise = float(((outcome - p) * (1 - 2 * p)).sum())
    return CalibrationDrift(
        lesions=len(truth),
        malignant=int(outcome.sum()),
        expected=float(p.sum()),
        z=surprise / math.sqrt(variance) if variance > 1e-12 else 0.0,
        brier=float(((probabilities - np.eye(len(CODES))[truth]) ** 2).sum(axis=1).mean()),
        accuracy=float((probabilities.argmax(axis=1) == truth).mean()),
    )


def drifted(found: Measures, limits: Limits) -> list[str]:
    """The limits of drift that are crossed, a sentence each."""
    said = []
    mix, distance, calibration = found.mix, found.distance, found.calibration
    if mix and mix.lesions >= limits.fewest and mix.psi - mix.chance > limits.mix:
        said.append(
            f"The mix of diagnoses differs: stability index {mix.psi:.3f} over {mix.lesions} lesions, {mix.chance:.3f} "
            f"of it by chance; the limit beyond chance is {limits.mix:g}."
        )
    if distance and distance.images >= limits.fewest and distance.low > limits.distance:
        said.append(
            f"The pictures differ: {distance.share:.1%} of {distance.images} (at least {distance.low:.1%}) are unlike "
            f"the training images, where {distance.usual:.1%} is usual; the limit is {limits.distance:.1%}."
        )
    if calibration and calibration.lesions >= limits.fewest and abs(calibration.z) > limits.calibration:
        said.append(
            f"The probabilities do not hold: {calibration.malignant} of {calibration.lesions} lesions were malignant "
            f"by histology, {calibration.expected:.1f} were announced (z {calibration.z:+.1f}); the limit is "
            f"{limits.calibration:g} either way."
        )
    return said


def reasons_to_train(found: Measures, limits: Limits) -> list[str]:
    """Why a challenger should be trained, a sentence each; empty where nothing calls for it or could be learnt."""
    drift, new = drifted(found, limits), found.labelled_lesions
    if new >= limits.new_lesions:
        return [f"{new} newly labelled lesions; the limit is {limits.new_lesions}.", *drift]
    return drift if new >= limits.few_lesions else []


def _wilson(hits: int, count: int) -> tuple[float, float]:
    share, square = hits / count, _Z95**2
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = _Z95 / (1 + square / count) * math.sqrt(share * (1 - share) / count + square / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)
