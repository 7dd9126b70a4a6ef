"""What a sweep found: each variant's figures on the held-out folds, and how much they differ from the first one's.

The folds of a seed together hold every training image once. A figure is the mean over the seeds; its interval and that
of the difference come from the same resamples of the lesions (`dermaflow.evaluation.paired` says why).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from pydantic import BaseModel, ConfigDict

from dermaflow import storage
from dermaflow.evaluation import metrics
from dermaflow.evaluation.figures import Estimate
from dermaflow.evaluation.intervals import estimate, lesion_weights
from dermaflow.experiments.sweep import PREDICTIONS_NAME, RECORD_NAME, Record, Sweep
from dermaflow.preparation.reading import labels_of
from dermaflow.taxonomy import CODES

MANY = 12
"""Runs up to which each is named in a plot of all."""
FIGURES = ("accuracy", "balanced accuracy", "macro AUC", "log loss")


class Variant(BaseModel):
    """One line of the table.

    Attributes:
        figures: By name, of `FIGURES`.
        differences: From the first variant, by name; empty for the first.
        minutes: Of training, mean of a trial.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    figures: dict[str, Estimate]
    differences: dict[str, Estimate]
    minutes: float


def compare(
    sweep: Sweep, places: Mapping[tuple[str, int | str, int], Path], resamples: int = 1000, seed: int = 0
) -> list[Variant]:
    """Measure every variant on the held-out images, in the order of the sweep.

    Args:
        sweep: What was tried.
        places: Folder of each trial.
        resamples: Of the lesions.
        seed: Of the draws.
    """
    draws: dict[str, np.ndarray] = {}
    minutes = {}
    lesions = 0
    for name in sweep.variants:
        parts = []
        for turn in sweep.seeds:
            tables = [pd.read_parquet(places[name, fold, turn] / PREDICTIONS_NAME) for fold in sweep.folds]
            table = pd.concat(tables).sort_values("image_id")
            ids = table["lesion_id"].to_numpy(str)
            lesions = len(np.unique(ids))
            weights = np.vstack([np.ones(len(ids)), lesion_weights(ids, resamples, np.random.default_rng(seed))])
            parts.append(_measure(table, weights))
        draws[name] = np.mean(parts, axis=0)
        records = [
            Record.model_validate_json((place / RECORD_NAME).read_bytes())
            for trial, place in places.items()
            if trial[0] == name
        ]
        minutes[name] = float(np.mean([record.seconds for record in records])) / 60
    first, *_ = sweep.variants

    def said(found: np.ndarray) -> dict[str, Estimate]:
        return {figure: estimate(float(row[0]), row[1:], lesions) for figure, row in zip(FIGURES, found, strict=True)}

    return [
        Variant(
            name=name, figures=said(draws[name]), minutes=minutes[name],
            differences={} if name == first else said(draws[name] - draws[first]),
        )
        for name in sweep.variants
    ]  # fmt: skip


def compare_sources(
    sweep: Sweep, places: Mapping[tuple[str, int | str, int], Path], resamples: int = 1000, seed: int = 0
) -> dict[str, list[Variant]]:
    """`compare` on each source alone that a sweep over several holds out; empty for lesion folds."""
    sources = [fold for fold in sweep.folds if isinstance(fold, str)] if len(sweep.folds) > 1 else []
    return {
        source: compare(
            sweep.model_copy(update={"folds": [source]}),
            {trial: place for trial, place in places.items() if trial[1] == source}, resamples, seed,
        )
        for source in sources
    }  # fmt: skip


def write_table(
    sweep: Sweep, variants: list[Variant], sources: Mapping[str, list[Variant]], name: str, out: Path
) -> tuple[Path, Path]:
    """Write ``<name>.md`` and ``<name>.png``; returns both paths."""
    page, plot = out / f"{name}.md", out / f"{name}.png"
    trials = ", ".join(f"fold {fold}" if isinstance(fold, int) else f"source {fold}" for fold in sweep.folds)
    seeds = "seeds " + ", ".join(map(str, sweep.seeds))
    lines = [
        f"# {sweep.question}", "",
        f"Recipe `{sweep.recipe}`, {trials} of the training split held out in turn, {seeds}. Below a figure its 95 % "
        "lesion-bootstrap interval; differences are from the first line, in the same resamples.", "",
        *_rows(variants),
    ]  # fmt: skip
    for source, found in sources.items():
        lines += [
            "",
            f"Images of {source} alone, which the networks never saw; means are over the diagnoses it has:",
            "",
        ]
        lines += _rows(found)
    lines += ["", f"![The figures and their intervals]({plot.name})", "", "Changes:", ""]
    for named, changes in sweep.variants.items():
        lines.append(f"- {named}: " + (", ".join(f"`{key}: {value}`" for key, value in changes.items()) or "none"))
    storage.write_bytes(page, ("\n".join(lines) + "\n").encode())
    with storage.open_atomic(plot) as stream:
        _plot(variants).savefig(stream, format="png", dpi=110)
    return page, plot


def write_runs(out: Path) -> tuple[Path, Path]:
    """Write ``runs.md`` and ``runs.png``: every trial of a folder, of whichever sweep, and how its losses went.

    Returns:
        Both paths.
    """
    found = []
    for place in (out / "trials").iterdir():
        if (place / RECORD_NAME).exists():
            found.append((Record.model_validate_json((place / RECORD_NAME).read_bytes()), place))
    found.sort(key=lambda pair: (pair[0].started, pair[1].name))
    recipes = pd.json_normalize([record.recipe for record, _ in found]).astype(str)
    flat = [{str(key): str(value) for key, value in recipe.items()} for recipe in recipes.to_dict("records")]
    skipped = {"name", "description", "seed", "validation_fold"}
    varied = [str(key) for key in recipes if recipes[key].nunique() > 1 and key not in skipped]
    lines = [
        "# All runs", "",
        "One trial a line, on the images that it held out; figures of one trial, without interval. What is the same in "
        "all recipes is left out.", "",
        f"| run | started | data | weights | fold | seed | minutes | {' | '.join([*FIGURES, *varied])} |",
        "|---|" + "---|" * (6 + len(FIGURES) + len(varied)),
    ]  # fmt: skip
    for (record, place), recipe in zip(found, flat, strict=True):
        table = pd.read_parquet(place / PREDICTIONS_NAME)
        figures = [f"{row[0]:.3f}" for row in _measure(table, np.ones((1, len(table))))]
        cells = [
            place.name[:8], record.started[:16], record.data_hash[:12], _short(record.initial_weights),
            str(record.fold), str(record.seed), f"{record.seconds / 60:.1f}", *figures,
            *(recipe[key] for key in varied),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "![Loss in training and on the held-out images](runs.png)"]
    storage.write_bytes(out / "runs.md", ("\n".join(lines) + "\n").encode())
    with storage.open_atomic(out / "runs.png") as stream:
        _curves(found).savefig(stream, format="png", dpi=110)
    return out / "runs.md", out / "runs.png"


def _short(weights: str) -> str:
    """A file's name and the first digits of its hash."""
    name, _, digest = weights.partition(" ")
    return f"{name} {digest[:8]}".rstrip()


def _curves(found: list[tuple[Record, Path]]) -> Figure:
    """Losses by epoch, a line a trial."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, (key, title) in zip(
        figure.subplots(1, 2), {"loss": "training", "val_loss": "held out"}.items(), strict=True
    ):
        for record, place in found:
            points = [(entry["epoch"], entry[key]) for entry in record.history if key in entry]
            axes.plot(*zip(*points, strict=True), marker=".", linewidth=1, label=place.name[:8])
        axes.set(title=f"loss, {title}", xlabel="epoch")
        axes.grid(alpha=0.3)
        if len(found) <= MANY:
            axes.legend(fontsize=7)
    return figure


def _rows(variants: list[Variant]) -> list[str]:
    lines = [
        "| variant | " + " | ".join(f"{figure} | difference" for figure in FIGURES) + " | minutes |",
        "|---|" + "---|" * (2 * len(FIGURES) + 1),
    ]
    for variant in variants:
        cells = [variant.name]
        for figure in FIGURES:
            cells.append(_cell(variant.figures[figure]))
            cells.append(_cell(variant.differences[figure], "+") if variant.differences else "")
        lines.append("| " + " | ".join([*cells, f"{variant.minutes:.1f}"]) + " |")
    return lines


def _measure(table: pd.DataFrame, weights: np.ndarray) -> np.ndarray:
    """Each of `FIGURES` in each resample, [F, R]."""
    truth = labels_of(table["dx"])
    p = table[[f"p_{code}" for code in CODES]].to_numpy(np.float64)
    matrices = metrics.confusion_matrices(truth, p.argmax(1), weights)
    areas = [
        metrics.area(*metrics.roc_curves(truth == k, p[:, k], weights)) for k in np.unique(truth)
    ]  # of the classes that are there
    loss = -np.log(np.maximum(p[np.arange(len(truth)), truth], 1e-12))
    return np.stack([
        metrics.accuracy(matrices), metrics.balanced_accuracy(matrices),
        metrics.mean_of_defined(np.stack(areas, axis=1)), metrics.mean(loss, weights),
    ])  # fmt: skip


def _cell(found: Estimate, sign: str = "") -> str:
    if found.value is None:
        return found.reason or ""
    text = f"{found.value:{sign}.3f}"
    return text if found.low is None else f"{text} ({found.low:{sign}.3f} to {found.high:{sign}.3f})"


def _plot(variants: list[Variant]) -> Figure:
    figure = Figure(figsize=(11, 1.2 + 0.34 * len(variants)), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(FIGURES), sharey=True), FIGURES, strict=True):
        for row, variant in enumerate(reversed(variants)):
            found = variant.figures[name]
            if found.low is not None:
                axes.plot([found.low, found.high], [row, row], color="#9a9a9a", linewidth=1.5)
            axes.plot(found.value, row, "o", color="#0b5394")
        axes.set(title=name)
        axes.set_yticks(range(len(variants)), [variant.name for variant in reversed(variants)])
        axes.grid(axis="x", color="#e8e8e8")
    return figure
