"""A temporary Prefect server with a home of its own, for tests that run flows in their own process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefect.logging.handlers import APILogHandler
from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_HOME,
    PREFECT_LOCAL_STORAGE_PATH,
    PREFECT_SERVER_ALLOW_EPHEMERAL_MODE,
    PREFECT_SERVER_ANALYTICS_ENABLED,
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS,
    temporary_settings,
)


@contextmanager
def own_prefect(home: Path) -> Iterator[None]:
    """Flows run here keep their records in `home`; at the end their server stops, which a process has only one of."""
    ephemeral = {
        PREFECT_HOME: home,
        PREFECT_LOCAL_STORAGE_PATH: home / "storage",
        PREFECT_SERVER_ALLOW_EPHEMERAL_MODE: True,
        PREFECT_SERVER_ANALYTICS_ENABLED: False,
        PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS: 200,
    }
    with temporary_settings(ephemeral, restore_defaults={PREFECT_API_URL}):
        try:
            yield
        finally:
            APILogHandler().flush()
            SubprocessASGIServer().stop()  # while what it says still has a place to go
