"""From predictions on the test split to every figure with its interval."""

from __future__ import annotations

import numpy as np
import pandas as pd

from dermaflow.errors import DataError
from dermaflow.evaluation.figures import Evaluation
from dermaflow.evaluation.intervals import lesion_weights
from dermaflow.evaluation.population import Sample, describe, lesion_figures
from dermaflow.evaluation.safety import safety_figures
from dermaflow.evaluation.slices import slices
from dermaflow.schemas.bundle import Calibration
from dermaflow.schemas.lesion import METADATA_COLUMNS
from dermaflow.taxonomy import CODES, INDEX, parse_diagnosis

PROBABILITIES: tuple[str, ...] = tuple(f"p_{code}" for code in CODES)


def evaluate(
    predictions: pd.DataFrame, calibration: Calibration, *, seed: int = 0, resamples: int = 1000
) -> Evaluation:
    """Measure a calibrated model on the test split.

    Args:
        predictions: One row an image: `METADATA_COLUMNS` and ``p_akiec`` ... ``p_vasc`` (calibrated, sum 1); where they
            are known also ``quality_flags`` (lists), ``ood_score`` and ``skin_type``.
        calibration: Operating points, priors and conformal quantiles, fitted on the calibration split.
        seed: Of the lesion bootstrap.
        resamples: Number of bootstrap resamples; every figure is drawn from the same ones.

    Returns:
        All images and histology-proven ones, images and lesions, slices: each figure with a 95 % interval.

    Raises:
        DataError: A column is missing, there is no row, or a probability is impossible.
    """
    sample = read_sample(predictions, seed=seed, resamples=resamples)
    parts = {"all": sample}
    histology = predictions["dx_type"].eq("histo").to_numpy(dtype=bool)
    if histology.any():
        parts["histology"] = sample.only(histology)
    return Evaluation(
        seed=seed,
        resamples=resamples,
        populations={name: describe(part, calibration) for name, part in parts.items()},
        lesion_level={name: lesion_figures(part, calibration) for name, part in parts.items()},
        safety=safety_figures(predictions, sample, calibration),
        slices=slices(predictions, sample, calibration),
    )


def read_sample(predictions: pd.DataFrame, *, seed: int, resamples: int) -> Sample:
    """Check a table of predictions and turn it into arrays; arguments and errors as in `evaluate`."""
    missing = [name for name in (*METADATA_COLUMNS, *PROBABILITIES) if name not in predictions.columns]
    if missing:
        raise DataError("columns missing: " + " ".join(missing), where="predictions")
    if predictions.empty:
        raise DataError("no image", where="predictions", todo="choose a split that holds images")
    probabilities = predictions[list(PROBABILITIES)].to_numpy(dtype=np.float64)
    total = probabilities.sum(axis=1)
    wrong = ~(np.isclose(total, 1, atol=1e-3) & (probabilities >= 0).all(axis=1))
    if wrong.any():
        image = predictions["image_id"].iloc[int(wrong.argmax())]
        raise DataError(
            f"{int(wrong.sum())} rows are no probabilities, first image {image}",
            where="predictions",
            expected="p_akiec ... p_vasc at least 0 with sum 1",
        )
    lesions = np.unique(predictions["lesion_id"].astype(str).to_numpy(dtype=str), return_inverse=True)[1]
    return Sample(
        truth=np.array([INDEX[parse_diagnosis(dx)] for dx in predictions["dx"]]),
        probabilities=probabilities / total[:, None],  # float32 rows sum to 1 only nearly
        lesions=lesions,
        weights=lesion_weights(lesions, resamples, np.random.default_rng(seed)),
    )
