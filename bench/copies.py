"""What a model makes of the published originals, when it was trained on smaller copies of them.

    python bench/copies.py --shards SHARDS --originals FOLDER --model MODEL [--model MODEL ...]

Each original (named by its image id) is asked beside its copy in the shards: as it is, in the size of the copy but
without JPEG, as a copy made with another filter, and as DermaFlow makes a copy (`InputSpec.copies`). Agreement and
refusals are of all images; accuracy and log loss only of those that no network learnt from. Intervals: 95 % lesion
bootstrap, 1,000 resamples, seed 0; of differences from the copies in the same resamples.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from rounds import machine

from dermaflow.bundles.bundle import LoadedBundle, load_bundle
from dermaflow.datasets.images import small_copy
from dermaflow.evaluation.intervals import lesion_weights
from dermaflow.preparation.reading import ShardFolder, labels_of
from dermaflow.schemas.bundle import Copies
from dermaflow.scoring.predictor import Predictor

RESAMPLES = 1000


def main(models: list[str], shards: str, originals: Path) -> None:
    folder = ShardFolder(shards)
    stored = folder.copies()
    if stored is None:
        raise SystemExit(f"{shards}: the images are no small JPEG copies alike")
    files = {path.stem: path.read_bytes() for path in sorted(originals.iterdir())}
    known, copies = [], {}
    for split in ("train", "calibration", "test"):
        meta = folder.metadata(split)
        known.append(meta[meta["image_id"].isin(files)].assign(split=split))
        copies |= dict(folder.images(split, set(known[-1]["image_id"])))
    images = pd.concat(known, ignore_index=True)
    ways = {
        "copies of the shards": copies,
        "originals as they are": files,
        "bicubic, no JPEG": {
            name: resized(data, stored, Image.Resampling.BICUBIC, "PNG") for name, data in files.items()
        },
        "box filter, JPEG": {name: resized(data, stored, Image.Resampling.BOX, "JPEG") for name, data in files.items()},
        "copies by DermaFlow": {
            name: small_copy(data, stored.height, stored.width, stored.quality) for name, data in files.items()
        },
    }
    unseen, everything = (images["split"] != "train").to_numpy(), np.ones(len(images), bool)
    lesions = images["lesion_id"].to_numpy(str)
    weights = np.vstack([np.ones(len(lesions)), lesion_weights(lesions, RESAMPLES, np.random.default_rng(0))])
    labels = labels_of(images["dx"])
    print(f"{machine()}\n{len(images)} originals, {unseen.sum()} of them not trained on; copies: {stored}")
    print(f"data {folder.manifest.data_hash[:12]}\n\ndifferences are from the copies of the shards")
    print("\n| model | images | accuracy | log loss | difference | refused | difference | same diagnosis |")
    print("|---|---|---|---|---|---|---|---|")

    def mean(values: np.ndarray, of: np.ndarray) -> np.ndarray:
        return (weights[:, of] @ values[of]) / weights[:, of].sum(1)

    for model in models:
        loaded = load_bundle(model)
        predictor = Predictor(as_they_come(loaded))
        limit = np.inf if predictor.calibration.ood is None else predictor.calibration.ood.threshold
        first: tuple[np.ndarray, ...] = ()
        for way, content in ways.items():
            found = predictor.answer([content[name] for name in images["image_id"]])
            loss = mean(-np.log(found.p[np.arange(len(labels)), labels]), unseen)
            refused = mean(np.array([bool(flags) for flags in found.flags]) | (found.ood > limit), everything)
            called = found.p.argmax(1)
            first = first or (loss, refused, called)
            cells = [
                mean((called == labels) * 1.0, unseen), loss, loss - first[0], refused, refused - first[1],
                mean((called == first[2]) * 1.0, everything),
            ]  # fmt: skip
            print(f"| {Path(model).name} | {way} | " + " | ".join(interval(cell) for cell in cells) + " |", flush=True)


def as_they_come(loaded: LoadedBundle) -> LoadedBundle:
    """The model, without copies made of what it is given."""
    spec = loaded.bundle.input.model_copy(update={"copies": None})
    return dataclasses.replace(loaded, bundle=loaded.bundle.model_copy(update={"input": spec}))


def resized(data: bytes, stored: Copies, how: Image.Resampling, kind: str) -> bytes:
    """An original in the size of the copies."""
    stream = io.BytesIO()
    image = Image.open(io.BytesIO(data)).convert("RGB").resize((stored.width, stored.height), how)
    image.save(stream, kind, quality=stored.quality)
    return stream.getvalue()


def interval(draws: np.ndarray) -> str:
    """The figure and its interval; the first draw is of the lesions as they are."""
    low, high = np.quantile(draws[1:], [0.025, 0.975])
    return f"{draws[0]:.3f} ({low:.3f} to {high:.3f})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", required=True)
    parser.add_argument("--originals", type=Path, required=True)
    parser.add_argument("--model", dest="models", action="append", required=True)
    chosen = parser.parse_args()
    main(chosen.models, chosen.shards, chosen.originals)
