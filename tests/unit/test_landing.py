"""The landing area: images, tables and signed pathways, and an archive that grows by what they say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from s3_here import own_s3
from sample_pathways import write_findings
from tiny_data import draw, image_files, metadata, noise, prepare_here, snapshot

from dermaflow import storage
from dermaflow.datasets.growth import arrived, grow, unlearnt
from dermaflow.datasets.ham10000 import read_ham10000
from dermaflow.errors import StorageError
from dermaflow.pathways.outputs.folder import sign_folder
from dermaflow.pathways.run import recommend_files
from dermaflow.preparation.layout import read_lesions
from dermaflow.schemas.lesion import METADATA_COLUMNS
from dermaflow.scoring.landing import Landing, lesion_of, read_landing

PATIENTS = """patient_id;lesion_id;age;sex;localization;histology
P1;L1;31;female;face;unknown
P1;L2;31;female;back;bowen
P2;L3;70;male;back;unknown
P3;L4;50;;back;unknown
P4;L5;50;;back;other
"""
IMAGES = {"I1": "L1", "I2": "L2", "I3": "L3", "I4": "L3", "I5": "L4", "I6": "L5"}


def jpeg(path: Path, seed: int) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(seed)).save(path, "JPEG")


def signed(folder: Path) -> Path:
    """Pathways of five lesions; four are signed."""
    folder.mkdir(parents=True)
    (folder / "patients.csv").write_text(PATIENTS)
    write_findings(folder / "findings.parquet", IMAGES, {})
    recommend_files(folder / "findings.parquet", folder / "patients.csv", folder / "pathways", formats=("json",))
    out = folder / "pathways"
    sign_folder(out, "L1", by="Dr Ada Byron", decision="accepted")
    sign_folder(out, "L2", by="Dr Ada Byron", decision="edited", reason="histology is back")
    sign_folder(out, "L3", by="Dr Ada Byron", decision="rejected", reason="no")
    sign_folder(out, "L5", by="Dr Ada Byron", decision="accepted")
    (folder / "findings.parquet").unlink()
    (folder / "patients.csv").unlink()
    return out


@pytest.fixture(scope="module")
def landing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("landing")
    signed(folder / "ward")
    for seed, image in enumerate([*IMAGES, "T1", "T2", "T3"]):
        jpeg(folder / f"day{seed % 2}" / f"{image}.jpg", seed)
    jpeg(folder / "again" / "I1.jpg", 0)  # the same picture
    jpeg(folder / "day0" / "X.jpg", 50)
    jpeg(folder / "day1" / "X.jpg", 51)
    jpeg(folder / ".hidden" / "H.jpg", 98)
    (folder / "labels.csv").write_text(
        "image_id,lesion_id,dx,dx_type,age\nT1,LT,MEL,histo,44\nT2,LT,mel,histo,\nT3,LU,hair,,\nGONE,LV,nv,,\n"
    )
    (folder / "list.csv").write_text("name,size\na,1\n")
    return folder


def labels(found: Landing) -> dict[str, tuple[str, str, str]]:
    return {row.image_id: (row.lesion_id, row.dx, row.by) for row in found.labels.itertuples()}


def test_only_what_a_clinician_signed_or_a_table_says_is_a_label(landing: Path) -> None:
    found = read_landing(str(landing), "clinic")
    assert found.images["image_id"].tolist() == sorted([*IMAGES, "T1", "T2", "T3"])
    said = labels(found)
    assert said["T1"] == said["T2"] == ("LT", "mel", "table")
    assert said["I2"] == ("L2", "akiec", "histology")  # Bowen's disease, though the picture said otherwise
    assert said["I1"][0] == "L1" and said["I1"][2] == "sign_off"
    assert not {"I3", "I4", "I5", "T3"} & set(said)  # rejected, unsigned, none of the seven
    row = found.labels.set_index("image_id").loc["I2"]
    assert (row["dx_type"], row["age"], row["sex"], row["localization"], row["site"]) == (
        "histo", 31, "female", "back", "clinic",
    )  # fmt: skip
    assert found.left_out["different images of one name"] == 1
    assert found.left_out["a diagnosis that is none of the seven"] == 1
    assert found.left_out["a label without its image"] == 1
    assert found.left_out["signed, and no diagnosis named"] >= 1
    assert lesion_of(["I4", "T1"], found.labels) == ["I4", "LT"]


def test_a_log_that_was_tampered_with_teaches_nothing(landing: Path, tmp_path: Path) -> None:
    shutil.copytree(landing, tmp_path / "landing")
    log = tmp_path / "landing/ward/pathways/audit.jsonl"
    log.write_text(log.read_text().replace('"rejected"', '"accepted"'))
    found = read_landing(str(tmp_path / "landing"))
    assert {by for _, _, by in labels(found).values()} == {"table"}
    assert found.left_out["a folder of pathways that was changed"] == 1


def test_a_table_knows_better_and_equals_that_disagree_are_left_out(tmp_path: Path) -> None:
    signed(tmp_path / "ward")
    for seed, image in enumerate(IMAGES):
        jpeg(tmp_path / f"{image}.jpg", seed)
    (tmp_path / "a.csv").write_text("image_id,lesion_id,dx\nI1,L1,df\nI3,L3,bcc\n")
    (tmp_path / "b.csv").write_text("image_id,lesion_id,dx\nI4,L3,nv\n")
    found = read_landing(str(tmp_path))
    assert labels(found)["I1"] == ("L1", "df", "table")
    assert "I3" not in labels(found) and "I4" not in labels(found)
    assert found.left_out["two diagnoses of one lesion"] == 1


def test_an_empty_landing_area_is_no_error(tmp_path: Path) -> None:
    found = read_landing(str(tmp_path / "not-there"))
    assert found.images.empty and found.labels.empty and found.left_out == {}


@pytest.fixture
def bucket() -> Iterator[str]:
    with own_s3("hospital"):
        yield "s3://hospital/in/landing"


def test_on_an_object_store_it_reads_the_same(bucket: str, landing: Path, tmp_path: Path) -> None:
    storage.copy_folder(landing, bucket)
    here, there = read_landing(str(landing)), read_landing(bucket)
    assert labels(here) == labels(there) and here.left_out == there.left_out
    assert there.images["uri"].iloc[0].startswith("s3://hospital/in/landing/again/")
    base = draw(tmp_path / "base", 40)
    places = dict(zip(there.images["image_id"], there.images["uri"], strict=True))
    assert grow(tmp_path / "archive", base, there.labels, places) == len(there.labels)
    assert set(there.labels["image_id"]) <= set(read_ham10000(tmp_path / "archive").images["image_id"])


def test_an_archive_grows_and_no_lesion_moves(tmp_path: Path) -> None:
    base, archive = draw(tmp_path / "base", 60), tmp_path / "archive"
    prepare_here(base, tmp_path / "shards")
    before = read_lesions(tmp_path / "shards").set_index("lesion_id")["split"]
    new = draw(tmp_path / "new", 12, seed=7)
    table = metadata(new).rename(columns={"dataset": "site"}).assign(by="table")
    table["image_id"], table["lesion_id"] = "n" + table["image_id"], "n" + table["lesion_id"]
    table["age"] = pd.to_numeric(table["age"])
    places = {f"n{image_id}": str(path) for image_id, path in image_files(new).items()}
    assert len(unlearnt(archive, base, table)) == 12
    assert grow(archive, base, table.iloc[:5], places) == 5
    grown = snapshot(archive)
    assert grow(archive, base, table.iloc[:5], places) == 5
    assert {name: facts for name, facts in snapshot(archive).items() if "/" in name} == {
        name: facts for name, facts in grown.items() if "/" in name
    }
    assert grow(archive, base, table, places) == 12
    assert unlearnt(archive, base, table).empty
    prepare_here(archive, tmp_path / "shards")
    after = read_lesions(tmp_path / "shards").set_index("lesion_id")["split"]
    assert after[before.index].equals(before) and len(after) == len(before) + table["lesion_id"].nunique()

    known_better = table.iloc[:1].assign(dx="vasc")  # histology came back
    assert len(unlearnt(archive, base, known_better)) == 1
    grow(archive, base, known_better, places)
    assert arrived(archive).set_index("image_id").loc[known_better["image_id"].iloc[0], "dx"] == "vasc"
    shutil.rmtree(new)
    with pytest.raises(StorageError, match="new"):
        grow(archive, base, table, places)
    assert len(arrived(archive)) == 12
    json.dumps(arrived(archive).to_dict("records"))  # plain values


def test_a_label_that_contradicts_a_known_lesion_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With both diagnoses the whole lesion would be set apart, with images that may belong to the frozen test."""
    base, archive = draw(tmp_path / "base", 40), tmp_path / "archive"
    known = read_ham10000(base).images
    nevus = known[known["dx"] == "nv"].iloc[0]
    table = pd.DataFrame([nevus, nevus])[[*METADATA_COLUMNS]].assign(
        image_id=["n1", "n2"], dx=["mel", "nv"], by="table"
    )
    places = dict.fromkeys(["n1", "n2"], nevus["path"])
    assert unlearnt(archive, base, table)["image_id"].tolist() == ["n2"]
    assert grow(archive, base, table, places) == 1
    assert set(read_ham10000(archive).images["image_id"]) == {*known["image_id"], "n2"}
    assert "1 labels give a lesion of the first archive another diagnosis" in caplog.text
