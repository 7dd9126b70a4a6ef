"""Encoded images: inspect them without trust, decode them at scale. Nothing else in the project opens an image."""

from __future__ import annotations

import hashlib
import io
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image
from PIL.JpegImagePlugin import get_sampling

from dermaflow.datasets.framing import field_of_view, lies_across, resized
from dermaflow.errors import DataError

MAX_PIXELS = 60_000_000
"""Largest image decoded, in pixels. The largest dermoscopy cameras give about 45 megapixels."""
MAX_BYTES = 64 << 20
"""Largest encoded image read, in bytes."""
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
_CHROMA_420 = 2  # as Pillow numbers it

Reason = Literal["empty", "too_many_bytes", "too_many_pixels", "not_an_image", "truncated"]


class ImageProblem(DataError):
    """An image that cannot be used; `reason` is a short code for tables and quarantine files."""

    def __init__(self, reason: Reason, what: str, *, where: object = None) -> None:
        super().__init__(what, where=where)
        self.reason: Reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (self.reason, self.what, self.where)


def _rebuild(reason: Reason, what: str, where: object) -> ImageProblem:
    return ImageProblem(reason, what, where=where)


class ImageFacts(NamedTuple):
    """What an image says of itself: size in pixels, ``JPEG`` or another format, SHA-256 of its bytes."""

    width: int
    height: int
    format: str
    sha256: str


def inspect_image(data: bytes) -> ImageFacts:
    """Read the header, check the limits, decode once to find truncation.

    Raises:
        ImageProblem: Empty, too large, no image, or cut short.
    """
    width, height, name = _header(data)
    decode(data, 8, 8)  # at 1/8 size every coded byte is still read, at a quarter of the cost
    return ImageFacts(width, height, name, hashlib.sha256(data).hexdigest())


def decode(data: bytes, min_height: int, min_width: int) -> np.ndarray:
    """Decode to RGB; a JPEG directly at the smallest of libjpeg's sizes (1/8 ... 1) that covers the wanted one.

    Args:
        data: Encoded image.
        min_height: Wanted height in pixels.
        min_width: Wanted width in pixels.

    Returns:
        uint8 array [H, W, 3], at least the wanted size unless the image itself is smaller.

    Raises:
        ImageProblem: Empty, too large, no image, or cut short.
    """
    _, _, name = _header(data)
    if name == "JPEG":
        try:
            return simplejpeg.decode_jpeg(data, "RGB", min_height=min_height, min_width=min_width, min_factor=1)
        except ValueError as error:
            if "premature" in str(error).lower() or "end of" in str(error).lower():
                raise ImageProblem("truncated", f"cut short: {error}") from error
            # Rare colour spaces (CMYK) are Pillow's; a damaged file fails there too.
    return _decode_with_pillow(data)


def decode_field(data: bytes, min_height: int, min_width: int) -> np.ndarray:
    """`decode`, and of a picture through a round lens, or with black bars, the `field_of_view` alone.

    The field has at least the wanted size, unless it has not in the image itself.
    """
    image = decode(data, min_height, min_width)
    height, width = image.shape[:2]
    rows, columns = field_of_view(image)
    if (rows, columns) == (slice(0, height), slice(0, width)):
        return image
    finer_height = -(-min_height * height // (rows.stop - rows.start))
    finer_width = -(-min_width * width // (columns.stop - columns.start))
    image = decode(data, finer_height, finer_width)
    down, along = image.shape[0] / height, image.shape[1] / width
    top, bottom = round(rows.start * down), round(rows.stop * down)
    left, right = round(columns.start * along), round(columns.stop * along)
    return np.ascontiguousarray(image[top:bottom, left:right])


def small_copy(data: bytes, height: int, width: int, quality: int) -> bytes:
    """A JPEG copy as archives of thumbnails hold them: bicubic, 4:2:0, by Pillow.

    Args:
        data: Encoded image.
        height: Height of the copies in pixels; an image of another shape is stretched and cropped (`shown_part`).
        width: Width of the copies; the copy of an image that lies across stands as that does.
        quality: Of libjpeg, 1 to 100.

    Returns:
        The copy; an image that is no larger comes back as it is.

    Raises:
        ImageProblem: Empty, too large, no image, or cut short.
    """
    if not _larger(dimensions(data), (height, width)):
        return data
    image = decode_field(data, 3 * height, 3 * width)  # libjpeg shrinks by another filter: leave it little
    found_height, found_width = image.shape[:2]
    if not _larger((found_height, found_width), (height, width)):
        return data
    if lies_across(found_height, found_width, height, width):
        height, width = width, height
    copy = io.BytesIO()
    resized(image, height, width, Image.Resampling.BICUBIC).save(copy, "JPEG", quality=quality)
    return copy.getvalue()


def _larger(sides: tuple[int, int], others: tuple[int, int]) -> bool:
    return min(sides) > min(others) and max(sides) > max(others)


def jpeg_quality(data: bytes) -> int | None:
    """The quality, 1 to 100, at which Pillow quantises brightness like this 4:2:0 JPEG; None for others."""
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            if get_sampling(image) != _CHROMA_420:
                return None
            return _qualities().get(tuple(image.quantization[0]))  # type: ignore[attr-defined]
    except (OSError, ValueError, SyntaxError):
        return None


@cache
def _qualities() -> dict[tuple[int, ...], int]:
    found = {}
    for quality in range(1, 101):
        stream = io.BytesIO()
        Image.new("RGB", (8, 8)).save(stream, "JPEG", quality=quality)
        found[tuple(Image.open(stream).quantization[0])] = quality  # type: ignore[attr-defined]
    return found


def dimensions(data: bytes) -> tuple[int, int]:
    """Width and height in pixels as the header gives them; nothing is decoded.

    Raises:
        ImageProblem: Empty, too large, or no image.
    """
    return _header(data)[:2]


def _header(data: bytes) -> tuple[int, int, str]:
    if not data:
        raise ImageProblem("empty", "no bytes")
    if len(data) > MAX_BYTES:
        raise ImageProblem("too_many_bytes", f"more than {MAX_BYTES} bytes")
    is_jpeg = data[:3] == b"\xff\xd8\xff"
    if is_jpeg:
        try:
            height, width, _, _ = simplejpeg.decode_jpeg_header(data)
            return _within_limits(width, height, "JPEG")
        except ValueError:
            pass  # rare chroma subsampling is Pillow's; a damaged header fails there too
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            return _within_limits(*image.size, str(image.format))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageProblem("too_many_pixels", f"{error}") from error
    except (OSError, ValueError, SyntaxError) as error:
        why = str(error).partition(" <")[0]  # without the address of the buffer, so that tables can be compared
        raise ImageProblem(
            "truncated" if is_jpeg else "not_an_image", f"not readable as {', '.join(_FORMATS)}: {why}"
        ) from error


def _within_limits(width: int, height: int, name: str) -> tuple[int, int, str]:
    if width * height > MAX_PIXELS:
        raise ImageProblem("too_many_pixels", f"{width} x {height} pixels, the limit is {MAX_PIXELS:,} in all")
    return width, height, name


def _decode_with_pillow(data: bytes) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.mode.startswith("I"):  # 16-bit grey, which `convert` would cut off at 255
                grey = (np.asarray(image) >> 8).astype(np.uint8)
                return np.repeat(grey[:, :, None], 3, axis=2)
            return np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise ImageProblem("truncated", f"damaged or cut short: {error}") from error
