"""Drift: what chance gives stays below the limits, what is different crosses them, and the sentences say which."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from tiny_bundle import a_bundle, a_calibration

from dermaflow.evaluation.arrivals import measure
from dermaflow.schemas.finding import Finding, findings_table
from dermaflow.taxonomy import CODES, INDEX, MALIGNANT
from dermaflow.trust.drift import (
    Limits,
    Measures,
    calibration_drift,
    distance_drift,
    drifted,
    mix_drift,
    reasons_to_train,
    stability_index,
)

HAM = np.array([0.0327, 0.0513, 0.1097, 0.0115, 0.1111, 0.6695, 0.0142])
LIMITS = Limits()


def drawn(rng: np.random.Generator, count: int, mix: np.ndarray = HAM) -> tuple[np.ndarray, np.ndarray]:
    """Calibrated probabilities and the truth drawn from them."""
    strength = rng.gamma(8 * np.eye(7)[rng.choice(7, count, p=mix / mix.sum())] + 0.5)
    p = strength / strength.sum(axis=1, keepdims=True)
    return p, (p.cumsum(axis=1) < rng.random((count, 1))).sum(axis=1).clip(0, 6)


def of(mix=None, distance=None, calibration=None, labelled: int = 0) -> Measures:  # type: ignore[no-untyped-def]
    return Measures(images=500, labelled_lesions=labelled, mix=mix, distance=distance, calibration=calibration)


def test_the_index_is_none_for_the_same_mix_and_known_for_a_worked_case() -> None:
    assert stability_index(HAM, 100 * HAM) == pytest.approx(0, abs=1e-12)
    # (0.6 - 0.5) ln(0.6 / 0.5) + (0.4 - 0.5) ln(0.4 / 0.5)
    assert stability_index(np.array([0.6, 0.4]), np.array([0.5, 0.5])) == pytest.approx(0.1 * np.log(1.2 / 0.8))
    assert np.isfinite(stability_index(np.array([1.0, 0]), np.array([0.0, 1])))


def test_images_of_the_same_kind_cross_no_limit() -> None:
    rng, crossed = np.random.default_rng(0), 0
    usual = drawn(rng, 4000)[0].mean(axis=0)
    for _ in range(200):
        p, truth = drawn(rng, 60)
        found = of(
            mix_drift(p, usual), distance_drift(rng.random(60) < 0.02, 0.02), calibration_drift(p, truth),
        )  # fmt: skip
        crossed += bool(drifted(found, LIMITS))
    assert crossed <= 5  # z beyond 3 alone comes once in 370


def test_spiegelhalters_z_is_standard_normal_for_a_calibrated_model_and_far_for_another() -> None:
    rng = np.random.default_rng(1)
    z = np.array([calibration_drift(*drawn(rng, 150)).z for _ in range(300)])
    assert abs(z.mean()) < 0.25 and 0.85 < z.std() < 1.15
    p, truth = drawn(rng, 300)
    sure = p**3 / (p**3).sum(axis=1, keepdims=True)  # an overconfident model of the same lesions
    assert calibration_drift(sure, truth).z > 3
    found = calibration_drift(p, truth)
    malignant = np.array(MALIGNANT)
    assert (found.malignant, found.expected) == (
        int(malignant[truth].sum()), pytest.approx(p[:, malignant].sum()),
    )  # fmt: skip


def test_each_limit_is_crossed_alone_and_says_so() -> None:
    other = np.array([0.05, 0.30, 0.10, 0.05, 0.30, 0.15, 0.05])
    p, _ = drawn(np.random.default_rng(2), 200, other)
    cases = {
        "mix of diagnoses": of(mix=mix_drift(p, HAM)),
        "pictures differ": of(distance=distance_drift(np.arange(100) < 25, 0.02)),
        "probabilities do not hold": of(
            calibration=calibration_drift(np.tile(HAM, (90, 1)), np.full(90, INDEX["mel"]))
        ),
    }
    for words, found in cases.items():
        said = drifted(found, LIMITS)
        assert len(said) == 1 and words in said[0]
        assert reasons_to_train(found, LIMITS) == []  # nothing new to learn from
        learnable = found.model_copy(update={"labelled_lesions": 20})
        assert reasons_to_train(learnable, LIMITS) == said
    assert drifted(of(distance=distance_drift(np.arange(20) < 15, 0.02)), LIMITS) == []  # too few to say anything


def test_new_lesions_alone_are_a_reason() -> None:
    assert reasons_to_train(of(labelled=99), LIMITS) == []
    assert reasons_to_train(of(labelled=100), LIMITS) == ["100 newly labelled lesions; the limit is 100."]


def test_findings_are_measured_by_lesion_and_outcomes_by_histology_only() -> None:
    def one(image: str, lesion: str, dx: str, **changes: object) -> Finding:
        p = {f"p_{code}": 0.9 if code == dx else 0.1 / 6 for code in CODES}
        return Finding(image_id=image, lesion_id=lesion, model="m", model_sha256="s",
                       **({"status": "ok", "prediction": dx} | p | changes))  # fmt: skip

    nothing: dict[str, object] = {f"p_{code}": None for code in CODES} | {"prediction": None}
    findings = findings_table(
        [
            one("1", "a", "mel"), one("2", "a", "nv"), one("3", "b", "nv"),
            one("4", "c", "nv", **nothing, status="not_assessable", ood=True),
            one("5", "d", "nv", **nothing, status="not_assessable", ood=True, quality_flags=["blur"]),
            one("6", "e", "nv", **nothing, status="failed"),
        ]
    ).to_pandas()  # fmt: skip
    labels = pd.DataFrame(
        {"image_id": ["1", "2", "3"], "lesion_id": ["a", "a", "b"], "dx": ["mel", "mel", "nv"],
         "dx_type": ["histo", "histo", "sign_off"]}
    )  # fmt: skip
    found = measure(findings, labels, a_bundle(a_calibration()))
    assert (found.images, found.labelled_lesions, found.mix.lesions) == (5, 2, 2)
    assert found.mix.shares["nv"] == pytest.approx((0.9 + (0.9 + 0.1 / 6) / 2) / 2)
    assert (found.distance.images, found.distance.share, found.distance.usual) == (4, 0.25, pytest.approx(0.02))
    assert (found.calibration.lesions, found.calibration.malignant) == (1, 1)
    empty = measure(findings.iloc[:0], labels.iloc[:0], a_bundle(a_calibration()))
    assert (empty.images, empty.mix, empty.distance, empty.calibration) == (0, None, None, None)
