"""One page of a federated run: every model at every site, the rounds, the bytes, who took part, the calibration.

Self-contained like the report of an evaluation, and made from what the run left in its folder: counts of sites, no
image and no score of one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clients.matrix import FIGURES, FinishedRun, counted, notes
from clients.partition import POOLED
from clients.result import data_hash, guarantee_in_words, left_out, ranges
from dermaflow import storage
from dermaflow.evaluation import plots
from dermaflow.evaluation.crosssite import Matrix, Row, calibration_error
from dermaflow.evaluation.figures import Estimate
from dermaflow.evaluation.report import environment
from dermaflow.evaluation.wording import interval, value
from dermaflow.taxonomy import CODES

MATRIX_NAME = "matrix.json"
ALL = "all sites"
TITLES = {
    "balanced_accuracy": "Balanced accuracy", "accuracy": "Accuracy", "melanoma_sensitivity": "Melanoma sensitivity"
}  # fmt: skip


def write_report(run: FinishedRun, matrix: Matrix, out: Path) -> Path:
    """Write the page of a run and, beside it, ``matrix.json``; each atomically, the page last.

    Args:
        run: The run that the page is about.
        matrix: Its model and others on every site's test lesions, the run's own row first.
        out: Path of the page.

    Returns:
        The same path.
    """
    result, plan = run.result, run.plan
    sites = {name: part for name, part in sorted(result["sites"].items()) if name != POOLED}
    rounds = result["rounds"]
    page = environment().get_template("federated.html.j2").render(
        title=f"{plan.parsed_recipe.name}, {plan.strategy}",
        plan=plan,
        run=run,
        everything=matrix.rows[0].everything,
        sentences=_sentences(run, matrix),
        notes=notes(matrix),
        matrix=matrix,
        tables={TITLES[name]: [_cells(row, matrix.sites, name) for row in matrix.rows] for name in FIGURES},
        trained_on={row.model: row.trained_on for row in matrix.rows},
        counts=_counts(result, matrix),
        codes=CODES,
        loss=plots.lines(
            _by_site(rounds, "loss", mean=True), "round", "training loss", "Training loss by round", bold=ALL
        ),
        seen=plots.lines(
            _by_site(rounds, "balanced_accuracy")
            | {ALL: [(r["round"], r["balanced_accuracy"]) for r in rounds if "balanced_accuracy" in r]},
            "round", "balanced accuracy", "Balanced accuracy by round, on the calibration splits", bold=ALL,
        ),
        sent=plots.lines(
            {"to the sites": _volume(rounds, "received"), "from the sites": _volume(rounds, "sent")},
            "round", "MB", "Bytes of all sites by round", floor=0.0,
        ),
        sent_by_site=plots.lines(_volume_by_site(rounds), "round", "MB", "Bytes of each site by round", floor=0.0),
        part=_participation(result),
        traffic=_traffic(result),
        calibration=_calibration(sites),
        reliability=_reliability(sites),
        provenance=_provenance(run),
        choices=_choices(plan.model_dump(exclude={"recipe"})),
        recipe=json.dumps(result["plan"]["recipe"], indent=2, sort_keys=True),
        finished=result["seconds"],
    )  # fmt: skip
    storage.write_bytes(out.parent / MATRIX_NAME, matrix.model_dump_json(indent=1).encode())
    storage.write_bytes(out, page.encode())
    return out


@dataclass(frozen=True)
class _HeatCell:
    """A figure as the table shows it; `share` decides its colour and is None where there is no figure."""

    figure: Estimate
    share: float | None
    counts: str
    own: bool = False  # whether the model was trained on the site of this column


def _cells(row: Row, sites: Sequence[str], name: str) -> tuple[str, list[_HeatCell]]:
    """Model, and its cells: each site, all together and, for the balanced accuracy, the mean of the sites."""
    cells = []
    for site, part in (*((site, row.cells[site]) for site in sites), (None, row.everything)):
        figure: Estimate = getattr(part, name)
        cells.append(_HeatCell(figure, figure.value, counted(part.counts, name), site in row.trained_on))
    if name == "balanced_accuracy":
        cells.append(_HeatCell(row.mean_of_sites, row.mean_of_sites.value, f"{len(sites)} sites"))
    return row.model, cells


def _sentences(run: FinishedRun, matrix: Matrix) -> list[str]:
    """What the run came to, and how it stands beside the others."""

    def said(row: Row) -> str:
        found = row.everything.balanced_accuracy
        between = interval(found, percentage=True)
        return value(found, percentage=True) + (f" (95 % interval {between}\u00a0%)" if between else "")

    own, others = matrix.rows[0], matrix.rows[1:]
    counts = own.everything.counts
    sentences = [
        f"{own.model}: balanced accuracy {said(own)} on {counts.images:,} test images of {counts.lesions:,} lesions at "
        f"{len(matrix.sites)} sites, over the {len(counts.images_by_class)} diagnoses that they hold."
    ]
    for row in others:
        if row.model == POOLED:
            sentences.append(f"All images in one place reach {said(row)}.")
    alone = [row for row in others if row.model.endswith(" alone") and row.everything.balanced_accuracy.value]
    if alone:
        best = max(alone, key=lambda row: row.everything.balanced_accuracy.value or 0)
        sentences.append(f"The best site alone, {best.trained_on[0]}, reaches {said(best)}.")
    if left := left_out(run.result):
        sentences.append(f"Not at all times with {', '.join(sorted(left))}: the reasons stand below.")
    return sentences


def _counts(result: dict[str, Any], matrix: Matrix) -> list[dict[str, Any]]:
    """Images by class of every site: trained on, and tested on with the number of lesions."""
    rows = []
    for site, cell in matrix.rows[0].cells.items():
        trained = result["counts"].get(site)
        rows.append(
            {
                "site": site,
                "train": None if trained is None else dict(zip(CODES, trained, strict=True)),
                "test": cell.counts,
            }
        )
    return rows


def _by_site(rounds: list[dict[str, Any]], name: str, mean: bool = False) -> dict[str, list[tuple[float, float]]]:
    """A figure by round of each site that gave it; `mean` adds that of all, weighed by images."""
    found: dict[str, list[tuple[float, float]]] = {}
    for record in rounds:
        for site, figures in sorted(record["sites"].items()):
            if name in figures:
                found.setdefault(site, []).append((record["round"], figures[name]))
        there = [figures for figures in record["sites"].values() if name in figures]
        if mean and there:
            images = sum(figures["images"] for figures in there)
            found.setdefault(ALL, []).append(
                (record["round"], sum(figures[name] * figures["images"] for figures in there) / images)
            )
    return found


def _volume(rounds: list[dict[str, Any]], way: str) -> list[tuple[float, float]]:
    return [(r["round"], sum(figures.get(way, 0.0) for figures in r["sites"].values()) / 1e6) for r in rounds]


def _volume_by_site(rounds: list[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """MB both ways by round; sites with the same in every round share a curve, which would hide the others."""
    curves: dict[tuple[tuple[float, float], ...], list[str]] = {}
    for site in sorted({site for record in rounds for site in record["sites"]}):
        records = [(r["round"], r["sites"].get(site, {})) for r in rounds]
        points = tuple((number, (r.get("received", 0.0) + r.get("sent", 0.0)) / 1e6) for number, r in records)
        curves.setdefault(points, []).append(site)
    return {", ".join(names[:3]) + " …" * (len(names) > 3): list(points) for points, names in curves.items()}


def _participation(result: dict[str, Any]) -> list[dict[str, str]]:
    """For each training site: rounds it took part in, and the rounds it did not, with the reason."""
    rows = []
    for site in result["training_sites"]:
        there = [r["round"] for r in result["rounds"] if site in r["sites"]]
        missing = [f"{where}: {reason}" for reason, where in left_out(result).get(site, {}).items()]
        others = [r["round"] for r in result["rounds"] if site not in r["sites"] and site not in r["failed"]]
        if others:
            missing.append(f"round {ranges(others)}: not drawn for the round")
        if site not in result["sites"] and site not in result.get("unanswered", {}).get("evaluate", {}):
            missing.append("evaluate: no answer")
        seconds = [r["sites"][site]["seconds"] for r in result["rounds"] if "seconds" in r["sites"].get(site, {})]
        rows.append(
            {
                "site": site,
                "rounds": f"{len(there)} of {len(result['rounds'])}",
                "seconds": f"{np.median(seconds):.1f}" if seconds else "–",
                "missing": "; ".join(missing) or "–",
            }
        )
    return rows


def _traffic(result: dict[str, Any]) -> list[list[str]]:
    """Site, MB to it and from it a round (median), in all rounds, and for everything beside the rounds; then all."""
    rows, whole = [], np.zeros(4)
    names = sorted({*result["training_sites"], *result["sites"]} - {POOLED})
    for site in names:
        records = [r["sites"][site] for r in result["rounds"] if site in r["sites"]]
        asked = result.get("asked", {}).get(site, {})
        sums = np.array(
            [*(sum(r.get(way, 0.0) for r in records) for way in ("received", "sent")),
             asked.get("received", 0), asked.get("sent", 0)], dtype=np.float64,
        )  # fmt: skip
        whole += sums
        median = [np.median([r.get(way, 0.0) for r in records]) if records else np.nan for way in ("received", "sent")]
        rows.append([site, *map(_megabytes, (*median, *sums, sums.sum()))])
    return [*rows, [ALL, "", "", *map(_megabytes, (*whole, whole.sum()))]]


def _megabytes(count: float) -> str:
    return "–" if not np.isfinite(count) else f"{count / 1e6:,.2f}"


def _calibration(sites: dict[str, Any]) -> list[tuple[str, int, Estimate]]:
    """Site, test images and expected calibration error, with the site's own interval; the last is all together."""
    rows, total = [], np.zeros((15, 3))
    for site, part in sites.items():
        found = part.get("reliability")
        if found is None:
            continue
        bins, error = np.array(found["bins"]), found["error"]
        total += bins
        low, high = error[1:] if len(error) == 3 else (None, None)
        reason = None if low is not None else "no interval: too few lesions" if error else "no test image here"
        rows.append(
            (
                site,
                int(bins[:, 0].sum()),
                Estimate(value=error[0] if error else None, low=low, high=high, reason=reason),
            )
        )
    if rows and total[:, 0].any():
        rows.append((ALL, int(total[:, 0].sum()), Estimate(value=calibration_error(total), reason="from summed bins")))
    return rows


def _reliability(sites: dict[str, Any]) -> Any:
    bins = {site: np.array(part["reliability"]["bins"]) for site, part in sites.items() if "reliability" in part}
    if not bins:
        return None
    return plots.reliability_by_site(bins | {ALL: np.sum(list(bins.values()), axis=0)}, ALL)


def _provenance(run: FinishedRun) -> dict[str, str]:
    result, plan = run.result, run.plan
    recipe = plan.parsed_recipe
    facts = {
        "run": "simulation, every site on one machine" if plan.shards else "deployment, sites of a hub",
        "sites that trained": ", ".join(result["training_sites"]),
        "recipe": f"{recipe.name} ({recipe.digest[:12]})",
        "first weights": recipe.backbone.weights or "none",
        "seed": str(plan.seed),
    }
    if "data" in result:
        facts["data hash"] = data_hash(result)
        if not plan.shards:
            facts |= {f"data hash of {site}": found for site, found in sorted(result["data"].items())}
    if "started" in result:
        facts["started"] = result["started"]
    facts["duration"] = f"{result['seconds'] / 60:.1f} min"
    if privacy := guarantee_in_words(result):
        facts["differential privacy"] = privacy
    if plan.secure:
        facts["secure aggregation"] = "the coordinator saw sums of the sites' updates only"
    calibration = result["calibration"]
    facts["calibration"] = (
        "none: each site does that on its own images"
        if calibration is None
        else (
            f"temperature {calibration['temperature']:.3f}"
            + (", a bias for each class" if any(calibration["bias"]) else "")
            + f", on {calibration['images']:,} images of {calibration['lesions']:,} lesions of all sites"
        )
    )
    if "versions" in result:
        facts["versions"] = ", ".join(f"{name} {number}" for name, number in sorted(result["versions"].items()))
    return facts


def _choices(plan: dict[str, Any]) -> dict[str, str]:
    """The plan's fields, without empty ones and without paths of the machine that it ran on."""
    return {name.replace("_", " "): str(v) for name, v in plan.items() if v != "" and name not in ("out", "shards")}
