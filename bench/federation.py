"""Federated training on HAM10000's four sources: accuracy beside pooled training and each site alone.

    python bench/federation.py accuracy --shards SHARDS --weights FILE [--epochs 6] [--seeds 0 1 2] [--out DIR]
    python bench/federation.py ablation --shards SHARDS --weights FILE [--epochs 6] [--out DIR]

Every method trains the same network from the same weights and the same first head (class sums of the sites that train)
on the same lesion-grouped training split, with the same loss, for the same epochs over the images. `ablation` runs ours
with one part changed at a time and reports the sites' calibration splits, on which it was chosen; `accuracy` looks at
the test split, once a run. Intervals: bootstrap of the lesions within each site. A finished run is not done again.
On a GPU, --gpus is the share of a site at work, and --parallel runs that many at once.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clients.coordinator import balanced_accuracy
from clients.partition import POOLED
from clients.plan import PRESETS, Plan
from clients.simulation import simulate
from clients.site_data import simulated_sites
from dermaflow.learning.recipe import load_recipe


class Method(NamedTuple):
    """What is changed in the plan and in the recipe."""

    plan: dict[str, Any]
    recipe: dict[str, Any]

    def but(self, plan: dict[str, Any], recipe: dict[str, Any]) -> Method:
        """The same with something changed."""
        return Method(self.plan | plan, self.recipe | recipe)


UNCUT = {"optim.clip": 1e6}
"""Gradients cut to one length make a site that has little to learn count as much as one that has much."""
OURS = Method(*PRESETS["label-skew"])
SMOOTH = {"local_epochs": 0.25}
"""Of one site: the same training, whose rate moves four times an epoch."""
METHODS = {
    "pooled": Method({"only": POOLED} | SMOOTH, {}),
    "FedAvg": Method({}, UNCUT),
    "FedProx, mu 0.01": Method({"strategy": "fedprox"}, UNCUT),
    "FedAdam, 0.01": Method({"strategy": "fedadam"}, UNCUT),
    "ours": OURS,
}
ABLATION = {
    "ours": OURS,
    "four rounds an epoch": OURS.but({"local_epochs": 0.25, "average": 0.4}, {}),
    "one round an epoch": OURS.but({"local_epochs": 1, "average": 0.0}, {}),
    "normalisation shared, lr 0.001": OURS.but({"norm": "shared"}, {"optim.lr": 1e-3}),
    "weighed by images": OURS.but({"weigh": "images"}, {}),
    "gradients cut at 1": OURS.but({}, {"optim.clip": 1.0}),
    "optimiser forgets": OURS.but({"keep_moments": False}, {}),
    "pooled, normalisation frozen": Method({"only": POOLED, "norm": "frozen"} | SMOOTH, {"optim.lr": 4e-4}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["accuracy", "ablation"])
    parser.add_argument("--shards", required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--recipe", default="ham10000-cpu")
    parser.add_argument("--size", type=int, nargs=2, default=[64, 88], help="Height and width of the input.")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", help="Only these, pooled first, where accuracy compares with it.")
    parser.add_argument("--gpus", type=float, default=0.0)
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/federation"))
    chosen = parser.parse_args()
    natural = simulated_sites(chosen.shards, "natural")
    methods = METHODS | {f"{site} alone": Method({"only": site} | SMOOTH, {}) for site in natural}
    if chosen.what == "ablation":
        methods, chosen.seeds = ABLATION, chosen.seeds[:1]
    methods = {name: methods[name] for name in chosen.methods or methods}
    jobs = [(name, seed) for seed in chosen.seeds for name in methods]
    with ThreadPoolExecutor(chosen.parallel) as pool:
        list(pool.map(lambda job: _run(job[0], methods[job[0]], job[1], chosen), jobs))
    found = {name: [_read(_folder(chosen.out, name, seed)) for seed in chosen.seeds] for name in methods}
    if chosen.what == "accuracy":
        _report(found)
        return
    print("\nbalanced accuracy on the calibration splits, mean of the last two looks before the last round:")
    print("\n".join(f"| {name} | {_calibration(results[0]):.3f} |" for name, results in found.items()))


def _calibration(result: dict[str, Any]) -> float:
    looks = [record["balanced_accuracy"] for record in result["rounds"] if "balanced_accuracy" in record]
    return float(np.mean(looks[-2:]))


def _folder(out: Path, name: str, seed: int) -> Path:
    return out / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"


def _run(name: str, method: Method, seed: int, chosen: argparse.Namespace) -> None:
    out = _folder(chosen.out, name, seed)
    if (out / "result.json").exists():
        return
    began = time.perf_counter()
    changes = {
        "backbone.weights": str(chosen.weights.absolute()), "input.height": chosen.size[0],
        "input.width": chosen.size[1], "input.views": 1,
    }  # fmt: skip
    recipe = load_recipe(chosen.recipe, changes | method.recipe)
    rounds = round(chosen.epochs / method.plan.get("local_epochs", 1))
    settings = {"head": "statistics", "only": ",".join(simulated_sites(chosen.shards, "natural"))} | method.plan
    settings |= {"rounds": rounds, "monitor_every": max(1, (rounds - 1) // 6)}
    plan = Plan(
        recipe=recipe.model_dump_json(), shards=chosen.shards, partition="natural+pooled", out=str(out), seed=seed,
        **settings,
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


def _rounds_to_95(result: dict[str, Any]) -> int:
    """First look at the calibration splits, in rounds, with 95 % of the balanced accuracy of the last one."""
    looks = [(row["round"], row["balanced_accuracy"]) for row in result["rounds"] if "balanced_accuracy" in row]
    return next(number for number, seen in looks if seen >= 0.95 * looks[-1][1])


def _resampled(result: dict[str, Any]) -> np.ndarray:
    """Balanced accuracy over all sites' lesions in each resample, [R]; runs with one seed draw the same lesions."""
    parts = [value for site, value in result["sites"].items() if site != POOLED]
    hits = sum(np.array(part["hits"]) for part in parts)
    totals = sum(np.array(part["totals"]) for part in parts)
    balanced: np.ndarray = (hits / np.maximum(totals, 1)).mean(1)
    return balanced


def _interval(resampled: list[np.ndarray]) -> np.ndarray:
    """95 % interval of one seed's figure, mean over the seeds; seeds draw lesions of their own, so that means of their
    resamples would look surer than they are."""
    found: np.ndarray = np.mean([np.quantile(each, [0.025, 0.975]) for each in resampled], axis=0)
    return found


def _report(found: dict[str, list[dict[str, Any]]]) -> None:
    sites = [site for site in found[next(iter(found))][0]["sites"] if site != POOLED]
    sites.sort()
    head = [
        "method",
        "balanced accuracy",
        "95 %",
        "less pooled",
        "seeds",
        "accuracy",
        *sites,
        "mean of sites",
        "rounds",
        "to 95 %",
        "MB a round a site",
    ]
    print(f"\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for name, results in found.items():
        each = [_balanced(result) for result in results]
        low, high = _interval([_resampled(result) for result in results])
        pairs = zip(results, found["pooled"], strict=True)  # in the order of the seeds
        behind = _interval([_resampled(result) - _resampled(pooled) for result, pooled in pairs])
        by_site = [np.mean([_balanced(result, site) for result in results]) for site in sites]
        sent = [
            figures["sent"] + figures["received"]
            for result in results for record in result["rounds"][1:] for figures in record["sites"].values()
        ]  # fmt: skip
        row = [
            name, f"{np.mean(each):.3f}", f"{low:.3f}-{high:.3f}",
            "-" if name == "pooled" else f"{behind[0]:+.3f} to {behind[1]:+.3f}",
            " ".join(f"{value:.3f}" for value in each),
            f"{np.mean([_accuracy(result) for result in results]):.3f}",
            *(f"{value:.3f}" for value in by_site), f"{np.mean(by_site):.3f}",
            str(len(results[0]["rounds"])), f"{np.median([_rounds_to_95(result) for result in results]):.0f}",
            "-" if POOLED in results[0]["training_sites"] else f"{np.mean(sent) / 1e6:.1f}",
        ]  # fmt: skip
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
