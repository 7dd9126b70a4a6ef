"""A PostgreSQL of our own on a socket in a folder; a test is skipped where there is none."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def a_postgres() -> Iterator[Path]:
    """Its folder, which is the ``host`` of its address; user ``dermaflow``, database ``postgres``. It refuses to run as
    root."""
    pytest.importorskip("psycopg")
    if shutil.which("initdb") is None:
        pytest.skip("no PostgreSQL here")
    folder = Path(tempfile.mkdtemp(prefix="dermaflow-pg-", dir="/tmp"))  # a socket's path must be short
    prefix: list[str] = []
    if os.geteuid() == 0:
        shutil.chown(folder, "nobody")
        prefix = ["setpriv", "--reuid=nobody", "--clear-groups", "--no-new-privs"]

    def run(*command: str) -> None:
        subprocess.run([*prefix, *command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/",
                       env={"PATH": os.environ["PATH"], "HOME": str(folder), "LC_ALL": "C"})  # fmt: skip

    data = str(folder / "data")
    try:
        run("initdb", "-D", data, "-U", "dermaflow", "-A", "trust", "-E", "UTF8", "--no-sync")
        run("pg_ctl", "-D", data, "-w", "-l", str(folder / "log"), "-o", f"-h '' -k {folder} -F", "start")
        try:
            yield folder
        finally:
            run("pg_ctl", "-D", data, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
