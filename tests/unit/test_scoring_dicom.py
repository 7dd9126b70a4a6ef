"""Photographs in DICOM: every frame an image, with its own pixels; what is none, or shows who it is, is refused."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_archives import dicom_file, jpeg
from tiny_data import noise

pytest.importorskip("pydicom")

from dermaflow.datasets.images import decode
from dermaflow.scoring.dicom import DicomFile, frame_count
from dermaflow.scoring.reading import Reader
from dermaflow.scoring.references import LIMITS, BadMember
from dermaflow.scoring.sources import identify, list_inputs


def read(source: Path) -> list[tuple[str, bytes | BadMember]]:
    """Path within the source and content of every input."""
    references = [r for r in list_inputs(identify(str(source))) if r is not None]
    with Reader(LIMITS) as reader:
        return [(row.path, content) for chunk in reader.chunks(references) for row, content in chunk]


def reason(path: Path) -> str:
    [(_, content)] = read(path)
    assert isinstance(content, BadMember)
    return content.problem


def test_uncompressed_frames_keep_their_pixels(tmp_path: Path) -> None:
    pixels = dicom_file(tmp_path / "a.dcm", 3)
    found = read(tmp_path / "a.dcm")
    assert [path for path, _ in found] == ["a.dcm:1", "a.dcm:2", "a.dcm:3"]
    for (_, content), frame in zip(found, pixels, strict=True):
        assert isinstance(content, bytes)
        np.testing.assert_array_equal(decode(content, 48, 64), frame)


def test_jpeg_frames_are_handed_on_as_they_stand(tmp_path: Path) -> None:
    dicom_file(tmp_path / "a.dcm", 2, encoded=True)
    assert [content for _, content in read(tmp_path / "a.dcm")] == [jpeg(0), jpeg(1)]


def test_jpeg_in_rgb_keeps_its_colours(tmp_path: Path) -> None:
    """libjpeg takes three unmarked components for YCbCr; the header knows better."""
    from pydicom.encaps import encapsulate

    pixels, stream = noise(0), io.BytesIO()
    Image.frombytes("YCbCr", (64, 48), pixels.tobytes()).save(stream, "JPEG", quality=98, subsampling=0)
    marked = stream.getvalue()
    unmarked = marked[:2] + marked[20:]  # without its JFIF header: nothing in it says that it is red, green and blue
    dicom_file(tmp_path / "a.dcm", encoded=True, PixelData=encapsulate([unmarked]), PhotometricInterpretation="RGB")
    [(_, content)] = read(tmp_path / "a.dcm")
    assert isinstance(content, bytes)
    assert np.abs(decode(content, 48, 64).astype(int) - pixels).mean() < 3


def test_planes_greys_and_deep_pixels(tmp_path: Path) -> None:
    pixels = noise(0)
    dicom_file(
        tmp_path / "planes.dcm",
        PlanarConfiguration=1,
        PixelData=np.ascontiguousarray(pixels.transpose(2, 0, 1)).tobytes(),
    )
    grey = {"SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2"}
    dicom_file(tmp_path / "grey.dcm", PixelData=pixels[:, :, 0].tobytes(), **grey)
    dicom_file(
        tmp_path / "grey12.dcm", PixelData=(pixels[:, :, 0].astype("<u2") << 4).tobytes(),
        BitsAllocated=16, BitsStored=12, HighBit=11, **grey,
    )  # fmt: skip
    dicom_file(
        tmp_path / "inverse.dcm",
        PixelData=(255 - pixels[:, :, 0]).tobytes(),
        **(grey | {"PhotometricInterpretation": "MONOCHROME1"}),
    )
    red = np.repeat(pixels[:, :, :1], 3, axis=2)
    for path, content in read(tmp_path):
        assert isinstance(content, bytes), (path, content)
        np.testing.assert_array_equal(decode(content, 48, 64), pixels if path == "planes.dcm" else red, err_msg=path)


def test_refused(tmp_path: Path) -> None:
    dicom_file(tmp_path / "face.dcm", RecognizableVisualFeatures="YES")
    assert reason(tmp_path / "face.dcm").startswith("recognizable:")
    dicom_file(tmp_path / "ct.dcm", kind="1.2.840.10008.5.1.4.1.1.2")
    assert reason(tmp_path / "ct.dcm") == "not_a_photograph: DICOM class CT Image Storage"
    dicom_file(tmp_path / "private.dcm", kind="1.2.3.4.5")
    assert reason(tmp_path / "private.dcm") == "not_a_photograph: DICOM class unknown"
    dicom_file(tmp_path / "huge.dcm", Rows=60_000, Columns=60_000)
    assert reason(tmp_path / "huge.dcm").startswith("too_many_pixels:")
    dicom_file(tmp_path / "film.dcm", NumberOfFrames=2_000_000_000)
    assert reason(tmp_path / "film.dcm").startswith("too_many_frames:")
    (tmp_path / "text.dcm").write_bytes(b"text" * 100)
    assert reason(tmp_path / "text.dcm").startswith("not_dicom:")
    dicom_file(tmp_path / "whole.dcm", 2)
    whole = (tmp_path / "whole.dcm").read_bytes()
    (tmp_path / "cut.dcm").write_bytes(whole[:-6000])
    found = [content for _, content in read(tmp_path / "cut.dcm")]
    assert len(found) == 2 and isinstance(found[-1], BadMember) and found[-1].reason == "damaged"
    deflated = whole.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99")
    with pytest.raises(BadMember, match="deflated"):
        frame_count(deflated)


def test_forged_headers_never_raise_anything_else(tmp_path: Path) -> None:
    dicom_file(tmp_path / "a.dcm", 2, encoded=True)
    whole = (tmp_path / "a.dcm").read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(150):
        data = bytearray(whole)
        for at in rng.integers(132, 900, 3):
            data[at] = int(rng.integers(256))
        try:
            file = DicomFile(bytes(data))
            file.image(0)
            file.image(1)
        except BadMember as error:
            assert "Jane" not in error.problem


def test_files_without_a_suffix_and_in_archives(tmp_path: Path) -> None:
    folder = tmp_path / "medium"
    folder.mkdir()
    dicom_file(folder / "IM000001", 2)
    dicom_file(folder / "1.2.840.113619.2", encoded=True)
    (folder / "picture").write_bytes(jpeg(5))
    (folder / "DICOMDIR").write_bytes(b"index")
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.iterdir()):
            archive.write(path, f"S1/{path.name}")
    expected = ["1.2.840.113619.2", "IM000001:1", "IM000001:2", "picture"]
    assert [path for path, _ in read(folder)] == expected
    assert all(isinstance(content, bytes) for _, content in read(folder))
    packed = read(tmp_path / "a.zip")
    assert [path for path, _ in packed] == [f"S1/{name}" for name in expected]
    assert [content for _, content in packed] == [content for _, content in read(folder)]
