"""Is this a dermoscopy image that a model can be asked about? Answered from the pixels, before any network.

Every image is first brought to the same 150 x 200 pixels (laid on its side, stretched and cropped as for a network), so
that HAM10000 as published (600x450) and its smaller copies are judged alike. Nine measures are taken inside the circle
that the dark corners of a lens leave free, and each is held against a threshold.

The thresholds are quantiles of the 6,509 images of HAM10000's training split (seed 0, 200x150), so that each measure
by itself objects to about one or two in a thousand real images; ``bench/trust.py --fit-quality`` prints them again.
No test image had a say. What the gate cannot know: a sharp, well-lit picture of something with the colours of skin.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import cv2
import numpy as np
from PIL import Image

from dermaflow.datasets.framing import LUMINANCE, lies_across, resized, shown_part

cv2.setNumThreads(1)  # images are spread over the cores, not the rows of one

Flag = Literal["blur", "exposure", "lesion_out_of_frame", "not_dermoscopy", "occlusion"]
FLAGS: tuple[Flag, ...] = ("blur", "exposure", "lesion_out_of_frame", "not_dermoscopy", "occlusion")

FLAG_TEXT: dict[Flag, str] = {
    "blur": "out of focus",
    "exposure": "too dark or overexposed",
    "lesion_out_of_frame": "no lesion in the middle of the frame",
    "not_dermoscopy": "does not look like a dermoscopy image",
    "occlusion": "hair, ink or something else covers the lesion",
}

HEIGHT, WIDTH = 150, 200
"""Working size, pixels: that of the smallest copy of HAM10000, which the thresholds were fitted on."""

_RADIUS = 0.48
"""Of the circle that is looked at, image heights: dark corners begin at about half of the height."""


@dataclass(frozen=True)
class Measures:
    """What is measured, each in the units of pixel values in 0..1 or a share of the circle.

    Attributes:
        sharpness: Mean detail of one to two pixels over that of two to four: independent of contrast.
        detail: Mean detail below one pixel; near 0 where there is no structure at all.
        brightness: Median luminance.
        highlight: 95 % quantile of the luminance; low where everything is dark.
        clipped: Share that is white in all three channels.
        redness: Median of red minus green; skin and blood are always redder than they are green.
        green: Share that is greener than it is red or blue.
        edges: 95 % quantile of the detail of one to two pixels; lines and letters.
        contrast: Skin (85 % quantile of the smoothed green channel) minus the darkest 2 %.
        offset: Distance of the centre of what is darker than the skin from that of the image, image heights.
        lines: Share covered by thin dark lines (black-hat transform), as hairs are.
        ink: Share with the violet, blue or green of a skin marker, which no tissue has.
    """

    sharpness: float
    detail: float
    brightness: float
    highlight: float
    clipped: float
    redness: float
    green: float
    edges: float
    contrast: float
    offset: float
    lines: float
    ink: float


@dataclass(frozen=True)
class Limit:
    """A measure, the side on which it is wrong, and the flag that it then raises."""

    measure: str
    side: Literal["below", "above"]
    threshold: float
    flag: Flag


LIMITS: tuple[Limit, ...] = (
    Limit("sharpness", "below", 0.47, "blur"),
    Limit("detail", "below", 0.0021, "blur"),
    Limit("brightness", "below", 0.22, "exposure"),
    Limit("highlight", "below", 0.46, "exposure"),
    Limit("brightness", "above", 0.90, "exposure"),
    Limit("clipped", "above", 0.01, "exposure"),
    Limit("contrast", "below", 0.095, "lesion_out_of_frame"),
    Limit("offset", "above", 0.41, "lesion_out_of_frame"),
    Limit("redness", "below", 0.01, "not_dermoscopy"),
    Limit("green", "above", 0.002, "not_dermoscopy"),
    Limit("edges", "above", 0.062, "not_dermoscopy"),
    Limit("lines", "above", 0.30, "occlusion"),
    Limit("ink", "above", 0.05, "occlusion"),
)


def quality_flags(image: np.ndarray) -> list[Flag]:
    """What speaks against asking a model about this image.

    Args:
        image: uint8 [H, W, 3], RGB, of any size, without the black surround of a lens (`decode_field`).

    Returns:
        Flags in the order of `FLAGS`; empty for a usable image.
    """
    found = measure(image)
    raised = {limit.flag for limit in LIMITS if _beyond(getattr(found, limit.measure), limit)}
    return [flag for flag in FLAGS if flag in raised]


def _beyond(value: float, limit: Limit) -> bool:
    return value < limit.threshold if limit.side == "below" else value > limit.threshold


def measure(image: np.ndarray) -> Measures:
    """Take every measure of an image; arguments as in `quality_flags`."""
    red, green, blue = cv2.split(_working_size(image).astype(np.float32) / 255)
    light = LUMINANCE[0] * red + LUMINANCE[1] * green + LUMINANCE[2] * blue
    highest, lowest = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
    circle = _circle()
    blurred = [_smooth(light, sigma) for sigma in (1, 2, 4)]
    finest, fine, middle = (
        np.abs(sharp - soft)[circle] for sharp, soft in zip((light, *blurred[:2]), blurred, strict=True)
    )
    contrast, offset = _lesion(green, blurred[0])
    square = np.ones((9, 9), np.uint8)
    hair = cv2.morphologyEx(light, cv2.MORPH_CLOSE, square, borderType=cv2.BORDER_REFLECT) - light
    cool = np.maximum(blue, green) - red
    saturation = (highest - lowest) / (highest + 1e-3)
    return Measures(
        sharpness=float(fine.mean() / (middle.mean() + 1e-4)),
        detail=float(finest.mean()),
        brightness=float(np.median(light[circle])),
        highlight=float(np.quantile(light[circle], 0.95)),
        clipped=float((lowest > 0.97)[circle].mean()),
        redness=float(np.median((red - green)[circle])),
        green=float(((green > red + 0.02) & (green > blue))[circle].mean()),
        edges=float(np.quantile(fine, 0.95)),
        contrast=contrast,
        offset=offset,
        lines=float((hair > 0.10)[circle].mean()),
        ink=float(((cool > 0.15) & (saturation > 0.35))[circle].mean()),
    )


def _working_size(image: np.ndarray) -> np.ndarray:
    """The image at `HEIGHT` x `WIDTH`, laid on its side where it stands; each pixel the mean of those it stands for."""
    height, width = image.shape[:2]
    if lies_across(height, width, HEIGHT, WIDTH):
        image, height, width = np.ascontiguousarray(image.transpose(1, 0, 2)), width, height
    if (height, width) == (HEIGHT, WIDTH):
        return image
    rows, columns = shown_part(height, width, HEIGHT, WIDTH)
    how = Image.Resampling.BOX if min(rows / HEIGHT, columns / WIDTH) >= 2 else Image.Resampling.BICUBIC
    return np.asarray(resized(image, HEIGHT, WIDTH, how))


def _smooth(plane: np.ndarray, sigma: int) -> np.ndarray:
    """Gaussian smoothing, cut off at three standard deviations."""
    size = 6 * sigma + 1
    return cv2.GaussianBlur(plane, (size, size), sigma, borderType=cv2.BORDER_REFLECT)


@cache
def _circle() -> np.ndarray:
    """The circle that is looked at, as a mask."""
    y = (np.arange(HEIGHT)[:, None] - HEIGHT / 2 + 0.5) / HEIGHT
    x = (np.arange(WIDTH)[None, :] - WIDTH / 2 + 0.5) / HEIGHT
    return np.hypot(y, x) < _RADIUS


def _lesion(green: np.ndarray, light: np.ndarray) -> tuple[float, float]:
    """Contrast between skin and lesion, and how far the lesion's centre lies from that of the image.

    Melanin and blood both take green, so that channel shows every lesion. The black frame of a lens does not count.
    `light` is the smoothed luminance.
    """
    smooth = _smooth(green, 3)
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    bright = (light > 0.12).astype(np.uint8)
    lens = cv2.erode(bright, cross, iterations=6, borderType=cv2.BORDER_CONSTANT, borderValue=(0,)).astype(bool)
    if lens.mean() < 0.2:  # nearly all black: nothing to be cut away
        lens = np.ones_like(lens)
    skin = np.quantile(smooth[lens], 0.85)
    darker = np.maximum(skin - smooth, 0) * lens
    darker[darker <= 0.3 * darker.max()] = 0
    total = darker.sum() + 1e-6
    rows, columns = np.indices(darker.shape, sparse=True)
    y = float((darker * rows).sum() / total) - (HEIGHT - 1) / 2
    x = float((darker * columns).sum() / total) - (WIDTH - 1) / 2
    offset = float(np.hypot(x, y)) / HEIGHT if darker.any() else 0.0
    return float(skin - np.quantile(smooth[lens], 0.02)), offset
