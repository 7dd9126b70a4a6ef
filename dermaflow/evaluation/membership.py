"""Membership inference: can somebody with a model and an image tell whether it was trained on that image?

Two attacks that need no shadow models. *loss*: images with a small loss were trained on (Yeom et al., CSF 2018, arXiv
1709.01604). *loss of its class*: the same after each loss is compared with those of its own class, since rare diagnoses
have larger losses whether trained on or not; a cheap form of the difficulty calibration of Watson et al., ICLR 2022
(arXiv 2111.08440). The attacker knows diagnoses. An area of 0.5 is guessing. Such an attack is a lower bound of what
can be told: a good one proves a leak, a poor one proves nothing, which only differential privacy does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import log_softmax

from dermaflow.bundles.bundle import load_bundle
from dermaflow.errors import DataError
from dermaflow.evaluation.figures import Estimate
from dermaflow.evaluation.intervals import estimate, lesion_weights
from dermaflow.learning.inference import network_of, predict
from dermaflow.learning.optimisation import pick_device
from dermaflow.preparation.reading import ShardFolder, labels_of
from dermaflow.settings import settings


@dataclass(frozen=True)
class Part:
    """Images of which the attacker has to say whether they were trained on.

    Attributes:
        logits: float [N, 7].
        labels: int [N].
        lesions: [N], of each image.
    """

    logits: np.ndarray
    labels: np.ndarray
    lesions: np.ndarray

    @property
    def losses(self) -> np.ndarray:
        """Log loss of each image, float64 [N]."""
        found: np.ndarray = -log_softmax(self.logits.astype(np.float64), axis=1)[
            np.arange(len(self.labels)), self.labels
        ]
        return found


def attack(members: Part, others: Part, seed: int = 0, resamples: int = 1000) -> dict[str, Estimate]:
    """Area under the ROC curve of both attacks, with intervals over lesions.

    Args:
        members: Images that the model was trained on.
        others: Images that it was not.
        seed: Of the lesion bootstrap, which draws members and others apart.
        resamples: Of it.

    Raises:
        DataError: One of the two is empty.
    """
    if not len(members.labels) or not len(others.labels):
        raise DataError("nothing to compare", expected="images that were trained on, and images that were not")
    rng = np.random.default_rng(seed)
    weights = np.concatenate([lesion_weights(p.lesions, resamples, rng) for p in (members, others)], axis=1)
    trained = np.arange(weights.shape[1]) < len(members.labels)
    losses = np.concatenate([members.losses, others.losses])
    labels = np.concatenate([members.labels, others.labels])
    lesions = min(len(np.unique(members.lesions)), len(np.unique(others.lesions)))
    own = np.zeros(len(losses))
    for k in np.unique(labels):  # place among the losses of its class, 0 to 1
        of_class = labels == k
        own[of_class] = losses[of_class].argsort().argsort() / max(of_class.sum() - 1, 1)
    once = np.ones((1, len(losses)))
    return {
        name: estimate(float(area(-score, trained, once)[0]), area(-score, trained, weights), lesions)
        for name, score in (("loss", losses), ("loss of its class", own))
    }


def area(score: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the ROC curve, ties counted half, for each row of weights.

    Args:
        score: float [N], larger for what should be positive.
        positive: bool [N].
        weights: float [R, N].

    Returns:
        float64 [R].
    """
    values, place = np.unique(score, return_inverse=True)
    steps = np.zeros((2, len(weights), len(values)))
    order = np.argsort(place, kind="stable")
    starts = np.searchsorted(place[order], np.arange(len(values)))
    for side, chosen in enumerate((positive, ~positive)):
        steps[side] = np.add.reduceat((weights * chosen)[:, order], starts, axis=1)
    below = np.cumsum(steps[1], axis=1) - steps[1] / 2
    found: np.ndarray = (steps[0] * below).sum(1) / (steps[0].sum(1) * steps[1].sum(1))
    return found


def attack_model(
    model: str, shards: str, seed: int = 0, resamples: int = 1000,
    progress: Callable[[str, int, int], None] = lambda step, done, total: None,
) -> dict[str, Estimate]:  # fmt: skip
    """Attack a bundle: members are the shards' training split, others their test split.

    Args:
        model: Folder of the bundle.
        shards: Those that it was trained from.
        seed: Of the lesion bootstrap.
        resamples: Of it.
        progress: Called with the step, images done and images in all.
    """
    loaded, folder = load_bundle(model), ShardFolder(shards)
    network, spec = network_of(loaded).to(pick_device()), loaded.bundle.input
    parts = []
    for split in ("train", "test"):
        pixels = folder.pixels(split, spec.height, spec.width, spec.copies, threads=settings().threads)
        frame = folder.metadata(split)
        one_view = spec.model_copy(update={"views": 1})  # what training saw, but for augmentation
        logits, _ = predict(network, pixels, one_view, progress=lambda done, total, s=split: progress(s, done, total))  # type: ignore[misc]
        parts.append(Part(logits, labels_of(frame["dx"]), frame["lesion_id"].to_numpy()))
    return attack(parts[0], parts[1], seed, resamples)
