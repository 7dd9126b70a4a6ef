"""The written rule of promotion, the frozen test, and who may be measured on it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tiny_bundle import REFERENCE, a_bundle, a_calibration, a_reference

from dermaflow.bundles.bundle import LoadedBundle
from dermaflow.errors import DataError
from dermaflow.evaluation.challenge import Rule, judge
from dermaflow.evaluation.frozen import check_unseen, only_frozen
from dermaflow.schemas.bundle import OperatingPoint
from dermaflow.taxonomy import CODES

CALIBRATION = a_calibration().model_copy(
    update={
        "operating_points": [
            OperatingPoint(name="accuracy", tau=0.0), OperatingPoint(name="balanced", tau=0.0),
            OperatingPoint(name="melanoma_safe", tau=0.0, mel_threshold=0.1),
        ]
    }
)  # fmt: skip
BOTH = (CALIBRATION, CALIBRATION)


def predictions(right: float, seed: int = 0, lesions: int = 280, sure: float = 0.95) -> pd.DataFrame:
    """A model that is right in a share of the lesions, two images each, every class equally often."""
    rng = np.random.default_rng(seed)
    truth = np.repeat(np.arange(lesions) % 7, 2)
    called = np.where(np.repeat(rng.random(lesions) < right, 2), truth, (truth + 1) % 7)
    p = np.full((len(truth), 7), (1 - sure) / 6)
    p[np.arange(len(truth)), called] = sure
    columns = {f"p_{code}": p[:, k] for k, code in enumerate(CODES)}
    rows = np.arange(len(truth))
    return pd.DataFrame(
        {"image_id": [f"i{i}" for i in rows], "lesion_id": [f"l{i // 2}" for i in rows],
         "dx": [CODES[k] for k in truth], "sha256": [f"h{i}" for i in rows]} | columns
    )  # fmt: skip


def test_a_model_against_itself_and_a_better_one_hold_and_a_worse_one_does_not() -> None:
    champion = predictions(0.8)
    same = judge(champion, champion, BOTH, Rule(), resamples=200)
    assert same.holds and [(c.difference, c.low) for c in same.conditions] == [(0.0, 0.0)] * 3
    assert (same.images, same.lesions) == (560, 280)
    assert judge(champion, predictions(0.95, 1), BOTH, Rule(), resamples=200).holds
    worse = judge(champion, predictions(0.6, 1), BOTH, Rule(), resamples=200)
    assert not worse.holds and worse.conditions[0].low < -0.1
    assert judge(
        champion, predictions(0.6, 1), BOTH, Rule(**dict.fromkeys(Rule.model_fields, 1.0)), resamples=200
    ).holds


def test_a_challenger_that_loses_melanomas_is_refused_though_its_balanced_accuracy_is_better() -> None:
    champion, challenger = predictions(0.8), predictions(0.97, 1)
    rows = challenger.index[challenger["dx"] == "mel"][:20]
    challenger.loc[rows, [f"p_{code}" for code in CODES]] = np.eye(7)[CODES.index("nv")]
    found = judge(champion, challenger, BOTH, Rule(), resamples=200)
    assert [c.holds for c in found.conditions] == [True, False, True] and not found.holds


def test_a_challenger_that_calls_everything_melanoma_is_refused() -> None:
    shy = CALIBRATION.model_copy(
        update={"operating_points": [*CALIBRATION.operating_points[:2],
                                     OperatingPoint(name="melanoma_safe", tau=0.0, mel_threshold=0.001)]}
    )  # fmt: skip
    table = predictions(0.8)
    found = judge(table, table, (CALIBRATION, shy), Rule(), resamples=200)
    assert [c.holds for c in found.conditions] == [True, True, False]


def test_too_few_melanomas_do_not_hold_and_other_images_are_an_error() -> None:
    table = predictions(0.9, lesions=28)  # four lesions a class
    found = judge(table, table, BOTH, Rule(), resamples=50)
    assert found.conditions[1].low is None and not found.holds
    with pytest.raises(DataError, match="not the same images"):
        judge(table, table.iloc[1:], BOTH, Rule(), resamples=50)
    assert all("must be above -0.0" in sentence for sentence in Rule().in_words())


def test_the_frozen_test_is_whole_or_an_error() -> None:
    table = predictions(0.8, lesions=14)
    frozen = table[["image_id", "lesion_id", "dx", "sha256"]].iloc[:10]
    assert only_frozen(table, frozen)["image_id"].tolist() == frozen["image_id"].tolist()
    changed = table.assign(sha256=["other", *table["sha256"].iloc[1:]])
    with pytest.raises(DataError, match="1 of 10 images of the frozen test are gone or changed, first i0"):
        only_frozen(changed, frozen)


def test_who_learnt_from_the_frozen_test_is_not_measured_on_it(tmp_path: Path) -> None:
    model = LoadedBundle(a_bundle(data_hash="d1"), {}, REFERENCE, "", "s")
    frozen = pd.DataFrame({"lesion_id": ["lesion3", "other"]})
    check_unseen(model, frozen, {"d0", "d1"})
    with pytest.raises(DataError, match="1 lesions of the frozen test were trained on"):
        check_unseen(model, frozen, {"d0"})
    check_unseen(model, frozen.iloc[1:], {"d0"})  # from elsewhere, and its reference names what it learnt from
    with pytest.raises(DataError, match="nobody can tell"):
        check_unseen(replace(model, reference=a_reference(0)), frozen.iloc[1:], {"d0"})
