"""The command: what it refuses before anything starts, and the keys it makes."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import yaml
from serve_parts import save_servable
from typer.testing import CliRunner

from dermaflow.bundles.registry import Registry
from dermaflow.ports import free_port
from dermaflow.settings import settings
from serve import cli
from serve.access import read_keys
from serve.models import choose
from serve.options import Options

ray_serve = pytest.importorskip("ray.serve")


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    return result.exit_code, " ".join(result.output.split())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_servable(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: object) -> None:
        raise AssertionError("it should not have come to this")

    monkeypatch.setattr(cli, "start", start)
    monkeypatch.setattr(cli, "stop", lambda: None)


def test_other_machines_are_only_served_with_keys(model: Path, tmp_path: Path) -> None:
    code, text = run("--model", model, "--host", "0.0.0.0", "--state", tmp_path)
    assert code == 1 and "without keys" in text
    code, text = run("--model", model, "--host", "0.0.0.0", "--keys", tmp_path / "none.json", "--state", tmp_path)
    assert code == 1 and "no key in it" in text


def test_a_taken_port_and_half_a_certificate_are_said(model: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, text = run("--model", model, "--port", taken.getsockname()[1], "--state", tmp_path)
    assert code == 1 and "choose another --port" in text.replace("Choose", "choose")
    (tmp_path / "c.pem").write_text("")
    code, text = run("--model", model, "--tls-cert", tmp_path / "c.pem", "--state", tmp_path)
    assert code == 1 and "belong together" in text


def test_a_model_that_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DERMAFLOW_REGISTRY", str(tmp_path / "registry"))
    settings.cache_clear()
    try:
        code, text = run("--model", "another", "--port", free_port(), "--state", tmp_path / "state")
    finally:
        settings.cache_clear()
    assert code == 1 and "holds no model" in text


def test_a_model_is_named_as_in_the_registry(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DERMAFLOW_REGISTRY", str(tmp_path / "registry"))
    settings.cache_clear()
    try:
        added = Registry(tmp_path / "registry").add(model)
        Registry(tmp_path / "registry").promote(added.id, reason="test", by="test")
        by_name, by_folder = choose("champion"), choose(str(model))
    finally:
        settings.cache_clear()
    assert by_name.version == by_folder.version == added.id
    assert by_name.sha256 == by_folder.sha256
    assert by_name.uri != by_folder.uri


def test_keys_are_made_listed_and_revoked(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    code, text = run("keys", "add", "--keys", keys, "--name", "clinic", "--scope", "classify", "--scope", "batches")
    assert code == 0 and "dfk_" in text
    assert text.split()[-1] not in keys.read_text()
    code, text = run("keys", "list", "--keys", keys)
    assert "clinic" in text and "dfk_" not in text
    assert run("keys", "revoke", "--keys", keys, "--name", "clinic")[0] == 0
    assert read_keys(keys).keys == []
    assert run("keys", "revoke", "--keys", keys, "--name", "clinic")[0] == 1


def test_the_config_file_is_one_that_serve_deploys() -> None:
    from ray.serve.schema import ServeDeploySchema

    content = yaml.safe_load((Path(cli.__file__).parent / "config.yaml").read_text())
    found = ServeDeploySchema.model_validate(content)
    Options.model_validate(found.applications[0].args)
    assert found.logging_config is not None and not found.logging_config.enable_access_log
