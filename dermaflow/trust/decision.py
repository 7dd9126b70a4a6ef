"""From calibrated probabilities to one diagnosis, at an operating point."""

from __future__ import annotations

import numpy as np

from dermaflow.schemas.bundle import OperatingPoint
from dermaflow.taxonomy import MELANOMA


def decide(probabilities: np.ndarray, point: OperatingPoint, priors: list[float]) -> np.ndarray:
    """Name one diagnosis an image.

    The score of class k is ``log p_k - tau * log prior_k`` (post-hoc logit adjustment, Menon et al. 2021,
    arXiv 2007.07314); the largest wins, unless ``p_mel`` reaches the melanoma threshold.

    Args:
        probabilities: [N, 7], calibrated, rows sum to 1, in the order of `taxonomy.CODES`.
        point: Prior correction and melanoma threshold.
        priors: [7], class frequencies of the calibration split.

    Returns:
        [N] int64, indices into `taxonomy.CODES`.
    """
    probabilities = np.asarray(probabilities, dtype=np.float64)
    prior = np.asarray(priors, dtype=np.float64)
    # A class the calibration split never held has no known prior; it keeps its probability instead of an endless boost.
    log_prior = np.log(np.where(prior > 0, prior, 1.0))
    score = np.log(np.maximum(probabilities, np.finfo(np.float64).tiny)) - point.tau * log_prior
    chosen = score.argmax(axis=1)
    if point.mel_threshold is not None:
        chosen[probabilities[:, MELANOMA] >= point.mel_threshold] = MELANOMA
    return chosen
