"""Differential privacy in federated runs: what a site or the coordinator releases, and under how much noise.

A lesion (``dp=lesion``): neighbours are a site's training splits with and without one lesion, all its images and its
diagnosis. The backbone is frozen and came from elsewhere, so only the head learns from lesions, from sums under
Gaussian noise (sufficient statistics perturbation; Vu and Slavkovic 2009, Wang 2018, arXiv 1803.02596): how many
lesions of each class, the sum of their features, by which they are centred, then sums by class and a sum of outer
products of centred features in a few random directions. Features are means over a lesion's images and are cut to a
length. Batch normalisation never comes in: a frozen backbone has fixed statistics. A site adds its noise itself and
trusts nobody.

A site (``dp=site``, ``dp=central``): its update is cut and noised as a whole.

Noise is drawn from a generator seeded by the operating system, in float64; it is not hardened against attacks on the
arithmetic of floating-point noise (Mironov, CCS 2012).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from clients.accountant import Ledger, Release, epsilon, noise_for
from clients.plan import Order, Plan
from clients.site import Model, Site, Update
from dermaflow.errors import DataError
from dermaflow.learning.linear_head import ClassSums, class_sums, discriminant_head
from dermaflow.taxonomy import CODES

SMALL = 4.0
"""Noise of counts and centre over that of the class sums: coarse is enough, and the sums get 6 % more noise."""
REACH = 2.0
"""Length to which features are cut for the centre, over that of centred ones."""
PRODUCTS = 0.5
"""Share of the products' length in a lesion's contribution, next to 1 of its feature's."""
PRIVATE_SHRINKAGE = 0.99
"""Of the discriminant head from noisy sums; the sphere has all directions of the features, not the projected alone."""


@dataclass(frozen=True)
class Budget:
    """What a site may still spend.

    Attributes:
        ledger: Of the site.
        delta: Of its guarantee.
        limit: Largest epsilon over all runs; None for none.
    """

    ledger: Ledger
    delta: float
    limit: float | None

    def spend(self, order: Order, what: str, noise: float) -> None:
        """Write a release down that is about to be made; raises `Refused` past the limit."""
        unit: Literal["lesion", "site"] = "site" if order.dp == "site" else "lesion"
        self.ledger.spend(Release(run=order.run, what=what, unit=unit, noise=noise), self.delta, self.limit)


def lesion_counts(site: Site, order: Order, budget: Budget) -> np.ndarray:
    """Lesions of each class in the training split under noise, float64 [7]; the same however often asked."""
    kept = site.memory.recall("lesion_counts")
    if kept is None:
        noise = SMALL * lesion_noise(order.epsilon, order.delta)
        budget.spend(order, "counts", noise)
        kept = {"counts": noisy_counts(_lesions(site)[1], noise)}
        site.memory.keep("lesion_counts", **kept)
    return kept["counts"]


def lesion_noise(epsilon: float, delta: float) -> float:
    """Noise of class sums with which they, counts and centre together cost an epsilon."""
    return noise_for(epsilon, delta, (SMALL, SMALL, 1.0))


def centre_sum(site: Site, order: Order, model: Model, budget: Budget) -> np.ndarray:
    """Sum of the lesions' features under noise, float64 [D]; the same however often asked."""
    kept = site.memory.recall("centre")
    if kept is None:
        features = _features(site, order, model)
        noise = SMALL * lesion_noise(order.epsilon, order.delta)
        budget.spend(order, "centre", noise)
        kept = {"sum": noisy_sum(features, REACH * order.clip, noise)}
        site.memory.keep("centre", **kept)
    return kept["sum"]


def private_sums(site: Site, order: Order, model: Model, centre: np.ndarray, budget: Budget) -> ClassSums:
    """Sums of centred features under noise, for `repaired`; the same however often asked.

    Args:
        site: Whose lesions.
        order: Clip, directions, epsilon.
        model: The backbone.
        centre: float [D], to be subtracted, known to all.
        budget: What they are charged to.
    """
    kept = site.memory.recall("private_sums")
    if kept is None:
        counts, features = lesion_counts(site, order, budget), _features(site, order, model)
        noise = lesion_noise(order.epsilon, order.delta)
        budget.spend(order, "sums of features", noise)
        sums = noisy_sums(features - centre, _lesions(site)[1], order.clip, order.directions, noise, order.seed)
        kept = {"counts": counts, "sums": sums.sums, "products": sums.products}
        site.memory.keep("private_sums", **kept)
    return ClassSums(kept["counts"], kept["sums"], kept["products"])


def noisy_counts(labels: np.ndarray, noise: float) -> np.ndarray:
    """Lesions of each class, float64 [7], whole and at least 0, of int [L] classes."""
    drawn = np.bincount(labels, minlength=len(CODES)) + np.random.default_rng().normal(0.0, noise, len(CODES))
    return np.maximum(np.rint(drawn), 0.0)


def noisy_sum(features: np.ndarray, clip: float, noise: float) -> np.ndarray:
    """Sum [D] of features [L, D], each cut to the length `clip`, under noise of `noise` times that."""
    found: np.ndarray = _cut(features, clip).sum(0)
    return found + np.random.default_rng().normal(0.0, noise * clip, found.shape)


def noisy_sums(
    features: np.ndarray, labels: np.ndarray, clip: float, directions: int, noise: float, seed: int
) -> ClassSums:
    """Class sums under noise; counts are exact and not for release.

    Args:
        features: float [L, D], one row a lesion.
        labels: int [L].
        clip: Length to which features are cut, measured in all directions: projected ones keep their share of it.
        directions: To project to.
        noise: Standard deviation over the length of what one lesion adds to sums and products together.
        seed: Of the directions, the same at every site.
    """
    rng, onto = np.random.default_rng(), projection(features.shape[1], directions, seed)
    clip = clip * np.sqrt(len(onto) / features.shape[1])
    exact = class_sums(_cut(features @ onto.T, clip), labels)
    sd = noise * np.sqrt(1.0 + PRODUCTS**2)  # one lesion adds at most `clip` to sums, `clip`^2 to products
    sums = exact.sums + rng.normal(0.0, sd * clip, exact.sums.shape)
    # of a symmetric matrix each number off the diagonal stands twice, and so it has half the variance
    upper = np.triu(rng.normal(0.0, sd * clip**2 / PRODUCTS / np.sqrt(2), exact.products.shape), 1)
    diagonal = np.diag(rng.normal(0.0, sd * clip**2 / PRODUCTS, len(upper)))
    products = exact.products + upper + upper.T + diagonal
    return ClassSums(exact.counts, sums @ onto, onto.T @ products @ onto)


def projection(width: int, directions: int, seed: int) -> np.ndarray:
    """Orthonormal rows, float64 [directions, width], drawn from a seed that everybody knows."""
    drawn = np.random.default_rng([seed, 7]).normal(size=(width, min(directions, width)))
    found: np.ndarray = np.linalg.qr(drawn)[0].T
    return found


def repaired(sums: ClassSums) -> ClassSums:
    """Noisy sums of all sites as sums that some images could have: no negative variance in any direction."""
    counts = np.maximum(sums.counts, 1.0)
    means = sums.sums / counts[:, None]
    between = (means * counts[:, None]).T @ means
    values, vectors = np.linalg.eigh(sums.products - between)
    within = (vectors * np.maximum(values, 0.0)) @ vectors.T
    return ClassSums(counts, sums.sums, within + between)


def private_head(
    sums: ClassSums, centre: np.ndarray, priors: np.ndarray | None, shrinkage: float = PRIVATE_SHRINKAGE
) -> tuple[np.ndarray, np.ndarray]:
    """The head out of noisy sums of all sites.

    Args:
        sums: Of centred features.
        centre: float [D], that was subtracted.
        priors: [7], class frequencies to assume; by default those counted.
        shrinkage: Of the covariance.

    Returns:
        float64 [7, D] and [7], for features that are not centred.
    """
    weight, bias = discriminant_head(repaired(sums), shrinkage, priors)
    return weight, bias - weight @ centre


def noised_update(update: Update, order: Order, budget: Budget) -> Update:
    """A whole site as the unit: its update cut to a length and noised before it leaves; all sites weigh the same.

    Whether it was cut goes along under noise too, for the length of the next round.
    """
    budget.spend(order, f"round {order.round}", order.noise)
    return noised_mean([update], order)


def noised_mean(updates: list[Update], order: Order) -> Update:
    """Mean of updates, each cut to a length, under noise for any one of them; with how many were cut, under noise.

    Andrew et al., NeurIPS 2021 (arXiv 1905.03871). Flower's strategies of that name are not used: in 1.41 they count
    the updates that were cut where the paper counts those that were not, so that the length runs away from its aim.

    Args:
        updates: Of one site or of all.
        order: Gives `clip` and `noise`, the noise multiplier of updates and counts together.
    """
    rng = np.random.default_rng()
    # theorem 1: counts noised by `noise` and updates by a little more cost as much as one release at `noise`
    of_updates = (order.noise**-2 - (2 * order.noise) ** -2) ** -0.5
    lengths = [float(np.linalg.norm(update.delta)) for update in updates]
    total = np.zeros(updates[0].delta.shape)
    for update, length in zip(updates, lengths, strict=True):
        total += update.delta * min(1.0, order.clip / max(length, 1e-12))
    total += rng.normal(0.0, of_updates * order.clip, total.shape)
    cut = sum(length > order.clip for length in lengths) + rng.normal(0.0, order.noise)
    figures = {"images": 1.0, "seconds": max(update.figures["seconds"] for update in updates)}
    delta = (total / len(updates)).astype(np.float32)
    return Update(delta, updates[0].norm, None, figures | {"clipped": float(cut / len(updates))}, None)


def next_clip(clip: float, cut: float) -> float:
    """Length for the next round, drawn towards the median of the updates' lengths.

    Args:
        clip: Length of this round.
        cut: Share of the updates that were longer, under noise.
    """
    return clip * math.exp(0.2 * (cut - 0.5))


def guarantee(plan: Plan, rounds: int) -> dict[str, Any] | None:
    """What a run promises, for its result; None without differential privacy.

    Args:
        plan: The run.
        rounds: Rounds that took place.
    """
    if plan.dp == "none":
        return None
    found = plan.epsilon
    if plan.dp != "lesion":
        found = epsilon([Release(run="", what="", unit="site", noise=plan.noise, steps=rounds)], plan.delta)
    unit = "one lesion of one site" if plan.dp == "lesion" else "all images of one site"
    return {"unit": unit, "epsilon": found, "delta": plan.delta, "noise_at": plan.dp.replace("lesion", "site")}


def _cut(features: np.ndarray, length: float) -> np.ndarray:
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    found: np.ndarray = features * np.minimum(1.0, length / np.maximum(lengths, 1e-12))
    return found


def _lesions(site: Site) -> tuple[np.ndarray, np.ndarray]:
    """Number of each image's lesion, and each lesion's class."""
    frame = site.data.metadata("train")
    if not len(frame):
        raise DataError("no training image", where=site.data.name)
    number, _ = pd.factorize(frame["lesion_id"])
    labels = np.zeros(number.max() + 1, np.int64)
    labels[number] = site.data.labels("train")
    return number, labels


def _features(site: Site, order: Order, model: Model) -> np.ndarray:
    """Mean feature of each lesion, float64 [L, D]; computed once a run, for the backbone does not change."""
    kept = site.memory.recall("lesion_features")
    if kept is None:
        number, labels = _lesions(site)
        _, features = site._predict(site.network(order, model), order, "train")
        sums = np.zeros((len(labels), features.shape[1]))
        np.add.at(sums, number, features)
        kept = {"features": sums / np.bincount(number)[:, None]}
        site.memory.keep("lesion_features", **kept)
    return kept["features"]
