"""Losses over logits [N, 7] and class indices [N], with class weights from the balancing strategy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch.nn import functional

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class LossConfig(BaseModel):
    """Which loss."""

    model_config = ConfigDict(extra="forbid")

    name: Literal["cross_entropy", "focal", "logit_adjusted"] = "cross_entropy"
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    gamma: float = Field(2.0, ge=0, description="focal only: how much easy images are played down.")
    tau: float = Field(1.0, ge=0, description="logit_adjusted only: weight of the log prior added to the logits.")


class DistillationConfig(BaseModel):
    """How a network learns from a finished one that looks at the same augmented images (Hinton, arXiv 1503.02531).

    That both see the same, however strongly it was augmented, and for long, is what makes it work (Beyer et al., CVPR
    2022, arXiv 2106.05237).
    """

    model_config = ConfigDict(extra="forbid")

    weight: float = Field(0.7, ge=0, le=1, description="Share of the teacher in the loss; the labels have the rest.")
    temperature: float = Field(2.0, gt=0, description="Divides both networks' logits.")


def distance(logits: torch.Tensor, teachers: torch.Tensor, temperature: float) -> torch.Tensor:
    """Kullback-Leibler divergence of logits [N, 7] from a teacher's, mean over images, times temperature squared."""
    student = functional.log_softmax(logits.float() / temperature, dim=1)
    teacher = functional.log_softmax(teachers.float() / temperature, dim=1)
    return functional.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def make_loss(config: LossConfig, class_weights: torch.Tensor, priors: torch.Tensor) -> Loss:
    """The loss as a function.

    Sources: focal, Lin et al. 2017 (arXiv 1708.02002); logit_adjusted, Menon et al. 2021 (arXiv 2007.07314).

    Args:
        config: Which loss.
        class_weights: float32 [7], weight of each class.
        priors: float32 [7], frequency of each class in training, sum 1.

    Returns:
        A function of logits float [N, 7] and targets int64 [N]. Each image counts with the weight of its class and the
        sum is divided by the number of images, so that the mean over workers is the mean over the global batch.
    """
    tau = config.tau if config.name == "logit_adjusted" else 0.0
    shift = tau * torch.log(priors.clamp_min(1e-6))

    def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = logits.float() + shift
        each = functional.cross_entropy(logits, targets, reduction="none", label_smoothing=config.label_smoothing)
        if config.name == "focal":
            p_true = functional.softmax(logits, dim=1).gather(1, targets[:, None])[:, 0]
            each = each * (1 - p_true) ** config.gamma
        return (each * class_weights[targets]).mean()

    return loss
