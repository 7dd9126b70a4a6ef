"""Champion against challenger on the same frozen test: one written rule, and a verdict to be read a year later."""

from __future__ import annotations

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field

from dermaflow.errors import DataError
from dermaflow.evaluation.paired import paired_difference
from dermaflow.schemas.bundle import Calibration
from dermaflow.taxonomy import CODES
from dermaflow.trust.decision import decide

_P = [f"p_{code}" for code in CODES]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Rule(_Strict):
    """A challenger is promoted if it is not worse than the champion by more than these margins.

    Not worse, rather than better: it has seen more, and the frozen test cannot show all that was gained by it. Each
    margin holds for the lower end of the 95 % interval of the difference, so a small test makes promotion harder.

    Attributes:
        balanced_accuracy: Balanced accuracy at the balanced point.
        melanoma_sensitivity: Share of melanomas named melanoma at the melanoma-safe point. Some 100 melanoma lesions
            leave about 0.04 between a difference and its lower end, so 0.05 allows next to no loss.
        safe_accuracy: Accuracy at the melanoma-safe point, which falls where melanoma is named too often.
    """

    balanced_accuracy: float = Field(0.01, ge=-1, le=1)
    melanoma_sensitivity: float = Field(0.05, ge=-1, le=1)
    safe_accuracy: float = Field(0.05, ge=-1, le=1)

    def in_words(self) -> list[str]:
        """The rule, a sentence each."""
        asked = (
            ("balanced accuracy (balanced point)", self.balanced_accuracy),
            ("melanoma sensitivity (melanoma-safe point)", self.melanoma_sensitivity),
            ("accuracy (melanoma-safe point)", self.safe_accuracy),
        )
        return [
            f"{name}: the lower end of the 95 % interval of challenger less champion must be above {-margin:+g}"
            for name, margin in asked
        ]


class Condition(_Strict):
    """One part of the rule.

    Attributes:
        low: Lower end of the 95 % paired lesion-bootstrap interval of `difference`; None where too few lesions tell.
        lesions: What the figure rests on.
        holds: Whether `low` is above ``-margin``. An interval that cannot be had does not hold.
    """

    name: str
    champion: float
    challenger: float
    difference: float
    low: float | None
    high: float | None
    lesions: int
    margin: float
    holds: bool


class Verdict(_Strict):
    """Whether the rule holds, and every figure it was decided by."""

    images: int
    lesions: int
    resamples: int
    seed: int
    rule: list[str]
    conditions: list[Condition]
    holds: bool


def judge(
    champion: pd.DataFrame,
    challenger: pd.DataFrame,
    calibrations: tuple[Calibration, Calibration],
    rule: Rule,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Verdict:
    """Compare two models on the same test images.

    Args:
        champion: One row an image as in ``predictions.parquet``.
        challenger: The same images by the other model.
        calibrations: Of champion and challenger; each names diagnoses at its own operating points.
        rule: Margins.
        resamples: Of the paired lesion bootstrap.
        seed: Of its draws.

    Raises:
        DataError: Not the same images, or none of a class that the rule asks for.
    """
    asked = (
        ("balanced accuracy, balanced point", "balanced_accuracy", "balanced", rule.balanced_accuracy),
        (
            "melanoma sensitivity, melanoma-safe point",
            "melanoma_sensitivity",
            "melanoma_safe",
            rule.melanoma_sensitivity,
        ),
        ("accuracy, melanoma-safe point", "accuracy", "melanoma_safe", rule.safe_accuracy),
    )
    conditions = []
    for name, metric, point, margin in asked:
        named = [_named(t, c, point) for t, c in zip((champion, challenger), calibrations, strict=True)]
        found = paired_difference(named[0], named[1], metric, resamples=resamples, seed=seed)
        conditions.append(
            Condition(
                name=name,
                champion=found.champion,
                challenger=found.challenger,
                difference=found.difference,
                low=found.low,
                high=found.high,
                lesions=found.n_lesions,
                margin=margin,
                holds=found.low is not None and found.low > -margin,
            )
        )
    return Verdict(
        images=len(champion),
        lesions=champion["lesion_id"].nunique(),
        resamples=resamples,
        seed=seed,
        rule=rule.in_words(),
        conditions=conditions,
        holds=all(condition.holds for condition in conditions),
    )


def _named(predictions: pd.DataFrame, calibration: Calibration, name: str) -> pd.DataFrame:
    """The table with all probability on the diagnosis named at an operating point."""
    point = next((point for point in calibration.operating_points if point.name == name), None)
    if point is None:
        raise DataError(f"the model has no operating point {name}", expected="a model of this version of DermaFlow")
    chosen = decide(predictions[_P].to_numpy(dtype=np.float64), point, calibration.priors)
    return predictions.assign(**dict(zip(_P, np.eye(len(CODES))[chosen].T, strict=True)))
