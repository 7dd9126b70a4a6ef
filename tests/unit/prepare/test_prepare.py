"""Preparing: bytes as received, only the missing work, and the same folder from the same data."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from tiny_data import (
    METADATA,
    add_image,
    content,
    encode,
    image_files,
    metadata,
    noise,
    prepare_here,
    rows_of,
    snapshot,
)

from dermaflow import storage
from dermaflow.datasets.ham10000 import HIDDEN_DUPLICATES
from dermaflow.errors import ShardError
from dermaflow.preparation import layout
from dermaflow.preparation.layout import read_lesions, read_manifest
from dermaflow.preparation.reading import ShardFolder
from dermaflow.schemas.shard import QUARANTINE_NAME, SHARD_SCHEMA, SPLITS

# --- what is written -----------------------------------------------------------------------------------------------


def test_rows_hold_the_bytes_as_received_and_the_metadata(data: Path, out: Path) -> None:
    prepare_here(data, out)
    rows = rows_of(out)
    files, table = image_files(data), metadata(data).set_index("image_id")
    assert list(rows["image_id"]) == sorted(files)
    for row in rows.itertuples():
        assert row.image == files[row.image_id].read_bytes()
        assert row.sha256 == storage.sha256(row.image)
        assert (row.width, row.height) == (64, 48)
        source = table.loc[row.image_id]
        assert [row.lesion_id, row.dx, row.dx_type, row.sex, row.localization, row.site] == [
            source[column] for column in ("lesion_id", "dx", "dx_type", "sex", "localization", "dataset")
        ]
        assert np.isnan(row.age) if pd.isna(source["age"]) else row.age == float(source["age"])


def test_manifest_lesions_and_shards_agree(data: Path, out: Path) -> None:
    done = prepare_here(data, out)
    assert (done.inspected, done.written) == (120, len(done.manifest.shards)) and done.written > 5
    assert read_manifest(out) == done.manifest
    rows, lesions, folder = rows_of(out), read_lesions(out), ShardFolder(out)
    for shard in done.manifest.shards:
        file = pq.ParquetFile(out / shard.path)
        assert file.schema_arrow.equals(SHARD_SCHEMA)
        assert (file.metadata.num_rows, (out / shard.path).stat().st_size) == (shard.rows, shard.bytes)
        assert set(file.read(["split"])["split"].to_pylist()) == {shard.split}
    assert rows.groupby("lesion_id")["split"].nunique().max() == 1
    for split in SPLITS:
        of_one = rows[rows["split"] == split]
        assert done.manifest.counts[split] == of_one["dx"].value_counts().to_dict()
        assert done.manifest.lesions[split] == of_one["lesion_id"].nunique()
        found = folder.metadata(split)
        assert set(found["image_id"]) == set(of_one["image_id"])
        assert (found["fold"] == -1).all() if split == "test" else found["fold"].between(0, 4).all()
        assert dict(folder.images(split)) == dict(zip(of_one["image_id"], of_one["image"], strict=True))
        wanted = set(of_one["image_id"].iloc[:2])
        assert {image_id for image_id, _ in folder.images(split, wanted)} == wanted
        assert [image_id for image_id, _ in folder.images(split)] == list(found["image_id"])
    pd.testing.assert_series_equal(
        lesions.set_index("lesion_id")["images"], rows.groupby("lesion_id").size(), check_names=False
    )


def test_the_same_data_gives_the_same_folder_anywhere(data: Path, out: Path, tmp_path: Path) -> None:
    first = prepare_here(data, out).manifest
    moved = tmp_path / "elsewhere" / "HAM"
    moved.parent.mkdir()
    data.rename(moved)
    for file in image_files(moved).values():
        os.utime(file, (0, 0))
    other = tmp_path / "other"
    assert prepare_here(moved, other).manifest == first
    assert content(other) == content(out)
    assert prepare_here(moved, tmp_path / "third", seed=1).manifest.data_hash != first.data_hash


def test_a_relative_place_is_meant_from_here(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    prepare_here(Path("data"), "relative/shards")
    assert ShardFolder(tmp_path / "relative" / "shards").manifest == ShardFolder("relative/shards").manifest


# --- doing only the missing work -----------------------------------------------------------------------------------


def test_a_second_run_changes_nothing(data: Path, out: Path) -> None:
    manifest = prepare_here(data, out).manifest
    before = snapshot(out)
    again = prepare_here(data, out)
    assert (again.inspected, again.written, again.manifest) == (0, 0, manifest)
    assert snapshot(out) == before


def test_one_image_more_reads_one_and_writes_one_shard(data: Path, out: Path) -> None:
    old = prepare_here(data, out).manifest
    before = snapshot(out)
    add_image(data, {"image_id": "ISIC_0000001", "lesion_id": "HAM_0000001"}, encode(noise(1)))
    done = prepare_here(data, out)
    assert (done.inspected, done.written) == (1, 1)
    assert sum(sum(counts.values()) for counts in done.manifest.counts.values()) == 121
    after = snapshot(out)
    shards = {name for name in before if name.endswith(".parquet") and "/" in name}
    gone = shards - set(after)
    new = {name for name in after if "/" in name} - shards
    assert len(gone) == len(new) == 1
    assert {name: after[name] for name in shards - gone} == {name: before[name] for name in shards - gone}
    (path,) = new
    assert "ISIC_0000001" in pq.read_table(out / path)["image_id"].to_pylist()
    assert done.manifest.data_hash != old.data_hash


def test_an_image_of_a_known_lesion_joins_it(data: Path, out: Path) -> None:
    prepare_here(data, out)
    lesions = read_lesions(out).set_index("lesion_id")
    for number, split in enumerate(SPLITS):
        lesion = lesions.index[lesions["split"] == split][0]
        table = metadata(data)
        row = table[table["lesion_id"] == lesion].iloc[0].to_dict() | {"image_id": f"ISIC_000000{number}"}
        add_image(data, row, encode(noise(number)))
    prepare_here(data, out)
    rows = rows_of(out).set_index("image_id")
    assert [rows.loc[f"ISIC_000000{number}", "split"] for number in range(3)] == list(SPLITS)


def test_an_identical_image_under_a_smaller_lesion_id_stays_in_test(data: Path, out: Path) -> None:
    prepare_here(data, out)
    before = rows_of(out).set_index("image_id")
    for number, (image_id, row) in enumerate(before[before["split"] == "test"].iloc[:12].iterrows()):
        table = metadata(data).set_index("image_id")
        new = table.loc[image_id].to_dict() | {"image_id": f"ISIC_000000{number}", "lesion_id": f"HAM_000000{number}"}
        add_image(data, new, row["image"])
    prepare_here(data, out)
    after = rows_of(out).set_index("image_id")
    assert (after.loc[before.index, "split"] == before["split"]).all()
    assert (after.loc[[f"ISIC_000000{number}" for number in range(12)], "split"] == "test").all()


def test_a_hidden_duplicate_under_a_smaller_lesion_id_stays_in_test(data: Path, out: Path) -> None:
    """The published list says that two images show one lesion; the second one arrives when the first is in the test."""
    early, late = HIDDEN_DUPLICATES[0]
    prepare_here(data, out)
    chosen = rows_of(out).query("split == 'test'")["image_id"].iloc[0]
    files, table = image_files(data), metadata(data)
    row = table[table["image_id"] == chosen].iloc[0].to_dict()
    files[chosen].rename(files[chosen].with_stem(early))
    table.replace({"image_id": {chosen: early}}).to_csv(data / METADATA, index=False)
    prepare_here(data, out)
    assert rows_of(out).set_index("image_id").loc[early, "split"] == "test"
    add_image(data, row | {"image_id": late, "lesion_id": "HAM_0000000"}, encode(noise(2)))
    prepare_here(data, out)
    found = rows_of(out).set_index("image_id").loc[[early, late]]
    assert found["split"].tolist() == ["test", "test"]
    assert found["lesion_id"].tolist() == [row["lesion_id"]] * 2  # the known one: under a new id it would be dealt anew


def test_identical_images_bring_their_lesions_together(data: Path, out: Path) -> None:
    files, table = image_files(data), metadata(data)
    nevi = table[table["dx"] == "nv"].drop_duplicates("lesion_id")["image_id"].iloc[:8].tolist()
    for image_id in nevi[1:]:
        files[image_id].write_bytes(files[nevi[0]].read_bytes())
    prepare_here(data, out)
    rows = rows_of(out)
    together = rows[rows["image_id"].isin(nevi)]
    assert together["lesion_id"].nunique() == together["split"].nunique() == 1
    assert together["lesion_id"].iloc[0] == table.set_index("image_id").loc[nevi, "lesion_id"].min()


def test_a_removed_image_is_no_longer_there(data: Path, out: Path) -> None:
    prepare_here(data, out)
    image_id, path = next(iter(image_files(data).items()))
    path.unlink()
    done = prepare_here(data, out)
    assert done.inspected == 0 and done.written <= 1
    assert image_id not in set(rows_of(out)["image_id"])
    quarantine = pd.read_csv(out / QUARANTINE_NAME)
    assert quarantine.loc[0, ["image_id", "reason"]].tolist() == [image_id, "no_image"]
    named = {shard.path for shard in done.manifest.shards}
    assert {name for name in snapshot(out) if "/" in name} == named


def test_a_changed_image_is_read_again(data: Path, out: Path) -> None:
    prepare_here(data, out)
    image_id, path = next(iter(image_files(data).items()))
    path.write_bytes(encode(noise(7)))
    done = prepare_here(data, out)
    assert (done.inspected, done.written) == (1, 1)
    assert rows_of(out).set_index("image_id").loc[image_id, "image"] == path.read_bytes()


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"folds": 4}, {"fractions": {"train": 0.5, "calibration": 0.25, "test": 0.25}}]
)
def test_other_choices_need_another_folder(data: Path, out: Path, other: dict[str, object]) -> None:
    prepare_here(data, out)
    before = snapshot(out)
    with pytest.raises(ShardError, match=r"prepared with seed 0.*Use the same choices, or another folder"):
        prepare_here(data, out, **other)
    assert snapshot(out) == before


def test_buckets_stay_while_the_data_grows_a_little(data: Path, out: Path) -> None:
    first = prepare_here(data, out).manifest.buckets
    assert first["train"] == round(sum(read_manifest(out).counts["train"].values()) / 16)
    frame = pd.DataFrame({"split": ["train"] * 16 * 10})
    assert layout.bucket_counts(frame, {"train": 5})["train"] == 5
    assert layout.bucket_counts(frame, {"train": 4})["train"] == 10
    assert layout.bucket_counts(frame, {"train": 21})["train"] == 10
    assert layout.bucket_counts(frame, None) == {"train": 10, "calibration": 1, "test": 1}
