"""A table of patients that also says which image shows which lesion, in a column `image_id`."""

from __future__ import annotations

import codecs
import contextlib
import csv
import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dermaflow import storage
from dermaflow.errors import DataError
from dermaflow.pathways.intake_fields import column_name

IMAGE, LESION = "image_id", "lesion_id"


def image_lesions(patients: str) -> dict[str, str]:
    """Lesion of each image; empty where the table has no column of images, or is a FHIR Bundle.

    Args:
        patients: As `dermaflow.pathways.intake.read_cases` takes them, and with the column `image_id` if need be.

    Raises:
        DataError: The table cannot be read, or an image stands at two lesions.
        StorageError: It is not there.
    """
    found: dict[str, str] = {}
    for row in table_rows(patients):
        image, lesion = row.get(IMAGE), row.get(LESION)
        if image in (None, "") or lesion in (None, ""):
            continue
        image, lesion = str(image).strip(), str(lesion).strip()
        if found.setdefault(image, lesion) != lesion:
            raise DataError(
                "an image stands at two lesions", where=patients, expected="one lesion for every image_id",
                todo="correct the table",
            )  # fmt: skip
    return found


@contextlib.contextmanager
def without_images(patients: str) -> Iterator[str]:
    """The address of the table without its column of images, and with one row a lesion, while the block runs.

    Rows that were the same but for the image become one; all others stay, so that contradictions are still found.
    """
    rows = table_rows(patients)
    if not any(IMAGE in row for row in rows):
        yield patients
        return
    kept: dict[str, dict[str, Any]] = {}
    for row in rows:
        values = {name: value for name, value in row.items() if name != IMAGE}
        kept.setdefault(json.dumps(values, sort_keys=True, default=str), values)
    with tempfile.TemporaryDirectory(prefix="dermaflow-patients-") as folder:
        place = Path(folder, "patients.jsonl")
        place.write_text("".join(json.dumps(row, default=str) + "\n" for row in kept.values()), encoding="utf-8")
        yield str(place)


def table_rows(patients: str) -> list[dict[str, Any]]:
    """Rows with the names of fields; none where the format has no columns."""
    kind = PurePosixPath(patients).suffix.lower()
    content = storage.read_bytes(patients)
    try:
        if kind in (".parquet", ".pq"):
            rows: Any = pq.read_table(pa.BufferReader(content)).to_pylist()
        elif kind in (".csv", ".tsv", ".txt"):
            text = _text(content)
            header = next((line for line in text.splitlines() if line.strip()), "")
            rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t|", key=header.count)))
        elif kind in (".jsonl", ".ndjson"):
            rows = [json.loads(line) for line in _text(content).splitlines() if line.strip()]
        else:
            rows = json.loads(_text(content))
    except (ValueError, csv.Error, pa.ArrowException, RecursionError):
        return []  # what is wrong with it is said by the one who reads the patients
    if not isinstance(rows, list):
        return []
    return [
        {column_name(name): value for name, value in row.items() if isinstance(name, str)}
        for row in rows
        if isinstance(row, dict)
    ]


def _text(content: bytes) -> str:
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16", errors="replace")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252", errors="replace")
