"""Evaluate a bundle on the test split of a shard folder: predictions, metrics, report."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from dermaflow import storage
from dermaflow.bundles.bundle import LoadedBundle, load_bundle, update_bundle
from dermaflow.errors import BundleError
from dermaflow.evaluation.evaluate import evaluate
from dermaflow.evaluation.figures import Evaluation
from dermaflow.evaluation.pathways import urgencies
from dermaflow.evaluation.report import CARD_NAME, Table, write_report
from dermaflow.evaluation.safety import FLAGS_COLUMN, OOD_COLUMN
from dermaflow.learning.inference import network_of, predict
from dermaflow.learning.optimisation import pick_device
from dermaflow.preparation.reading import ShardFolder
from dermaflow.schemas.finding import Finding, findings_table
from dermaflow.schemas.shard import SPLITS
from dermaflow.scoring.predictor import Answers, findings, image_flags
from dermaflow.settings import settings
from dermaflow.taxonomy import CODES
from dermaflow.trust.ood import ood_score
from dermaflow.trust.temperature import calibrated_probabilities

log = logging.getLogger(__name__)

PREDICTIONS_NAME = "predictions.parquet"
FINDINGS_NAME = "findings.parquet"


def evaluate_bundle(
    model: str | Path,
    shards: str | Path,
    out: Path,
    *,
    seed: int = 0,
    resamples: int = 1000,
    command: str | None = None,
    progress: Callable[[str, int, int], None] = lambda step, done, total: None,
) -> Evaluation:
    """Measure a model on the ``test`` split and write ``report.html``, ``metrics.json``, ``card.md``, the tables.

    ``predictions.parquet`` holds metadata and probabilities of every image, ``findings.parquet`` what the model would
    say of it (`FINDING_SCHEMA`): images that are refused count in every figure, but have no class among the findings.
    The first evaluation of a bundle in a local folder also writes its headline figures and card into the bundle.

    Args:
        model: Bundle, local or ``s3://``.
        shards: Shard folder that the model was trained from.
        out: Folder of the report.
        seed: Of the lesion bootstrap.
        resamples: Of the lesion bootstrap.
        command: The command as typed, for the report.
        progress: Called with the step, images done and images in all.

    Raises:
        BundleError: The bundle is damaged or was never calibrated.
        DataError: The test split is empty.
    """
    loaded = load_bundle(model)
    if loaded.bundle.calibration is None:
        raise BundleError("no calibration", where=model, todo="train the model to the end: dermaflow train")
    folder = ShardFolder(shards)
    if folder.manifest.data_hash != loaded.bundle.training.data_hash:
        log.warning(
            "the shards are not those the model was trained from (%s, %s): only images of lesions that were never "
            "trained on are a test", folder.manifest.data_hash[:12], loaded.bundle.training.data_hash[:12],
        )  # fmt: skip
    predictions = predict_test(loaded, folder, progress)
    evaluation = evaluate(predictions, loaded.bundle.calibration, seed=seed, resamples=resamples)
    found = findings_of_test(loaded, predictions)
    evaluation = evaluation.model_copy(update={"pathways": urgencies(found, predictions, loaded.bundle.calibration)})
    with storage.open_atomic(out / PREDICTIONS_NAME) as stream:
        pq.write_table(pa.Table.from_pandas(predictions, preserve_index=False), stream)
    write_report(
        out, evaluation, predictions, loaded.bundle, images=_finder(folder, predictions),
        data_sheet=data_sheet(folder), command=command,
    )  # fmt: skip
    if loaded.bundle.metrics is None and not storage.is_remote(model):
        card = (out / CARD_NAME).read_text(encoding="utf-8")
        update_bundle(Path(model), metrics=evaluation.headline(), card=card)
        found = findings_of_test(load_bundle(model), predictions)  # they name the bundle as it is from now on
    with storage.open_atomic(out / FINDINGS_NAME) as stream:
        pq.write_table(findings_table(found), stream)
    return evaluation


def predict_test(loaded: LoadedBundle, folder: ShardFolder, progress: Callable[[str, int, int], None]) -> pd.DataFrame:
    """Metadata, calibrated ``p_<code>``, ``ood_score`` and ``quality_flags`` of every test image."""
    bundle, calibration = loaded.bundle, loaded.bundle.calibration
    assert calibration is not None  # checked by the caller
    spec = bundle.input
    pixels = folder.pixels(
        "test", spec.height, spec.width, spec.copies, threads=settings().threads,
        progress=lambda done, total: progress("decode", done, total),
    )  # fmt: skip
    table = folder.metadata("test")
    if table.empty:
        return table
    network = network_of(loaded).to(pick_device())
    logits, features = predict(network, pixels, spec, progress=lambda done, total: progress("predict", done, total))
    probabilities = calibrated_probabilities(logits, calibration)
    for i, code in enumerate(CODES):
        table[f"p_{code}"] = probabilities[:, i].astype(np.float32)
    if calibration.ood is not None and loaded.reference is not None:
        table[OOD_COLUMN] = ood_score(features, loaded.reference)
    table[FLAGS_COLUMN] = _flags(folder, len(table), progress)
    return table


def findings_of_test(loaded: LoadedBundle, predictions: pd.DataFrame) -> list[Finding]:
    """What the model would say of the images of `predict_test`, as `dermaflow.scoring` says it."""
    answers = Answers(
        p=predictions[[f"p_{code}" for code in CODES]].to_numpy(dtype=np.float64),
        ood=predictions[OOD_COLUMN].to_numpy() if OOD_COLUMN in predictions else np.full(len(predictions), np.nan),
        flags=predictions[FLAGS_COLUMN].tolist(),
        problems=[None] * len(predictions),
    )
    return findings(loaded, answers, predictions["image_id"].tolist(), predictions["lesion_id"].tolist())


def _flags(folder: ShardFolder, images: int, progress: Callable[[str, int, int], None]) -> list[list[str]]:
    """Quality flags of the test images, in their order."""
    found: list[list[str]] = []
    with ThreadPoolExecutor(settings().threads) as pool:
        for group in folder.row_groups("test"):
            found += [list(flags) for flags in pool.map(image_flags, group.read(["image"])["image"].to_pylist())]
            progress("quality", len(found), images)
    return found


def _finder(folder: ShardFolder, predictions: pd.DataFrame) -> Callable[[str], bytes]:
    """Find an image of the test split by its id, reading only its row group."""
    groups = folder.row_groups("test")
    ends = np.cumsum([group.rows for group in groups])
    row_of = {image_id: i for i, image_id in enumerate(predictions["image_id"])}

    def find(image_id: str) -> bytes:
        row = row_of[image_id]
        number = int(np.searchsorted(ends, row, side="right"))
        table = groups[number].read(["image"])
        data: bytes = table["image"][row - (ends[number] - groups[number].rows)].as_py()
        return data

    return find


def data_sheet(folder: ShardFolder) -> list[Table]:
    """What the shards hold, as tables for the report."""
    manifest = folder.manifest
    rows = [
        [split, str(sum(manifest.counts[split].values())), str(manifest.lesions[split])]
        + [str(manifest.counts[split].get(code, 0)) for code in CODES]
        for split in SPLITS
    ]
    facts = [
        ["data hash", manifest.data_hash],
        ["seed of the splits", str(manifest.seed)],
        ["shards", str(len(manifest.shards))],
        ["quarantined images", str(manifest.quarantined)],
    ]
    return [("Images by split", ["split", "images", "lesions", *CODES], rows), ("Shards", ["what", "value"], facts)]
