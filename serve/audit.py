"""Who asked for what: one JSON line a request, appended and never changed. No ids of people, lesions or images.

The file is opened for every line, so a log rotation needs no signal; a line is one write, so replicas can share it.
"""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

NAME = "audit/requests.jsonl"


class Audit:
    """The log in the state folder."""

    def __init__(self, state: Path) -> None:
        self.path = state / NAME
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, **entry: Any) -> None:
        """Append one request.

        Args:
            entry: request_id, caller, method, route (the template, without ids), status, counts, model, ms.

        Raises:
            OSError: The line could not be written; the request must not be answered then.
        """
        record = {"at": datetime.now(UTC).isoformat(timespec="milliseconds"), **entry}
        line = json.dumps(record, separators=(",", ":"), ensure_ascii=True).encode() + b"\n"
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
        try:
            os.write(file, line)
        finally:
            os.close(file)
