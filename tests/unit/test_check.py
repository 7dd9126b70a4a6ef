"""The data sheet: right counts, and every bad image found with its reason."""

from __future__ import annotations

import io
import os
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dermaflow.datasets.check import DataSheet, check, write_quarantine
from dermaflow.datasets.ham10000 import HIDDEN_DUPLICATES
from dermaflow.errors import StorageError
from dermaflow.schemas.lesion import QUARANTINE_COLUMNS

METADATA = pd.DataFrame(
    [
        ("a1", "A", "mel", "histo", 60, "male", "back", "rosendahl"),
        ("a2", "A", "mel", "histo", 60, "male", "back", "rosendahl"),
        ("b1", "B", "nv", "follow_up", 30, "female", "face", "vidir_modern"),
        ("c1", "C", "nv", "consensus", None, "unknown", "foot", "vidir_modern"),
    ],
    columns=["image_id", "lesion_id", "dx", "dx_type", "age", "sex", "localization", "dataset"],
)


def encode(seed: int, kind: str = "JPEG", size: tuple[int, int] = (60, 45)) -> bytes:
    """A picture of noise; the same seed gives the same bytes."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def bomb() -> bytes:
    """A PNG that says it has 20,000 x 20,000 pixels, in under a hundred bytes."""
    size = (20_000).to_bytes(4, "big")
    chunks = [(b"IHDR", size + size + bytes([8, 2, 0, 0, 0])), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big") for name, body in chunks
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    METADATA.to_csv(tmp_path / "HAM10000_metadata.csv", index=False)
    for seed, image_id in enumerate(METADATA["image_id"]):
        (tmp_path / f"{image_id}.jpg").write_bytes(encode(seed))
    return tmp_path


def test_counts(folder: Path) -> None:
    calls: list[tuple[int, int]] = []
    sheet = check(folder, workers=2, progress=lambda done, total: calls.append((done, total)))
    assert (sheet.images, sheet.lesions) == (4, 3)
    assert list(sheet.classes) == ["akiec", "bcc", "bkl", "df", "mel", "nv", "vasc"]
    assert (sheet.classes["mel"].images, sheet.classes["mel"].lesions) == (2, 1)
    assert sheet.classes["akiec"].images == 0
    assert sheet.sites["rosendahl"]["mel"] == 2
    assert sheet.site_lesions == {"rosendahl": 1, "vidir_modern": 2}
    assert sheet.dx_type == {"histo": 2, "consensus": 1, "follow_up": 1}
    assert sheet.sex == {"male": 2, "female": 1, "unknown": 1}
    assert (sheet.age.known, sheet.age.missing, sheet.age.mean, sheet.age.maximum) == (3, 1, 50.0, 60.0)
    assert sheet.images_per_lesion == {1: 2, 2: 1}
    assert sheet.sizes == {"60 x 45": 4}
    assert sheet.formats == {"JPEG": 4}
    assert sheet.problems == []
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_workers_do_not_change_the_sheet(folder: Path) -> None:
    (folder / "b1.jpg").write_bytes(b"")
    assert check(folder, workers=1) == check(folder, workers=4)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (encode(9)[:700], "truncated"),
        (b"<html>404</html>", "not_an_image"),
        (bomb(), "too_many_pixels"),
    ],
    ids=["empty", "truncated", "html", "bomb"],
)
def test_bad_image_is_quarantined(folder: Path, content: bytes, reason: str) -> None:
    (folder / "c1.jpg").write_bytes(content)
    sheet = check(folder)
    assert [(item.image_id, item.reason) for item in sheet.quarantined] == [("c1", reason)]
    assert sheet.quarantined[0].detail
    assert sheet.images == 3
    assert sheet.problems == [f"1 items are quarantined as {reason}"]


def test_too_many_bytes(folder: Path) -> None:
    with (folder / "c1.jpg").open("r+b") as stream:
        stream.truncate(65 << 20)  # sparse
    assert check(folder).reasons == {"too_many_bytes": 1}


def test_broken_link_to_an_image(folder: Path) -> None:
    (folder / "c1.jpg").unlink()
    (folder / "c1.jpg").symlink_to(folder / "gone")
    assert check(folder).reasons == {"unreadable": 1}


def test_all_images_bad(folder: Path) -> None:
    for path in folder.glob("*.jpg"):
        path.write_bytes(b"")
    sheet = check(folder)
    assert (sheet.images, sheet.lesions, sheet.age.mean) == (0, 0, None)
    assert sheet.reasons == {"empty": 4}
    assert sheet.tables()


def test_png_named_jpg_and_odd_size_can_be_used(folder: Path) -> None:
    (folder / "b1.jpg").write_bytes(encode(5, "PNG"))
    (folder / "c1.jpg").write_bytes(encode(6, size=(80, 60)))
    sheet = check(folder)
    assert sheet.images == 4
    assert [(note.image_id, note.detail) for note in sheet.misnamed] == [("b1", "content is PNG")]
    assert [(note.image_id, note.detail) for note in sheet.odd_sizes] == [("c1", "80 x 60")]
    assert sheet.formats == {"JPEG": 3, "PNG": 1}
    assert sheet.problems == ["1 images are of another format than their names say"]


def test_duplicates_within_and_across_lesions(folder: Path) -> None:
    (folder / "a2.jpg").write_bytes(encode(0))
    (folder / "c1.jpg").write_bytes(encode(2))
    sheet = check(folder)
    assert {tuple(d.image_ids): d.leak for d in sheet.duplicates} == {("a1", "a2"): False, ("b1", "c1"): True}
    assert [d.lesion_ids for d in sheet.leaks] == [["B", "C"]]
    assert sheet.problems == ["1 groups of byte-identical images are spread over different lesions"]


def test_hidden_duplicates_are_listed_and_merged(folder: Path) -> None:
    first, second = HIDDEN_DUPLICATES[3]
    METADATA.assign(image_id=["a1", "a2", first, second]).to_csv(folder / "HAM10000_metadata.csv", index=False)
    (folder / "b1.jpg").rename(folder / f"{first}.jpg")
    (folder / "c1.jpg").rename(folder / f"{second}.jpg")
    sheet = check(folder)
    assert sheet.hidden_duplicates == [(first, second)]
    assert sheet.lesions == 2
    assert sheet.problems == []


def test_reader_quarantine_is_in_the_sheet(folder: Path) -> None:
    (folder / "stray.jpg").write_bytes(encode(7))
    (folder / "a1.jpg").unlink()
    assert check(folder).reasons == {"no_image": 1, "no_row": 1}


def test_sheet_survives_json(folder: Path) -> None:
    (folder / "c1.jpg").write_bytes(b"")
    sheet = check(folder)
    assert DataSheet.model_validate_json(sheet.model_dump_json()) == sheet


def test_tables_are_rectangular_text_and_short(folder: Path) -> None:
    for number in range(30):
        (folder / f"stray{number:02d}.jpg").write_bytes(b"")
    tables = {title: (header, rows) for title, header, rows in check(folder).tables()}
    for header, rows in tables.values():
        assert rows
        assert all(len(row) == len(header) and all(isinstance(cell, str) for cell in row) for row in rows)
    assert tables["Diagnoses"][1][4] == ["mel", "2", "50.00 %", "1"]
    assert tables["Diagnoses"][1][-1] == ["all", "4", "", "3"]
    assert tables["Quarantined: 30"][1][-1] == ["and 10 more", "", ""]
    assert not any(title.startswith("Byte-identical") for title in tables)


def test_quarantine_file(folder: Path) -> None:
    (folder / "c1.jpg").write_bytes(b"")
    target = folder / "out" / "quarantine.csv"
    write_quarantine(check(folder), target)
    table = pd.read_csv(target)
    assert tuple(table.columns) == QUARANTINE_COLUMNS
    assert table[["image_id", "reason"]].to_numpy().tolist() == [["c1", "empty"]]
    assert [path.name for path in target.parent.iterdir()] == ["quarantine.csv"]


def test_quarantine_file_in_an_impossible_place(folder: Path) -> None:
    with pytest.raises(StorageError, match="could not write"):
        write_quarantine(check(folder), folder / "a1.jpg" / "quarantine.csv")


@pytest.mark.realdata
def test_real_ham10000() -> None:
    if "DERMAFLOW_DATA" not in os.environ:
        pytest.skip("set DERMAFLOW_DATA to the folder of HAM10000")
    sheet = check(Path(os.environ["DERMAFLOW_DATA"]), workers=2)
    assert (sheet.images, sheet.lesions) == (10_015, 7_452)
    assert sheet.dx_type == {"histo": 5340, "follow_up": 3704, "consensus": 902, "confocal": 69}
    assert (sheet.age.missing, sheet.sex["unknown"], sheet.localization["unknown"]) == (57, 57, 234)
    assert len(sheet.hidden_duplicates) == 18
    assert sheet.problems == []
