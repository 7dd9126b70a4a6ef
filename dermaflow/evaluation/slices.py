"""The test split by site, sex, age, localization, way of confirmation and skin type: who is served worse?

HAM10000 has no field for skin type, so its slices have none; a table with a column ``skin_type`` gets them.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from dermaflow.evaluation.figures import Slice
from dermaflow.evaluation.population import Sample, macro_auc, melanoma_auc, point_figures
from dermaflow.schemas.bundle import Calibration
from dermaflow.schemas.lesion import UNKNOWN
from dermaflow.taxonomy import MALIGNANT, MELANOMA
from dermaflow.trust.conformal import conformal_sets
from dermaflow.trust.policy import flag

MIN_IMAGES = 20
"""Smaller slices are listed with their counts only."""

SKIN_TYPE_COLUMN = "skin_type"
"""Fitzpatrick type or another scale, as text; optional."""

_MALIGNANT = np.array(MALIGNANT)

AGE_BANDS: tuple[tuple[str, float, float], ...] = (
    ("<30", -np.inf, 30),
    ("30-49", 30, 50),
    ("50-69", 50, 70),
    ("70+", 70, np.inf),
)
"""Name, first age, first age beyond, in years."""

_BAND_ORDER = {name: place for place, name in enumerate([*(band[0] for band in AGE_BANDS), UNKNOWN])}


def age_bands(age: pd.Series) -> pd.Series:
    """Name of the age band of each image; ``unknown`` where the age is missing."""
    bands = pd.Series(UNKNOWN, index=age.index, dtype=object)
    for name, first, beyond in AGE_BANDS:
        bands[(age >= first) & (age < beyond)] = name
    return bands


def slices(predictions: pd.DataFrame, sample: Sample, calibration: Calibration) -> list[Slice]:
    """Figures of every slice of every kind, from the resamples of the whole split.

    Args:
        predictions: One row an image, aligned with the sample.
        sample: The same images as arrays.
        calibration: Operating points and priors.

    Returns:
        Slices by kind; within a kind ages ascending, others largest first.
    """
    kinds = {
        "site": predictions["site"],
        "sex": predictions["sex"],
        "age": age_bands(predictions["age"]),
        "localization": predictions["localization"],
        "dx_type": predictions["dx_type"],
    }
    if SKIN_TYPE_COLUMN in predictions:
        kinds["skin_type"] = predictions[SKIN_TYPE_COLUMN]
    found = []
    for kind, column in kinds.items():
        names = column.fillna(UNKNOWN).astype(str).to_numpy()
        kept = [_slice(kind, name, sample.only(names == name), calibration) for name in np.unique(names)]
        found += sorted(kept, key=lambda part: _BAND_ORDER.get(part.name, 0) if kind == "age" else -part.counts.images)
    return found


def _slice(kind: str, name: str, sample: Sample, calibration: Calibration) -> Slice:
    described = Slice(kind=kind, name=name, counts=sample.counts(), absent=sample.absent())
    if described.counts.images < MIN_IMAGES:
        return described.model_copy(update={"note": f"fewer than {MIN_IMAGES} images: counts only"})
    points = {point.name: point_figures(sample, point, calibration.priors) for point in calibration.operating_points}
    sensitivity = {
        point: points[point].classes["mel"].sensitivity
        for point in ("accuracy", "melanoma_safe")
        if "mel" not in described.absent
    }
    sets = conformal_sets(sample.probabilities, np.array(calibration.conformal_quantiles))
    flagged, malignant = flag(sample.probabilities, sets, calibration.policy), _MALIGNANT[sample.truth]
    called = _MALIGNANT[sample.probabilities.argmax(axis=1)]
    return described.model_copy(
        update={
            "malignant_sensitivity": {
                name: sample.mean(mask, malignant, "nothing malignant")
                for name, mask in (("accuracy", called), ("policy", flagged))
            },
            "melanoma_flagged": sample.mean(flagged, sample.truth == MELANOMA, "no melanoma"),
            "benign_flagged": sample.mean(flagged, ~malignant, "nothing benign"),
            "coverage": sample.mean(sets[np.arange(len(sets)), sample.truth]),
            "accuracy": points["accuracy"].accuracy,
            "balanced_accuracy": points["balanced"].balanced_accuracy,
            "melanoma_sensitivity": sensitivity or None,
            "melanoma_auc": melanoma_auc(sample),
            "macro_auc": macro_auc(sample),
        }
    )
