"""Everything that is fitted after training, in one call, on the calibration split only."""

from __future__ import annotations

import logging

import numpy as np

from dermaflow.errors import DataError
from dermaflow.schemas.bundle import Calibration, Reference
from dermaflow.taxonomy import CODES
from dermaflow.trust.conformal import fit_conformal
from dermaflow.trust.ood import fit_ood
from dermaflow.trust.policy import fit_policy
from dermaflow.trust.temperature import fit_scaling, scale
from dermaflow.trust.thresholds import fit_entropy_threshold, fit_malignant_threshold, fit_operating_points

log = logging.getLogger(__name__)


def calibrate(
    logits: np.ndarray,
    features: np.ndarray | None,
    labels: np.ndarray,
    lesions: np.ndarray,
    *,
    reference: Reference | None = None,
    alpha: float = 0.10,
    seed: int = 0,
) -> Calibration:
    """Fit temperature, conformal quantiles, operating points, safety thresholds and the out-of-distribution distance.

    Args:
        logits: [N, 7], of the calibration split.
        features: [N, D], the network's last features; None leaves out the out-of-distribution distance.
        labels: [N], integers in 0..6, in the order of `taxonomy.CODES`.
        lesions: [N], lesion of each image.
        reference: Features of the training split, to be stored with the calibration; None exactly if `features` is.
        alpha: Allowed share of misses of the conformal sets.
        seed: Of folds and resamples.

    Raises:
        DataError: The split is empty, or the network's output is not finite.
    """
    logits, labels, lesions = np.asarray(logits), np.asarray(labels, dtype=np.int64), np.asarray(lesions)
    if len(labels) == 0:
        raise DataError(
            "the calibration split holds no image", expected="some of every class", todo="prepare with more lesions"
        )
    if not np.isfinite(logits).all() or (features is not None and not np.isfinite(features).all()):
        raise DataError(
            "the network's output is not finite", expected="finite logits and features",
            todo="train again with a lower learning rate",
        )  # fmt: skip
    priors = (np.bincount(labels, minlength=len(CODES)) / len(labels)).tolist()
    temperature, bias = fit_scaling(logits, labels, lesions, seed)
    p = scale(logits, temperature, bias)
    mel_threshold, points = fit_operating_points(p, labels, lesions, priors, seed)
    quantiles = fit_conformal(p, labels, lesions, alpha)
    calibration = Calibration(
        temperature=temperature,
        bias=bias.tolist(),
        priors=priors,
        conformal_alpha=alpha,
        conformal_quantiles=quantiles.tolist(),
        mel_threshold=mel_threshold,
        malignant_threshold=fit_malignant_threshold(p, labels, lesions, seed),
        entropy_threshold=fit_entropy_threshold(p),
        policy=fit_policy(p, labels, lesions, quantiles, seed),
        operating_points=points,
        ood=None if features is None or reference is None else fit_ood(features, reference),
        images=len(labels),
        lesions=len(np.unique(lesions)),
    )
    log.info(
        "calibrated on %d images of %d lesions: temperature %.3f, bias %s, tau %.2f, melanoma from %.3f",
        calibration.images, calibration.lesions, temperature, np.round(bias, 2).tolist(), points[1].tau, mel_threshold,
    )  # fmt: skip
    return calibration
