"""Every kind of source is listed whole, in order, with ids that are never twice, and read a few images at a time."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_archives import hostile_tar, hostile_zip, jpeg
from tiny_data import draw, prepare_here

from dermaflow.errors import DataError, StorageError
from dermaflow.scoring import files, reading
from dermaflow.scoring.naming import Names
from dermaflow.scoring.reading import Reader
from dermaflow.scoring.references import LIMITS, BadMember, Limits, Reference
from dermaflow.scoring.sources import fingerprint, identify, list_inputs


def listed(source: Path | str, limits: Limits = LIMITS) -> list[Reference]:
    return [r for r in list_inputs(identify(str(source)), limits) if r is not None]


def contents(references: list[Reference]) -> list[bytes | str]:
    with Reader(LIMITS) as reader:
        chunks = list(reader.chunks(references))
    assert [row for chunk in chunks for row, _ in chunk] == references
    return [c.reason if isinstance(c, BadMember) else c for chunk in chunks for _, c in chunk]


def named(paths: list[str]) -> list[str]:
    names, references = Names({}), [Reference("x", path) for path in paths]
    for reference in references:
        names.learn(reference)
    for reference in references:
        names.settle(reference)
    return [names.name(reference, number)[0] for number, reference in enumerate(references)]


def test_a_folder_with_everything_in_it(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "2.jpg").write_bytes(jpeg(2))
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    (tmp_path / "zero.png").touch()
    (tmp_path / "Thumbs.db").write_bytes(b"x")
    (tmp_path / "b" / "._2.jpg").write_bytes(b"x")
    hostile_zip(tmp_path / "in.zip")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "ring").symlink_to(tmp_path)
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "same.jpg").symlink_to(tmp_path / "a.jpg")
    found = listed(tmp_path)
    assert {r.path: r.problem and r.problem.partition(":")[0] for r in found} == {
        "a.jpg": None, "b/2.jpg": None, "gone.jpg": "unreadable", "in.zip": "nested_archive", "pipe.jpg": "not_a_file",
        "ring": "link", "same.jpg": None, "zero.png": "empty",
    }  # fmt: skip
    assert contents(found) == [
        jpeg(1), jpeg(2), "unreadable", "nested_archive", "not_a_file", "link", jpeg(1), "empty"
    ]  # fmt: skip
    assert [r.path for r in found] == [r.path for r in listed(tmp_path)]


def test_a_file_that_goes_away_or_may_not_be_read_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jpg").write_bytes(jpeg(1))
    found = listed(tmp_path)
    (tmp_path / "a.jpg").unlink()
    assert contents(found) == ["unreadable", jpeg(1)]

    def stale(*arguments: object) -> bytes:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(files, "PAUSES", (0.0, 0.0))
    monkeypatch.setattr(os, "pread", stale)
    with pytest.raises(StorageError, match="in 3 tries"):
        contents(found)


def test_ids_are_file_names_where_they_can_be_and_never_twice() -> None:
    assert named(["a.jpg", "x/b.jpg", "1.2.840.11"]) == ["a", "b", "1.2.840.11"]
    assert named(["x/a.jpg", "y/a.jpg", "b.jpg"]) == ["x/a.jpg", "y/a.jpg", "b"]
    assert named(["a.jpg", "a.png", "a.jpg.png"]) == ["a.jpg#0", "a.png", "a.jpg#2"]
    hostile = named(["a.jpg", "a.jpg", "a.jpg", "a.jpg#1.png", "a#2.jpg", ".jpg", "ä.jpg"])
    assert len(set(hostile)) == 7
    given = Names({})
    references = [Reference("x", p, image_id="same") for p in "ab"] + [Reference("x", "same.jpg")]
    for reference in references:
        given.learn(reference)
    for reference in references:
        given.settle(reference)
    assert len({given.name(r, i)[0] for i, r in enumerate(references)}) == 3


def test_packed_members_are_read_from_the_middle(tmp_path: Path) -> None:
    hostile_zip(tmp_path / "a.zip")
    hostile_tar(tmp_path / "a.tar")
    found = listed(tmp_path / "a.zip")
    backwards = dict(zip([r.path for r in reversed(found)], contents(found[::-1]), strict=True))
    assert backwards["good/b.jpg"] == jpeg(2) and backwards["secret.jpg"] == "encrypted"
    (tmp_path / "no-suffix").write_bytes((tmp_path / "a.tar").read_bytes())
    assert identify(str(tmp_path / "no-suffix")).kind == "tar"
    (tmp_path / "a.tar").unlink()
    tar = [Reference(str(tmp_path / "a.tar"), "x", member="x", offset=512, bytes=3)]
    with pytest.raises(StorageError, match="the archive that was listed"):
        contents(tar)


def test_shards_of_prepare_and_of_others(tmp_path: Path) -> None:
    prepare_here(draw(tmp_path / "data", 60), tmp_path / "shards")
    found = listed(tmp_path / "shards")
    assert len(found) == 60 and all(r.image_id and r.lesion_id for r in found)
    by_id = dict(zip([r.image_id for r in found], contents(found), strict=True))
    images = {p.stem: p.read_bytes() for p in (tmp_path / "data").glob("*/*.jpg")}
    assert by_id == images

    other = tmp_path / "other"
    other.mkdir()
    rows = [jpeg(i) if i != 7 else None for i in range(100)]
    table = pa.table({"image": pa.array(rows, pa.binary()), "image_id": [f"i{i}" for i in range(100)]})
    pq.write_table(table, other / "0.parquet", row_group_size=40)
    (other / "1.parquet").write_bytes((other / "0.parquet").read_bytes()[:-100])
    pq.write_table(pa.table({"picture": [1]}), other / "2.parquet")
    found = listed(other)
    assert len(found) == 102 and [str(r.problem)[:7] for r in found[-2:]] == ["damaged", "damaged"]
    assert contents(found[35:95]) == rows[35:95]
    assert contents(found[90:5:-7]) == [row or "empty" for row in rows[90:5:-7]]


def test_a_table_of_addresses(tmp_path: Path) -> None:
    (tmp_path / "here.jpg").write_bytes(jpeg(1))
    table = tmp_path / "list.csv"
    table.write_text(
        f"\ufeffURI,image_id,lesion_id\nhere.jpg,,L1\n{tmp_path}/here.jpg,twice,L1\nfile://{tmp_path}/here.jpg,twice,\n"
        "gone.jpg,,\nhttps://x/y.jpg,,\n,,\nin.zip,,\n"
    )
    found = listed(table)
    assert [r.lesion_id for r in found[:3]] == ["L1", "L1", None]
    assert contents(found) == [jpeg(1), jpeg(1), jpeg(1), "unreadable", "unreadable", "empty", "nested_archive"]
    table.write_text("url\na.jpg\n")
    with pytest.raises(DataError, match="no column uri"):
        listed(table)


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such source"):
        identify(str(tmp_path / "none"))
    assert listed(tmp_path) == []
    (tmp_path / "one.jpg").write_bytes(jpeg(1))
    assert contents(listed(tmp_path / "one.jpg")) == [jpeg(1)]


def test_a_fingerprint_changes_with_the_source_and_not_with_what_lies_beside(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    source, out = identify(str(tmp_path)), str(tmp_path / "out")
    before = fingerprint(source, lambda uri: uri == out)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "plan.json").touch()
    assert fingerprint(source, lambda uri: uri == out) == before
    (tmp_path / "b.jpg").write_bytes(jpeg(2))
    assert fingerprint(source, lambda uri: uri == out) != before


def test_chunks_are_bounded_by_number_and_by_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(9):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(i))
    monkeypatch.setattr(reading, "CHUNK_IMAGES", 4)
    with Reader(LIMITS) as reader:
        assert [len(chunk) for chunk in reader.chunks(listed(tmp_path))] == [4, 4, 1]
    monkeypatch.setattr(reading, "CHUNK_BYTES", 2 * len(jpeg(0)))
    with Reader(LIMITS) as reader:
        assert max(sum(len(c) for _, c in chunk) for chunk in reader.chunks(listed(tmp_path))) <= 2 * len(jpeg(0))
