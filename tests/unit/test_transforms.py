"""One way from bytes to the network's input, of the asked size, undistorted, the same for everybody who asks."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_data import add_image, draw, image_files, noise, prepare_here

from dermaflow.datasets.images import decode
from dermaflow.learning.augmentation import AugmentConfig
from dermaflow.learning.backbones import BackboneConfig, build
from dermaflow.learning.inference import predict
from dermaflow.learning.loop import Feed, Run, fit
from dermaflow.learning.optimisation import OptimConfig
from dermaflow.learning.recipe import Recipe, SizeConfig
from dermaflow.preparation.balancing import BalanceConfig, balance
from dermaflow.preparation.reading import ShardFolder, decode_group
from dermaflow.preparation.transforms import IMAGENET_MEAN, IMAGENET_STD, normalise, pixel_batch, pixels
from dermaflow.schemas.bundle import Copies, InputSpec
from dermaflow.schemas.shard import SPLITS

SPEC = InputSpec(height=24, width=32, mean=IMAGENET_MEAN, std=IMAGENET_STD)


def encode(picture: np.ndarray, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, kind, quality=95)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("size", "rows"), [((72, 96), 450), ((96, 128), 450), ((144, 192), 450), ((224, 224), 450), ((100, 300), 800 / 3)]
)
def test_scaled_decoding_equals_decoding_and_resizing(size: tuple[int, int], rows: float) -> None:
    """Of 4:3 a square input sees all, one of 3:1 the middle 800/3 rows, which is 9:4."""
    picture = noise(0, 450, 600)
    data = encode(picture, "JPEG")
    full = decode(data, 450, 600)
    assert full.shape == (450, 600, 3) and decode(data, *size).shape <= full.shape
    height, width = size
    top = (450 - rows) / 2
    box = (0, top, 600, 450 - top)
    expected = Image.fromarray(full).resize((width, height), Image.Resampling.BILINEAR, box=box)
    difference = np.abs(pixels(data, *size).astype(int) - np.asarray(expected, int))
    assert difference.mean() < 1.5 and difference.max() <= 8, "of 255"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize(
    "size", [(1, 1), (1, 500), (500, 1), (37, 911), (911, 37), (3, 4), (149, 201), (150, 200), (451, 599), (144, 192)]
)
def test_every_shape_gives_exactly_the_asked_size(size: tuple[int, int], kind: str) -> None:
    data = encode(noise(1, *size), kind)
    for wanted in ((24, 32), (31, 17), (144, 192)):
        found = pixels(data, *wanted)
        assert found.shape == (*wanted, 3) and found.dtype == np.uint8 and found.flags["C_CONTIGUOUS"]


def test_fine_structure_is_averaged_and_not_sampled() -> None:
    rows, columns = np.mgrid[:480, :640]
    board = np.repeat(((rows + columns) % 2 * 255).astype(np.uint8)[:, :, None], 3, axis=2)
    found = pixels(encode(board), 47, 63).astype(int)
    assert np.abs(found - 127).max() <= 4


def test_a_strip_of_one_pixel_is_not_blown_up() -> None:
    """Scaled to cover 144 x 192 whole, it would take 100 GB."""
    strip = np.zeros((1, 1_000_000, 3), np.uint8)
    strip[:, 500_000:] = 255
    found = pixels(encode(strip), 144, 192)
    assert found.shape == (144, 192, 3)


def test_what_is_cropped_is_what_surrounds_the_centre() -> None:
    """Of a picture wider than 16:9, the middle of that shape is shown."""
    wide = np.full((48, 300, 3), 90, np.uint8)
    wide[:, 107:193] = noise(2, 48, 86)  # 48 rows and 48 * 16/9 columns around the centre
    shown = encode(wide[:, 107:193])
    np.testing.assert_allclose(pixels(encode(wide), 48, 64).astype(int), pixels(shown, 48, 64), atol=1)
    np.testing.assert_allclose(
        pixels(encode(wide.transpose(1, 0, 2)), 48, 64).astype(int), pixels(shown, 48, 64), atol=1
    )


@pytest.mark.parametrize("size", [(192, 192), (108, 192), (128, 192), (160, 192)])
def test_a_picture_of_another_shape_is_shown_whole(size: tuple[int, int]) -> None:
    """A square one and one of 16:9, and what lies between: corner markers stay in the corners."""
    picture = np.zeros((*size, 3), np.uint8)
    for rows in (slice(12), slice(-12, None)):
        for columns in (slice(12), slice(-12, None)):
            picture[rows, columns] = 255
    found = pixels(encode(picture), 48, 64)[:, :, 0]
    assert found[[0, 0, -1, -1], [0, -1, 0, -1]].min() > 250 and found.mean() < 20, "four white corners, black between"


def test_an_upright_image_is_laid_on_its_side_and_nothing_of_it_is_lost() -> None:
    picture = noise(7, 480, 640)
    lying, upright = encode(picture), encode(picture.transpose(1, 0, 2))
    for size in ((48, 64), (144, 192)):
        np.testing.assert_array_equal(pixels(upright, *size), pixels(lying, *size))
        turned = pixels(lying, *size).transpose(1, 0, 2)
        np.testing.assert_allclose(pixels(lying, *size[::-1]).astype(int), turned, atol=1)  # rows or columns first
    copies = Copies(height=150, width=200, quality=75)
    difference = np.abs(pixels(upright, 144, 192, copies).astype(int) - pixels(lying, 144, 192, copies))
    assert difference.mean() < 1, "of 255: JPEG of the one or of the other"
    as_it_stands = pixels(lying, 64, 64).transpose(1, 0, 2)
    np.testing.assert_allclose(pixels(upright, 64, 64).astype(int), as_it_stands, atol=1)


@pytest.mark.parametrize(("width", "stretched"), [(400, 1.0), (300, 4 / 3), (450, 8 / 9), (800, 3 / 4)])
def test_a_circle_is_stretched_by_a_third_at_most(width: int, stretched: float) -> None:
    rows, columns = np.mgrid[:300, :width]
    disc = np.where((rows - 150) ** 2 + (columns - width / 2) ** 2 < 100**2, 255, 60).astype(np.uint8)
    found = pixels(encode(np.repeat(disc[:, :, None], 3, axis=2)), 96, 128)[:, :, 0] > 157
    assert abs(int(found.any(axis=1).sum()) - 64) <= 1 and abs(int(found.any(axis=0).sum()) - 64 * stretched) <= 1


def test_normalise() -> None:
    batch = torch.from_numpy(np.stack([noise(3), noise(4)]))
    kept = batch.clone()
    found = normalise(batch, SPEC)
    assert torch.equal(batch, kept), "the pixels belong to the caller"
    assert found.dtype == torch.float32 and found.is_contiguous(memory_format=torch.channels_last)
    expected = (batch.double() / 255 - torch.tensor(SPEC.mean)) / torch.tensor(SPEC.std)
    torch.testing.assert_close(found.permute(0, 2, 3, 1).double(), expected, rtol=0, atol=1e-5)


def test_training_evaluation_and_scoring_see_the_same_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the archive's own bytes, through shards, to the tensor that enters the network."""
    data = draw(tmp_path / "data", 60)
    add_image(data, {"image_id": "ISIC_0000001", "lesion_id": "HAM_1"}, encode(noise(5, 77, 301), "JPEG"))
    add_image(data, {"image_id": "ISIC_0000002", "lesion_id": "HAM_2"}, encode(noise(6, 301, 77)))  # a PNG named .jpg
    prepare_here(data, tmp_path / "shards")
    folder, files = ShardFolder(tmp_path / "shards"), image_files(data)
    for split in SPLITS:
        ids = folder.metadata(split)["image_id"]
        raw = pixel_batch([files[image_id].read_bytes() for image_id in ids], 24, 32)
        for threads in (1, 3):
            np.testing.assert_array_equal(folder.pixels(split, 24, 32, threads=threads), raw)
        groups = [decode_group(group, 24, 32) for group in folder.row_groups(split)]
        np.testing.assert_array_equal(np.concatenate([found for found, _ in groups]), raw)

    # Training without augmentation and prediction hand the network the same tensor.
    network, seen = build(BackboneConfig(name="seed_cnn")), []
    network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    network.body.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    still = AugmentConfig.model_validate(
        {"flips": False} | dict.fromkeys(set(AugmentConfig.model_fields) - {"flips"}, 0)
    )
    recipe = Recipe(
        name="still", input=SizeConfig(height=24, width=32), backbone=BackboneConfig(name="seed_cnn"), augment=still,
        optim=OptimConfig(head_epochs=0, epochs=1),
    )  # fmt: skip
    batch, labels = folder.pixels("test", 24, 32), torch.zeros(len(folder.metadata("test")), dtype=torch.int64)
    feed = Feed(1, lambda epoch: [(torch.from_numpy(batch), labels)])
    rule = balance(np.full(7, 1), BalanceConfig())
    fit(network, Run(recipe, feed, rule, np.full(7, 1 / 7), "", torch.device("cpu")))
    in_training = seen[0]
    seen.clear()
    predict(network, batch, recipe.input_spec)
    predicted = torch.cat(seen)
    torch.testing.assert_close(in_training, predicted, rtol=0, atol=0.03)  # the grid rounds to a level of 255
    assert (in_training == predicted).double().mean() > 0.99
