"""The work of batches, as Ray actors beside Serve: one that minds the queue, and one for each batch that is scored.

Both live on when Serve stops or a replica dies. When Ray itself is gone, the next start finds the batch ``running``
without a runner and takes it up again: bulk scoring goes on after what its commit log holds.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayActorError

from dermaflow import storage
from dermaflow.errors import DermaflowError
from dermaflow.logs import join_run, log_ids
from dermaflow.scoring.plan import read_status
from serve.jobs import Job, JobStore

log = logging.getLogger(__name__)

NAMESPACE = "dermaflow"
ATTEMPTS = 5  # starts of one batch; a runner that dies every time is not started for ever
EVERY = 0.5  # seconds between two looks at the queue
STALLED = 1800  # seconds without any progress after which a runner is taken for hung: more than any part takes
ASKED_EVERY = 60  # seconds between two looks at how far a batch is


def dispatcher_name(database: str) -> str:
    """One dispatcher a table of batches."""
    return f"dermaflow-dispatcher-{storage.sha256(database.encode())[:12]}"


def runner_name(job_id: str) -> str:
    return f"dermaflow-batch-{job_id}"


def start_dispatcher(database: str, at_once: int) -> Any:
    """The dispatcher of this table, started if there is none."""
    return Dispatcher.options(  # type: ignore[attr-defined]
        name=dispatcher_name(database), namespace=NAMESPACE, lifetime="detached", get_if_exists=True,
        num_cpus=0, max_restarts=-1, max_concurrency=4,
    ).remote(database, at_once)  # fmt: skip


class _Seen(NamedTuple):
    how_far: tuple[str, int]
    since: float
    asked: float


class Stalls:
    """Notices batches that no longer get on: a store that never answers would hold up the queue for ever."""

    def __init__(self) -> None:
        self._seen: dict[str, _Seen] = {}

    def stalled(self, job: Job, now: float) -> bool:
        """Whether the batch was as far as it is now long ago; asks once a minute.

        Args:
            job: A running batch.
            now: Seconds, monotonic.
        """
        last = self._seen.get(job.id)
        if last is not None and now - last.asked < ASKED_EVERY:
            return False
        try:
            status = read_status(job.out)
            how_far = (status.state, status.done)
        except DermaflowError:  # a store that does not answer is no progress either
            how_far = last.how_far if last is not None else ("", 0)
        since = last.since if last is not None and last.how_far == how_far else now
        self._seen[job.id] = _Seen(how_far, since, now)
        return now - since > STALLED

    def forget(self, job_id: str) -> None:
        """It starts anew."""
        self._seen.pop(job_id, None)

    def keep(self, job_ids: set[str]) -> None:
        """Forget all others: they are over."""
        self._seen = {job_id: seen for job_id, seen in self._seen.items() if job_id in job_ids}


@ray.remote
class Dispatcher:
    """Starts waiting batches, as many at once as allowed; takes up those whose runner died or hangs; stops cancelled
    ones."""

    def __init__(self, database: str, at_once: int) -> None:
        from dermaflow.settings import start_logging

        start_logging()
        self._jobs, self._database, self._at_once = JobStore(database), database, at_once
        self._wake, self._stalls = threading.Event(), Stalls()
        threading.Thread(target=self._mind, daemon=True, name="queue").start()

    def wake(self) -> None:
        """Look at the queue now."""
        self._wake.set()

    def _mind(self) -> None:
        while True:
            try:
                self._look()
            except Exception:  # the database may come back
                log.exception("the queue could not be looked at")
                self._wake.wait(5)
            self._wake.wait(EVERY)
            self._wake.clear()

    def _look(self) -> None:
        running = self._jobs.list(("running",))
        self._stalls.keep({job.id for job in running})
        for job in running:
            self._tend(job)
        free = self._at_once - len(running)
        while free > 0 and (job := self._jobs.next_queued()) is not None:
            if self._jobs.begin(job.id):
                self._start(job)
                free -= 1

    def _tend(self, job: Job) -> None:
        runner = _runner(job.id)
        if job.cancel:
            if runner is not None:
                ray.kill(runner)
            self._jobs.cancelled(job.id)
        elif runner is None:
            # it may have ended between the two looks
            now = self._jobs.get(job.id)
            if now is not None and now.state == "running":
                self._start(now)
        elif self._stalls.stalled(job, time.monotonic()):
            log.warning("batch %s: nothing for %d s; its process is ended and started again", job.id, STALLED)
            ray.kill(runner)

    def _start(self, job: Job) -> None:
        self._stalls.forget(job.id)
        if self._jobs.attempt(job.id) > ATTEMPTS:
            self._jobs.fail(job.id, f"gave up: its process died {ATTEMPTS} times, the last time without a word")
            return
        log.info("batch %s: attempt %d", job.id, job.attempts + 1)
        runner = Runner.options(  # type: ignore[attr-defined]
            name=runner_name(job.id), namespace=NAMESPACE, lifetime="detached", get_if_exists=True, num_cpus=0,
            max_restarts=0, max_concurrency=2,
        ).remote(self._database)  # fmt: skip
        runner.run.remote(job.id)


@ray.remote
class Runner:
    """Scores one batch."""

    def __init__(self, database: str) -> None:
        from dermaflow.settings import start_logging

        start_logging()
        self._jobs = JobStore(database)

    def run(self, job_id: str) -> None:
        """Score, and write down how it ended; then this process ends."""
        job = self._jobs.get(job_id)
        join_run(job_id)  # the processes that score for it log under its name
        with log_ids(batch_id=job_id):
            self._run(job)
        ray.actor.exit_actor()

    def _run(self, job: Job | None) -> None:
        if job is not None and job.state == "running":
            try:
                self._score(job)
            except DermaflowError as error:
                self._jobs.fail(job.id, said(error, job))
            except Exception as error:
                log.exception("batch %s failed", job.id)
                self._jobs.fail(job.id, f"internal error: {type(error).__name__}; the log of the service says more")
            else:
                self._jobs.finish(job.id)

    def process(self) -> int:
        import os

        return os.getpid()

    def _score(self, job: Job) -> None:
        from dermaflow.scoring.bulk import score

        score(job.source, job.out, model=job.model["uri"], patients=job.patients)


def said(error: DermaflowError, job: Job) -> str:
    """What went wrong, with the name the sender gave in place of our own path."""
    parts = [str(error.what)]
    if error.expected:
        parts.append(f"expected {error.expected}")
    if error.todo:
        parts.append(error.todo)
    text = "; ".join(parts)
    for path in filter(None, (job.source, job.patients, job.out)):
        text = text.replace(path, job.name if path == job.source else path.rpartition("/")[2])
    return text


def _runner(job_id: str) -> Any | None:
    """The runner of a batch; None if there is none or it has died."""
    try:
        return ray.get_actor(runner_name(job_id), namespace=NAMESPACE)
    except (ValueError, RayActorError):
        return None
