"""Lesions stay whole, splits keep the mix, and what was assigned once stays where it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dermaflow.datasets.ham10000 import HIDDEN_DUPLICATES, read_ham10000
from dermaflow.datasets.synthetic.marginals import draw_lesions
from dermaflow.errors import DataError
from dermaflow.preparation.prepare import FRACTIONS, merge_identical
from dermaflow.preparation.splits import assign_lesions, lesion_table
from dermaflow.schemas.shard import SPLITS

DIAGNOSES = ("mel", "nv", "vasc")


def archive(rows: list[tuple[int, int, int]], dx_of: list[str], sites: list[str]) -> pd.DataFrame:
    """Images of lesions: number of the lesion, of the site, of the content (its hash)."""
    return pd.DataFrame(
        {
            "image_id": [f"i{n:03d}" for n in range(len(rows))],
            "lesion_id": [f"l{lesion:02d}" for lesion, _, _ in rows],
            "dx": [dx_of[lesion % len(dx_of)] for lesion, _, _ in rows],
            "site": [sites[site % len(sites)] for _, site, _ in rows],
            "sha256": [str(content) for _, _, content in rows],
        }
    )


def assigned(images: pd.DataFrame, seed: int, previous: pd.DataFrame | None = None) -> pd.DataFrame:
    """The images with the split and fold of their lesion, and the lesion they came with as ``published``."""
    merged = images.assign(
        published=images["lesion_id"], lesion_id=merge_identical(images["lesion_id"], images["sha256"], previous)
    )
    lesions = assign_lesions(lesion_table(merged), FRACTIONS, seed, previous=previous)
    return merged.merge(lesions[["lesion_id", "split", "fold"]], on="lesion_id", validate="many_to_one")


ARCHIVES = st.tuples(
    st.lists(st.tuples(st.integers(0, 25), st.integers(0, 3), st.integers(0, 40)), min_size=1, max_size=80),
    st.lists(st.sampled_from(DIAGNOSES), min_size=1, max_size=5),
)
SITES = ["a", "b", "c", "d"]


@settings(max_examples=60, deadline=None)
@given(ARCHIVES, st.integers(0, 2**32 - 1))
@example(([(3, 0, 1), (1, 1, 1), (1, 0, 2), (2, 0, 2), (2, 0, 3), (0, 0, 3)], ["mel"]), 0)  # a chain of equal images
def test_no_lesion_and_no_image_stands_on_both_sides(
    drawn: tuple[list[tuple[int, int, int]], list[str]], seed: int
) -> None:
    images = archive(*drawn, SITES)
    found = assigned(images, seed)
    assert len(found) == len(images) and set(found["split"]) <= set(SPLITS)
    for together in ("published", "sha256", "lesion_id"):
        assert (found.groupby(together)[["split", "fold"]].nunique() == 1).all(axis=None)
    assert ((found["fold"] == -1) == (found["split"] == "test")).all() and found["fold"].max() < 5


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(DIAGNOSES), st.sampled_from(SITES), st.integers(1, 6)), max_size=60),
    st.integers(0, 2**32 - 1),
)
def test_a_diagnosis_of_three_lesions_stands_in_every_split(rows: list[tuple[str, str, int]], seed: int) -> None:
    lesions = pd.DataFrame(rows, columns=["dx", "site", "images"])
    lesions.insert(0, "lesion_id", [f"l{n}" for n in range(len(rows))])
    found = assign_lesions(lesions, FRACTIONS, seed)
    for _, of_one in found.groupby("dx"):
        assert of_one["split"].nunique() == min(3, len(of_one))
        inside = of_one[of_one["split"] != "test"]
        assert inside["fold"].nunique() == min(5, len(inside))


@settings(max_examples=50, deadline=None)
@given(ARCHIVES, ARCHIVES, st.integers(0, 2**32 - 1))
def test_a_test_image_stays_one_when_images_are_added(
    old: tuple[list[tuple[int, int, int]], list[str]], new: tuple[list[tuple[int, int, int]], list[str]], seed: int
) -> None:
    """Also when a new image shows that two lesions are one, and when the id of the merged lesion is smaller."""
    images = archive(old[0], ["mel"], SITES)
    before = assigned(images, seed)
    more = archive(new[0], ["mel"], SITES)
    more["image_id"] = "n" + more["image_id"]
    previous = before[["lesion_id", "split", "fold"]].drop_duplicates()
    after = assigned(pd.concat([images, more], ignore_index=True), seed, previous)
    was, now = (frame.set_index("image_id")["split"] for frame in (before, after))
    assert (now[was.index[was == "test"]] == "test").all()
    alone = after.groupby("lesion_id")["published"].nunique() == 1  # lesions that nothing was merged into
    kept = after[after["lesion_id"].map(alone) & after["lesion_id"].isin(before["lesion_id"])]
    assert set(kept["published"]) <= set(before["published"])
    shared = was.index.intersection(kept["image_id"])
    assert (now[shared] == was[shared]).all()


def test_hidden_duplicates_stand_together(tmp_path: Path) -> None:
    ids = [image for pair in HIDDEN_DUPLICATES for image in pair] + [f"ISIC_9{n:06d}" for n in range(60)]
    table = pd.DataFrame({"image_id": ids, "lesion_id": [f"HAM_{n:04d}" for n in range(len(ids))], "dx": "mel"})
    table.to_csv(tmp_path / "HAM10000_metadata.csv", index=False)
    for image in ids:
        (tmp_path / f"{image}.jpg").touch()
    images = read_ham10000(tmp_path).images
    for seed in range(5):
        lesions = assign_lesions(lesion_table(images), FRACTIONS, seed)
        place = images.merge(lesions, on="lesion_id").set_index("image_id")[["split", "fold"]].apply(tuple, axis=1)
        assert all(place[a] == place[b] for a, b in HIDDEN_DUPLICATES)
        assert place.nunique() > 6  # test and the folds of both others: not all in one place


@pytest.fixture(scope="module")
def ham() -> pd.DataFrame:
    """Lesions with the classes, sites and numbers of images of HAM10000."""
    drawn = draw_lesions(np.random.default_rng(1), 3000)
    rows = [(f"HAM_{lesion.number:07d}", lesion.dx, lesion.site, lesion.images) for lesion in drawn]
    return pd.DataFrame(rows, columns=["lesion_id", "dx", "site", "images"])


def test_splits_and_folds_have_the_mix_of_the_whole(ham: pd.DataFrame) -> None:
    found = assign_lesions(ham, FRACTIONS, 0)
    largest = ham["images"].max()
    for strata, allowed in ((["dx"], largest), (["dx", "site"], 2 * largest)):
        for _, of_one in found.groupby(strata):
            counts = of_one.groupby("split")["images"].sum().reindex(list(FRACTIONS), fill_value=0)
            for split, share in FRACTIONS.items():
                assert abs(counts[split] - share * of_one["images"].sum()) <= allowed, (strata, split)
    inside = found[found["split"] != "test"]
    for _, of_one in inside.groupby("dx"):
        counts = of_one.groupby("fold")["images"].sum()
        assert list(counts.index) == [0, 1, 2, 3, 4]
        assert (counts - of_one["images"].sum() / 5).abs().max() <= largest


def test_the_seed_decides_and_the_order_of_the_rows_does_not(ham: pd.DataFrame) -> None:
    found = assign_lesions(ham, FRACTIONS, 0)
    shuffled = assign_lesions(ham.sample(frac=1, random_state=0), FRACTIONS, 0)
    pd.testing.assert_frame_equal(shuffled.sort_index(), found)
    other = assign_lesions(ham, FRACTIONS, 1)
    assert (other["split"] != found["split"]).mean() > 0.3
    assert (other["fold"] != found["fold"]).mean() > 0.3


def test_new_lesions_move_no_old_one_and_even_out_the_shares(ham: pd.DataFrame) -> None:
    """Nor do lesions that go away, which would change the turn of those that stay."""
    before = assign_lesions(ham[ham["dx"] != "mel"], FRACTIONS, 0)
    now = ham.iloc[::2]
    after = assign_lesions(now, FRACTIONS, 0, previous=before)
    both = before.merge(after, on="lesion_id", suffixes=("_before", "_after"))
    assert len(both) > 1000
    assert (both["split_before"] == both["split_after"]).all() and (both["fold_before"] == both["fold_after"]).all()
    assert not after["split"].equals(assign_lesions(now, FRACTIONS, 0)["split"])  # otherwise this test shows nothing
    new = after[after["dx"] == "mel"]
    for split, share in FRACTIONS.items():
        assert abs(new[new["split"] == split]["images"].sum() - share * new["images"].sum()) <= ham["images"].max()


@pytest.mark.parametrize(
    "fractions",
    [
        {"train": 0.6, "calibration": 0.2, "test": 0.3},
        {"train": 0.6, "calibration": 0.2, "test": 0.1},
        {"train": 0.8, "calibration": 0.0, "test": 0.2},
        {"train": 1.2, "calibration": -0.4, "test": 0.2},
        {"train": float("nan"), "calibration": 0.2, "test": 0.2},
        {},
    ],
)
def test_impossible_fractions(ham: pd.DataFrame, fractions: dict[str, float]) -> None:
    with pytest.raises(DataError, match="expected positive fractions that sum to 1"):
        assign_lesions(ham, fractions, 0)


@pytest.mark.parametrize("folds", [-1, 0, 1])
def test_too_few_folds(ham: pd.DataFrame, folds: int) -> None:
    with pytest.raises(DataError, match=f"{folds} folds; expected 2 or more"):
        assign_lesions(ham, FRACTIONS, 0, folds=folds)
