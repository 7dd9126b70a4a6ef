"""Around the work of every flow: the library's log lines in the run's logs, and no Ray left behind."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

from prefect.context import TaskRunContext
from prefect.logging.handlers import APILogHandler
from prefect.runtime import flow_run

from dermaflow.settings import settings

_LOGGERS = ("dermaflow", "ray")


@contextmanager
def library_run() -> Iterator[None]:
    """Show what the library logs in the logs of the flow run, and stop its Ray work, whatever ends the block.

    A cancelled run (SIGTERM from Prefect's runner) and Ctrl-C are exceptions in the main thread, so they pass here too.
    """
    with _run_logs():
        try:
            yield
        finally:
            if cluster := sys.modules.get("dermaflow.preparation.cluster"):  # loaded only where Ray was used
                cluster.disconnect()


@contextmanager
def _run_logs() -> Iterator[None]:
    """Attached here and not by PREFECT_LOGGING_EXTRA_LOGGERS: it needs no setting, and lines of other threads count."""
    handler = APILogHandler()
    handler.addFilter(_Stamp(UUID(flow_run.id)))
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    loggers = [logger for logger in loggers if not any(isinstance(h, APILogHandler) for h in logger.handlers)]
    library = logging.getLogger("dermaflow")
    level = library.level
    for logger in loggers:
        logger.addHandler(handler)
    library.setLevel(settings().log_level)
    try:
        yield
    finally:
        library.setLevel(level)
        for logger in loggers:
            logger.removeHandler(handler)


class _Stamp(logging.Filter):
    """Marks records with the run they belong to; Prefect itself knows it only in the thread of the task."""

    def __init__(self, run_id: UUID) -> None:
        super().__init__()
        self._run_id = run_id

    def filter(self, record: logging.LogRecord) -> bool:
        task = TaskRunContext.get()
        record.flow_run_id = self._run_id
        record.task_run_id = task.task_run.id if task else None
        return True
