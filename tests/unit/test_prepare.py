"""Preparing: bytes as received, only the missing work, and a folder that is whole or says that it is not."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny_data import METADATA, add_image, draw, image_files, metadata, noise, prepare_here, snapshot

from dermaflow import storage
from dermaflow.datasets.ham10000 import HIDDEN_DUPLICATES
from dermaflow.errors import DataError, ShardError, StorageError
from dermaflow.preparation import layout
from dermaflow.preparation.layout import read_lesions, read_manifest
from dermaflow.preparation.reading import ShardFolder
from dermaflow.schemas.shard import MANIFEST_NAME, QUARANTINE_NAME, SHARD_SCHEMA, SPLITS

SHARD_ROWS = 16
TESTS = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many shards of few rows, each of several row groups."""
    monkeypatch.setattr(layout, "ROWS_A_SHARD", SHARD_ROWS)
    monkeypatch.setattr(layout, "ROWS_A_GROUP", 6)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("drawn") / "data")


@pytest.fixture
def data(drawn: Path, tmp_path: Path) -> Path:
    shutil.copytree(drawn, tmp_path / "data", ignore=shutil.ignore_patterns("*segmentations"))
    return tmp_path / "data"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "shards"


def jpeg(picture: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "JPEG")
    return stream.getvalue()


def rows_of(out: Path) -> pd.DataFrame:
    """Every row of every shard that the manifest names."""
    tables = [pq.read_table(out / shard.path).to_pandas() for shard in read_manifest(out).shards]
    return pd.concat(tables).sort_values("image_id", ignore_index=True)


def content(out: Path, *, without: str = "inspection.parquet") -> dict[str, str]:
    """SHA-256 of every file; the times in the inspection table are those of the archive's files."""
    return {name: sha256 for name, (_, sha256) in snapshot(out).items() if name != without}


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
    add_image(data, {"image_id": "ISIC_0000001", "lesion_id": "HAM_0000001"}, jpeg(noise(1)))
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
        add_image(data, row, jpeg(noise(number)))
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
    add_image(data, row | {"image_id": late, "lesion_id": "HAM_0000000"}, jpeg(noise(2)))
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
    path.write_bytes(jpeg(noise(7)))
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


# --- bad items -----------------------------------------------------------------------------------------------------


@pytest.fixture
def spoilt(data: Path) -> dict[str, str]:
    """Spoil some images of the archive; the reason expected for each."""
    table, files = metadata(data), image_files(data)
    nevi = table[table["dx"] == "nv"]["image_id"].tolist()
    files[nevi[0]].write_bytes(b"")
    files[nevi[1]].write_bytes(files[nevi[1]].read_bytes()[:-200])
    files[nevi[2]].write_bytes(b"not an image")
    files[nevi[3]].unlink()
    files[nevi[4]].unlink()
    files[nevi[4]].symlink_to(data / "nowhere.jpg")
    melanoma = table[table["dx"] == "mel"]["image_id"].iloc[0]
    files[nevi[5]].write_bytes(files[melanoma].read_bytes())
    (data / "HAM10000_images_part_1" / "ISIC_stray.jpg").write_bytes(jpeg(noise(9)))
    return {
        nevi[0]: "empty", nevi[1]: "truncated", nevi[2]: "not_an_image", nevi[3]: "no_image", nevi[4]: "unreadable",
        nevi[5]: "conflicting_diagnosis", melanoma: "conflicting_diagnosis", "ISIC_stray": "no_row",
    }  # fmt: skip


def test_bad_items_are_set_apart_with_their_reason(data: Path, out: Path, spoilt: dict[str, str]) -> None:
    done = prepare_here(data, out)
    quarantine = pd.read_csv(out / QUARANTINE_NAME, dtype=str)
    assert dict(zip(quarantine["image_id"], quarantine["reason"], strict=True)) == spoilt
    assert done.manifest.quarantined == len(quarantine) == 8
    assert quarantine["detail"].notna().sum() >= 7
    assert set(rows_of(out)["image_id"]) == set(metadata(data)["image_id"]) - set(spoilt)


def test_a_repaired_image_comes_back(data: Path, out: Path, spoilt: dict[str, str]) -> None:
    prepare_here(data, out)
    unreadable = next(image_id for image_id, reason in spoilt.items() if reason == "unreadable")
    (data / "nowhere.jpg").write_bytes(jpeg(noise(8)))  # the link itself stays as it was
    prepare_here(data, out)
    assert unreadable in set(rows_of(out)["image_id"])
    assert unreadable not in pd.read_csv(out / QUARANTINE_NAME)["image_id"].tolist()


def test_a_file_that_may_not_be_read_is_tried_again(data: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image_id, path = next(iter(image_files(data).items()))
    real = Path.open

    def refuse(self: Path, *arguments: object, **choices: object) -> object:
        if self == path:
            raise PermissionError(13, "Permission denied")
        return real(self, *arguments, **choices)  # type: ignore[arg-type,call-overload]

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        prepare_here(data, out)
    bad = pd.read_csv(out / QUARANTINE_NAME)
    assert bad[["image_id", "reason", "detail"]].values.tolist() == [[image_id, "unreadable", "Permission denied"]]
    assert prepare_here(data, out).inspected == 1  # neither its size nor its time changed
    assert image_id in set(rows_of(out)["image_id"]) and pd.read_csv(out / QUARANTINE_NAME).empty


def test_another_bad_image_in_place_of_one_is_written_down(data: Path, out: Path) -> None:
    (first, path), (second, other) = list(image_files(data).items())[:2]
    good = other.read_bytes()
    path.write_bytes(b"")
    prepare_here(data, out)
    path.write_bytes(b"not an image")
    prepare_here(data, out)
    assert pd.read_csv(out / QUARANTINE_NAME)[["image_id", "reason"]].values.tolist() == [[first, "not_an_image"]]
    assert other.read_bytes() == good and second in set(rows_of(out)["image_id"])


def test_strict_refuses_bad_items(data: Path, out: Path, spoilt: dict[str, str]) -> None:
    with pytest.raises(DataError, match=r"8 bad items, the first: no_image"):
        prepare_here(data, out, strict=True)
    assert not (out / MANIFEST_NAME).exists()


def test_nothing_left(data: Path, out: Path) -> None:
    for path in image_files(data).values():
        path.write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"no image is left after quarantine.*Run dermaflow data check"):
        prepare_here(data, out)


# --- cut off -------------------------------------------------------------------------------------------------------


@pytest.fixture
def clean(data: Path, tmp_path: Path) -> dict[str, str]:
    """What an undisturbed run writes."""
    prepare_here(data, tmp_path / "clean")
    return content(tmp_path / "clean")


@pytest.mark.parametrize("step", ["_read_unchanged", "write_table", "remove_unnamed"])
def test_an_error_midway_loses_no_work(
    data: Path, out: Path, clean: dict[str, str], monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    calls: list[object] = []
    real: Callable[..., object] = getattr(layout, step)

    def breaks(*arguments: object) -> object:
        calls.append(arguments)
        if step == "remove_unnamed" or len(calls) > {"_read_unchanged": 50, "write_table": 1}[step]:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(layout, step, breaks)
        prepare_here(data, out)
    written = {name for name in snapshot(out) if "/" in name}
    assert 0 < len(written) < len(clean) if step == "_read_unchanged" else written
    if step != "remove_unnamed":
        with pytest.raises(ShardError, match="no manifest"):
            ShardFolder(out)
    done = prepare_here(data, out)
    assert done.inspected == 0 and done.written == len(done.manifest.shards) - len(written)
    assert content(out) == clean


def test_killed_midway_it_goes_on(data: Path, out: Path, clean: dict[str, str]) -> None:
    """SIGKILL while a shard is half on the disk."""
    code = """
import os, signal, sys
import pyarrow.parquet as pq
from dermaflow.preparation import layout
from tiny_data import prepare_here
layout.ROWS_A_SHARD, layout.ROWS_A_GROUP = 16, 6
write, calls = pq.write_table, []
def write_half(table, stream, *arguments, **choices):
    calls.append(1)
    write(table, stream, *arguments, **choices)
    if len(calls) == 5:  # the table of inspections, three shards and a half
        stream.truncate(stream.tell() // 2)
        stream.flush()
        os.kill(os.getpid(), signal.SIGKILL)
pq.write_table = write_half
prepare_here(__import__("pathlib").Path(sys.argv[1]), sys.argv[2])
"""
    run = subprocess.run(
        [sys.executable, "-c", code, str(data), str(out)], env=os.environ | {"PYTHONPATH": str(TESTS)}, check=False
    )
    assert run.returncode == -signal.SIGKILL
    left = [name for name in snapshot(out) if "/" in name]
    assert len(left) == 4 and sum(name.endswith(".partial") for name in left) == 1
    with pytest.raises(ShardError, match="no manifest"):
        ShardFolder(out)
    done = prepare_here(data, out)
    assert done.inspected == 0 and done.written == len(done.manifest.shards) - 3
    assert content(out) == clean  # the half is gone, too


def test_a_full_disk_leaves_nothing_half_written(data: Path, out: Path, clean: dict[str, str]) -> None:
    """In a process whose files may not grow beyond some kilobytes, as if the disk were full from there."""
    largest = max(len(path.read_bytes()) for path in (out.parent / "clean").rglob("*-*.parquet"))
    limit = largest - 1
    code = """
import resource, sys
from pathlib import Path
from dermaflow.errors import StorageError
from dermaflow.preparation import layout
from tiny_data import prepare_here
layout.ROWS_A_SHARD, layout.ROWS_A_GROUP = 16, 6
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    prepare_here(Path(sys.argv[1]), sys.argv[2])
except StorageError as error:
    print(error)
"""
    run = subprocess.run(
        [sys.executable, "-c", code, str(data), str(out), str(limit)],
        env=os.environ | {"PYTHONPATH": str(TESTS)}, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert "could not write: File too large; expected a writable disk with free space. Free space or" in run.stdout
    left = [name for name in snapshot(out) if "/" in name]
    assert not any(name.endswith(".partial") for name in left)
    for name in left:
        pq.read_table(out / name)
    with pytest.raises(ShardError, match="no manifest"):
        ShardFolder(out)
    done = prepare_here(data, out)
    assert done.written == len(done.manifest.shards) - len(left) > 0
    assert content(out) == clean


def test_an_image_that_changes_or_goes_meanwhile_is_named(
    data: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = next(iter(image_files(data).values()))
    plan = layout.plan_shards
    for change, message in (
        (lambda: path.write_bytes(jpeg(noise(3))), "the image changed while it was being prepared"),
        (path.unlink, "the image could be read no more: No such file"),
    ):

        def meanwhile(*arguments: object, change: Callable[[], object] = change) -> object:
            change()
            return plan(*arguments)  # type: ignore[arg-type]

        with monkeypatch.context() as patch, pytest.raises(ShardError, match=f"{path.name}: {message}.*Run the comm"):
            patch.setattr(layout, "plan_shards", meanwhile)
            prepare_here(data, out)
    prepare_here(data, out)
    assert path.stem not in set(rows_of(out)["image_id"])


# --- reading what is damaged ---------------------------------------------------------------------------------------


def test_a_folder_without_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"no manifest; expected a finished shard folder.*Run dermaflow prepare"):
        ShardFolder(tmp_path)


@pytest.mark.parametrize("damage", [b"", b"{}", b"\xff\xfe", b'{"format": "dermaflow-shards/1"}'])
def test_a_damaged_manifest(data: Path, out: Path, damage: bytes) -> None:
    prepare_here(data, out)
    (out / MANIFEST_NAME).write_bytes(damage)
    with pytest.raises(ShardError, match=r"manifest\.json: damaged manifest"):
        ShardFolder(out)


def test_a_missing_or_shortened_shard_is_named_and_written_again(data: Path, out: Path) -> None:
    manifest = prepare_here(data, out).manifest
    before = content(out)
    shard = manifest.shards[3]
    path = out / shard.path
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ShardError, match=rf"{path.name}: {shard.bytes - 1} bytes; expected {shard.bytes} bytes"):
        ShardFolder(out)
    assert prepare_here(data, out).written == 1 and content(out) == before
    path.unlink()
    with pytest.raises(ShardError, match=rf"{path.name}: missing; expected {shard.bytes} bytes. Run dermaflow prepare"):
        ShardFolder(out)
    assert prepare_here(data, out).written == 1 and content(out) == before


def test_a_shard_with_changed_bytes_is_named(data: Path, out: Path) -> None:
    shard = prepare_here(data, out).manifest.shards[-1]
    path = out / shard.path
    path.write_bytes(bytes(shard.bytes))
    folder = ShardFolder(out)  # the size is right
    with pytest.raises(ShardError, match=f"{path.name}: unreadable shard"):
        folder.row_groups(shard.split)
    path.unlink()
    with pytest.raises(ShardError, match=f"{path.name}: unreadable shard"):
        folder.metadata(shard.split)


@pytest.mark.parametrize("name", ["lesions.parquet", "inspection.parquet"])
def test_a_damaged_table_is_named(data: Path, out: Path, name: str) -> None:
    prepare_here(data, out)
    (out / name).write_bytes(b"PAR1 no more")
    with pytest.raises(ShardError, match=f"{name}: unreadable"):
        prepare_here(data, out)


def test_a_place_that_cannot_be_written(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file"):
        prepare_here(data, tmp_path / "file" / "shards")


def test_buckets_stay_while_the_data_grows_a_little(data: Path, out: Path) -> None:
    first = prepare_here(data, out).manifest.buckets
    assert first["train"] == round(sum(read_manifest(out).counts["train"].values()) / SHARD_ROWS)
    frame = pd.DataFrame({"split": ["train"] * 16 * 10})
    assert layout.bucket_counts(frame, {"train": 5})["train"] == 5
    assert layout.bucket_counts(frame, {"train": 4})["train"] == 10
    assert layout.bucket_counts(frame, {"train": 21})["train"] == 10
    assert layout.bucket_counts(frame, None) == {"train": 10, "calibration": 1, "test": 1}
