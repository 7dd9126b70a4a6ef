"""Passwords and keys stand in no log line, no message, no plan and no parameter of a flow."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
from s3_here import own_s3
from typer.testing import CliRunner

from dermaflow import storage
from dermaflow.cli.main import app
from dermaflow.errors import StorageError
from serve.jobs import JobError, JobStore
from serve.options import Options

PASSWORD = "Xq7-never-show-this"
WORDS = re.compile(r"passw|secret|token|credential|api_?key|access_?key|private", re.IGNORECASE)


def test_an_address_with_keys_is_refused_and_they_are_not_repeated(tmp_path: Path) -> None:
    address = f"s3://AKIA:{PASSWORD}@bucket/shards"
    with pytest.raises(StorageError, match=r"s3://…@bucket/shards: keys in an address.*AWS_ACCESS_KEY_ID") as refused:
        storage.exists(address)
    assert PASSWORD not in str(refused.value)
    said = CliRunner().invoke(app, ["evaluate", "--model", address, "--shards", "x", "--out", str(tmp_path / "out")])
    assert said.exit_code == 1 and PASSWORD not in said.output


def test_the_password_of_the_database_is_shown_by_nothing_but_what_connects() -> None:
    url = f"postgresql+psycopg://dermaflow:{PASSWORD}@127.0.0.1:9/jobs"
    options = Options.model_validate({"database": url, "open": True})
    for shown in (repr(options), str(options), options.model_dump_json(), str(options.model_dump())):
        assert PASSWORD not in shown
    assert options.database_url == options.to_send()["database"] == url
    assert Options.model_validate(options.to_send()) == options
    with pytest.raises(JobError) as error:
        JobStore(url)
    assert PASSWORD not in str(error.value)


def test_logs_at_their_most_talkative_name_no_key(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with own_s3("hospital"), caplog.at_level(logging.DEBUG):
        caplog.clear()
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", PASSWORD)
        storage.write_bytes("s3://hospital/a", b"1")
        assert storage.read_bytes("s3://hospital/a") == b"1"
        with pytest.raises(StorageError) as missing:
            storage.read_bytes("s3://hospital/none")
        said = CliRunner().invoke(app, ["doctor", "--storage", "s3://hospital/runs", "--port", "0"])
    assert "s3://hospital/runs can be read and written" in " ".join(said.output.split())
    assert PASSWORD not in caplog.text + str(missing.value) + said.output


def test_no_parameter_of_a_flow_is_a_secret() -> None:
    """Prefect keeps and shows parameters: what is secret comes from the environment of a worker."""
    pytest.importorskip("prefect")
    from flows.__main__ import FLOWS

    names = {f"{flow.name}.{name}" for flow in FLOWS for name in flow.parameters.properties}
    assert len(names) > 20 and not [name for name in names if WORDS.search(name.partition(".")[2])]
