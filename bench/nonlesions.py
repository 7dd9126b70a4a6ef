"""Images no dermoscopy model should answer for: drawn by program, or real images made useless.

`DRAWN` need nothing but a source of chance; `SPOILT` take a real dermoscopy image. All are uint8 [H, W, 3], RGB.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from scipy import ndimage

Drawn = Callable[[np.random.Generator, int, int], np.ndarray]
Spoilt = Callable[[np.random.Generator, np.ndarray], np.ndarray]


def _colour(rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = (int(value) for value in rng.integers(0, 256, 3))
    return red, green, blue


def _camera(rng: np.random.Generator, picture: Image.Image, height: int, width: int) -> np.ndarray:
    """Bring a drawing of any size to a photograph's look: slightly soft, with uneven light and sensor noise."""
    pixels = np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS), dtype=np.float32)
    slope = 1 + rng.uniform(-0.2, 0.2) * np.linspace(-1, 1, width)[None, :, None]
    pixels = pixels * slope + rng.normal(0, rng.uniform(1, 5), pixels.shape)
    return np.clip(pixels, 0, 255).astype(np.uint8)


def landscape(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Sky with a sun or clouds, ridges of hills, trees in front."""
    h, w = 300, 400
    sky = np.linspace(0, 1, h)[:, None, None]
    pixels = np.array(_colour(rng)) * 0.5 * (1 - sky) + np.array([135, 170, 220]) * (0.5 + 0.5 * sky)
    picture = Image.fromarray(np.broadcast_to(pixels, (h, w, 3)).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    x, y, r = rng.uniform(0, w), rng.uniform(0, h / 3), rng.uniform(8, 40)
    pen.ellipse((x - r, y - r, x + r, y + r), fill=(255, 244, 200))
    for ridge in range(int(rng.integers(2, 5))):
        steps = np.cumsum(rng.normal(0, 5, w // 4 + 1)) + h * (0.35 + 0.15 * ridge)
        shade = np.array([60, 110, 50]) * rng.uniform(0.4, 1.3) + rng.uniform(-30, 30, 3)
        line = [(4 * i, float(level)) for i, level in enumerate(steps)]
        pen.polygon([(0, h), *line, (w, h)], fill=tuple(int(v) for v in np.clip(shade, 0, 255)))
    for _ in range(int(rng.integers(3, 25))):
        x, foot, size = rng.uniform(0, w), rng.uniform(0.6 * h, h), rng.uniform(10, 60)
        green = (int(rng.integers(10, 60)), int(rng.integers(60, 130)), int(rng.integers(10, 60)))
        pen.line((x, foot, x, foot - size), fill=(70, 45, 30), width=max(int(size / 10), 1))
        pen.polygon(
            [(x - size / 2, foot - size / 3), (x + size / 2, foot - size / 3), (x, foot - 1.6 * size)], fill=green
        )
    return _camera(rng, picture, height, width)


def street(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Houses with rows of windows, a road."""
    h, w = 300, 400
    picture = Image.new("RGB", (w, h), _colour(rng))
    pen = ImageDraw.Draw(picture)
    x = 0.0
    while x < w:
        wide, top = rng.uniform(40, 120), rng.uniform(20, 150)
        pen.rectangle((x, top, x + wide, h - 40), fill=_colour(rng))
        glass, gap = _colour(rng), rng.uniform(12, 24)
        for wx in np.arange(x + 6, x + wide - 10, gap):
            for wy in np.arange(top + 8, h - 60, gap):
                pen.rectangle((wx, wy, wx + 0.5 * gap, wy + 0.6 * gap), fill=glass)
        x += wide
    pen.rectangle((0, h - 40, w, h), fill=(90, 90, 95))
    for dash in range(0, w, 40):
        pen.rectangle((dash, h - 22, dash + 20, h - 18), fill=(240, 240, 240))
    return _camera(rng, picture, height, width)


def things(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Coloured objects on a table: round, square, long, with shadows; one or many."""
    h, w = 300, 400
    picture = Image.new("RGB", (w, h), _colour(rng))
    pen = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(1, 12))):
        x, y, a, b = rng.uniform(0, w), rng.uniform(0, h), rng.uniform(15, 110), rng.uniform(15, 110)
        shape = rng.choice(["ellipse", "rectangle"])
        for shift, fill in ((6, (30, 30, 30)), (0, _colour(rng)), (-6, _colour(rng))):
            grow = 1.0 if shift >= 0 else 0.5
            box = (x - a * grow + shift, y - b * grow + shift, x + a * grow + shift, y + b * grow + shift)
            getattr(pen, shape)(box, fill=fill)
    return _camera(rng, picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, 3))), height, width)


def skin_toned(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """One of the three scenes above in the colours of skin and pigment, so that colour gives nothing away."""
    scene = (landscape, street, things)[int(rng.integers(3))](rng, height, width)
    light = scene.mean(axis=2, keepdims=True) / 255
    dark, bright = np.array([90, 55, 45]), np.array([225, 175, 165]) * np.exp(rng.normal(0, 0.08, 3))
    return np.clip(dark + (bright - dark) * light + 0.1 * (scene - 255.0 * light), 0, 255).astype(np.uint8)


def texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Random colours with the 1/f spectrum of natural photographs (Field, J Opt Soc Am A 4, 2379, 1987)."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    frequency[0, 0] = 1
    planes = rng.normal(size=(height, width, 3))
    spectrum = np.fft.rfft2(planes, axes=(0, 1)) / frequency[..., None] ** rng.uniform(0.8, 1.4)
    spectrum[0, 0] = 0
    planes = np.fft.irfft2(spectrum, s=(height, width), axes=(0, 1)) @ rng.normal(size=(3, 3))
    planes = planes / planes.std() * rng.uniform(25, 60) + rng.uniform(60, 190, 3)
    return np.clip(planes, 0, 255).astype(np.uint8)


def noise(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """White noise: uniform or normal around a grey, in colour or not."""
    planes = 3 if rng.random() < 0.7 else 1
    if rng.random() < 0.5:
        pixels = rng.uniform(0, 255, (height, width, planes))
    else:
        pixels = rng.normal(rng.uniform(60, 200), rng.uniform(25, 70), (height, width, planes))
    return np.broadcast_to(np.clip(pixels, 0, 255), (height, width, 3)).astype(np.uint8)


def blank(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """One colour: white, grey, any, or that of skin, with or without a little noise."""
    skin = np.array([200, 155, 155]) * np.exp(rng.normal(0, 0.12, 3))
    kinds = [np.full(3, 255.0), np.full(3, rng.uniform(40, 230)), np.array(_colour(rng), float), skin]
    colour = kinds[int(rng.integers(len(kinds)))]
    pixels = colour + rng.normal(0, rng.choice([0.0, 2.0]), (height, width, 3))
    return np.clip(pixels, 0, 255).astype(np.uint8)


def black(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A covered lens: black with sensor noise up to a few levels."""
    return np.clip(rng.normal(0, rng.uniform(0, 4), (height, width, 3)), 0, 255).astype(np.uint8)


def text(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A page, a form or a screen full of text."""
    light = rng.random() < 0.8
    picture = Image.new("RGB", (800, 600), (int(rng.integers(225, 256)),) * 3 if light else (20, 20, 30))
    pen = ImageDraw.Draw(picture)
    size = float(rng.uniform(12, 44))
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz      ,.0123456789"))
    y = 15.0
    while y < 600:
        line = "".join(rng.choice(letters, 90))
        pen.text((20, y), line, fill=(15, 15, 20) if light else (220, 220, 210), font=ImageFont.load_default(size))
        y += 1.4 * size
    return np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS))


def heavy_blur(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Out of focus by 3 to 8 % of the image height (standard deviation)."""
    sigma = rng.uniform(0.03, 0.08) * len(image)
    return np.clip(ndimage.gaussian_filter(image.astype(np.float32), (sigma, sigma, 0)), 0, 255).astype(np.uint8)


def heavy_crop(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """A corner with a quarter of the height and width, enlarged: skin, or a piece of the lesion's side."""
    height, width = image.shape[:2]
    rows, columns = max(height // 4, 1), max(width // 4, 1)
    top = int(rng.choice([0, height - rows]))
    left = int(rng.choice([0, width - columns]))
    part = Image.fromarray(image[top : top + rows, left : left + columns])
    return np.asarray(part.resize((width, height), Image.Resampling.BICUBIC))


def cut_off(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Shifted by half of the image: a centred lesion is cut through by the side of the frame."""
    height, width = image.shape[:2]
    rows, columns = height // 2, width // 2
    top, left = [(0, columns), (rows, 0), (0, 0), (rows, columns)][int(rng.integers(4))]
    part = Image.fromarray(image[top : top + rows, left : left + columns])
    return np.asarray(part.resize((width, height), Image.Resampling.BICUBIC))


def under_exposed(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """A twelfth to a quarter of the light."""
    return (image * rng.uniform(1 / 12, 1 / 4)).astype(np.uint8)


def over_exposed(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Two to four times the light: most of the skin is clipped."""
    return np.clip(image * rng.uniform(2, 4), 0, 255).astype(np.uint8)


def ink(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """A surgeon's marker in violet, blue or green over the lesion: two to five broad strokes through the middle."""
    height, width = image.shape[:2]
    cover = Image.new("L", (width, height))
    pen = ImageDraw.Draw(cover)
    for _ in range(int(rng.integers(2, 6))):
        ends = rng.normal(0.5, 0.25, (2, 2)) * (width, height)
        middle = rng.normal(0.5, 0.08, 2) * (width, height)
        line = [tuple(ends[0]), tuple(middle), tuple(ends[1])]
        pen.line(line, fill=int(rng.integers(190, 240)), width=int(rng.uniform(0.06, 0.14) * height), joint="curve")
    share = np.asarray(cover.filter(ImageFilter.GaussianBlur(1)), np.float32)[..., None] / 255
    colours = [(70, 40, 130), (35, 50, 140), (30, 90, 80)]
    return (image * (1 - share) + np.array(colours[int(rng.integers(3))]) * share).astype(np.uint8)


def hair(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """80 to 160 thick dark hairs."""
    height, width = image.shape[:2]
    cover = Image.new("L", (2 * width, 2 * height))
    pen = ImageDraw.Draw(cover)
    t = np.linspace(0, 1, 14)[:, None]
    for _ in range(int(rng.integers(80, 161))):
        start, bend, end = rng.uniform(-0.1, 1.1, (3, 2)) * (2 * width, 2 * height)
        bend = 0.6 * bend + 0.2 * (start + end)
        curve = (1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * end
        thick = max(round(2 * height * rng.uniform(0.006, 0.012)), 1)
        pen.line([tuple(p) for p in curve], fill=int(rng.integers(180, 250)), width=thick, joint="curve")
    share = np.asarray(cover.reduce(2), np.float32)[..., None] / 255
    return (image * (1 - share) + np.array([40, 28, 24]) * share).astype(np.uint8)


DRAWN: dict[str, Drawn] = {
    "landscape": landscape,
    "street": street,
    "things on a table": things,
    "scenes in skin colours": skin_toned,
    "1/f texture": texture,
    "noise": noise,
    "blank": blank,
    "black": black,
    "text": text,
}
SPOILT: dict[str, Spoilt] = {
    "heavy blur": heavy_blur,
    "heavy crop": heavy_crop,
    "lesion cut off": cut_off,
    "under-exposed": under_exposed,
    "over-exposed": over_exposed,
    "ink": ink,
    "hair": hair,
}
