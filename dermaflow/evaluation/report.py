"""``report.html``, ``metrics.json`` and ``card.md``: what a reader, a program and the next user of the model get."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jinja2
import pandas as pd

from dermaflow import storage
from dermaflow.errors import BundleError
from dermaflow.evaluation import plots, wording
from dermaflow.evaluation.card import card_sections
from dermaflow.evaluation.evaluate import read_sample
from dermaflow.evaluation.figures import Evaluation, PointFigures
from dermaflow.evaluation.mistakes import worst_mistakes
from dermaflow.evaluation.slices import MIN_IMAGES
from dermaflow.schemas.bundle import Bundle
from dermaflow.schemas.pathway import URGENCY_TEXT
from dermaflow.taxonomy import CODES, DIAGNOSES
from dermaflow.trust.decision import decide

REPORT_NAME, METRICS_NAME, CARD_NAME = "report.html", "metrics.json", "card.md"
Table = tuple[str, list[str], list[list[str]]]
"""Title, column names, rows."""

SLICE_TITLES = {
    "site": "Site",
    "sex": "Sex",
    "age": "Age in years",
    "localization": "Place on the body",
    "dx_type": "How the diagnosis was confirmed",
    "skin_type": "Skin type",
}


def write_report(
    out: Path,
    evaluation: Evaluation,
    predictions: pd.DataFrame,
    bundle: Bundle,
    *,
    images: Callable[[str], bytes] | None,
    data_sheet: list[Table] | None = None,
    command: str | None = None,
) -> Path:
    """Write ``metrics.json``, ``card.md`` and the self-contained ``report.html``, each atomically, the page last.

    Args:
        out: Folder; made if it is not there.
        evaluation: From `evaluate` on the same predictions.
        predictions: One row an image of the test split, as for `evaluate`.
        bundle: The model, with its calibration.
        images: Encoded bytes of an image by its id, for the pictures of the worst mistakes; None shows none.
        data_sheet: Tables of the data sheet: title, column names, rows.
        command: The command that made the evaluation, as typed.

    Returns:
        Path of ``report.html``.

    Raises:
        BundleError: The bundle has no calibration.
        StorageError: A file could not be written.
    """
    if bundle.calibration is None:
        raise BundleError(
            "no calibration", where=bundle.name, todo="train the model to the end, then evaluate it again"
        )
    measured = evaluation.model_copy(update={"provenance": _provenance(bundle, command)})
    sample = read_sample(predictions, seed=evaluation.seed, resamples=1)
    points = {point.name: point for point in bundle.calibration.operating_points}
    predicted = decide(sample.probabilities, points["accuracy"], bundle.calibration.priors)
    dismissed, others = worst_mistakes(predictions, sample, predicted, images)
    sections = card_sections(bundle, measured, predictions["image_id"].astype(str), command)
    everything = measured.populations["all"]
    page = environment().get_template("report.html.j2").render(
        bundle=bundle,
        evaluation=measured,
        everything=everything,
        sentences=wording.headline_sentences(everything, bundle.calibration.operating_points),
        notes=wording.small_data_notes(everything),
        populations={"all": "All images", "histology": "Histology-proven only"},
        rules={name: wording.rule(point) for name, point in points.items()},
        matrices={name: _matrix(point) for name, point in everything.points.items()},
        reliability=plots.reliability(sample.truth, sample.probabilities),
        roc=plots.roc(sample.truth, sample.probabilities),
        precision_recall=plots.precision_recall(sample.truth, sample.probabilities),
        coverage=plots.coverage(everything.conformal),
        training=plots.training(bundle.training.history),
        slice_titles={k: title for k, title in SLICE_TITLES.items() if any(part.kind == k for part in measured.slices)},
        policy_titles=wording.POLICY_TITLES,
        policy_rules={name: wording.triggers(part.policy) for name, part in measured.safety.lesions.items()},
        min_images=MIN_IMAGES,
        dismissed=dismissed,
        others=others,
        data_sheet=data_sheet or [],
        card=sections,
        urgency_text=URGENCY_TEXT,
        diagnoses={diagnosis.code: diagnosis.name for diagnosis in DIAGNOSES},
    )  # fmt: skip
    card = environment().get_template("card.md.j2").render(bundle=bundle, card=sections)
    storage.write_bytes(storage.join(out, METRICS_NAME), measured.model_dump_json(indent=2).encode())
    storage.write_bytes(storage.join(out, CARD_NAME), card.encode())
    storage.write_bytes(storage.join(out, REPORT_NAME), page.encode())
    return Path(out) / REPORT_NAME


def environment() -> jinja2.Environment:
    """Where the pages of this package and their style are found; values are escaped in HTML."""
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("dermaflow.evaluation", "templates"),
        autoescape=jinja2.select_autoescape(["html.j2"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.globals.update(
        value=wording.value,
        interval=wording.interval,
        point_titles=wording.POINT_TITLES,
    )
    return found


def _provenance(bundle: Bundle, command: str | None) -> dict[str, str]:
    return {
        "model": bundle.name,
        "weights_sha256": bundle.weights_sha256,
        "data_hash": bundle.training.data_hash,
        "recipe": bundle.training.recipe_name,
        **({"command": command} if command else {}),
    }


@dataclass(frozen=True)
class _Cell:
    count: int
    share: float | None  # of the row; None in an empty row


def _matrix(point: PointFigures) -> dict[str, list[_Cell]]:
    """Rows of the confusion matrix by code of the true class."""
    return {
        code: [_Cell(count, count / sum(row) if sum(row) else None) for count in row]
        for code, row in zip(CODES, point.confusion, strict=True)
    }
