"""Preparing what is bad, cut off or damaged: a folder that is whole or says that it is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from tiny_data import content, encode, image_files, metadata, noise, prepare_here, rows_of, snapshot

from dermaflow.errors import DataError, ShardError, StorageError
from dermaflow.preparation import layout
from dermaflow.preparation.reading import ShardFolder
from dermaflow.schemas.shard import MANIFEST_NAME, QUARANTINE_NAME

TESTS = Path(__file__).parents[2]


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
    (data / "HAM10000_images_part_1" / "ISIC_stray.jpg").write_bytes(encode(noise(9)))
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
    (data / "nowhere.jpg").write_bytes(encode(noise(8)))  # the link itself stays as it was
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
        (lambda: path.write_bytes(encode(noise(3))), "the image changed while it was being prepared"),
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
