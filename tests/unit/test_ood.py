"""Distance from the training images, and the nearest lesions, against features whose answers are known."""

from __future__ import annotations

import numpy as np
import pytest

from dermaflow.errors import DataError
from dermaflow.schemas.bundle import Reference
from dermaflow.trust.ood import fit_ood, make_reference, nearest_lesions, ood_score


def cone(images: int, axis: int, rng: np.random.Generator) -> np.ndarray:
    """Features around one axis of a 32-dimensional space, of length about 2 to 4."""
    directions = np.eye(32)[axis] + 0.05 * rng.normal(size=(images, 32))
    return directions * rng.uniform(2.0, 4.0, size=(images, 1))


def reference(features: np.ndarray, images_a_lesion: int = 1) -> Reference:
    rows = range(len(features))
    return make_reference(
        features, [f"i{i}" for i in rows], [f"l{i // images_a_lesion}" for i in rows], ["mel", "nv"] * len(rows)
    )


def test_far_features_stand_out_and_near_ones_do_not() -> None:
    rng = np.random.default_rng(7)
    known = reference(cone(800, 0, rng))
    assert known.features.dtype == np.float16
    np.testing.assert_allclose(np.linalg.norm(known.features.astype(float), axis=1), 1.0, atol=2e-3)
    spec = fit_ood(cone(2000, 0, rng), known, quantile=0.95)
    assert spec.quantile == 0.95
    assert (ood_score(cone(300, 1, rng), known) > spec.threshold).all()
    assert (ood_score(cone(2000, 0, rng), known) > spec.threshold).mean() == pytest.approx(0.05, abs=0.02)


def test_the_threshold_is_that_of_unseen_lesions() -> None:
    """Training images lie nearer to their own mean than a lesion the network has not seen; only the latter count."""
    rng = np.random.default_rng(9)
    known, fresh = cone(200, 0, rng), cone(400, 0, rng) + 0.1 * rng.normal(size=(400, 32))
    within = np.quantile(ood_score(known, reference(known)), 0.98)
    spec = fit_ood(fresh, reference(known), quantile=0.98)
    assert spec.threshold > 1.1 * within
    assert (ood_score(fresh, reference(known)) > spec.threshold).mean() == pytest.approx(0.02, abs=0.003)


def test_the_distance_is_that_of_mahalanobis() -> None:
    rng = np.random.default_rng(8)
    mixing = rng.normal(size=(8, 8))
    features, queries = rng.normal(size=(60000, 8)) @ mixing + 3, 3 * rng.normal(size=(9, 8))
    inverse = np.linalg.inv(mixing.T @ mixing)
    expected = np.sqrt(np.einsum("ij,jk,ik->i", queries - 3, inverse, queries - 3) / 8)
    np.testing.assert_allclose(ood_score(queries, reference(features)), expected, rtol=0.05)
    assert np.mean(ood_score(features, reference(features)) ** 2) == pytest.approx(1, rel=0.01)


def test_a_direction_that_never_varied_counts_most() -> None:
    """What no training image ever did is unusual, however small it is beside what they all do."""
    rng = np.random.default_rng(3)
    spread = np.array([30.0, 20.0, 10.0, 8.0, 5.0, 3.0, 2.0, 0.01])
    known = reference(rng.normal(size=(5000, 8)) * spread)
    spec = fit_ood(rng.normal(size=(500, 8)) * spread, known)
    assert (ood_score(np.eye(8)[[7]] * 5, known) > spec.threshold).all()
    assert (ood_score(np.eye(8)[[0]] * 30, known) < spec.threshold).all()


def test_fewer_images_than_features_and_equal_images() -> None:
    rng = np.random.default_rng(0)
    assert np.isfinite(ood_score(cone(20, 0, rng), reference(cone(3, 0, rng)))).all()
    assert np.isfinite(ood_score(cone(20, 0, rng), reference(np.ones((3, 32))))).all()


def test_the_nearest_lesions_come_once_each_by_their_nearest_image() -> None:
    rng = np.random.default_rng(1)
    features = rng.normal(size=(40, 16))
    known, query = reference(features, images_a_lesion=4), features[13] + 0.01 * rng.normal(size=16)
    found = nearest_lesions(query, known, count=4)
    assert (found[0].image_id, found[0].lesion_id, found[0].dx) == ("i13", "l3", "nv")
    assert found[0].distance < 0.05
    assert len({neighbour.lesion_id for neighbour in found}) == 4
    unit = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (query, features)]
    by_lesion = np.linalg.norm(unit[1] - unit[0], axis=1).reshape(10, 4).min(axis=1)
    np.testing.assert_allclose([neighbour.distance for neighbour in found], np.sort(by_lesion)[:4], atol=5e-3)
    assert len(nearest_lesions(query, known, count=99)) == 10


def test_a_diverged_network_gives_no_reference() -> None:
    with pytest.raises(DataError, match="not finite"):
        reference(np.full((3, 4), np.nan))
    with pytest.raises(DataError, match="no features"):
        reference(np.zeros((0, 4)))
