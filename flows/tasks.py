"""The library's steps as Prefect tasks: each calls it once, and returns where the output lies and its hash."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from prefect import Task, task
from prefect.client.schemas.objects import State, TaskRun
from prefect.task_engine import TaskRunTimeoutError

from dermaflow import storage
from dermaflow.bundles.bundle import LoadedBundle
from dermaflow.errors import FederationError, StorageError
from dermaflow.evaluation.run import PREDICTIONS_NAME, evaluate_bundle, predict_test
from dermaflow.learning.recipe import Recipe
from dermaflow.learning.train import train
from dermaflow.preparation.prepare import prepare
from dermaflow.preparation.reading import ShardFolder
from dermaflow.scoring.bulk import score
from flows.agreed import Rule, decide_on_test
from flows.caching import Output, model_identity, report_identity, scoring_identity, shards_identity
from flows.command import dermaflow
from flows.promotion import Decision, decide
from flows.running import interruptible

RETRY_AFTER = [10, 60, 300]
"""Seconds before each further try: a hiccup of a network drive, the restart of a store."""
_LASTING = (TaskRunTimeoutError, FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)


def is_curable(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Whether another try can help: something could not be read or written just now. A bad recipe stays bad."""
    error = state.result(raise_on_failure=False)
    cause = error.__cause__ if isinstance(error, StorageError) else error
    return isinstance(cause, OSError) and not isinstance(cause, _LASTING) and cause.errno != errno.ENOSPC


def can_go_on(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Whether another try can help a federated run, which goes on after its last finished round: a site or the hub was
    away. A folder of another plan stays that."""
    return isinstance(state.result(raise_on_failure=False), FederationError) or is_curable(task, run, state)


_CAREFUL: dict[str, Any] = {
    "retries": len(RETRY_AFTER),
    "retry_delay_seconds": RETRY_AFTER,
    "retry_condition_fn": is_curable,
    "persist_result": True,
    "result_serializer": "json",
}


@task(name="prepare", **_CAREFUL)
def prepare_shards(data: Path, shards: str, seed: int) -> Output:
    """Split an archive by lesion and write shards."""
    with interruptible():
        prepare(data, shards, seed=seed)
    return Output(path=shards, identity=shards_identity(shards))


@task(name="train", **_CAREFUL)
def train_model(shards: str, recipe: Recipe, model: Path, weights: Path | None, workers: int | None) -> Output:
    """Train and calibrate a network."""
    with interruptible():
        train(shards, recipe, model, weights=weights, workers=workers)
    return Output(path=str(model), identity=model_identity(str(model)))


@task(name="evaluate", **_CAREFUL)
def evaluate_model(model: str, shards: str, report: Path, seed: int, resamples: int) -> Output:
    """Measure a model on the test split and write the report."""
    evaluate_bundle(model, shards, report, seed=seed, resamples=resamples)
    return Output(path=str(report), identity=report_identity(str(report)))


@task(name="score", **_CAREFUL)
def score_source(source: str, output: str, model: str, patients: str | None) -> Output:
    """Score every image of a source once; a further try goes on where this one stopped."""
    with interruptible():
        score(source, output, model=model, patients=patients)
    return Output(path=output, identity=scoring_identity(output))


@task(name="register", **_CAREFUL | {"persist_result": False})
def register_model(model: str, registry: str, by: str) -> Decision:
    """Add a model to the registry and promote it if it is the better one; doing it twice changes nothing."""
    return decide(model, registry, by)


@task(name="federate", **_CAREFUL | {"persist_result": False, "retry_condition_fn": can_go_on})
def train_federated(arguments: list[str], out: Path) -> Output:
    """Train over sites by the command, which does nothing twice and goes on where an earlier run stopped."""
    dermaflow("federate", *arguments)
    return Output(path=str(out / "model"), identity=model_identity(str(out / "model")))


@task(name="federation report", **_CAREFUL | {"persist_result": False})
def report_federation(out: Path, champion: str | None) -> Output:
    """The page of a federated run and the matrix of every model at every site, with the champion where it is given."""
    more = ["--model", f"champion={champion}"] if champion else []
    dermaflow("federate", "report", str(out), "--out", str(out / "report.html"), *more)
    return Output(path=str(out / "report.html"), identity=storage.sha256_file(str(out / "report.html")))


@task(name="promote on the agreed test", **_CAREFUL | {"persist_result": False})
def promote_on_test(model: str, registry: str, test: str, evaluation: str, rule: Rule, by: str) -> Decision:
    """Add a model to the registry; promote it if the rule holds against the champion, measured on the same test."""

    def predict(champion: LoadedBundle) -> pd.DataFrame:
        return predict_test(champion, ShardFolder(test), lambda step, done, total: None)

    data = storage.read_bytes(storage.join(evaluation, PREDICTIONS_NAME))
    return decide_on_test(model, registry, pq.read_table(pa.BufferReader(data)).to_pandas(), predict, rule, by)
