"""A picture through a round lens, or with black bars, is looked at within them; every other one as a whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_data import encode, noise

from dermaflow.datasets.framing import field_of_view
from dermaflow.datasets.images import decode, decode_field
from dermaflow.datasets.quality import HEIGHT, WIDTH, quality_flags
from dermaflow.datasets.synthetic.generate import generate
from dermaflow.preparation.transforms import pixels


def through_a_lens(picture: np.ndarray, radius: float, height: int, width: int) -> np.ndarray:
    """The middle of a picture inside a circle (pixels of the picture), in black of another size."""
    rows, columns = (np.arange(side) - (side - 1) / 2 for side in picture.shape[:2])
    lit = np.hypot(rows[:, None], columns[None, :]) < radius
    top, left = (height - picture.shape[0]) // 2, (width - picture.shape[1]) // 2
    black = np.zeros((height, width, 3), np.uint8)
    black[top:, left:][: picture.shape[0], : picture.shape[1]] = np.where(lit[:, :, None], picture, 0)
    return black


def bright(height: int, width: int) -> np.ndarray:
    return np.clip(noise(4, height, width), 60, 255)


@pytest.mark.parametrize(("height", "width"), [(150, 150), (150, 200), (200, 150), (200, 300), (500, 260)])
def test_of_a_round_field_the_square_that_fits_in_is_looked_at(height: int, width: int) -> None:
    rows, columns = field_of_view(through_a_lens(bright(150, 150), 75, height, width))
    shown = rows.stop - rows.start, columns.stop - columns.start
    assert min(shown) >= 0.7 * 150 - 4 and max(shown) <= 0.8 * 150 + 4
    assert abs(rows.start + rows.stop - height) <= 8 and abs(columns.start + columns.stop - width) <= 8, "its middle"


@pytest.mark.parametrize("scale", [1, 3, 10])
def test_it_is_the_same_part_at_any_size(scale: int) -> None:
    small = through_a_lens(bright(150, 150), 75, 180, 240)
    large = small.repeat(scale, axis=0).repeat(scale, axis=1)
    for found, expected in zip(field_of_view(large), field_of_view(small), strict=True):
        assert found.start == pytest.approx(expected.start * scale, abs=3 * scale)
        assert found.stop == pytest.approx(expected.stop * scale, abs=3 * scale)


def test_dark_corners_are_left_as_they_are() -> None:
    """A lens as wide as the picture: a sixteenth of it is dark, as in many of HAM10000."""
    picture = through_a_lens(bright(150, 200), 105, 150, 200)
    assert 0.03 < (picture.max(axis=2) == 0).mean() < 0.1
    assert field_of_view(picture) == (slice(0, 150), slice(0, 200))


@pytest.mark.parametrize("value", [0, 20, 128, 255])
def test_a_picture_without_a_lens_is_looked_at_as_a_whole(value: int) -> None:
    plain = np.full((150, 200, 3), value, np.uint8)
    assert field_of_view(plain) == (slice(0, 150), slice(0, 200))
    one = np.full((1, 1, 3), value, np.uint8)
    assert field_of_view(one) == (slice(0, 1), slice(0, 1))


def test_a_picture_dark_to_its_edges_is_no_lens() -> None:
    """A black lesion that leaves a slanted band of skin: no rectangle in it is free of black."""
    rows, columns = np.mgrid[:150, :200]
    band = np.abs(rows / 150 - columns / 200) < 0.12
    band[:15, :20] = band[-15:, -20:] = False
    picture = np.repeat(band[:, :, None], 3, axis=2) * np.uint8(200)
    assert field_of_view(picture) == (slice(0, 150), slice(0, 200))


def test_a_dark_lesion_at_the_edge_of_the_lens_is_not_cut_off() -> None:
    picture = bright(150, 150)
    rows, columns = np.mgrid[:150, :150]
    picture[np.hypot(rows - 75, columns - 120) < 25] = 5  # from the middle to the rim
    _, shown = field_of_view(through_a_lens(picture, 75, 200, 200))
    assert shown.stop - 25 >= 75 + 0.7 * 75 - 4, "as far to the right as the square that fits in"


@pytest.mark.parametrize(("height", "width"), [(150, 200), (200, 150)])
def test_bars_are_taken_off_and_what_is_left_is_laid(height: int, width: int) -> None:
    picture = bright(height, width)
    square = np.zeros((200, 200, 3), np.uint8)
    square[(200 - height) // 2 :, (200 - width) // 2 :][:height, :width] = picture
    found, expected = (pixels(encode(each, "PNG"), 48, 64).astype(int) for each in (square, picture))
    assert np.abs(found - expected).mean() < 6, "of 255: the cut is made to a hundredth of the picture"
    for edge in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]):
        assert found[edge].mean() > expected[edge].mean() - 10, "no dark line is left"


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_the_field_has_the_wanted_size_where_the_image_has_it(kind: str) -> None:
    large = through_a_lens(bright(1500, 1500), 750, 2400, 2400)
    field = decode_field(encode(large, kind), 144, 192)
    assert field.shape[0] >= 144 and field.shape[1] >= 192
    assert field[:, :, 1].mean() > 60 and (field.max(axis=2) < 20).mean() < 0.04


def test_the_gate_lets_lesions_through_a_lens_by(tmp_path: Path) -> None:
    generate(tmp_path / "data", 40, 3, height=150, width=200)
    pictures = [decode(path.read_bytes(), 150, 200) for path in sorted(tmp_path.glob("data/*part_*/*.jpg"))]
    seen = [encode(through_a_lens(picture, 75, 200, 280), "PNG") for picture in pictures]
    stopped = {
        name: np.mean([bool(quality_flags(look(data, HEIGHT, WIDTH))) for data in seen])
        for name, look in (("whole", decode), ("field", decode_field))
    }
    assert stopped["field"] <= 0.15 < 0.8 <= stopped["whole"]
