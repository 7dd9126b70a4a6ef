"""Requests made from the OpenAPI page, valid and not: none of them is an error of ours, and answers fit the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from serve_parts import FakeBackend, small_options

pytest.importorskip("python_multipart")
schemathesis = pytest.importorskip("schemathesis")

from serve.ingress import Service, make_app  # noqa: E402


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Any:
    options = small_options(tmp_path_factory.mktemp("fuzz") / "state", rate="1000000/minute", hosts=("testserver",))
    return schemathesis.openapi.from_asgi("/openapi.json", make_app(Service(options, FakeBackend())))


schema = schemathesis.pytest.from_fixture("page")


def _check(case: Any) -> None:
    response = case.call()
    assert response.status_code < 500 or response.status_code == 503, case.as_curl_command()
    assert response.status_code != 501
    if response.status_code >= 400:
        assert set(response.json()["error"]) == {"code", "message", "expected", "todo", "request_id"}


@schema.parametrize()
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_no_request_is_our_error(case: Any) -> None:
    _check(case)


@pytest.mark.slow
@schema.parametrize()
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_request_of_many_is_our_error(case: Any) -> None:
    _check(case)


def test_the_folder_of_the_page_holds_only_what_it_should(tmp_path: Path) -> None:
    from serve.routes_page import FOLDER, files

    assert all(path.resolve().is_relative_to(FOLDER) for path in files().values())
    assert not any(name.endswith(".py") for name in files())
