"""Each method is held against data that was made so that the right answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from dermaflow.errors import DataError
from dermaflow.schemas.bundle import Calibration
from dermaflow.taxonomy import INDEX, MELANOMA
from dermaflow.trust.calibrate import calibrate
from dermaflow.trust.conformal import conformal_sets, fit_conformal
from dermaflow.trust.decision import decide
from dermaflow.trust.ood import make_reference
from dermaflow.trust.temperature import (
    calibrated_probabilities,
    fit_scaling,
    fit_temperature,
    fit_temperature_and_bias,
    scale,
)
from dermaflow.trust.thresholds import (
    MAX_MELANOMA_THRESHOLD,
    entropy,
    fit_entropy_threshold,
    fit_malignant_threshold,
    fit_operating_points,
)

HAM_PRIORS = np.array([327, 514, 1099, 115, 1113, 6705, 142]) / 10015
NO_BIAS = np.zeros(7)


def drawn_from(p: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One label a row, drawn with that row's probabilities."""
    return (p.cumsum(axis=1) < rng.random((len(p), 1))).sum(axis=1).clip(max=6)


def exact_model(images: int, rng: np.random.Generator, signal: float = 2.5) -> tuple[np.ndarray, np.ndarray]:
    """Logits whose softmax is the true posterior of HAM10000's classes, and the labels."""
    labels = rng.choice(7, size=images, p=HAM_PRIORS)
    evidence = rng.normal(size=(images, 7)) + signal * np.eye(7)[labels]
    return signal * evidence + np.log(HAM_PRIORS), labels


# --- temperature and bias


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_a_known_temperature_is_recovered(temperature: float) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=3.0, size=(6000, 7))
    labels = drawn_from(scale(logits, temperature, NO_BIAS), rng)
    assert fit_temperature(logits, labels) == pytest.approx(temperature, rel=0.07)
    found, bias = fit_scaling(logits, labels, np.arange(6000), seed=0)
    assert found == pytest.approx(temperature, rel=0.07)
    assert not bias.any()  # nothing to correct, so nothing is


def test_the_bias_recovers_a_known_prior_shift() -> None:
    rng = np.random.default_rng(1)
    logits, labels = exact_model(6000, rng)
    balanced = (logits - np.log(HAM_PRIORS)) * 1.6  # as if trained on balanced classes, and too sure of itself
    temperature, bias = fit_scaling(balanced, labels, np.arange(6000), seed=0)
    shift = np.log(HAM_PRIORS) - np.log(HAM_PRIORS).mean()
    assert temperature == pytest.approx(1.6, rel=0.08)
    np.testing.assert_allclose(bias, shift, atol=0.3)
    frequencies = np.bincount(labels, minlength=7) / len(labels)
    np.testing.assert_allclose(scale(balanced, temperature, bias).mean(axis=0), frequencies, atol=0.005)
    assert abs(scale(balanced, fit_temperature(balanced, labels), NO_BIAS).mean(axis=0) - frequencies).max() > 0.05


def test_the_bias_is_judged_on_lesions_it_has_not_seen() -> None:
    """Copies of an image in fit and judgement would let the bias learn the sample's own class counts."""
    kept = 0
    for seed in range(10):
        rng = np.random.default_rng(seed)
        logits = rng.normal(size=(30, 7))
        labels = drawn_from(scale(logits, 1.0, NO_BIAS), rng)
        repeated = np.repeat(np.arange(30), 20)
        kept += fit_scaling(logits[repeated], labels[repeated], repeated, seed=0)[1].any()
    assert kept <= 3


def test_separable_data_gives_finite_parameters() -> None:
    labels = np.arange(70) % 7
    temperature, bias = fit_temperature_and_bias(10.0 * np.eye(7)[labels], labels)
    assert 0.01 < temperature < 10
    assert np.isfinite(bias).all()
    assert fit_scaling(np.eye(7)[:3], np.arange(3), np.arange(3), seed=0)[0] > 0  # fewer lesions than folds


# --- conformal sets


def test_every_class_is_covered_and_a_single_quantile_misses_the_rare() -> None:
    rng = np.random.default_rng(2)
    logits, labels = exact_model(8000, rng, signal=1.8)
    p = scale(logits, 1.0, NO_BIAS)
    fresh_logits, fresh = exact_model(40000, rng, signal=1.8)
    fresh_p = scale(fresh_logits, 1.0, NO_BIAS)
    quantiles = fit_conformal(p, labels, np.arange(8000))
    sets = conformal_sets(fresh_p, quantiles)
    for k in range(7):
        n, m = (labels == k).sum(), (fresh == k).sum()
        tolerance = 4 * np.sqrt(0.1 * 0.9 * (1 / n + 1 / m))
        assert (1 - fresh_p[fresh == k, k] <= quantiles[k]).mean() == pytest.approx(0.9, abs=tolerance), k
        assert sets[fresh == k, k].mean() > 0.9 - tolerance, k  # nevi are the most probable class more often than that
    one_for_all = np.full(7, np.quantile(1 - p[np.arange(8000), labels], 0.9))
    assert conformal_sets(fresh_p, one_for_all)[fresh == INDEX["df"], INDEX["df"]].mean() < 0.5


@pytest.mark.parametrize(("lesions", "alpha", "rank"), [(9, 0.10, 9), (19, 0.10, 18), (100, 0.10, 91), (19, 0.05, 19)])
def test_one_image_a_lesion_gives_the_textbook_quantile(lesions: int, alpha: float, rank: int) -> None:
    scores = np.random.default_rng(3).permutation(np.linspace(0.01, 0.8, lesions))
    p = np.column_stack([1 - scores, scores])
    quantiles = fit_conformal(p, np.zeros(lesions, dtype=int), np.arange(lesions), alpha)
    assert quantiles[0] == pytest.approx(np.sort(scores)[rank - 1])


@pytest.mark.parametrize("images", [2, 3, 7])
def test_equal_images_of_a_lesion_count_once(images: int) -> None:
    scores = np.linspace(0.01, 0.8, 9)[np.repeat(np.arange(9), images)]
    p = np.column_stack([1 - scores, scores])
    found = fit_conformal(p, np.zeros(len(p), dtype=int), np.repeat(np.arange(9), images))
    assert found[0] == pytest.approx(0.8)  # as with one image a lesion: the ninth of nine


def test_too_few_lesions_put_the_class_into_every_set() -> None:
    p = np.tile([0.9, 0.1], (80, 1))
    labels, eight = np.zeros(80, dtype=int), np.arange(80) % 8  # 80 images, but only 8 lesions
    quantiles = fit_conformal(p, labels, eight)
    np.testing.assert_array_equal(quantiles, [1.0, 1.0])
    assert conformal_sets(np.array([[0.0, 1.0], [1.0, 0.0]]), quantiles).all()


def test_lesions_with_many_images_do_not_outvote_the_others() -> None:
    """Half of the lesions are easy and have 20 images, half are hard and have one: counting images forgets the hard."""
    rng = np.random.default_rng(4)
    covered, naive = [], []
    for _ in range(200):
        hard = np.arange(41) % 2 == 1
        score = np.where(hard, rng.uniform(0.5, 1.0, 41), rng.uniform(0.0, 0.2, 41))
        new, lesion = score[rng.integers(41)], np.repeat(np.arange(41), np.where(hard, 1, 20))
        p = np.column_stack([1 - score[lesion], score[lesion]])
        fresh_hard = rng.random() < 0.5
        new = rng.uniform(0.5, 1.0) if fresh_hard else rng.uniform(0.0, 0.2)
        covered.append(new <= fit_conformal(p, np.zeros(len(p), dtype=int), lesion)[0])
        naive.append(new <= np.quantile(score[lesion], 0.9))
    assert np.mean(covered) > 0.85
    assert np.mean(naive) < 0.7


def test_no_set_is_empty() -> None:
    p = np.full((4, 7), 1 / 7)
    p[:, 2] += 1e-6
    sets = conformal_sets(p, np.zeros(7))
    np.testing.assert_array_equal(sets, np.tile(np.arange(7) == 2, (4, 1)))


# --- operating points


def melanoma_problem(rng: np.random.Generator, scale_: float) -> tuple[np.ndarray, np.ndarray]:
    """300 melanomas with p_mel spread over (0, scale], 700 nevi."""
    labels = np.repeat([MELANOMA, INDEX["nv"]], [300, 700])
    p = np.zeros((1000, 7))
    p[:, MELANOMA] = np.where(labels == MELANOMA, scale_ * rng.random(1000), 0.01)
    p[:, INDEX["nv"]] = 1 - p[:, MELANOMA]
    return p, labels


def frequencies(labels: np.ndarray) -> list[float]:
    return (np.bincount(labels, minlength=7) / len(labels)).tolist()


def test_the_melanoma_threshold_is_on_the_safe_side() -> None:
    safe, tight = 0, []
    for seed in range(20):
        p, labels = melanoma_problem(np.random.default_rng(seed), 1.0)
        threshold, points = fit_operating_points(p, labels, np.arange(1000), frequencies(labels), seed)
        mel = p[labels == MELANOMA, MELANOMA]
        assert (mel >= threshold).mean() >= 0.95
        named = decide(p, points[2], frequencies(labels))[labels == MELANOMA] == MELANOMA
        assert named.mean() >= 0.95
        safe += threshold <= 0.05  # the true 5 % quantile: fresh melanomas are found with 95 % sensitivity
        tight.append(threshold)
    assert safe >= 13  # without the margin it would be about half
    assert np.mean(tight) > 0.03  # and it is not bought with a threshold of zero


def test_the_melanoma_threshold_is_capped() -> None:
    p, labels = melanoma_problem(np.random.default_rng(0), 0.05)
    p[labels == MELANOMA, MELANOMA] += 0.9  # every melanoma is obvious: any threshold up to 0.9 would do
    threshold, points = fit_operating_points(p, labels, np.arange(1000), frequencies(labels), 0)
    assert threshold == points[2].mel_threshold == MAX_MELANOMA_THRESHOLD
    nevi = np.full(40, INDEX["nv"])
    assert fit_operating_points(p[-40:], nevi, np.arange(40), frequencies(nevi), 0)[0] == MAX_MELANOMA_THRESHOLD


def test_the_malignant_threshold_keeps_its_sensitivity_without_a_limit() -> None:
    safe = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        labels = rng.choice([MELANOMA, INDEX["bcc"], INDEX["akiec"], INDEX["nv"]], size=1000)
        p = np.zeros((1000, 7))
        malignant = labels != INDEX["nv"]
        p[:, INDEX["bcc"]] = p[:, MELANOMA] = np.where(malignant, 0.2 + 0.3 * rng.random(1000), 0.01)
        p[:, INDEX["nv"]] = 1 - p.sum(axis=1)
        threshold = fit_malignant_threshold(p, labels, np.arange(1000), seed)
        assert (p[malignant][:, [MELANOMA, INDEX["bcc"]]].sum(axis=1) >= threshold).mean() >= 0.95
        assert threshold > 0.4  # p_malignant is at least that for every malignant image: no cap at 0.10
        safe += threshold <= 0.43  # the true 5 % quantile
    assert safe >= 13
    nevi = np.full(40, INDEX["nv"])
    assert fit_malignant_threshold(p[:40], nevi, np.arange(40), 0) == MAX_MELANOMA_THRESHOLD


def test_entropy_is_in_nats_and_its_threshold_a_quantile() -> None:
    p = np.vstack([np.eye(7), np.full((1, 7), 1 / 7)])
    np.testing.assert_allclose(entropy(p), [0] * 7 + [np.log(7)], atol=1e-12)
    spread = np.array([[1 - 6 * x] + [x] * 6 for x in np.linspace(0, 1 / 7, 101)])
    assert (entropy(spread) > fit_entropy_threshold(spread)).sum() == 5


def test_bootstrap_counts_lesions_not_images() -> None:
    """Thirty images of each melanoma do not make its threshold more certain."""
    p, labels = melanoma_problem(np.random.default_rng(5), 1.0)
    p, labels = p[270:330], labels[270:330]  # 30 melanomas, 30 nevi
    alone = fit_operating_points(p, labels, np.arange(60), frequencies(labels), 0)[0]
    many = np.repeat(np.arange(60), 30)
    as_lesions = fit_operating_points(p[many], labels[many], many, frequencies(labels), 0)[0]
    as_images = fit_operating_points(p[many], labels[many], np.arange(1800), frequencies(labels), 0)[0]
    assert as_lesions == alone
    assert as_images > alone


def test_the_balanced_point_is_the_bayes_rule_for_balanced_accuracy() -> None:
    """With exact probabilities p / prior is optimal, that is tau = 1."""
    logits, labels = exact_model(8000, np.random.default_rng(6), signal=1.2)
    p = scale(logits, 1.0, NO_BIAS)
    _, points = fit_operating_points(p, labels, np.arange(8000), frequencies(labels), seed=0)
    assert [point.name for point in points] == ["accuracy", "balanced", "melanoma_safe"]
    assert points[1].tau == pytest.approx(1.0, abs=0.25)

    def balanced_accuracy(point: int) -> float:
        hit = decide(p, points[point], frequencies(labels)) == labels
        return float(np.mean([hit[labels == k].mean() for k in range(7)]))

    def accuracy(point: int) -> float:
        return float((decide(p, points[point], frequencies(labels)) == labels).mean())

    assert balanced_accuracy(1) > balanced_accuracy(0) + 0.1
    assert accuracy(0) > accuracy(1)


def test_the_accuracy_point_lifts_rare_classes_as_far_as_accuracy_allows() -> None:
    """Balanced accuracy for free: on fresh images no accuracy is lost beyond chance, and more classes are found."""
    logits, labels = exact_model(6000, np.random.default_rng(6), signal=1.2)
    p = scale(logits, 1.0, NO_BIAS)
    fit, fresh = slice(1500), slice(1500, None)
    point = fit_operating_points(p[fit], labels[fit], np.arange(1500), frequencies(labels[fit]), seed=0)[1][0]
    assert 0 < point.tau <= 0.5
    chosen, plain = decide(p[fresh], point, frequencies(labels[fit])), p[fresh].argmax(1)
    difference = (chosen == labels[fresh]).astype(float) - (plain == labels[fresh])
    assert difference.mean() > -0.01

    def recalls(named: np.ndarray) -> float:
        return float(np.mean([(named == labels[fresh])[labels[fresh] == k].mean() for k in range(7)]))

    assert recalls(chosen) > recalls(plain) + 0.005


def test_the_accuracy_point_stays_where_lifting_costs_accuracy() -> None:
    """Rare lesions look exactly like common ones, only less probable: naming them is always the wrong bet."""
    labels = np.repeat([INDEX["nv"], INDEX["mel"]], [900, 100])
    p = np.tile(np.eye(7)[INDEX["nv"]] * 0.6 + np.eye(7)[INDEX["mel"]] * 0.4, (1000, 1))
    point = fit_operating_points(p, labels, np.arange(1000), frequencies(labels), seed=0)[1][0]
    assert (decide(p, point, frequencies(labels)) == INDEX["nv"]).all()


# --- all together


def test_calibrate_fits_everything_and_repeats_itself() -> None:
    rng = np.random.default_rng(11)
    logits, labels = exact_model(1500, rng)
    features = rng.normal(size=(1500, 16))
    names = [str(i) for i in range(40)]
    reference = make_reference(rng.normal(size=(40, 16)), names, names, ["nv"] * 40)
    lesions = np.array([f"HAM_{i // 2:07d}" for i in range(1500)])
    labels[1::2] = labels[::2]  # a lesion has one diagnosis
    logits[1::2] = logits[::2] + rng.normal(scale=0.3, size=(750, 7))
    calibration = calibrate(2.0 * logits, features, labels, lesions, reference=reference, seed=3)
    assert calibration.temperature == pytest.approx(2.0, rel=0.25)
    assert (calibration.images, calibration.lesions) == (1500, 750)
    assert sum(calibration.priors) == pytest.approx(1.0)
    assert calibration.ood is not None
    assert calibration == calibrate(2.0 * logits, features, labels, lesions, reference=reference, seed=3)
    again = Calibration.model_validate_json(calibration.model_dump_json())
    p = calibrated_probabilities(2.0 * logits, again)
    np.testing.assert_allclose(p.sum(axis=1), 1.0)
    np.testing.assert_allclose(p, scale(2.0 * logits, calibration.temperature, np.array(calibration.bias)))
    assert conformal_sets(p, np.array(again.conformal_quantiles))[np.arange(1500), labels].mean() >= 0.89


def test_calibrate_without_features_and_with_missing_classes() -> None:
    rng = np.random.default_rng(12)
    logits, labels = exact_model(300, rng)
    keep = np.isin(labels, [MELANOMA, INDEX["nv"]])
    calibration = calibrate(logits[keep], None, labels[keep], np.arange(keep.sum()))
    assert calibration.ood is None
    assert calibration.priors[INDEX["df"]] == 0.0
    assert calibration.conformal_quantiles[INDEX["df"]] == 1.0
    assert np.isfinite(calibrated_probabilities(logits, calibration)).all()


def test_a_diverged_network_and_an_empty_split_are_named() -> None:
    logits = np.zeros((10, 7))
    logits[3, 2] = np.nan
    with pytest.raises(DataError, match=r"not finite.*Train again with a lower learning rate"):
        calibrate(logits, None, np.zeros(10, dtype=int), np.arange(10))
    with pytest.raises(DataError, match="calibration split holds no image"):
        calibrate(np.zeros((0, 7)), None, np.zeros(0, dtype=int), np.arange(0))
