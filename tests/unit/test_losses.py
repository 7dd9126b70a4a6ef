"""Losses against torch's own and against values by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from dermaflow.learning.losses import LossConfig, make_loss

ONES = torch.ones(7)
EVEN = torch.full((7,), 1 / 7)
PRIORS = torch.tensor([0.03, 0.05, 0.11, 0.01, 0.11, 0.67, 0.02])
WEIGHTS = torch.tensor([2.0, 1.5, 1.0, 3.0, 1.2, 0.5, 2.5])


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(20, 7, generator=generator), torch.randint(0, 7, (20,), generator=generator)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_torchs(batch: tuple[torch.Tensor, torch.Tensor], smoothing: float) -> None:
    found = make_loss(LossConfig(label_smoothing=smoothing), ONES, PRIORS)(*batch)
    torch.testing.assert_close(found, functional.cross_entropy(*batch, label_smoothing=smoothing))


def test_class_weights_count_an_image_and_not_the_sum_of_weights(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, targets = batch
    found = make_loss(LossConfig(), WEIGHTS, PRIORS)(logits, targets)
    torch.testing.assert_close(found, functional.cross_entropy(logits, targets, weight=WEIGHTS, reduction="sum") / 20)
    halves = [
        make_loss(LossConfig(), WEIGHTS, PRIORS)(logits[part], targets[part]) for part in (slice(10), slice(10, 20))
    ]
    torch.testing.assert_close(found, (halves[0] + halves[1]) / 2)  # so that workers with half a batch each agree


def test_focal_by_hand(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    # one image with p_true = 1/4: 3 logits of 0 among -inf-like others
    logits = torch.tensor([[math.log(2.0), math.log(3.0), math.log(3.0), -50, -50, -50, -50]])
    found = make_loss(LossConfig(name="focal", gamma=2), WEIGHTS, PRIORS)(logits, torch.tensor([0]))
    assert found.item() == pytest.approx(2.0 * (3 / 4) ** 2 * math.log(4), rel=1e-5)
    plain = make_loss(LossConfig(name="focal", gamma=0), WEIGHTS, PRIORS)(*batch)
    torch.testing.assert_close(plain, make_loss(LossConfig(), WEIGHTS, PRIORS)(*batch))
    assert make_loss(LossConfig(name="focal", gamma=2), WEIGHTS, PRIORS)(*batch) < plain


def test_logit_adjustment_adds_the_log_prior(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, targets = batch
    found = make_loss(LossConfig(name="logit_adjusted", tau=1.5), ONES, PRIORS)(logits, targets)
    torch.testing.assert_close(found, functional.cross_entropy(logits + 1.5 * PRIORS.log(), targets))
    assert not torch.isclose(found, functional.cross_entropy(logits, targets))
    for config, priors in (
        (LossConfig(name="logit_adjusted", tau=0), PRIORS),
        (LossConfig(name="logit_adjusted"), EVEN),
    ):
        torch.testing.assert_close(make_loss(config, ONES, priors)(logits, targets), functional.cross_entropy(*batch))


@pytest.mark.parametrize("name", ["cross_entropy", "focal", "logit_adjusted"])
def test_every_loss_can_be_descended(name: str) -> None:
    """Also in half precision, with a class that training does not hold."""
    priors = torch.tensor([0.0, 0.1, 0.2, 0.2, 0.2, 0.2, 0.1])
    logits = torch.zeros(4, 7, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.tensor([1, 2, 3, 4])
    loss = make_loss(LossConfig.model_validate({"name": name, "label_smoothing": 0.1}), ONES, priors)(logits, targets)
    assert loss.dtype == torch.float32 and torch.isfinite(loss)
    loss.backward()
    assert logits.grad is not None and torch.isfinite(logits.grad).all()
    assert (logits.grad.gather(1, targets[:, None]) < 0).all()
