"""A command as a step of a flow: its lines are logged, its errors keep their class, and it ends with the run."""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path

import pytest

from dermaflow.errors import CheckpointError, DermaflowError, FederationError, RecipeError, RegistryError
from flows.command import _failure, dermaflow, run_logged


def test_lines_are_logged_as_they_come(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "dermaflow.flows"):
        code, said = run_logged([sys.executable, "-c", "import sys; print('one'); print('two', file=sys.stderr)"])
    assert code == 0 and sorted(said.split()) == ["one", "two"]
    assert sorted(record.message for record in caplog.records) == ["one", "two"]


@pytest.mark.parametrize("obedient", [True, False])
def test_what_ends_the_wait_ends_the_command(tmp_path: Path, obedient: bool) -> None:
    """As a cancellation and a time limit do it: a handler of a signal raises in the middle of the wait."""
    place = tmp_path / "pid"
    deaf = "" if obedient else "signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    program = f"import os, signal, time; {deaf} open({str(place)!r}, 'w').write(str(os.getpid())); time.sleep(600)"

    class Cancelled(BaseException): ...

    def cancel(number: int, frame: object) -> None:
        if not place.exists() or not place.read_text():  # not yet
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            return
        raise Cancelled

    before = signal.signal(signal.SIGALRM, cancel)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(Cancelled):
            run_logged([sys.executable, "-c", program], ending=60 if obedient else 0.5)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    with pytest.raises(ProcessLookupError):
        os.kill(int(place.read_text()), 0)


@pytest.mark.parametrize(
    ("code", "said", "kind", "text"),
    [
        (1, "fedavg: 1 of 3\nerror: FederationError: hub: no answer.\n", FederationError, "hub: no answer."),
        (1, "error: RecipeError: bach_size\n", RecipeError, "bach_size"),
        (1, "error: CheckpointError: another plan\n", CheckpointError, "another plan"),
        (1, "error: Unheard: x\n", DermaflowError, "x"),
        (-9, "fedavg: 1 of 3\n", FederationError, "signal 9"),
        (2, "Usage: dermaflow\nNo such option\n", DermaflowError, "No such option"),
    ],
)
def test_the_error_is_that_of_the_command(code: int, said: str, kind: type, text: str) -> None:
    error = _failure("federate", code, said)
    assert type(error) is kind and text in str(error)


def test_the_command_line_is_found_and_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="holds no model"):
        dermaflow("models", "show", "some", "--registry", str(tmp_path))
