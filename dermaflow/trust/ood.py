"""How far an image lies from everything the model was calibrated on.

Distance to the k-th nearest neighbour among L2-normalised features (Sun et al., Out-of-distribution detection with deep
nearest neighbors, ICML 2022): no assumption on the shape of the classes, and the neighbours can be shown.
"""

from __future__ import annotations

import numpy as np

from dermaflow.schemas.bundle import OodSpec

NEIGHBOURS = 5
_ROWS = 1024  # of the distance matrix at a time: 1,024 x 10,000 float32 are 40 MB


def fit_ood(
    features: np.ndarray, lesions: np.ndarray, k: int = NEIGHBOURS, quantile: float = 0.95
) -> tuple[OodSpec, np.ndarray]:
    """Keep the calibration features and the distance that few of them exceed.

    Args:
        features: [N, D], the network's last features.
        lesions: [N], lesion of each image. A lesion is no neighbour of itself.
        k: Which neighbour's distance counts; fewer if other lesions have fewer images in all.
        quantile: Share of the calibration images that counts as ordinary.

    Returns:
        The specification, and the features to store: float16 [N, D], L2-normalised.
    """
    stored = _normalise(features).astype(np.float16)
    _, lesion, counts = np.unique(lesions, return_inverse=True, return_counts=True)
    k = max(1, min(k, len(stored) - int(counts.max())))
    distances = _kth_distance(_normalise(stored), stored, k, lesion)
    return OodSpec(k=k, threshold=float(np.quantile(distances, quantile))), stored


def ood_score(features: np.ndarray, stored: np.ndarray, k: int) -> np.ndarray:
    """Distance to the k-th nearest calibration image.

    Args:
        features: [M, D], the network's last features, not normalised.
        stored: float16 [N, D], of `fit_ood`.
        k: Of `fit_ood`.

    Returns:
        float32 [M], 0 (seen before) to 2 (opposite); above the specification's threshold an image is unusual.
    """
    return _kth_distance(_normalise(features), stored, k)


def _normalise(features: np.ndarray) -> np.ndarray:
    features = np.asarray(features, dtype=np.float32)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def _kth_distance(queries: np.ndarray, stored: np.ndarray, k: int, lesion: np.ndarray | None = None) -> np.ndarray:
    """float32 [M]; with `lesion`, the queries are the stored features and their own lesion is left out."""
    reference = _normalise(stored)  # float16 has rounded the lengths
    distances = np.empty(len(queries), dtype=np.float32)
    for start in range(0, len(queries), _ROWS):
        rows = slice(start, start + _ROWS)
        similarity = queries[rows] @ reference.T
        if lesion is not None:
            similarity[lesion[rows, None] == lesion[None, :]] = -1.0
        kth = np.partition(similarity, -k, axis=1)[:, -k]
        distances[rows] = np.sqrt(np.maximum(2.0 - 2.0 * kth, 0.0))
    return distances
