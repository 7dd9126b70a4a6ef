"""What a model makes of the published originals, when it was trained on smaller copies of them.

    python bench/copies.py --shards SHARDS --originals FOLDER --model MODEL [--model MODEL ...]

Each original (named by its image id) is asked beside its copy in the shards. Agreement, the change of the probabilities
and refusals are of all images; accuracy and log loss only of those that no network learnt from. Intervals: 95 % lesion
bootstrap, 1,000 resamples, seed 0; of differences in the same resamples.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from rounds import machine

from dermaflow.bundles.bundle import load_bundle
from dermaflow.evaluation.intervals import lesion_weights
from dermaflow.preparation.reading import ShardFolder, labels_of
from dermaflow.scoring.predictor import Predictor

RESAMPLES = 1000


def main(models: list[str], shards: str, originals: Path) -> None:
    folder = ShardFolder(shards)
    files = {path.stem: path.read_bytes() for path in sorted(originals.iterdir())}
    known, copies = [], {}
    for split in ("train", "calibration", "test"):
        meta = folder.metadata(split)
        known.append(meta[meta["image_id"].isin(files)].assign(split=split))
        copies |= dict(folder.images(split, set(known[-1]["image_id"])))
    images = pd.concat(known, ignore_index=True)
    unseen = (images["split"] != "train").to_numpy()
    lesions = images["lesion_id"].to_numpy(str)
    weights = np.vstack([np.ones(len(lesions)), lesion_weights(lesions, RESAMPLES, np.random.default_rng(0))])
    labels = labels_of(images["dx"])
    print(f"{machine()}\n{len(images)} originals, {unseen.sum()} of them not trained on")
    print(f"data {folder.manifest.data_hash[:12]}")
    print("\n| model | figure | of | copies | originals | originals less copies |\n|---|---|---|---|---|---|")

    def say(name: str, figure: str, of: np.ndarray, *found: np.ndarray) -> None:
        means = [(weights[:, of] @ each[of]) / weights[:, of].sum(1) for each in found]
        cells = [interval(mean) for mean in means]
        cells = [*cells, interval(means[1] - means[0])] if len(cells) == 2 else ["", *cells, ""]
        print(f"| {name} | {figure} | {of.sum()} | " + " | ".join(cells) + " |", flush=True)

    for model in models:
        loaded = load_bundle(model)
        predictor = Predictor(loaded)
        limit = np.inf if predictor.calibration.ood is None else predictor.calibration.ood.threshold
        answers = [predictor.answer([source[name] for name in images["image_id"]]) for source in (copies, files)]
        p, q = (each.p for each in answers)
        name, everything = f"{Path(model).name} {loaded.sha256[:8]}", np.ones(len(images), bool)
        say(name, "accuracy", unseen, *((each.argmax(1) == labels) * 1.0 for each in (p, q)))
        say(name, "log loss", unseen, *(-np.log(each[np.arange(len(labels)), labels]) for each in (p, q)))
        say(name, "refused", everything, *(np.array([bool(f) for f in a.flags]) | (a.ood > limit) for a in answers))
        say(name, "same diagnosis", everything, (p.argmax(1) == q.argmax(1)) * 1.0)
        say(name, "largest change of a probability", everything, np.abs(p - q).max(1))


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
