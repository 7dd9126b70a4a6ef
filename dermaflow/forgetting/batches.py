"""A finished batch of the service: its run, and what was uploaded for it.

A .zip keeps its length: the bytes of a member and its name are overwritten where they lie, so that the other images of
the batch are still found at their places. Images of their own are deleted. Any other upload goes as a whole.
"""

from __future__ import annotations

import csv
import io
import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dermaflow import storage
from dermaflow.errors import DataError
from dermaflow.forgetting.places import Ids, Link
from dermaflow.forgetting.scored import ScoredRun
from dermaflow.scoring.plan import SUMMARY

UPLOAD, OUT = "upload", "out"
_LOCAL, _CENTRAL = 30, 46  # bytes of the headers of a .zip before the name


def find_batches(state: Path) -> tuple[list[Path], list[Path]]:
    """Folders of the finished batches of a service, and of the others.

    Raises:
        DataError: It is no state folder.
    """
    if not (state / "batches").is_dir():
        raise DataError("no batches", where=state, expected="the state folder of dermaflow serve")
    folders = sorted(path for path in (state / "batches").iterdir() if path.is_dir())
    done = [path for path in folders if (path / OUT / SUMMARY).exists()]
    return done, [path for path in folders if path not in done]


class Batch:
    """One finished batch."""

    def __init__(self, folder: Path, pseudonym: Callable[[str], str], by: str) -> None:
        self.name = str(folder)
        self._upload = folder / UPLOAD
        self._run = ScoredRun(str(folder / OUT), pseudonym, by)

    def links(self) -> list[Link]:
        return self._run.links() + [link for path in self._tables() for link in _links(path)]

    def _tables(self) -> list[Path]:
        return sorted(self._upload.glob("patients.*"))

    def holds(self, ids: Ids) -> dict[str, int]:
        counts = self._run.holds(ids)
        uploaded = {str(row["uri"]) for row in self._run.inputs(ids) if self._own(str(row["uri"]))}
        counts["uploads"] = sum(Path(uri).exists() for uri in uploaded)
        counts["rows of patients"] = sum(len(_keep(path, ids)[1]) for path in self._tables())
        return {kind: count for kind, count in counts.items() if count}

    def _own(self, uri: str) -> bool:
        return not storage.is_remote(uri) and Path(uri).is_relative_to(self._upload)

    def remove(self, ids: Ids) -> None:
        """Uploads first: the run still says where the images lie in them."""
        archives: dict[Path, set[int]] = {}
        for row in self._run.inputs(ids):
            path = Path(str(row["uri"]))
            if not self._own(str(path)) or not path.exists():
                continue
            if row["member"] is not None and path.suffix.lower() == ".zip" and row["offset"] is not None:
                archives.setdefault(path, set()).add(int(str(row["offset"])))
            else:
                path.unlink()
        for path, offsets in archives.items():
            blank_members(path, offsets)
        # what came packed was unpacked for the run only, and its members have no place that is kept
        if self._run.inputs(ids):
            for path in [*self._upload.glob("archive.tar.*"), *self._upload.glob("archive.t[gz]*")]:
                path.unlink(missing_ok=True)
        for path in self._tables():
            kept, gone = _keep(path, ids)
            if gone:
                path.unlink() if kept is None else storage.write_bytes(path, kept)
        self._run.remove(ids)


def blank_members(path: Path, offsets: set[int]) -> None:
    """Overwrite members of a .zip with zeros, names and bytes; the places of all others stay.

    Args:
        path: The archive.
        offsets: Of the local headers.
    """
    with zipfile.ZipFile(path) as archive:
        members = {info.header_offset: info for info in archive.infolist()}
        directory = archive.start_dir
    with path.open("r+b") as file:
        for offset in sorted(offsets & members.keys()):
            file.seek(offset + 26)
            name, extra = struct.unpack("<HH", file.read(4))
            size = members[offset].compress_size
            file.seek(offset + _LOCAL)
            file.write(bytes(name))
            file.seek(offset + _LOCAL + name + extra)
            while size > 0:
                size -= file.write(bytes(min(size, 1 << 20)))
        at = directory
        for info in members.values():  # in the order of the directory
            file.seek(at)
            header = file.read(_CENTRAL)
            name, extra, comment = struct.unpack_from("<HHH", header, 28)
            if info.header_offset in offsets:
                file.seek(at + _CENTRAL)
                file.write(bytes(name))
            at += _CENTRAL + name + extra + comment
        file.flush()
        os.fsync(file.fileno())


# --- tables of patients --------------------------------------------------------------------------------------------


def _links(path: Path) -> list[Link]:
    return [Link(row.get("patient_id"), row.get("lesion_id"), row.get("image_id")) for row in _rows(path) or ()]


def _rows(path: Path) -> list[dict[str, Any]] | None:
    """Rows of a table with columns; None for any other, such as a FHIR Bundle."""
    from dermaflow.scoring.patients import table_rows

    return table_rows(str(path)) or None


def _keep(path: Path, ids: Ids) -> tuple[bytes | None, list[object]]:
    """What stays of a table, and the rows that go; None where it cannot be told apart and goes as a whole."""
    wanted = ids.patients | ids.lesions | ids.images

    def named(row: dict[str, Any]) -> bool:
        return (
            str(row.get("patient_id")) in ids.patients
            or str(row.get("lesion_id")) in ids.lesions
            or str(row.get("image_id")) in ids.images
        )

    rows = _rows(path)
    if rows is None:
        text = path.read_text(encoding="utf-8", errors="replace")
        gone: list[object] = [name for name in sorted(wanted) if f'"{name}"' in text or f'/{name}"' in text]
        return None, gone
    out = [row for row in rows if named(row)]
    kept = [row for row in rows if not named(row)]
    suffix = path.suffix.lower()
    if not kept:
        return None, list(out)
    if suffix in (".parquet", ".pq"):
        stream = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(kept), stream)
        return stream.getvalue(), list(out)
    if suffix in (".jsonl", ".ndjson"):
        return "".join(json.dumps(row, default=str) + "\n" for row in kept).encode(), list(out)
    if suffix == ".json":
        return json.dumps(kept, default=str).encode(), list(out)
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, list(dict.fromkeys(name for row in rows for name in row)),
                            delimiter="\t" if suffix == ".tsv" else ",")  # fmt: skip
    writer.writeheader()
    writer.writerows(kept)
    return table.getvalue().encode(), list(out)
