"""A linear head from sums: exact in one exchange, wherever the images lie.

On features that are frozen, linear discriminant analysis needs of the images only how many there are of each class, the
sum of their features, and the sum of the features' outer products. Sums of sites are sums over all images, so a head
from the sums of many sites is the head that pooled images would give, to rounding (Fisher 1936; shrinkage as in
Friedman, Regularized discriminant analysis, JASA 1989).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import logsumexp

from dermaflow.errors import DataError
from dermaflow.taxonomy import CODES

ABSENT = -1e4
"""Bias of a class that no site has."""
SCALES = 2.0 ** -np.arange(0, 7, 0.5)
"""Factors of a head's logits to choose from. Its covariance is that of the training images, which it fits too closely:
its logits are several times too large, and training that goes on from such a head begins with large, wrong steps."""


@dataclass(frozen=True)
class ClassSums:
    """What a site says of its images.

    Attributes:
        counts: float64 [7], images of each class.
        sums: float64 [7, D], sum of the features of each class.
        products: float64 [D, D], sum of the outer products of all features.
    """

    counts: np.ndarray
    sums: np.ndarray
    products: np.ndarray

    def __add__(self, other: ClassSums) -> ClassSums:
        return ClassSums(self.counts + other.counts, self.sums + other.sums, self.products + other.products)


def class_sums(features: np.ndarray, labels: np.ndarray) -> ClassSums:
    """Sums of a site's images.

    Args:
        features: float [N, D].
        labels: int [N], places in the taxonomy.
    """
    features = np.asarray(features, np.float64)
    of_class = np.eye(len(CODES))[labels]
    return ClassSums(of_class.sum(0), of_class.T @ features, features.T @ features)


def discriminant_head(
    sums: ClassSums, shrinkage: float = 0.1, priors: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Weights and bias of linear discriminant analysis.

    Args:
        sums: Of all sites together.
        shrinkage: 0 to 1, how far the covariance within the classes is drawn towards a sphere.
        priors: [7], class frequencies to assume; by default those of the images.

    Returns:
        float64 [7, D] and [7]. A class without an image is never predicted.

    Raises:
        DataError: Fewer than two classes have an image.
    """
    there = sums.counts > 0
    if there.sum() < 2:
        raise DataError(f"{there.sum()} classes have images", expected="at least two")
    counts, width = sums.counts[there], sums.products.shape[0]
    means = sums.sums[there] / counts[:, None]
    within = (sums.products - (means * counts[:, None]).T @ means) / counts.sum()
    within = (1 - shrinkage) * within + shrinkage * np.trace(within) / width * np.eye(width)
    assumed = counts / counts.sum() if priors is None else priors[there] / priors[there].sum()
    weight, bias = np.zeros((len(CODES), width)), np.full(len(CODES), ABSENT)
    weight[there] = np.linalg.solve(within, means.T).T
    bias[there] = np.log(assumed) - (weight[there] * means).sum(1) / 2
    return weight, bias


def scale_losses(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Sum of the log loss over images that the head was not fitted on, with its logits times each of `SCALES`.

    Args:
        logits: float [N, 7].
        labels: int [N], places in the taxonomy.

    Returns:
        float64 [S]; sums of sites add up.
    """
    scaled = SCALES[:, None, None] * np.asarray(logits, np.float64)
    losses: np.ndarray = (logsumexp(scaled, axis=2) - scaled[:, np.arange(len(labels)), labels]).sum(1)
    return losses
