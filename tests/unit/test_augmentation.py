"""Augmentation: seeded, within its bounds, true to the geometry, image by image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_data import noise

from dermaflow.learning import augmentation
from dermaflow.learning.augmentation import AugmentConfig, augment

HEIGHT, WIDTH = 48, 96


def only(**choices: object) -> AugmentConfig:
    """A configuration that changes nothing but what is given."""
    off = {"flips": False} | dict.fromkeys(set(AugmentConfig.model_fields) - {"flips"}, 0)
    return AugmentConfig.model_validate(off | choices)


def run(batch: torch.Tensor, config: AugmentConfig, seed: int = 0) -> torch.Tensor:
    return augment(batch, config, torch.Generator().manual_seed(seed))


@pytest.fixture
def batch() -> torch.Tensor:
    return torch.from_numpy(np.stack([noise(n, HEIGHT, WIDTH) for n in range(6)]))


@pytest.fixture
def discs() -> torch.Tensor:
    """A white disc of radius 16 in the middle of each of 64 black images."""
    rows, columns = torch.meshgrid(torch.arange(HEIGHT) + 0.5, torch.arange(WIDTH) + 0.5, indexing="ij")
    disc = ((rows - HEIGHT / 2) ** 2 + (columns - WIDTH / 2) ** 2 < 16**2).to(torch.uint8) * 255
    return disc[None, :, :, None].expand(64, -1, -1, 3).contiguous()


def extents(discs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Height and width of what is white, in pixels."""
    white = discs[:, :, :, 0] > 127
    return white.any(dim=2).sum(1), white.any(dim=1).sum(1)


def test_everything_off_leaves_the_image(batch: torch.Tensor) -> None:
    assert (run(batch, only()).int() - batch.int()).abs().max() <= 1


@pytest.mark.parametrize("config", [AugmentConfig(), AugmentConfig(erase=0.5, sharpness=0.5, noise=5)])
def test_seeded_and_of_the_same_shape(batch: torch.Tensor, config: AugmentConfig) -> None:
    kept = batch.clone()
    found = run(batch, config)
    assert found.shape == batch.shape and found.dtype == torch.uint8
    assert torch.equal(batch, kept), "the batch belongs to the caller"
    assert torch.equal(found, run(batch, config))
    assert not torch.equal(found, run(batch, config, seed=1))
    generator = torch.Generator().manual_seed(0)
    assert not torch.equal(augment(batch, config, generator), augment(batch, config, generator)), "each epoch anew"
    assert (found.int() - batch.int()).abs().float().mean() > 10


def test_each_image_is_changed_in_its_own_way_and_knows_nothing_of_the_others(batch: torch.Tensor) -> None:
    config = AugmentConfig(erase=0.5, sharpness=0.5, noise=5)
    alike = run(batch[:1].expand(6, -1, -1, -1), config)
    assert len({image.numpy().tobytes() for image in alike}) == 6
    other = batch.clone()
    other[2] = 255 - other[2]
    found, changed = run(batch, config), run(other, config)
    same = [torch.equal(a, b) for a, b in zip(found, changed, strict=True)]
    assert same == [True, True, False, True, True, True]


def test_flips_mirror_about_half_of_the_images(batch: torch.Tensor) -> None:
    many = batch[:1].expand(64, -1, -1, -1)
    found = run(many, only(flips=True)).int()
    straight = ((found - many.int()).abs() <= 1).flatten(1).all(1)
    mirrored = ((found - many.flip(2).int()).abs() <= 1).flatten(1).all(1)
    assert (straight ^ mirrored).all() and 20 < int(mirrored.sum()) < 44


def test_a_disc_stays_a_disc_under_rotation_and_flips(discs: torch.Tensor) -> None:
    found = run(discs, only(rotation=180, flips=True))
    rows, columns = torch.meshgrid(torch.arange(HEIGHT) + 0.5, torch.arange(WIDTH) + 0.5, indexing="ij")
    near = (rows - HEIGHT / 2) ** 2 + (columns - WIDTH / 2) ** 2 < 30**2  # farther off, its mirror images come in
    wrong = ((found[:, :, :, 0] > 127) != (discs[:, :, :, 0] > 127)) & near
    assert wrong.flatten(1).sum(1).max() < 40  # of 812 pixels; with the aspect ratio forgotten, hundreds


def test_a_quarter_turn_is_numpys(batch: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augmentation, "_uniform", lambda shape, low, high, generator: torch.full(shape, float(high)))
    found = run(batch, only(rotation=90)).numpy().astype(int)
    middle = slice((WIDTH - HEIGHT) // 2, (WIDTH + HEIGHT) // 2)
    before, after = batch.numpy()[:, :, middle].astype(int), found[:, :, middle]
    turned = [np.abs(np.rot90(before, k, axes=(1, 2)) - after).max() for k in (1, 3)]
    assert min(turned) <= 1


def test_a_smaller_size_is_the_same_picture_smaller(discs: torch.Tensor) -> None:
    found = augment(discs, only(), torch.Generator().manual_seed(0), (HEIGHT * 2 // 3, WIDTH * 2 // 3))
    assert found.shape == (64, HEIGHT * 2 // 3, WIDTH * 2 // 3, 3)
    heights, widths = extents(found)
    assert set(heights.tolist()) <= {21, 22} and set(widths.tolist()) <= {21, 22}  # two thirds of 32


def test_rotation_stays_within_its_angle(discs: torch.Tensor) -> None:
    bar = torch.zeros_like(discs)
    bar[:, HEIGHT // 2 - 2 : HEIGHT // 2 + 2, WIDTH // 2 - 20 : WIDTH // 2 + 20] = 255
    found = run(bar, only(rotation=30))[:, :, :, 0].numpy() > 127
    angles = []
    for image in found:
        rows, columns = np.nonzero(image)
        angles.append(np.degrees(np.arctan(np.polyfit(columns, rows, 1)[0])))
    assert -31 < min(angles) < -20 and 20 < max(angles) < 31


def test_zoom_goes_in_and_out_within_its_bounds(discs: torch.Tensor) -> None:
    heights, widths = extents(run(discs, only(zoom=0.25)))
    assert (heights - widths).abs().max() <= 2
    assert 32 * 0.75 - 2 <= heights.min() < 27 and 39 < heights.max() <= 32 / 0.75 + 2


def test_stretch_changes_the_aspect_ratio_and_not_the_area(discs: torch.Tensor) -> None:
    found = run(discs, only(stretch=0.3))
    heights, widths = extents(found)
    ratio = widths / heights
    assert 0.7 - 0.08 <= ratio.min() < 0.8 and 1.25 < ratio.max() <= 1 / 0.7 + 0.1
    areas = (found[:, :, :, 0] > 127).flatten(1).sum(1) / (discs[0, :, :, 0] > 127).sum()
    assert (areas - 1).abs().max() < 0.05


def test_shift_is_a_share_of_either_side(discs: torch.Tensor) -> None:
    weight = run(discs, only(shift=0.1))[:, :, :, 0].double()
    weight /= weight.sum(dim=(1, 2), keepdim=True)
    rows = (weight.sum(2) * (torch.arange(HEIGHT) + 0.5)).sum(1) - HEIGHT / 2
    columns = (weight.sum(1) * (torch.arange(WIDTH) + 0.5)).sum(1) - WIDTH / 2
    for moved, side in ((rows, HEIGHT), (columns, WIDTH)):
        assert -0.1 * side - 0.5 <= moved.min() < -0.07 * side and 0.07 * side < moved.max() <= 0.1 * side + 0.5


def test_the_border_is_mirrored_and_not_black() -> None:
    white = torch.full((16, HEIGHT, WIDTH, 3), 200, dtype=torch.uint8)
    found = run(white, only(rotation=180, zoom=0.5, stretch=0.3, shift=0.3))
    assert found.min() >= 199 and found.max() <= 201


# --- colour --------------------------------------------------------------------------------------------------------


@pytest.fixture
def dull() -> torch.Tensor:
    """64 times an image of middling colours, so that nothing is cut off at 0 or 255."""
    return torch.from_numpy(80 + noise(3, HEIGHT, WIDTH) // 4)[None].expand(64, -1, -1, -1)


def test_brightness_is_one_gain_an_image(dull: torch.Tensor) -> None:
    gains = (run(dull, only(brightness=0.3)).double() / dull.double()).flatten(1)
    assert (gains.std(1) < 0.01).all()
    assert 0.69 < gains.mean(1).min() < 0.75 and 1.25 < gains.mean(1).max() < 1.31


def test_tint_is_one_gain_a_channel(dull: torch.Tensor) -> None:
    gains = (run(dull, only(tint=0.2)).double() / dull.double()).flatten(1, 2)
    assert (gains.std(1) < 0.01).all() and (gains.mean(1).std(1) > 0.01).float().mean() > 0.9
    assert 0.79 < gains.mean(1).min() < 0.84 and 1.16 < gains.mean(1).max() < 1.21


def test_contrast_pulls_about_the_mean_brightness(dull: torch.Tensor) -> None:
    luma = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    before, after = dull.double() @ luma, run(dull, only(contrast=0.3)).double() @ luma
    assert (before.mean(dim=(1, 2)) - after.mean(dim=(1, 2))).abs().max() < 0.6
    spread = after.std(dim=(1, 2)) / before.std(dim=(1, 2))
    assert 0.68 < spread.min() < 0.76 and 1.24 < spread.max() < 1.32


def test_saturation_pulls_about_the_grey_of_each_pixel(dull: torch.Tensor) -> None:
    luma = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    found = run(dull, only(saturation=0.5)).double()
    assert (found @ luma - dull.double() @ luma).abs().max() < 1
    spread = found.std(dim=3).mean(dim=(1, 2)) / dull.double().std(dim=3).mean(dim=(1, 2))
    assert 0.48 < spread.min() < 0.62 and 1.38 < spread.max() < 1.52
    grey = dull[:, :, :, :1].expand(-1, -1, -1, 3)
    assert (run(grey, only(saturation=0.5)).int() - grey.int()).abs().max() <= 1


def test_sharpness_amplifies_or_softens_fine_detail() -> None:
    """An unsharp mask is linear: what it adds is a share, between -0.5 and 0.5, of the image less its surroundings."""
    image = torch.randint(90, 160, (1, HEIGHT, WIDTH, 3), generator=torch.Generator().manual_seed(0))
    many = image.to(torch.uint8).expand(64, -1, -1, -1)
    planes = many.permute(0, 3, 1, 2).double()
    detail = (planes[:, :, 1:-1, 1:-1] - torch.nn.functional.avg_pool2d(planes, 3, 1)).flatten(1)
    added = (run(many, only(sharpness=0.5)).permute(0, 3, 1, 2).double() - planes)[:, :, 1:-1, 1:-1].flatten(1)
    amount = (added * detail).sum(1) / (detail**2).sum(1)
    assert (added - amount[:, None] * detail).abs().max() < 0.7  # rounding
    assert -0.501 < amount.min() < -0.4 and 0.4 < amount.max() < 0.501


def test_noise_is_even_over_the_image_and_its_strength_is_drawn(dull: torch.Tensor) -> None:
    added = run(dull, only(noise=6)).double() - dull.double()
    assert (added - added.mean(3, keepdim=True)).abs().max() <= 1  # all channels alike, but for rounding
    strength = added.flatten(1).std(1)
    assert strength.min() < 2 and 4.5 < strength.max() < 6.2 and added.mean().abs() < 0.1


def test_erasing_blanks_a_part_of_some_images_with_the_mean_colour(dull: torch.Tensor) -> None:
    found = run(dull, only(erase=0.5))
    gone = (found.int() - dull.int()).abs().amax(3) > 1
    share = gone.flatten(1).double().mean(1)
    assert 20 < int((share > 0).sum()) < 44 and share.max() < 0.21
    mean = dull[0].double().mean(dim=(0, 1))
    assert all(
        (image[mask].double() - mean).abs().max() <= 1 for image, mask in zip(found, gone, strict=True) if mask.any()
    )
