"""Findings and patients brought together, and findings that cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sample_pathways import a_finding

from dermaflow.errors import DataError, StorageError
from dermaflow.pathways.intake import Case
from dermaflow.pathways.matching import NO_FINDING, NO_PATIENT, match, read_findings
from dermaflow.schemas.finding import Finding, findings_table
from dermaflow.schemas.patient import Lesion, Patient
from dermaflow.taxonomy import CODES


def write(folder: Path, *findings: Finding) -> Path:
    path = folder / "findings.parquet"
    pq.write_table(findings_table(findings), path)
    return path


def a_case(patient: str, lesion: str) -> Case:
    return Case(Patient(patient_id=patient, age=50), Lesion(lesion_id=lesion))


def lesion_findings(tmp_path: Path, *lesions: str) -> Any:
    return read_findings(write(tmp_path, *(a_finding(f"I-{lesion}", lesion) for lesion in lesions)))


def test_images_of_one_lesion_become_one_finding(tmp_path: Path) -> None:
    first, second = read_findings(write(tmp_path, a_finding("I1", "L1"), a_finding("I2", "L1"), a_finding("I3", None)))
    assert (first.lesion_id, first.image_ids) == ("L1", ("I1", "I2"))
    assert (second.lesion_id, second.image_ids) == ("I3", ("I3",))


def test_findings_and_patients_meet_by_lesion_in_the_order_of_the_patients(tmp_path: Path) -> None:
    matched = match([a_case("P2", "L2"), a_case("P1", "L1")], lesion_findings(tmp_path, "L1", "L2"))
    assert [p.patient_id for p in matched.patients] == ["P2", "P1"]
    assert [x.lesion_id for x in matched.lesions] == [f.lesion_id for f in matched.findings] == ["L2", "L1"]
    assert matched.unmatched == []


def test_what_has_no_counterpart_is_an_error_with_counts_and_first_ids(tmp_path: Path) -> None:
    cases = [a_case("P", "L0"), *(a_case(f"P{n}", f"lonely{n}") for n in range(7))]
    with pytest.raises(DataError) as caught:
        match(cases, lesion_findings(tmp_path, "L0", "X1", "X2"))
    text = str(caught.value)
    assert "2 findings without a patient (X1, X2)" in text
    assert "7 patients without a finding (lonely0, lonely1, lonely2, lonely3, lonely4, …)" in text
    assert "--allow-unmatched" in text


def test_allowed_a_finding_gets_a_person_of_whom_nothing_is_known(tmp_path: Path) -> None:
    matched = match([a_case("unknown-X1", "L1")], lesion_findings(tmp_path, "L1", "X1"), allow_unmatched=True)
    assert [p.patient_id for p in matched.patients] == ["unknown-X1", "unknown-X1_"]
    assert matched.patients[1] == Patient(patient_id="unknown-X1_")
    assert matched.lesions[1] == Lesion(lesion_id="X1")
    assert matched.unmatched == [("", "X1", NO_PATIENT)]


def test_allowed_a_patient_without_a_finding_is_listed_and_left_out(tmp_path: Path) -> None:
    matched = match([a_case("P1", "L1"), a_case("P2", "L2")], lesion_findings(tmp_path, "L1"), allow_unmatched=True)
    assert [x.lesion_id for x in matched.lesions] == ["L1"]
    assert matched.unmatched == [("P2", "L2", NO_FINDING)]


@pytest.mark.parametrize(
    ("findings", "message"),
    [
        ([], "no findings"),
        ([a_finding("I1", "L1"), a_finding("I1", "L2")], "image I1 stands twice"),
        ([a_finding("I1", "L1"), a_finding("I2", "L2", model_sha256="b" * 64)], "findings of 2 models"),
        ([a_finding("I1", "L1", p_nv=0.2)], "image I1 is ok without probabilities"),
        ([a_finding("I1", "L1", p_nv=None)], "image I1 is ok without probabilities"),
        ([a_finding("I1", "L1", p_nv=1.7, p_mel=-0.95)], "image I1 is ok without probabilities"),
        ([a_finding("I1", "L1", prediction="wart")], "image I1 is ok without probabilities"),
        ([a_finding("I1", "L1", conformal_set=["wart"])], "image I1 is ok without probabilities"),
    ],
)
def test_findings_that_cannot_be_used_are_refused(tmp_path: Path, findings: list[Finding], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_findings(write(tmp_path, *findings))


def test_a_failed_image_needs_no_probabilities(tmp_path: Path) -> None:
    nothing = dict.fromkeys([*(f"p_{code}" for code in CODES), "prediction", "conformal_set", "p_malignant"])
    [found] = read_findings(write(tmp_path, a_finding("I1", "L1", status="failed", reason="unreadable", **nothing)))
    assert found.status == "failed"


def test_another_table_and_another_file_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image_id": ["I1"]}), tmp_path / "other.parquet")
    with pytest.raises(DataError, match="no column lesion_id"):
        read_findings(tmp_path / "other.parquet")
    (tmp_path / "text.parquet").write_text("image_id")
    with pytest.raises(DataError, match="no Parquet file"):
        read_findings(tmp_path / "text.parquet")
    with pytest.raises(StorageError):
        read_findings(tmp_path / "nowhere.parquet")


def test_a_column_of_the_wrong_kind_is_refused(tmp_path: Path) -> None:
    table = findings_table([a_finding("I1", "L1")])
    wrong = table.set_column(table.column_names.index("p_mel"), "p_mel", pa.array(["high"]))
    pq.write_table(wrong, tmp_path / "findings.parquet")
    with pytest.raises(DataError, match="no findings"):
        read_findings(tmp_path / "findings.parquet")


def test_columns_that_a_later_version_adds_are_passed_over(tmp_path: Path) -> None:
    table = findings_table([a_finding("I1", "L1")]).append_column("heat", pa.array([1.0]))
    pq.write_table(table, tmp_path / "findings.parquet")
    assert read_findings(tmp_path / "findings.parquet")[0].lesion_id == "L1"
