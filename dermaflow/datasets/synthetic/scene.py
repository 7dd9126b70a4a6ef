"""What is in a dermoscopy image besides the lesion: skin, hair, rulers, ink, bubbles, lens and camera of four sites."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from dermaflow.datasets.synthetic.canvas import fade, smooth_noise

Pixels = NDArray[np.floating]


@dataclass(frozen=True)
class Site:
    """Camera and habits of one source of images.

    Attributes:
        skin: Median colour of the skin at the left and right edge of its real images (0..255), measured on HAM10000.
        spread: Its standard deviation from image to image, share.
        gamma: Contrast; above 1 is harder.
        dark_corners: Share of images with the round black frame of the lens, measured on HAM10000.
        ruler: Share of images with a ruler, by eye.
        hair: Mean number of hairs, by eye.
        blur: Standard deviation of the blur, thousandths of the image height, by eye.
    """

    skin: tuple[int, int, int]
    spread: float
    gamma: float
    dark_corners: float
    ruler: float
    hair: float
    blur: float


SITES: dict[str, Site] = {
    "rosendahl": Site((190, 156, 160), 0.13, 1.10, 0.05, 0.15, 3.0, 2.0),
    "vidir_modern": Site((179, 150, 163), 0.15, 1.05, 0.23, 0.15, 2.5, 2.5),
    "vidir_molemax": Site((219, 143, 148), 0.08, 1.00, 0.0, 0.0, 1.5, 4.0),
    "vienna_dias": Site((214, 162, 168), 0.10, 0.92, 0.02, 0.03, 2.0, 3.0),
}


def skin(rng: np.random.Generator, site: Site, height: int, width: int) -> Pixels:
    """Bare skin: the site's colour, mottled by blood and freckles.

    Returns:
        float32 ``(height, width, 3)`` in 0..1.
    """
    colour = np.array(site.skin, np.float32) / 255 * np.exp(rng.normal(0, site.spread * 0.7))
    warm, pale = rng.normal(0, site.spread * 0.35, 2)
    colour *= np.exp(warm * np.array([0.3, 0.0, -1.0]) + pale * np.array([0.0, 1.0, 0.6]))
    colour[1:] = np.minimum(colour[1:], np.array([0.86, 0.95]) * colour[0])  # skin is never green or blue
    coarse, fine = (smooth_noise(rng, height, width, cell * height) for cell in (0.35, 0.05))
    grain = smooth_noise(rng, height, width, 0.012 * height)
    blood = 0.05 * coarse + rng.uniform(0.005, 0.035) * fine
    brown = 0.03 * smooth_noise(rng, height, width, 0.25 * height) + 0.02 * grain
    if rng.random() < 0.3:  # sun-damaged, freckled
        brown += rng.uniform(0.1, 0.35) * fade(1.3 - smooth_noise(rng, height, width, 0.08 * height), 0.35)
    absorbed = np.stack([0.1 * blood + 0.4 * brown, blood + 0.8 * brown, 0.6 * blood + brown], -1)
    return np.clip(colour, 0.2, 0.97).astype(np.float32) * np.exp(-absorbed)


def add_lines(rng: np.random.Generator, pixels: Pixels, hairs: int, ruler: bool) -> Pixels:
    """Lay hairs and the ticks of a ruler over the image."""
    height, width = pixels.shape[:2]
    sheet = Image.new("L", (2 * width, 2 * height))
    pen = ImageDraw.Draw(sheet)
    for _ in range(hairs):
        start, bend, end = rng.uniform(-0.1, 1.1, (3, 2)) * (2 * width, 2 * height)
        bend = 0.6 * bend + 0.2 * (start + end)
        t = np.linspace(0, rng.uniform(0.3, 1), 14)[:, None]
        curve = (1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * end
        thick = max(round(2 * height * rng.uniform(0.003, 0.008)), 1)
        pen.line([tuple(p) for p in curve], fill=int(rng.integers(110, 230)), width=thick, joint="curve")
    if ruler:
        _ruler(rng, pen, 2 * width, 2 * height)
    cover = np.asarray(sheet.reduce(2), np.float32)[..., None] * np.float32(1 / 255)
    return pixels * (1 - cover) + np.array([0.17, 0.12, 0.10], np.float32) * cover


def _ruler(rng: np.random.Generator, pen: ImageDraw.ImageDraw, width: int, height: int) -> None:
    """A row of ticks across a corner or along a side, every fifth longer."""
    corner = np.array([rng.choice([0.0, width]), rng.choice([0.0, height])])
    inward = (np.array([width, height]) / 2 - corner) * rng.uniform(0.1, 0.3)
    middle = corner + inward
    along = np.array([-inward[1], inward[0]]) / np.hypot(*inward)
    inward /= np.hypot(*inward)
    step = 0.05 * height
    for tick in range(-14, 15):
        foot = middle + along * tick * step
        tip = foot - inward * height * (0.045 if tick % 5 == 0 else 0.025)
        pen.line([tuple(foot), tuple(tip)], fill=235, width=max(round(0.008 * height), 1))


def add_ink(rng: np.random.Generator, pixels: Pixels) -> Pixels:
    """A stroke of a surgeon's marker near a side."""
    height, width = pixels.shape[:2]
    x = np.arange(width, dtype=np.float32)[None, :] / height
    y = np.arange(height, dtype=np.float32)[:, None] / height
    centre = rng.uniform(0.4, 0.6, 2) * (width / height, 1)
    ring = np.abs(np.hypot(x - centre[0], y - centre[1]) - rng.uniform(0.55, 0.7))
    arc = np.cos(np.arctan2(y - centre[1], x - centre[0]) - rng.uniform(0, 6.28)) > 0.6
    amount = 0.7 * np.clip(1.6 - ring / 0.02, 0, 1) * arc
    amount *= np.clip(0.8 + 0.3 * smooth_noise(rng, height, width, 0.03 * height), 0, 1)
    return pixels * (1 - amount[..., None] * np.array([0.65, 0.75, 0.2], np.float32))


def add_bubbles(rng: np.random.Generator, pixels: Pixels, count: int) -> Pixels:
    """Bubbles in the immersion gel: bright rims with a glint."""
    height, width = pixels.shape[:2]
    sheet = Image.new("L", (2 * width, 2 * height))
    pen = ImageDraw.Draw(sheet)
    for x, y, size in rng.random((count, 3)):
        r = height * (0.015 + 0.05 * size**2)
        px, py = 2 * width * x, 2 * height * y
        pen.ellipse((px - r, py - r, px + r, py + r), outline=90, width=max(round(0.006 * height), 1))
        pen.ellipse((px - 0.6 * r, py - 0.6 * r, px - 0.3 * r, py - 0.3 * r), fill=220)
    glow = np.asarray(sheet.reduce(2), np.float32)[..., None] * np.float32(1 / 255)
    return pixels + (1 - pixels) * glow


def through_lens(rng: np.random.Generator, pixels: Pixels, site: Site) -> Pixels:
    """Uneven light, dark corners, contrast, sensor noise."""
    height, width = pixels.shape[:2]
    x = (np.arange(width, dtype=np.float32)[None, :] - width / 2) / height - rng.uniform(-0.04, 0.04)
    y = (np.arange(height, dtype=np.float32)[:, None] - height / 2) / height - rng.uniform(-0.04, 0.04)
    r2 = x * x + y * y
    light = 1.03 - rng.uniform(0.05, 0.35) * r2 + rng.uniform(-0.08, 0.08) * x + rng.uniform(-0.08, 0.08) * y
    if rng.random() < site.dark_corners:
        rim = rng.uniform(0.58, 0.75)
        light = light * np.clip((rim - np.sqrt(r2)) / 0.02, 0.06, 1)
    gain = light * np.float32(np.exp(rng.normal(0, 0.05)))
    pixels = pixels * gain[..., None] * np.exp(rng.normal(0, 0.02, 3)).astype(np.float32)
    middle = np.float32(0.6)
    pixels = middle * (np.maximum(pixels, 0.004) / middle) ** np.float32(site.gamma)
    grain = rng.standard_normal((height, width, 1), dtype=np.float32)
    return pixels + np.float32(0.009) * grain
