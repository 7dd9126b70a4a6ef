"""One epoch as DermaFlow trains, alone and under Ray Train, against the script that one would write instead.

    python bench/training.py [--images 768] [--rounds 5] [--network mobilenet_v2]

DermaFlow's ways both run `dermaflow.learning.loop.fit` with the same recipe (144x192, everything trained, batch 32) on
the same shards, with as many torch threads as the machine has cores; Ray Train has one worker. The third is the first
with PyTorch's own gradients of depthwise convolutions (`dermaflow.learning.depthwise`), which matter where the CPU
computes in bfloat16. The script reads the same JPEGs through a DataLoader with a worker a core and torchvision's
transforms, and trains the same network by AdamW in float32, as torchvision gives it.

A round trains two epochs each way and counts the second, so that start-up does not count; it is printed apart. Each way
has a process of its own, and Ray is stopped while the others have their turn.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from rounds import compare, in_process, machine
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from dermaflow.datasets.synthetic import generate
from dermaflow.learning.backbones import build
from dermaflow.learning.cluster import fit_on_cluster
from dermaflow.learning.depthwise import DepthwiseConv2d
from dermaflow.learning.local import fit_here
from dermaflow.learning.optimisation import pick_precision
from dermaflow.learning.recipe import Recipe
from dermaflow.preparation.cluster import disconnect
from dermaflow.preparation.prepare import prepare
from dermaflow.preparation.reading import ShardFolder
from dermaflow.preparation.transforms import IMAGENET_MEAN, IMAGENET_STD
from dermaflow.taxonomy import INDEX


def plain(recipe: Recipe, data: Path, checkpoints: Path, told: Path, *, torchs_gradients: bool = False) -> None:
    shutil.rmtree(checkpoints, ignore_errors=True)
    network = build(recipe.backbone)
    for module in network.modules():
        if torchs_gradients and isinstance(module, DepthwiseConv2d):
            module.__class__ = nn.Conv2d
    _tell(told, fit_here(network, recipe, ShardFolder(data / "shards"), checkpoints, lambda *_: None)[1])


def on_ray(recipe: Recipe, data: Path, checkpoints: Path, told: Path) -> None:
    shutil.rmtree(checkpoints, ignore_errors=True)
    _tell(told, fit_on_cluster(build(recipe.backbone), recipe, ShardFolder(data / "shards"), checkpoints, 1)[1])
    disconnect()


class Pictures(Dataset):
    """Files and diagnoses of the training split, as a script would read them."""

    def __init__(self, data: Path, height: int, width: int) -> None:
        meta = ShardFolder(data / "shards").metadata("train")
        files = {file.stem: file for file in data.glob("data/HAM10000_images_part_*/*.jpg")}
        self.items = [(files[name], INDEX[dx]) for name, dx in zip(meta["image_id"], meta["dx"], strict=True)]
        self.transform = v2.Compose(
            [
                v2.RandomResizedCrop((height, width), scale=(0.6, 1.0)), v2.RandomHorizontalFlip(),
                v2.RandomVerticalFlip(), v2.RandomRotation(180), v2.ColorJitter(0.2, 0.2, 0.2, 0.02), v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        file, label = self.items[index]
        return self.transform(Image.open(file).convert("RGB")), label


def script(recipe: Recipe, data: Path, checkpoints: Path, told: Path) -> None:
    pictures = Pictures(data, recipe.input.height, recipe.input.width)
    batches = DataLoader(
        pictures, recipe.optim.batch_size, shuffle=True, drop_last=True, num_workers=os.cpu_count() or 1
    )
    network = build(recipe.backbone)
    for module in network.modules():
        if isinstance(module, DepthwiseConv2d):
            module.__class__ = nn.Conv2d
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    history = []
    for _ in range(recipe.optim.epochs):
        began = time.perf_counter()
        for images, labels in batches:
            loss = nn.functional.cross_entropy(network(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        history.append({"seconds": time.perf_counter() - began})
    _tell(told, history)


def _tell(file: Path, history: list[dict[str, float]]) -> None:
    file.write_text(json.dumps([entry["seconds"] for entry in history]))


WAYS = {
    "dermaflow, this process": plain,
    "dermaflow, Ray Train, 1 worker": on_ray,
    "the first with PyTorch's gradients": partial(plain, torchs_gradients=True),
    "script: DataLoader, torchvision, float32": script,
}


def main(images: int, rounds: int, backbone: str) -> None:
    recipe = Recipe.model_validate(
        {
            "name": "bench",
            "optim": {"head_epochs": 0, "epochs": 2},
            "monitor_every": 1000,
            "backbone": {"name": backbone},
        }
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        generate(folder / "data", images, 0, height=150, width=200, workers=os.cpu_count() or 1)
        prepare(folder / "data", folder / "shards", use_ray=False)
        overheads: dict[str, list[float]] = {way: [] for way in WAYS}

        def turn(way: str) -> float:
            told = folder / "told.json"
            whole = jobs[way](recipe, folder, folder / "checkpoints", told)
            epochs = json.loads(told.read_text())
            overheads[way].append(whole - sum(epochs))
            return epochs[-1]

        trained = sum(ShardFolder(folder / "shards").manifest.counts["train"].values())
        precision = pick_precision(recipe.optim, torch.device("cpu"))
        print(f"{machine()}, {precision}\n{trained} training images of 144x192, batch 32, {backbone}")
        with ExitStack() as stack:
            jobs = {name: in_process(stack, job) for name, job in WAYS.items()}
            compare({name: partial(turn, name) for name in WAYS}, rounds, "epoch", trained)
        for kind, values in overheads.items():
            middle = sorted(values)[len(values) // 2]
            print(f"outside the epochs (start, decode, validate, save), {kind}: {middle:.1f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--network", default="mobilenet_v2")
    chosen = parser.parse_args()
    main(chosen.images, chosen.rounds, chosen.network)
