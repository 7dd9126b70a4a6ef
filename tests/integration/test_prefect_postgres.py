"""Prefect's server on PostgreSQL: a lifecycle runs, and what it decided is still there when the server comes back."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("prefect")

from lifecycle_here import Ward
from postgres_here import a_postgres
from prefect_here import a_server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_a_decision_outlives_the_server(tmp_path: Path) -> None:
    import psycopg

    ward = Ward.build(tmp_path / "ward")
    words = [f"--{name.replace('_', '-')}={value}" for name, value in ward.arguments().items()]
    with a_postgres() as folder:
        address = {"PREFECT_SERVER_DATABASE_CONNECTION_URL": f"postgresql+asyncpg://dermaflow@/postgres?host={folder}"}
        with a_server(tmp_path / "one", **address) as server:
            process = server.python("flows", "lifecycle", *words)
            assert process.wait(600) == 0, server.said()
            run = server.latest_run("lifecycle")
            assert run is not None and server.state(run) == "COMPLETED"
        with psycopg.connect(f"host={folder} user=dermaflow dbname=postgres") as connection:
            found = connection.execute("SELECT state_type::text FROM flow_run WHERE id = %s", (run,)).fetchall()
        assert found == [("COMPLETED",)]
        assert not list((tmp_path / "one").rglob("prefect.db"))
        with a_server(tmp_path / "two", **address) as server:
            found = server.post("/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run]}}})
            assert "Nothing is done" in {artifact["key"]: artifact["data"] for artifact in found}["decision"]
