"""A recipe: everything that decides what a training run gives, in one YAML file."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dermaflow.errors import RecipeError
from dermaflow.learning.augmentation import AugmentConfig
from dermaflow.learning.backbones import BackboneConfig
from dermaflow.learning.losses import DistillationConfig, LossConfig
from dermaflow.learning.optimisation import OptimConfig
from dermaflow.preparation.balancing import BalanceConfig
from dermaflow.preparation.splits import SplitConfig
from dermaflow.preparation.transforms import IMAGENET_MEAN, IMAGENET_STD
from dermaflow.schemas.bundle import InputSpec


class SizeConfig(BaseModel):
    """Size of the network's input in pixels, and how an image is looked at."""

    model_config = ConfigDict(extra="forbid")

    height: int = Field(144, ge=16, le=1024)
    width: int = Field(192, ge=16, le=1024)
    views: Literal[1, 4] = Field(1, description="1, or 4: mean over the image and its flips when predicting.")
    small_epochs: int = Field(
        0, ge=0, description="So many first epochs train at two thirds of the size, for less than half the work."
    )

    def at_epoch(self, epoch: int) -> tuple[int, int]:
        """Height and width to train at; growing sizes are those of EfficientNetV2 (arXiv 2104.00298)."""
        if epoch >= self.small_epochs:
            return self.height, self.width
        return self.height * 2 // 3, self.width * 2 // 3


class BootstrapConfig(BaseModel):
    """The lesion bootstrap that gives every figure of the evaluation its interval."""

    model_config = ConfigDict(extra="forbid")

    seed: int = Field(0, ge=0)
    resamples: int = Field(1000, ge=1)


class Recipe(BaseModel):
    """The components' configurations, side by side."""

    model_config = ConfigDict(extra="forbid")

    name: str
    description: str = ""
    seed: int = Field(0, ge=0, lt=2**32)
    input: SizeConfig = SizeConfig()
    backbone: BackboneConfig = BackboneConfig()
    balance: BalanceConfig = BalanceConfig()
    loss: LossConfig = LossConfig()
    distillation: DistillationConfig | None = Field(
        None, description="Learn from a finished model too; needs --teacher."
    )
    augment: AugmentConfig = AugmentConfig()
    optim: OptimConfig = OptimConfig()
    validation_fold: int | str | None = Field(
        None, description="Keep this lesion fold, or all images of this source, out of training and validate on them."
    )
    train_share: float | None = Field(
        None, gt=0, le=1, description="Learn from this share of the training lesions only, for a learning curve."
    )
    monitor_every: int = Field(1, ge=1, description="Epochs between looks at the validation loss.")
    members: dict[str, dict[str, Any]] = Field(
        {}, description="An ensemble: name of each member and its changes to this recipe, as in {optim.epochs: 3}."
    )
    split: SplitConfig = Field(SplitConfig(), description="For prepare.")
    bootstrap: BootstrapConfig = Field(BootstrapConfig(), description="For evaluate.")

    @model_validator(mode="after")
    def _patience_needs_a_fold(self) -> Recipe:
        if self.optim.patience is not None and self.validation_fold is None:
            raise ValueError("optim.patience needs validation_fold: nothing may be chosen on calibration or test")
        return self

    @property
    def digest(self) -> str:
        """SHA-256 of what decides the training; the same digest, data and weights are the same experiment.

        How the data are split is part of the data, and the bootstrap comes after. What a recipe does not use is left
        out, so that a key that was added since does not make it another one.
        """
        optional = ("distillation", "members", "train_share")
        unused: dict[str, Any] = {key: True for key in optional if not getattr(self, key)}
        unused |= {"split": True, "bootstrap": True}
        unused["augment"] = {key for key in ("sharpness", "noise") if not getattr(self.augment, key)}
        unused["optim"] = {
            key for key, usual in (("trained", "all"), ("freeze_norm", False)) if getattr(self.optim, key) == usual
        }
        return hashlib.sha256(self.model_dump_json(exclude=unused).encode()).hexdigest()

    def starting_from(self, weights: Path | None) -> Recipe:
        """The recipe with the name of a weights file, if there is one, in place of its own weights."""
        if weights is None:
            return self
        return self.model_copy(update={"backbone": self.backbone.model_copy(update={"weights": weights.name})})

    def member_recipes(self) -> dict[str, Recipe]:
        """The recipes of an ensemble's members by name.

        Raises:
            RecipeError: A change names no key, or has an impossible value; or two members are the same training.
        """
        recipes = {
            name: _changed(self.model_dump(mode="json", exclude={"members"}), {"name": name} | changes, name)
            for name, changes in self.members.items()
        }
        twins: dict[str, str] = {}
        for name, recipe in recipes.items():
            first = twins.setdefault(recipe.model_copy(update={"name": ""}).digest, name)
            if first != name:
                raise RecipeError(
                    f"the same training as {first}", where=name, expected="members that differ",
                    todo=f"give it another seed: --set members.{name}.seed={recipe.seed + 1}",
                )  # fmt: skip
        return recipes

    @property
    def input_spec(self) -> InputSpec:
        """The part of the recipe that a finished model needs to look at an image."""
        size = self.input
        return InputSpec(height=size.height, width=size.width, mean=IMAGENET_MEAN, std=IMAGENET_STD, views=size.views)


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with DermaFlow."""
    folder = resources.files("dermaflow.learning") / "recipes"
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def load_recipe(name_or_file: str, changes: dict[str, Any] | None = None) -> Recipe:
    """Load a shipped recipe by name or a YAML file, with changes on top.

    ``base: RECIPE`` in a file stands for all keys of that recipe but its name and description; a base that is a file is
    looked for beside it.

    Args:
        name_or_file: For instance ``ham10000-cpu`` or ``my/recipe.yaml``.
        changes: Dotted keys and values, as in ``{"optim.epochs": 3}``.

    Raises:
        RecipeError: No such recipe, a misspelt key or an impossible value.
    """
    return _changed(_read(name_or_file), changes or {}, name_or_file)


def _read(name_or_file: str, above: tuple[str, ...] = ()) -> dict[str, Any]:
    """Keys and values of a recipe, on top of those of its `base`; `above` are the recipes whose base it is."""
    if name_or_file in above:
        raise RecipeError("is its own base", where=name_or_file, expected="a base that ends")
    file = Path(name_or_file)
    if file.suffix in (".yaml", ".yml"):
        if not file.is_file():
            raise RecipeError("no such file", where=file, expected="a recipe", todo="see dermaflow train --help")
        text = file.read_text(encoding="utf-8")
    elif name_or_file in shipped_recipes():
        text = (resources.files("dermaflow.learning") / "recipes" / f"{name_or_file}.yaml").read_text(encoding="utf-8")
    else:
        raise RecipeError(
            f"no recipe {name_or_file!r}", expected="one of " + ", ".join(shipped_recipes()) + ", or a .yaml file"
        )
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"not YAML: {error}", where=name_or_file) from error
    if not isinstance(content, dict):
        raise RecipeError(f"a {type(content).__name__}", where=name_or_file, expected="keys and values")
    if (base := content.pop("base", None)) is None:
        return content
    place = str(file.with_name(base)) if str(base).endswith((".yaml", ".yml")) else str(base)
    below = _read(place, (*above, name_or_file))
    for key in ("name", "description"):
        below.pop(key, None)
    return _merged(below, content)


def _changed(content: dict[str, Any], changes: dict[str, Any], where: str) -> Recipe:
    """A recipe from keys and values, with changes on top: ``{"optim.lr": 0.1}`` or ``{"optim": {"lr": 0.1}}``."""
    try:
        return Recipe.model_validate(_merged(content, changes))
    except ValidationError as error:
        raise RecipeError("; ".join(_explain(item) for item in error.errors()), where=where) from error


def _merged(content: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    for key, value in _dotted(changes):
        _set(content, key, value)
    return content


def _dotted(changes: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in changes.items():
        if isinstance(value, dict) and value:
            yield from _dotted(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _set(content: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        if content.get(parent) is None:  # `distillation: null`, say
            content[parent] = {}
        content = content[parent]
        if not isinstance(content, dict):
            raise RecipeError(f"{parent!r} holds no keys", where=dotted, expected="a key such as optim.epochs")
    content[last] = value


def _explain(item: Any) -> str:
    place = ".".join(str(part) for part in item["loc"])
    if item["type"] != "extra_forbidden":
        return f"{place or 'recipe'}: {item['msg']} (found {item['input']!r})" if place else str(item["msg"])
    model: type[BaseModel] = Recipe
    for part in item["loc"][:-1]:
        model = model.model_fields[part].annotation  # type: ignore[assignment]
    near = difflib.get_close_matches(item["loc"][-1], model.model_fields, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "expected one of " + ", ".join(model.model_fields)
    return f"unknown key {place!r}, {hint}"
