"""The compose file: the schema of Compose, no default secrets, only the ingress published, limits, checks."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from compose_file import FOLDER, Unset, read_compose

GIVEN = {"DERMAFLOW_ADDRESS": "127.0.0.1"}
ONE_SHOT = {"serve", "bucket", "objects-owner"}  # end when their work is done


def compose() -> dict[str, Any]:
    return read_compose(GIVEN)


@pytest.mark.parametrize("name", ["compose.yaml", "gpu.yaml", "../federation/compose.yaml"])
def test_it_fits_the_schema_of_compose(name: str) -> None:
    pytest.importorskip("check_jsonschema", reason="needs check-jsonschema, which holds the schema")
    schema = json.loads((files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json").read_text())
    found = read_compose(GIVEN, name)
    errors = jsonschema.Draft202012Validator(schema).iter_errors(found)
    assert [f"{'.'.join(map(str, error.path))}: {error.message[:200]}" for error in errors] == []
    found["services"]["wrong"] = {"image": "x", "healthchek": {}}
    assert list(jsonschema.Draft202012Validator(schema).iter_errors(found)), "the schema notices a misspelt key"


def test_the_federation_s_hub_can_write_and_no_key_is_in_its_image() -> None:
    found = read_compose(GIVEN, "../federation/compose.yaml")
    root = FOLDER.parents[1]
    for name, service in found["services"].items():
        build = service["build"]
        dockerfile = root / build["dockerfile"]
        assert (FOLDER / "../federation" / build["context"]).resolve() == root and build["args"] == {
            "EXTRAS": "federated"
        }
        ignored = dockerfile.with_name("Dockerfile.dockerignore").read_text().splitlines()
        assert "*" in ignored and not [line for line in ignored if line.startswith(("!deploy/federation", "!certs"))]
        assert service["read_only"] is True and service["cap_drop"] == ["ALL"], name
    volume = next(v for v in found["services"]["hub"]["volumes"] if v.startswith("hub:")).split(":")[1]
    assert f"install -d -o 10001 -g 10001 {volume}\n" in dockerfile.read_text()  # else a new volume is root's
    assert f"--state {volume}/" in str(found["services"]["hub"]["command"])
    head = (FOLDER / "../federation/compose.yaml").read_text().split("\nx-image")[0]
    assert f"--name site-a --state {volume}/hub" in head


def test_nothing_has_a_default_that_opens_a_door() -> None:
    with pytest.raises(Unset, match="DERMAFLOW_ADDRESS"):
        read_compose({})
    found = compose()
    for name, service in found["services"].items():
        for key, value in (service.get("environment") or {}).items():
            if re.search(r"PASSWORD|SECRET|TOKEN|AUTH_STRING|ACCESS_KEY", key):
                assert str(value).startswith("/run/secrets/"), f"{name}: {key} is not a file"
        used = {Path(v).name for v in re.findall(r"/run/secrets/[\w.]+", json.dumps(service))}
        assert used <= set(service.get("secrets", ())), f"{name} reads secrets that it is not given"
    for name, secret in found["secrets"].items():
        assert secret == {"file": f"./secrets/{name}"}


def test_only_the_ingress_is_published() -> None:
    found = compose()
    assert [name for name, service in found["services"].items() if "ports" in service] == ["ingress"]
    assert found["networks"]["inside"]["internal"] is True
    for name, service in found["services"].items():
        if name not in ("ingress", "objects-owner"):
            assert service["networks"] == ["inside"], name
    assert found["services"]["ingress"]["ports"] == ["127.0.0.1:443:8443", "127.0.0.1:8444:8444"]


@pytest.mark.parametrize("name", list(compose()["services"]))
def test_every_service_is_bounded_and_hardened(name: str) -> None:
    service = compose()["services"][name]
    limits = service["deploy"]["resources"]["limits"]
    assert limits["memory"] and limits["cpus"]
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    if name != "objects-owner":
        assert service.get("user", "10001:10001").split(":")[0] != "0", "the project's image runs as 10001"
    assert re.search(r":[\w.-]*\d", service["image"]), "an exact version"
    if name not in ONE_SHOT:
        assert service["healthcheck"]["test"][0] == "CMD" and service["restart"] == "unless-stopped"


def test_what_is_mounted_is_there_and_what_is_waited_for_can_be() -> None:
    found = compose()
    for name, service in found["services"].items():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0] if isinstance(volume, str) else ""
            if source.startswith("."):
                assert (FOLDER / source).exists(), f"{name}: {source}"
            elif source:
                assert source in found["volumes"], f"{name}: {source}"
        for other, condition in (service.get("depends_on") or {}).items():
            wanted = condition["condition"]
            assert (other in ONE_SHOT) == (wanted == "service_completed_successfully"), f"{name} on {other}"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_secrets_are_made_once_and_open_the_service(tmp_path: Path) -> None:
    access = pytest.importorskip("serve.access")
    for part in ("compose", "federation"):
        shutil.copytree(FOLDER.parent / part, tmp_path / part, ignore=shutil.ignore_patterns("secrets"))
    make = ["sh", str(tmp_path / "compose/make_secrets.sh"), "derma.example.org"]
    subprocess.run(make, check=True, capture_output=True, timeout=60)
    secrets = tmp_path / "compose/secrets"
    assert {Path(s["file"]).name for s in compose()["secrets"].values()} <= {path.name for path in secrets.iterdir()}
    assert secrets.stat().st_mode & 0o077 == 0, "others do not enter the folder"
    before = {path.name: path.read_bytes() for path in secrets.iterdir() if path.is_file()}
    subprocess.run(make, check=True, capture_output=True, timeout=60)
    assert {path.name: path.read_bytes() for path in secrets.iterdir() if path.is_file()} == before
    keys = access.Keys(secrets / "keys.json")
    found = keys.find((secrets / "metrics_key").read_text())
    assert found.name == "prometheus" and found.scopes == ["metrics"]
    assert "metrics" not in keys.find((secrets / "first_key").read_text()).scopes
    assert keys.find("dfk_" + "0" * 48) is None
    identity = json.loads((secrets / "s3.json").read_text())["identities"][0]["credentials"][0]
    assert identity["secretKey"] == (secrets / "s3_secret_key").read_text() and len(identity["secretKey"]) == 48
    assert len(set(before.values())) == len(before), "no two secrets are the same"


def test_the_service_is_what_the_code_can_start() -> None:
    schema = pytest.importorskip("ray.serve.schema")
    options = pytest.importorskip("serve.options")
    config = schema.ServeDeploySchema.model_validate(yaml.safe_load((FOLDER / "serve.yaml").read_text()))
    found = options.checked(options.Options.model_validate(config.applications[0].args))
    head = compose()["services"]["ray-head"]
    assert found.keys.name in head["secrets"] and "state:/var/lib/dermaflow" in head["volumes"]
    assert found.database.get_secret_value().startswith("postgresql+psycopg://dermaflow@database/dermaflow")


def test_the_databases_are_those_that_are_asked_for() -> None:
    services = compose()["services"]
    made = {services["database"]["environment"]["POSTGRES_DB"]}
    made |= set(re.findall(r"CREATE DATABASE (\w+)", (FOLDER / "databases.sql").read_text()))
    assert made == {"dermaflow", services["prefect-server"]["environment"]["PREFECT_SERVER_DATABASE_NAME"]}


def test_settings_of_the_containers_are_known() -> None:
    """A misspelt DERMAFLOW_ variable would be ignored without a word."""
    from dermaflow.settings import Settings

    known = {f"DERMAFLOW_{name.upper()}" for name in Settings.model_fields}
    for name, service in compose()["services"].items():
        given = {key for key in service.get("environment", ()) if key.startswith("DERMAFLOW_")}
        assert given <= known, name


def test_a_command_gets_its_secrets_from_files_or_does_not_start(tmp_path: Path) -> None:
    script = FOLDER.parent / "container/with-secrets"
    (tmp_path / "password").write_text("pass word")
    show = ["sh", "-c", 'printf "%s|%s" "$PGPASSWORD" "${PGPASSWORD_FILE:-gone}"']
    run = {"capture_output": True, "text": True, "timeout": 30}
    path = {"PATH": "/usr/bin:/bin"}
    given = subprocess.run([str(script), *show], env=path | {"PGPASSWORD_FILE": str(tmp_path / "password")}, **run)
    assert given.stdout == "pass word|gone", given.stderr
    missing = subprocess.run([str(script), *show], env=path | {"PGPASSWORD_FILE": str(tmp_path / "none")}, **run)
    assert missing.returncode == 1 and missing.stdout == "" and "make the secrets first" in missing.stderr
    assert "pass word" not in missing.stderr
    plain = subprocess.run([str(script), "echo", "ok"], env=path, **run)
    assert plain.stdout == "ok\n"
