"""Federated training on HAM10000's four sources: accuracy beside pooled training and each site alone.

    python bench/federation.py accuracy --shards SHARDS --weights FILE [--epochs 16] [--seeds 0 1 2] [--out DIR]

Every method trains the same network from the same weights on the same lesion-grouped training split for the same epochs
over the images. Which of the candidates is our ``best`` is decided with the first seed, on the sites' calibration
splits; the test split is looked at once a run. Intervals: bootstrap of the lesions within each site. A run that is
finished is not done again. On a GPU, --gpus is the share of a site at work, and --parallel runs that many at once.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from clients.coordinator import balanced_accuracy
from clients.partition import POOLED
from clients.plan import Plan
from clients.simulation import simulate
from clients.site_data import simulated_sites
from dermaflow.learning.recipe import Recipe, load_recipe

OURS: dict[str, Any] = {"loss": "adjusted", "head": "statistics"}
"""Losses adjusted to each site's class frequencies, a first head from class sums, and the rounds averaged."""
OFTEN: dict[str, Any] = {"local_epochs": 0.25, "average": 0.9}
CANDIDATES: dict[str, dict[str, Any]] = {
    "class weights of all sites, four rounds an epoch": OFTEN | {"head": "statistics"},
    "shared normalisation": OURS | {"average": 0.7},
    "shared normalisation, four rounds an epoch": OURS | OFTEN,
    "frozen normalisation, four rounds an epoch": OURS | OFTEN | {"norm": "frozen"},
    "local normalisation, four rounds an epoch": OURS | OFTEN | {"norm": "local"},
    "frozen normalisation, SCAFFOLD, four rounds an epoch": OURS | OFTEN | {"norm": "frozen", "strategy": "scaffold"},
}
BASELINES: dict[str, dict[str, Any]] = {
    "pooled": {"only": POOLED, "head_rounds": 1},
    "pooled, adjusted loss": OURS | {"only": POOLED, "average": 0.7},
    "FedAvg": {"head_rounds": 1, "weights_of": "site"},
    "FedProx": {"head_rounds": 1, "weights_of": "site", "strategy": "fedprox"},
    "FedAdam": {"head_rounds": 1, "weights_of": "site", "strategy": "fedadam"},
}
"""With the recipe's own loss and one round an epoch, but for the second."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["accuracy"])
    parser.add_argument("--shards", required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--recipe", default="ham10000-cpu")
    parser.add_argument("--size", type=int, nargs=2, default=[96, 128], help="Height and width of the input.")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--gpus", type=float, default=0.0)
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/federation"))
    chosen = parser.parse_args()
    changes = {
        "backbone.weights": str(chosen.weights.absolute()), "optim.batch_size": chosen.batch,
        "input.height": chosen.size[0], "input.width": chosen.size[1], "input.views": 1,
    }  # fmt: skip
    recipe = load_recipe(chosen.recipe, changes)
    natural = simulated_sites(chosen.shards, "natural")
    alone = {f"{site} alone": OURS | {"only": site, "average": 0.7} for site in natural}
    first = chosen.seeds[0]
    methods = CANDIDATES | BASELINES | alone
    with ThreadPoolExecutor(chosen.parallel) as pool:
        list(pool.map(lambda name: _run(name, methods[name], first, recipe, chosen), methods))
        scores = {name: _calibration(_read(_folder(chosen.out, name, first))) for name in CANDIDATES}
        best = max(scores, key=lambda name: scores[name])
        print("\nbalanced accuracy on the calibration splits, mean of the last two looks:")
        print("\n".join(f"  {name}: {score:.3f}" for name, score in scores.items()))
        lasting = {best: CANDIDATES[best]} | BASELINES | alone
        jobs = [(name, seed) for seed in chosen.seeds[1:] for name in lasting]
        list(pool.map(lambda job: _run(job[0], methods[job[0]], job[1], recipe, chosen), jobs))
    _report({name: [_read(_folder(chosen.out, name, seed)) for seed in chosen.seeds] for name in lasting})
    print("\nfirst seed only:")
    _report({name: [_read(_folder(chosen.out, name, first))] for name in CANDIDATES})


def _calibration(result: dict[str, Any]) -> float:
    looks = [record["balanced_accuracy"] for record in result["rounds"] if "balanced_accuracy" in record]
    return float(np.mean(looks[-2:]))


def _folder(out: Path, name: str, seed: int) -> Path:
    return out / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"


def _run(name: str, choices: dict[str, Any], seed: int, recipe: Recipe, chosen: argparse.Namespace) -> None:
    out = _folder(chosen.out, name, seed)
    if (out / "result.json").exists():
        return
    began = time.perf_counter()
    natural = ",".join(simulated_sites(chosen.shards, "natural"))
    rounds = round(chosen.epochs / choices.get("local_epochs", 1))
    plan = Plan(
        recipe=recipe.model_dump_json(), shards=chosen.shards, partition="natural+pooled", out=str(out), seed=seed,
        rounds=rounds, monitor_every=max(1, (rounds - 1) // 3), **({"only": natural} | choices),
    )  # fmt: skip
    result = simulate(plan, gpus=chosen.gpus)
    print(f"{name}, seed {seed}: {_balanced(result):.3f}, {time.perf_counter() - began:.0f} s", flush=True)


def _read(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def _confusion(result: dict[str, Any], site: str | None) -> np.ndarray:
    """Truth by prediction of one site's test images, or of all sites' together."""
    parts = {name: np.array(value["confusion"]) for name, value in result["sites"].items() if name != POOLED}
    return parts[site] if site else sum(parts.values(), np.zeros((7, 7)))


def _balanced(result: dict[str, Any], site: str | None = None) -> float:
    return balanced_accuracy(_confusion(result, site))


def _accuracy(result: dict[str, Any]) -> float:
    confusion = _confusion(result, None)
    return float(np.diag(confusion).sum() / confusion.sum())


def _resampled(results: list[dict[str, Any]]) -> np.ndarray:
    """Balanced accuracy over all sites' lesions in each resample, mean over the seeds: [R]."""
    found = []
    for result in results:
        parts = [value for site, value in result["sites"].items() if site != POOLED]
        hits = sum(np.array(part["hits"]) for part in parts)
        totals = sum(np.array(part["totals"]) for part in parts)
        found.append((hits / np.maximum(totals, 1)).mean(1))
    return np.mean(found, axis=0)


def _report(found: dict[str, list[dict[str, Any]]]) -> None:
    sites = [site for site in found[next(iter(found))][0]["sites"] if site != POOLED]
    sites.sort()
    head = [
        "method",
        "balanced accuracy",
        "95 %",
        "seeds",
        "accuracy",
        *sites,
        "mean of sites",
        "rounds",
        "MB a round a site",
    ]
    print(f"\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for name, results in found.items():
        each = [_balanced(result) for result in results]
        low, high = np.quantile(_resampled(results), [0.025, 0.975])
        by_site = [np.mean([_balanced(result, site) for result in results]) for site in sites]
        sent = [
            figures["sent"] + figures["received"]
            for result in results for record in result["rounds"][1:] for figures in record["sites"].values()
        ]  # fmt: skip
        row = [
            name, f"{np.mean(each):.3f}", f"{low:.3f}-{high:.3f}", " ".join(f"{value:.3f}" for value in each),
            f"{np.mean([_accuracy(result) for result in results]):.3f}",
            *(f"{value:.3f}" for value in by_site), f"{np.mean(by_site):.3f}",
            str(len(results[0]["rounds"])),
            "-" if POOLED in results[0]["training_sites"] else f"{np.mean(sent) / 1e6:.1f}",
        ]  # fmt: skip
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
