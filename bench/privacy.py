"""What differential privacy of a lesion costs: balanced accuracy and attack against epsilon, on a frozen backbone.

    python bench/privacy.py --shards SHARDS --weights mobilenet_v2-imagenet-features.pth --out privacy-bench

The four sources of HAM10000 are four sites; each adds its own noise, as in a run with dp=lesion. Features are computed
once and kept in --out; from there on it is the code of `clients.privacy` itself. Every epsilon is repeated with new
noise; the interval is of a bootstrap over test lesions, of the mean over repetitions.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from rounds import machine
from safetensors.numpy import load_file, save_file

from clients.privacy import (
    PRIVATE_SHRINKAGE,
    REACH,
    SMALL,
    lesion_noise,
    noisy_counts,
    noisy_sum,
    noisy_sums,
    private_head,
)
from clients.site_data import SiteData
from dermaflow.evaluation.intervals import lesion_weights
from dermaflow.evaluation.membership import Part, attack
from dermaflow.learning.backbones import build
from dermaflow.learning.inference import predict
from dermaflow.learning.linear_head import ClassSums, class_sums, discriminant_head
from dermaflow.learning.recipe import load_recipe

DELTA = 1e-5
Site = tuple[np.ndarray, np.ndarray]
"""Features [L, D] of a site's training lesions, and their classes."""


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--split", choices=["calibration", "test"], default="test", help="calibration: to choose by")
    parser.add_argument("--epsilons", default="inf,16,8,4,2,1")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clip", type=float, default=9.0)
    parser.add_argument("--directions", type=int, default=128)
    parser.add_argument("--shrinkage", type=float, default=PRIVATE_SHRINKAGE)
    options = parser.parse_args()
    print(machine())
    train, other = (features_of(options, split) for split in ("train", options.split))
    sites = lesions_of(train)
    print(f"{[len(labels) for _, labels in sites]} training lesions, {len(other['labels'])} images to judge by")
    print(f"length of a feature: median {np.median(np.linalg.norm(train['features'], axis=1)):.1f}")
    weights = lesion_weights(other["lesions"], 1000, np.random.default_rng(0))
    exact = sum((class_sums(*site) for site in sites[1:]), class_sums(*sites[0]))
    head = discriminant_head(exact, priors=np.ones(7))
    print(f"\nwithout noise, all {exact.products.shape[0]} directions: {row([head], other, train, weights)}")
    print("\n| epsilon | balanced accuracy | attack by loss | attack by loss of its class |\n|---|---|---|---|")
    for text in options.epsilons.split(","):
        heads = [from_sums(sites, float(text), options) for _ in range(options.repeats)]
        print(f"| {text} {row(heads, other, train, weights)}", flush=True)


def features_of(options: argparse.Namespace, split: str) -> dict[str, np.ndarray]:
    """Features [N, D], labels, lesions (as numbers) and sites (as numbers) of a split's images."""
    path = options.out / f"{split}.safetensors"
    if not path.exists():
        recipe = load_recipe("ham10000-cpu", {"backbone.weights": options.weights})
        data = SiteData("all", options.shards)
        spec = recipe.input_spec.model_copy(update={"views": 1})
        _, features = predict(build(recipe.backbone), data.pixels(split, spec.height, spec.width), spec)
        frame = data.metadata(split)
        numbers = {name: pd.factorize(frame[name], sort=True)[0] for name in ("lesion_id", "site")}
        options.out.mkdir(parents=True, exist_ok=True)
        labels = data.labels(split)
        save_file(
            {"features": features, "labels": labels, "lesions": numbers["lesion_id"], "sites": numbers["site"]}, path
        )
    return load_file(path)


def lesions_of(train: dict[str, np.ndarray]) -> list[Site]:
    """Mean feature of each lesion, by site."""
    found = []
    for site in np.unique(train["sites"]):
        mine = train["sites"] == site
        number, _ = pd.factorize(train["lesions"][mine])
        sums = np.zeros((number.max() + 1, train["features"].shape[1]))
        np.add.at(sums, number, train["features"][mine])
        labels = np.zeros(len(sums), np.int64)
        labels[number] = train["labels"][mine]
        found.append((sums / np.bincount(number)[:, None], labels))
    return found


def from_sums(sites: list[Site], epsilon: float, options: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """A head as the coordinator makes it, from noised counts, centres and sums of each site."""
    noise = lesion_noise(epsilon, DELTA) if np.isfinite(epsilon) else 1e-9
    counts = [noisy_counts(labels, SMALL * noise) for _, labels in sites]
    whole = sum(noisy_sum(features, REACH * options.clip, SMALL * noise) for features, _ in sites)
    centre = whole / np.sum(counts)
    parts = []
    for (features, labels), of_site in zip(sites, counts, strict=True):
        sums = noisy_sums(features - centre, labels, options.clip, options.directions, noise, 0)
        parts.append(ClassSums(of_site, sums.sums, sums.products))
    return private_head(sum(parts[1:], parts[0]), centre, np.ones(7), options.shrinkage)


def row(
    heads: list[tuple[np.ndarray, np.ndarray]], other: dict[str, np.ndarray], train: dict[str, np.ndarray],
    weights: np.ndarray,
) -> str:  # fmt: skip
    """Balanced accuracy and attacks of some heads, means over them, with intervals over lesions."""
    truth = np.eye(7)[other["labels"]]
    balanced, plain, attacks = [], [], []
    for weight, bias in heads:
        logits = other["features"] @ weight.T + bias
        hit = (logits.argmax(1) == other["labels"])[:, None] * truth
        plain.append((hit.sum(0) / truth.sum(0)).mean())
        balanced.append(np.nanmean((weights @ hit) / np.maximum(weights @ truth, 1e-12), axis=1))
        members = Part(train["features"] @ weight.T + bias, train["labels"], train["lesions"])
        attacks.append(attack(members, Part(logits, other["labels"], other["lesions"]), resamples=200))
    low, high = np.quantile(np.mean(balanced, axis=0), [0.025, 0.975])
    spread = f", {min(plain):.3f} to {max(plain):.3f} over repetitions" if len(plain) > 1 else ""
    cells = [f"{np.mean(plain):.3f} ({low:.3f}-{high:.3f}){spread}"]
    for name in attacks[0]:
        mean = [np.mean([getattr(a[name], part) for a in attacks]) for part in ("value", "low", "high")]
        cells.append(f"{mean[0]:.3f} ({mean[1]:.3f}-{mean[2]:.3f})")
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
