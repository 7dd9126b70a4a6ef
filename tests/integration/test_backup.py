"""What docs/upkeep.md says of backup and restore, done: registry by hash, jobs in SQLite and in PostgreSQL."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3_here import own_s3
from tiny_bundle import a_bundle, save_tiny

from dermaflow import storage
from dermaflow.bundles.registry import Registry
from dermaflow.errors import BundleError
from serve.jobs import JobStore, new_id

MODEL = {"name": "tiny", "version": "tiny-1", "sha256": "a" * 64, "uri": "/models/tiny"}


def queue(store: JobStore) -> str:
    id = new_id()
    store.add(id=id, name="a.zip", source="/in", patients=None, out="/out", model=MODEL, caller="clinic")
    return id


def test_a_registry_is_copied_and_every_byte_of_the_copy_checked(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    for name, weight in (("a", 1.0), ("b", 2.0)):
        registry.add(save_tiny(tmp_path / name, a_bundle(name=name), weight))
        registry.promote(name, reason="r", by="Ada")
    with own_s3("backup"):
        storage.copy_folder(registry.uri, "s3://backup/registry")
        shutil.rmtree(registry.uri)
        restored = Registry(tmp_path / "restored")
        storage.copy_folder("s3://backup/registry", restored.uri)
    assert [v.bundle.name for v in restored.list()] == ["a", "b"]
    assert restored.champion() is not None and restored.champion().bundle.name == "b"  # type: ignore[union-attr]
    assert restored.verify() == 2
    assert restored.rollback(reason="tried", by="Ada").bundle.name == "a"  # the history came along
    weights = next(Path(restored.uri).glob("models/a-*/weights.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(BundleError, match="changed since it was written"):
        restored.verify()


def test_sqlite_is_saved_while_batches_are_queued(tmp_path: Path) -> None:
    store, queued = JobStore(f"sqlite:///{tmp_path / 'jobs.sqlite'}"), []
    stop = threading.Event()

    def busy() -> None:
        while not stop.is_set():
            queued.append(queue(store))

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        while len(queued) < 20:
            stop.wait(0.01)
        before = list(queued)
        with sqlite3.connect(tmp_path / "jobs.sqlite") as source, sqlite3.connect(tmp_path / "saved.sqlite") as target:
            source.backup(target)
    finally:
        stop.set()
        thread.join()
    for path in tmp_path.glob("jobs.sqlite*"):
        path.unlink()
    (tmp_path / "saved.sqlite").rename(tmp_path / "jobs.sqlite")
    restored = JobStore(f"sqlite:///{tmp_path / 'jobs.sqlite'}")
    found = {job.id for job in restored.list(limit=100_000)}
    assert set(before) <= found <= set(queued)
    assert restored.begin(before[0])


@pytest.fixture
def postgres() -> Iterator[Path]:
    """The folder of a PostgreSQL of our own; it refuses to run as root."""
    pytest.importorskip("psycopg")
    if shutil.which("initdb") is None or shutil.which("pg_dump") is None:
        pytest.skip("no PostgreSQL here")
    folder = Path(f"/tmp/dermaflow-backup-{os.getpid()}")
    folder.mkdir(mode=0o700)
    if os.geteuid() == 0:
        shutil.chown(folder, "nobody")
    data = str(folder / "data")
    try:
        pg(folder, "initdb", "-D", data, "-U", "dermaflow", "-A", "trust", "-E", "UTF8", "--no-sync")
        pg(folder, "pg_ctl", "-D", data, "-w", "-l", f"{folder}/log", "-o", f"-h '' -k {folder} -F", "start")
        try:
            yield folder
        finally:
            pg(folder, "pg_ctl", "-D", data, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def pg(folder: Path, *command: str, feed: bytes = b"") -> bytes:
    prefix = ["setpriv", "--reuid=nobody", "--clear-groups", "--no-new-privs"] if os.geteuid() == 0 else []
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "LC_ALL": "C"}
    if command[0] == "pg_ctl":  # its server keeps the pipe open
        subprocess.run([*prefix, *command], check=True, cwd="/", env=environment, stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL)  # fmt: skip
        return b""
    return subprocess.run(
        [*prefix, *command], check=True, cwd="/", env=environment, input=feed, capture_output=True
    ).stdout


def test_postgresql_is_dumped_and_restored_into_another_database(postgres: Path) -> None:
    address = "postgresql+psycopg://dermaflow@/{}?host=" + str(postgres)
    store = JobStore(address.format("postgres"))
    ids = [queue(store) for _ in range(3)]
    store.begin(ids[0])
    client = ("-h", str(postgres), "-U", "dermaflow")
    dump = pg(postgres, "pg_dump", *client, "--no-owner", "postgres")
    pg(postgres, "createdb", *client, "restored")
    pg(postgres, "psql", *client, "-v", "ON_ERROR_STOP=1", "-q", "-d", "restored", feed=dump)
    restored = JobStore(address.format("restored"))
    assert {job.id: job.state for job in restored.list()} == dict(
        zip(ids, ("running", "queued", "queued"), strict=True)
    )
    assert restored.begin(ids[1])
