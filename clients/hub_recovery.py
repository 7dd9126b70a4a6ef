"""What the hub does so that a kill in the wrong millisecond costs nothing.

Flower 1.41 keeps its state in SQLite and repeats a request whose answer was lost. Three requests are not safe to
repeat: for a message or an answer that was handed out and never arrived, and with a piece of one that arrived and is
sent again. Each cost an answer or a run when a hub was killed at random; a slow test does that.
"""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from typing import Any


def survive_kills(database: Path) -> None:
    """Call it before the application is made.

    Args:
        database: Of the hub; may not exist yet.
    """
    _hand_over_again(database)
    _take_repeated_objects()
    _keep_answers_until_confirmed()
    _confirm_what_is_handed_over_again()


def _hand_over_again(database: Path) -> None:
    """What was handed out and is not finished counts as not handed out yet.

    A message whose receipt was confirmed has no content here any more, and stays. A site that has one already and could
    not confirm it passes over it (`clients.supernode`); a run asks only for what it waits for.
    """
    if not database.exists():
        return
    with contextlib.closing(sqlite3.connect(database, timeout=10)) as connection, connection:
        connection.execute(
            "UPDATE message_ins SET delivered_at = '' WHERE delivered_at != ''"
            " AND message_id NOT IN (SELECT reply_to_message_id FROM message_res)"
            " AND message_id IN (SELECT object_id FROM objects)"
        )
        connection.execute("UPDATE message_res SET delivered_at = '' WHERE delivered_at != ''")


def _take_repeated_objects() -> None:
    """Accept a piece that is here already. Its name is its hash, so it can be no other."""
    from flwr.supercore.corestate.sql_corestate import SqlCoreState

    store = SqlCoreState.store_object

    def store_once(self: Any, run_id: int, session_id: str, object_id: str, object_content: bytes) -> bool:
        if store(self, run_id, session_id, object_id, object_content):
            return True
        return bool(object_content) and self.object_store.get(object_id) == object_content

    SqlCoreState.store_object = store_once  # type: ignore[method-assign]


def _keep_answers_until_confirmed() -> None:
    """Delete an answer when the run says that it has it, not when it is handed out."""
    from flwr.superlink.servicer.runtime import runtime_handlers as handlers

    pull, confirm = handlers.pull_messages, handlers.confirm_message_received

    def pull_and_keep(request: Any, state: Any, task: Any) -> Any:
        return pull(request, _Keeping(state), task)

    def confirm_and_delete(request: Any, state: Any, task: Any) -> Any:
        answer = confirm(request, state, task)
        state.delete_messages(_questions(state, message_id=[request.message_object_id]))
        return answer

    handlers.pull_messages, handlers.confirm_message_received = pull_and_keep, confirm_and_delete


def _confirm_what_is_handed_over_again() -> None:
    """A message that counts as not handed out, but now is confirmed, is handed out: once more, it would be empty, and
    Flower would delete it with its answer."""
    from datetime import UTC, datetime

    from flwr.supercore.state.schema.linkstate_models import MessageIns
    from flwr.superlink.servicer.fleet import fleet_handlers as handlers
    from sqlalchemy import update

    confirm = handlers.confirm_message_received

    def confirm_and_mark(request: Any, state: Any, store: Any) -> Any:
        with state.session() as session:
            session.execute(
                update(MessageIns)
                .where(MessageIns.message_id == request.message_object_id, MessageIns.delivered_at == "")
                .values(delivered_at=datetime.now(UTC).isoformat())
            )
        return confirm(request, state, store)

    handlers.confirm_message_received = confirm_and_mark


class _Keeping:
    """The hub's state, but messages that a site has answered are not deleted."""

    def __init__(self, state: Any) -> None:
        self._state = state

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)

    def delete_messages(self, message_ins_ids: set[str]) -> None:
        answered = _questions(self._state, reply_to_message_id=message_ins_ids)
        self._state.delete_messages(message_ins_ids - answered)


def _questions(state: Any, **where: Any) -> set[str]:
    """Ids of the messages whose answers match."""
    from flwr.supercore.state.schema.linkstate_models import MessageRes
    from sqlalchemy import select

    ((column, values),) = where.items()
    with state.session() as session:
        found = session.scalars(select(MessageRes.reply_to_message_id).where(getattr(MessageRes, column).in_(values)))
        return set(found.all())
