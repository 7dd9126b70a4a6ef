"""Write a synthetic HAM10000 in the published layout."""

from __future__ import annotations

import csv
import io
import logging
import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from dermaflow.datasets.synthetic.lesions import draw_lesion
from dermaflow.datasets.synthetic.marginals import Lesion, draw_lesions
from dermaflow.datasets.synthetic.scene import SITES, add_bubbles, add_ink, add_lines, skin, through_lens
from dermaflow.errors import DataError, StorageError
from dermaflow.storage import folder_atomic
from dermaflow.taxonomy import CODES

log = logging.getLogger(__name__)

FIRST_NUMBER = 9_000_000
"""Far from the real ISIC numbers, so that a synthetic image is never taken for one of the known hidden duplicates."""
JPEG_QUALITY = 90
SMALLEST = 48  # pixels; below that no structure is left
Drawn = tuple[bytes, bytes]  # JPEG and PNG
COLUMNS = ("lesion_id", "image_id", "dx", "dx_type", "age", "sex", "localization", "dataset")


@dataclass(frozen=True)
class SyntheticSummary:
    """What was written.

    Attributes:
        images: How many images.
        lesions: How many lesions they show.
        counts: Images by class, in the order of `dermaflow.taxonomy.CODES`.
        seconds: Wall time.
    """

    images: int
    lesions: int
    counts: dict[str, int]
    seconds: float


@dataclass(frozen=True)
class View:
    """One image of one lesion; `number` counts images from 0."""

    number: int
    lesion: Lesion

    @property
    def image_id(self) -> str:
        """As in the metadata, for instance ``ISIC_9000000``."""
        return f"ISIC_{FIRST_NUMBER + self.number:07d}"

    @property
    def row(self) -> tuple[object, ...]:
        """The values of `COLUMNS`."""
        lesion = self.lesion
        age = "" if lesion.age is None else float(lesion.age)
        name = f"HAM_{FIRST_NUMBER + lesion.number:07d}"
        return name, self.image_id, lesion.dx, lesion.dx_type, age, lesion.sex, lesion.localization, lesion.site


def generate(
    out: Path,
    images: int,
    seed: int,
    *,
    height: int = 450,
    width: int = 600,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> SyntheticSummary:
    """Draw a synthetic HAM10000: metadata, images in two parts, and the true lesion masks.

    The same arguments write the same bytes, whatever `workers` is.

    Args:
        out: Folder to write; it appears when it is complete and replaces one that is there.
        images: How many, at least one for each of the seven classes.
        seed: Not negative.
        height: Pixels.
        width: Pixels.
        workers: Processes that draw.
        progress: Called with images done and images in all.

    Returns:
        What was written.

    Raises:
        DataError: Too few images or pixels, or a negative seed.
        StorageError: The folder cannot be written.
    """
    if min(height, width) < SMALLEST:
        raise DataError(f"images of {width}x{height} asked for", expected=f"at least {SMALLEST} pixels a side")
    if seed < 0:
        raise DataError(f"seed {seed}", where="seed", expected="0 or more")
    start = time.perf_counter()
    plan = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0,)))
    lesions = draw_lesions(plan, images)
    owners = [lesion for lesion in lesions for _ in range(lesion.images)]
    views = [View(number, owners[i]) for number, i in enumerate(plan.permutation(images))]
    draw = partial(draw_view, seed=seed, height=height, width=width)
    try:
        with folder_atomic(out) as folder, _drawing(draw, views, workers) as drawn:
            _write(folder, views, drawn, progress)
    except OSError as error:
        raise StorageError(
            f"could not write: {error.strerror or error}", where=out, expected="a writable disk with free space"
        ) from error
    found = Counter(view.lesion.dx for view in views)
    summary = SyntheticSummary(images, len(lesions), {code: found[code] for code in CODES}, time.perf_counter() - start)
    log.info("drew %d images of %d lesions in %.1f s", images, len(lesions), summary.seconds)
    return summary


@contextmanager
def _drawing(draw: Callable[[View], Drawn], views: list[View], workers: int) -> Iterator[Iterable[Drawn]]:
    """The drawn views in their order, from this process or from several."""
    if workers == 1:
        yield map(draw, views)
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads (torch, Ray) can hang
    pool = ProcessPoolExecutor(workers, mp_context=context)
    try:
        yield pool.map(draw, views, chunksize=8)
    finally:
        pool.shutdown(cancel_futures=True)  # an error or Ctrl-C does not wait for the rest


def _write(
    folder: Path, views: list[View], drawn: Iterable[Drawn], progress: Callable[[int, int], None] | None
) -> None:
    """Metadata, images in two halves and masks, into an empty folder."""
    parts = [folder / f"HAM10000_images_part_{number}" for number in (1, 2)]
    masks = folder / "HAM10000_segmentations"
    for place in (*parts, masks):
        place.mkdir()
    with (folder / "HAM10000_metadata.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(view.row for view in views)
    for view, (jpeg, png) in zip(views, drawn, strict=True):
        part = parts[2 * view.number >= len(views)]
        (part / f"{view.image_id}.jpg").write_bytes(jpeg)
        (masks / f"{view.image_id}_segmentation.png").write_bytes(png)
        if progress:
            progress(view.number + 1, len(views))


def draw_view(view: View, *, seed: int, height: int, width: int) -> Drawn:
    """One image of a lesion and its mask.

    Args:
        view: Which image of which lesion.
        seed: Of the whole set; the lesion's look depends on it and the lesion's number, the rest on the image's.
        height: Pixels.
        width: Pixels.

    Returns:
        JPEG (RGB) and PNG (8 bit, 0 skin, 255 lesion).
    """
    patient = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1, view.lesion.number)))
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(2, view.number)))
    site = SITES[view.lesion.site]
    hairiness = patient.gamma(0.5, 2.0)  # most have none in view, some have many
    film, inside = draw_lesion(view.lesion.dx, patient, height)
    pixels = skin(patient, site, height, width)

    affine = _pose(rng, height, width, len(inside))
    seen, added = (
        _place(layer, affine, height, width, fill) for layer, fill in zip(film.optics(), (255, 0), strict=True)
    )
    pixels = pixels * seen + added * np.float32(max(site.skin) / 235)
    mask = Image.fromarray(inside.astype(np.uint8) * 255).transform((width, height), Image.Transform.AFFINE, affine)

    pixels = add_lines(rng, pixels, int(rng.poisson(site.hair * hairiness)), rng.random() < site.ruler)
    if rng.random() < 0.02:
        pixels = add_ink(rng, pixels)
    if rng.random() < 0.1:
        pixels = add_bubbles(rng, pixels, int(rng.integers(2, 14)))
    pixels = through_lens(rng, pixels, site)
    picture = Image.fromarray((np.clip(pixels, 0, 1) * 255).astype(np.uint8))
    blur = site.blur * rng.uniform(0.3, 1.2) * height / 1000
    return _encode(picture.filter(ImageFilter.GaussianBlur(blur)), "JPEG", quality=JPEG_QUALITY), _encode(mask, "PNG")


def _pose(rng: np.random.Generator, height: int, width: int, side: int) -> tuple[float, ...]:
    """How the dermoscope was held: the six numbers that take an image pixel to a pixel of the lesion's square."""
    turn, zoom = rng.uniform(0, 2 * np.pi), np.exp(rng.normal(0, 0.1))
    x, y = np.array([width / 2, height / 2]) + rng.normal(0, 0.035, 2) * height
    cos, sin = np.cos(turn) / zoom, np.sin(turn) / zoom
    return cos, sin, side / 2 - cos * x - sin * y, -sin, cos, side / 2 + sin * x - cos * y


def _place(
    layer: NDArray[np.floating], affine: tuple[float, ...], height: int, width: int, fill: int
) -> NDArray[np.floating]:
    """Turn a layer of the lesion's square into the image, with `fill` around it."""
    picture = Image.fromarray((layer * 255 + 0.5).astype(np.uint8))
    how = (Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
    return np.asarray(picture.transform((width, height), *how, fillcolor=(fill,) * 3), np.float32) / 255


def _encode(picture: Image.Image, kind: str, **options: int) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()
