"""A finished batch as a dermatologist works through it: work list, lesion, pictures, case, signature, exports."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from serve_parts import THRESHOLDS, FakeBackend, a_finding, a_jpeg, save_servable, small_options

from dermaflow.pathways.outputs.folder import read_folder
from dermaflow.pathways.run import recommend_files
from dermaflow.pathways.signoff import read_log
from dermaflow.schemas.finding import Finding, findings_table
from dermaflow.scoring.plan import Options as BulkOptions
from dermaflow.scoring.planning import begin, resolve_model
from serve.ingress import Service, make_app
from serve.results import flagged

MEL = {"p_mel": 0.6, "p_nv": 0.3, "p_akiec": 0.02, "p_bcc": 0.02, "p_bkl": 0.02, "p_df": 0.02, "p_vasc": 0.02,
       "prediction": "mel", "conformal_set": ["mel", "nv"], "p_malignant": 0.64}  # fmt: skip
NOTHING = {f"p_{c}": None for c in ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")} | {
    "prediction": None, "conformal_set": None, "p_malignant": None, "status": "failed", "reason": "empty: no bytes",
}  # fmt: skip
PATIENTS = "patient_id,lesion_id,age,site\nP1,L1,70,face\nP1,L2,70,back\np/2,L3,33,back\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_servable(tmp_path_factory.mktemp("model") / "m")


def a_batch(service: Service, model: Path, patients: str | None = PATIENTS) -> str:
    """A finished batch of five images of four lesions, made without Ray."""
    folder = service.options.state / "batches" / "b1"
    source, out = folder / "images", folder / "out"
    source.mkdir(parents=True)
    for name in ("a/1", "2", "3", "4"):
        (source / f"{name}.jpg").parent.mkdir(exist_ok=True)
        (source / f"{name}.jpg").write_bytes(a_jpeg(len(name)))
    (source / "=5.jpg").write_bytes(b"")
    found = resolve_model(str(model))
    begin(str(source), str(out), found, None, BulkOptions())
    known = {"model": found.name, "model_sha256": found.sha256}
    ids = pq.read_table(out / "inputs.parquet")["image_id"].to_pylist()
    assert sorted(ids) == ["1", "2", "3", "4", "=5"]
    lesions = {"1": ("L1", MEL), "2": ("L2", {}), "3": ("L3", {}), "4": ("L3", {}), "=5": (None, NOTHING)}
    findings = [Finding(**(a_finding(id, lesions[id][0]) | lesions[id][1] | known)) for id in ids]
    pq.write_table(findings_table(findings), out / "findings.parquet")
    if patients:
        (folder / "patients.csv").write_text(patients)
        recommend_files(out / "findings.parquet", folder / "patients.csv", out / "pathways", model=model,
                        allow_unmatched=True)  # fmt: skip
    row = {"name": found.bundle.name, "version": "tiny-1", "sha256": found.sha256, "uri": str(model)}
    service.jobs.add(id="b1", name="b", source=str(source), patients=None, out=str(out), model=row, caller="x")
    service.jobs.begin("b1")
    service.jobs.finish("b1")
    service.remember(found.sha256, THRESHOLDS)
    return "/v1/batches/b1"


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    service = Service(small_options(tmp_path / "state"), FakeBackend())
    with TestClient(make_app(service), base_url="http://127.0.0.1") as found:
        found.service = service  # type: ignore[attr-defined]
        yield found


def pathways(client: TestClient) -> dict[str, Any]:
    found, cases, _ = read_folder(client.service.options.state / "batches/b1/out/pathways")  # type: ignore[attr-defined]
    assert [p.lesion_id for p in found] == [c.lesion.lesion_id for c in cases]
    table = pq.read_table(client.service.options.state / "batches/b1/out/pathways/pathways.parquet")  # type: ignore[attr-defined]
    assert table["lesion_id"].to_pylist() == [p.lesion_id for p in found]
    assert table["urgency"].to_pylist() == [p.urgency for p in found]
    assert table["status"].to_pylist() == [p.status for p in found]
    return {p.lesion_id: p for p in found}


def test_the_work_list_begins_with_the_most_urgent(client: TestClient, model: Path) -> None:
    at = a_batch(client.service, model)  # type: ignore[attr-defined]
    listed = client.get(f"{at}/worklist").json()
    assert listed["total"] == 4
    entries = {entry["lesion_id"]: entry for entry in listed["lesions"]}
    urgencies = [entry["urgency"] for entry in listed["lesions"]]
    assert urgencies == sorted(urgencies)
    assert listed["lesions"][0]["lesion_id"] == "L1"
    assert entries["L1"]["flagged"] and not entries["L2"]["flagged"]
    assert (entries["L1"]["patient_id"], entries["=5"]["patient_id"]) == ("P1", None)
    assert entries["=5"]["status"] == "failed"
    page = client.get(f"{at}/worklist?limit=1&offset=1").json()
    assert (page["total"], [e["lesion_id"] for e in page["lesions"]]) == (4, [listed["lesions"][1]["lesion_id"]])


def test_without_patients_what_is_flagged_comes_first_and_what_was_not_read_before_the_rest(
    client: TestClient, model: Path
) -> None:
    at = a_batch(client.service, model, None)  # type: ignore[attr-defined]
    listed = client.get(f"{at}/worklist").json()["lesions"]
    assert [entry["lesion_id"] for entry in listed] == ["L1", "=5", "L2", "L3"]
    assert {entry["urgency"] for entry in listed} == {None}


def test_one_lesion_is_all_its_images_its_pathway_and_its_case(client: TestClient, model: Path) -> None:
    at = a_batch(client.service, model)  # type: ignore[attr-defined]
    found = client.get(f"{at}/lesions/L3").json()
    assert [finding["image_id"] for finding in found["findings"]] == ["3", "4"]
    assert (found["patient"]["patient_id"], found["lesion"]["site"], found["pathway"]["lesion_id"]) == (
        "p/2",
        "back",
        "L3",
    )
    assert client.get(f"{at}/lesions/none").status_code == 404
    assert client.get(f"{at}/lesions/=5").json()["findings"][0]["status"] == "failed"


def test_a_picture_is_encoded_anew_and_explained(client: TestClient, model: Path) -> None:
    at = a_batch(client.service, model)  # type: ignore[attr-defined]
    picture = client.get(f"{at}/images/1")
    assert picture.headers["content-type"] == "image/jpeg"
    assert picture.content != a_jpeg(3)
    assert Image.open(io.BytesIO(picture.content)).size == (200, 150)
    assert client.get(f"{at}/images/1/explanation").json()["diagnosis"] == "nv"
    for image_id in ("none", "=5", "..%2f..%2fplan.json"):
        assert client.get(f"{at}/images/{image_id}").status_code == 404


def test_results_come_in_every_format(client: TestClient, model: Path) -> None:
    at = a_batch(client.service, model)  # type: ignore[attr-defined]
    table = pq.read_table(io.BytesIO(client.get(f"{at}/results").content))
    ids = table["image_id"].to_pylist()
    lines = client.get(f"{at}/results?format=jsonl").text.splitlines()
    assert [json.loads(line)["image_id"] for line in lines] == ids
    text = client.get(f"{at}/results?format=csv").text
    assert "\r\n'=5," in text  # a spreadsheet would run it
    bundles = [json.loads(line) for line in client.get(f"{at}/results?format=fhir").text.splitlines()]
    assert {bundle["resourceType"] for bundle in bundles} == {"Bundle"}
    assert client.get(f"{at}/results?format=exe").status_code == 422
    failures = client.get(f"{at}/failures").json()
    assert failures == {"total": 1, "failures": [{"image_id": "=5", "status": "failed", "reason": "empty: no bytes"}]}


def test_a_signature_is_kept_and_lapses_when_the_case_changes(client: TestClient, model: Path) -> None:
    at = a_batch(client.service, model)  # type: ignore[attr-defined]
    body = {"batch_id": "b1", "lesion_id": "L1", "by": "Dr Ada Byron", "decision": "accepted"}
    signed = client.post("/v1/reviews", json=body)
    assert signed.status_code == 201, signed.text
    assert (signed.json()["pathway"]["status"], signed.json()["sequence"]) == ("final", 1)
    assert signed.json()["sha256"] == signed.json()["entry"]["sha256"]
    assert client.post("/v1/reviews", json=body | {"lesion_id": "L3"}).json()["sequence"] == 2
    for wrong, status in (({"decision": "rejected"}, 422), ({"lesion_id": "none"}, 404), ({"batch_id": "none"}, 404),
                          ({"by": "7"}, 422), ({"decision": "maybe"}, 422), ({"reason": 7}, 422)):  # fmt: skip
        assert client.post("/v1/reviews", json=body | {"lesion_id": "L2"} | wrong).status_code == status, wrong
    seen = client.get(f"{at}/lesions/L1").json()
    assert seen["pathway"]["status"] == "final"
    case = {"patient": seen["patient"] | {"age": 31, "pregnant": "yes"}, "lesion": seen["lesion"]}
    changed = client.put(f"{at}/lesions/L1/case", json=case)
    assert changed.status_code == 200, changed.text
    assert (changed.json()["pathway"]["status"], changed.json()["patient"]["pregnant"]) == ("preliminary", "yes")
    assert client.get(f"{at}/lesions/L2").json()["patient"]["age"] == 31  # the same person
    after = pathways(client)
    assert after["L3"].status == "final"  # nobody touched it
    entry = next(e for e in client.get(f"{at}/worklist").json()["lesions"] if e["lesion_id"] == "L1")
    assert entry["signed"] is None
    log = read_log(client.service.options.state / "batches/b1/out/pathways")  # type: ignore[attr-defined]
    assert [line.lesion_id for line in log] == ["L1", "L3"]


def test_a_case_that_stays_the_same_keeps_its_signature(client: TestClient, model: Path) -> None:
    at = a_batch(client.service, model)  # type: ignore[attr-defined]
    body = {"batch_id": "b1", "lesion_id": "L1", "by": "Dr Ada Byron", "decision": "accepted"}
    client.post("/v1/reviews", json=body)
    before = client.get(f"{at}/lesions/L1").json()
    again = client.put(f"{at}/lesions/L1/case", json={"patient": before["patient"], "lesion": before["lesion"]})
    assert again.json() == before


def test_a_lesion_may_change_its_patient(client: TestClient, model: Path) -> None:
    at = a_batch(client.service, model)  # type: ignore[attr-defined]
    case = {"patient": {"patient_id": "P1", "age": 70}, "lesion": {"lesion_id": "L3", "site": "back"}}
    assert client.put(f"{at}/lesions/L3/case", json=case).status_code == 200
    found = pathways(client)
    assert found["L3"].patient_id == "P1"
    bundles = client.get(f"{at}/results?format=fhir").text
    assert "p/2" not in bundles  # nothing is left of the one who has no lesion here any more
    assert client.put(f"{at}/lesions/L2/case", json=case).status_code == 409
    lost = case | {"lesion": {"lesion_id": "none"}}
    assert client.put(f"{at}/lesions/none/case", json=lost).status_code == 404


def test_a_case_can_be_entered_where_there_was_no_table_of_patients(client: TestClient, model: Path) -> None:
    at = a_batch(client.service, model, None)  # type: ignore[attr-defined]
    assert client.get(f"{at}/results?format=fhir").status_code == 409
    review = {"batch_id": "b1", "lesion_id": "L2", "by": "Dr Ada Byron", "decision": "accepted"}
    assert client.post("/v1/reviews", json=review).status_code == 409
    for lesion in ("L2", "=5"):
        case = {"patient": {"patient_id": "P9"}, "lesion": {"lesion_id": lesion, "changing": "yes"}}
        assert client.put(f"{at}/lesions/{lesion}/case", json=case).status_code == 200
    assert set(pathways(client)) == {"L2", "=5"}
    assert client.get(at).json()["has_pathways"]
    assert client.post("/v1/reviews", json=review).status_code == 201
    assert len(client.get(f"{at}/results?format=fhir").text.splitlines()) == 1


def test_flags_are_those_of_the_policy() -> None:
    from dermaflow.trust.lesions import merge_lesions

    quiet, loud = (merge_lesions([Finding(**a_finding(**change))])[0] for change in ({}, MEL))
    assert flagged(loud, {})
    assert not flagged(quiet, {})
    assert flagged(quiet, {"policy_mel_threshold": 0.02})
    assert flagged(quiet, {"policy_malignant_threshold": 0.05})
    both = merge_lesions([Finding(**a_finding(conformal_set=["bcc", "nv"]))])[0]
    assert flagged(both, {"policy_use_set": 1.0}) and not flagged(both, {})
