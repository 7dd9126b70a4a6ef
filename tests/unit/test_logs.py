"""Log lines as JSON: one object each, with the ids of run, batch and request, and nothing an exception repeats."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys

import pytest

from dermaflow.logs import JsonLines, join_run, log_ids, run_id


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """What is logged on the logger `there`, as objects."""
    monkeypatch.delenv("DERMAFLOW_RUN_ID", raising=False)
    found: list[dict[str, object]] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(json.loads(self.format(record)))

    kept, logger = Kept(), logging.getLogger("there")
    kept.setFormatter(JsonLines())
    monkeypatch.setattr(logger, "handlers", [kept])
    monkeypatch.setattr(logger, "propagate", False)
    return found


def test_ids_belong_to_their_block_and_task(lines: list[dict[str, object]]) -> None:
    log = logging.getLogger("there")

    async def request(number: int) -> None:
        with log_ids(request_id=f"r{number}"):
            await asyncio.sleep(0.01 * (3 - number))
            log.warning("answered %d", number)

    async def all_of_them() -> None:
        await asyncio.gather(*map(request, range(3)))

    with log_ids(batch_id="b1"):
        asyncio.run(all_of_them())
    log.warning("after")
    assert [(line["message"], line.get("request_id"), line.get("batch_id")) for line in lines] == [
        ("answered 2", "r2", "b1"), ("answered 1", "r1", "b1"), ("answered 0", "r0", "b1"), ("after", None, None),
    ]  # fmt: skip
    assert {line["run_id"] for line in lines} == {run_id()}
    join_run("flow-7")
    log.warning("now")
    assert lines[-1]["run_id"] == "flow-7" == os.environ["DERMAFLOW_RUN_ID"], "processes started here are of the run"


def test_an_exception_is_named_and_placed_and_not_repeated(lines: list[dict[str, object]]) -> None:
    def read() -> None:
        raise ValueError("Mueller_Erika.jpg is cut short")

    try:
        read()
    except ValueError:
        logging.getLogger("there").exception("a part failed\nin two lines")
    [line] = lines
    assert line["error"] == "ValueError" and "Mueller" not in json.dumps(line)
    assert str(line["raised"][-1]).startswith("test_logs.py:") and str(line["raised"][-1]).endswith(" read")
    assert line["message"] == "a part failed\nin two lines"


@pytest.mark.parametrize("style", ["text", "json"])
def test_the_setting_decides(style: str) -> None:
    program = "import logging; from dermaflow.settings import start_logging; start_logging(); logging.info('here')"
    environment = os.environ | {"DERMAFLOW_LOG_FORMAT": style, "DERMAFLOW_RUN_ID": "given"}
    said = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=60, check=True
    ).stderr  # fmt: skip
    if style == "text":
        assert said.endswith("INFO root: here\n")
    else:
        assert (found := json.loads(said))["message"] == "here" and found["run_id"] == "given"


def test_loggers_with_a_lower_level_of_their_own_do_not_get_through() -> None:
    """Flower's do: its hub wrote twenty lines a second."""
    program = (
        "import logging; from dermaflow.settings import start_logging; start_logging();"
        "other = logging.getLogger('flwr'); other.setLevel('DEBUG'); other.debug('too much'); other.info('here')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"DERMAFLOW_LOG_LEVEL": "INFO"}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert "here" in done.stderr and "too much" not in done.stderr


def test_lines_of_a_request_bear_its_id(lines: list[dict[str, object]]) -> None:
    """By the guard of the service, around whatever answers."""
    guard = pytest.importorskip("serve.guard")
    options = pytest.importorskip("serve.options").Options(open=True)

    class Metrics:
        def __getattr__(self, name: str) -> Metrics:
            return self

        def __call__(self, *_: object) -> Metrics:
            return self

    class Service:
        behind_proxy, version, metrics = True, "m", Metrics()

    service = Service()
    service.options = options  # type: ignore[attr-defined]

    async def app(scope: object, receive: object, send: object) -> None:
        logging.getLogger("there").warning("working")

    async def nothing(*_: object) -> None:
        return None

    headers = [(b"host", b"127.0.0.1"), (b"x-request-id", b"abc-1")]
    scope = {"type": "http", "method": "GET", "path": "/healthz", "headers": headers}
    asyncio.run(guard.Guard(app, service)(scope, nothing, nothing))
    assert [(line["message"], line["request_id"]) for line in lines] == [("working", "abc-1")]
