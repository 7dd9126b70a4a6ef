"""What an amount of images needs in cores and hours: a model of cost from runs at two sizes, held against a third.

    python bench/sizing.py [--sizes 1000 3000 --check 6000] [--epochs 30] [--out sizing.json]

Preparing, scoring and training run in a process of their own each, without Ray, on drawn images of the published size
(600x450) and MobileNetV2 at 144x192. What is measured is the time of the processors, not of the clock: so a busy
machine disturbs it little, and it can be divided by cores. The model is a straight line for each,

    seconds(images) = start + images * each

through the two sizes; for training, the difference between a run of two epochs and one of one epoch is an epoch. The
third size is measured after the line is drawn. Hours on C cores are start + images * each / C / SHARE: the start does
not divide, and SHARE is what Ray Data leaves of the cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import yaml
from rounds import machine

from dermaflow.datasets.synthetic import generate

DRAWN = 150
FEWER = 10  # times fewer images train than are prepared and scored: each costs that much more
SHARE = 0.8
CORES = (2, 16, 128, 1024)
AMOUNTS = (10**4, 10**6, 10**8)

PREPARE = "from dermaflow.preparation.prepare import prepare; prepare(Path(a[0]), a[1], use_ray=False)"
SCORE = "from dermaflow.scoring.bulk import score; score(a[0], a[1], model=a[2], use_ray=False)"
TRAIN = (
    "from dermaflow.learning.train import train; from dermaflow.learning.recipe import load_recipe;"
    "train(a[0], load_recipe(a[2]), Path(a[1]))"
)


@dataclass
class Cost:
    """A straight line: CPU seconds at the start and for each image; peak memory in MiB at the largest size."""

    start: float
    each: float
    memory: float

    @classmethod
    def through(cls, small: tuple[int, float], large: tuple[int, float], memory: float) -> Cost:
        each = (large[1] - small[1]) / (large[0] - small[0])
        return cls(small[1] - each * small[0], each, memory)

    def at(self, images: float) -> float:
        """CPU seconds of so many images."""
        return self.start + self.each * images

    def hours(self, images: float, cores: int) -> float:
        """Hours by the clock on so many cores."""
        return (self.start + self.each * images / cores / SHARE) / 3600


def cpu_seconds(program: str, *arguments: object) -> tuple[float, float]:
    """CPU seconds and peak memory (MiB) of a program in a process of its own, and of all it started."""
    words = [sys.executable, "-c", f"import sys; from pathlib import Path; a = sys.argv[1:]; {program}"]
    process = subprocess.Popen([*words, *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{program}\n{said.decode()[-3000:]}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def make_archive(folder: Path, drawn: Path, images: int) -> Path:
    """So many images from a few drawn ones: other ids, other bytes after the end, so that each is read for itself."""
    table = pd.read_csv(drawn / "HAM10000_metadata.csv")
    sources = {path.stem: path for path in drawn.rglob("*.jpg")}
    place = folder / "HAM10000_images_part_1"
    place.mkdir(parents=True)
    rows = []
    for i in range(images):
        row = table.iloc[i % len(table)].to_dict()
        old, turn = row["image_id"], i // len(table)
        row["image_id"], row["lesion_id"] = f"ISIC_{5_000_000 + i:07d}", f"{row['lesion_id']}{turn:05d}"
        (place / f"{row['image_id']}.jpg").write_bytes(sources[old].read_bytes() + i.to_bytes(4, "big"))
        rows.append(row)
    pd.DataFrame(rows).to_csv(folder / "HAM10000_metadata.csv", index=False)
    return folder


def recipe_of(folder: Path, epochs: int) -> Path:
    """A recipe of so many epochs of the whole network, nothing else."""
    path = folder / f"epochs{epochs}.yaml"
    optim = {"batch_size": 32, "head_epochs": 0, "epochs": epochs}
    recipe = {
        "name": f"sizing{epochs}", "input": {"height": 144, "width": 192}, "backbone": {"name": "mobilenet_v2"},
        "optim": optim, "monitor_every": 100,
    }  # fmt: skip
    path.write_text(yaml.safe_dump(recipe))
    return path


def measure(folder: Path, drawn: Path, images: int) -> dict[str, tuple[float, float]]:
    """CPU seconds and memory of preparing and scoring so many images, and of an epoch over a tenth of them."""
    archive = make_archive(folder / f"{images}", drawn, images)
    found = {"prepare": cpu_seconds(PREPARE, archive, folder / f"{images}-prepared")}
    shards = folder / f"{images}-shards"
    cpu_seconds(PREPARE, make_archive(folder / f"{images}-few", drawn, images // FEWER), shards)
    runs = [
        cpu_seconds(TRAIN, shards, folder / f"{images}-model{epochs}", recipe_of(folder, epochs)) for epochs in (1, 2)
    ]
    trained = json.loads((shards / "manifest.json").read_text())["counts"]["train"]
    share = sum(trained.values()) / (images // FEWER)  # the rest is calibration and test
    found["epoch"] = ((runs[1][0] - runs[0][0]) / share, runs[1][1])
    found["score"] = cpu_seconds(
        SCORE, archive / "HAM10000_images_part_1", folder / f"{images}-scored", folder / f"{images}-model1"
    )
    print(
        f"{images:>7} images: " + ", ".join(f"{k} {v[0]:.1f} CPU s, {v[1]:.0f} MiB" for k, v in found.items()),
        flush=True,
    )
    return found


def main(sizes: list[int], check: int, epochs: int, out: Path | None) -> None:
    print(machine())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        generate(drawn := folder / "drawn", DRAWN, 0, workers=os.cpu_count() or 1)
        small, large = (measure(folder, drawn, size) for size in sizes)
        costs = {}
        for part in small:
            few = FEWER if part == "epoch" else 1
            points = ((size // few, run[part][0]) for size, run in zip(sizes, (small, large), strict=True))
            costs[part] = Cost.through(*points, large[part][1])
        costs["epoch"].start = max(0.0, costs["epoch"].start)
        third = measure(folder, drawn, check)
    print("\n| part | CPU s at the start | CPU ms an image | peak MiB | at the third size: model | measured | off by |")
    print("|---|---|---|---|---|---|---|")
    for part, cost in costs.items():
        said, was = cost.at(check // FEWER if part == "epoch" else check), third[part][0]
        print(f"| {part} | {cost.start:.1f} | {cost.each * 1000:.2f} | {cost.memory:.0f} | {said:.1f} | {was:.1f} | "
              f"{said / was - 1:+.0%} |")  # fmt: skip
    print("\n| images | part | CPU hours | " + " | ".join(f"hours on {c} cores" for c in CORES) + " |")
    print("|---|---|---|" + "---|" * len(CORES))
    for amount in AMOUNTS:
        for part, cost in costs.items():
            times = epochs if part == "epoch" else 1
            hours = [f"{times * cost.hours(amount, cores):.2g}" for cores in CORES]
            title = f"{epochs} epochs" if part == "epoch" else part
            print(f"| {amount:,} | {title} | {times * cost.at(amount) / 3600:.2g} | " + " | ".join(hours) + " |")
    if out is not None:
        found = {part: asdict(cost) | {"measured": third[part][0]} for part, cost in costs.items()}
        out.write_text(json.dumps({"machine": machine(), "sizes": sizes, "check": check, "costs": found}, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs=2, default=[1000, 3000])
    parser.add_argument("--check", type=int, default=6000)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    main(given.sizes, given.check, given.epochs, given.out)
