"""Depthwise convolutions whose gradients are quick on a CPU.

In bfloat16 oneDNN has no fast kernel for two of them and falls back to plain loops: the gradient of the input where the
stride is 2 (80 ms for one layer of MobileNetV2, the forward pass 4), and the gradient of 5x5 weights (34 ms for one of
EfficientNet-Lite, 9 by way of 3x3). The first alone is a third of MobileNetV2's training step. Both have equivalents in
kernels that are fast; `bench/training.py` measures an epoch with and without.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution, padded by half its size, with the same parameters and results as `nn.Conv2d`."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.device.type == "cpu" and torch.is_grad_enabled() and torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            return _Depthwise.apply(images.to(dtype), self.weight.to(dtype), self.stride[0])
        return super().forward(images)


def with_fast_gradients(module: nn.Module) -> nn.Module:
    """Replace every depthwise convolution within a module by one of this kind, with the same weights."""
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d) and _is_depthwise(child):
            size = child.kernel_size[0]
            conv = DepthwiseConv2d(
                child.in_channels, child.out_channels, size, child.stride[0], size // 2, groups=child.groups, bias=False
            )
            conv.weight = child.weight
            setattr(module, name, conv)
        else:
            with_fast_gradients(child)
    return module


def _is_depthwise(conv: nn.Conv2d) -> bool:
    size = conv.kernel_size[0]
    return (
        type(conv) is nn.Conv2d
        and conv.groups == conv.in_channels == conv.out_channels
        and conv.kernel_size in ((3, 3), (5, 5))
        and conv.padding == (size // 2, size // 2)
        and conv.stride in ((1, 1), (2, 2))
        and conv.dilation == (1, 1)
        and conv.bias is None
    )


class _Depthwise(torch.autograd.Function):
    """The convolution of images [N, C, H, W] with weights [C, 1, K, K]."""

    @staticmethod
    def forward(ctx: Any, images: torch.Tensor, weight: torch.Tensor, stride: int) -> torch.Tensor:
        ctx.save_for_backward(images, weight)
        ctx.stride = stride
        size = weight.shape[-1]
        return functional.conv2d(images, weight, stride=stride, padding=size // 2, groups=len(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        images, weight = ctx.saved_tensors
        gradient = gradients[0].contiguous(memory_format=torch.channels_last)
        for_images = _of_images(gradient, weight, images.shape, ctx.stride) if ctx.needs_input_grad[0] else None
        for_weight = _of_weight(gradient, weight, images, ctx.stride) if ctx.needs_input_grad[1] else None
        return for_images, for_weight, None


def _of_images(gradient: torch.Tensor, weight: torch.Tensor, shape: torch.Size, stride: int) -> torch.Tensor:
    """Spread the gradient out to stride 1, zeros between; then it is a convolution with the weights turned round."""
    if stride > 1:
        spread = torch.empty(shape, dtype=gradient.dtype, memory_format=torch.channels_last).zero_()
        spread[:, :, ::stride, ::stride] = gradient
        gradient = spread
    return functional.conv2d(gradient, weight.flip(2, 3), padding=weight.shape[-1] // 2, groups=len(weight))


def _of_weight(gradient: torch.Tensor, weight: torch.Tensor, images: torch.Tensor, stride: int) -> torch.Tensor:
    """3x3 as it comes; 5x5 as four 3x3 that overlap in a row and a column, each over images shifted to its corner."""
    if weight.shape[-1] == 3:
        return _of_3x3(gradient, weight, images, stride, padding=1)
    found = torch.empty_like(weight)
    padded = functional.pad(images, (2, 2, 2, 2))
    height, width = padded.shape[2] - 2, padded.shape[3] - 2
    for row in (0, 2):
        for column in (0, 2):
            corner = weight[:, :, row : row + 3, column : column + 3]
            seen = padded[:, :, row : row + height, column : column + width]
            found[:, :, row : row + 3, column : column + 3] = _of_3x3(gradient, corner, seen, stride, padding=0)
    return found


def _of_3x3(
    gradient: torch.Tensor, weight: torch.Tensor, images: torch.Tensor, stride: int, *, padding: int
) -> torch.Tensor:
    return torch.ops.aten.convolution_backward(
        gradient, images, weight, None, [stride, stride], [padding, padding], [1, 1], False, [0, 0], len(weight),
        [False, True, False],
    )[1]  # fmt: skip
