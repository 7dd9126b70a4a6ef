"""Promotion on the agreed test: granted, refused by the margin, refused where the test cannot tell."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from ham_predictions import ham_like
from tiny_bundle import REFERENCE, a_bundle, a_calibration, save_tiny, some_weights

from dermaflow.bundles.bundle import LoadedBundle, save_bundle
from dermaflow.bundles.registry import Registry
from dermaflow.errors import RegistryError
from dermaflow.evaluation.paired import PairedDifference
from dermaflow.taxonomy import CODES
from flows.agreed import Rule, decide_on_test
from flows.promotion import Decision

P = [f"p_{code}" for code in CODES]
OLD = ham_like(images=500, lesions=400)


def better_by(hint: float) -> pd.DataFrame:
    """The champion's answers with some of the truth added."""
    p = OLD[P].to_numpy() + hint * np.eye(7)[[CODES.index(dx) for dx in OLD["dx"]]]
    return OLD.assign(**dict(zip(P, (p / p.sum(1, keepdims=True)).T, strict=True)))


def champion(folder: Path) -> str:
    """A registry with a champion; its place."""
    models = Registry(folder / "registry")
    models.promote(models.add(save_tiny(folder / "old", a_bundle(name="old"))).id, reason="first", by="a test")
    return str(folder / "registry")


def decide(folder: Path, registry: str, table: pd.DataFrame, margin: float = 0.0) -> Decision:
    model = str(save_tiny(folder / "new", a_bundle(name="new"), weight=1.0))
    rule = Rule(margin=margin, resamples=200)
    return decide_on_test(model, registry, table, lambda old: OLD, rule, by="a test")


def test_the_first_model_is_the_champion_and_remains_it(tmp_path: Path) -> None:
    first = decide(tmp_path, str(tmp_path / "registry"), OLD)
    assert (first.promoted, first.reason) == (True, "the first model of this registry")
    again = decide(tmp_path, str(tmp_path / "registry"), OLD)
    assert (again.promoted, again.reason) == (False, "it is the champion already")


def test_a_model_that_is_better_by_the_margin_is_promoted_and_the_history_says_why(tmp_path: Path) -> None:
    registry = champion(tmp_path)
    found = decide(tmp_path, registry, better_by(0.3), margin=0.02)
    assert found.promoted and Registry(registry).champion().id == found.version
    entry = Registry(registry).history()[-1]
    assert entry.reason == found.reason and entry.by == "a test"
    for said in ("balanced accuracy 0.", "95 % interval +0.", "champion old-", "above +0.020", "200 resamples"):
        assert said in found.reason


@pytest.mark.parametrize(("hint", "margin"), [(0.0, 0.0), (0.005, 0.0), (0.3, 0.5)])
def test_a_model_that_is_not_better_by_the_margin_is_added_only(tmp_path: Path, hint: float, margin: float) -> None:
    registry = champion(tmp_path)
    found = decide(tmp_path, registry, better_by(hint), margin)
    assert not found.promoted and "Rule: promoted if the lower end" in found.reason
    assert Registry(registry).champion().bundle.name == "old" and len(Registry(registry).list()) == 2


def test_a_model_that_is_not_worse_passes_where_the_margin_says_so(tmp_path: Path) -> None:
    assert decide(tmp_path, champion(tmp_path), OLD, margin=-0.01).promoted


def test_a_model_takes_no_place_that_another_one_took_meanwhile(tmp_path: Path) -> None:
    registry = Registry(champion(tmp_path))
    other = registry.add(save_tiny(tmp_path / "other", a_bundle(name="other"), weight=2.0)).id

    def while_another_is_promoted(old: LoadedBundle) -> pd.DataFrame:
        registry.promote(other, reason="it came first", by="another")
        return OLD

    model = str(save_tiny(tmp_path / "new", a_bundle(name="new"), weight=1.0))
    with pytest.raises(RegistryError, match=other):
        decide_on_test(model, registry.uri, better_by(0.3), while_another_is_promoted, Rule(resamples=200), by="a test")
    assert registry.champion().id == other


def test_a_champion_that_was_trained_on_the_test_is_not_compared(tmp_path: Path) -> None:
    lesions = (OLD["lesion_id"].iloc[0], *REFERENCE.lesion_ids[1:])
    named = replace(REFERENCE, lesion_ids=lesions)
    save_bundle(tmp_path / "old", a_bundle(a_calibration(), name="old"), some_weights(), named, "# Card\n")
    models = Registry(tmp_path / "registry")
    models.promote(models.add(tmp_path / "old").id, reason="first", by="a test")
    found = decide(tmp_path, str(tmp_path / "registry"), better_by(0.3))
    assert not found.promoted and "was trained on 1 of its lesions" in found.reason


def test_too_few_lesions_promote_nothing() -> None:
    few = PairedDifference(difference=0.4, low=None, high=None, n_lesions=4, champion=0.5, challenger=0.9)
    holds, said = Rule(margin=-1).judge(few)
    assert not holds and "too few lesions" in said
