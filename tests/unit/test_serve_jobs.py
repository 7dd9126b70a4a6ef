"""The table of batches: each change happens once, and outlives the process; the dispatcher's decisions."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from postgres_here import a_postgres

from dermaflow.errors import DataError, StorageError
from serve import runner
from serve.jobs import JobError, JobStore, new_id
from serve.runner import ASKED_EVERY, STALLED, Stalls, said

MODEL = {"name": "tiny", "version": "tiny-1", "sha256": "a" * 64, "uri": "/models/tiny"}


def queue(store: JobStore, **changes: Any) -> str:
    id = changes.pop("id", None) or new_id()
    row = {"name": "a.zip", "source": "/in/a.zip", "patients": None, "out": "/out", "model": MODEL, "caller": "clinic"}
    store.add(id=id, **(row | changes))
    return id


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    with a_postgres() as folder:
        yield f"postgresql+psycopg://dermaflow@/postgres?host={folder}"


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/state/jobs.sqlite"
    address: str = request.getfixturevalue("postgres")
    import sqlalchemy as sa

    with sa.create_engine(address).begin() as connection:
        connection.execute(sa.text("DROP TABLE IF EXISTS batches"))
    return address


def test_a_batch_goes_its_way_and_outlives_the_process(url: str) -> None:
    store = JobStore(url)
    id = queue(store, name="O'Hara; DROP TABLE batches; --<b>.zip", patients="/in/p.csv")
    assert store.begin(id)
    again = JobStore(url)  # as after a restart
    job = again.get(id)
    assert job is not None
    assert (job.state, job.name, job.patients, job.model) == (
        "running", "O'Hara; DROP TABLE batches; --<b>.zip", "/in/p.csv", MODEL,
    )  # fmt: skip
    assert [job.id for job in again.list(("running",))] == [id]
    assert again.finish(id)
    assert again.counts() == {"finished": 1}
    ended = store.get(id)
    assert ended is not None
    assert ended.created <= ended.started <= ended.finished  # type: ignore[operator]


def test_a_batch_that_has_ended_stays_as_it_ended(url: str) -> None:
    store = JobStore(url)
    id = queue(store)
    store.begin(id)
    assert store.cancelled(id)
    assert not store.finish(id)
    assert not store.fail(id, "late")
    assert not store.begin(id)
    store.ask_to_cancel(id)
    job = store.get(id)
    assert job is not None and (job.state, job.error) == ("cancelled", None)


def test_cancelling_ends_a_waiting_batch_and_marks_a_running_one(url: str) -> None:
    store = JobStore(url)
    waiting, running = queue(store), queue(store)
    store.begin(running)
    for id in (waiting, running):
        store.ask_to_cancel(id)
    states = [(job.state, job.cancel) for job in (store.get(waiting), store.get(running)) if job]
    assert states == [("cancelled", True), ("running", True)]


def test_only_one_of_many_takes_a_batch(url: str) -> None:
    store = JobStore(url)
    id = queue(store)
    taken: list[bool] = []
    threads = [threading.Thread(target=lambda: taken.append(JobStore(url).begin(id))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == [False] * 5 + [True]


def test_the_longest_waiting_comes_first_and_the_newest_is_listed_first(url: str) -> None:
    store = JobStore(url)
    ids = [queue(store) for _ in range(3)]
    first = store.next_queued()
    assert first is not None and first.id == ids[0]
    assert [job.id for job in store.list()] == ids[::-1]
    assert [job.id for job in store.list(limit=1)] == ids[-1:]
    assert [store.attempt(ids[0]) for _ in range(3)] == [1, 2, 3]


def test_a_database_that_cannot_be_reached_is_said_without_its_password(tmp_path: Path) -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(JobError) as caught:
        JobStore(f"postgresql+psycopg://someone:secret@/nowhere?host={tmp_path}")
    assert "secret" not in str(caught.value)


def test_an_error_names_the_upload_as_the_sender_did(tmp_path: Path) -> None:
    store = JobStore(f"sqlite:///{tmp_path}/jobs.sqlite")
    job = store.get(queue(store, source="/var/state/x/archive.zip", name="clinic.zip"))
    assert job is not None
    error = DataError(
        "/var/state/x/archive.zip is no archive", where="/var/state/x", expected="a .zip", todo="send it again"
    )
    assert said(error, job) == "clinic.zip is no archive; expected a .zip; send it again"


def test_a_batch_that_no_longer_gets_on_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, asked, done = JobStore(f"sqlite:///{tmp_path}/jobs.db"), 0, 0

    def how_far(out: str) -> Any:
        nonlocal asked
        asked += 1
        if done < 0:
            raise StorageError("does not answer")
        return SimpleNamespace(state="scoring", done=done)

    monkeypatch.setattr(runner, "read_status", how_far)
    stalls, job = Stalls(), store.get(queue(store))
    assert job is not None
    times = range(0, 3 * STALLED, 30)
    for now in times:
        done = now
        assert not stalls.stalled(job, now), "it gets on"
    assert asked == len(times) * 30 // ASKED_EVERY
    last = now
    done = -1
    assert not any(stalls.stalled(job, last + s) for s in range(0, STALLED, 30))
    assert any(stalls.stalled(job, last + STALLED + s) for s in range(0, 3 * ASKED_EVERY, 30))
    stalls.forget(job.id)
    assert not stalls.stalled(job, last + 2 * STALLED)
