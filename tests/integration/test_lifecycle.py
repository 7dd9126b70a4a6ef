"""The lifecycle and its deployments on a real Prefect server: measured, decided, promoted, continued, taken back."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml

pytest.importorskip("prefect")

from lifecycle_here import RECIPE, Ward, arrive
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, PREFECT_LOCAL_STORAGE_PATH, temporary_settings
from prefect_here import Server, a_server, stop
from tiny_bundle import a_bundle, save_tiny
from tiny_data import snapshot
from typer.testing import CliRunner
from waiting import until

from dermaflow.bundles.registry import Registry
from dermaflow.cli.main import app
from dermaflow.errors import DataError, RegistryError, StorageError
from dermaflow.ports import free_port
from flows import lifecycle as lifecycle_module
from flows import tasks
from flows.cycle import Decision, alone
from flows.lifecycle import lifecycle
from flows.rollover import await_service

pytestmark = pytest.mark.timeout(
    900
)  # server, worker and runs start in processes of their own; busy machines take long

ANY = {"balanced_accuracy_margin": 1.0, "melanoma_sensitivity_margin": 1.0, "safe_accuracy_margin": 1.0}
NEVER = {"balanced_accuracy_margin": -1.0}
DEPLOY = Path(__file__).parents[2] / "deploy"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with a_server(tmp_path_factory.mktemp("server")) as made:
        yield made


@pytest.fixture
def here(server: Server) -> Iterator[None]:
    """Flows of this process report to the server."""
    home = server.folder / "here"
    chosen = {
        PREFECT_API_URL: str(server.api.base_url).rstrip("/"), PREFECT_HOME: home,
        PREFECT_LOCAL_STORAGE_PATH: home / "storage",
    }  # fmt: skip
    with temporary_settings(chosen):
        yield


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Ward:
    return Ward.build(tmp_path_factory.mktemp("ward"))


@pytest.fixture
def ward(first: Ward, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ward:
    monkeypatch.setenv("DERMAFLOW_THREADS", "1")
    return first.copy(tmp_path)


def splits(ward: Ward) -> pd.Series:
    return pq.read_table(ward.shards / "lesions.parquet").to_pandas().set_index("lesion_id")["split"]


def shown(server: Server) -> dict[str, str]:
    """The artifacts of the latest run."""
    run = server.latest_run("lifecycle")
    found = server.post("/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run]}}})
    return {artifact["key"]: str(artifact["data"]) for artifact in found}


def test_nothing_new_changes_nothing(here: None, server: Server, ward: Ward) -> None:
    shards, registry = snapshot(ward.shards), snapshot(ward.registry)
    decision = lifecycle(**ward.arguments())
    assert decision.action == "nothing"
    assert decision.reasons == ["No limit is crossed."]
    assert (snapshot(ward.shards), snapshot(ward.registry)) == (shards, registry)
    assert "Nothing is done" in shown(server)["decision"]
    assert Decision.model_validate_json((ward.out / "cycles/0001/decision.json").read_bytes()) == decision


def test_new_lesions_make_a_champion_and_there_is_a_way_back(here: None, server: Server, ward: Ward) -> None:
    old, before, shards = Registry(ward.registry).champion(), splits(ward), snapshot(ward.shards)
    table = arrive(ward, 40)
    decision = lifecycle(**ward.arguments(new_lesions=20, **ANY))
    assert decision.action == "promoted", decision
    assert decision.measures.labelled_lesions == table["lesion_id"].nunique()
    champion = Registry(ward.registry).champion()
    assert (champion.id, champion.sha256) == (decision.challenger, decision.challenger_sha256)
    assert champion.bundle.training.data_hash == decision.data_hash
    entry = Registry(ward.registry).history()[-1]
    assert entry.from_version == old.id and "The rule holds on" in entry.reason

    after = splits(ward)  # shards grew, no lesion moved, and what was not touched was not written again
    assert after[before.index].equals(before) and set(after.index) - set(before.index) == set(table["lesion_id"])
    kept = {name: facts for name, facts in snapshot(ward.shards).items() if name in shards and "/" in name}
    assert all(shards[name] == facts for name, facts in kept.items())
    frozen = pq.read_table(ward.out / "frozen.parquet").to_pandas()
    assert set(frozen["lesion_id"]) == set(before.index[before == "test"])
    assert decision.verdict.lesions == frozen["lesion_id"].nunique()

    words = (ward.out / "cycles/0001/decision.md").read_text()
    assert shown(server)["decision"] == words
    for said in ("must be above -1", "models rollback", old.sha256, decision.challenger_sha256):
        assert said in words
    assert not any(lesion in words for lesion in table["lesion_id"])

    again = lifecycle(**ward.arguments(new_lesions=1, **ANY))  # it has learnt from all of them
    assert again.action == "nothing" and again.measures.labelled_lesions == 0 and again.measures.images == 0

    back = CliRunner().invoke(app, ["models", "rollback", "--reason", "false alarms", "--registry", str(ward.registry)])
    assert back.exit_code == 0 and f"champion: {old.id}, in place of {champion.id}" in back.output.replace("\n", " ")
    assert Registry(ward.registry).champion().id == old.id
    listed = CliRunner().invoke(app, ["models", "history", "--registry", str(ward.registry)]).output
    assert "rollback" in listed and "promote" in listed


def test_a_challenger_that_breaks_the_rule_is_refused(here: None, server: Server, ward: Ward) -> None:
    old = Registry(ward.registry).champion()
    arrive(ward)
    decision = lifecycle(**ward.arguments(new_lesions=10, **NEVER))
    assert decision.action == "refused" and decision.way_back is None
    assert not decision.verdict.holds and decision.verdict.conditions[0].margin == -1
    assert Registry(ward.registry).champion() == old
    assert decision.challenger in [version.id for version in Registry(ward.registry).list()]
    assert '"must be above": "+1"' in shown(server)["champion-challenger"]
    asked = {"filter": {"event": {"name": ["dermaflow.lifecycle.refused"]}}, "limit": 5}
    until(lambda: server.post("/events/filter", asked)["events"], 60, "its event")


def test_a_watch_says_what_is_to_be_done_and_its_findings_are_used_again(
    here: None, ward: Ward, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrive(ward)
    watched = lifecycle(**ward.arguments(new_lesions=10, retrain=False))
    assert watched.action == "retraining wanted" and "the limit is 10" in watched.reasons[0]
    assert not (ward.out / "archive").exists()

    def not_again(*given: object, **chosen: object) -> None:
        raise AssertionError("scored twice")

    monkeypatch.setattr(tasks, "score", not_again)
    decision = lifecycle(**ward.arguments(new_lesions=10, **ANY))
    assert decision.action == "promoted" and decision.measures == watched.measures


def test_a_turn_that_is_cut_off_is_continued_with_what_it_began_with(
    here: None, ward: Ward, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = arrive(ward)
    asked = ward.arguments(new_lesions=10, **ANY)
    trained = lifecycle_module.trained
    for step in ("trained", "publish"):  # after growing, and after the promotion

        def cut_off(*given: Any, **chosen: Any) -> Any:
            raise OSError("the power fails")

        with monkeypatch.context() as patched, pytest.raises(OSError, match="power"):
            patched.setattr(lifecycle_module, step, cut_off)
            lifecycle(**asked)
        assert not (ward.out / "cycles/0001/decision.json").exists()
        arrive(ward, 8, seed=len(step), name=step)  # for the next turn
    monkeypatch.setattr(lifecycle_module, "trained", trained)
    history = Registry(ward.registry).history()
    assert len(history) == 2  # it was promoted before the power failed
    decision = lifecycle(**asked)
    assert decision.cycle == 1 and decision.action == "promoted"
    assert decision.measures.labelled_lesions == table["lesion_id"].nunique()
    assert Registry(ward.registry).history() == history
    assert lifecycle(**asked | {"retrain": False}).measures.images == 16


def test_a_champion_that_others_promoted_meanwhile_stays(
    here: None, ward: Ward, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrive(ward)
    registry = Registry(ward.registry)
    other = registry.add(save_tiny(tmp_path / "other", a_bundle(name="other")))
    evaluated = lifecycle_module.evaluated

    def meanwhile(*given: Any, **chosen: Any) -> Any:
        registry.promote(other.id, reason="by hand", by="Ada")
        return evaluated(*given, **chosen)

    monkeypatch.setattr(lifecycle_module, "evaluated", meanwhile)
    decision = lifecycle(**ward.arguments(new_lesions=10, **ANY))
    assert decision.action == "refused" and f"the champion is {other.id} by now" in decision.reasons[-1]
    assert registry.champion().id == other.id


def test_what_cannot_be_decided_is_said(here: None, ward: Ward, tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match=r"no champion yet.*flow pipeline"):
        lifecycle(**ward.arguments(registry=str(tmp_path / "empty")))
    with alone(ward.out), pytest.raises(StorageError, match="another run is at work"):
        lifecycle(**ward.arguments())
    arrive(ward)
    registry = Registry(ward.registry)
    stranger = registry.add(save_stranger(ward, tmp_path / "stranger"))
    registry.promote(stranger.id, reason="from elsewhere", by="Ada")
    with pytest.raises(DataError, match=r"lesions of the frozen test were trained on"):
        lifecycle(**ward.arguments(new_lesions=10))


def save_stranger(ward: Ward, path: Path) -> Path:
    """A model that learnt from other shards of the same archive, and so from lesions of the test."""
    from tiny_data import prepare_here

    from dermaflow.learning.recipe import load_recipe
    from dermaflow.learning.train import train

    prepare_here(ward.data, path.with_name("others"), seed=9)
    train(path.with_name("others"), load_recipe(str(ward.recipe)), path)
    return path


@pytest.fixture(scope="module")
def deployed(server: Server, first: Ward) -> Ward:
    """`python -m flows deploy`, with paths of a ward in the file."""
    ward = first.copy(server.folder / "home")
    ward.recipe.write_text(RECIPE.replace("EPOCHS", "2"))
    shutil.copytree(DEPLOY, ward.root / "deploy")
    file = ward.root / "deploy/prefect.yaml"
    content = yaml.safe_load(file.read_text())
    if importlib.util.find_spec("flows.federate") is None:
        content["deployments"] = [d for d in content["deployments"] if "federate" not in d["entrypoint"]]
    for one in content["deployments"]:
        if "lifecycle" in one["entrypoint"]:
            given = one["parameters"]
            given |= {"landing": "landing", "data": "data", "shards": "shards", "out": "lifecycle"}
            given |= {"registry": "registry", "recipe": "tiny.yaml", "resamples": 50, "new_lesions": 10, **ANY}
    file.write_text(yaml.safe_dump(content))
    done = run_deploy(server, ward, "--schedules")
    assert done.returncode == 0, done.stdout + done.stderr
    return ward


def run_deploy(server: Server, ward: Ward, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flows", "deploy", "--home", ward.root, "--folder", ward.root / "deploy", *words],
        env=server.environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_deployments_forms_schedules_and_automations_are_on_the_server(server: Server, deployed: Ward) -> None:
    found = {d["entrypoint"].rsplit(".", 1)[1] + "/" + d["name"]: d for d in server.post("/deployments/filter", {})}
    wanted = {"prepare/dermaflow", "train/dermaflow", "evaluate/dermaflow", "score/nightly", "lifecycle/watch",
              "lifecycle/retrain"}  # fmt: skip
    assert wanted <= set(found)
    assert all(d["work_pool_name"] == "dermaflow" and "dermaflow" in d["tags"] for d in found.values())
    for name, cron in (("score/nightly", "0 2 * * *"), ("lifecycle/watch", "0 4 * * 1")):
        assert [(s["schedule"]["cron"], s["active"]) for s in found[name]["schedules"]] == [(cron, True)]
    assert found["score/nightly"]["global_concurrency_limit"]["limit"] == 1
    assert found["lifecycle/watch"]["concurrency_options"]["collision_strategy"] == "CANCEL_NEW"
    queues = {q["name"]: q["concurrency_limit"] for q in server.post("/work_pools/dermaflow/queues/filter", {})}
    assert queues["models"] == 1

    for name, deployment in found.items():  # every parameter is a field with a type and a description
        form = deployment["parameter_openapi_schema"]
        assert form["properties"], name
        for field, facts in form["properties"].items():
            assert facts.get("description") and ("type" in facts or "anyOf" in facts), (name, field)
        assert set(form.get("required", ())) <= set(deployment["parameters"]), name
    margin = found["lifecycle/retrain"]["parameter_openapi_schema"]["properties"]["melanoma_sensitivity_margin"]
    assert (margin["type"], margin["minimum"], margin["maximum"], margin["default"]) == ("number", -1, 1, 0.05)
    refused = server.api.post(
        f"/deployments/{found['lifecycle/retrain']['id']}/create_flow_run", json={"parameters": {"new_lesions": 0}}
    )
    assert refused.status_code == 422 or refused.status_code == 409, refused.text

    automations = {a["name"]: a for a in server.post("/automations/filter", {})}
    assert sorted(automations) == ["dermaflow never began", "dermaflow retrain"]
    assert automations["dermaflow retrain"]["actions"][0]["deployment_id"] == found["lifecycle/retrain"]["id"]


def test_a_run_that_never_begins_gives_its_place_in_the_queue_free(server: Server, deployed: Ward) -> None:
    """Its process died between being submitted and running, as when a worker is killed."""
    [given] = [a for a in server.post("/automations/filter", {}) if a["name"] == "dermaflow never began"]
    assert given["trigger"]["within"] == 900
    content = {key: given[key] for key in ("description", "enabled", "actions")} | {"name": "never began, at once"}
    trigger = {key: value for key, value in given["trigger"].items() if key != "id"} | {"within": 10}
    made = server.post("/automations/", content | {"trigger": trigger})
    try:
        id = server.get("/deployments/name/lifecycle/watch")["id"]
        run = server.post(f"/deployments/{id}/create_flow_run", {})["id"]
        server.post(f"/flow_runs/{run}/set_state", {"state": {"type": "PENDING", "name": "Submitting"}})
        until(lambda: server.state(run) == "CRASHED", 90, "the run is given up")
    finally:
        server.api.delete(f"/automations/{made['id']}").raise_for_status()


@pytest.mark.parametrize("kind", ["docker", "kubernetes"])
def test_pools_of_containers(server: Server, kind: str) -> None:
    """The server checks that every placeholder has a variable; what a run becomes is looked at here."""
    from prefect.utilities.templating import apply_values

    template = json.loads((DEPLOY / f"pools/{kind}.json").read_bytes())
    made = server.post("/work_pools/", {"name": f"a-{kind}", "type": kind, "base_job_template": template})
    assert made["type"] == kind
    values = {name: facts.get("default") for name, facts in template["variables"]["properties"].items()}
    values = {name: value for name, value in values.items() if value is not None} | {"name": "run", "command": "x"}
    job = apply_values(template["job_configuration"], values)
    if kind == "docker":
        assert job["image"] == "dermaflow:0.1.0-cuda" and job["privileged"] is False
        return
    spec = job["job_manifest"]["spec"]["template"]["spec"]
    assert spec["securityContext"]["runAsNonRoot"] and not spec["automountServiceAccountToken"]
    container = spec["containers"][0]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["resources"]["limits"] == {"memory": "16Gi", "nvidia.com/gpu": "0"}


class _Inbox(BaseHTTPRequestHandler):
    """Keeps what is posted."""

    received: list[dict[str, Any]]

    def do_POST(self) -> None:
        self.received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def inbox() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    received: list[dict[str, Any]] = []
    handler = type("Inbox", (_Inbox,), {"received": received})
    listening = HTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{listening.server_port}/", received
    listening.shutdown()
    listening.server_close()


@pytest.mark.slow
def test_a_limit_starts_the_retraining_and_people_are_told(
    server: Server, deployed: Ward, here: None, inbox: tuple[str, list[dict[str, Any]]]
) -> None:
    """A watch finds new lesions, its event starts a retraining on a worker, and the decision and failures are told."""
    from prefect.blocks.notifications import CustomWebhookNotificationBlock

    url, received = inbox
    block = CustomWebhookNotificationBlock(
        name="team", url=url, json_data={"subject": "{{subject}}", "text": "{{body}}"}
    )
    block.save("team", overwrite=True)
    refused = run_deploy(server, deployed, "--notify", "no/such")
    assert refused.returncode == 1 and "no block 'no/such'" in refused.stderr
    done = run_deploy(server, deployed, "--notify", "custom-webhook/team")
    assert done.returncode == 0, done.stdout + done.stderr
    nightly = server.get("/deployments/name/score/nightly")
    assert [s["active"] for s in nightly["schedules"]] == [False]  # one, though it was deployed twice
    names = sorted(a["name"] for a in server.post("/automations/filter", {}))
    assert names == [
        "dermaflow decided", "dermaflow failed", "dermaflow late", "dermaflow never began", "dermaflow retrain"
    ]  # fmt: skip

    ids = {d["name"]: d["id"] for d in server.post("/deployments/filter", {}) if d["name"] != "dermaflow"}
    arrive(deployed)
    worker = server.python("prefect", "worker", "start", "--pool", "dermaflow")
    try:
        watch = server.post(f"/deployments/{ids['watch']}/create_flow_run", {})["id"]
        until(lambda: server.state(watch) in ("COMPLETED", "FAILED", "CRASHED"), 400, "the watch has ended")
        assert server.state(watch) == "COMPLETED", server.said()
        retrain = until(lambda: _runs_of(server, ids["retrain"]), 120, "its event started a retraining")
        until(lambda: server.state(retrain[0]) in ("COMPLETED", "FAILED", "CRASHED"), 400, "the retraining has ended")
        assert server.state(retrain[0]) == "COMPLETED", server.said()
        broken = server.post(
            f"/deployments/{ids['nightly']}/create_flow_run", {"parameters": {"source": "nothing", "output": "x"}}
        )["id"]
        until(lambda: server.state(broken) == "FAILED", 200, "a run without a source fails")
        until(lambda: len(received) >= 2, 120, f"two messages, and not {received}")
    finally:
        stop(worker)
    decision = Decision.model_validate_json((deployed.out / "cycles/0002/decision.json").read_bytes())
    assert decision.action == "promoted"
    subjects = {message["subject"] for message in received}
    assert subjects == {"DermaFlow: dermaflow.lifecycle.promoted", "DermaFlow: score Failed"}
    assert any("The rule holds on" in message["text"] for message in received)


def _runs_of(server: Server, deployment: str) -> list[str]:
    found = server.post("/flow_runs/filter", {"deployments": {"id": {"any_": [deployment]}}})
    return [run["id"] for run in found]


def test_a_service_that_does_not_answer_is_said_and_nothing_fails() -> None:
    found = await_service(f"http://127.0.0.1:{free_port()}", "tiny-1", wait=0)
    assert found.version is None and found.problem is not None and "no answer" in found.problem


@pytest.mark.slow
def test_a_running_service_takes_the_new_champion(here: None, ward: Ward) -> None:
    """No request fails while the model changes."""
    pytest.importorskip("ray.serve")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    old, statuses, done = Registry(ward.registry).champion(), [], threading.Event()
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PREFECT_"))}
    with (ward.root / "serve.txt").open("wb") as said:
        service = subprocess.Popen(
            [sys.executable, "-m", "dermaflow.cli.main", "serve", "--port", str(port), "--state", ward.root / "state"],
            env=bare | {"DERMAFLOW_REGISTRY": str(ward.registry), "DERMAFLOW_THREADS": "1"}, stdout=said, stderr=said,
        )  # fmt: skip

    def version() -> str | None:
        try:
            return str(httpx.get(f"{url}/v1/model", timeout=30).raise_for_status().json()["version"])
        except httpx.HTTPError:
            return None

    def ask() -> None:
        while not done.wait(0.2):
            statuses.append(httpx.get(f"{url}/readyz", timeout=60).status_code)

    asking = threading.Thread(target=ask)
    try:
        assert until(version, 300, f"the service answers: {ward.root / 'serve.txt'}") == old.id
        asking.start()
        arrive(ward)
        decision = lifecycle(**ward.arguments(new_lesions=10, service=url, **ANY))
        assert decision.served.problem is None, decision.served
        assert decision.served.version == decision.challenger == version()
    finally:
        done.set()
        if asking.is_alive():
            asking.join()
        stop(service)
    assert statuses and set(statuses) == {200}


@pytest.mark.slow
def test_killed_while_it_trains(server: Server, ward: Ward) -> None:
    arrive(ward)
    ward.recipe.write_text(RECIPE.replace("EPOCHS", "60"))
    words: list[str] = []
    for name, value in ward.arguments(new_lesions=10, **ANY).items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    model = ward.out / "cycles/0001/model"
    before = len((server.folder / "said.txt").read_text(errors="replace"))
    process = server.python("flows", "lifecycle", *words)
    try:
        until(lambda: list(model.parent.glob("model.checkpoints/*.pt")), 300, "an epoch is done")
    finally:
        process.kill()
        process.wait()
    assert not model.exists()
    process = server.python("flows", "lifecycle", *words)
    try:
        assert process.wait(300) == 0, server.said()
    finally:
        stop(process)
    decision = Decision.model_validate_json((ward.out / "cycles/0001/decision.json").read_bytes())
    assert decision.action == "promoted"
    assert not (ward.out / "cycles/0002").exists()
    said = (server.folder / "said.txt").read_text(errors="replace")[before:]
    assert said.count(" epoch 0: loss") == 1  # the second run went on after it
