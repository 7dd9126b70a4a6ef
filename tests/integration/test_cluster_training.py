"""Training under Ray Train: same results on one and two workers, after a lost worker and after a lost driver."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from dermaflow.bundles.bundle import LoadedBundle, load_bundle
from dermaflow.datasets.synthetic import generate
from dermaflow.errors import CheckpointError, DataError, RecipeError
from dermaflow.learning.inference import network_of, predict
from dermaflow.learning.recipe import Recipe
from dermaflow.learning.train import train
from dermaflow.preparation.prepare import prepare
from dermaflow.preparation.reading import ShardFolder

STILL = dict.fromkeys(["rotation", "zoom", "stretch", "shift", "brightness", "contrast", "saturation", "tint"], 0.0) | {
    "flips": False
}
pytestmark = pytest.mark.timeout(900)  # a hang should fail the test, a machine busy with other things should not
EPOCH_LINE = re.compile(r"epoch (\d+): loss")


def recipe(**optim: Any) -> dict[str, Any]:
    return {
        "name": "tiny", "input": {"height": 24, "width": 32}, "backbone": {"name": "seed_cnn", "dropout": 0.0},
        "optim": {"precision": "float32", **optim},
    }  # fmt: skip


LONG = recipe(batch_size=2, head_epochs=1, epochs=2, ema=0.9) | {"balance": {"strategy": "oversampling"}}
"""Some 200 steps an epoch, so that what is killed after one epoch is in the middle of the next."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    generate(folder / "ham", 150, 0, height=48, width=64)
    prepare(folder / "ham", folder / "shards", use_ray=False)
    return folder / "shards"


@pytest.fixture(scope="module", autouse=True)
def one_ray() -> Iterator[None]:
    """All tests here share the Ray that the first of them starts; its controller looks at the workers more often."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        yield
    ray.shutdown()


class KillAfterEpoch0(logging.Handler):
    """Kills a training worker when the driver logs the first epoch, in the middle of the second one."""

    def __init__(self, out: Path) -> None:
        super().__init__()
        self.out, self.records = out, out.with_name("records of epoch 0")
        self.epochs: list[int] = []
        self.before: set[int] = set()

    def emit(self, record: logging.LogRecord) -> None:
        if found := EPOCH_LINE.match(record.getMessage()):
            self.epochs.append(int(found[1]))
            if not self.before:
                self.before = training_workers()
                os.kill(max(self.before), signal.SIGKILL)
                shutil.copytree(f"{self.out}.checkpoints", self.records)
            self.after = training_workers()


def training_workers() -> set[int]:
    """Processes of Ray Train's workers below this process."""
    parents, titles = {}, {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(process.name)] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            titles[int(process.name)] = (process / "cmdline").read_bytes().decode(errors="replace")
        except OSError:  # ended meanwhile
            continue

    def is_ours(pid: int) -> bool:
        while pid > 1 and pid != os.getpid():
            pid = parents.get(pid, 0)
        return pid == os.getpid()

    return {pid for pid, title in titles.items() if title.startswith("ray::RayTrainWorker") and is_ours(pid)}


@pytest.fixture(scope="module")
def lost_worker(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedBundle, KillAfterEpoch0]:
    """A run of `LONG` on two workers, one of which is killed."""
    out = tmp_path_factory.mktemp("lost") / "bundle"
    watch, logger = KillAfterEpoch0(out), logging.getLogger("dermaflow.learning.cluster")
    level = logger.level
    logger.addHandler(watch)
    logger.setLevel("INFO")
    try:
        bundle = train(shards, Recipe.model_validate(LONG), out, workers=2)
    finally:
        logger.removeHandler(watch)
        logger.setLevel(level)
    return bundle, watch


def curve(bundle: LoadedBundle, figure: str = "loss") -> list[float]:
    return [entry[figure] for entry in bundle.bundle.training.history]


def test_a_killed_worker_is_replaced_and_the_run_ends_whole(lost_worker: tuple[LoadedBundle, KillAfterEpoch0]) -> None:
    bundle, watch = lost_worker
    assert [entry["epoch"] for entry in bundle.bundle.training.history] == [0, 1, 2]
    assert watch.epochs == [0, 1, 2]  # the epoch before the kill was not done again
    assert len(watch.before) == 2
    assert len(watch.after) == 2
    assert not watch.before & watch.after  # another group of workers finished
    network = network_of(bundle)
    logits, _ = predict(network, np.zeros((2, 24, 32, 3), np.uint8), bundle.bundle.input)
    assert np.isfinite(logits).all()


def test_a_checkpoint_of_another_recipe_is_refused(
    shards: Path, tmp_path: Path, lost_worker: tuple[LoadedBundle, KillAfterEpoch0]
) -> None:
    shutil.copytree(lost_worker[1].records, tmp_path / "bundle.checkpoints")
    with pytest.raises(CheckpointError, match="another recipe"):
        train(shards, Recipe.model_validate(LONG | {"seed": 1}), tmp_path / "bundle", workers=2)
    snapshot = tmp_path / "bundle.checkpoints" / "ray" / "checkpoint_manager_snapshot.json"
    snapshot.write_text(snapshot.read_text()[:40])
    with pytest.raises(CheckpointError, match="unreadable"):
        train(shards, Recipe.model_validate(LONG), tmp_path / "bundle", workers=2)


DRIVER = """
import json, sys
from pathlib import Path
from dermaflow.learning.recipe import Recipe
from dermaflow.learning.train import train
from dermaflow.settings import start_logging
start_logging()
train(sys.argv[1], Recipe.model_validate(json.loads(sys.argv[3])), Path(sys.argv[2]), workers=2)
"""


@pytest.mark.slow
def test_a_killed_driver_goes_on_after_its_last_epoch(
    shards: Path, tmp_path: Path, lost_worker: tuple[LoadedBundle, KillAfterEpoch0]
) -> None:
    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", DRIVER, str(shards), str(tmp_path / "bundle"), json.dumps(LONG)]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    with start() as first:
        assert first.stderr is not None
        lines = []
        for line in first.stderr:
            lines.append(line)
            if EPOCH_LINE.search(line):
                break
        else:
            pytest.fail("no epoch was logged:\n" + "".join(lines[-20:]))
        first.kill()
    assert not (tmp_path / "bundle").exists()
    with start() as second:
        _, log = second.communicate()
    assert second.returncode == 0, log[-2000:]
    resumed = re.search(r"resuming after epoch (\d+)", log)
    assert resumed, log[-2000:]
    done = int(resumed[1])  # 0, or more if the workers outlived the driver by an epoch
    assert [int(number) for number in EPOCH_LINE.findall(log)] == list(range(done + 1, 3))
    bundle, (other, _) = load_bundle(tmp_path / "bundle"), lost_worker
    assert [entry["epoch"] for entry in bundle.bundle.training.history] == [0, 1, 2]
    # Interrupted in two ways, both give the same: the images, their order and the augmentation are those of the plan.
    assert curve(bundle) == pytest.approx(curve(other), rel=1e-5)
    for name, weights in bundle.weights.items():
        np.testing.assert_allclose(weights, other.weights[name], rtol=1e-3, atol=1e-5)


def test_one_and_two_workers_and_no_ray_give_the_same_curve(shards: Path, tmp_path: Path) -> None:
    trained_on = int((ShardFolder(shards).metadata("train")["fold"] != 1).sum())
    choices = recipe(batch_size=trained_on // 2 * 2, head_epochs=4, head_lr=0.03, epochs=3, lr=1e-3, patience=10)
    one_step_epochs = Recipe.model_validate(choices | {"augment": STILL, "validation_fold": 1})
    here = train(shards, one_step_epochs, tmp_path / "here")
    one = train(shards, one_step_epochs, tmp_path / "one", workers=1)
    two = train(shards, one_step_epochs, tmp_path / "two", workers=2)
    assert two.bundle.training.workers == 2
    assert not (tmp_path / "two.checkpoints").exists()
    assert load_bundle(tmp_path / "two").bundle == two.bundle
    # A global batch is the same images. While the backbone is frozen nothing is random: only the order of sums differs.
    for figure in ("loss", "val_loss", "val_accuracy"):
        assert curve(one, figure)[:4] == pytest.approx(curve(here, figure)[:4], rel=1e-5)
        assert curve(two, figure)[:4] == pytest.approx(curve(here, figure)[:4], rel=1e-5)
    assert curve(here)[3] < 0.9 * curve(here)[0]
    # Then each worker draws the backbone's dropout for itself, which moves the loss of 100 images by a few percent.
    assert curve(one) == pytest.approx(curve(here), rel=0.1)
    assert curve(two) == pytest.approx(curve(here), rel=0.1)
    assert {images for run in (here, one, two) for images in curve(run, "images")} == {trained_on // 2 * 2}


def test_an_unreadable_image_ends_the_run_with_its_own_error(shards: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(shards, tmp_path / "shards")
    for file in (broken / "train").glob("*.parquet"):
        content = file.read_bytes()
        file.write_bytes(content.replace(b"\xff\xd8\xff", b"\0\0\0"))  # the first bytes of every JPEG
    with pytest.raises(DataError, match="not readable as"):
        train(broken, Recipe.model_validate(recipe(epochs=1)), tmp_path / "bundle", workers=1)


def test_a_batch_that_does_not_divide_is_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="among 2 workers"):
        train(shards, Recipe.model_validate(recipe(batch_size=33)), tmp_path / "bundle", workers=2)
