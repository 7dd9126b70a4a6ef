"""The ingress alone: routes, limits, headers, errors and what is written down, with a backend that answers at once."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image
from serve_parts import LESION, PATIENT, FakeBackend, a_finding, a_jpeg, small_options

from serve.access import add_key
from serve.errors import busy
from serve.guard import SECURITY
from serve.ingress import Service, make_app
from serve.jobs import JobStore

pytest.importorskip("python_multipart")

JPEG = a_jpeg()


def client_of(options: Any, backend: FakeBackend | None = None) -> TestClient:
    service = Service(options, backend or FakeBackend())
    client = TestClient(make_app(service), base_url="http://127.0.0.1")
    client.service = service  # type: ignore[attr-defined]
    return client


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    with client_of(small_options(tmp_path / "state")) as found:
        yield found


def form(*contents: bytes, field: str = "images", name: str = "lesion.jpg") -> list[tuple[str, tuple[str, bytes, str]]]:
    return [(field, (f"{i}-{name}", content, "image/jpeg")) for i, content in enumerate(contents)]


def bodies(*contents: bytes) -> dict[str, Any]:
    return {"images": [{"image_id": f"I{i}", "data": base64.b64encode(c).decode()} for i, c in enumerate(contents)]}


def error_of(response: Any) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"code", "message", "expected", "todo", "request_id"}
    assert error["request_id"] == response.headers["x-request-id"]
    return error


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "state/audit/requests.jsonl").read_text().splitlines()]


def test_classify_takes_a_form_and_json(client: TestClient) -> None:
    response = client.post("/v1/classify", files=form(JPEG, JPEG))
    assert response.status_code == 200
    assert [f["image_id"] for f in response.json()["findings"]] == ["0-lesion", "1-lesion"]
    backend: FakeBackend = client.service.backend  # type: ignore[attr-defined]
    assert backend.images == [JPEG, JPEG]
    body = bodies(JPEG)
    body["images"][0]["lesion_id"] = "L7"
    response = client.post("/v1/classify", json=body)
    assert response.json()["findings"][0]["lesion_id"] == "L7"
    assert response.json()["model"] == {"name": "tiny", "version": "tiny-aaaaaaaaaa", "sha256": "a" * 64}


def test_every_answer_has_its_headers(client: TestClient) -> None:
    for response in (client.get("/healthz"), client.get("/nowhere"), client.post("/v1/classify", content=b"x")):
        for name, text in SECURITY.items():
            assert response.headers[name] == text
        assert response.headers["x-model-version"]
        assert response.headers["x-request-id"]
    assert client.get("/v1/model").headers["x-model-version"] == "tiny-aaaaaaaaaa"
    assert client.get("/healthz", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert client.get("/healthz", headers={"x-request-id": "<b>"}).headers["x-request-id"] != "<b>"


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        ({"content": b"{}", "headers": {"content-type": "text/plain"}}, 415),
        ({"content": b"{", "headers": {"content-type": "application/json"}}, 400),
        ({"content": b"", "headers": {"content-type": "application/json"}}, 400),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data; boundary=b"}}, 400),
        ({"content": b"--b\r\nContent-Disposition: form-data; name=images; filename=a\r\n\r\nhalf",
          "headers": {"content-type": "multipart/form-data; boundary=b"}}, 400),
        ({"files": form(JPEG, field="pictures")}, 422),
        ({"data": {"images": "text"}, "files": form(JPEG)}, 422),
        ({"files": form(*[JPEG] * 4)}, 413),
        ({"files": form(b"x" * 100_001)}, 413),
        ({"content": b"x" * 200_001, "headers": {"content-type": "application/json"}}, 413),
        ({"json": {"images": [{"image_id": "a", "data": "%%%"}]}}, 422),
        ({"json": {"images": []}}, 422),
        ({"json": {"images": [{"image_id": "a", "data": "", "sql": "'; DROP TABLE x"}]}}, 422),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_its_status(client: TestClient, sent: dict[str, Any], status: int) -> None:
    response = client.post("/v1/classify", **sent)
    assert response.status_code == status, response.text
    assert "DROP" not in error_of(response)["message"]


def test_the_limit_holds_for_a_body_that_does_not_say_its_length(client: TestClient) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(100):
            yield b"x" * 10_000

    response = client.post("/v1/classify", content=endless(), headers={"content-type": "application/json"})
    assert response.status_code == 413


def test_pixels_of_a_request_are_bounded_before_anything_is_decoded(client: TestClient) -> None:
    stream = io.BytesIO()
    Image.new("L", (1000, 300)).save(stream, "PNG")
    response = client.post("/v1/classify", files=form(stream.getvalue()))
    assert response.status_code == 413
    assert "pixels" in error_of(response)["message"]
    # what is no image costs nothing: it becomes a finding with its reason
    assert client.post("/v1/classify", files=form(b"", b"GIF89a")).status_code == 200


def test_recommend_gives_pathways_for_the_model_that_made_the_findings(client: TestClient) -> None:
    case = {"patient": PATIENT, "lesion": LESION, "findings": [a_finding()]}
    response = client.post("/v1/recommend", json={"cases": [case]})
    assert response.status_code == 200, response.text
    [pathway] = response.json()["pathways"]
    assert (pathway["lesion_id"], pathway["status"], pathway["image_ids"]) == ("L1", "preliminary", ["I1"])
    assert pathway["versions"]["thresholds"]["mel"] == 0.08
    case["findings"] = [a_finding(model_sha256="b" * 64)]
    other = client.post("/v1/recommend", json={"cases": [case]})
    assert other.status_code == 409
    assert error_of(other)["code"] == "other_model"
    case["findings"] = []
    assert client.post("/v1/recommend", json={"cases": [case]}).json()["pathways"][0]["basis"] == "none"
    assert client.post("/v1/recommend", json={"cases": [case] * 4}).status_code == 413


def test_assess_is_both_in_one(client: TestClient) -> None:
    data = base64.b64encode(JPEG).decode()
    cases = [{"patient": PATIENT, "lesion": {"lesion_id": f"L{i}"}, "images": [{"image_id": f"I{i}", "data": data}]}
             for i in range(2)]  # fmt: skip
    found = client.post("/v1/assess", json={"cases": cases}).json()
    assert [f["lesion_id"] for f in found["findings"]] == ["L0", "L1"]
    assert [(p["lesion_id"], p["image_ids"]) for p in found["pathways"]] == [("L0", ["I0"]), ("L1", ["I1"])]


def test_explain_sends_the_map_as_base64(client: TestClient) -> None:
    found = client.post("/v1/explain", json={"image": bodies(JPEG)["images"][0]}).json()
    assert base64.b64decode(found["overlay"]) == b"png"
    assert client.post("/v1/explain", json={"image": bodies(JPEG)["images"][0], "diagnosis": "x"}).status_code == 422


def test_the_model_and_the_fields_are_described(client: TestClient) -> None:
    model = client.get("/v1/model").json()
    assert model["metrics"] == {"accuracy": None}  # JSON has no NaN
    assert "uri" not in model
    fields = client.get("/v1/fields").json()
    age = next(field for field in fields["patient"] if field["name"] == "age")
    assert (age["type"], age["min"], age["max"], age["unit"]) == ("number", 0, 120, "years")
    kinds = {field["name"]: (field["type"], field["choices"]) for field in [*fields["patient"], *fields["lesion"]]}
    assert kinds["pregnant"] == ("choice", ["yes", "no", "unknown"])
    assert kinds["allergies"][0] == "choices"
    assert "patient_id" not in kinds


def test_too_many_at_once_is_503_with_a_time_and_passes(tmp_path: Path) -> None:
    backend = FakeBackend()
    with client_of(small_options(tmp_path / "state"), backend) as client:
        backend.fails = busy()
        response = client.post("/v1/classify", files=form(JPEG))
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) >= 1
        backend.fails = None
        assert client.post("/v1/classify", files=form(JPEG)).status_code == 200


def test_the_ingress_itself_takes_only_so_many(tmp_path: Path) -> None:
    import httpx

    class Slow(FakeBackend):
        async def classify(self, *arguments: Any) -> dict[str, Any]:
            await asyncio.sleep(0.5)
            return await super().classify(*arguments)

    app = make_app(Service(small_options(tmp_path / "state"), Slow()))

    async def ask() -> list[int]:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            answers = await asyncio.gather(*(client.post("/v1/classify", files=form(JPEG)) for _ in range(10)))
            assert (await client.get("/healthz")).status_code == 200
            return [answer.status_code for answer in answers]

    assert sorted(asyncio.run(ask())) == [200] * 4 + [503] * 6


def test_what_takes_too_long_is_given_up(tmp_path: Path) -> None:
    class Stuck(FakeBackend):
        async def classify(self, *arguments: Any) -> dict[str, Any]:
            await asyncio.sleep(60)
            raise AssertionError

    options = small_options(tmp_path / "state")
    options = options.model_copy(update={"limits": options.limits.model_copy(update={"timeout": 0.2})})
    with client_of(options, Stuck()) as client:
        response = client.post("/v1/classify", files=form(JPEG))
    assert (response.status_code, error_of(response)["code"]) == (503, "timeout")


def test_an_error_of_our_own_says_nothing_of_the_inside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    backend = FakeBackend()
    backend.fails = ZeroDivisionError("patient Josephine")
    with client_of(small_options(tmp_path / "state"), backend) as client:
        response = client.post("/v1/classify", files=form(JPEG))
    assert (response.status_code, error_of(response)["code"]) == (500, "internal")
    assert "Josephine" not in response.text + caplog.text
    assert "Traceback" not in response.text


def test_the_audit_log_says_who_asked_what_and_nothing_of_whom(tmp_path: Path) -> None:
    with client_of(small_options(tmp_path / "state")) as client:
        client.post("/v1/classify", files=form(JPEG, name="josephine.jpg"))
        client.post("/v1/recommend", json={"cases": [{"patient": PATIENT | {"patient_id": "josephine"},
                                                      "lesion": LESION, "findings": []}]})  # fmt: skip
        client.get("/v1/batches/josephine/lesions/josephine")
        client.get("/healthz")
    found = lines(tmp_path)
    assert [(line["route"], line["status"]) for line in found] == [
        ("/v1/classify", 200), ("/v1/recommend", 200), ("/v1/batches/{batch_id}/lesions/{lesion_id:path}", 404),
    ]  # fmt: skip
    assert found[0]["counts"] == {"images": 1, "ok": 1}
    assert found[0]["caller"] == "loopback"
    assert found[0]["model"] == "tiny-aaaaaaaaaa"
    assert "josephine" not in json.dumps(found)


def test_nothing_is_answered_that_cannot_be_written_down(tmp_path: Path) -> None:
    with client_of(small_options(tmp_path / "state")) as client:
        service: Service = client.service  # type: ignore[attr-defined]
        service.audit.path = tmp_path / "no such folder" / "log"
        response = client.post("/v1/classify", files=form(JPEG))
        assert (response.status_code, error_of(response)["code"]) == (503, "audit")


def test_figures_have_routes_and_states_and_no_ids(client: TestClient) -> None:
    client.post("/v1/classify", files=form(JPEG, JPEG, name="josephine.jpg"))
    client.get("/v1/batches/josephine")
    text = client.get("/metrics").text
    assert 'dermaflow_requests_total{method="POST",route="/v1/classify",status="200"} 1.0' in text
    assert 'dermaflow_images_total{status="ok"} 2.0' in text
    assert "dermaflow_batch_images_sum 2.0" in text
    assert "josephine" not in text


def test_a_page_of_elsewhere_does_not_reach_an_open_service(client: TestClient) -> None:
    for headers in ({"host": "evil.example"}, {"origin": "https://evil.example"}, {"origin": "null"}):
        response = client.post("/v1/classify", files=form(JPEG), headers=headers)
        assert (response.status_code, error_of(response)["code"]) == (403, "stranger")
    assert (
        client.get("/healthz", headers={"host": "localhost:8000", "origin": "http://127.0.0.1:8000"}).status_code == 200
    )


def test_keys_open_what_their_scopes_say(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    secrets = {
        scope: add_key(keys, scope, [scope]) for scope in ("classify", "recommend", "batches", "review", "metrics")
    }
    secrets["old"] = add_key(keys, "old", ["classify"], days=0)
    calls = {
        "classify": ("POST", "/v1/classify"), "recommend": ("POST", "/v1/recommend"), "batches": ("GET", "/v1/batches"),
        "review": ("POST", "/v1/reviews"), "metrics": ("GET", "/metrics"),
    }  # fmt: skip
    with client_of(small_options(tmp_path / "state", open=False, keys=keys)) as client:
        for scope, (method, path) in calls.items():
            for name in calls:
                response = client.request(method, path, headers={"authorization": f"Bearer {secrets[name]}"})
                assert (response.status_code == 403) == (name != scope), (scope, name, response.text)
                assert response.status_code != 401
            assert client.request(method, path).status_code == 401
            assert client.request(method, path, headers={"x-api-key": "dfk_wrong"}).status_code == 401
            assert client.request(method, path, headers={"x-api-key": secrets["old"]}).status_code == 401
        for path in ("/healthz", "/readyz", "/openapi.json", "/cds-services"):
            assert client.get(path).status_code == 200
        assert client.get("/v1/model").status_code == 401
        assert client.get("/v1/model", headers={"x-api-key": secrets["review"]}).status_code == 200
        # a host of elsewhere is no matter where a key is asked for
        assert client.get("/healthz", headers={"host": "dermaflow.example"}).status_code == 200


def test_openapi_is_what_a_client_can_be_made_of(client: TestClient) -> None:
    schema = client.get("/openapi.json").json()
    operations = [(path, method, op) for path, methods in schema["paths"].items() for method, op in methods.items()]
    ids = [op["operationId"] for _, _, op in operations]
    assert len(ids) == len(set(ids)) >= 20
    assert all(id.isidentifier() for id in ids)
    for path, method, op in operations:
        assert "503" in op["responses"], path
        if method in ("post", "put"):
            assert "application/json" in op["requestBody"]["content"], path
    text = json.dumps(schema)
    for reference in {part.split('"')[0] for part in text.split('"#/components/schemas/')[1:]}:
        assert reference in schema["components"]["schemas"]
    assert "HTTPValidationError" not in text
    assert schema["components"]["schemas"]["ClassifyResponse"]["properties"]["findings"]
    assert set(schema["components"]["securitySchemes"]) == {"bearer", "key"}


def test_what_is_not_there_is_404_and_a_wrong_method_405(client: TestClient) -> None:
    for path in ("/v1/nothing", "/v1/batches/none", "/v1/batches/none/results", "/static/../app.py",
                 "/static/..%2fapp.py",
                 "/static/none.js", "/docs"):  # fmt: skip
        response = client.get(path)
        assert response.status_code == 404, path
        error_of(response)
    assert client.get("/v1/classify").status_code == 405
    assert client.get("/v1/batches/none/results?format=exe").status_code in (404, 422)


# --- batches --------------------------------------------------------------------------------------------------------


def a_zip(*names: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in names:
            archive.writestr(name, JPEG)
    return stream.getvalue()


def upload(client: TestClient, name: str, content: bytes, **others: tuple[str, bytes]) -> Any:
    files = {"archive": (name, content), **others}
    return client.post("/v1/batches", files=files)


def jobs(client: TestClient) -> JobStore:
    return client.service.jobs  # type: ignore[attr-defined,no-any-return]


def test_an_upload_becomes_a_batch_under_a_name_of_our_own(client: TestClient, tmp_path: Path) -> None:
    content = a_zip("a.jpg")
    response = upload(
        client, "../../etc/<b>clinic</b>.zip", content, patients=("p.csv", b"patient_id,lesion_id\nP,L\n")
    )
    assert response.status_code == 202, response.text
    batch = response.json()
    assert (batch["state"], batch["name"], batch["total"], batch["has_pathways"]) == ("queued", "b>.zip", None, False)
    job = jobs(client).get(batch["id"])
    assert job is not None
    assert Path(job.source).read_bytes() == content
    assert Path(job.source).name == "archive.zip"
    assert Path(job.source).is_relative_to(tmp_path / "state" / "batches" / batch["id"])
    assert job.patients is not None and job.patients.endswith("patients.csv")
    assert client.service.backend.added == 1  # type: ignore[attr-defined]
    assert [b["id"] for b in client.get("/v1/batches").json()["batches"]] == [batch["id"]]


def test_images_become_a_folder_with_each_name_once(client: TestClient) -> None:
    files = [("images", (name, JPEG)) for name in ("a.jpg", "x/a.jpg", ".hidden.jpg")]
    batch = client.post("/v1/batches", files=files).json()
    job = jobs(client).get(batch["id"])
    assert job is not None
    assert sorted(path.name for path in Path(job.source).iterdir()) == ["a-2.jpg", "a.jpg", "hidden.jpg"]
    assert batch["name"] == "3 images"


def with_count(content: bytes, count: int) -> bytes:
    """A .zip whose end record says that it has so many members."""
    at = content.rfind(b"PK\5\6")
    return content[: at + 8] + struct.pack("<HH", count, count) + content[at + 12 :]


@pytest.mark.parametrize(
    ("files", "status"),
    [
        ({"archive": ("a.exe", b"MZ")}, 415),
        ({"archive": ("uris.csv", b"uri\n/etc/passwd\n")}, 415),  # it could name whatever the service can read
        ({"archive": ("a.zip", b"no zip")}, 422),
        ({"archive": ("a.zip", a_zip("a.jpg")[:-30])}, 422),
        ({"archive": ("a.zip", with_count(a_zip("a.jpg"), 60_000))}, 413),
        ({"archive": ("a.tar", b"x" * 300_001)}, 413),
        ({"archive": ("a.zip", a_zip("a.jpg")), "patients": ("p.exe", b"")}, 415),
        ({"archive": ("a.zip", a_zip("a.jpg")), "patients": ("p.csv", b"x" * 5001)}, 413),
        ({"patients": ("p.csv", b"patient_id,lesion_id\n")}, 422),
        ({"images": ("x.parquet", b"PAR1")}, 415),
        ({"archive": ("a.zip", a_zip("a.jpg")), "images": ("x.jpg", JPEG)}, 422),
        ({"other": ("x.jpg", JPEG)}, 422),
    ],
)  # fmt: skip
def test_an_upload_that_is_refused_leaves_nothing(
    client: TestClient, tmp_path: Path, files: dict[str, Any], status: int
) -> None:
    response = client.post("/v1/batches", files=files)
    assert response.status_code == status, response.text
    error_of(response)
    assert not jobs(client).list()
    assert [path for path in (tmp_path / "state" / "batches").rglob("*") if path.is_file()] == []


def test_four_images_are_too_many_here(client: TestClient) -> None:
    response = client.post("/v1/batches", files=[("images", (f"{i}.jpg", b"x")) for i in range(4)])
    assert response.status_code == 413


def test_a_source_may_only_be_named_where_the_service_allows_it(tmp_path: Path) -> None:
    inside, outside = tmp_path / "archive", tmp_path / "archive-secret"
    for folder in (inside, outside):
        folder.mkdir()
        (folder / "a.jpg").write_bytes(JPEG)
    (inside / "link").symlink_to(outside)
    options = small_options(tmp_path / "state", sources=(str(inside), "s3://bucket/images"))
    with client_of(options) as client:

        def ask(source: str, **others: str) -> int:
            return client.post("/v1/batches", json={"source": source, **others}).status_code

        assert ask(str(inside)) == 202
        assert ask(str(inside / "a.jpg")) == 202
        for source in (str(outside), f"{inside}/../archive-secret", str(inside / "link"), "/etc/passwd", "s3://bucket/other",
                       "s3://bucket/images/../other", "s3://bucket/images/%2e%2e/other", "s3://bucket/images-2",
                       "s3://key:secret@bucket/images", "s3://bucket/images?endpoint_override=evil", "http://169.254.169.254/",
                       "file:///etc/passwd", "gs://x/y"):  # fmt: skip
            assert ask(source) == 403, source
        assert ask(str(inside), patients=str(outside / "p.csv")) == 403
        assert ask(str(inside / "none")) == 404
        assert ask("a\x00b") == 422


def test_a_batch_can_be_cancelled_while_it_waits(client: TestClient) -> None:
    id = upload(client, "a.zip", a_zip("a.jpg")).json()["id"]
    response = client.delete(f"/v1/batches/{id}")
    assert (response.status_code, response.json()["state"]) == (202, "cancelled")
    assert client.delete(f"/v1/batches/{id}").json()["state"] == "cancelled"
    assert client.get(f"/v1/batches/{id}/results").status_code == 409
    events = client.get(f"/v1/batches/{id}/events").text
    assert events.startswith("event: progress\ndata: {")
    assert json.loads(events.split("data: ")[-1])["state"] == "cancelled"


def test_only_so_many_batches_wait(tmp_path: Path) -> None:
    options = small_options(tmp_path / "state")
    options = options.model_copy(update={"limits": options.limits.model_copy(update={"queued": 2})})
    with client_of(options) as client:
        codes = [upload(client, "a.zip", a_zip("a.jpg")).status_code for _ in range(3)]
    assert codes == [202, 202, 503]


def test_a_full_disk_is_503_and_leaves_nothing(tmp_path: Path) -> None:
    options = small_options(tmp_path / "state")
    options = options.model_copy(update={"limits": options.limits.model_copy(update={"spare": 1 << 60})})
    with client_of(options) as client:
        response = upload(client, "a.zip", a_zip("a.jpg"))
    assert (response.status_code, error_of(response)["code"]) == (503, "storage")


def test_cds_hooks_are_described_and_called(client: TestClient) -> None:
    [first, *_] = client.get("/cds-services").json()["services"]
    body = {"hook": first["hook"], "hookInstance": "1", "context": {"patientId": "P1", "userId": "x"}}
    assert client.post(f"/cds-services/{first['id']}", json=body).json() == {"cards": []}
    body["prefetch"] = {
        "patient": {"resourceType": "Patient", "id": "P1", "birthDate": "1960-01-01", "gender": "female"},
        "lesions": {"resourceType": "Bundle", "type": "searchset", "entry": [
            {"resource": {"resourceType": "BodyStructure", "id": "L1", "patient": {"reference": "Patient/P1"}}}]},
    }  # fmt: skip
    response = client.post(f"/cds-services/{first['id']}", json=body)
    assert response.status_code == 200, response.text
    assert "PRELIMINARY" in response.json()["cards"][0]["summary"]
    assert client.post("/cds-services/other", json=body).status_code == 404
    assert client.post(f"/cds-services/{first['id']}", json=body | {"hook": "order-sign"}).status_code == 400
    report = {"feedback": [{"card": "c1", "outcome": "overridden", "outcomeTimestamp": "2026-01-01T00:00:00Z",
                            "overrideReason": {"reason": {"code": "clinical-judgement"},
                                               "userComment": "Josephine"}}]}  # fmt: skip
    assert client.post(f"/cds-services/{first['id']}/feedback", json=report).status_code == 200
    service: Service = client.service  # type: ignore[attr-defined]
    kept = service.audit.path.with_name("cds-feedback.jsonl").read_text()
    assert "clinical-judgement" in kept and "Josephine" not in kept
