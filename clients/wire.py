"""Model updates as one array: which tensors travel, in which order, and a digest that both sides must share.

Flower sends every array of a message as an object of its own, over two hops with a request each; a MobileNetV2 has 314
of them. One flat array is one object. Buffers of normalisation layers travel in an array of their own: they are merged
as statistics and not as weights, and noise on a variance would make it negative.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dermaflow.errors import DermaflowError
from dermaflow.learning.backbones import Network
from dermaflow.learning.optimisation import Scope, trained_names

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

    def parts(self, ending: str) -> list[tuple[int, int]]:
        """Where the tensors lie whose names end so: first place and the place after the last."""
        ends = np.cumsum([int(np.prod(shape)) for shape in self.shapes]).tolist()
        starts = [0, *ends][: len(ends)]
        return [(a, b) for name, a, b in zip(self.names, starts, ends, strict=True) if name.endswith(ending)]


def layout_of(network: Network, scope: Scope, *, local_norm: bool = False) -> Layout:
    """The tensors that travel.

    Args:
        network: The network of the run.
        scope: How much of it is trained.
        local_norm: Keep weights and biases of normalisation layers at the site, too (FedBN).
    """
    own = norm_parameters(network) if local_norm else set()
    return _layout(network, [name for name in trained_names(network, scope) if name not in own])


def norm_layout(network: Network, scope: Scope, *, frozen: bool = False) -> Layout:
    """The running means and variances that training at this scope moves: mean, variance, mean, variance..."""
    trained = set() if frozen else set(trained_names(network, scope))
    names = []
    for place, module in network.named_modules():
        if isinstance(module, _BatchNorm) and f"{place}.weight" in trained:
            names += [f"{place}.running_mean", f"{place}.running_var"]
    return _layout(network, names)


def rest_layout(network: Network, *others: Layout) -> Layout:
    """What the other layouts leave out: it never changes in a run, and is sent once."""
    known = {name for layout in others for name in layout.names}
    names = [name for name in network.state_dict() if name not in known and not name.endswith("num_batches_tracked")]
    return _layout(network, names)


def _layout(network: Network, names: Sequence[str]) -> Layout:
    tensors = network.state_dict()
    return Layout(tuple(names), tuple(tuple(tensors[name].shape) for name in names))


def norm_parameters(network: nn.Module) -> set[str]:
    """Names of the parameters of normalisation layers that keep statistics."""
    return {
        f"{place}.{name}"
        for place, module in network.named_modules()
        if isinstance(module, _BatchNorm)
        for name, _ in module.named_parameters(recurse=False)
    }


def pack(tensors: dict[str, torch.Tensor], layout: Layout) -> np.ndarray:
    """Tensors as one array, float32 [size]."""
    if not layout.names:
        return np.zeros(0, np.float32)
    flat: np.ndarray = torch.cat([tensors[name].detach().reshape(-1).float() for name in layout.names]).cpu().numpy()
    return flat


def encode(flat: np.ndarray, precision: Precision) -> np.ndarray:
    """What travels: float32 as it is, or bfloat16's bits as uint16, half the bytes."""
    if precision == "bfloat16":
        bits: np.ndarray = torch.from_numpy(flat).to(torch.bfloat16).view(torch.uint16).numpy()
        return bits
    return np.asarray(flat, np.float32)


def decode(array: np.ndarray, layout: Layout, digest: str) -> np.ndarray:
    """float32 [size] out of an array from somewhere else, which is not trusted.

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
    found: np.ndarray = flat.numpy()
    return found


def unpack(flat: np.ndarray, layout: Layout) -> dict[str, torch.Tensor]:
    """Tensors float32 out of an array [size], in memory of their own."""
    parts = torch.split(torch.from_numpy(flat).clone(), [int(np.prod(shape)) for shape in layout.shapes])
    return {name: part.reshape(shape) for name, part, shape in zip(layout.names, parts, layout.shapes, strict=True)}


def merge_norm(arrays: Sequence[np.ndarray], weights: Sequence[float], layout: Layout) -> np.ndarray:
    """Running statistics of all images together, out of those of each site.

    The variance of a mixture is the mean of the variances and the variance of the means.

    Args:
        arrays: float32 [size] of `norm_layout`, one a site.
        weights: Images of each site.
        layout: Of the arrays.
    """
    share = np.asarray(weights, np.float64)[:, None] / np.sum(weights)
    merged = np.zeros(layout.size)
    stack = np.stack(arrays).astype(np.float64)
    for (a, b), (c, d) in zip(layout.parts("running_mean"), layout.parts("running_var"), strict=True):
        merged[a:b] = (share * stack[:, a:b]).sum(0)
        merged[c:d] = (share * (stack[:, c:d] + stack[:, a:b] ** 2)).sum(0) - merged[a:b] ** 2
    return merged.astype(np.float32)
