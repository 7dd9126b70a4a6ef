"""The safety policy: what flags, and that fitting keeps the budget on lesions it has not seen."""

from __future__ import annotations

import numpy as np
import pytest
from test_trust import exact_model

from dermaflow.schemas.bundle import SafetyPolicy
from dermaflow.taxonomy import INDEX, MALIGNANT, MELANOMA
from dermaflow.trust.conformal import conformal_sets, fit_conformal
from dermaflow.trust.policy import MAX_FLAGGED, fit_policy, flag
from dermaflow.trust.temperature import scale

MALIGNANT_CLASSES = np.array(MALIGNANT)


def row(**p: float) -> np.ndarray:
    found = np.zeros(7)
    for code, value in p.items():
        found[INDEX[code]] = value
    return found


P = np.array([row(nv=0.9, bkl=0.1), row(nv=0.85, mel=0.15), row(nv=0.7, bcc=0.2, akiec=0.1), row(mel=0.6, nv=0.4)])
NO_SETS = np.zeros((4, 7), dtype=bool)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (SafetyPolicy(), [False, False, False, True]),
        (SafetyPolicy(mel_threshold=0.15), [False, True, False, True]),
        (SafetyPolicy(mel_threshold=0.16), [False, False, False, True]),
        (SafetyPolicy(malignant_threshold=0.2), [False, False, True, True]),
        (SafetyPolicy(mel_threshold=0.1, malignant_threshold=0.2), [False, True, True, True]),
    ],
)
def test_each_trigger_flags_what_it_says(policy: SafetyPolicy, expected: list[bool]) -> None:
    assert flag(P, NO_SETS, policy).tolist() == expected


def test_the_set_flags_by_its_malignant_classes_only() -> None:
    sets = NO_SETS.copy()
    sets[0, INDEX["bkl"]] = sets[1, INDEX["akiec"]] = True
    assert flag(P, sets, SafetyPolicy(use_set=True)).tolist() == [False, True, False, True]
    assert flag(P, sets, SafetyPolicy()).tolist() == [False, False, False, True]


def images(seed: int, lesions: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities, labels and lesions: a third of the lesions has two images."""
    rng = np.random.default_rng(seed)
    logits, labels = exact_model(lesions, rng, signal=1.5)
    owner = np.concatenate([np.arange(lesions), rng.choice(lesions, lesions // 3, replace=False)])
    return scale(logits[owner] + 0.5 * rng.normal(size=(len(owner), 7)), 1.0, np.zeros(7)), labels[owner], owner


def by_lesion(mask: np.ndarray, labels: np.ndarray, lesions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    names, first = np.unique(lesions, return_index=True)
    flagged = np.array([mask[lesions == name].any() for name in names])
    return flagged, labels[first]


def test_the_budget_holds_on_fresh_lesions_and_melanomas_are_found() -> None:
    flagged_share, kept, dismissed, by_argmax = [], 0, 0, 0
    for seed in range(6):
        p, labels, lesions = images(seed, 1200)
        quantiles = fit_conformal(p, labels, lesions)
        policy = fit_policy(p, labels, lesions, quantiles, seed)
        fresh, truth, owner = images(100 + seed, 1500)
        flagged, of_lesion = by_lesion(flag(fresh, conformal_sets(fresh, quantiles), policy), truth, owner)
        plain, _ = by_lesion(flag(fresh, conformal_sets(fresh, quantiles), SafetyPolicy()), truth, owner)
        benign = ~MALIGNANT_CLASSES[of_lesion]
        flagged_share.append(flagged[benign].mean())
        kept += flagged[benign].mean() <= MAX_FLAGGED
        dismissed += (~flagged & (of_lesion == MELANOMA)).sum()
        by_argmax += (~plain & (of_lesion == MELANOMA)).sum()
    assert kept >= 5
    assert np.mean(flagged_share) > MAX_FLAGGED - 0.04  # what may be spent is spent
    assert dismissed < by_argmax / 2


def test_the_policy_is_never_worse_than_each_threshold_alone_where_it_was_fitted() -> None:
    p, labels, lesions = images(3, 1000)
    quantiles = fit_conformal(p, labels, lesions)
    policy = fit_policy(p, labels, lesions, quantiles, 0)
    sets = conformal_sets(p, quantiles)
    flagged, truth = by_lesion(flag(p, sets, policy), labels, lesions)
    missed = (~flagged & (truth == MELANOMA)).sum()
    for trigger in ("mel_threshold", "malignant_threshold"):
        for threshold in np.linspace(0.01, 0.9, 60):
            alone, _ = by_lesion(flag(p, sets, SafetyPolicy(**{trigger: threshold})), labels, lesions)
            if alone[~MALIGNANT_CLASSES[truth]].mean() <= flagged[~MALIGNANT_CLASSES[truth]].mean():
                assert missed <= (~alone & (truth == MELANOMA)).sum()


def test_nothing_to_learn_from_leaves_every_trigger_off() -> None:
    p, _, lesions = images(0, 50)
    for label in ("nv", "mel"):
        labels = np.full(len(p), INDEX[label])
        assert fit_policy(p, labels, lesions, np.full(7, 0.5), 0) == SafetyPolicy()
