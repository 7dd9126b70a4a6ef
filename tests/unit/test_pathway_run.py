"""From files to a folder and a signature, through the two commands."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import typer
from sample_pathways import write_findings
from tiny_bundle import a_bundle, a_calibration, save_tiny
from typer.testing import CliRunner

from dermaflow.bundles.bundle import load_bundle
from dermaflow.cli import recommend as commands
from dermaflow.errors import BundleError, SignOffError
from dermaflow.pathways.outputs.folder import read_folder, sign_folder
from dermaflow.pathways.run import CAUTIOUS, thresholds_of
from dermaflow.pathways.signoff import read_log

PATIENTS = """patient_id;lesion_id;age;fitzpatrick;pregnant;localization
P1;L1;31;5;yes;face
P1;L2;;;;back
p/2;L3;70;;no;
"""
SUSPICIOUS = {"p_mel": 0.63, "p_nv": 0.32, "conformal_set": ["mel", "nv"], "prediction": "mel", "p_malignant": 0.65}
AKIEC = {"p_akiec": 0.94, "p_nv": 0.01, "conformal_set": ["akiec"], "prediction": "akiec", "p_malignant": 0.96}
ADA = ("--by", "Dr Ada Byron")

app = typer.Typer()
app.command()(commands.recommend)
app.command()(commands.sign)


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, " ".join(result.output.split())


def inputs(folder: Path, patients: str = PATIENTS) -> list[object]:
    """Findings of three lesions, the first suspicious, and patients; the beginning of the command that reads them."""
    (folder / "patients.csv").write_text(patients)
    images = {"I1": "L1", "I2": "L2", "I3": "L3", "I4": "L3"}
    write_findings(folder / "findings.parquet", images, {"I1": SUSPICIOUS})
    return ["recommend", "--findings", folder / "findings.parquet", "--patients", folder / "patients.csv"]


def statuses(out: Path) -> dict[str, str]:
    pathways, _, _ = read_folder(out)
    return {pathway.lesion_id: pathway.status for pathway in pathways}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder that `recommend` wrote, its inputs beside it, and what it said."""
    folder = tmp_path_factory.mktemp("written")
    code, text = run(*inputs(folder), "--out", folder / "out")
    assert code == 0, text
    return folder / "out", text


@pytest.fixture
def out(written: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of it to change."""
    return Path(shutil.copytree(written[0], tmp_path / "out"))


def test_recommend_says_what_is_most_urgent_and_what_to_do_next(written: tuple[Path, str]) -> None:
    out, text = written
    assert "U1 │ P1 │ L1" in text
    assert "3 lesions U1 1" in text
    assert "cautious default thresholds" in text
    assert f"next: dermaflow sign {out}" in text


def test_the_records_hold_pathways_and_what_they_were_made_from(written: tuple[Path, str]) -> None:
    out, _ = written
    pathways, cases, record = read_folder(out)
    assert [p.lesion_id for p in pathways] == ["L1", "L2", "L3"] == [c.lesion.lesion_id for c in cases]
    assert {p.status for p in pathways} == {"preliminary"}
    assert pathways[2].image_ids == ["I3", "I4"]
    assert pathways[0].versions.thresholds["mel"] == CAUTIOUS.mel
    assert cases[1].patient.pregnant == "yes"  # the other row of the same person says so
    assert datetime.now(UTC) - record.recorded < timedelta(hours=1)
    table = pq.read_table(out / "pathways.parquet")
    assert table.column("lesion_id").to_pylist() == ["L1", "L2", "L3"]
    assert table.column("urgency").to_pylist() == [p.urgency for p in pathways]
    assert table.column("status").to_pylist() == ["preliminary"] * 3


def test_every_person_has_a_bundle_and_a_page(written: tuple[Path, str]) -> None:
    out, _ = written
    bundles, pages = ({path.stem for path in (out / name).iterdir()} for name in ("fhir", "patients"))
    assert bundles == pages
    assert len(pages) == 2
    page = (out / "patients" / "P1.html").read_text()
    assert page.index("Lesion L1") < page.index("Lesion L2")
    assert (out / "index.html").exists()
    assert not (out / "unmatched.csv").exists()


def test_the_same_inputs_give_the_same_pathways_and_other_formats_go(written: tuple[Path, str], out: Path) -> None:
    (out / "unmatched.csv").write_text("from an earlier run")
    assert run(*inputs(out.parent), "--out", out, "--format", "json")[0] == 0
    for name in ("pathways.jsonl", "cases.jsonl"):
        assert (out / name).read_bytes() == (written[0] / name).read_bytes()
    assert not any((out / name).exists() for name in ("fhir", "patients", "index.html", "unmatched.csv"))


def test_a_pathway_follows_the_person(tmp_path: Path) -> None:
    """The same picture, another person, another pathway."""
    images = {"I0": "L0", "I1": "L1"}
    write_findings(tmp_path / "findings.parquet", images, dict.fromkeys(images, AKIEC))
    (tmp_path / "patients.csv").write_text(
        "patient_id,lesion_id,age,pregnant,breast_feeding,dpd_deficiency,multiple,site,subtype\n"
        "P0,L0,40,no,no,no,yes,face,ak\nP1,L1,40,no,no,yes,yes,face,ak\n"
    )
    arguments = ["recommend", "--findings", tmp_path / "findings.parquet", "--patients", tmp_path / "patients.csv"]
    assert run(*arguments, "--out", tmp_path / "out", "--format", "json")[0] == 0
    healthy, deficient = (
        {o.option for o in p.options if o.status == "blocked"} for p in read_folder(tmp_path / "out")[0]
    )
    assert "fluorouracil" not in healthy
    assert "fluorouracil" in deficient


def test_unmatched_lesions_are_an_error_or_listed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = inputs(tmp_path, "patient_id,lesion_id\nP1,L1\nP9,L9\n")
    code, text = run(*arguments, "--out", out)
    assert code == 1
    assert "2 findings without a patient (L2, L3) and 1 patients without a finding (L9)" in text
    assert not out.exists()
    code, text = run(*arguments, "--out", out, "--allow-unmatched", "--format", "json")
    assert code == 0, text
    assert "3 without a counterpart" in text
    assert (out / "unmatched.csv").read_text().splitlines()[1].startswith('P9,L9,"no finding')
    unknown = {p.lesion_id: p for p in read_folder(out)[0]}["L2"]
    assert unknown.patient_id == "unknown-L2"
    assert unknown.missing


@pytest.mark.parametrize(
    ("patients", "options", "message"),
    [
        (PATIENTS, ["--format", "json,pdf"], "unknown format 'pdf'; expected json, fhir, html"),
        (PATIENTS, ["--as-of", "2999-01-01"], "2999-01-01 lies in the future"),
        ("patient_id,lesion_id\n", ["--allow-unmatched"], "no patients"),
        ("patient_id,lesion_id,age\nP1,L1,-3\n", [], "row 2: age is '-3'; expected a number from 0 to 120"),
    ],
)
def test_wrong_inputs_end_with_one_clear_message_and_no_folder(
    tmp_path: Path, patients: str, options: list[str], message: str
) -> None:
    code, text = run(*inputs(tmp_path, patients), "--out", tmp_path / "out", *options)
    assert code == 1
    assert message in text
    assert not (tmp_path / "out").exists()


def test_nothing_in_common_is_an_error_although_unmatched_is_allowed(tmp_path: Path) -> None:
    arguments = inputs(tmp_path, "patient_id,lesion_id\nP1,L1\n")
    write_findings(tmp_path / "findings.parquet", {}, {})
    code, text = run(*arguments, "--out", tmp_path / "out", "--allow-unmatched")
    assert code == 1
    assert "no findings" in text


def test_birth_dates_count_to_the_date_of_assessment_and_are_written_nowhere(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = inputs(tmp_path, "patient_id,lesion_id,birth_date\nP1,L1,1987-06-05\nP1,L2,\nP3,L3,\n")
    assert run(*arguments, "--out", out, "--as-of", "2020-06-04")[0] == 0
    assert read_folder(out)[1][1].patient.age == 32
    assert not any(b"1987" in path.read_bytes() for path in out.rglob("*") if path.is_file())


def test_thresholds_come_from_the_bundle_that_made_the_findings_and_no_other(tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "model", a_bundle(a_calibration(ood=False)))
    loaded = load_bundle(path)
    fitted = loaded.bundle.calibration
    assert fitted is not None
    found = thresholds_of(path, loaded.sha256)
    assert (found.mel, found.malignant) == (fitted.mel_threshold, fitted.malignant_threshold)
    assert found.entropy == fitted.entropy_threshold
    with pytest.raises(BundleError, match="the findings are of model aaaaaaaaaaaa"):
        thresholds_of(path, "a" * 64)
    code, text = run(*inputs(tmp_path), "--out", tmp_path / "out", "--model", path)
    assert code == 1
    assert "the findings are of model aaaaaaaaaaaa" in text


def test_sign_changes_the_status_everywhere_and_nothing_else(out: Path) -> None:
    other = next(path for path in (out / "patients").iterdir() if path.name != "P1.html")
    before = other.read_bytes()
    code, text = run("sign", out, "--lesion", "L1", *ADA, "--decision", "edited", "--reason", "Mohs instead")
    assert code == 0, text
    assert "L1: final, edited by Dr Ada Byron" in text
    assert statuses(out) == {"L1": "final", "L2": "preliminary", "L3": "preliminary"}
    table = pq.read_table(out / "pathways.parquet").to_pylist()
    assert [row["status"] for row in table] == ["final", "preliminary", "preliminary"]
    assert [row["signed_by"] for row in table] == ["Dr Ada Byron", None, None]
    assert "Edited by Dr Ada Byron" in (out / "patients" / "P1.html").read_text()
    assert "Dr Ada Byron" in (out / "index.html").read_text()
    bundle = json.loads((out / "fhir" / "P1.json").read_text())
    reports = [e["resource"]["status"] for e in bundle["entry"] if e["resource"]["resourceType"] == "DiagnosticReport"]
    assert sorted(reports) == ["final", "preliminary"]
    assert other.read_bytes() == before


def test_a_sign_off_survives_a_new_run_unless_the_pathway_changed(out: Path) -> None:
    for lesion in ("L1", "L3"):
        assert run("sign", out, "--lesion", lesion, *ADA, "--decision", "accepted")[0] == 0
    changed = inputs(out.parent, PATIENTS.replace("p/2;L3;70", "p/2;L3;17"))
    code, text = run(*changed, "--out", out, "--format", "json")
    assert code == 0, text
    assert "1 signed earlier, changed since: to be signed again" in text
    assert statuses(out) == {"L1": "final", "L2": "preliminary", "L3": "preliminary"}
    run(*inputs(out.parent), "--out", out, "--format", "json")
    assert statuses(out) == {"L1": "final", "L2": "preliminary", "L3": "final"}
    assert len(read_log(out)) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lesion", "L9", *ADA, "--decision", "accepted"], "no lesion 'L9'"),
        (["--lesion", "L1", "--by", "", "--decision", "accepted"], "no name of a clinician"),
        (["--lesion", "L1", *ADA, "--decision", "rejected"], "rejected without a reason"),
        (["--lesion", "L1", *ADA, "--decision", "fine"], "decision 'fine'"),
    ],
)
def test_a_wrong_sign_off_changes_nothing(out: Path, arguments: list[str], message: str) -> None:
    before = (out / "pathways.jsonl").read_bytes()
    code, text = run("sign", out, *arguments)
    assert code == 1
    assert message in text
    assert (out / "pathways.jsonl").read_bytes() == before
    assert read_log(out) == []


def test_a_folder_that_recommend_did_not_write_cannot_be_signed(tmp_path: Path) -> None:
    with pytest.raises(SignOffError, match="no pathways here"):
        sign_folder(tmp_path, "L1", by="Dr Ada Byron", decision="accepted")
    with pytest.raises(SignOffError, match="no such folder"):
        sign_folder(tmp_path / "nowhere", "L1", by="Dr Ada Byron", decision="accepted")


def test_a_record_that_was_changed_cannot_be_signed(out: Path) -> None:
    path = out / "pathways.jsonl"
    path.write_text(path.read_text().replace('"urgency":"U1"', '"urgency":"U9"'))
    with pytest.raises(SignOffError, match="not as it was written"):
        sign_folder(out, "L1", by="Dr Ada Byron", decision="accepted")


def test_a_tampered_log_stops_a_new_run_too(out: Path) -> None:
    run("sign", out, "--lesion", "L1", *ADA, "--decision", "accepted")
    log = out / "audit.jsonl"
    log.write_text(log.read_text().replace("Ada", "Eve"))
    before = (out / "pathways.jsonl").read_bytes()
    code, text = run(*inputs(out.parent, PATIENTS.replace("31", "64")), "--out", out)
    assert code == 1
    assert "line 1 was changed" in text
    assert (out / "pathways.jsonl").read_bytes() == before


def test_a_file_in_the_place_of_the_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    code, text = run(*inputs(tmp_path), "--out", tmp_path / "out")
    assert code == 1
    assert "is a file" in text
