"""What all commands share: the console, errors without a traceback, progress bars."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from dermaflow.errors import DataError, DermaflowError
from dermaflow.settings import start_logging

console = Console()
errors = Console(stderr=True)

P = ParamSpec("P")
R = TypeVar("R")


def command(function: Callable[P, R]) -> Callable[P, R]:
    """Start logging, and end with status 1 and one clear message where the user can cure the error."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            start_logging()
            for name, value in kwargs.items():
                if isinstance(value, Path):
                    local_only(value, f"--{name.replace('_', '-')}")
            return function(*args, **kwargs)
        except DermaflowError as error:
            errors.print(f"[bold red]error:[/] {type(error).__name__}: ", end="")
            errors.print(str(error), markup=False, highlight=False, soft_wrap=True)
            raise SystemExit(1) from None
        except KeyboardInterrupt:
            errors.print("stopped; run the same command again to go on")
            raise SystemExit(130) from None

    return wrapped


def local_only(path: Path, option: str) -> None:
    """Refuse an address where a local path is taken: it would make a folder called ``s3:``.

    Raises:
        DataError: It is one.
    """
    if scheme := re.match(r"[a-z][a-z0-9+]+:/", str(path)):
        raise DataError(
            str(path).replace(":/", "://", 1), where=option,
            expected=f"a local path: what lies there is locked or changed in place, which {scheme[0]}/ cannot do",
            todo="name a local path, and copy it there afterwards",
        )  # fmt: skip


class Bars:
    """Progress bars by name; a line now and then where the output is no terminal."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._bars: dict[str, TaskID] = {}
        self._said: dict[str, int] = {}

    def __call__(self, step: str, done: int, total: int | None) -> None:
        if not sys.stderr.isatty():
            tenth = 10 * done // total if total else 0
            if self._said.get(step) != tenth:
                self._said[step] = tenth
                errors.print(f"{step}: {done}" + (f" of {total}" if total else ""), highlight=False)
            return
        if step not in self._bars:
            self._bars[step] = self._progress.add_task(step, total=total)
        self._progress.update(self._bars[step], completed=done, total=total)


@contextmanager
def bars() -> Iterator[Bars]:
    """Show progress bars while the block runs."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=errors) as progress:
        yield Bars(progress)


def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """Print a small table."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
