"""A model stored in a quarter of its size says what the large one says; so does the one that comes with DermaFlow."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_archives import lesion_jpegs
from tiny_bundle import a_bundle, a_calibration

from dermaflow.bundles.bundle import load_bundle, save_bundle
from dermaflow.bundles.small import make_small, shipped_model
from dermaflow.errors import BundleError
from dermaflow.evaluation.card import making_commands
from dermaflow.learning.backbones import BackboneConfig, build
from dermaflow.learning.recipe import Recipe
from dermaflow.scoring.predictor import Predictor
from dermaflow.trust.ood import make_reference, ood_score


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


@pytest.fixture
def large(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    network = build(BackboneConfig(name="seed_cnn"))
    features = np.random.default_rng(0).normal(size=(300, 128)).astype(np.float32)
    ids = [f"i{i}" for i in range(300)]
    reference = make_reference(features, ids, ids, ["nv"] * 300)
    save_bundle(
        tmp_path / "large", a_bundle(a_calibration()), network.state_dict(), reference, "# Model card: tiny\n\nText.\n"
    )
    return tmp_path / "large"


def test_it_says_the_same_and_names_no_image(large: Path, tmp_path: Path) -> None:
    small = make_small(large, tmp_path / "small", name="little")
    assert size(tmp_path / "small") < size(large) / 1.9
    assert small.bundle.name == "little" and small.bundle.made_small_from == load_bundle(large).sha256
    assert small.card.startswith("# Model card: little\n\nMade small from the model `tiny` (") and "Text." in small.card

    full, images = Predictor(load_bundle(large)), list(lesion_jpegs())
    before, after = full.answer(images), Predictor(small).answer(images)
    assert np.abs(before.p - after.p).max() < 2e-3

    assert small.reference is not None and small.reference.image_ids == small.reference.lesion_ids == ()
    points = np.random.default_rng(1).normal(size=(50, 128))
    wanted = ood_score(points, load_bundle(large).reference)  # type: ignore[arg-type]
    np.testing.assert_allclose(ood_score(points, small.reference), wanted, rtol=2e-3)


def test_what_cannot_be_made_small(large: Path, tmp_path: Path) -> None:
    make_small(large, tmp_path / "small")
    with pytest.raises(BundleError, match="is small already"):
        make_small(tmp_path / "small", tmp_path / "smaller")
    save_bundle(tmp_path / "raw", a_bundle(), load_bundle(large).weights, None, "# Card\n")
    with pytest.raises(BundleError, match="no calibration"):
        make_small(tmp_path / "raw", tmp_path / "smaller")
    assert not (tmp_path / "smaller").exists()


def test_the_model_that_comes_along_is_whole_small_and_says_what_it_is() -> None:
    model = load_bundle(shipped_model())
    assert size(shipped_model()) < 9e6
    assert model.bundle.calibration is not None and model.bundle.calibration.ood is not None
    assert model.bundle.made_small_from is not None and "CC BY-NC 4.0" in model.card
    assert model.bundle.metrics is not None and model.bundle.metrics["accuracy"] > 0.8
    training = model.bundle.training
    assert Recipe.model_validate(training.recipe).digest == training.recipe_hash  # whatever keys were added since
    assert making_commands(model.bundle).replace("\n", "\n    ") in model.card


@pytest.mark.parametrize("name", ["ham10000-cpu", "another"])
def test_a_card_says_the_commands_that_make_the_model(name: str) -> None:
    bundle = load_bundle(shipped_model()).bundle
    training = bundle.training.model_copy(update={"recipe_name": name, "seed": 3, "initial_weights": "none"})
    made = making_commands(bundle.model_copy(update={"training": training, "made_small_from": None})).splitlines()
    recipe = name if name == "ham10000-cpu" else "recipe.yaml"
    assert made[1:] == [f"dermaflow train --shards shards --recipe {recipe} --set seed=3 --out model"]


def test_noise_is_not_assessed_by_it() -> None:
    noise = BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (150, 200, 3), dtype=np.uint8)).save(noise, "PNG")
    [finding] = Predictor(load_bundle(shipped_model())).predict([noise.getvalue()], ["noise"])
    assert finding.status != "ok" and finding.prediction is None
