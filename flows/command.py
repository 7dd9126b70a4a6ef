"""A long command of the project as a step of a flow: its lines are in the run's logs, and it ends with the run.

What flows may not import they run as a process of its own. Federated training is that: Flower and Prefect do not meet.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import subprocess
import sys

from dermaflow import errors
from dermaflow.errors import DermaflowError, FederationError

ENDING = 25.0
"""Seconds that a command has to stop what it started; Prefect kills a cancelled run after 30."""

log = logging.getLogger("dermaflow.flows")
_ERROR = re.compile(r"^error: (\w+): (.*)", re.DOTALL | re.MULTILINE)


def dermaflow(*arguments: str) -> None:
    """Run ``dermaflow`` with these arguments and wait for its end, whatever it is; each line it says is logged.

    Args:
        arguments: Of the command line.

    Raises:
        DermaflowError: It failed; the error has the class and the words of the command's own. A command that something
            else ended raises FederationError, for it can go on where it stopped.
    """
    code, said = run_logged([sys.executable, "-m", "dermaflow.cli.main", *arguments])
    if code:
        raise _failure(" ".join(arguments[:2]), code, said)


def run_logged(command: list[str], ending: float = ENDING) -> tuple[int, str]:
    """Run a command to its end; its status, and all that it said.

    Whatever exception ends the wait ends the command, too: it is asked to stop, and killed `ending` seconds later.
    """
    plain = {"NO_COLOR": "1", "COLUMNS": "160", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        env=os.environ | plain, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    said = []
    try:
        for line in process.stdout:
            said.append(line)
            if line.strip():
                log.info("%s", line.rstrip())
        return process.wait(), "".join(said)
    except BaseException:  # the run is cancelled, or its time is over
        _end(process, ending)
        raise


def _failure(command: str, code: int, said: str) -> DermaflowError:
    if found := _ERROR.search(said):
        kind = getattr(errors, found[1], DermaflowError)
        return kind(found[2].strip()) if issubclass(kind, DermaflowError) else DermaflowError(found[2].strip())
    if code < 0 or code > 128:
        return FederationError(f"dermaflow {command} was ended by signal {-code if code < 0 else code - 128}")
    return DermaflowError(f"dermaflow {command}: status {code}: {said.strip()[-800:]}")


def _end(process: subprocess.Popen[str], ending: float) -> None:
    """Ask the command to stop, and kill it with what shares its session if it does not."""
    process.terminate()
    try:
        process.wait(ending)
    except subprocess.TimeoutExpired:
        log.error("process %d did not stop in %.0f s and is killed", process.pid, ending)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
