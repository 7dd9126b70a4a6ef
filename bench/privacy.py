"""What differential privacy of a lesion costs: balanced accuracy and attack against epsilon, on a frozen backbone.

    python bench/privacy.py --shards SHARDS --weights mobilenet_v2-imagenet-features.pth --out privacy-bench

The four sources of HAM10000 are four sites; each adds its own noise, as in a run with dp=lesion. Features are computed
once and kept in --out; from there on it is the code of `clients.privacy` itself. Every epsilon is repeated with new
noise; the interval is of a bootstrap over test lesions, of the mean over repetitions.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from rounds import machine
from safetensors.numpy import load_file, save_file

from clients.accountant import noise_for
from clients.privacy import COUNTS_NOISE, PRIVATE_SHRINKAGE, log_priors, noisy_descent, noisy_sums, repaired
from clients.site_data import SiteData
from dermaflow.evaluation.intervals import lesion_weights
from dermaflow.evaluation.membership import Part, attack
from dermaflow.learning.backbones import build
from dermaflow.learning.inference import predict
from dermaflow.learning.linear_head import SHRINKAGE, ClassSums, class_sums, discriminant_head
from dermaflow.learning.recipe import load_recipe

DELTA, RATE, STEPS, ROUNDS = 1e-5, 0.2, 5, 10
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
    parser.add_argument("--sums-clip", type=float, default=4.0)
    parser.add_argument("--directions", type=int, default=64)
    parser.add_argument("--shrinkage", type=float, default=PRIVATE_SHRINKAGE)
    parser.add_argument("--rounds-clip", type=float, default=4.0)
    parser.add_argument("--lr", type=float, default=0.02)
    options = parser.parse_args()
    print(machine())
    train, other = (features_of(options, split) for split in ("train", options.split))
    sites = lesions_of(train)
    print(f"{[len(labels) for _, labels in sites]} training lesions, {len(other['labels'])} images to judge by")
    print(f"length of a feature: median {np.median(np.linalg.norm(train['features'], axis=1)):.1f}")
    weights = lesion_weights(other["lesions"], 1000, np.random.default_rng(0))
    exact = sum((class_sums(*site) for site in sites[1:]), class_sums(*sites[0]))
    head = discriminant_head(exact, SHRINKAGE, np.ones(7))
    print(f"\nwithout noise, all {exact.products.shape[0]} directions: {row([head], other, train, weights)}")
    learners: dict[str, Callable[[float], tuple[np.ndarray, np.ndarray]]] = {
        "sums": lambda epsilon: from_sums(sites, epsilon, options),
        "rounds": lambda epsilon: from_rounds(sites, epsilon, options),
    }
    for name, learn in learners.items():
        print(
            f"\n| {name}: epsilon | balanced accuracy | attack by loss | attack by loss of its class |\n|---|---|---|---|"
        )
        for text in options.epsilons.split(","):
            heads = [learn(float(text)) for _ in range(options.repeats)]
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


def noised_counts(labels: np.ndarray, noise: float) -> np.ndarray:
    """Of each class, as a site tells them."""
    drawn = np.bincount(labels, minlength=7) + np.random.default_rng().normal(0, COUNTS_NOISE * noise, 7)
    return np.maximum(np.rint(drawn), 0.0)


def from_sums(sites: list[Site], epsilon: float, options: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """A head from noised sums of each site."""
    noise = 1e-9
    if np.isfinite(epsilon):
        noise = noise_for(epsilon, DELTA, ((COUNTS_NOISE, 1.0, 1), (1.0, 1.0, 1)))
    parts = []
    for features, labels in sites:
        sums = noisy_sums(features, labels, options.sums_clip, options.directions, noise, 0)
        parts.append(ClassSums(noised_counts(labels, noise), sums.sums, sums.products))
    return discriminant_head(repaired(sum(parts[1:], parts[0])), options.shrinkage, np.ones(7))


def from_rounds(sites: list[Site], epsilon: float, options: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """A head from rounds of DP-SGD at each site, averaged by their lesions."""
    noise = 0.0
    if np.isfinite(epsilon):
        noise = noise_for(epsilon, DELTA, ((COUNTS_NOISE, 1.0, 1), (1.0, RATE, STEPS * ROUNDS)))
    counts = [noised_counts(labels, noise) for _, labels in sites]
    share = [max(of_site.sum(), 1.0) for of_site in counts]
    shift = log_priors(sum(counts, np.zeros(7)))
    head = np.zeros((7, sites[0][0].shape[1] + 1))
    for number in range(ROUNDS):
        pace = options.lr * (0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * number / ROUNDS)))
        moved = [
            noisy_descent(head, *site, shift, options.rounds_clip, noise, RATE, STEPS, pace / (RATE * n))
            for site, n in zip(sites, share, strict=True)
        ]
        head = sum(n * m for n, m in zip(share, moved, strict=True)) / sum(share)
    return head[:, :-1], head[:, -1]


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
