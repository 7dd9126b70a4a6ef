"""Model updates as one array: which tensors travel, in which order, and a digest that both sides must share.

Flower sends every array of a message as an object of its own, over two hops with a request each; a MobileNetV2 has 314
of them. One flat array is one object. Buffers of normalisation layers never travel with the weights: their statistics
belong to a site (Li et al., FedBN, ICLR 2021), and noise on a variance makes it negative.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import nn

from dermaflow.errors import DermaflowError
from dermaflow.learning.backbones import Network

Scope = Literal["head", "last_block", "all"]
"""What is trained and sent: the head; the head and the last quarter of the backbone's parameters; everything."""
Precision = Literal["float32", "bfloat16"]


class WireError(DermaflowError):
    """An update that does not fit the network it was made for."""


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the tensors in an update, in their order."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of names and shapes: equal only where both sides mean the same tensors."""
        text = ";".join(f"{name}:{shape}" for name, shape in zip(self.names, self.shapes, strict=True))
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def size(self) -> int:
        """Numbers in an update."""
        return sum(int(np.prod(shape)) for shape in self.shapes)


def layout_of(network: Network, scope: Scope, *, local_norm: bool = False) -> Layout:
    """The tensors that travel.

    Args:
        network: The network of the run.
        scope: How much of it is trained.
        local_norm: Keep weights and biases of normalisation layers at the site, too (FedBN).
    """
    body = [f"body.{name}" for name, _ in network.body.named_parameters()]
    chosen = {"head": [], "last_block": body[len(body) - len(body) // 4 :], "all": body}[scope]
    if local_norm:
        own = norm_parameters(network)
        chosen = [name for name in chosen if name not in own]
    names = [*chosen, "head.weight", "head.bias"]
    tensors = dict(network.named_parameters())
    return Layout(tuple(names), tuple(tuple(tensors[name].shape) for name in names))


def norm_parameters(network: nn.Module) -> set[str]:
    """Names of the parameters of normalisation layers that keep statistics."""
    return {
        f"{place}.{name}"
        for place, module in network.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        for name, _ in module.named_parameters(recurse=False)
    }


def pack(tensors: dict[str, torch.Tensor], layout: Layout, precision: Precision = "float32") -> np.ndarray:
    """Tensors as one array: float32 [size], or bfloat16's bits as uint16 [size]."""
    flat = torch.cat([tensors[name].detach().reshape(-1).to("cpu", torch.float32) for name in layout.names])
    if precision == "bfloat16":
        return flat.to(torch.bfloat16).view(torch.uint16).numpy()
    return flat.numpy()


def unpack(array: np.ndarray, layout: Layout, digest: str) -> dict[str, torch.Tensor]:
    """Tensors float32 out of an array from somewhere else, which is not trusted.

    Raises:
        WireError: It was made for other tensors, has another length or type, or holds NaN or infinity.
    """
    if digest != layout.digest:
        raise WireError(
            f"the update is of layout {digest[:12]}", expected=layout.digest[:12],
            todo="use the same DermaFlow version, network and scope on both sides",
        )  # fmt: skip
    if array.dtype == np.uint16:
        flat = torch.from_numpy(array.copy()).view(torch.bfloat16).float()
    elif array.dtype == np.float32:
        flat = torch.from_numpy(array.copy())
    else:
        raise WireError(f"the update is of type {array.dtype}", expected="float32, or bfloat16 as uint16")
    if flat.shape != (layout.size,):
        raise WireError(f"the update has shape {tuple(flat.shape)}", expected=f"({layout.size},)")
    if not torch.isfinite(flat).all():
        raise WireError("the update holds NaN or infinity", expected="finite numbers")
    parts = torch.split(flat, [int(np.prod(shape)) for shape in layout.shapes])
    return {name: part.reshape(shape) for name, part, shape in zip(layout.names, parts, layout.shapes, strict=True)}
