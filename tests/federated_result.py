"""Folders of finished federated runs whose counts are those of a fair model on HAM10000's four sites. Seeded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from federation_here import a_plan
from ham_predictions import ham_like

from dermaflow.evaluation.crosssite import count_test, reliability_of
from dermaflow.taxonomy import CODES

SITES = ["rosendahl", "vidir_modern", "vidir_molemax", "vienna_dias"]
RESAMPLES = 60


def test_table(seed: int = 7) -> pd.DataFrame:
    """Predictions on four sites, of which vidir_molemax has no akiec and vienna_dias three lesions of nevi only."""
    table = ham_like(images=900, lesions=700, seed=seed)
    table = table[~((table["site"] == "vidir_molemax") & (table["dx"] == "akiec"))]
    vienna = table["site"] == "vienna_dias"
    kept = table[vienna & (table["dx"] == "nv")]["lesion_id"].unique()[:3]
    return table[~vienna | table["lesion_id"].isin(kept)].reset_index(drop=True)


test_table.__test__ = False  # type: ignore[attr-defined]


def write_run(folder: Path, *, trained: list[str] = SITES, skill: float = 0.2, **choices: Any) -> Path:
    """A finished run of 12 rounds in a folder; the fourth round lacks rosendahl, which had refused.

    Args:
        folder: To write.
        trained: Sites that trained.
        skill: How much of the truth is added to the probabilities.
        choices: Of the plan.
    """
    plan = a_plan("", folder, rounds=12, resamples=RESAMPLES, **choices)
    table = test_table()
    p = table[[f"p_{code}" for code in CODES]].to_numpy()
    labels = np.array([CODES.index(dx) for dx in table["dx"]])
    p = p + skill * np.eye(7)[labels]
    p /= p.sum(1, keepdims=True)
    sites: dict[str, Any] = {}
    for site in SITES:
        mine = (table["site"] == site).to_numpy()
        about = {"labels": labels[mine], "lesions": table["lesion_id"].to_numpy()[mine], "seed": 0}
        found = count_test(predicted=p[mine].argmax(1), **about, resamples=RESAMPLES)
        sites[site] = {name: value.tolist() for name, value in vars(found).items()}
        trust = reliability_of(p[mine], **about, resamples=RESAMPLES)
        sites[site]["reliability"] = {name: value.tolist() for name, value in vars(trust).items()}
    rounds = []
    for number in range(1, 13):
        there = {
            site: {"received": 9.1e6 if number > 1 else 9.4e6, "sent": 9.1e6, "images": 100.0 * (k + 1),
                   "loss": 1.6 * 0.85**number + 0.1 * k, "seconds": 12.5 + k,
                   "balanced_accuracy": 0.75 - 0.5 * 0.8**number - 0.04 * k}
            for k, site in enumerate(SITES) if site in trained and not (number == 4 and site == "rosendahl")
        }  # fmt: skip
        failed = {"rosendahl": "strategy fedavg is not allowed after 20:00"} if number == 4 else {}
        rounds.append(
            {"round": number, "scope": "all", "seconds": 20.0, "sites": there, "failed": failed,
             "balanced_accuracy": 0.75 - 0.5 * 0.8**number}
        )  # fmt: skip
    result = {
        "plan": plan.model_dump() | {"recipe": json.loads(plan.recipe)},
        "copies": None, "counts": {site: [10 * (k + 1)] * 7 for k, site in enumerate(trained)},
        "rounds": rounds, "sites": sites, "seconds": 245.0, "training_sites": sorted(trained),
        "data": {site: f"{k}a" * 32 for k, site in enumerate(trained)}, "versions": {"dermaflow": "0.1.0"},
        "asked": {site: {"received": 1.2e7, "sent": 3.4e6} for site in SITES}, "started": "2026-11-26T09:00:00+00:00",
        "calibration": {"temperature": 1.2, "bias": [0.0] * 7, "images": 300, "lesions": 280},
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def write_compared(folder: Path) -> Path:
    """A federated run, and within its folder each site alone and all in one place."""
    write_run(folder)
    for k, site in enumerate(SITES):
        write_run(folder / "compare" / f"{site}-alone", trained=[site], skill=0.02 * k, only=site)
    return write_run(folder / "compare" / "pooled", trained=["pooled"], skill=0.25, only="pooled").parents[1]
