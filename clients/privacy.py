"""Differential privacy of a lesion: what a site releases when the run promises an epsilon for each of its lesions.

Neighbours are a site's training splits with and without one lesion, all its images and their diagnosis. The backbone is
frozen and came from elsewhere, so only the head learns from lesions, in one of two ways:

- from sums, once: each lesion's mean feature, projected to a few directions that are drawn at random and known to all,
  and
  clipped to a length, enters sums by class and a sum of outer products, both under Gaussian noise (sufficient
  statistics perturbation; Vu and Slavkovic 2009, Wang 2018, arXiv 1803.02596);
- by rounds of DP-SGD (Abadi et al., CCS 2016, arXiv 1607.00133): the gradient of a linear head for one lesion is an
  outer
  product, so it needs no hooks into a network.

Batch normalisation never comes in: a frozen backbone has fixed statistics. A site adds its noise itself and trusts
nobody. Noise is drawn from a generator seeded by the operating system, in float64; it is not hardened against attacks
on the arithmetic of floating-point noise (Mironov, CCS 2012).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from scipy.special import softmax

from clients.accountant import Ledger, Release, epsilon, noise_for
from clients.plan import Order, Plan
from clients.site import Layouts, Model, Site, Update
from clients.wire import pack, unpack
from dermaflow.errors import DataError
from dermaflow.learning.linear_head import ClassSums, class_sums
from dermaflow.taxonomy import CODES

COUNTS_NOISE = 4.0
"""Noise of the counts over that of sums and steps: counts only set priors, and cost 3 % more noise of the rest."""
PRODUCTS = 0.5
"""Share of the products' length in a lesion's contribution, next to 1 of its feature's."""
PRIVATE_SHRINKAGE = 0.9
"""Of the discriminant head from noisy sums; the sphere has all directions of the features, not the projected alone."""
MOMENTUM = 0.9


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

    def spend(self, order: Order, what: str, noise: float, rate: float = 1.0, steps: int = 1) -> None:
        """Write a release down that is about to be made; raises `Refused` past the limit."""
        unit: Literal["lesion", "site"] = "site" if order.dp == "site" else "lesion"
        release = Release(run=order.run, what=what, unit=unit, noise=noise, rate=rate, steps=steps)
        self.ledger.spend(release, self.delta, self.limit)


def lesion_counts(site: Site, order: Order, budget: Budget) -> np.ndarray:
    """Lesions of each class in the training split under noise, float64 [7]; the same however often asked."""
    kept = site.memory.recall("lesion_counts")
    if kept is None:
        rate, steps = _schedule(order)
        parts = ((COUNTS_NOISE, 1.0, 1), (1.0, rate, max(steps * order.rounds, 1)))
        noise = noise_for(order.epsilon, order.delta, parts)
        budget.spend(order, "counts", noise * COUNTS_NOISE)
        counts = np.bincount(_lesions(site)[1], minlength=len(CODES))
        drawn = counts + np.random.default_rng().normal(0.0, noise * COUNTS_NOISE, len(CODES))
        kept = {"counts": np.maximum(np.rint(drawn), 0.0), "noise": np.array([noise])}
        site.memory.keep("lesion_counts", **kept)
    return kept["counts"]


def private_sums(site: Site, order: Order, model: Model, budget: Budget) -> ClassSums:
    """Sums of the training split under noise, for `repaired`; the same however often asked."""
    kept = site.memory.recall("private_sums")
    if kept is None:
        counts, noise = lesion_counts(site, order, budget), _noise(site)
        features = _features(site, order, model)
        budget.spend(order, "sums of features", noise)
        sums = noisy_sums(features, _lesions(site)[1], order.clip, order.directions, noise, order.seed)
        kept = {"counts": counts, "sums": sums.sums, "products": sums.products}
        site.memory.keep("private_sums", **kept)
    return ClassSums(kept["counts"], kept["sums"], kept["products"])


def noisy_sums(
    features: np.ndarray, labels: np.ndarray, clip: float, directions: int, noise: float, seed: int
) -> ClassSums:
    """Class sums under noise; counts are exact and not for release.

    Args:
        features: float [L, D], one row a lesion.
        labels: int [L].
        clip: Length to which projected features are cut.
        directions: To project to.
        noise: Standard deviation over the length of what one lesion adds to sums and products together.
        seed: Of the directions, the same at every site.
    """
    rng, onto = np.random.default_rng(), projection(features.shape[1], directions, seed)
    short = features @ onto.T
    short = short * np.minimum(1.0, clip / np.maximum(np.linalg.norm(short, axis=1, keepdims=True), 1e-12))
    exact = class_sums(short, labels)
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


def private_round(site: Site, order: Order, model: Model, budget: Budget) -> Update:
    """A round of DP-SGD on the head.

    Each step draws every lesion with the same chance, clips its gradient, adds noise to the sum and divides by the
    expected number of lesions, which is public: it comes from the noised counts. Loss and images of the site are not
    told.
    """
    layouts, counts = Layouts.of(order), lesion_counts(site, order, budget)
    noise, total = _noise(site), max(float(counts.sum()), 1.0)
    features, labels = _features(site, order, model), _lesions(site)[1]
    rate, steps = _schedule(order)
    budget.spend(order, f"round {order.round}", noise, rate, steps)
    head = {name: tensor.double().numpy() for name, tensor in unpack(model.weights, layouts.weights).items()}
    both = np.concatenate([head["head.weight"], head["head.bias"][:, None]], axis=1)
    # those of all sites: with its own, a site would not hold down the classes that it lacks
    of_all = np.array(order.counts, np.float64) if order.counts else counts
    shift = log_priors(of_all) if order.adjusted else np.zeros(len(CODES))
    step = order.recipe.optim.head_lr * order.rate / (rate * total)
    both = noisy_descent(both, features, labels, shift, order.clip, noise, rate, steps, step)
    return Update(_changed(order, model, both), model.norm, None, {"images": total, "seconds": 0.0}, None)


def log_priors(counts: np.ndarray) -> np.ndarray:
    """Logarithms of class frequencies, float64 [7]; a class without a lesion counts as having one."""
    found: np.ndarray = np.log(np.maximum(counts, 1.0) / np.maximum(counts, 1.0).sum())
    return found


def noisy_descent(
    head: np.ndarray, features: np.ndarray, labels: np.ndarray, shift: np.ndarray, clip: float, noise: float,
    rate: float, steps: int, step: float,
) -> np.ndarray:  # fmt: skip
    """Gradient descent with momentum on a head, each lesion's gradient cut and their sum noised.

    Args:
        head: float64 [7, D + 1], weights and bias.
        features: float64 [L, D], one row a lesion.
        labels: int [L].
        shift: [7], added to the logits while training.
        clip: Length of a lesion's gradient.
        noise: Standard deviation over `clip`.
        rate: Chance of a lesion to be in a step.
        steps: Their number.
        step: Learning rate over the expected number of lesions in a step.

    Returns:
        The new head.
    """
    rng, speed = np.random.default_rng(), np.zeros_like(head)
    for _ in range(steps):
        drawn = rng.random(len(labels)) < rate
        p = softmax(features[drawn] @ head[:, :-1].T + head[:, -1] + shift, axis=1)
        gradient = clipped_sum(features[drawn], p - np.eye(len(CODES))[labels[drawn]], clip)
        gradient += rng.normal(0.0, noise * clip, gradient.shape)
        speed = MOMENTUM * speed + gradient
        head = head - step * speed
    return head


def clipped_sum(features: np.ndarray, errors: np.ndarray, clip: float) -> np.ndarray:
    """Sum of each lesion's gradient of weights and bias, cut to a length.

    Args:
        features: float [L, D].
        errors: float [L, 7], probability less truth. A lesion's gradient is the outer product of its error and its
            feature.
        clip: Length.

    Returns:
        float64 [7, D + 1], the bias last.
    """
    longer = np.concatenate([features, np.ones((len(features), 1))], axis=1)
    lengths = np.linalg.norm(errors, axis=1) * np.linalg.norm(longer, axis=1)
    found: np.ndarray = (errors * np.minimum(1.0, clip / np.maximum(lengths, 1e-12))[:, None]).T @ longer
    return found


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


def _schedule(order: Order) -> tuple[float, int]:
    """Chance of a lesion to be in a step, and steps of a round; the sums are one step of all."""
    return (order.sampling, max(1, round(order.local_epochs / order.sampling))) if order.rounds else (1.0, 1)


def _noise(site: Site) -> float:
    kept = site.memory.recall("lesion_counts")
    assert kept is not None
    return float(kept["noise"][0])


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


def _changed(order: Order, model: Model, head: np.ndarray) -> np.ndarray:
    tensors = {"head.weight": torch.from_numpy(head[:, :-1]), "head.bias": torch.from_numpy(head[:, -1])}
    return pack(tensors, Layouts.of(order).weights) - model.weights
