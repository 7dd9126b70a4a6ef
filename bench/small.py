"""What storing a model small changes in its answers.

    python bench/small.py --model MODEL --shards SHARDS

The model as it is and stored in float16 (`dermaflow models shrink`) are asked for every image of the calibration split.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from dermaflow.bundles.bundle import LoadedBundle, load_bundle
from dermaflow.bundles.small import make_small
from dermaflow.learning.inference import network_of, predict
from dermaflow.preparation.reading import ShardFolder
from dermaflow.settings import settings
from dermaflow.trust.temperature import scale


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--shards", required=True)
    chosen = parser.parse_args()
    large, shards = load_bundle(chosen.model), ShardFolder(chosen.shards)
    with tempfile.TemporaryDirectory() as folder:
        small = make_small(chosen.model, Path(folder) / "small")
    spec = large.bundle.input
    pixels = shards.pixels("calibration", spec.height, spec.width, spec.copies, threads=settings().threads)
    before, after = probabilities(large, pixels), probabilities(small, pixels)
    moved, other = np.abs(before - after).max(), (before.argmax(1) != after.argmax(1)).sum()
    print(
        f"{len(pixels):,} images: a probability moves by at most {moved:.4f}; {other} get another most probable class"
    )


def probabilities(model: LoadedBundle, pixels: np.ndarray) -> np.ndarray:
    """Calibrated, float [N, 7]."""
    fitted = model.bundle.calibration
    assert fitted is not None  # `make_small` asked
    logits, _ = predict(network_of(model), pixels, model.bundle.input)
    return scale(logits, fitted.temperature, np.array(fitted.bias))


if __name__ == "__main__":
    main()
