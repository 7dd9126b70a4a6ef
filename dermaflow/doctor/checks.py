"""One line of what the doctor says, and how a look that fails becomes one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

from pydantic import BaseModel, ConfigDict

from dermaflow.errors import DermaflowError

State = Literal["ok", "warning", "problem"]


class Check(BaseModel):
    """One line.

    Attributes:
        name: What was looked at.
        state: ``problem`` where something will not work, ``warning`` where it may not, or not well.
        found: What is there.
        todo: What to do about it; empty where there is nothing to do.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    state: State
    found: str
    todo: str = ""


def ok(name: str, found: str) -> Check:
    return Check(name=name, state="ok", found=found)


def warning(name: str, found: str, todo: str) -> Check:
    return Check(name=name, state="warning", found=found, todo=todo)


def problem(name: str, found: str, todo: str) -> Check:
    return Check(name=name, state="problem", found=found, todo=todo)


def looked(name: str, look: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    """The lines of one look; one that cannot be finished is a problem of its own, and the next look follows."""
    try:
        yield from look()
    except DermaflowError as error:
        expected = f"; expected {error.expected}" if error.expected else ""
        where = f"{error.where}: " if error.where else ""
        yield problem(name, f"{where}{error.what}{expected}", error.todo or "see the message")
    except Exception as error:  # a doctor that dies of what is ill helps nobody
        yield problem(name, f"could not be looked at: {type(error).__name__}: {error}", "tell who keeps this machine")
