"""Batches as rows of a table: what was asked for, and how it stands. SQLite by default, PostgreSQL by address.

The work itself is not here: its progress stands in the output folder (`dermaflow.scoring.plan.read_status`), so a row
changes only when a batch begins and ends. Every change names the states it may come from; two writers cannot both win.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from dermaflow.errors import DermaflowError
from serve.migrations import NewerSchema, migrate

_metadata = sa.MetaData()
_batches = sa.Table(
    "batches",
    _metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("state", sa.String(16), nullable=False, index=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("created", sa.Float, nullable=False, index=True),
    sa.Column("started", sa.Float),
    sa.Column("finished", sa.Float),
    sa.Column("source", sa.Text, nullable=False),
    sa.Column("patients", sa.Text),
    sa.Column("out", sa.Text, nullable=False),
    sa.Column("model", sa.Text, nullable=False),  # JSON: name, version, sha256, uri
    sa.Column("caller", sa.String(64), nullable=False),
    sa.Column("error", sa.Text),
    sa.Column("attempts", sa.Integer, nullable=False, default=0),
    sa.Column("cancel", sa.Boolean, nullable=False, default=False),
)

ACTIVE = ("queued", "running")


class JobError(DermaflowError):
    """The table of batches cannot be reached."""


@dataclass(frozen=True)
class Job:
    """One batch; times are seconds since 1970."""

    id: str
    state: str
    name: str
    created: float
    started: float | None
    finished: float | None
    source: str
    patients: str | None
    out: str
    model: dict[str, str]
    caller: str
    error: str | None
    attempts: int
    cancel: bool


def new_id() -> str:
    """Sorts by time, cannot be guessed."""
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(8)}"


class JobStore:
    """The table.

    Args:
        url: SQLAlchemy address: ``sqlite:///path`` or ``postgresql+psycopg://user@host/name``.

    Raises:
        JobError: It cannot be reached.
    """

    def __init__(self, url: str) -> None:
        at = sa.make_url(url)
        sqlite = at.get_backend_name() == "sqlite"
        if sqlite and at.database:
            Path(at.database).parent.mkdir(parents=True, exist_ok=True)
        self._engine = sa.create_engine(url, pool_pre_ping=True, connect_args={"timeout": 30} if sqlite else {})
        if sqlite:
            sa.event.listen(self._engine, "connect", _careful)
        for last in (False, True):
            try:
                migrate(self._engine, _metadata)
                break
            except NewerSchema as error:
                raise JobError(
                    str(error), where=at.render_as_string(hide_password=True), expected="a table of this version",
                    todo="install the DermaFlow that it was last used with, or a newer one",
                ) from error  # fmt: skip
            except DBAPIError as error:
                if not last:  # two replicas that start at once may both try to make the table; the second look finds it
                    time.sleep(0.5)
                    continue
                raise JobError(
                    f"cannot be reached: {type(error).__name__}", where=at.render_as_string(hide_password=True),
                    expected="a database that takes connections", todo="check the address and its rights",
                ) from error  # fmt: skip

    def add(
        self, *, id: str, name: str, source: str, patients: str | None, out: str, model: dict[str, str], caller: str
    ) -> Job:
        """Queue a batch."""
        row = {"id": id, "state": "queued", "name": name, "created": time.time(), "source": source, "caller": caller,
               "patients": patients, "out": out, "model": json.dumps(model), "attempts": 0,
               "cancel": False}  # fmt: skip
        with self._engine.begin() as connection:
            connection.execute(_batches.insert().values(**row))
        found = self.get(id)
        assert found is not None  # just written
        return found

    def get(self, id: str) -> Job | None:
        with self._engine.connect() as connection:
            row = connection.execute(sa.select(_batches).where(_batches.c.id == id)).mappings().first()
        return None if row is None else _job(row)

    def list(self, states: Sequence[str] = (), limit: int = 500) -> list[Job]:
        """The newest first."""
        query = sa.select(_batches).order_by(_batches.c.created.desc()).limit(limit)
        if states:
            query = query.where(_batches.c.state.in_(states))
        with self._engine.connect() as connection:
            return [_job(row) for row in connection.execute(query).mappings()]

    def counts(self) -> dict[str, int]:
        """Batches by state."""
        query = sa.select(_batches.c.state, sa.func.count()).group_by(_batches.c.state)
        with self._engine.connect() as connection:
            return {str(state): int(count) for state, count in connection.execute(query)}

    def next_queued(self) -> Job | None:
        """The one that has waited longest."""
        query = sa.select(_batches).where(_batches.c.state == "queued").order_by(_batches.c.created).limit(1)
        with self._engine.connect() as connection:
            row = connection.execute(query).mappings().first()
        return None if row is None else _job(row)

    def begin(self, id: str) -> bool:
        """From queued to running; False if it is not queued any more."""
        return self._change(id, ("queued",), state="running", started=time.time())

    def attempt(self, id: str) -> int:
        """Count another start of a running batch; how many there were, with this one."""
        with self._engine.begin() as connection:
            connection.execute(_batches.update().where(_batches.c.id == id).values(attempts=_batches.c.attempts + 1))
            return int(connection.execute(sa.select(_batches.c.attempts).where(_batches.c.id == id)).scalar_one())

    def finish(self, id: str) -> bool:
        return self._change(id, ("running",), state="finished", finished=time.time())

    def fail(self, id: str, error: str) -> bool:
        return self._change(id, ACTIVE, state="failed", finished=time.time(), error=error[:4000])

    def ask_to_cancel(self, id: str) -> None:
        """A waiting batch is cancelled at once, a running one when its runner has been stopped."""
        if not self._change(id, ("queued",), state="cancelled", finished=time.time(), cancel=True):
            self._change(id, ("running",), cancel=True)

    def cancelled(self, id: str) -> bool:
        return self._change(id, ACTIVE, state="cancelled", finished=time.time())

    def _change(self, id: str, states: Sequence[str], **values: Any) -> bool:
        where = (_batches.c.id == id) & _batches.c.state.in_(states)
        with self._engine.begin() as connection:
            return connection.execute(_batches.update().where(where).values(**values)).rowcount == 1


def _careful(connection: Any, _: Any) -> None:
    """Readers do not wait for a writer, and a committed change is on disk."""
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")


def _job(row: Any) -> Job:
    return Job(**{**row, "model": json.loads(row["model"]), "cancel": bool(row["cancel"])})
