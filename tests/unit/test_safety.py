"""What policies dismiss and flag, counted by hand; the gate's false alarms; slices by skin type."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from ham_predictions import ham_like, ham_like_bundle

from dermaflow.evaluation.evaluate import evaluate
from dermaflow.evaluation.figures import Evaluation
from dermaflow.evaluation.report import write_report
from dermaflow.schemas.bundle import Calibration, OodSpec
from dermaflow.taxonomy import CODES, MALIGNANT
from dermaflow.trust.policy import policies

MALIGNANT_CODES = {code for code, malignant in zip(CODES, MALIGNANT, strict=True) if malignant}


@pytest.fixture(scope="module")
def predictions() -> pd.DataFrame:
    table = ham_like(images=700, lesions=450)
    rng = np.random.default_rng(0)
    return table.assign(
        quality_flags=[["blur"] * (i % 50 == 0) + ["exposure"] * (i % 100 == 0) for i in range(len(table))],
        ood_score=rng.uniform(0, 1, len(table)),
        skin_type=rng.choice(["II", "III", "V"], len(table), p=[0.6, 0.38, 0.02]),
    )


@pytest.fixture(scope="module")
def calibration(predictions: pd.DataFrame) -> Calibration:
    fitted = ham_like_bundle(predictions).calibration
    assert fitted is not None
    return fitted.model_copy(update={"ood": OodSpec(quantile=0.98, threshold=0.95)})


@pytest.fixture(scope="module")
def evaluation(predictions: pd.DataFrame, calibration: Calibration) -> Evaluation:
    return evaluate(predictions, calibration, seed=1, resamples=100)


def flagged_by_hand(predictions: pd.DataFrame, calibration: Calibration, name: str) -> pd.Series:
    """The rules of `trust.policy`, a row at a time."""
    policy = policies(calibration)[name]

    def suspicious(row: pd.Series) -> bool:
        p = {code: row[f"p_{code}"] for code in CODES}
        called = max(p, key=lambda code: p[code])
        held = {code for k, code in enumerate(CODES) if 1 - p[code] <= calibration.conformal_quantiles[k]}
        return bool(
            called in MALIGNANT_CODES
            or (policy.mel_threshold is not None and p["mel"] >= policy.mel_threshold)
            or (
                policy.malignant_threshold is not None
                and sum(p[code] for code in MALIGNANT_CODES) >= policy.malignant_threshold
            )
            or (policy.use_set and held & MALIGNANT_CODES)
        )

    return predictions.apply(suspicious, axis=1)


@pytest.mark.parametrize("name", ["argmax", "p_mel", "p_malignant", "conformal_set", "all_triggers", "policy"])
def test_counts_are_those_counted_by_hand(predictions, calibration, evaluation, name) -> None:
    table = predictions.assign(flagged=flagged_by_hand(predictions, calibration, name))
    lesions = table.groupby("lesion_id").agg(dx=("dx", "first"), flagged=("flagged", "any"))
    for found, part in ((evaluation.safety.images[name], table), (evaluation.safety.lesions[name], lesions)):
        malignant = part["dx"].isin(MALIGNANT_CODES)
        assert found.melanomas == (part["dx"] == "mel").sum()
        assert found.melanomas_dismissed == ((part["dx"] == "mel") & ~part["flagged"]).sum()
        assert found.malignant_dismissed == (malignant & ~part["flagged"]).sum()
        assert (found.benign, found.benign_flagged) == ((~malignant).sum(), (~malignant & part["flagged"]).sum())
        share = found.benign_flagged_share
        assert share.value == pytest.approx(found.benign_flagged / found.benign)
        assert share.low is not None and share.low < share.value < share.high
        assert found.melanomas_dismissed_share.value == pytest.approx(found.melanomas_dismissed / found.melanomas)


def test_triggers_only_add(evaluation) -> None:
    for figures in (evaluation.safety.images, evaluation.safety.lesions):
        for name, part in figures.items():
            assert part.melanomas_dismissed <= figures["argmax"].melanomas_dismissed
            assert figures["all_triggers"].melanomas_dismissed <= part.melanomas_dismissed or name == "policy"


def test_false_alarms_of_gate_and_distance(predictions, evaluation) -> None:
    gate = evaluation.safety.gate
    assert gate is not None and gate.out_of_distribution is not None
    flagged = predictions["quality_flags"].map(bool)
    unlike = predictions["ood_score"] > 0.95
    assert gate.quality.value == pytest.approx(0.02)
    assert gate.by_flag["exposure"].value == pytest.approx(0.01) and gate.by_flag["occlusion"].value == 0
    assert gate.out_of_distribution.value == pytest.approx(unlike.mean())
    assert gate.not_assessable.value == pytest.approx((flagged | unlike).mean())
    melanoma = predictions["dx"] == "mel"
    assert gate.melanomas_not_assessable.value == pytest.approx((flagged | unlike)[melanoma].mean())


def test_without_gate_and_distance_there_are_no_false_alarms_to_report(predictions, calibration) -> None:
    plain = evaluate(predictions.drop(columns=["quality_flags", "ood_score", "skin_type"]), calibration, resamples=20)
    assert plain.safety.gate is None
    assert not [part for part in plain.slices if part.kind == "skin_type"]


def test_slices_carry_coverage_and_what_the_policy_flags(predictions, calibration, evaluation) -> None:
    table = predictions.assign(flagged=flagged_by_hand(predictions, calibration, "policy"))
    for kind, column in (("sex", "sex"), ("skin_type", "skin_type")):
        for part in [part for part in evaluation.slices if part.kind == kind and not part.note]:
            rows = table[table[column] == part.name]
            benign = ~rows["dx"].isin(MALIGNANT_CODES)
            assert part.benign_flagged.value == pytest.approx(rows["flagged"][benign].mean())
            assert part.melanoma_flagged.value == pytest.approx(rows["flagged"][rows["dx"] == "mel"].mean())
            assert part.malignant_sensitivity["policy"].value >= part.malignant_sensitivity["accuracy"].value
            assert 0.7 < part.coverage.value <= 1
    small = next(part for part in evaluation.slices if part.kind == "skin_type" and part.name == "V")
    assert small.counts.images < 20 and small.note and small.coverage is None


def test_set_size_by_class_averages_to_the_mean(predictions, evaluation) -> None:
    figures = evaluation.populations["all"].conformal
    counts = predictions["dx"].value_counts()
    total = sum(size.value * counts[code] for code, size in figures.set_size_by_class.items())
    assert total / len(predictions) == pytest.approx(figures.mean_set_size.value)


def test_the_report_shows_policy_gate_and_skin_type_or_says_there_is_none(predictions, tmp_path) -> None:
    bundle = ham_like_bundle(predictions)
    for table, expected, absent in (
        (predictions, "Skin type", "No slice by skin type"),
        (
            predictions.drop(columns=["quality_flags", "skin_type"]),
            "HAM10000 has no such field",
            "Refused as not assessable",
        ),
    ):
        figures = evaluate(table, bundle.calibration, resamples=20)
        page = write_report(tmp_path, figures, table, bundle, images=None).read_text()
        assert expected in page and absent not in page
        policy = figures.safety.lesions["policy"]
        assert f"{policy.melanomas_dismissed} of {policy.melanomas}, " in page
        assert f"p(mel) ≥ {policy.policy.mel_threshold:.3f} or p(malignant) ≥" in page
