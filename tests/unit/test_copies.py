"""A network that learnt from small JPEG copies is shown larger images as such copies, and no others."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from tiny_bundle import a_bundle
from tiny_data import draw, encode, image_files, noise, prepare_here

from dermaflow.bundles.bundle import load_bundle
from dermaflow.datasets.images import ImageProblem, dimensions, jpeg_quality, small_copy
from dermaflow.learning.backbones import BackboneConfig, build
from dermaflow.learning.calibration import calibrate_and_save, recalibrate
from dermaflow.preparation.reading import ShardFolder
from dermaflow.preparation.transforms import pixels
from dermaflow.schemas.bundle import Copies
from dermaflow.scoring.predictor import Predictor

COPIES = Copies(height=48, width=64, quality=75)


def original(seed: int, height: int = 480, width: int = 640) -> np.ndarray:
    """Smooth, with structure that a copy loses."""
    fine = np.random.default_rng(seed).normal(0, 12, (height, width, 1))
    return np.clip(noise(seed, height, width) + fine, 0, 255).astype(np.uint8)


def copy_by_hand(picture: np.ndarray) -> bytes:
    small = Image.fromarray(picture).resize((COPIES.width, COPIES.height), Image.Resampling.BICUBIC)
    return encode(np.asarray(small), quality=COPIES.quality)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    data = draw(tmp_path / "data")
    for seed, path in enumerate(image_files(data).values()):
        path.write_bytes(copy_by_hand(original(seed)))
    return data


@pytest.mark.parametrize("quality", [1, 30, 75, 89, 95, 100])
def test_the_quality_of_a_jpeg_is_read_from_it(quality: int) -> None:
    assert jpeg_quality(encode(noise(0), quality=quality)) == quality


def test_what_is_no_plain_copy_has_no_quality() -> None:
    full_chroma, grey = encode(noise(0), quality=75, subsampling=0), encode(noise(0)[:, :, 0])
    assert [jpeg_quality(data) for data in (encode(noise(0), "PNG"), full_chroma, grey, b"", b"no")] == [None] * 5


def test_a_larger_image_is_seen_as_its_copy_is() -> None:
    picture = original(3)
    seen = pixels(copy_by_hand(picture), 36, 48).astype(float)
    assert np.array_equal(pixels(encode(picture, "PNG"), 36, 48, COPIES), seen)
    fine_jpeg = encode(picture, quality=98)
    assert np.abs(pixels(fine_jpeg, 36, 48, COPIES) - seen).mean() < 1, "of 255"
    assert np.abs(pixels(fine_jpeg, 36, 48) - seen).mean() > 4


@pytest.mark.parametrize(("height", "width"), [(48, 64), (64, 48), (20, 30), (48, 900), (900, 48)])
def test_an_image_that_is_no_larger_stays_as_it_is(height: int, width: int) -> None:
    data = encode(noise(0, height, width), quality=95)
    assert small_copy(data, 48, 64, 75) == data


@pytest.mark.parametrize(
    "shape", [(480, 640), (480, 480), (360, 640), (200, 900), (640, 480), (50, 70_000)], ids="{0[0]}x{0[1]}".format
)
def test_a_copy_has_the_size_of_the_copies_and_stands_as_the_image(shape: tuple[int, int]) -> None:
    size = dimensions(small_copy(encode(np.zeros((*shape, 3), np.uint8), "PNG"), 48, 64, 75))
    assert size == ((48, 64) if shape[0] > shape[1] else (64, 48))


def test_an_image_that_is_none_is_told_as_ever() -> None:
    with pytest.raises(ImageProblem):
        pixels(b"no image", 36, 48, COPIES)


def test_shards_say_how_their_images_are_stored(archive: Path, tmp_path: Path) -> None:
    prepare_here(archive, tmp_path / "copies")
    assert ShardFolder(tmp_path / "copies").copies() == COPIES
    for number, path in enumerate(image_files(archive).values()):
        if number % 2:
            path.write_bytes(encode(original(number)))  # the archive has grown by originals
    prepare_here(archive, tmp_path / "mixed")
    assert ShardFolder(tmp_path / "mixed").copies() is None
    prepare_here(draw(tmp_path / "fine"), tmp_path / "good")  # JPEG of quality 90
    assert ShardFolder(tmp_path / "good").copies() is None


def test_a_model_remembers_it_and_answers_for_an_original_as_for_its_copy(archive: Path, tmp_path: Path) -> None:
    prepare_here(archive, tmp_path / "shards")
    shards = ShardFolder(tmp_path / "shards")
    bundle = a_bundle()
    bundle = bundle.model_copy(
        update={"training": bundle.training.model_copy(update={"data_hash": shards.manifest.data_hash})}
    )
    torch.manual_seed(0)
    calibrate_and_save(build(BackboneConfig(name="seed_cnn")), bundle, shards, tmp_path / "model")
    model = load_bundle(tmp_path / "model")
    assert model.bundle.input.copies == COPIES
    forgetful = dataclasses.replace(
        model,
        bundle=model.bundle.model_copy(update={"input": model.bundle.input.model_copy(update={"copies": None})}),
    )
    pictures = [original(1000 + seed) for seed in range(8)]
    copies, originals = [copy_by_hand(each) for each in pictures], [encode(each, "PNG") for each in pictures]
    reference = Predictor(model).answer(copies).p
    np.testing.assert_allclose(Predictor(model).answer(originals).p, reference, atol=1e-6)
    assert np.abs(Predictor(forgetful).answer(originals).p - reference).max() > 1e-4

    prepare_here(draw(tmp_path / "own", seed=7), tmp_path / "site")
    assert recalibrate(tmp_path / "model", str(tmp_path / "site"), tmp_path / "at-site").bundle.input.copies == COPIES


@pytest.mark.parametrize("wrong", [{"height": 0}, {"width": -1}, {"quality": 0}, {"quality": 101}])
def test_a_bundle_that_asks_for_impossible_copies_is_none(wrong: dict[str, int]) -> None:
    with pytest.raises(ValidationError):
        Copies.model_validate(COPIES.model_dump() | wrong)
