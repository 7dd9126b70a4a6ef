"""The whole service on Ray Serve and loopback: answers, batches, faults, load and hostile input, over real HTTP."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from serve_parts import a_jpeg, a_zip, save_servable
from waiting import until

from dermaflow.ports import free_port

pytest.importorskip("python_multipart")
ray = pytest.importorskip("ray")

from dermaflow.preparation.cluster import disconnect  # noqa: E402
from dermaflow.schemas.finding import Finding  # noqa: E402
from serve import cli  # noqa: E402
from serve.access import SCOPES, add_key  # noqa: E402
from serve.models import Chosen, choose  # noqa: E402
from serve.options import Limits, Options  # noqa: E402
from serve.runner import NAMESPACE, dispatcher_name, runner_name  # noqa: E402

pytestmark = pytest.mark.timeout(1500)  # minutes where several things share the core; seconds by itself

IMAGES = [a_jpeg(seed) for seed in range(6)]


class World(NamedTuple):
    """A running service."""

    url: str
    port: int
    options: Options
    models: list[Chosen]
    key: str
    few: str  # a key that may only classify
    client: httpx.Client


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("serve")
    models = [choose(str(save_servable(root / f"model{seed}", seed))) for seed in range(2)]
    keys = root / "keys.json"
    key, few = add_key(keys, "all", SCOPES), add_key(keys, "few", ["classify"])
    (root / "allowed").mkdir()
    options = Options(
        model=models[0].uri, state=root / "state", keys=keys, sources=(str(root / "allowed"),), rate="1000000/minute",
        working=8, waiting=8, threads=1, batch=8,
        limits=Limits(body=4 << 20, images=16, upload=32 << 20, members=5000, spare=0, in_flight=48, timeout=30,
                      idle=5),
    )  # fmt: skip
    port = free_port()
    cli.start(options, models[0], "127.0.0.1", port)
    url = f"http://127.0.0.1:{port}"
    try:
        with httpx.Client(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=60) as client:
            yield World(url, port, options, models, key, few, client)
    finally:
        cli.stop()
        disconnect()


def form(*images: bytes) -> list[tuple[str, tuple[str, bytes]]]:
    return [("images", (f"I{i}.jpg", image)) for i, image in enumerate(images)]


def encoded(*images: bytes) -> list[dict[str, str]]:
    return [{"image_id": f"I{i}", "data": base64.b64encode(image).decode()} for i, image in enumerate(images)]


def submit(world: World, archive: bytes, patients: str | None = None, name: str = "clinic.zip") -> str:
    files: dict[str, Any] = {"archive": (name, archive)}
    if patients:
        files["patients"] = ("patients.csv", patients.encode())
    response = world.client.post("/v1/batches", files=files)
    assert response.status_code == 202, response.text
    return str(response.json()["id"])


def batch(world: World, id: str) -> dict[str, Any]:
    return world.client.get(f"/v1/batches/{id}").json()  # type: ignore[no-any-return]


def ended(world: World, id: str, seconds: float = 400) -> dict[str, Any]:
    return until(lambda: (b := batch(world, id))["state"] not in ("queued", "running") and b, seconds)  # type: ignore[no-any-return]


def rows(world: World, id: str, format: str = "parquet") -> Any:
    response = world.client.get(f"/v1/batches/{id}/results", params={"format": format})
    assert response.status_code == 200, response.text
    return pq.read_table(pa.BufferReader(response.content)) if format == "parquet" else response.text


# --- one request ----------------------------------------------------------------------------------------------------


def test_it_is_ready_and_says_which_model(world: World) -> None:
    assert world.client.get("/readyz").json() == {"status": "ok"}
    model = world.client.get("/v1/model").json()
    assert (model["version"], model["sha256"]) == (world.models[0].version, world.models[0].sha256)
    assert model["card"] == "# Card\n"


def test_images_are_classified_as_the_predictor_does(world: World) -> None:
    from dermaflow.bundles.bundle import load_bundle
    from dermaflow.scoring.predictor import Predictor

    broken = [b"", IMAGES[0][:600], b"GIF89a; DROP TABLE", IMAGES[1] + a_zip(1)]
    images = [*IMAGES[:3], *broken]
    response = world.client.post("/v1/classify", files=form(*images))
    assert response.status_code == 200, response.text
    assert response.headers["x-model-version"] == world.models[0].version
    assert len(response.headers.get_list("x-request-id")) == 1
    found = [Finding.model_validate(f) for f in response.json()["findings"]]
    expected = Predictor(load_bundle(world.models[0].uri)).predict(images, [f"I{i}" for i in range(len(images))])
    assert [f.status for f in found] == [f.status for f in expected]
    assert [f.status for f in found[3:6]] == [
        "failed"
    ] * 3  # empty, cut short, no image; the fourth is image and archive
    for one, other in zip(found, expected, strict=True):
        assert (one.image_id, one.prediction, one.reason) == (other.image_id, other.prediction, other.reason)
        if other.p_mel is not None:
            assert one.p_mel == pytest.approx(other.p_mel, abs=1e-4)
    assert {f.status for f in found} >= {"ok", "failed"}
    as_json = world.client.post("/v1/classify", json={"images": encoded(*images)}).json()["findings"]
    assert [f["prediction"] for f in as_json] == [f.prediction for f in found]


def test_recommend_assess_and_explain(world: World) -> None:
    case = {"patient": {"patient_id": "P1", "age": 70}, "lesion": {"lesion_id": "L1", "site": "face"}}
    assessed = world.client.post("/v1/assess", json={"cases": [case | {"images": encoded(*IMAGES[:2])}]})
    assert assessed.status_code == 200, assessed.text
    [pathway] = assessed.json()["pathways"]
    assert pathway["image_ids"] == ["I0", "I1"]
    findings = assessed.json()["findings"]
    again = world.client.post("/v1/recommend", json={"cases": [case | {"findings": findings}]}).json()["pathways"]
    assert again == [pathway]
    explained = world.client.post("/v1/explain", json={"image": encoded(IMAGES[0])[0], "diagnosis": "mel"}).json()
    assert explained["finding"]["status"] == "ok"
    assert Image.open(io.BytesIO(base64.b64decode(explained["overlay"]))).format == "PNG"
    nothing = world.client.post("/v1/explain", json={"image": encoded(b"x")[0]}).json()
    assert (nothing["finding"]["status"], nothing["overlay"], nothing["diagnosis"]) == ("failed", None, None)


def test_images_of_many_requests_are_scored_together(world: World) -> None:
    def batches() -> tuple[float, float]:
        found = dict(line.rsplit(" ", 1) for line in world.client.get("/metrics").text.splitlines() if line[:1] != "#")
        return float(found["dermaflow_batch_images_sum"]), float(found["dermaflow_batch_images_count"])

    before = batches()

    async def ask() -> None:
        async with httpx.AsyncClient(base_url=world.url, headers=world.client.headers, timeout=60) as client:
            # a heat map holds the network while the others arrive
            slow = client.post("/v1/explain", json={"image": encoded(IMAGES[0])[0]})
            await asyncio.gather(slow, *(client.post("/v1/classify", files=form(IMAGES[0])) for _ in range(12)))

    asyncio.run(ask())
    after = batches()
    assert (after[0] - before[0]) / (after[1] - before[1]) > 1.2


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [("/v1/classify", {}, 401), ("/v1/classify", {"authorization": "Bearer dfk_wrong"}, 401),
     ("/v1/batches", {"authorization": "FEW"}, 403), ("/healthz", {}, 200)],
)  # fmt: skip
def test_keys_hold_over_http(world: World, path: str, headers: dict[str, str], status: int) -> None:
    headers = {name: f"Bearer {world.few}" if text == "FEW" else text for name, text in headers.items()}
    response = httpx.request("GET" if path == "/healthz" else "POST", world.url + path, headers=headers)
    assert response.status_code == status
    if status >= 400:
        assert response.json()["error"]["request_id"] == response.headers["x-request-id"]


@pytest.mark.parametrize(
    ("path", "sent", "status"),
    [
        ("/v1/recommend", {"content": b'{"cases":[{"patient":{"patient_id":"P","age":NaN},"lesion":{"lesion_id":"L"},'
                                      b'"findings":[]}]}', "headers": {"content-type": "application/json"}}, 422),
        ("/v1/recommend", {"json": {"cases": [{"patient": {"patient_id": "'; DROP TABLE batches; --"}, "findings": [],
                                               "lesion": {"lesion_id": "<script>alert(1)</script>"}}]}}, 200),
        ("/v1/classify", {"content": b"x", "headers": {"content-type": "text/html"}}, 415),
        ("/v1/classify", {"content": b"x" * (5 << 20), "headers": {"content-type": "application/json"}}, 413),
        ("/v1/classify", {"files": form(*[b"x"] * 17)}, 413),
        ("/v1/batches", {"files": {"archive": ("a.zip", b"")}}, 422),
        ("/v1/batches", {"json": {"source": "/etc"}}, 403),
    ],
)  # fmt: skip
def test_hostile_requests_get_their_status(world: World, path: str, sent: dict[str, Any], status: int) -> None:
    response = world.client.post(path, **sent)
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"  # so nothing in it is ever run as a page


# --- batches --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scored(world: World) -> str:
    """A finished batch of 20 images, 3 of them no use, with patients for some."""
    extra = {"empty.jpg": b"", "cut.jpg": IMAGES[0][:500], "=cmd|calc.jpg": b"no image"}
    patients = "patient_id,lesion_id,age,site\nP1,L0,70,face\nP1,L1,70,back\nP2,L2,33,back\n"
    id = submit(world, a_zip(17, extra), patients)
    found = ended(world, id)
    assert found["state"] == "finished", found
    assert (found["total"], found["done"], found["failed"]) == (20, 20, 3)
    assert found["has_pathways"]
    return id


def test_every_image_is_in_the_results_once_in_every_format(world: World, scored: str) -> None:
    table = rows(world, scored)
    ids = table["image_id"].to_pylist()
    assert sorted(ids) == sorted([*(f"L{i}" for i in range(17)), "empty", "cut", "=cmd|calc"])
    assert [json.loads(line)["image_id"] for line in rows(world, scored, "jsonl").splitlines()] == ids
    text = rows(world, scored, "csv")
    assert text.count("\r\n") == 21
    assert "\r\n'=cmd|calc," in text  # a spreadsheet does not run it
    bundles = [json.loads(line) for line in rows(world, scored, "fhir").splitlines()]
    assert {bundle["resourceType"] for bundle in bundles} == {"Bundle"}
    failures = world.client.get(f"/v1/batches/{scored}/failures").json()
    assert {f["image_id"] for f in failures["failures"] if f["status"] == "failed"} == {"empty", "cut", "=cmd|calc"}
    assert all(f["reason"] for f in failures["failures"])


def test_the_events_of_a_batch_end_with_its_last_state(world: World, scored: str) -> None:
    with world.client.stream("GET", f"/v1/batches/{scored}/events") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        text = response.read().decode()
    assert json.loads(text.strip().rpartition("data: ")[2])["state"] == "finished"


def test_a_dermatologist_works_through_a_batch(world: World, scored: str) -> None:
    at = f"/v1/batches/{scored}"
    listed = world.client.get(f"{at}/worklist").json()["lesions"]
    assert len(listed) == 20
    urgencies = [entry["urgency"] for entry in listed if entry["urgency"]]
    assert urgencies == sorted(urgencies)
    lesion = world.client.get(f"{at}/lesions/L0").json()
    assert lesion["patient"]["age"] == 70 and lesion["lesion"]["site"] == "face"
    assert lesion["findings"][0]["image_id"] == "L0"
    signed = world.client.post("/v1/reviews", json={"batch_id": scored, "lesion_id": "L0", "by": "Dr Ada Byron",
                                                    "decision": "accepted"})  # fmt: skip
    assert signed.status_code == 201, signed.text
    assert (signed.json()["pathway"]["status"], signed.json()["sequence"]) == ("final", 1)
    assert len(signed.json()["sha256"]) == 64
    for wrong, status in (({"decision": "rejected"}, 422), ({"lesion_id": "none"}, 404), ({"batch_id": "none"}, 404),
                          ({"by": "7"}, 422), ({"decision": "maybe"}, 422)):  # fmt: skip
        body = {"batch_id": scored, "lesion_id": "L1", "by": "Dr Ada Byron", "decision": "accepted"} | wrong
        assert world.client.post("/v1/reviews", json=body).status_code == status, wrong
    case = {
        "patient": lesion["patient"] | {"pregnant": "yes", "age": 31},
        "lesion": lesion["lesion"] | {"bleeding": "yes"},
    }
    changed = world.client.put(f"{at}/lesions/L0/case", json=case)
    assert changed.status_code == 200, changed.text
    assert changed.json()["patient"]["pregnant"] == "yes"
    assert changed.json()["pathway"]["status"] == "preliminary"  # the signature was about another pathway
    assert world.client.get(f"{at}/lesions/L1").json()["patient"]["age"] == 31  # the same person
    assert world.client.get(f"{at}/lesions/L2").json()["patient"]["age"] == 33
    assert world.client.put(f"{at}/lesions/L1/case", json=case).status_code == 409
    entry = next(e for e in world.client.get(f"{at}/worklist").json()["lesions"] if e["lesion_id"] == "L0")
    assert entry["signed"] is None
    picture = world.client.get(f"{at}/images/L0")
    assert picture.headers["content-type"] == "image/jpeg"
    assert picture.content != IMAGES[0]
    assert Image.open(io.BytesIO(picture.content)).size == (200, 150)
    assert world.client.get(f"{at}/images/L0/explanation").json()["overlay"]
    assert world.client.get(f"{at}/images/empty").status_code == 404
    assert world.client.get(f"{at}/images/none").status_code == 404
    card = world.client.post("/cds-services/dermaflow-pathways-patient-view",
                             json={"hook": "patient-view", "hookInstance": "1",
                                   "context": {"patientId": "P1"}})  # fmt: skip
    assert len(card.json()["cards"]) >= 2


def test_a_case_can_be_entered_where_there_was_no_table_of_patients(world: World) -> None:
    files = [("images", (name, image)) for name, image in zip(("x 1.jpg", "y/2.jpg"), IMAGES, strict=False)]
    id = world.client.post("/v1/batches", files=files).json()["id"]
    assert ended(world, id)["state"] == "finished"
    assert {e["lesion_id"] for e in world.client.get(f"/v1/batches/{id}/worklist").json()["lesions"]} == {"x 1", "2"}
    assert world.client.get(f"/v1/batches/{id}/results?format=fhir").status_code == 409
    case = {"patient": {"patient_id": "P9"}, "lesion": {"lesion_id": "x 1", "changing": "yes"}}
    found = world.client.put(f"/v1/batches/{id}/lesions/x 1/case", json=case)
    assert found.status_code == 200, found.text
    assert found.json()["pathway"]["patient_id"] == "P9"
    assert batch(world, id)["has_pathways"]
    assert len(rows(world, id, "fhir").splitlines()) == 1


def test_a_batch_that_cannot_be_read_fails_with_its_reason(world: World) -> None:
    inside = Path(world.options.sources[0]) / "empty"
    inside.mkdir()
    id = world.client.post("/v1/batches", json={"source": str(inside)}).json()["id"]
    found = ended(world, id)
    assert found["state"] == "failed"
    assert found["error"] and str(world.options.state) not in found["error"]


def test_a_running_batch_can_be_cancelled_and_the_next_one_goes_on(world: World) -> None:
    first, second = submit(world, a_zip(800)), submit(world, a_zip(3))
    until(lambda: batch(world, first)["state"] == "running")
    assert batch(world, second)["state"] == "queued"
    assert world.client.delete(f"/v1/batches/{first}").status_code == 202
    assert ended(world, first)["state"] == "cancelled"
    assert ended(world, second)["state"] == "finished"


@pytest.mark.slow
def test_a_restart_of_serve_and_a_killed_runner_lose_and_repeat_nothing(world: World) -> None:
    id = submit(world, a_zip(1000))
    until(lambda: batch(world, id)["done"] > 0, 500, every=0.05)
    runner = ray.get_actor(runner_name(id), namespace=NAMESPACE)
    pid = ray.get(runner.process.remote(), timeout=30)
    os.kill(pid, signal.SIGSTOP)  # so that it cannot end while Serve does
    assert 0 < batch(world, id)["done"] < 1000
    from ray import serve

    serve.shutdown()
    os.kill(pid, signal.SIGKILL)  # it has outlived Serve
    ray.kill(ray.get_actor(dispatcher_name(world.options.database_url), namespace=NAMESPACE))
    cli.start(world.options, world.models[0], "127.0.0.1", world.port)
    until(lambda: _alive(world))
    found = ended(world, id)
    assert found["state"] == "finished", found
    ids = rows(world, id)["image_id"].to_pylist()
    assert (len(ids), len(set(ids))) == (1000, 1000)


def _alive(world: World) -> bool:
    try:
        return world.client.get("/readyz").status_code == 200
    except httpx.HTTPError:
        return False


# --- faults and load ------------------------------------------------------------------------------------------------


async def _load(world: World, clients: int, seconds: float, stop: asyncio.Event | None = None) -> Counter[int]:
    """So many clients that ask again as soon as they have an answer; answers by status."""
    seen: Counter[int] = Counter()
    end = time.monotonic() + seconds
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=world.url, headers=world.client.headers, timeout=60, limits=limits) as client:

        async def one(number: int) -> None:
            while time.monotonic() < end and not (stop and stop.is_set()):
                response = await client.post("/v1/classify", files=form(IMAGES[number % len(IMAGES)]))
                seen[response.status_code] += 1
                if response.status_code == 503:
                    assert int(response.headers["retry-after"]) >= 1
                    await asyncio.sleep(0.05)

        await asyncio.gather(*(one(number) for number in range(clients)))
    return seen


def _memory() -> int:
    """Bytes that the replicas and the proxy hold for themselves."""
    total = 0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # one that has just ended, a zombie among them
            name = "".join(process.cmdline())
            if "Replica" in name or "ProxyActor" in name:
                total += process.memory_full_info().uss
    return total


@pytest.mark.parametrize("seconds", [5, pytest.param(30, marks=pytest.mark.slow)])
def test_beyond_capacity_only_200_and_503_and_then_all_is_well(world: World, seconds: float) -> None:
    asyncio.run(_load(world, 64, 3))
    before = _memory()
    seen = asyncio.run(_load(world, 64, seconds))
    assert set(seen) == {200, 503}, seen
    assert before > 0 and _memory() < before + (50 << 20)
    assert asyncio.run(_load(world, 2, 1)).keys() == {200}


def test_a_killed_replica_costs_nobody_an_answer(world: World) -> None:
    from ray import serve

    classifier = serve.get_deployment_handle("Classifier", "dermaflow")
    pid = classifier.process.remote().result(timeout_s=120)

    async def run() -> Counter[int]:
        load = asyncio.create_task(_load(world, 4, 8))
        await asyncio.sleep(1)
        os.kill(pid, signal.SIGKILL)
        return await load

    seen = asyncio.run(run())
    assert set(seen) <= {200, 503}, seen
    until(lambda: world.client.post("/v1/classify", files=form(IMAGES[0])).status_code == 200)
    assert classifier.process.remote().result(timeout_s=120) != pid


def test_a_new_champion_takes_over_without_a_failed_request(world: World) -> None:
    versions: list[str] = []

    async def run() -> Counter[int]:
        load = asyncio.create_task(_load(world, 4, 6))
        await asyncio.sleep(0.5)
        await asyncio.to_thread(cli.deploy, world.options, world.models[1])
        return await load

    def version() -> str:
        return str(world.client.post("/v1/classify", files=form(IMAGES[0])).headers["x-model-version"])

    from ray import serve

    classifier = serve.get_deployment_handle("Classifier", "dermaflow")
    pid = classifier.process.remote().result(timeout_s=120)
    versions.append(version())
    seen = asyncio.run(run())
    until(lambda: version() == world.models[1].version)
    assert versions == [world.models[0].version]
    assert set(seen) == {200}, seen
    assert classifier.process.remote().result(timeout_s=120) == pid  # reconfigured, not restarted
    cli.deploy(world.options, world.models[0])
    until(lambda: version() == world.models[0].version)


def test_a_client_that_hangs_up_leaves_nothing_behind(world: World) -> None:
    folders = world.options.state / "batches"
    folders.mkdir(exist_ok=True)
    before = {path.name for path in folders.iterdir()}
    with socket.create_connection(("127.0.0.1", world.port)) as connection:
        head = (f"POST /v1/batches HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {world.key}\r\n"
                "Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 9000000\r\n\r\n--b\r\n"
                'Content-Disposition: form-data; name="archive"; filename="a.zip"\r\n\r\n')  # fmt: skip
        connection.sendall(head.encode() + b"x" * 3_000_000)
        until(lambda: any((folders / n / "upload.partial").exists() for n in _new(folders, before)))
    until(lambda: not any(p.is_file() for n in _new(folders, before) for p in (folders / n).rglob("*")))
    assert world.client.post("/v1/classify", files=form(IMAGES[0])).status_code == 200


def _new(folders: Path, before: set[str]) -> set[str]:
    return {path.name for path in folders.iterdir()} - before


def test_no_log_holds_what_was_sent(world: World) -> None:
    world.client.get("/v1/batches/josephine/lesions/josephine-baker")
    world.client.post("/v1/classify", files=[("images", ("josephine.jpg", IMAGES[0]))])
    time.sleep(0.5)
    from ray._private.worker import _global_node

    logs = Path(_global_node.get_logs_dir_path())
    found = [path for path in logs.rglob("*") if path.is_file() and b"josephine" in path.read_bytes().lower()]
    assert found == []
    audit = (world.options.state / "audit/requests.jsonl").read_text()
    assert "josephine" not in audit
    assert {json.loads(line)["caller"] for line in audit.splitlines()} <= {"all", "few", None}
