"""Paired comparison of two models: against a loop over the lesions, narrower than apart, and what it refuses."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import sklearn.metrics as sk
from ham_predictions import ham_like

from dermaflow.errors import DataError
from dermaflow.evaluation.intervals import lesion_weights
from dermaflow.evaluation.paired import FIGURES, paired_difference
from dermaflow.taxonomy import CODES, MALIGNANT, MELANOMA

P = [f"p_{code}" for code in CODES]


@pytest.fixture(scope="module")
def champion() -> pd.DataFrame:
    return ham_like(images=600, lesions=400)


@pytest.fixture(scope="module")
def challenger(champion: pd.DataFrame) -> pd.DataFrame:
    """The champion with a hint of the truth added: better, and right and wrong on mostly the same images."""
    p = champion[P].to_numpy() + 0.15 * np.eye(7)[[CODES.index(dx) for dx in champion["dx"]]]
    return champion.assign(**dict(zip(P, (p / p.sum(axis=1, keepdims=True)).T, strict=True)))


BY_SCIKIT_LEARN = {
    "accuracy": lambda t, p, w: sk.accuracy_score(t, p.argmax(1), sample_weight=w),
    "balanced_accuracy": lambda t, p, w: sk.recall_score(
        t, p.argmax(1), sample_weight=w, average="macro", labels=np.unique(t[w > 0])
    ),
    "macro_f1": lambda t, p, w: sk.f1_score(
        t, p.argmax(1), sample_weight=w, average="macro", labels=np.unique(t[w > 0])
    ),
    "melanoma_sensitivity": lambda t, p, w: sk.recall_score(
        t == MELANOMA, p.argmax(1) == MELANOMA, sample_weight=w
    ),
    "malignant_sensitivity": lambda t, p, w: sk.recall_score(
        np.array(MALIGNANT)[t], np.array(MALIGNANT)[p.argmax(1)], sample_weight=w
    ),
    "melanoma_auc": lambda t, p, w: sk.roc_auc_score(t == MELANOMA, p[:, MELANOMA], sample_weight=w),
}  # fmt: skip


@pytest.mark.parametrize("metric", FIGURES)
def test_difference_and_interval_are_those_of_a_loop(champion, challenger, metric) -> None:
    found = paired_difference(champion, challenger, metric, resamples=50, seed=3)
    truth = np.array([CODES.index(dx) for dx in champion["dx"]])
    figure = BY_SCIKIT_LEARN[metric]
    old, new = champion[P].to_numpy(), challenger[P].to_numpy()
    ones = np.ones(len(truth))
    assert found.champion == pytest.approx(figure(truth, old, ones))
    assert found.challenger == pytest.approx(figure(truth, new, ones))
    assert found.difference == pytest.approx(found.challenger - found.champion)
    weights = lesion_weights(champion["lesion_id"].to_numpy(dtype=str), 50, np.random.default_rng(3))
    draws = [figure(truth, new, row) - figure(truth, old, row) for row in weights]
    assert [found.low, found.high] == pytest.approx(np.quantile(draws, [0.025, 0.975]))
    melanoma = champion["dx"].eq("mel")
    rests_on = {
        "melanoma_sensitivity": melanoma,
        "melanoma_auc": melanoma,
        "malignant_sensitivity": champion["dx"].isin(["mel", "bcc", "akiec"]),
    }
    assert found.n_lesions == champion[rests_on.get(metric, melanoma | ~melanoma)]["lesion_id"].nunique()


def test_the_order_of_the_rows_and_the_kind_of_table_do_not_matter(champion, challenger) -> None:
    shuffled = pa.Table.from_pandas(challenger.sample(frac=1, random_state=0), preserve_index=False)
    found = paired_difference(champion, shuffled, "accuracy", resamples=100)
    assert found == paired_difference(champion, challenger, "accuracy", resamples=100)


def test_a_model_differs_from_itself_by_nothing_and_swapped_models_by_the_opposite(champion, challenger) -> None:
    same = paired_difference(champion, champion, "balanced_accuracy", resamples=100)
    assert (same.difference, same.low, same.high) == (0, 0, 0)
    there = paired_difference(champion, challenger, "balanced_accuracy", resamples=100)
    back = paired_difference(challenger, champion, "balanced_accuracy", resamples=100)
    assert there.low > 0
    assert [back.difference, back.low, back.high] == pytest.approx([-there.difference, -there.high, -there.low])


def test_few_lesions_have_a_difference_but_no_interval(champion, challenger) -> None:
    few = champion["lesion_id"].isin(champion["lesion_id"].unique()[:4])
    found = paired_difference(champion[few], challenger[few], "accuracy", resamples=100)
    assert (found.low, found.high, found.n_lesions) == (None, None, 4)


@pytest.mark.parametrize(
    ("spoil", "metric", "said"),
    [
        (lambda t: t, "beauty", "no metric 'beauty'"),
        (lambda t: t.drop(columns=["dx", "p_df"]), "accuracy", "columns missing: dx p_df"),
        (lambda t: t.iloc[3:], "accuracy", "3 are in one table only"),
        (lambda t: pd.concat([t, t.iloc[:1]]), "accuracy", "an image has two rows"),
        (lambda t: t.iloc[:0], "accuracy", "no image"),
        (lambda t: t.assign(dx="nv"), "accuracy", "another diagnosis"),
        (lambda t: t.assign(lesion_id=t["image_id"]), "accuracy", "another diagnosis or lesion"),
        (lambda t: t.assign(p_mel=t["p_mel"].where(t.index > 0)), "accuracy", "no probabilities for image"),
    ],
)
def test_tables_that_cannot_be_compared_are_refused_with_the_reason(champion, challenger, spoil, metric, said) -> None:
    with pytest.raises(DataError, match=said):
        paired_difference(champion, spoil(challenger), metric, resamples=10)


def test_a_test_without_melanoma_has_no_melanoma_sensitivity(champion, challenger) -> None:
    others = champion["dx"] != "mel"
    with pytest.raises(DataError, match="no image to count"):
        paired_difference(champion[others], challenger[others], "melanoma_sensitivity", resamples=10)
