"""Sets of diagnoses that hold the true one with a stated probability, for every class by itself.

One quantile for all classes would give melanoma a coverage of about 0.7 at alpha 0.10 (the common nevi pay for it), so
each class has its own (Mondrian conformal prediction, Vovk 2012, arXiv 1209.2673). The score is 1 - p of the true
class (LAC; Sadinle, Lei, Wasserman, JASA 2019).
"""

from __future__ import annotations

import numpy as np


def fit_conformal(p: np.ndarray, labels: np.ndarray, lesions: np.ndarray, alpha: float = 0.10) -> np.ndarray:
    """Class-conditional conformal quantiles.

    Images of one lesion are alike, so lesions are counted, not images: with n lesions of a class, an image of a lesion
    with m images weighs 1 / (m (n + 1)) and the new lesion, of which nothing is known, 1 / (n + 1) at infinity; the
    quantile is the smallest score that gathers a weight of 1 - alpha (Lee, Barber, Willett, Distribution-free inference
    with hierarchical data, arXiv 2306.06342). With one image a lesion this is the ceil((n + 1)(1 - alpha))-th smallest
    score. The promise holds for any image of a new lesion that is exchangeable with those of its class; that the
    temperature was fitted on the same split is not accounted for (at most eight parameters).

    Args:
        p: [N, K], calibrated probabilities.
        labels: [N], integers in 0..K-1.
        lesions: [N], lesion of each image.
        alpha: Allowed share of misses, in (0, 1).

    Returns:
        float64 [K]. 1.0, which puts the class into every set, where there are fewer than ceil(1 / alpha) - 1 lesions.
    """
    quantiles = np.ones(p.shape[1])
    for k in range(p.shape[1]):
        of_class = labels == k
        _, lesion, counts = np.unique(lesions[of_class], return_inverse=True, return_counts=True)
        scores = 1.0 - p[of_class, k]
        order = np.argsort(scores)
        weight = np.cumsum(1.0 / counts[lesion[order]]) / (len(counts) + 1)
        reached = np.searchsorted(weight, 1.0 - alpha - 1e-12)  # rounding must not ask for one lesion more
        if reached < len(order):
            quantiles[k] = scores[order[reached]]
    return quantiles


def conformal_sets(p: np.ndarray, quantiles: np.ndarray) -> np.ndarray:
    """Diagnoses that cannot be left out.

    Args:
        p: [N, K], calibrated probabilities.
        quantiles: [K], of `fit_conformal`.

    Returns:
        bool [N, K]. The most probable class is always in the set, so no set is empty.
    """
    sets = 1.0 - p <= np.asarray(quantiles) + 1e-12
    sets[np.arange(len(p)), p.argmax(axis=1)] = True
    return sets
