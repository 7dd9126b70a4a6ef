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
from dermaflow.bundles.bundle import LoadedBundle, load_bundle
from dermaflow.bundles.registry import Registry
from dermaflow.datasets.growth import grow
from dermaflow.errors import FederationError, RegistryError, StorageError
from dermaflow.evaluation.arrivals import measure
from dermaflow.evaluation.frozen import check_unseen, freeze
from dermaflow.evaluation.run import PREDICTIONS_NAME, evaluate_bundle, predict_test
from dermaflow.learning.recipe import Recipe
from dermaflow.learning.train import train
from dermaflow.preparation.prepare import prepare
from dermaflow.preparation.reading import ShardFolder
from dermaflow.scoring.bulk import score
from dermaflow.scoring.planning import resolve_model
from dermaflow.trust.drift import Measures
from flows.agreed import Rule, decide_on_test
from flows.caching import Output, model_identity, report_identity, scoring_identity, shards_identity
from flows.command import dermaflow
from flows.cycle import Turn, known_hashes
from flows.promotion import Decision, decide
from flows.running import interruptible

RETRY_AFTER = [10, 60, 300]
"""Seconds before each further try: a hiccup of a network drive, the restart of a store."""
WITHOUT_RAY = 1000
"""New images up to which Ray's start costs more than it saves."""
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
def train_model(
    shards: str, recipe: Recipe, model: Path, weights: Path | None, workers: int | None, teacher: str | None = None
) -> Output:
    """Train and calibrate a network."""
    with interruptible():
        train(shards, recipe, model, weights=weights, teacher=teacher, workers=workers)
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


_TURN = _CAREFUL | {"persist_result": False}  # what a turn has done stands in its folder


@task(name="measure arrivals", **_TURN)
def measure_arrivals(turn: Turn) -> Measures:
    """Score new images with the champion and measure drift."""
    place = turn.place("measures.json")
    if place.exists():
        return Measures.model_validate_json(place.read_bytes())
    champion = turn.cycle.champion_uri
    if count := turn.write_inputs():
        with interruptible():
            score(
                str(turn.place("inputs.csv")), str(turn.place("findings")), model=champion,
                use_ray=False if count <= WITHOUT_RAY else None,
            )  # fmt: skip
    found = measure(turn.findings(), turn.labels(), resolve_model(champion).bundle)
    storage.write_bytes(place, found.model_dump_json(indent=1).encode())
    return found


@task(name="grow", **_TURN)
def grow_shards(turn: Turn, data: Path, shards: str) -> str:
    """Add newly labelled images to archive and shards, where no lesion changes its split; returns the data hash."""
    landed, archive, manifest = turn.landed(), turn.out / "archive", ShardFolder(shards).manifest
    count = grow(archive, data, turn.labels(), dict(zip(landed["image_id"], landed["uri"], strict=True)))
    with interruptible():
        done = prepare(
            archive, shards, seed=manifest.seed, fractions=manifest.fractions, folds=manifest.folds,
            use_ray=False if count + sum(shard.rows for shard in manifest.shards) <= WITHOUT_RAY else None,
        )  # fmt: skip
    return done.manifest.data_hash


@task(name="predict champion", **_TURN)
def predict_champion(turn: Turn, shards: str) -> None:
    """The champion's probabilities on the test split, after making sure that it never learnt from the frozen part."""
    place, folder = turn.place("champion.parquet"), ShardFolder(shards)
    if place.exists():
        return
    champion = load_bundle(turn.cycle.champion_uri)
    check_unseen(champion, freeze(folder, turn.out / "frozen.parquet"), known_hashes(turn.out))
    predictions = predict_test(champion, folder, lambda step, done, total: None)
    with storage.open_atomic(place) as stream:
        pq.write_table(pa.Table.from_pandas(predictions, preserve_index=False), stream)


@task(name="promote", **_TURN)
def promote_challenger(turn: Turn, model: str, registry: str, holds: bool, reason: str, by: str) -> Decision:
    """Add the challenger to the registry; if the rule holds, promote it in place of the champion of this turn."""
    models = Registry(registry)
    version, champion = models.add(model), turn.cycle.champion
    done = any((e.from_version, e.to_version) == (champion, version.id) for e in models.history())  # before a kill
    if holds and not done:
        try:
            models.promote(version.id, reason=reason, by=by, instead_of=champion)
        except RegistryError as error:
            if models.champion() == models.show(champion):
                raise
            holds, reason = False, f"{reason}. It is not promoted: {error}"
    return Decision(version=version.id, promoted=holds, reason=reason)


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
