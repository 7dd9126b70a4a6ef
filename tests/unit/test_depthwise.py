"""Depthwise convolutions of ours give what PyTorch's give, and their gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dermaflow.learning.backbones import BackboneConfig, build
from dermaflow.learning.depthwise import DepthwiseConv2d, _Depthwise, with_fast_gradients


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("height, width", [(12, 16), (9, 11), (5, 6), (2, 3)])
def test_gradients_are_exact(size: int, stride: int, height: int, width: int) -> None:
    torch.manual_seed(0)
    theirs = nn.Conv2d(6, 6, size, stride, size // 2, groups=6, bias=False).double()
    images = torch.randn(2, 6, height, width, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    images.requires_grad_()
    weight = theirs.weight.detach().clone().requires_grad_()
    wanted, found = theirs(images), _Depthwise.apply(images, weight, stride)
    torch.testing.assert_close(found, wanted)
    gradient = torch.randn_like(wanted)
    for ours, theirs_ in zip(
        torch.autograd.grad(found, (images, weight), gradient),
        torch.autograd.grad(wanted, (images, theirs.weight), gradient),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs_)


def test_a_frozen_weight_or_image_has_no_gradient() -> None:
    images = torch.randn(1, 4, 8, 8, requires_grad=True)
    weight = torch.randn(4, 1, 3, 3)
    _Depthwise.apply(images, weight, 2).sum().backward()
    assert images.grad is not None and weight.grad is None


def test_the_network_is_the_same_but_for_how_it_learns() -> None:
    """In bfloat16 a step gives the gradients of PyTorch's own layers; in float32 nothing differs at all."""
    torch.manual_seed(0)
    network = build(BackboneConfig(name="mobilenet_v2", dropout=0)).eval().to(memory_format=torch.channels_last)
    ours = [module for module in network.modules() if isinstance(module, DepthwiseConv2d)]
    assert len(ours) == 17
    images = torch.randn(4, 3, 64, 96).contiguous(memory_format=torch.channels_last)

    def gradients() -> dict[str, torch.Tensor]:
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(images)
        logits.float().square().mean().backward()
        return {name: parameter.grad.clone() for name, parameter in network.named_parameters()}

    found, exact = gradients(), network(images)
    for module in ours:
        module.__class__ = nn.Conv2d
    wanted = gradients()
    assert torch.equal(exact, network(images))
    for name, gradient in wanted.items():
        distance = (found[name] - gradient).norm() / gradient.norm()
        assert distance < 0.02, (name, float(distance))


def test_other_convolutions_stay() -> None:
    layers = nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Conv2d(4, 4, 3, groups=4, bias=False),
        nn.Conv2d(4, 8, 3, groups=4, padding=1),
        nn.Conv2d(4, 4, 3, groups=4, padding=1, bias=True),
        nn.Conv2d(4, 4, 3, groups=4, padding=1, dilation=2),
    )
    before = list(layers)
    assert list(with_fast_gradients(layers)) == before
