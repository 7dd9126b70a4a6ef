"""How far an image lies from everything the model was trained on, and which training lesions lie nearest.

The score is the Mahalanobis distance of the network's last features from those of the training split (Lee et al., A
simple unified framework for detecting out-of-distribution samples, NeurIPS 2018; here with one mean for all classes),
with the covariance shrunk after Ledoit and Wolf (J Multivariate Anal 88, 365, 2004). From which distance on an image is
unusual is learnt on the calibration split, whose lesions the network has never seen.

Chosen on the calibration split of HAM10000 with a MobileNetV2 of five epochs at 96x128. At 2 % false alarms, mean share
caught of 16 kinds of drawn and spoilt images (``bench/nonlesions.py``): the k-th nearest neighbour among L2-normalised
features (Sun et al., ICML 2022) 9 to 10 % for k 1, 2, 100 and 200; Mahalanobis among L2-normalised features 31 to 41 %;
among the features as they are 66 %, with one mean for each class too. Their length counts, and the directions in which
training images hardly differ. The catch rates that matter are those together with the quality gate: ``bench/trust.py``.

Neighbours are found by the angle between features: for pictures that look alike the length says nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dermaflow.errors import DataError
from dermaflow.schemas.bundle import OodSpec, Reference

QUANTILE = 0.98
"""Share of the calibration images that counts as ordinary. At 0.99 half as many scenes in skin's colours are caught."""


def make_reference(
    features: np.ndarray, image_ids: Sequence[str], lesion_ids: Sequence[str], dx: Sequence[str]
) -> Reference:
    """Keep the features of the training split.

    Args:
        features: [N, D], the network's last features.
        image_ids: [N].
        lesion_ids: [N].
        dx: [N], codes of the diagnoses.

    Returns:
        The reference: mean, whitening matrix, and the features themselves L2-normalised in float16.

    Raises:
        DataError: There is no image, or a feature is not finite.
    """
    if len(features) == 0 or not np.isfinite(features).all():
        raise DataError(
            "no features" if len(features) == 0 else "features of the training split are not finite",
            expected="finite features of at least one image", todo="train again with a lower learning rate",
        )  # fmt: skip
    from sklearn.covariance import ledoit_wolf  # takes a second to import, which those who only score need not wait for

    mean = features.mean(axis=0, dtype=np.float64)
    covariance, _ = ledoit_wolf(features - mean, assume_centered=True)
    return Reference(
        features=_normalise(features).astype(np.float16),
        mean=mean.astype(np.float32),
        whitener=_whitener(covariance),
        image_ids=tuple(image_ids),
        lesion_ids=tuple(lesion_ids),
        dx=tuple(dx),
    )


def reference_of_sums(count: float, total: np.ndarray, products: np.ndarray) -> Reference:
    """A reference that names no image, from sums over the training splits of several sites.

    The covariance is shrunk by the oracle approximation (Chen et al., IEEE Trans Signal Process 58, 5016, 2010), which
    needs no more of the images than their covariance; that of Ledoit and Wolf needs fourth moments.

    Args:
        count: Images.
        total: float64 [D], sum of the features.
        products: float64 [D, D], sum of their outer products.

    Raises:
        DataError: There is no image, or a sum is not finite.
    """
    if count <= 0 or not np.isfinite(products).all():
        raise DataError("the sums are of no image, or not finite", expected="finite features of at least one image")
    mean, width = total / count, len(total)
    covariance = products / count - np.outer(mean, mean)
    size, square = np.trace(covariance), np.square(covariance).sum()
    top = square / width**2 + (size / width) ** 2
    bottom = (count + 1) * (square / width**2 - (size / width) ** 2 / width)
    share = 1.0 if bottom <= 0 else min(1.0, top / bottom)
    shrunk = (1 - share) * covariance + share * size / width * np.eye(width)
    none = np.zeros((0, width), np.float16)
    return Reference(none, mean.astype(np.float32), _whitener(shrunk), (), (), ())


def _whitener(covariance: np.ndarray) -> np.ndarray:
    variance, axes = np.linalg.eigh(covariance)
    variance = np.maximum(variance, 1e-6 * variance.mean() + 1e-12)  # a handful of equal images has none
    whitener: np.ndarray = (axes / np.sqrt(variance * len(variance))).astype(np.float32)
    return whitener


def fit_ood(features: np.ndarray, reference: Reference, quantile: float = QUANTILE) -> OodSpec:
    """The distance from the training images that few calibration images exceed.

    Args:
        features: [M, D], the network's last features of the calibration split.
        reference: Of the training split; no lesion is in both.
        quantile: Share of the calibration images that counts as ordinary.
    """
    return OodSpec(quantile=quantile, threshold=float(np.quantile(ood_score(features, reference), quantile)))


def ood_score(features: np.ndarray, reference: Reference) -> np.ndarray:
    """Distance from the training images.

    Args:
        features: [M, D], the network's last features, not normalised.
        reference: Of the training split.

    Returns:
        float32 [M], about 1 for a training image; above the specification's threshold an image is unusual.
    """
    away = np.asarray(features, dtype=np.float32) - reference.mean
    distance: np.ndarray = np.linalg.norm(away @ reference.whitener, axis=1)
    return distance


@dataclass(frozen=True)
class Neighbour:
    """A training lesion that looks alike to the network; `distance` is 0 (the same) to 2 (opposite)."""

    image_id: str
    lesion_id: str
    dx: str
    distance: float


def nearest_lesions(features: np.ndarray, reference: Reference, count: int = 5) -> list[Neighbour]:
    """The nearest training lesions of one image, each by its nearest image, the nearest first.

    Args:
        features: [D], the network's last features, not normalised.
        reference: Of the training split.
        count: How many lesions.
    """
    similarity = _normalise(reference.features) @ _normalise(features[None])[0]
    found: dict[str, Neighbour] = {}
    for row in np.argsort(-similarity, kind="stable"):
        lesion = reference.lesion_ids[row]
        if lesion not in found:
            distance = float(np.sqrt(max(2.0 - 2.0 * similarity[row], 0.0)))
            found[lesion] = Neighbour(reference.image_ids[row], lesion, reference.dx[row], distance)
            if len(found) == count:
                break
    return list(found.values())


def _normalise(features: np.ndarray) -> np.ndarray:
    features = np.asarray(features, dtype=np.float32)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
