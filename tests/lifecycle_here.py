"""A small world for the lifecycle: an archive, its shards, a champion in a registry, and images that arrive."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from tiny_data import METADATA, image_files, prepare_here

from dermaflow.bundles.registry import Registry
from dermaflow.datasets.synthetic.generate import generate
from dermaflow.evaluation.run import evaluate_bundle
from dermaflow.learning.recipe import load_recipe
from dermaflow.learning.train import train

RECIPE = """
name: tiny
input: {height: 24, width: 32}
backbone: {name: seed_cnn, weights: none}
optim: {batch_size: 16, head_epochs: 0, epochs: EPOCHS, layer_decay: 1.0}
"""


@dataclass(frozen=True)
class Ward:
    """Folders of a lifecycle; the champion is trained and in the registry."""

    root: Path

    @classmethod
    def build(cls, root: Path, images: int = 240) -> Ward:
        """Draw, prepare, train and promote."""
        made = cls(root)
        generate(made.data, images, 0, height=75, width=100)
        prepare_here(made.data, made.shards, fractions={"train": 0.4, "calibration": 0.2, "test": 0.4})
        made.recipe.write_text(RECIPE.replace("EPOCHS", "2"))
        train(made.shards, load_recipe(str(made.recipe)), root / "model")
        evaluate_bundle(root / "model", made.shards, root / "report", resamples=20)
        registry = Registry(made.registry)
        registry.promote(registry.add(root / "model").id, reason="first", by="a test")
        return made

    def copy(self, root: Path) -> Ward:
        """The same in another folder; images and model are shared."""
        root.mkdir(parents=True, exist_ok=True)
        for name in ("shards", "registry"):
            shutil.copytree(self.root / name, root / name)
        (root / "data").symlink_to(self.data)
        shutil.copy(self.recipe, root / "tiny.yaml")
        return Ward(root)

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def shards(self) -> Path:
        return self.root / "shards"

    @property
    def registry(self) -> Path:
        return self.root / "registry"

    @property
    def recipe(self) -> Path:
        return self.root / "tiny.yaml"

    @property
    def landing(self) -> Path:
        return self.root / "landing"

    @property
    def out(self) -> Path:
        return self.root / "lifecycle"

    def arguments(self, **changes: Any) -> dict[str, Any]:
        """Parameters of the flow."""
        chosen = {
            "landing": str(self.landing), "data": self.data, "shards": str(self.shards), "out": self.out,
            "registry": str(self.registry), "recipe": str(self.recipe), "resamples": 50,
        }  # fmt: skip
        return chosen | changes


def arrive(ward: Ward, images: int = 24, seed: int = 5, *, labelled: bool = True, name: str = "new") -> pd.DataFrame:
    """Draw images that were never seen and put them into the landing area; returns their metadata."""
    drawn = ward.root / f"drawn-{name}"
    generate(drawn, images, seed, height=75, width=100)
    table = pd.read_csv(drawn / METADATA, dtype=str)
    table["image_id"], table["lesion_id"] = name + table["image_id"], name + table["lesion_id"]
    folder = ward.landing / name
    folder.mkdir(parents=True)
    for image_id, path in image_files(drawn).items():
        shutil.copy(path, folder / f"{name}{image_id}.jpg")
    if labelled:
        table.to_csv(folder / "labels.csv", index=False)
    return table
