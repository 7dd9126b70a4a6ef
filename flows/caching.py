"""Work that is done is not done again: keys by content, and a look at the disk before an earlier result is trusted.

Prefect keeps what a task returned under a key. Here a task returns where its output lies and the hash by which it is
known, never the output itself, so a key that is found proves nothing about the folder: `run_once` checks it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from prefect import Task
from pydantic import BaseModel

import dermaflow
from dermaflow import storage
from dermaflow.bundles.bundle import read_files
from dermaflow.errors import DataError, DermaflowError
from dermaflow.evaluation.report import CARD_NAME, METRICS_NAME, REPORT_NAME
from dermaflow.evaluation.run import FINDINGS_NAME, PREDICTIONS_NAME
from dermaflow.learning.recipe import Recipe
from dermaflow.preparation.reading import ShardFolder
from dermaflow.scoring.plan import FINDINGS, PAGE, SUMMARY

_PREPARING = ("schemas", "datasets", "preparation")
_TRAINING = (*_PREPARING, "learning", "trust", "bundles")
_SOURCES = {
    "prepare": _PREPARING,
    "train": _TRAINING,
    "evaluate": (*_TRAINING, "evaluation"),
    "score": (*_TRAINING, "scoring", "pathways"),
}
"""Packages whose code decides what a step gives: what other code gave is not reused."""

log = logging.getLogger("dermaflow.flows")  # beneath the library's logger, so that its lines reach the run's logs


class Output(BaseModel):
    """What a task left on disk.

    Attributes:
        path: Folder, absolute or ``s3://``.
        identity: Hash of its content, as one of the functions below gives it.
    """

    path: str
    identity: str


def run_once(task: Task[Any, Output], identity: Callable[[str], str], key: str, hours: float, **inputs: Any) -> Output:
    """Run a task, unless an earlier run with this key left its output, and it is still there as it was.

    Args:
        task: Returns an `Output`.
        identity: Gives the hash of an output, or raises a DermaflowError where it is gone or damaged.
        key: Names everything the output depends on, see `cache_key`.
        hours: Longest time it may take.
        inputs: Arguments of the task.
    """
    limited = task.with_options(cache_key_fn=lambda context, inputs: key, timeout_seconds=hours * 3600)
    output = limited(**inputs)
    try:
        unchanged = identity(output.path) == output.identity
    except DermaflowError:
        unchanged = False
    if unchanged:
        return output
    log.warning("%s is gone or was changed since it was written: %s runs again", output.path, task.name)
    return limited.with_options(refresh_cache=True)(**inputs)


def cache_key(step: str, *parts: object) -> str:
    """A key that names a step, what goes into it, where its output goes, and the code that runs."""
    content = (*map(str, parts), code_version(_SOURCES[step]))
    return f"dermaflow-{step}-{storage.sha256(repr(content).encode())}"


@lru_cache
def code_version(packages: tuple[str, ...]) -> str:
    """SHA-256 over the sources of some packages of the library."""
    root = Path(dermaflow.__file__).parent
    files = sorted(file for package in packages for file in (root / package).rglob("*.*") if file.suffix != ".pyc")
    return storage.sha256("".join(f"{file.relative_to(root)} {storage.sha256_file(file)}\n" for file in files).encode())


def archive_identity(folder: Path) -> str:
    """SHA-256 over name, size, time and mode of every file, by which `prepare` knows an image it has seen as well."""
    if not folder.is_dir():
        raise DataError("no such folder", where=folder, expected="a HAM10000 folder")
    lines = []
    for parent, _, names in os.walk(folder, followlinks=True):
        for path in (Path(parent, name) for name in names):
            try:
                stat = path.stat()
                facts = f"{stat.st_size} {stat.st_mtime_ns} {stat.st_mode:o}"
            except OSError as error:  # a link to nowhere; `prepare` puts it into quarantine
                facts = f"{error.errno}"
            lines.append(f"{path.relative_to(folder)} {facts}\n")
    return storage.sha256("".join(sorted(lines)).encode())


def shards_identity(uri: str) -> str:
    """The data hash of a shard folder; its files are there and have their sizes."""
    return ShardFolder(uri).manifest.data_hash


def weights_identity(recipe: Recipe, weights: Path | None) -> str:
    """SHA-256 of the file of first weights, or the name of those that are no file."""
    named = str(weights) if weights else str(recipe.backbone.weights)
    return named if named in ("None", "none", "imagenet") else storage.sha256_file(named)


def model_identity(uri: str) -> str:
    """SHA-256 over a bundle, every byte checked, without what evaluating it adds: figures and card."""
    bundle, _ = read_files(uri)
    return storage.sha256(bundle.model_dump_json(exclude={"metrics", "card_sha256"}).encode())


def report_identity(folder: str) -> str:
    """SHA-256 over the files of a report."""
    names = (METRICS_NAME, PREDICTIONS_NAME, FINDINGS_NAME, CARD_NAME, REPORT_NAME)
    return storage.sha256("".join(storage.sha256_file(storage.join(folder, name)) for name in names).encode())


def scoring_identity(folder: str) -> str:
    """SHA-256 over what a finished run of bulk scoring found and says."""
    return storage.sha256(
        "".join(storage.sha256_file(storage.join(folder, n)) for n in (FINDINGS, PAGE, SUMMARY)).encode()
    )
