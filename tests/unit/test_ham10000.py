"""Reading HAM10000: every published layout, and every way in which a folder can be wrong."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pandas as pd
import pytest

from dermaflow.datasets.ham10000 import HIDDEN_DUPLICATES, hidden_duplicates, read_ham10000
from dermaflow.errors import DataError
from dermaflow.schemas.lesion import METADATA_COLUMNS, QUARANTINE_COLUMNS

COLUMNS = ["lesion_id", "image_id", "dx", "dx_type", "age", "sex", "localization", "dataset"]
ROWS = [
    ["HAM_2", "ISIC_0000003", "mel", "histo", "60.0", "male", "back", "rosendahl"],
    ["HAM_1", "ISIC_0000001", "nv", "follow_up", "0.0", "female", "face", "vidir_modern"],
    ["HAM_1", "ISIC_0000002", "nv", "follow_up", "0.0", "female", "face", "vidir_modern"],
]


def put_images(folder: Path, *names: str) -> None:
    """Files named like images; the reader lists images and opens none."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """Three images of two lesions, laid out as published."""
    pd.DataFrame(ROWS, columns=COLUMNS).to_csv(tmp_path / "HAM10000_metadata.csv", index=False)
    put_images(tmp_path / "HAM10000_images_part_1", "ISIC_0000001.jpg", "ISIC_0000002.JPG")
    put_images(tmp_path / "HAM10000_images_part_2", "ISIC_0000003.jpeg")
    return tmp_path


def change(root: Path, **columns: list[str] | None) -> None:
    """Overwrite columns of the metadata table; None removes one."""
    path = root / "HAM10000_metadata.csv"
    table = pd.read_csv(path, dtype=str)
    for column, values in columns.items():
        table = table.drop(columns=column) if values is None else table.assign(**{column: values})
    table.to_csv(path, index=False)


def diagnoses(root: Path) -> dict[str, str]:
    images = read_ham10000(root).images
    return dict(zip(images["image_id"], images["dx"], strict=True))


# --- layouts -------------------------------------------------------------------------------------------------------


def test_published_layout(published: Path) -> None:
    archive = read_ham10000(published)
    assert list(archive.images.columns) == [*METADATA_COLUMNS, "path"]
    assert archive.images["image_id"].tolist() == ["ISIC_0000001", "ISIC_0000002", "ISIC_0000003"]
    assert archive.images["dx"].tolist() == ["nv", "nv", "mel"]
    assert archive.images["age"].tolist() == [0.0, 0.0, 60.0]  # age 0 stays
    assert archive.images["site"].tolist() == ["vidir_modern", "vidir_modern", "rosendahl"]
    assert all(Path(path).is_absolute() and Path(path).exists() for path in archive.images["path"])
    assert archive.quarantined.empty
    assert tuple(archive.quarantined.columns) == QUARANTINE_COLUMNS


@pytest.mark.parametrize(
    ("name", "separator"), [("HAM10000_metadata", ","), ("HAM10000_metadata.tab", "\t"), ("labels.csv", ";")]
)
def test_other_names_of_the_table(published: Path, name: str, separator: str) -> None:
    (published / "HAM10000_metadata.csv").unlink()
    pd.DataFrame(ROWS, columns=COLUMNS).to_csv(published / name, index=False, sep=separator)
    (published / "hidden_duplicates.csv").write_text("image_id,duplicate_of\nISIC_0000001,ISIC_0000003\n")
    assert diagnoses(published) == {"ISIC_0000001": "nv", "ISIC_0000002": "nv", "ISIC_0000003": "mel"}


def test_byte_order_mark_and_spaces(published: Path) -> None:
    path = published / "HAM10000_metadata.csv"
    path.write_text(
        "﻿" + path.read_text().replace(",mel,", ", MEL ,").replace("lesion_id", " Lesion_ID "), encoding="utf-8"
    )
    assert diagnoses(published)["ISIC_0000003"] == "mel"


def test_flat_without_dataset_column(published: Path) -> None:
    change(published, dataset=None)
    for image in sorted(published.rglob("*.jp*g")) + sorted(published.rglob("*.JPG")):
        image.rename(published / image.name)
    archive = read_ham10000(published)
    assert len(archive.images) == 3
    assert set(archive.images["site"]) == {"unknown"}


def test_linked_folder_that_leads_back(published: Path) -> None:
    target = published / "HAM10000_images_part_1"
    moved = published.parent / "elsewhere"
    target.rename(moved)
    target.symlink_to(moved)
    (moved / "loop").symlink_to(moved)
    assert len(read_ham10000(published).images) == 3


@pytest.mark.parametrize(("header", "code"), [("VASC", "vasc"), ("AKIEC", "akiec")])
def test_isic_2018_truth(published: Path, header: str, code: str, caplog: pytest.LogCaptureFixture) -> None:
    (published / "HAM10000_metadata.csv").unlink()
    columns = ["MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC"]
    truth = [
        {"image": f"ISIC_000000{i}", **dict.fromkeys(columns, "0.0"), name: "1.0"}
        for i, name in ((1, "NV"), (2, "NV"), (3, header))
    ]
    pd.DataFrame(truth).to_csv(published / "ISIC2018_Task3_Training_GroundTruth.csv", index=False)
    archive = read_ham10000(published)
    assert archive.images["dx"].tolist() == ["nv", "nv", code]
    assert archive.images["lesion_id"].tolist() == archive.images["image_id"].tolist()
    assert "3 of 3 images have no lesion id" in caplog.text


def test_isic_2018_truth_with_lesion_groupings(published: Path, caplog: pytest.LogCaptureFixture) -> None:
    (published / "HAM10000_metadata.csv").unlink()
    (published / "truth.csv").write_text(
        "image,MEL,NV,VASC\nISIC_0000001,0,1,0\nISIC_0000002,0,1,0\nISIC_0000003,1,0,0\n"
    )
    (published / "groupings.csv").write_text(
        "image,lesion_id,diagnosis_confirm_type\nISIC_0000001,HAM_1,histopathology\n"
        "ISIC_0000002,HAM_1,serial imaging showing no change\nISIC_0000003,HAM_2,histopathology\n"
    )
    images = read_ham10000(published).images
    assert images["lesion_id"].tolist() == ["HAM_1", "HAM_1", "HAM_2"]
    assert images["dx_type"].tolist() == ["histo", "follow_up", "histo"]
    assert "have no lesion id" not in caplog.text


def test_isic_2019_truth(published: Path) -> None:
    (published / "HAM10000_metadata.csv").unlink()
    (published / "truth.csv").write_text(
        "image,MEL,NV,BCC,AK,BKL,DF,VASC,SCC,UNK\nISIC_0000001,0,0,0,1,0,0,0,0,0\nISIC_0000002,0,0,0,0,0,0,0,1,0\n"
        "ISIC_0000003,0,0,0,0,0,0,0,0,1\n"
    )
    (published / "meta.csv").write_text(
        "image,age_approx,anatom_site_general,lesion_id,sex\nISIC_0000001,55,anterior torso,MSK_1,female\n"
        "ISIC_0000002,,,,\nISIC_0000003,70,head/neck,MSK_2,male\n"
    )
    archive = read_ham10000(published)
    assert archive.images["dx"].tolist() == ["akiec", "akiec"]
    assert archive.images["lesion_id"].tolist() == ["MSK_1", "ISIC_0000002"]
    assert archive.images["localization"].tolist() == ["anterior torso", "unknown"]
    assert archive.quarantined["reason"].tolist() == ["unknown_diagnosis"]


def test_class_folders_without_table(tmp_path: Path) -> None:
    put_images(tmp_path / "train" / "mel", "a.jpg")
    put_images(tmp_path / "test" / "VAS", "b.png")
    put_images(tmp_path / "test" / "wart", "c.jpg")
    archive = read_ham10000(tmp_path)
    assert archive.images[["image_id", "lesion_id", "dx"]].to_numpy().tolist() == [
        ["a", "a", "mel"],
        ["b", "b", "vasc"],
    ]
    assert archive.quarantined[["image_id", "reason"]].to_numpy().tolist() == [["c", "unknown_diagnosis"]]


# --- which file, which lesion, which site --------------------------------------------------------------------------


def test_copies_and_masks(published: Path, caplog: pytest.LogCaptureFixture) -> None:
    put_images(published / "HAM10000_a_copy", "ISIC_0000001.jpg", "ISIC_0000003.png")
    put_images(published / "HAM10000_segmentations_lesion_tschandl", "ISIC_0000001.png")
    put_images(published / "masks", "ISIC_0000002_segmentation.png")
    put_images(published / "HAM10000_images_part_1", "._ISIC_0000001.jpg")
    with caplog.at_level(logging.INFO):
        archive = read_ham10000(published)
    assert all("part_" in path for path in archive.images["path"])
    assert archive.quarantined.empty
    assert "2 further copies" in caplog.text


def test_hidden_duplicates_are_one_lesion(tmp_path: Path) -> None:
    (first, second), (third, _) = HIDDEN_DUPLICATES[:2]
    table = pd.DataFrame({"image_id": [first, second, third], "lesion_id": ["HAM_9", "HAM_5", "HAM_7"], "dx": "nv"})
    table.to_csv(tmp_path / "HAM10000_metadata.csv", index=False)
    put_images(tmp_path, f"{first}.jpg", f"{second}.jpg", f"{third}.jpg")
    images = read_ham10000(tmp_path).images
    assert dict(zip(images["image_id"], images["lesion_id"], strict=True)) == {
        first: "HAM_5",
        second: "HAM_5",
        third: "HAM_7",
    }
    assert hidden_duplicates(images["image_id"]) == [(first, second)]


def test_hidden_duplicates_bring_their_sisters(tmp_path: Path) -> None:
    first, second = HIDDEN_DUPLICATES[0]
    table = pd.DataFrame({"image_id": [first, second, "sister"], "lesion_id": ["HAM_5", "HAM_9", "HAM_9"], "dx": "nv"})
    table.to_csv(tmp_path / "HAM10000_metadata.csv", index=False)
    put_images(tmp_path, f"{first}.jpg", f"{second}.jpg", "sister.jpg")
    assert set(read_ham10000(tmp_path).images["lesion_id"]) == {"HAM_5"}


def test_a_lesion_has_one_site(tmp_path: Path) -> None:
    table = pd.DataFrame(
        [("a1", "A", "x"), ("a2", "A", "y"), ("a3", "A", "y"), ("b1", "B", "y"), ("b2", "B", "x")],
        columns=["image_id", "lesion_id", "dataset"],
    ).assign(dx="nv")
    table.to_csv(tmp_path / "HAM10000_metadata.csv", index=False)
    put_images(tmp_path, *(f"{name}.jpg" for name in table["image_id"]))
    assert read_ham10000(tmp_path).images["site"].tolist() == ["y", "y", "y", "x", "x"]


# --- what is set apart ---------------------------------------------------------------------------------------------


def test_quarantine_has_a_reason_for_each_item(published: Path) -> None:
    change(
        published,
        image_id=["ISIC_0000003", "ISIC_0000009", ""],
        dx=["wart", "nv", "nv"],
    )
    put_images(published / "HAM10000_images_part_1", "ok.jpg")
    with (published / "HAM10000_metadata.csv").open("a") as table:
        table.write("HAM_7,ok,bcc,histo,50,male,back,rosendahl\n")
    archive = read_ham10000(published)
    assert archive.images["image_id"].tolist() == ["ok"]
    found = {(row.image_id, row.reason): row.detail for row in archive.quarantined.itertuples()}
    assert found == {
        ("ISIC_0000003", "unknown_diagnosis"): "dx is 'wart'",
        ("ISIC_0000009", "no_image"): "row in HAM10000_metadata.csv",
        ("ISIC_0000001", "no_row"): "not in HAM10000_metadata.csv",
        ("ISIC_0000002", "no_row"): "not in HAM10000_metadata.csv",
        ("", "no_image_id"): "line 4 of HAM10000_metadata.csv",
    }


def test_one_lesion_two_diagnoses(published: Path) -> None:
    change(published, dx=["mel", "nv", "bkl"])
    archive = read_ham10000(published)
    assert archive.images["image_id"].tolist() == ["ISIC_0000003"]
    assert archive.quarantined["reason"].tolist() == ["conflicting_diagnosis"] * 2
    assert "HAM_1" in archive.quarantined["detail"][0]


def test_impossible_age_is_unknown(published: Path, caplog: pytest.LogCaptureFixture) -> None:
    change(published, age=["300", "old", ""])
    assert read_ham10000(published).images["age"].isna().all()
    assert "2 ages are not 0 to 120 years" in caplog.text
    assert "ISIC_0000003=300" in caplog.text


def test_missing_description_columns_are_unknown(published: Path, caplog: pytest.LogCaptureFixture) -> None:
    change(published, age=None, sex=None, localization=["", "face", "UNKNOWN"])
    images = read_ham10000(published).images
    assert images["age"].isna().all()
    assert set(images["sex"]) == {"unknown"}
    assert images["localization"].tolist() == ["face", "unknown", "unknown"]
    assert "no column age, sex" in caplog.text


# --- what is fatal -------------------------------------------------------------------------------------------------


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: no such folder.*dermaflow data fetch"):
        read_ham10000(tmp_path / "nowhere")


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no images; expected \*\.jpg"):
        read_ham10000(tmp_path)


def test_table_without_images(published: Path) -> None:
    for image in [*published.rglob("*.jp*g"), *published.rglob("*.JPG")]:
        image.unlink()
    with pytest.raises(DataError, match="holds no images"):
        read_ham10000(published)


def test_images_without_any_metadata(published: Path) -> None:
    (published / "HAM10000_metadata.csv").unlink()
    (published / "prices.csv").write_text("camera,price\nA,1\n")
    with pytest.raises(DataError, match=r"no metadata found; expected HAM10000_metadata\.csv, an ISIC truth file"):
        read_ham10000(published)


@pytest.mark.parametrize("column", ["image_id", "lesion_id", "dx"])
def test_missing_column(published: Path, column: str) -> None:
    change(published, **{column: None})
    with pytest.raises(DataError, match=rf"HAM10000_metadata\.csv: missing column {column}; found .*dx_type.*expected"):
        read_ham10000(published)


def test_foreign_table_that_cannot_be_read(published: Path, caplog: pytest.LogCaptureFixture) -> None:
    (published / "notes.csv").write_bytes(b"caf\xe9")
    assert len(read_ham10000(published).images) == 3
    assert "notes.csv: the table cannot be read" in caplog.text


def test_missing_column_in_a_table_of_another_name(published: Path) -> None:
    change(published, lesion_id=None)
    (published / "HAM10000_metadata.csv").rename(published / "labels.csv")
    with pytest.raises(DataError, match=r"labels\.csv: missing column lesion_id"):
        read_ham10000(published)


def test_duplicate_image_id(published: Path) -> None:
    change(published, image_id=["ISIC_0000001", "ISIC_0000001", "ISIC_0000002"])
    with pytest.raises(DataError, match=r"1 image ids stand more than once: ISIC_0000001; expected each image id once"):
        read_ham10000(published)


def test_same_name_in_two_class_folders(tmp_path: Path) -> None:
    put_images(tmp_path / "mel", "1.jpg")
    put_images(tmp_path / "nv", "1.jpg")
    with pytest.raises(DataError, match="1 image ids stand more than once: 1"):
        read_ham10000(tmp_path)


def test_two_metadata_tables(published: Path) -> None:
    (published / "old").mkdir()
    (published / "old" / "HAM10000_metadata.tab").write_text("x")
    with pytest.raises(DataError, match=r"several metadata tables: HAM10000_metadata\.csv, HAM10000_metadata\.tab"):
        read_ham10000(published)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00bad", b'image_id,dx\n"open quote,1,2\n3'])
def test_unreadable_table(published: Path, content: bytes) -> None:
    (published / "HAM10000_metadata.csv").write_bytes(content)
    with pytest.raises(DataError, match=r"HAM10000_metadata\.csv: the table cannot be read: .*expected a UTF-8 table"):
        read_ham10000(published)


@pytest.mark.parametrize("rows", [[], [["HAM_2", "other", *ROWS[0][2:]]]])
def test_table_of_other_images(published: Path, rows: list[list[str]]) -> None:
    pd.DataFrame(rows, columns=COLUMNS).to_csv(published / "HAM10000_metadata.csv", index=False)
    with pytest.raises(
        DataError, match=r"no image can be used: no_row 3.*expected image ids equal to image file names"
    ):
        read_ham10000(published)


# --- the real thing ------------------------------------------------------------------------------------------------


@pytest.mark.realdata
def test_real_ham10000() -> None:
    """Counts as published (Tschandl 2018), lesions less the 18 hidden duplicates (Abhishek 2025)."""
    if "DERMAFLOW_DATA" not in os.environ:
        pytest.skip("set DERMAFLOW_DATA to the folder of HAM10000")
    archive = read_ham10000(Path(os.environ["DERMAFLOW_DATA"]))
    assert archive.images["dx"].value_counts().to_dict() == {
        "nv": 6705, "mel": 1113, "bkl": 1099, "bcc": 514, "akiec": 327, "vasc": 142, "df": 115,
    }  # fmt: skip
    assert archive.images["lesion_id"].nunique() == 7470 - 18
    assert archive.images["age"].isna().sum() == 57
    assert (archive.images.groupby("lesion_id")["site"].nunique() == 1).all()
    assert archive.quarantined.empty
