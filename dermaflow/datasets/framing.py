"""What of a picture is looked at: the field that a lens leaves in black, laid and stretched to another shape.

Measured on HAM10000 (docs/experiments.md, "Pictures through a lens", "Upright pictures", "Squares and wide pictures").
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image

MAX_STRETCH = 4 / 3
"""How far a picture is stretched before it is cropped; a network of 4:3 sees squares and 16:9 whole."""
_DARK = 0.12 * 255
"""Luminance below which a pixel may belong to the surround."""
_ORDINARY = 0.15
"""Share of a picture that may be surround: dark corners, which networks know, take a tenth of HAM10000's at most."""
_LEFT = 0.02
"""Share of surround that is left in what is looked at."""
_SMALLEST = 0.7
"""Of a round field, the sides of what is looked at over its diameter, at least: those of the square that fits in."""
_SAMPLES = 128  # along the longer side
LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


def field_of_view(image: np.ndarray) -> tuple[slice, slice]:
    """The part of a picture that a lens, or black bars, leave to be looked at.

    Args:
        image: uint8 [H, W, 3], RGB.

    Returns:
        Its rows and columns; all, unless all four corners are black and more than `_ORDINARY` of the picture is.
    """
    height, width = image.shape[:2]
    whole = slice(0, height), slice(0, width)
    step = -(-max(height, width) // _SAMPLES)
    samples = image[::step, ::step]
    corner = max(1, min(samples.shape[:2]) // 16)
    ends = slice(corner), slice(-corner, None)
    if not all(_black(samples[rows, columns]).mean() > 0.9 for rows in ends for columns in ends):
        return whole
    surround = _from_the_edges(_black(samples))
    if surround.mean() <= _ORDINARY:
        return whole
    for rows, columns in _shrinking(surround):
        if surround[rows, columns].mean() <= _LEFT:
            break
    else:
        return whole  # no lens: a dark lesion at the edge, or no picture at all
    return (
        slice(rows.start * step, (rows.stop - 1) * step + 1),
        slice(columns.start * step, (columns.stop - 1) * step + 1),
    )


def _black(pixels: np.ndarray) -> np.ndarray:
    return pixels @ LUMINANCE < _DARK


def _from_the_edges(black: np.ndarray) -> np.ndarray:
    """Pixels from which nothing but black lies between them and one of the four edges."""
    seen = np.zeros_like(black)
    for axis in (0, 1):
        seen |= np.logical_and.accumulate(black, axis)
        seen |= np.flip(np.logical_and.accumulate(np.flip(black, axis), axis), axis)
    return seen


def _shrinking(surround: np.ndarray) -> Iterator[tuple[slice, slice]]:
    """Ever smaller parts around the centre of what is not surround, to `_SMALLEST` of its sides.

    The first is a hundredth smaller at each side, so that no dark line is left where black bars end.
    """
    sides = []
    for axis in (1, 0):
        lit = np.flatnonzero((~surround).mean(axis) > 0.05)  # more than a scale or letters in the black
        if not lit.size:
            return
        sides.append((int(lit[0]), int(lit[-1]) + 1))
    for share in np.arange(0.98, _SMALLEST - 1e-6, -0.02):
        cuts = [round((1 - share) / 2 * (last - first)) for first, last in sides]
        rows, columns = (slice(first + cut, last - cut) for (first, last), cut in zip(sides, cuts, strict=True))
        yield rows, columns


def lies_across(found_height: int, found_width: int, height: int, width: int) -> bool:
    """Whether a picture stands upright where the wanted shape lies, or the other way round.

    Such a picture is mirrored at its diagonal, so that no half of it is cropped: a lesion has no top, and networks
    learn from turned and mirrored pictures.
    """
    return (found_height - found_width) * (height - width) < 0


def shown_part(found_height: int, found_width: int, height: int, width: int) -> tuple[float, float]:
    """The part of a picture, around its centre, that is brought to another shape: stretched by `MAX_STRETCH` at most.

    Args:
        found_height: Of the picture, in pixels.
        found_width: Of the picture.
        height: Wanted height in pixels.
        width: Wanted width.

    Returns:
        Rows and columns of the picture, of which there may be fractions.
    """
    least = min(found_height / height, found_width / width) * MAX_STRETCH
    return min(found_height, height * least), min(found_width, width * least)


def resized(image: np.ndarray, height: int, width: int, how: Image.Resampling) -> Image.Image:
    """The `shown_part` of a picture (uint8 [H, W, 3]), brought to size by one of Pillow's filters."""
    found_height, found_width = image.shape[:2]
    rows, columns = shown_part(found_height, found_width, height, width)
    top, left = (found_height - rows) / 2, (found_width - columns) / 2
    return Image.fromarray(image).resize((width, height), how, box=(left, top, left + columns, top + rows))
