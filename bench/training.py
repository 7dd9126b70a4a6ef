"""One epoch under Ray Train against the same loop with no Ray.

    python bench/training.py [--images 768] [--rounds 5]

Both run `dermaflow.learning.loop.fit` with the same recipe (MobileNetV2 at 144x192, everything trained, batch 32) on
the same shards, with as many torch threads as the machine has cores; Ray Train has one worker. A round trains two
epochs each way and counts the second, so that start-up does not count; the start-up is printed apart.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path

from rounds import compare, machine, seconds

from dermaflow.datasets.synthetic import generate
from dermaflow.learning.backbones import build
from dermaflow.learning.cluster import fit_on_cluster
from dermaflow.learning.local import fit_here
from dermaflow.learning.recipe import Recipe
from dermaflow.preparation.prepare import prepare
from dermaflow.preparation.reading import ShardFolder


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
        shards = ShardFolder(folder / "shards")
        overheads: dict[str, list[float]] = {"local": [], "ray": []}

        def epoch_of(kind: str) -> float:
            checkpoints = folder / "checkpoints"
            shutil.rmtree(checkpoints, ignore_errors=True)
            history: list[dict[str, float]] = []

            def run() -> None:
                if kind == "local":
                    history.extend(fit_here(build(recipe.backbone), recipe, shards, checkpoints, lambda *_: None)[1])
                else:
                    history.extend(fit_on_cluster(build(recipe.backbone), recipe, shards, checkpoints, 1)[1])

            whole = seconds(run)
            overheads[kind].append(whole - sum(entry["seconds"] for entry in history))
            return history[-1]["seconds"]

        trained = sum(shards.manifest.counts["train"].values())
        print(f"{machine()}\n{trained} training images of 144x192, batch 32, MobileNetV2")
        compare(
            {"plain loop": lambda: epoch_of("local"), "Ray Train, 1 worker": lambda: epoch_of("ray")},
            rounds, "epoch", trained,
        )  # fmt: skip
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
