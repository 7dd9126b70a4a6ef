"""Where each image of a source lies, so that any process can read it on its own; no pixels here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa

from dermaflow.datasets.images import MAX_BYTES
from dermaflow.errors import DataError

INPUT_SCHEMA = pa.schema(
    [
        ("uri", pa.string()),  # the file, archive or shard
        ("member", pa.string()),  # name within the archive, null for a file of its own
        ("image_id", pa.string()),
        ("lesion_id", pa.string()),
        ("bytes", pa.int64()),  # unpacked size, null where it is not known before reading
        ("offset", pa.int64()),  # tar: of the data; zip: of the local header; Parquet: row within the file
        ("packed", pa.int64()),  # zip: compressed size
        ("method", pa.int16()),  # zip: compression method
        ("crc", pa.int64()),  # zip: CRC-32 of the unpacked bytes
        ("frame", pa.int32()),  # DICOM: which frame, from 0
        ("problem", pa.string()),  # "reason: what" where it is known without reading that it cannot be used
    ]
)

NESTED = frozenset((".zip", ".tar", ".gz", ".tgz", ".zst", ".tzst", ".bz2", ".xz", ".7z", ".rar"))
"""Suffixes of archives. One inside another is not opened: bombs hide there, and nobody sees how deep it goes."""
LITTER = frozenset((".ds_store", "thumbs.db", "desktop.ini", "dicomdir"))
"""Files that systems leave beside images (DICOMDIR is the index of a DICOM medium); they are counted, not scored."""


@dataclass(frozen=True)
class Limits:
    """What is accepted of an archive or a folder; what goes beyond is a row with a reason.

    Attributes:
        members: Entries listed. Ten million are fifty times the largest archives of dermoscopy; a list of them is about
            a gigabyte.
        image_bytes: Largest encoded image, that of `dermaflow.datasets.images`.
        dicom_bytes: Largest DICOM file: it is held in memory whole, and 512 MiB are some hundred uncompressed frames.
        total_bytes: All of an archive, unpacked: 1 TiB, or ten million JPEGs of 100 kB.
        ratio: Unpacked over packed bytes, from 1 MiB on. Photographs pack to no less than a twentieth; Deflate at its
            utmost, which only a bomb reaches, to a thousandth.
    """

    members: int = 10_000_000
    image_bytes: int = MAX_BYTES
    dicom_bytes: int = 512 << 20
    total_bytes: int = 1 << 40
    ratio: float = 200.0


LIMITS = Limits()
FREE_BYTES = 1 << 20
"""Up to this size the ratio is not looked at: an empty picture packs well, too."""


class BadMember(DataError):
    """An input that cannot be used; `reason` is a short code for tables."""

    def __init__(self, reason: str, what: str, *, where: object = None) -> None:
        super().__init__(what, where=where)
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (self.reason, self.what, self.where)

    @property
    def problem(self) -> str:
        """As it stands in a finding's `reason`."""
        return f"{self.reason}: {self.what}"


def _rebuild(reason: str, what: str, where: object) -> BadMember:
    return BadMember(reason, what, where=where)


@dataclass(frozen=True, slots=True)
class Reference:
    """One input. `path` is its name within the source; the other fields are the columns of `INPUT_SCHEMA`."""

    uri: str
    path: str
    member: str | None = None
    image_id: str | None = None
    lesion_id: str | None = None
    bytes: int | None = None
    offset: int | None = None
    packed: int | None = None
    method: int | None = None
    crc: int | None = None
    frame: int | None = None
    problem: str | None = None

    def but(self, **changes: Any) -> Reference:
        """The same with some fields changed."""
        return dataclasses.replace(self, **changes)


class Source(NamedTuple):
    """What a source is.

    Attributes:
        uri: Absolute path or s3:// address.
        kind: folder, shards, zip, tar, packed_tar, csv or file.
    """

    uri: str
    kind: str


def is_litter(path: str) -> bool:
    """Whether a file was left there by a system and not by a person."""
    parts = path.split("/")
    return parts[-1].lower() in LITTER or parts[-1].startswith("._") or "__MACOSX" in parts[:-1]


def unsafe(path: str) -> str | None:
    """What is wrong with the name of a member, None if nothing is. Nothing is ever written under such a name, but
    others may do so with what is handed on."""
    if "\0" in path:
        return "unsafe_path: the name holds a zero byte"
    if path.startswith(("/", "\\")) or (path[1:2] == ":" and path[0].isalpha()):
        return "unsafe_path: an absolute path"
    if ".." in path and ".." in path.replace("\\", "/").split("/"):
        return "unsafe_path: the path leaves the archive"
    return None


def suffix(path: str) -> str:
    """The suffix in lower case; a name that begins with a dot has none."""
    name = path.rpartition("/")[2]  # not by pathlib, which takes a third of the time of a listing
    stem, dot, end = name.rpartition(".")
    return (dot + end).lower() if stem.strip(".") and end else ""


def may_be_dicom(path: str) -> bool:
    """Whether the name is one that DICOM files have: .dcm, .dicom, none, or the last numbers of a UID."""
    return suffix(path) in ("", ".dcm", ".dicom", ".ima") or suffix(path)[1:].isdigit()


def size_problem(path: str, size: int, limits: Limits) -> str | None:
    """What is wrong with the size of an input, None if nothing is."""
    if size == 0:
        return "empty: no bytes"
    most = limits.dicom_bytes if may_be_dicom(path) else limits.image_bytes
    return f"too_many_bytes: {size:,} bytes, the limit is {most:,}" if size > most else None


def nested_problem(path: str) -> str | None:
    """Set where an input is an archive itself."""
    if suffix(path) in NESTED:
        return "nested_archive: an archive within the source is not opened; score it on its own"
    return None
