"""From shards to a calibrated bundle in one process, also when that process is killed on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_data import draw, prepare_here, tiny_shards

from dermaflow.bundles.bundle import load_bundle
from dermaflow.errors import CheckpointError, DataError, ShardError
from dermaflow.learning import local
from dermaflow.learning.backbones import BackboneConfig, Network, build
from dermaflow.learning.inference import predict
from dermaflow.learning.local import CHECKPOINT_NAME
from dermaflow.learning.recipe import Recipe
from dermaflow.learning.train import train
from dermaflow.preparation.reading import ShardFolder, labels_of
from dermaflow.trust.ood import ood_score
from dermaflow.trust.temperature import scale

TESTS = Path(__file__).parents[1]
CHOICES: dict[str, Any] = {
    "name": "tiny", "seed": 3, "input": {"height": 24, "width": 32, "views": 4}, "backbone": {"name": "seed_cnn"},
    "balance": {"strategy": "weighted_sampling", "power": 0.5}, "monitor_every": 2,
    "optim": {"batch_size": 16, "head_epochs": 1, "epochs": 3, "ema": 0.5},
}  # fmt: skip
RECIPE = Recipe.model_validate(CHOICES)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="module")
def undisturbed(shards: Path) -> Path:
    """The bundle of a run in one go."""
    out = shards.parent / "undisturbed"
    train(shards, RECIPE, out)
    return out


def test_a_calibrated_bundle_comes_out(shards: Path, undisturbed: Path) -> None:
    loaded, folder = load_bundle(undisturbed), ShardFolder(shards)
    bundle, record = loaded.bundle, loaded.bundle.training
    assert (bundle.name, bundle.backbone, bundle.input) == ("tiny", "seed_cnn", RECIPE.input_spec)
    assert Recipe.model_validate(record.recipe) == RECIPE and record.recipe_hash == RECIPE.digest
    assert (record.seed, record.data_hash, record.workers) == (3, folder.manifest.data_hash, 1)
    assert record.device == "cpu" and record.versions["torch"] == torch.__version__.partition("+")[0]
    assert record.epochs == 4 and [entry["epoch"] for entry in record.history] == [0, 1, 2, 3]
    assert record.seconds == pytest.approx(sum(entry["seconds"] for entry in record.history))
    looks = ["val_loss" in entry and "val_balanced_accuracy" in entry for entry in record.history]
    assert looks == [True, True, False, True]  # every second epoch, and the last of each phase
    counts = folder.manifest.counts["train"]
    assert bundle.train_priors == pytest.approx([n / sum(counts.values()) for _, n in sorted(counts.items())])
    assert not undisturbed.with_name("undisturbed.checkpoints").exists()

    # The calibration is that of these weights on the calibration split, as evaluation will see them.
    network = Network(build(RECIPE.backbone).body, 128, bundle.dropout)
    network.load_state_dict(loaded.weights)
    meta = folder.metadata("calibration")
    logits, features = predict(network, folder.pixels("calibration", 24, 32), bundle.input)
    calibration = bundle.calibration
    assert calibration is not None and calibration.ood is not None and loaded.reference is not None
    assert (calibration.images, calibration.lesions) == (len(meta), meta["lesion_id"].nunique())
    assert calibration.data_hash == folder.manifest.data_hash
    scores = ood_score(features, loaded.reference)
    assert np.quantile(scores, calibration.ood.quantile) == pytest.approx(calibration.ood.threshold, rel=0.01)

    # What new images are compared with is the training split, image by image.
    trained = folder.metadata("train")
    assert loaded.reference.image_ids == tuple(trained["image_id"]) and loaded.reference.dx == tuple(trained["dx"])
    assert loaded.reference.lesion_ids == tuple(trained["lesion_id"])
    _, known = predict(network, folder.pixels("train", 24, 32), bundle.input.model_copy(update={"views": 1}))
    unit = known / np.linalg.norm(known, axis=1, keepdims=True)
    np.testing.assert_allclose(loaded.reference.features.astype(float), unit, atol=2e-3)
    labels = labels_of(meta["dx"])
    p = scale(logits, calibration.temperature, np.array(calibration.bias))
    q = scale(logits, 1.0, np.zeros(7))
    assert -np.log(p[np.arange(len(p)), labels]).mean() <= -np.log(q[np.arange(len(q)), labels]).mean() + 0.05


def test_killed_after_an_epoch_it_goes_on_and_ends_the_same(shards: Path, undisturbed: Path, tmp_path: Path) -> None:
    code = """
import os, signal, sys
from pathlib import Path
from dermaflow.learning.recipe import Recipe
from dermaflow.learning.train import train
def kill(epoch, step, steps, loss):
    if (epoch, step) == (2, 2):
        os.kill(os.getpid(), signal.SIGKILL)
train(sys.argv[1], Recipe.model_validate_json(sys.argv[2]), Path(sys.argv[3]), on_step=kill)
"""
    out = tmp_path / "bundle"
    run = subprocess.run(
        [sys.executable, "-c", code, str(shards), RECIPE.model_dump_json(), str(out)],
        env=os.environ | {"PYTHONPATH": str(TESTS)}, check=False,
    )  # fmt: skip
    assert run.returncode == -signal.SIGKILL
    assert (tmp_path / "bundle.checkpoints" / CHECKPOINT_NAME).is_file() and not out.exists()
    epochs: list[int] = []
    loaded = train(shards, RECIPE, out, on_step=lambda epoch, *rest: epochs.append(epoch))
    assert set(epochs) == {2, 3} and loaded.bundle.training.epochs == 4
    whole = load_bundle(undisturbed)
    assert all(torch.equal(value, whole.weights[key]) for key, value in loaded.weights.items())
    assert loaded.bundle.calibration == whole.bundle.calibration
    assert not (tmp_path / "bundle.checkpoints").exists()


def test_two_runs_do_not_train_one_model_at_once(shards: Path, tmp_path: Path) -> None:
    out, refused = tmp_path / "bundle", []

    def begin_another(*progress: object) -> None:
        with pytest.raises(CheckpointError, match="another run trains this model") as error:
            train(shards, RECIPE, out)
        refused.append(error.value)

    loaded = train(shards, RECIPE, out, on_step=begin_another)
    assert refused and loaded.bundle.training.epochs == 4
    assert not (tmp_path / "bundle.checkpoints").exists()


def test_a_checkpoint_of_another_recipe_or_none_at_all_is_refused(shards: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(epoch: int, *rest: object) -> None:
        if epoch == 1:
            raise Stop

    with pytest.raises(Stop):
        train(shards, RECIPE, tmp_path / "bundle", on_step=stop)
    other = RECIPE.model_copy(update={"seed": 4})
    with pytest.raises(CheckpointError, match=r"the checkpoint belongs to another recipe.*Train into another --out"):
        train(shards, other, tmp_path / "bundle")
    checkpoint = tmp_path / "bundle.checkpoints" / CHECKPOINT_NAME
    for damage, message in ((checkpoint.read_bytes()[:1000], "unreadable"), (b"", "unreadable")):
        checkpoint.write_bytes(damage)
        with pytest.raises(CheckpointError, match=rf"{CHECKPOINT_NAME}: {message}.*Remove the folder to start anew"):
            train(shards, RECIPE, tmp_path / "bundle")
    torch.save({"weight": torch.zeros(1)}, checkpoint)
    with pytest.raises(CheckpointError, match="no checkpoint of a training run"):
        train(shards, RECIPE, tmp_path / "bundle")


def test_weights_from_a_file(shards: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    body = build(BackboneConfig(name="seed_cnn")).body.state_dict()
    save_file(body, tmp_path / "mine.safetensors")
    still = RECIPE.model_copy(update={"optim": RECIPE.optim.model_copy(update={"epochs": 0, "ema": 0.0})})
    loaded = train(shards, still, tmp_path / "bundle", weights=tmp_path / "mine.safetensors")
    assert all(torch.equal(loaded.weights[f"body.{key}"], value) for key, value in body.items())
    assert loaded.bundle.training.initial_weights == "mine.safetensors"
    assert loaded.bundle.training.recipe_hash != still.digest


def test_early_stopping_watches_the_fold_that_is_not_trained_on(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = (ShardFolder(shards).metadata("train")["fold"] == 2).sum()
    seen: list[tuple[int, int]] = []
    real = local.memory_feed

    def spy(pixels: np.ndarray, labels: np.ndarray, *rest: Any) -> Any:
        seen.append((len(pixels), len(labels)))
        return real(pixels, labels, *rest)

    monkeypatch.setattr(local, "memory_feed", spy)
    watched: list[int] = []
    monkeypatch.setattr(local, "validator", lambda pixels, labels, recipe: watched.append(len(pixels)))
    chosen = Recipe.model_validate(CHOICES | {"validation_fold": 2})
    train(shards, chosen, tmp_path / "bundle")
    total = sum(ShardFolder(shards).manifest.counts["train"].values())
    assert seen == [(total - held, total - held)] and watched == [held] and 0 < held < total / 2


def test_a_source_can_be_kept_out(shards: Path) -> None:
    folder = ShardFolder(shards)
    meta = folder.metadata("train")
    for site in sorted(meta["site"].unique()):
        assert set(meta.loc[folder.held_out(site), "site"]) == {site}
    assert not folder.held_out(None).any() and set(meta.loc[folder.held_out(3), "fold"]) == {3}
    with pytest.raises(DataError, match=r"are in source nowhere; .*one of several sources \(.*vidir_modern"):
        folder.held_out("nowhere")


def test_a_share_of_the_lesions_can_be_learnt_from(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ShardFolder(shards)
    lesions = folder.metadata("train")["lesion_id"]
    small, large = folder.drawn(0.3), folder.drawn(0.6)
    assert not (small & ~large).any() and 0 < small.sum() < large.sum() < len(lesions) and folder.drawn(None).all()
    assert not set(lesions[large]) & set(lesions[~large])  # whole lesions
    with pytest.raises(DataError, match=r"train_share 1e-09: no training lesion is left"):
        folder.drawn(1e-9)
    seen: list[int] = []
    real = local.memory_feed
    monkeypatch.setattr(local, "memory_feed", lambda pixels, *rest: seen.append(len(pixels)) or real(pixels, *rest))
    train(shards, Recipe.model_validate(CHOICES | {"train_share": 0.6, "validation_fold": 2}), tmp_path / "bundle")
    assert seen == [(large & ~folder.held_out(2)).sum()]


def test_what_cannot_be_trained_is_said_first(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"validation_fold: 0 of \d+ training images are in fold 9; expected .* 0 to 4"):
        train(shards, RECIPE.model_copy(update={"validation_fold": 9}), tmp_path / "bundle")
    with pytest.raises(ShardError, match="no manifest"):
        train(tmp_path / "nothing", RECIPE, tmp_path / "bundle")
    prepare_here(draw(tmp_path / "data", images=7), tmp_path / "seven")  # one lesion a diagnosis: all are in train
    with pytest.raises(DataError, match=r"seven: no calibration image\. Prepare a larger data set"):
        train(tmp_path / "seven", RECIPE, tmp_path / "bundle")
    assert not (tmp_path / "bundle.checkpoints").exists()
