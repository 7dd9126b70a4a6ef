"""Photographs in DICOM: which frames a file holds, and one frame as an encoded image.

Read are Dermoscopic Photography and VL Photographic Images (DICOM PS3.4, annex B.5), single- and multi-frame. An image
that says of itself that a person can be recognised on it (Recognizable Visual Features) is refused. Nothing else of the
header is looked at or kept.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from dermaflow.datasets.images import MAX_BYTES, MAX_PIXELS
from dermaflow.errors import DataError
from dermaflow.scoring.references import BadMember, Reference

PHOTOGRAPHS = {
    "1.2.840.10008.5.1.4.1.1.77.1.7": "Dermoscopic Photography Image",
    "1.2.840.10008.5.1.4.1.1.77.1.4": "VL Photographic Image",
}
HEAD_BYTES = 1 << 20
"""Of a file, enough for everything that stands before its pixels."""
MAX_FRAMES = 10_000
"""Frames of one file; more is a film or a forged header."""
_DEFLATED = b"1.2.840.10008.1.2.1.99"
"""Transfer syntax whose whole data set is compressed: unpacked without a limit by pydicom, and used by nobody."""
_JPEG_BASELINE = "1.2.840.10008.1.2.4.50"
_TAGS = ("SOPClassUID", "NumberOfFrames", "Rows", "Columns", "RecognizableVisualFeatures")


def is_dicom(head: bytes) -> bool:
    """Whether a file that begins so is DICOM."""
    return head[128:132] == b"DICM"


def expand(reference: Reference, head: bytes) -> Iterator[Reference]:
    """One reference a frame, or one with the reason why the file cannot be used.

    Args:
        reference: The file.
        head: Its first `HEAD_BYTES`.
    """
    try:
        frames = frame_count(head)
    except BadMember as error:
        yield reference.but(problem=error.problem)
        return
    if frames == 1:
        yield reference.but(frame=0)
    else:
        yield from (reference.but(frame=i, path=f"{reference.path}:{i + 1}") for i in range(frames))


def frame_count(head: bytes) -> int:
    """How many frames a file holds, from its first `HEAD_BYTES`.

    Raises:
        BadMember: It is not DICOM, no photograph, or not to be used.
    """
    if not is_dicom(head):
        raise BadMember("not_dicom", "no DICOM file")
    if _DEFLATED in head[:4096]:
        raise BadMember("unsupported_dicom", "deflated data set")
    header = _parse(io.BytesIO(head), stop_before_pixels=True, specific_tags=list(_TAGS))
    try:
        kind, recognizable = str(header.get("SOPClassUID", "")), str(header.get("RecognizableVisualFeatures", "NO"))
        frames = int(header.get("NumberOfFrames") or 1)
        rows, columns = int(header.get("Rows") or 0), int(header.get("Columns") or 0)
    except Exception as error:  # values are parsed when they are asked for, and a forged one raises anything
        raise BadMember("damaged", f"no readable DICOM header ({type(error).__name__})") from error
    if kind not in PHOTOGRAPHS:
        raise BadMember("not_a_photograph", f"DICOM class {_known(kind)}")
    if recognizable.strip().upper() == "YES":
        raise BadMember("recognizable", "the image says that a person can be recognised on it")
    if not 1 <= frames <= MAX_FRAMES:
        raise BadMember("too_many_frames", f"{frames:,}, the limit is {MAX_FRAMES:,}")
    if rows * columns > MAX_PIXELS:
        raise BadMember("too_many_pixels", f"{columns} x {rows} pixels, the limit is {MAX_PIXELS:,} in all")
    return frames


def _known(uid: str) -> str:
    """The name of a UID of the standard; one that is none may hold anything and is not repeated."""
    from pydicom.uid import UID_dictionary

    return UID_dictionary[uid][0] if uid in UID_dictionary else "unknown"


class DicomFile:
    """A file in memory, whose frames are asked for one by one.

    Args:
        data: The whole file, which `frame_count` accepted.

    Raises:
        BadMember: It is damaged or not to be used.
    """

    def __init__(self, data: bytes) -> None:
        self._frames = frame_count(data[:HEAD_BYTES])
        self._data = _parse(io.BytesIO(data))
        if "PixelData" not in self._data:
            raise BadMember("damaged", "no pixel data")

    def image(self, frame: int) -> bytes:
        """A frame as an encoded image: as it stands in the file where that is a JPEG of the usual kind, else a bitmap.

        Raises:
            BadMember: It cannot be decoded.
        """
        from pydicom.encaps import get_frame

        data = self._data
        syntax = str(getattr(data.file_meta, "TransferSyntaxUID", ""))
        try:
            if syntax == _JPEG_BASELINE and str(data.get("PhotometricInterpretation", "")).startswith("YBR"):
                jpeg: bytes = get_frame(data.PixelData, frame, number_of_frames=self._frames)
                end = jpeg.rfind(b"\xff\xd9")  # frames are padded to an even length
                return jpeg[: end + 2] if end >= 0 else jpeg
            return _encoded(self._pixels(frame))
        except BadMember:
            raise
        except MemoryError:
            raise
        except Exception as error:  # decoders raise whatever they like, and its text may quote the header
            raise BadMember("damaged", f"frame {frame + 1} cannot be decoded ({type(error).__name__})") from error

    def _pixels(self, frame: int) -> np.ndarray:
        """uint8 [H, W, 3] in RGB."""
        from pydicom.pixels import apply_color_lut, pixel_array

        data = self._data
        rows, columns = int(data.Rows), int(data.Columns)
        if rows * columns > MAX_PIXELS:
            raise BadMember("too_many_pixels", f"{columns} x {rows} pixels, the limit is {MAX_PIXELS:,} in all")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pixels = np.asarray(pixel_array(data, index=frame))
            bits, colour = int(data.BitsStored), str(data.PhotometricInterpretation)
            if colour == "PALETTE COLOR":
                pixels = np.asarray(apply_color_lut(pixels, data))
                bits = 8 * pixels.dtype.itemsize
        if bits > 8:
            pixels = pixels >> (bits - 8)
        pixels = pixels.astype(np.uint8)
        if colour == "MONOCHROME1":
            pixels = 255 - pixels
        return np.repeat(pixels[:, :, None], 3, axis=2) if pixels.ndim == 2 else pixels


def _encoded(pixels: np.ndarray) -> bytes:
    """A bitmap, which costs nothing to write and read; PNG where that would be larger than an image may be."""
    stream = io.BytesIO()
    image = Image.fromarray(pixels)
    if pixels.nbytes < MAX_BYTES - (64 << 10):
        image.save(stream, "BMP")
    else:
        image.save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def _parse(stream: io.BytesIO, **choices: Any) -> Any:
    try:
        import pydicom
    except ImportError:
        raise DataError(
            "pydicom is not installed", expected="it, to read DICOM files", todo="pip install pydicom"
        ) from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they quote the header, where names of patients stand
        logging.getLogger("pydicom").setLevel(logging.CRITICAL)
        pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
        try:
            return pydicom.dcmread(stream, **choices)
        except MemoryError:
            raise
        except Exception as error:  # a forged header makes the parser raise anything
            raise BadMember("damaged", f"no readable DICOM header ({type(error).__name__})") from error
