"""Files and folders appear whole or not at all, and errors say where and what to do."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from dermaflow import storage
from dermaflow.errors import StorageError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "new" / "file"
    with storage.open_atomic(file) as stream:
        stream.write(b"content")
        stream.flush()
        assert not file.exists()
    assert storage.read_bytes(file) == b"content"


def test_an_abandoned_file_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "file"
    storage.write_bytes(file, b"old")
    with pytest.raises(RuntimeError), storage.open_atomic(file) as stream:
        stream.write(b"new")
        raise RuntimeError
    assert file.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
def test_a_full_disk_is_named_with_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_open = Path.open
    monkeypatch.setattr(Path, "open", lambda self, mode="r": real_open(Path("/dev/full"), mode))
    with pytest.raises(
        StorageError, match=r"file: could not write: No space left on device.*Free space or choose"
    ) as raised:
        storage.write_bytes(tmp_path / "file", b"content")
    assert isinstance(raised.value.__cause__, OSError) and raised.value.__cause__.errno == errno.ENOSPC
    monkeypatch.undo()
    assert names(tmp_path) == []


def test_what_is_not_there(tmp_path: Path) -> None:
    for action in (storage.read_bytes, storage.sha256_file):
        with pytest.raises(StorageError, match=r"none: .*expected a readable file"):
            action(tmp_path / "none")
    assert not storage.exists(tmp_path / "none")
    assert storage.list_folder(tmp_path / "none") == []
    storage.delete(tmp_path / "none")
    with pytest.raises(StorageError, match=r"foo://bucket: .*expected a local path or s3://bucket/prefix"):
        storage.exists("foo://bucket")
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"file: .*expected a readable file or folder"):
        storage.list_folder(tmp_path / "file")


def test_folders_are_listed_copied_and_deleted(tmp_path: Path) -> None:
    for name in ("b", "a", "deep/c"):
        storage.write_bytes(storage.join(tmp_path, "folder", name), name.encode())
    assert storage.list_folder(tmp_path / "folder") == ["a", "b", "deep"]
    assert storage.info(tmp_path / "folder" / "deep" / "c").size == 6
    storage.copy_folder(tmp_path / "folder", tmp_path / "copy")
    assert (tmp_path / "copy" / "deep" / "c").read_bytes() == b"deep/c"
    storage.delete(tmp_path / "copy")
    storage.delete(tmp_path / "folder" / "a")
    assert names(tmp_path) == ["folder"]
    assert storage.list_folder(tmp_path / "folder") == ["b", "deep"]


def test_the_two_hashes_agree_beyond_one_piece(tmp_path: Path) -> None:
    content = os.urandom((1 << 20) + 17)
    storage.write_bytes(tmp_path / "file", content)
    assert storage.sha256_file(tmp_path / "file") == storage.sha256(content)
    assert storage.sha256(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2


def test_a_relative_path_is_taken_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage.write_bytes("here/file", b"1")
    assert (tmp_path / "here" / "file").read_bytes() == b"1"


def test_a_folder_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder"
    with storage.folder_atomic(target) as folder:
        (folder / "a").touch()
        assert not target.exists()
    assert names(target) == ["a"]
    with storage.folder_atomic(target) as folder:
        (folder / "b").touch()
        assert names(target) == ["a"]
    assert names(target) == ["b"]
    assert names(target.parent) == ["folder"]


def test_an_abandoned_folder_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(RuntimeError), storage.folder_atomic(target) as folder:
        (folder / "new").touch()
        raise RuntimeError
    assert names(target) == ["old"]
    assert names(tmp_path) == ["folder"]


def test_a_folder_that_cannot_take_its_place_brings_the_old_one_back(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(FileNotFoundError), storage.folder_atomic(target) as folder:
        shutil.rmtree(folder)
    assert names(target) == ["old"]
    assert names(tmp_path) == ["folder"]


def test_a_file_in_place_of_a_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with (
        pytest.raises(StorageError, match=r"file: is a file; expected a folder.*Choose another"),
        storage.folder_atomic(tmp_path / "file"),
    ):
        pytest.fail("the block must not run")
    with (
        pytest.raises(StorageError, match="no folder can be made here: Not a directory"),
        storage.folder_atomic(tmp_path / "file" / "below"),
    ):
        pytest.fail("the block must not run")
    assert (tmp_path / "file").read_text() == "precious"
