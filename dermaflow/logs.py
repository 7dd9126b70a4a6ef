"""Log lines as JSON, each with the ids of what it belongs to, for machines that collect logs.

One object a line: ``at`` (UTC), ``level``, ``logger``, ``message``, ``run_id``, within a batch of the service
``batch_id``, within a request ``request_id``, and of an exception its kind and where it was raised: its message may
repeat what was read, a file name with a patient's name for instance, and stays out.
"""

from __future__ import annotations

import json
import logging
import os
import traceback
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path

_RUN = "DERMAFLOW_RUN_ID"  # in the environment, so that processes that this one starts are of the same run
_IDS: ContextVar[dict[str, str]] = ContextVar("ids")
FRAMES = 8  # the innermost ones of an exception


def run_id() -> str:
    """The id of the run that this process is part of; a new one where nothing named it before."""
    return os.environ.setdefault(_RUN, uuid.uuid4().hex)


def join_run(identifier: str) -> None:
    """Say which run this process works for from now on: a flow run of Prefect, a batch, the run of another process."""
    os.environ[_RUN] = identifier


@contextmanager
def log_ids(**ids: str) -> Iterator[None]:
    """Put ids into every line that is logged within the block, in this thread and its asyncio tasks.

    Args:
        ids: ``batch_id``, ``request_id``: names of work, never of a person, a lesion or an image.
    """
    token = _IDS.set(_IDS.get({}) | ids)
    try:
        yield
    finally:
        _IDS.reset(token)


class JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record, without the end of line."""
        line: dict[str, object] = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "run_id": run_id(),
            **_IDS.get({}),
        }
        if record.exc_info and record.exc_info[0] is not None:
            line["error"] = record.exc_info[0].__name__
            frames = traceback.extract_tb(record.exc_info[2])[-FRAMES:]
            line["raised"] = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]
        return json.dumps(line, ensure_ascii=False)
