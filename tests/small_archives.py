"""Small archives with everything in them that an archive can do, DICOM files, and a bundle that scores."""

from __future__ import annotations

import functools
import io
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tiny_bundle import a_bundle, a_calibration
from tiny_data import noise

from dermaflow.bundles.bundle import save_bundle
from dermaflow.learning.backbones import BackboneConfig, build

DERMOSCOPY = "1.2.840.10008.5.1.4.1.1.77.1.7"


def jpeg(seed: int) -> bytes:
    """A JPEG of 64 x 48 pixels."""
    stream = io.BytesIO()
    Image.fromarray(noise(seed)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


@functools.cache
def lesion_jpegs(count: int = 12) -> tuple[bytes, ...]:
    """Drawn lesions of 200 x 150 pixels, good enough for the gate."""
    import tempfile

    from dermaflow.datasets.synthetic.generate import generate

    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder, "data"), count, 3, height=150, width=200)
        return tuple(path.read_bytes() for path in sorted(Path(folder, "data").glob("*/*.jpg")))


def scoring_bundle(path: Path, name: str = "tiny", seed: int = 0) -> Path:
    """An untrained network, calibrated by hand: what it says is worth nothing, that it says something is enough."""
    torch.manual_seed(seed)
    network = build(BackboneConfig(name="seed_cnn"))
    save_bundle(path, a_bundle(a_calibration(ood=False), name=name), network.state_dict(), None, "# Card\n")
    return path


def hostile_zip(path: Path) -> dict[str, str | None]:
    """Write a zip; returns what is to be said of each member, by name: the code of the reason, None for an image."""
    said: dict[str, str | None] = {}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:

        def add(name: str, data: bytes, reason: str | None, mode: int = 0o100644) -> None:
            info = zipfile.ZipInfo(name)
            info.create_system, info.external_attr = 3, mode << 16
            archive.writestr(info, data, zipfile.ZIP_DEFLATED)
            said[name] = reason

        add("good/a.jpg", jpeg(1), None)
        add("good/b.jpg", jpeg(2), None)
        add("zero.jpg", b"", "empty")
        add("text.jpg", b"no image at all", "not_an_image")
        add("cut.jpg", jpeg(3)[:-400], "truncated")
        add("polyglot.jpg", jpeg(4) + b"PK\3\4<script>alert(1)</script>", None)
        add("script.html", b"<script>alert(1)</script>" * 4, "not_an_image")
        add("bomb.jpg", bytes(3 << 20), "compression_ratio")
        add("inner.zip", b"PK\5\6" + bytes(18), "nested_archive")
        add("../../etc/passwd", b"root", "unsafe_path")
        add("/etc/shadow", b"root", "unsafe_path")
        add("C:\\windows\\a.jpg".replace("\\", "/"), b"x", "unsafe_path")
        add("link.jpg", b"/etc/passwd", "link", 0o120777)
        add("secret.jpg", jpeg(5), "encrypted")
        add("liar.jpg", jpeg(6), "damaged")
        add("crc.jpg", jpeg(7), "damaged")
    data = bytearray(path.read_bytes())
    _change(data, b"secret.jpg", 8, "<H", lambda flags: flags | 1)
    _change(data, b"liar.jpg", 24, "<L", lambda size: size - 50)
    _change(data, b"crc.jpg", 16, "<L", lambda crc: crc ^ 1)
    path.write_bytes(data)
    return said


def _change(data: bytearray, name: bytes, offset: int, form: str, change: Any) -> None:
    """Change a field of a member's entry in the directory."""
    at = data.rfind(name) - 46
    struct.pack_into(form, data, at + offset, change(struct.unpack_from(form, data, at + offset)[0]))


def hostile_tar(path: Path, mode: str = "w") -> dict[str, str | None]:
    """The same as a tar."""
    said: dict[str, str | None] = {}
    with tarfile.open(path, mode) as archive:

        def add(name: str, data: bytes, reason: str | None, kind: bytes = tarfile.REGTYPE) -> None:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname = kind, len(data), "/etc/passwd"
            archive.addfile(info, io.BytesIO(data))
            said[name] = reason

        add("good/a.jpg", jpeg(1), None)
        add("zero.jpg", b"", "empty")
        add("../up.jpg", jpeg(2), "unsafe_path")
        add("link.jpg", b"", "link", tarfile.SYMTYPE)
        add("hard.jpg", b"", "link", tarfile.LNKTYPE)
        add("device", b"", "not_a_file", tarfile.CHRTYPE)
        add("pipe", b"", "not_a_file", tarfile.FIFOTYPE)
        add("inner.tar.gz", b"\x1f\x8b", "nested_archive")
        add("text.jpg", b"no image", "not_an_image")
        add("good/b.jpg", jpeg(3), None)
    return said


def dicom_file(
    path: Path, frames: int = 1, *, encoded: bool = False, kind: str = DERMOSCOPY, **fields: Any
) -> list[np.ndarray]:
    """Write a photograph; returns the pixels of its frames, uint8 [48, 64, 3]."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.encaps import encapsulate
    from pydicom.uid import ExplicitVRLittleEndian, JPEGBaseline8Bit, generate_uid

    pixels = [noise(seed) for seed in range(frames)]
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = kind, generate_uid()
    meta.TransferSyntaxUID = JPEGBaseline8Bit if encoded else ExplicitVRLittleEndian
    data = FileDataset(str(path), {}, file_meta=meta, preamble=bytes(128))
    data.SOPClassUID, data.SOPInstanceUID = kind, meta.MediaStorageSOPInstanceUID
    data.PatientName, data.Modality = "Doe^Jane", "DMS"
    data.Rows, data.Columns, data.SamplesPerPixel, data.PlanarConfiguration = 48, 64, 3, 0
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 8, 8, 7, 0
    data.PhotometricInterpretation = "YBR_FULL_422" if encoded else "RGB"
    if frames > 1:
        data.NumberOfFrames = frames
    data.PixelData = encapsulate([jpeg(seed) for seed in range(frames)]) if encoded else np.stack(pixels).tobytes()
    for name, value in fields.items():
        setattr(data, name, value)
    data.save_as(path, enforce_file_format=True)
    return pixels
