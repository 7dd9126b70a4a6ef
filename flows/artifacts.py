"""What a run shows in Prefect's pages: split counts, training curve, headline figures, the report, the promotion."""

from __future__ import annotations

import base64
import json
from pathlib import Path

from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)

from dermaflow import storage
from dermaflow.bundles.bundle import parse_bundle, read_description
from dermaflow.evaluation.crosssite import Matrix
from dermaflow.evaluation.figures import Evaluation, PointFigures
from dermaflow.evaluation.plots import training
from dermaflow.evaluation.report import METRICS_NAME, REPORT_NAME
from dermaflow.evaluation.wording import POINT_TITLES, number, percent
from dermaflow.preparation.reading import ShardFolder
from dermaflow.scoring.plan import PAGE
from dermaflow.scoring.summary import read_summary
from dermaflow.taxonomy import CODES
from flows.promotion import Decision


def show_splits(shards: str) -> None:
    """Images and lesions of every split, by diagnosis."""
    manifest = ShardFolder(shards).manifest
    rows = [
        {"split": split, "images": sum(counts.values()), "lesions": manifest.lesions[split]}
        | {code: counts.get(code, 0) for code in CODES}
        for split, counts in manifest.counts.items()
    ]
    create_table_artifact(
        rows, key="split-counts",
        description=f"Images by split and diagnosis in `{shards}`; {manifest.quarantined} in quarantine, "
        f"data {manifest.data_hash[:12]}.",
    )  # fmt: skip


def show_training(model: str) -> None:
    """The loss by epoch as a picture, and the figures of every epoch as a table."""
    bundle = parse_bundle(read_description(model)[0], where=model)
    record = bundle.training
    said = f"{record.recipe_name}: {record.epochs} epochs in {record.seconds / 60:.1f} min on {record.device}"
    for plot in training(record.history)[:1]:
        svg = str(plot).replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)  # it stands on its own here
        picture = base64.b64encode(svg.encode()).decode()
        create_image_artifact(f"data:image/svg+xml;base64,{picture}", key="training-curve", description=said)
    names = list(dict.fromkeys(name for entry in record.history for name in entry))
    titles = {name: name.replace("val_", "validation ").replace("_", " ") for name in names}
    rows = [{titles[name]: f"{entry[name]:.4g}" if name in entry else "" for name in names} for entry in record.history]
    create_table_artifact(rows, key="epochs", description=said)


def show_figures(report: str) -> None:
    """Headline figures with their 95 % intervals at every operating point, and a link to the report."""
    evaluation = Evaluation.model_validate_json(storage.read_bytes(storage.join(report, METRICS_NAME)))
    everything = evaluation.populations["all"]
    points = {POINT_TITLES[name]: _figures(point) for name, point in everything.points.items()}
    rows = [
        {"figure": figure} | {title: texts[figure] for title, texts in points.items()}
        for figure in next(iter(points.values()))
    ]
    create_table_artifact(
        rows, key="headline-figures",
        description=f"{everything.counts.images} test images of {everything.counts.lesions} lesions, 95 % "
        f"lesion-bootstrap intervals. macro-AUC {number(everything.ranking.macro_auc)}, melanoma AUC "
        f"{number(everything.ranking.melanoma_auc)}, ECE {number(everything.calibration.ece)}, conformal coverage "
        f"{percent(everything.conformal.coverage)}.",
    )  # fmt: skip
    page = Path(report, REPORT_NAME).absolute()
    create_link_artifact(page.as_uri(), link_text=str(page), key="report", description="The whole report.")


def show_scoring(folder: str) -> None:
    """Class mix, failures by reason, and a link to the summary of a run of bulk scoring."""
    found = read_summary(folder)
    if found is None:
        return
    create_table_artifact(
        [
            {"diagnosis": c.name, "most probable in": c.predicted, "mean probability": _share(c.share),
             "training": _share(c.training)}
            for c in found.classes
        ],
        key="class-mix",
        description=f"{found.images} images: {found.ok} assessed, {found.not_assessable} not assessable, "
        f"{found.failed} failed; {found.flagged_lesions} of {found.lesions} lesions flagged. Mix: "
        f"{found.drift.verdict}. Model {found.model} {found.model_sha256[:12]}.",
    )  # fmt: skip
    create_table_artifact(
        [{"reason": reason, "images": count} for reason, count in found.reasons.items()], key="failures",
        description=f"{found.failed} images that could not be read, by reason.",
    )  # fmt: skip
    page = storage.join(folder, PAGE)
    link = page if storage.is_remote(page) else Path(page).absolute().as_uri()
    create_link_artifact(link, link_text=page, key="scoring-summary", description="Flagged lesions, mix and failures.")


def show_rounds(out: Path) -> None:
    """The rounds of a federated run: loss, balanced accuracy before the round, bytes, and who was left out of them
    or of the questions beside them and why."""
    place, rows = out / "rounds.jsonl", []
    for line in place.read_text(encoding="utf-8").splitlines() if place.exists() else ():  # a head from sums has none
        record = json.loads(line)
        sites, seen = record["sites"].values(), record.get("balanced_accuracy")
        losses = [(site["loss"], site["images"]) for site in sites if "loss" in site]  # none under privacy
        images = sum(count for _, count in losses)
        rows.append(
            {
                "round": record["round"],
                "sites": len(sites),
                "loss": f"{sum(loss * count for loss, count in losses) / images:.4g}" if losses else "",
                "balanced accuracy before": "" if seen is None else f"{seen:.3f}",
                "seconds": f"{record['seconds']:.0f}",
                "MB": f"{sum(site.get('received', 0) + site.get('sent', 0) for site in sites) / 1e6:.1f}",
                "left out": "; ".join(f"{name}: {reason}" for name, reason in record["failed"].items()),
            }
        )
    asked = json.loads((out / "result.json").read_text(encoding="utf-8")).get("unanswered", {})  # older runs do not say
    silent = "; ".join(f"{question}: {site}: {why}" for question, sites in asked.items() for site, why in sites.items())
    create_table_artifact(
        rows, key="rounds",
        description="Rounds of the federated run; balanced accuracy on the calibration splits."
        + (f" Left out of a question beside the rounds: {silent}." if silent else ""),
    )  # fmt: skip


def show_matrix(out: Path) -> None:
    """Balanced accuracy of every model at every site, with intervals, and a link to the page of the run."""
    found = Matrix.model_validate_json(storage.read_bytes(str(out / "matrix.json")))
    first = found.rows[0]
    counts = {site: f"{cell.counts.images} / {cell.counts.lesions}" for site, cell in first.cells.items()}
    everything = f"{first.everything.counts.images} / {first.everything.counts.lesions}"
    rows = [{"model": "test images / lesions"} | counts | {"all": everything, "mean of sites": ""}]
    for row in found.rows:
        cells = {site: percent(cell.balanced_accuracy) for site, cell in row.cells.items()}
        overall = {"all": percent(row.everything.balanced_accuracy), "mean of sites": percent(row.mean_of_sites)}
        rows.append({"model": row.model} | cells | overall)
    lacking = "; ".join(f"{site} has no {', '.join(c.absent)}" for site, c in first.cells.items() if c.absent)
    create_table_artifact(
        rows, key="cross-site",
        description="Balanced accuracy of every model on every site's test lesions, 95 % intervals over the lesions."
        + (f" Averages are over the classes that are there: {lacking}." if lacking else ""),
    )  # fmt: skip
    page = (out / "report.html").absolute()
    create_link_artifact(page.as_uri(), link_text=str(page), key="federation-report", description="The federated run.")


def _share(share: float | None) -> str:
    """A share in per cent with one decimal."""
    return "–" if share is None else f"{share:.1%}"


def _figures(point: PointFigures) -> dict[str, str]:
    texts = {
        "accuracy": percent(point.accuracy),
        "balanced accuracy": percent(point.balanced_accuracy),
        "macro F1": number(point.macro_f1),
    }
    melanoma = point.classes.get("mel")
    texts["melanoma sensitivity"] = percent(melanoma.sensitivity) if melanoma else "–"
    texts["melanoma specificity"] = percent(melanoma.specificity) if melanoma else "–"
    return texts


def show_decision(decision: Decision, registry: str) -> None:
    """Whether the model became the champion, and why."""
    did = "Promoted to champion" if decision.promoted else "Added, not promoted"
    create_markdown_artifact(
        f"**{did}**: `{decision.version}` in `{registry}`\n\n{decision.reason}", key="promotion",
        description="What became of the model in the registry.",
    )  # fmt: skip
