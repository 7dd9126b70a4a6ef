"""One epoch under Ray Train against the same loop with no Ray.

    python bench/training.py [--images 768] [--rounds 5]

Both run `dermaflow.learning.loop.fit` with the same recipe (MobileNetV2 at 144x192, everything trained, batch 32) on
the same shards, with as many torch threads as the machine has cores; Ray Train has one worker. A round trains two
epochs each way and counts the second, so that start-up does not count; the start-up is printed apart. Each way has a
process of its own, and Ray is stopped while the bare loop has its turn.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from rounds import compare, in_process, machine

from dermaflow.datasets.synthetic import generate
from dermaflow.learning.backbones import build
from dermaflow.learning.cluster import fit_on_cluster
from dermaflow.learning.local import fit_here
from dermaflow.learning.recipe import Recipe
from dermaflow.preparation.cluster import disconnect
from dermaflow.preparation.prepare import prepare
from dermaflow.preparation.reading import ShardFolder


def plain(recipe: Recipe, shards: Path, checkpoints: Path, told: Path) -> None:
    shutil.rmtree(checkpoints, ignore_errors=True)
    network = build(recipe.backbone)
    _tell(told, fit_here(network, recipe, ShardFolder(shards), checkpoints, lambda *_: None)[1])


def on_ray(recipe: Recipe, shards: Path, checkpoints: Path, told: Path) -> None:
    shutil.rmtree(checkpoints, ignore_errors=True)
    _tell(told, fit_on_cluster(build(recipe.backbone), recipe, ShardFolder(shards), checkpoints, 1)[1])
    disconnect()


def _tell(file: Path, history: list[dict[str, float]]) -> None:
    file.write_text(json.dumps([entry["seconds"] for entry in history]))


def main(images: int, rounds: int) -> None:
    recipe = Recipe.model_validate(
        {
            "name": "bench",
            "optim": {"head_epochs": 0, "epochs": 2},
            "monitor_every": 1000,
            "backbone": {"name": "mobilenet_v2"},
        }
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        generate(folder / "data", images, 0, height=150, width=200, workers=os.cpu_count() or 1)
        prepare(folder / "data", folder / "shards", use_ray=False)
        overheads: dict[str, list[float]] = {"plain loop": [], "Ray Train, 1 worker": []}

        def turn(way: str) -> float:
            told = folder / "told.json"
            whole = jobs[way](recipe, folder / "shards", folder / "checkpoints", told)
            epochs = json.loads(told.read_text())
            overheads[way].append(whole - sum(epochs))
            return epochs[-1]

        trained = sum(ShardFolder(folder / "shards").manifest.counts["train"].values())
        print(f"{machine()}\n{trained} training images of 144x192, batch 32, MobileNetV2")
        with ExitStack() as stack:
            jobs = {name: in_process(stack, job) for name, job in zip(overheads, (plain, on_ray), strict=True)}
            compare({name: partial(turn, name) for name in overheads}, rounds, "epoch", trained)
        for kind, values in overheads.items():
            print(
                f"outside the epochs (start, decode, validate, save), {kind}: {sorted(values)[len(values) // 2]:.1f} s"
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    main(chosen.images, chosen.rounds)
