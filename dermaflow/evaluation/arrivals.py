"""What a model's findings on new images, and the diagnoses that became known of some, say of drift."""

from __future__ import annotations

import numpy as np
import pandas as pd

from dermaflow.schemas.bundle import Bundle
from dermaflow.taxonomy import CODES, INDEX
from dermaflow.trust.drift import Measures, calibration_drift, distance_drift, mix_drift

_P = [f"p_{code}" for code in CODES]


def measure(findings: pd.DataFrame, labels: pd.DataFrame, bundle: Bundle) -> Measures:
    """Measure drift.

    Args:
        findings: One row a new image as in ``findings.parquet`` (`FINDING_SCHEMA`), ``lesion_id`` filled.
        labels: Diagnoses that the model has not learnt: ``image_id``, ``lesion_id``, ``dx``, ``dx_type``.
        bundle: The model that made the findings.
    """
    calibration = bundle.calibration
    assert calibration is not None  # as `resolve_model` found
    read = findings[findings["status"] != "failed"]
    flagged = np.array([len(flags) > 0 if flags is not None else False for flags in read["quality_flags"]], bool)
    usual = None if calibration.ood is None else 1 - calibration.ood.quantile
    lesions = read[read["status"] == "ok"].groupby("lesion_id")[_P].mean()
    proven = labels[labels["dx_type"] == "histo"].drop_duplicates("lesion_id").set_index("lesion_id")["dx"]
    outcomes = lesions.join(proven, how="inner")
    return Measures(
        images=len(read),
        labelled_lesions=int(labels["lesion_id"].nunique()),
        mix=mix_drift(_rows(lesions), np.array(bundle.train_priors)),
        distance=None if usual is None else distance_drift(read["ood"].to_numpy(bool)[~flagged], usual),
        calibration=calibration_drift(_rows(outcomes), np.array([INDEX[dx] for dx in outcomes["dx"]], np.int64)),
    )


def _rows(lesions: pd.DataFrame) -> np.ndarray:
    """[N, 7] float64, rows summing to 1."""
    p = lesions[_P].to_numpy(dtype=np.float64)
    return p / p.sum(axis=1, keepdims=True) if len(p) else p
