"""Trials of a sweep side by side as Ray tasks; one that is killed goes on, one that fails says why."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import psutil
import pytest

pytest.importorskip("ray")

from tiny_data import tiny_shards

from dermaflow.errors import DataError
from dermaflow.experiments.cluster import run_trials
from dermaflow.experiments.sweep import run_trial
from dermaflow.learning.recipe import Recipe
from dermaflow.preparation import cluster
from dermaflow.preparation.cluster import connect


@pytest.fixture(scope="module", autouse=True)
def a_ray() -> Iterator[None]:
    connect(cpus=2)
    yield
    cluster.disconnect()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_shards(tmp_path_factory.mktemp("sweep")))


def a_recipe(**optim: object) -> Recipe:
    return Recipe.model_validate({
        "name": "toy", "input": {"height": 24, "width": 32}, "backbone": {"name": "seed_cnn"}, "validation_fold": 0,
        "optim": {"batch_size": 8, "head_epochs": 0, "epochs": 2, "lr": 0.003, "layer_decay": 1.0} | optim,
    })  # fmt: skip


def test_trials_on_ray_give_what_one_process_gives_even_when_one_is_killed(shards: str, tmp_path: Path) -> None:
    recipes = {"usual": a_recipe(epochs=8), "slow": a_recipe(lr=0.0003)}
    killed: list[int] = []

    def kill_one() -> None:
        end = time.monotonic() + 120
        while not killed and time.monotonic() < end:
            time.sleep(0.02)
            if not list(tmp_path.glob("out/trials/*/latest.pt")):
                continue  # the first epoch of the first of them has not ended
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if not killed and "ray::run_trial" in " ".join(process.cmdline()):
                        process.kill()
                        killed.append(process.pid)

    watcher = threading.Thread(target=kill_one)
    watcher.start()
    done: list[int] = []
    places = run_trials(recipes, shards, tmp_path / "out", 2, done.append)
    watcher.join()
    assert killed and done == [1, 2] and list(places) == ["usual", "slow"]
    alone = run_trial(recipes["slow"], shards, tmp_path / "alone")
    found, expected = (pd.read_parquet(place / "predictions.parquet") for place in (places["slow"], alone))
    pd.testing.assert_frame_equal(found, expected, rtol=1e-3)


def test_a_trial_that_fails_says_why(shards: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="images are in fold 77"):
        run_trials({"wrong": a_recipe().model_copy(update={"validation_fold": 77})}, shards, tmp_path, 1, print)
