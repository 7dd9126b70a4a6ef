"""Two models on the same test images: how much better one is, with a paired lesion-bootstrap interval.

Both are measured in the same resamples of the lesions, so what makes a test easy or hard for both falls out of the
difference. The interval is much narrower than the two models' own ones suggest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa

from dermaflow.errors import DataError
from dermaflow.evaluation import metrics
from dermaflow.evaluation.intervals import MIN_LESIONS, QUANTILES, lesion_weights
from dermaflow.taxonomy import CODES, INDEX, MALIGNANT, MELANOMA, parse_diagnosis

_P = [f"p_{code}" for code in CODES]
_COLUMNS = ["image_id", "lesion_id", "dx", *_P]
_MALIGNANT = np.array(MALIGNANT)

Figure = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""Truth [N] int, probabilities [N, 7], weights [R, N] -> [R]."""


@dataclass(frozen=True)
class PairedDifference:
    """How much more the challenger reaches than the champion.

    Attributes:
        difference: The challenger's figure less the champion's.
        low: Lower end of its 95 % interval; None where fewer than `MIN_LESIONS` lesions tell of the spread.
        high: Upper end, likewise.
        n_lesions: Lesions the figure rests on: all, or for a sensitivity or AUC those of its class.
        champion: The champion's figure on these images.
        challenger: The challenger's.
    """

    difference: float
    low: float | None
    high: float | None
    n_lesions: int
    champion: float
    challenger: float


def _called(counts: Callable[[np.ndarray], np.ndarray]) -> Figure:
    """A figure of the most probable class."""
    return lambda truth, p, weights: counts(metrics.confusion_matrices(truth, p.argmax(axis=1), weights))


def _melanoma_auc(truth: np.ndarray, p: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return metrics.area(*metrics.roc_curves(truth == MELANOMA, p[:, MELANOMA], weights))


def _malignant_sensitivity(truth: np.ndarray, p: np.ndarray, weights: np.ndarray) -> np.ndarray:
    among = _MALIGNANT[truth]
    return metrics.mean(_MALIGNANT[p.argmax(axis=1)][among], weights[:, among])


FIGURES: dict[str, Figure] = {
    "accuracy": _called(metrics.accuracy),
    "balanced_accuracy": _called(metrics.balanced_accuracy),
    "macro_f1": _called(metrics.macro_f1),
    "melanoma_sensitivity": _called(lambda matrices: metrics.sensitivities(matrices)[:, MELANOMA]),
    "malignant_sensitivity": _malignant_sensitivity,
    "melanoma_auc": _melanoma_auc,
}
"""What can be compared, all of the most probable class but for the area. Averages are over the classes present."""


def paired_difference(
    champion: pd.DataFrame | pa.Table,
    challenger: pd.DataFrame | pa.Table,
    metric: str,
    resamples: int = 1000,
    seed: int = 0,
) -> PairedDifference:
    """Measure two models on the same images and resample the lesions for both at once.

    Args:
        champion: One row an image, in any order: ``image_id``, ``lesion_id``, ``dx`` and ``p_akiec`` ... ``p_vasc``, as
            in ``predictions.parquet`` of an evaluation.
        challenger: The same images by the other model.
        metric: One of `FIGURES`.
        resamples: Of the lesions.
        seed: Of the draws.

    Raises:
        DataError: An unknown metric, a missing column, an image without probabilities, other images or another truth,
            or no image that the metric counts.
    """
    figure = FIGURES.get(metric)
    if figure is None:
        raise DataError(f"no metric {metric!r}", where="metric", expected="one of " + " ".join(FIGURES))
    old, new = _read(champion, "champion"), _read(challenger, "challenger")
    if not old.index.equals(new.index):
        only = old.index.symmetric_difference(new.index)
        raise DataError(
            f"not the same images: {len(only)} are in one table only, first {only[0]}", where="challenger",
            expected=f"the {len(old)} images of the champion", todo="evaluate both on the same shards",
        )  # fmt: skip
    truth = _truth(old)
    if not (np.array_equal(truth, _truth(new)) and (old["lesion_id"] == new["lesion_id"]).all()):
        raise DataError(
            "the same images have another diagnosis or lesion", where="challenger",
            todo="evaluate both on the same shards",
        )  # fmt: skip
    lesions = old["lesion_id"].to_numpy(dtype=str)
    weights = lesion_weights(lesions, resamples, np.random.default_rng(seed))
    both = np.vstack([np.ones(len(truth)), weights])  # the sample itself, then its resamples
    before, after = (figure(truth, table[_P].to_numpy(dtype=np.float64), both) for table in (old, new))
    if not np.isfinite(before[0]):
        raise DataError(f"no {metric}: no image to count, or one class only", where="champion")
    draws = (after - before)[1:]
    draws = draws[np.isfinite(draws)]
    counted = _rests_on(metric, truth)
    count = min(len(np.unique(lesions[mask])) for mask in counted)
    low, high = np.quantile(draws, QUANTILES) if count >= MIN_LESIONS and draws.size else (None, None)
    return PairedDifference(
        difference=float(after[0] - before[0]),
        low=None if low is None else float(low),
        high=None if high is None else float(high),
        n_lesions=count,
        champion=float(before[0]),
        challenger=float(after[0]),
    )


def _read(table: pd.DataFrame | pa.Table, where: str) -> pd.DataFrame:
    """The columns needed, by image id, ascending."""
    frame = table.to_pandas() if isinstance(table, pa.Table) else table
    missing = [name for name in _COLUMNS if name not in frame.columns]
    if missing:
        raise DataError(
            "columns missing: " + " ".join(missing), where=where,
            expected="a table like predictions.parquet of `dermaflow evaluate`",
        )  # fmt: skip
    frame = frame[_COLUMNS].set_index("image_id").sort_index()
    if frame.empty or not frame.index.is_unique:
        raise DataError("no image" if frame.empty else "an image has two rows", where=where, expected="a row an image")
    if frame[_P].isna().to_numpy().any():
        image = frame.index[frame[_P].isna().any(axis=1)][0]
        raise DataError(
            f"no probabilities for image {image}", where=where,
            expected="those of every image, refused ones as well: predictions.parquet of `dermaflow evaluate`",
        )  # fmt: skip
    return frame.astype({"lesion_id": str})


def _truth(frame: pd.DataFrame) -> np.ndarray:
    return np.array([INDEX[parse_diagnosis(dx)] for dx in frame["dx"]])


def _rests_on(metric: str, truth: np.ndarray) -> list[np.ndarray]:
    """Masks [N] of the images a figure rests on; the smaller one counts."""
    melanoma = truth == MELANOMA
    match metric:
        case "melanoma_sensitivity":
            return [melanoma]
        case "melanoma_auc":
            return [melanoma, ~melanoma]
        case "malignant_sensitivity":
            return [_MALIGNANT[truth]]
    return [np.ones(len(truth), bool)]
