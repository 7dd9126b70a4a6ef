"""What the trust features cost on real images and what they catch of everything else.

    python bench/trust.py --model runs/model --shards runs/shards [--split test] [--each 100]
    python bench/trust.py --shards runs/shards --fit-quality

Real images: the split's, as they are, for the false alarms of the quality gate, of the distance from the training
images, and of both. Everything else: drawn by program, or images of the split made useless (`nonlesions.py`), half of
it at 200x150 and half at 600x450, encoded as JPEG. Intervals are 95 % Wilson intervals; for real images the lesion
bootstrap of `dermaflow evaluate` gives those to publish. ``--split calibration`` is for choosing, ``test`` for
reporting. ``--fit-quality`` prints the quantiles of the training split that the gate's thresholds come from.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields

import numpy as np
from nonlesions import DRAWN, SPOILT
from PIL import Image
from rounds import machine
from scipy.stats import binomtest

from dermaflow.bundles.bundle import load_bundle
from dermaflow.datasets.images import decode
from dermaflow.datasets.quality import HEIGHT, LIMITS, WIDTH, Measures, measure
from dermaflow.preparation.reading import ShardFolder
from dermaflow.schemas.shard import Split
from dermaflow.scoring.predictor import Predictor
from dermaflow.settings import settings

BATCH = 64


def main(model: str, shards: str, split: Split, each: int, seed: int) -> None:
    loaded, folder = load_bundle(model), ShardFolder(shards)
    predictor = Predictor(loaded)
    fitted = predictor.calibration.ood
    images = [data for _, data in folder.images(split)]
    print(f"{machine()}\nmodel {loaded.sha256[:12]}, {split} split of {folder.manifest.data_hash[:12]}, seed {seed}")
    if fitted is None:
        print("the bundle keeps no reference: the gate alone")
    else:
        print(f"distance: {fitted.method}, unusual above {fitted.threshold:.3f} (quantile {fitted.quantile})")
    print("\n| images | n | stopped by gate or distance | gate alone | distance alone |\n|---|---|---|---|---|")
    limit = np.inf if fitted is None else fitted.threshold

    def say(name: str, encoded: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        gate, unlike = [], []
        for start in range(0, len(encoded), BATCH):
            answers = predictor.answer(encoded[start : start + BATCH])
            gate += [bool(flags) for flags in answers.flags]
            unlike += (answers.ood > limit).tolist()
        stopped, far = np.array(gate), np.array(unlike)
        cells = [share(stopped | far), share(stopped), share(far)]
        print(f"| {name} | {len(encoded)} | " + " | ".join(cells) + " |", flush=True)
        return stopped, far

    say(f"real, {split} split: false alarms", images)
    rng = np.random.default_rng(seed)
    everything = [say(name, drawn(draw, each, rng)) for name, draw in DRAWN.items()]
    for name, spoil in SPOILT.items():
        chosen = rng.choice(len(images), min(each, len(images)), replace=False)
        spoilt = [jpeg(spoil(rng, decode(images[i], HEIGHT, WIDTH))) for i in chosen]
        everything.append(say(name, spoilt))
    gate, far = (np.concatenate(parts) for parts in zip(*everything, strict=True))
    print(f"| all kinds | {len(gate)} | {share(gate | far)} | {share(gate)} | {share(far)} |")


def drawn(draw: Callable[..., np.ndarray], each: int, rng: np.random.Generator) -> list[bytes]:
    """Images of a drawn kind, of both sizes in turn."""
    sizes = ((150, 200), (450, 600))
    return [jpeg(draw(rng, *sizes[i % 2])) for i in range(each)]


def jpeg(pixels: np.ndarray) -> bytes:
    """Encode as cameras do."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def share(mask: np.ndarray) -> str:
    """A share in per cent with its Wilson interval."""
    found = binomtest(int(mask.sum()), len(mask)).proportion_ci(method="wilson")
    return f"{100 * mask.mean():.1f} % ({100 * found.low:.1f}-{100 * found.high:.1f})"


def fit_quality(shards: str) -> None:
    """Print, for every limit of the gate, the quantiles of its measure on the training split."""
    folder = ShardFolder(shards)
    with ThreadPoolExecutor(settings().threads) as pool:
        found = list(pool.map(lambda row: measure(decode(row[1], HEIGHT, WIDTH)), folder.images("train")))
    values = {field.name: np.array([asdict(m)[field.name] for m in found]) for field in fields(Measures)}
    print(f"{len(found)} training images of {folder.manifest.data_hash[:12]}")
    print("| measure | side | threshold | raised | 0.1 % | 0.2 % | 0.3 % |\n|---|---|---|---|---|---|---|")
    raised = np.zeros(len(found), dtype=bool)
    for limit in LIMITS:
        value, below = values[limit.measure], limit.side == "below"
        mask = value < limit.threshold if below else value > limit.threshold
        raised |= mask
        marks = [np.quantile(value, q if below else 1 - q) for q in (0.001, 0.002, 0.003)]
        cells = " | ".join(f"{mark:.4f}" for mark in marks)
        print(f"| {limit.measure} | {limit.side} | {limit.threshold} | {100 * mask.mean():.2f} % | {cells} |")
    print(f"\nraised by any: {share(raised)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="bundle")
    parser.add_argument("--shards", required=True)
    parser.add_argument("--split", choices=("calibration", "test"), default="test")
    parser.add_argument("--each", type=int, default=100, help="images of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fit-quality", action="store_true")
    given = parser.parse_args()
    if given.fit_quality:
        fit_quality(given.shards)
    elif given.model:
        main(given.model, given.shards, given.split, given.each, given.seed)
    else:
        parser.error("--model, or --fit-quality")
