"""Around the work of every flow: the library's log lines in the run's logs, and no Ray left behind."""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

from prefect.context import TaskRunContext
from prefect.logging.handlers import APILogHandler
from prefect.runtime import flow_run

from dermaflow import monitoring
from dermaflow.logs import JsonLines, join_run
from dermaflow.settings import settings

_LOGGERS = ("dermaflow", "ray")


@contextmanager
def library_run() -> Iterator[None]:
    """Show what the library logs in the logs of the flow run, and stop its Ray work, whatever ends the block.

    A cancelled run (SIGTERM from Prefect's runner) and Ctrl-C are exceptions in the main thread, so they pass here too.
    """
    join_run(flow_run.id)
    began, state = time.monotonic(), "completed"
    with _run_logs():
        try:
            yield
        except BaseException as error:
            state = "failed" if isinstance(error, Exception) else "cancelled"  # signals are no Exception
            raise
        finally:
            monitoring.flow_ended(flow_run.flow_name, state, time.monotonic() - began)
            if cluster := sys.modules.get("dermaflow.preparation.cluster"):  # loaded only where Ray was used
                cluster.disconnect()


@contextmanager
def interruptible() -> Iterator[None]:
    """Let a cancellation or a time limit end a wait for Ray; only tasks have time limits, so it stands within a task.

    Prefect raises both from the handler of a signal. A wait inside Ray goes on in spite of what a handler raises, but
    for Ctrl-C's KeyboardInterrupt; so this is what the handlers raise here, and the block ends with what they meant.
    """
    meant: list[BaseException] = []

    def as_ctrl_c(handler: Callable[[int, Any], Any]) -> Callable[[int, Any], None]:
        def handle(number: int, frame: Any) -> None:
            try:
                handler(number, frame)
            except BaseException as error:
                meant.append(error)
                raise KeyboardInterrupt from error

        return handle

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGALRM)}
    if threading.current_thread() is not threading.main_thread():
        handlers = {}
    for number, handler in handlers.items():
        if callable(handler):
            signal.signal(number, as_ctrl_c(handler))
    try:
        yield
    except BaseException:
        if meant:
            raise meant[0] from None
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def _run_logs() -> Iterator[None]:
    """Attached here and not by PREFECT_LOGGING_EXTRA_LOGGERS: it needs no setting, and lines of other threads count."""
    attached: list[tuple[logging.Logger, APILogHandler]] = []
    for logger in map(logging.getLogger, _LOGGERS):
        if not any(isinstance(other, APILogHandler) for other in logger.handlers):  # by that setting
            handler = APILogHandler()  # one each: Ray gives those of its logger a format of its own
            handler.addFilter(_Stamp(UUID(flow_run.id)))
            logger.addHandler(handler)
            attached.append((logger, handler))
    if settings().log_format == "json":  # Prefect's own lines on the console, too
        for name in (None, "prefect", "prefect.flow_runs", "prefect.task_runs"):
            for console in logging.getLogger(name).handlers:
                if not isinstance(console, APILogHandler):
                    console.setFormatter(JsonLines())
    library = logging.getLogger("dermaflow")
    level = library.level
    library.setLevel(settings().log_level)
    try:
        yield
    finally:
        library.setLevel(level)
        for logger, handler in attached:
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
