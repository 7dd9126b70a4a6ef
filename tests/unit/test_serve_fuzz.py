"""Requests made from the OpenAPI page, valid and not: none of them is an error of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from serve_parts import FakeBackend, small_options

from serve.ingress import Service, make_app

pytest.importorskip("python_multipart")
schemathesis = pytest.importorskip("schemathesis")


@pytest.fixture(scope="module")
def operations(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    options = small_options(tmp_path_factory.mktemp("fuzz") / "state", rate="1000000/minute", hosts=("testserver",))
    page = schemathesis.openapi.from_asgi("/openapi.json", make_app(Service(options, FakeBackend())))
    return [found.ok() for found in page.get_all_operations()]


def _try(operations: list[Any], examples: int, mode: Any) -> set[int]:
    """Ask every operation so often; the statuses that were seen."""
    seen: set[int] = set()
    for operation in operations:

        @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True,
                  database=None, phases=[Phase.generate])  # fmt: skip
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: Any) -> None:
            response = case.call()
            seen.add(response.status_code)
            assert response.status_code < 500 or response.status_code == 503, case.as_curl_command()
            if response.status_code >= 400:
                assert set(response.json()["error"]) == {"code", "message", "expected", "todo", "request_id"}

        try:
            ask()
        except schemathesis.errors.InvalidSchema:
            raise
        except Exception as error:
            if type(error).__name__ != "Unsatisfiable":  # an operation without parameters has no wrong ones
                raise
    return seen


@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_no_request_is_our_error(operations: list[Any], mode: str) -> None:
    assert len(operations) >= 20
    found = _try(operations, 6, schemathesis.GenerationMode(mode))
    assert found & ({200, 404} if mode == "positive" else {400, 415, 422})


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_no_request_of_many_is_our_error(operations: list[Any], mode: str) -> None:
    _try(operations, 150, schemathesis.GenerationMode(mode))


def test_the_folder_of_the_page_holds_only_what_it_should(tmp_path: Path) -> None:
    from serve.routes_page import FOLDER, files

    assert all(path.resolve().is_relative_to(FOLDER) for path in files().values())
    assert not any(name.endswith(".py") for name in files())
