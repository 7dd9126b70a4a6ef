"""Bad images are refused with a reason, good ones of every kind are read as they are."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
import zlib

import numpy as np
import pytest
import simplejpeg
from PIL import Image
from tiny_data import encode, noise

from dermaflow.datasets import images
from dermaflow.datasets.images import MAX_PIXELS, ImageProblem, decode, inspect_image
from dermaflow.storage import sha256

RGB = noise(0)
BOMB_SIDE = 20_000


def png(width: int, height: int, depth: int, colour: int, body: bytes) -> bytes:
    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    chunks = [(b"IHDR", size + bytes([depth, colour, 0, 0, 0])), (b"IDAT", body), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big") for name, data in chunks
    )


def bomb() -> bytes:
    """A whole, valid PNG of 20,000 x 20,000 black pixels: 50 kB that decode to 1.2 GB."""
    packer = zlib.compressobj(9)
    row = bytes(1 + BOMB_SIDE // 8)
    return png(BOMB_SIDE, BOMB_SIDE, 1, 0, b"".join(packer.compress(row) for _ in range(BOMB_SIDE)) + packer.flush())


def jpeg_that_claims(width: int, height: int) -> bytes:
    data = bytearray(encode(RGB))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    return bytes(data)


PNG = encode(RGB, "PNG")
JPEG = encode(RGB, quality=95)
BAD = {
    "no bytes": (b"", "empty"),
    "text": (b"image_id,dx\n", "not_an_image"),
    "a GIF, which no camera writes": (encode(RGB, "GIF"), "not_an_image"),
    "PNG signature alone": (PNG[:8], "not_an_image"),
    "PNG cut in the middle": (PNG[: len(PNG) // 2], "truncated"),
    "JPEG marker alone": (JPEG[:3], "truncated"),
    "JPEG cut in its header": (JPEG[:300], "truncated"),
    "JPEG cut in the middle": (JPEG[: len(JPEG) * 3 // 4], "truncated"),
    "JPEG without its last bytes": (JPEG[:-20], "truncated"),
    "JPEG without its end marker": (JPEG[:-2], "truncated"),
    "text after a JPEG marker": (b"\xff\xd8\xff" + b"text" * 50, "truncated"),
    "JPEG of too many pixels": (jpeg_that_claims(30_000, 30_000), "too_many_pixels"),
    "PNG of more pixels than ours but not Pillow's limit": (png(9000, 8000, 8, 2, b""), "too_many_pixels"),
    "PNG of more pixels than Pillow warns of": (png(10_000, 10_000, 8, 2, b""), "too_many_pixels"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("data", "reason"), BAD.values(), ids=BAD.keys())
def test_a_bad_image_is_refused_with_its_reason(data: bytes, reason: str) -> None:
    for action in (inspect_image, lambda data: decode(data, 24, 32)):
        with pytest.raises(ImageProblem) as raised:
            action(data)
        assert raised.value.reason == reason
        assert "0x" not in str(raised.value), "an address differs from run to run"


def test_too_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_BYTES", len(JPEG) - 1)
    with pytest.raises(ImageProblem, match=f"more than {len(JPEG) - 1} bytes") as raised:
        inspect_image(JPEG)
    assert raised.value.reason == "too_many_bytes"


def test_a_decompression_bomb_is_refused_before_it_is_decoded() -> None:
    """Measured by the memory of a process of its own; decoded, the bomb takes at least 50 MB at 1 bit a pixel."""
    code = """
import resource, sys
from dermaflow.datasets.images import ImageProblem, inspect_image
from dermaflow.preparation.transforms import pixels
data = sys.stdin.buffer.read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for action in (inspect_image, lambda data: pixels(data, 144, 192)):
    try:
        action(data)
    except ImageProblem as problem:
        print(problem.reason, problem.what)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    data = bomb()
    assert len(data) < 100_000
    run = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=True)
    *refusals, growth = run.stdout.decode().splitlines()
    assert len(refusals) == 2 and all(line.startswith("too_many_pixels") for line in refusals)
    assert int(growth) < 20_000, "kB"


def test_a_problem_survives_the_way_between_processes() -> None:
    problem = pickle.loads(pickle.dumps(ImageProblem("truncated", "cut short", where="a.jpg")))  # noqa: S301
    assert (problem.reason, problem.what, problem.where) == ("truncated", "cut short", "a.jpg")
    assert str(problem) == "a.jpg: cut short"


def test_facts() -> None:
    assert inspect_image(JPEG) == (64, 48, "JPEG", sha256(JPEG))
    assert inspect_image(PNG) == (64, 48, "PNG", sha256(PNG))
    assert inspect_image(encode(RGB[:3, :5]))[:2] == (5, 3)
    assert inspect_image(JPEG + b"junk after the end")[:3] == (64, 48, "JPEG")


def test_the_content_decides_and_nothing_is_lost_in_lossless_formats() -> None:
    for kind in ("PNG", "BMP"):
        np.testing.assert_array_equal(decode(encode(RGB, kind), 8, 8), RGB)
    np.testing.assert_array_equal(decode(encode(RGB, "WEBP", lossless=True), 8, 8), RGB)


def test_colour_spaces_other_than_rgb() -> None:
    grey = RGB.mean(axis=2).astype(np.uint8)
    as_rgb = np.repeat(grey[:, :, None], 3, axis=2)
    np.testing.assert_array_equal(decode(encode(grey, "PNG"), 8, 8), as_rgb)
    assert np.abs(decode(encode(grey, quality=95), 48, 64).astype(int) - as_rgb).max() <= 6
    cmyk = encode(Image.fromarray(RGB).convert("CMYK"), quality=95)
    assert inspect_image(cmyk).format == "JPEG"
    assert np.abs(decode(cmyk, 48, 64).astype(int) - RGB).max() <= 8
    transparent = np.dstack([RGB, np.full((48, 64), 128, np.uint8)])
    np.testing.assert_array_equal(decode(encode(transparent, "PNG"), 8, 8), RGB)
    palette = Image.fromarray(RGB).quantize(64)
    np.testing.assert_array_equal(decode(encode(palette, "PNG"), 8, 8), np.asarray(palette.convert("RGB")))


def test_sixteen_bits_keep_their_scale() -> None:
    deep = np.linspace(0, 65535, 48 * 64).reshape(48, 64).astype(np.uint16)
    found = decode(encode(Image.fromarray(deep), "PNG"), 8, 8)
    np.testing.assert_array_equal(found, np.repeat((deep >> 8).astype(np.uint8)[:, :, None], 3, axis=2))


def test_where_libjpeg_is_too_strict_pillow_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    flawed = JPEG[:-2] + b"junk" + JPEG[-2:]
    with pytest.raises(ValueError, match="extraneous bytes"):
        simplejpeg.decode_jpeg(flawed)
    assert inspect_image(flawed)[:3] == (64, 48, "JPEG")
    np.testing.assert_array_equal(decode(flawed, 48, 64), np.asarray(Image.open(io.BytesIO(JPEG))))

    def refuse(*args: object, **kwargs: object) -> None:  # Pillow cannot write the chroma formats that bring this about
        raise ValueError("Could not determine subsampling level of JPEG image")

    monkeypatch.setattr(simplejpeg, "decode_jpeg_header", refuse)
    monkeypatch.setattr(simplejpeg, "decode_jpeg", refuse)
    assert inspect_image(JPEG)[:3] == (64, 48, "JPEG")
    np.testing.assert_array_equal(decode(JPEG, 48, 64), np.asarray(Image.open(io.BytesIO(JPEG))))
    with pytest.raises(ImageProblem, match=r"900000000 pixels") as raised:
        decode(jpeg_that_claims(30_000, 30_000), 24, 32)
    assert raised.value.reason == "too_many_pixels"


def test_a_jpeg_is_decoded_at_the_smallest_size_that_covers() -> None:
    data = encode(noise(1, 450, 600), quality=95)
    assert decode(data, 450, 600).shape == (450, 600, 3)
    assert decode(data, 144, 192).shape == (169, 225, 3)  # 3/8
    assert decode(data, 24, 32).shape == (57, 75, 3)  # 1/8
    assert decode(data, 24, 500).shape == (394, 525, 3)  # 7/8, for the width
    assert decode(data, 900, 1200).shape == (450, 600, 3)  # never enlarged


def test_the_limit_holds_the_largest_cameras() -> None:
    assert 45_000_000 < MAX_PIXELS < BOMB_SIDE**2
