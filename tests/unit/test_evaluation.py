"""`evaluate`: the figures themselves, populations, slices, lesion level, absent classes, the JSON."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics as sk
from ham_predictions import ham_like, ham_like_bundle
from pydantic import BaseModel

from dermaflow.errors import DataError
from dermaflow.evaluation.evaluate import evaluate
from dermaflow.evaluation.figures import Estimate, Evaluation
from dermaflow.evaluation.slices import age_bands
from dermaflow.schemas.bundle import Calibration
from dermaflow.taxonomy import CODES, MALIGNANT, MELANOMA
from dermaflow.trust.decision import decide


@pytest.fixture(scope="module")
def predictions() -> pd.DataFrame:
    return ham_like(images=800, lesions=500)


@pytest.fixture(scope="module")
def calibration(predictions: pd.DataFrame) -> Calibration:
    return ham_like_bundle(predictions).calibration


@pytest.fixture(scope="module")
def evaluation(predictions: pd.DataFrame, calibration: Calibration) -> Evaluation:
    return evaluate(predictions, calibration, seed=1, resamples=200)


def arrays(predictions: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    truth = np.array([CODES.index(dx) for dx in predictions["dx"]])
    return truth, predictions[[f"p_{code}" for code in CODES]].to_numpy()


@pytest.mark.parametrize("population", ["all", "histology"])
def test_figures_are_those_of_scikit_learn(predictions, calibration, evaluation, population) -> None:
    part = predictions if population == "all" else predictions[predictions["dx_type"] == "histo"]
    truth, p = arrays(part)
    ours = evaluation.populations[population]
    assert ours.counts.images == len(part)
    assert ours.counts.lesions == part["lesion_id"].nunique()
    assert ours.counts.images_by_class == part["dx"].value_counts().sort_index().to_dict()
    for point in calibration.operating_points:
        predicted, figures = decide(p, point, calibration.priors), ours.points[point.name]
        report = sk.classification_report(truth, predicted, labels=range(7), target_names=CODES, output_dict=True)
        assert figures.confusion == sk.confusion_matrix(truth, predicted, labels=range(7)).tolist()
        assert figures.accuracy.value == pytest.approx(sk.accuracy_score(truth, predicted))
        assert figures.balanced_accuracy.value == pytest.approx(sk.balanced_accuracy_score(truth, predicted))
        assert figures.macro_f1.value == pytest.approx(report["macro avg"]["f1-score"])
        assert figures.classes["bcc"].precision.value == pytest.approx(report["bcc"]["precision"])
        assert figures.classes["mel"].sensitivity.value == pytest.approx(report["mel"]["recall"])
        others = truth != MELANOMA
        assert figures.classes["mel"].specificity.value == pytest.approx((predicted[others] != MELANOMA).mean())
        benign = ~np.array(MALIGNANT)[predicted[~others]]
        assert figures.melanomas_called_benign.value == pytest.approx(benign.mean())
    assert ours.argmax.accuracy.value == pytest.approx(sk.accuracy_score(truth, p.argmax(1)))
    assert ours.argmax.balanced_accuracy.value == pytest.approx(sk.balanced_accuracy_score(truth, p.argmax(1)))
    malignant = np.array(MALIGNANT)
    assert ours.ranking.macro_auc.value == pytest.approx(sk.roc_auc_score(truth, p, multi_class="ovr"))
    assert ours.ranking.melanoma_auc.value == pytest.approx(sk.roc_auc_score(truth == MELANOMA, p[:, MELANOMA]))
    expected = sk.roc_auc_score(malignant[truth], p[:, malignant].sum(axis=1))
    assert ours.ranking.malignant_auc.value == pytest.approx(expected)
    assert ours.calibration.nll.value == pytest.approx(sk.log_loss(truth, p))
    brier = np.mean([7 * sk.mean_squared_error(np.eye(7)[t], row) for t, row in zip(truth, p, strict=True)])
    assert ours.calibration.brier.value == pytest.approx(brier)


def test_conformal_figures_count_the_sets_one_by_one(predictions, calibration, evaluation) -> None:
    truth, p = arrays(predictions)
    quantiles = calibration.conformal_quantiles
    sets = [{k for k in range(7) if 1 - row[k] <= quantiles[k]} | {int(row.argmax())} for row in p]
    ours = evaluation.populations["all"].conformal
    melanomas = [s for s, t in zip(sets, truth, strict=True) if t == MELANOMA]
    assert ours.coverage.value == pytest.approx(np.mean([t in s for s, t in zip(sets, truth, strict=True)]))
    assert ours.coverage_by_class["mel"].value == pytest.approx(np.mean([MELANOMA in s for s in melanomas]))
    assert ours.mean_set_size.value == pytest.approx(np.mean([len(s) for s in sets]))
    assert ours.singletons.value == pytest.approx(np.mean([len(s) == 1 for s in sets]))
    holds = np.mean([any(MALIGNANT[k] for k in s) for s in melanomas])
    assert ours.melanoma_sets_with_a_malignant_class.value == pytest.approx(holds)


def all_estimates(value: object) -> list[Estimate]:
    if isinstance(value, Estimate):
        return [value]
    if isinstance(value, dict):
        return [found for item in value.values() for found in all_estimates(item)]
    if isinstance(value, list):
        return [found for item in value for found in all_estimates(item)]
    return [found for _, item in value for found in all_estimates(item)] if isinstance(value, BaseModel) else []


def test_every_figure_has_an_interval_around_it_or_says_why_not(evaluation) -> None:
    found = all_estimates(evaluation)
    assert len(found) > 250
    with_interval = [e for e in found if e.low is not None]
    assert len(with_interval) > 200
    assert all(e.reason for e in found if e.low is None)
    accuracy = evaluation.populations["all"].points["accuracy"].accuracy
    assert accuracy.low < accuracy.value < accuracy.high


def test_the_seed_decides_the_interval_and_not_the_figure(predictions, calibration, evaluation) -> None:
    same = evaluate(predictions, calibration, seed=1, resamples=200)
    other = evaluate(predictions, calibration, seed=2, resamples=200)
    assert same == evaluation
    ours, theirs = evaluation.populations["all"].ranking.macro_auc, other.populations["all"].ranking.macro_auc
    assert ours.value == theirs.value
    assert ours.low != theirs.low


def test_json_round_trip_holds_no_nan(evaluation) -> None:
    text = evaluation.model_dump_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in metrics.json"))
    assert Evaluation.model_validate_json(text) == evaluation


def test_absent_classes_are_left_out_and_named(predictions, calibration) -> None:
    kept = predictions[~predictions["dx"].isin(["df", "vasc"])]
    population = evaluate(kept, calibration, resamples=50).populations["all"]
    assert population.absent == ["df", "vasc"]
    assert set(population.points["accuracy"].classes) == set(population.ranking.auc) == set(CODES) - {"df", "vasc"}
    truth, p = arrays(kept)
    predicted = decide(p, calibration.operating_points[0], calibration.priors)
    recalls = sk.recall_score(truth, predicted, labels=np.unique(truth), average=None)
    assert population.points["accuracy"].balanced_accuracy.value == pytest.approx(recalls.mean())


def test_a_test_split_of_nevi_only_has_no_auc_and_no_melanoma_figure(predictions, calibration) -> None:
    evaluation = evaluate(predictions[predictions["dx"] == "nv"], calibration, resamples=50)
    population = evaluation.populations["all"]
    assert population.ranking.macro_auc.value is None
    assert population.ranking.macro_auc.reason == "every image is nv"
    assert population.ranking.melanoma_auc.reason == "no image is melanoma"
    assert population.points["accuracy"].melanomas_called_benign.value is None
    assert population.points["accuracy"].classes["nv"].specificity.reason == "every image is nv"
    assert population.points["accuracy"].accuracy.value > 0.5
    assert "melanoma_auc" not in evaluation.headline()
    assert all(part.melanoma_sensitivity is None for part in evaluation.slices)


def test_slices_are_counted_and_the_small_ones_not_judged(predictions, calibration, evaluation) -> None:
    kinds = {kind: [s for s in evaluation.slices if s.kind == kind] for kind in ("site", "sex", "age", "localization")}
    for parts in kinds.values():
        assert sum(part.counts.images for part in parts) == len(predictions)
    small = [part for part in evaluation.slices if part.counts.images < 20]
    assert small
    assert all(part.accuracy is None and part.note for part in small)
    site = next(part for part in kinds["site"] if part.name == "vidir_modern")
    mine = predictions[predictions["site"] == "vidir_modern"]
    truth, p = arrays(mine)
    safe = decide(p, calibration.operating_points[2], calibration.priors)
    assert site.counts.lesions == mine["lesion_id"].nunique()
    assert site.accuracy.value == pytest.approx((p.argmax(axis=1) == truth).mean())
    expected = (safe[truth == MELANOMA] == MELANOMA).mean()
    assert site.melanoma_sensitivity["melanoma_safe"].value == pytest.approx(expected)


def test_age_bands_at_their_edges() -> None:
    bands = age_bands(pd.Series([0, 29.9, 30, 49.9, 50, 69.9, 70, 85, np.nan]))
    assert bands.tolist() == ["<30", "<30", "30-49", "30-49", "50-69", "50-69", "70+", "70+", "unknown"]


def test_lesion_level_judges_the_mean_probability_of_a_lesion_once(predictions, calibration, evaluation) -> None:
    columns = [f"p_{code}" for code in CODES]
    merged = predictions.groupby("lesion_id").agg({"dx": "first", **dict.fromkeys(columns, "mean")})
    truth, p = arrays(merged)
    ours = evaluation.lesion_level["all"]
    assert ours.lesions == len(merged)
    assert ours.accuracy["accuracy"].value == pytest.approx((p.argmax(axis=1) == truth).mean())
    balanced = sk.balanced_accuracy_score(truth, decide(p, calibration.operating_points[1], calibration.priors))
    assert ours.balanced_accuracy["balanced"].value == pytest.approx(balanced)


def test_impossible_tables_are_refused_with_the_reason(predictions, calibration) -> None:
    with pytest.raises(DataError, match="columns missing: site p_mel"):
        evaluate(predictions.drop(columns=["p_mel", "site"]), calibration)
    with pytest.raises(DataError, match="no image"):
        evaluate(predictions.iloc[:0], calibration)
    wrong = predictions.copy()
    wrong.loc[3, "p_nv"] += 0.2
    wrong.loc[5, "p_mel"] = np.nan
    with pytest.raises(DataError, match=f"2 rows .* first image {wrong.loc[3, 'image_id']}"):
        evaluate(wrong, calibration)
