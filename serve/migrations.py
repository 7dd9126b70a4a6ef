"""The shape of the batches' table by number, and the steps from one to the next.

A table without a number is of the first version. Each step runs in one transaction with the change of the number, so a
kill leaves the one or the other, and of two services that start at once only one makes it. Steps only add, so that a
replica of the version before goes on working while others are upgraded.
"""

from __future__ import annotations

from collections.abc import Callable

import sqlalchemy as sa

Step = Callable[[sa.Connection], None]
STEPS: dict[int, Step] = {}
"""From a version to the next, by the number it starts from; there has been only one so far."""

_versions = sa.Table(
    "dermaflow_schema",
    sa.MetaData(),
    sa.Column("id", sa.Integer, primary_key=True),  # always 1
    sa.Column("version", sa.Integer, nullable=False),
)


def current() -> int:
    """The version that this DermaFlow works with."""
    return max(STEPS, default=0) + 1


class NewerSchema(Exception):
    """The database was made or changed by a newer DermaFlow."""


def migrate(engine: sa.Engine, tables: sa.MetaData) -> int:
    """Make the tables, or bring them to the present version.

    Returns:
        The version before; the present one where there was nothing.

    Raises:
        NewerSchema: They are of a version that this DermaFlow does not know.
    """
    fresh = not sa.inspect(engine).has_table(next(iter(tables.tables)))
    tables.create_all(engine)
    _versions.create(engine, checkfirst=True)
    with engine.begin() as connection:
        found = connection.execute(sa.select(_versions.c.version)).scalar()
        if found is None:
            found = current() if fresh else 1
            connection.execute(_versions.insert().values(id=1, version=found))
    before = int(found)
    if before > current():
        raise NewerSchema(f"version {before}, this DermaFlow knows up to {current()}")
    for number in range(before, current()):
        with engine.begin() as connection:
            # first, so that it waits for whoever makes the same step
            same = _versions.update().where(_versions.c.version == number).values(version=number + 1)
            if connection.execute(same).rowcount == 1:
                STEPS[number](connection)
    return before
