"""Settings of the machine: what is impossible is said by the name of the environment variable."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from typer.testing import CliRunner

from dermaflow.cli.main import app
from dermaflow.errors import SettingError
from dermaflow.settings import Settings, settings


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    settings.cache_clear()
    yield
    settings.cache_clear()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("DERMAFLOW_THREADS", "two", "CPU threads of a process, 1 or more"),
        ("DERMAFLOW_THREADS", "0", "CPU threads of a process, 1 or more"),
        ("DERMAFLOW_DEVICE", "gpu", "auto, cpu, cuda or cuda:N"),
        ("DERMAFLOW_LOG_LEVEL", "loud", "DEBUG, INFO, WARNING or ERROR"),
        ("DERMAFLOW_LOG_FORMAT", "xml", "text, or json"),
    ],
)
def test_an_impossible_value_is_said(monkeypatch: pytest.MonkeyPatch, name: str, value: str, expected: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingError, match=f"{name}: '{value}'; expected {expected}"):
        settings()
    result = CliRunner().invoke(app, ["models", "list"])
    assert result.exit_code == 1 and f"SettingError: {name}: '{value}'" in result.output


def test_an_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """As compose files pass what stands nowhere."""
    for name in Settings.model_fields:
        monkeypatch.setenv(f"DERMAFLOW_{name.upper()}", "")
    found = settings()
    assert (found.data, found.device, found.log_level) == (None, "auto", "INFO") and found.threads >= 1
