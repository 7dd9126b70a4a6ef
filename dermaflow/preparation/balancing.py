"""Balancing, applied after the split and to ``train`` only: by weights in the loss or by how often an image is drawn.

Post-hoc logit adjustment needs no training and is therefore an operating point (`dermaflow.trust`); logit adjustment in
the loss is a loss (`dermaflow.learning.losses`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field


class BalanceConfig(BaseModel):
    """How rare diagnoses are given weight."""

    model_config = ConfigDict(extra="forbid")

    strategy: Literal["none", "class_weights", "effective_number", "weighted_sampling", "oversampling"] = Field(
        "none",
        description="none; class_weights or effective_number in the loss; weighted_sampling (same epoch length, drawn "
        "with replacement) or oversampling (every image at least once, rare ones repeated, each time augmented anew)",
    )
    power: float = Field(1.0, ge=0, le=2, description="0 leaves the frequencies, 1 makes the diagnoses equal.")
    beta: float = Field(0.999, gt=0, lt=1, description="effective_number only: (n-1)/n of the assumed prototypes n.")


@dataclass(frozen=True)
class Balance:
    """What a strategy does to the training split.

    Attributes:
        loss_weights: float64 [K], weight of each class in the loss; mean 1 over the images.
        draws: float64 [K], expected number of times an epoch draws one image of the class.
        replacement: Whether the draws are independent (an image may be missed) or each image comes at least once.
    """

    loss_weights: np.ndarray
    draws: np.ndarray
    replacement: bool = False


def balance(counts: np.ndarray, config: BalanceConfig) -> Balance:
    """Turn class counts into loss weights and draw rates.

    Sources: class_weights, inverse frequency as in Gessert et al. 2018 (arXiv 1808.01694); effective_number, Cui et al.
    2019 (arXiv 1901.05555); weighted_sampling, importance sampling of classes, power 0.5 as in Mahajan et al. 2018
    (arXiv 1805.00932); oversampling, repeat factors as in Gupta et al. 2019 (arXiv 1908.03195).

    Args:
        counts: int [K], images of each class in the training split; classes without an image get weight 0.
        config: The strategy.
    """
    counts = np.asarray(counts, float)
    present = counts > 0
    safe = np.where(present, counts, 1)
    even = np.ones_like(counts)
    inverse = np.where(present, (counts.sum() / safe) ** config.power, 0)
    if config.strategy == "class_weights":
        return Balance(_mean_one(inverse, counts), even)
    if config.strategy == "effective_number":
        weights = np.where(present, (1 - config.beta) / (1 - config.beta**safe), 0)
        return Balance(_mean_one(weights, counts), even)
    if config.strategy == "weighted_sampling":
        return Balance(even, _mean_one(inverse, counts), replacement=True)
    if config.strategy == "oversampling":
        return Balance(even, np.where(present, (counts.max() / safe) ** config.power, 0))
    return Balance(even, even)


def _mean_one(weights: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return weights * counts.sum() / (weights * counts).sum()


def draw_epoch(labels: np.ndarray, rule: Balance, rng: np.random.Generator) -> np.ndarray:
    """The images of one epoch, in order.

    Args:
        labels: int [N], class of each training image.
        rule: From `balance`.
        rng: Source of the draws.

    Returns:
        int64 [M], indices into `labels`, shuffled; M = N, or more when oversampling.
    """
    rates = rule.draws[labels]
    if rule.replacement:
        return rng.choice(len(labels), size=len(labels), p=rates / rates.sum())
    times = np.floor(rates).astype(int)
    times += rng.random(len(labels)) < rates - times
    return rng.permutation(np.repeat(np.arange(len(labels)), times))


def epoch_length(labels: np.ndarray, rule: Balance) -> int:
    """Expected number of draws of an epoch, rounded to whole images."""
    return len(labels) if rule.replacement else round(float(rule.draws[labels].sum()))
