"""Patients in: one flat row per patient and lesion from CSV, JSON, JSONL or Parquet, or a FHIR Bundle.

A row may leave out every field but the two ids; what is left out is unknown. A patient with several lesions stands in
several rows, which must not contradict each other. A birth date becomes an age and goes no further.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import logging
from collections import Counter
from collections.abc import Sequence
from datetime import date
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from dermaflow import storage
from dermaflow.errors import DataError
from dermaflow.pathways.intake_fields import (
    BIRTH_DATE,
    COLUMNS,
    UNKNOWN,
    FieldReader,
    Unreadable,
    age_at,
    column_name,
    nearest,
)
from dermaflow.schemas.patient import Lesion, Patient

logger = logging.getLogger(__name__)

SHOWN = 5  # problems named in a message; the rest is counted
_TABLES, _LINES, _PARQUET = {".csv", ".tsv", ".txt"}, {".jsonl", ".ndjson"}, {".parquet", ".pq"}
IDS = ("patient_id", "lesion_id")
_DELIMITERS = ",;\t|"
_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_PATIENT = tuple(name for name in Patient.model_fields if name != "patient_id")


class Case(NamedTuple):
    """A lesion and the person it belongs to."""

    patient: Patient
    lesion: Lesion


class Row(NamedTuple):
    """A row as it was found: where, and its values by field."""

    where: str
    values: dict[str, Any]


def read_cases(path: str | Path, *, as_of: date) -> list[Case]:
    """Read patients and lesions.

    Args:
        path: ``.csv``, ``.tsv`` (any common delimiter; UTF-8 with or without BOM, UTF-16, Latin-1), ``.json`` (a list
            of objects, or a FHIR R4 or R4B Bundle), ``.jsonl``, ``.parquet``; local or s3://.
        as_of: Date at which birth dates become ages; nothing may be dated after it.

    Returns:
        One case a lesion, in the order of the file.

    Raises:
        DataError: The file cannot be read, a column or word is not known, a value is impossible, an id is missing, a
            lesion stands twice, or rows of one patient contradict each other.
        StorageError: The file is not there.
    """
    rows = _read_rows(path, as_of)
    if not rows:
        raise DataError("no patients", where=path, expected="at least one row with patient_id and lesion_id")
    return cases_of(rows, where=path, as_of=as_of)


def cases_of(rows: Sequence[Row], *, where: object, as_of: date) -> list[Case]:
    """Check rows and make cases of them; arguments, result and errors as in `read_cases`."""
    reader, problems = FieldReader(), []
    read: list[dict[str, Any]] = []
    for row in rows:
        values: dict[str, Any] = {}
        wrong = set()
        for field, raw in row.values.items():
            try:
                if field == BIRTH_DATE:
                    _add_age(values, age_at(raw, as_of))
                elif field == "age":
                    _add_age(values, reader.read(field, raw))
                elif (value := reader.read(field, raw)) is not UNKNOWN:
                    values[field] = value
            except Unreadable as error:
                wrong.add(field)
                problems.append(f"{row.where}: {field} {error}")
        problems += [f"{row.where}: no {field}" for field in IDS if field not in values and field not in wrong]
        read.append(values)
    refuse(problems, "cannot be read", where=where, todo="correct the values, or leave unknown ones empty")
    _refuse_twice([values["lesion_id"] for values in read], where)
    people = _people(rows, read, where)
    lesion_fields = Lesion.model_fields
    return [
        Case(people[values["patient_id"]], Lesion(**{k: v for k, v in values.items() if k in lesion_fields}))
        for values in read
    ]


def refuse(problems: Sequence[str], what: str, *, where: object, todo: str) -> None:
    """Raise a DataError that counts the problems and names the first ones; nothing happens without a problem."""
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        count = "" if len(problems) == 1 else f"{len(problems)} entries {what}: "
        raise DataError(count + "; ".join(problems[:SHOWN]) + more, where=where, todo=todo)


def _add_age(values: dict[str, Any], age: Any) -> None:
    """Age and birth date may both be given; they may differ by the birthday in between."""
    if age is UNKNOWN:
        return
    if age > 120:
        raise Unreadable("is more than 120 years ago")
    if abs(values.get("age", age) - age) > 1:
        raise Unreadable("contradicts the age")
    values["age"] = age


def _refuse_twice(lesions: Sequence[str], where: object) -> None:
    twice = [f"lesion {lesion!r} in {count} rows" for lesion, count in Counter(lesions).items() if count > 1]
    refuse(twice, "stand more than once", where=where, todo="keep one row a lesion; its images belong to the findings")


def _people(rows: Sequence[Row], read: Sequence[dict[str, Any]], where: object) -> dict[str, Patient]:
    """One patient an id, from all its rows: what one row knows and another does not is known."""
    known: dict[str, dict[str, tuple[Any, str]]] = {}
    problems = []
    for row, values in zip(rows, read, strict=True):
        person = known.setdefault(values["patient_id"], {})
        for field in _PATIENT:
            if field in values:
                value, place = person.setdefault(field, (values[field], row.where))
                if value != values[field]:
                    problems.append(
                        f"patient {values['patient_id']!r}: {field} differs between {place} and {row.where}"
                    )
    refuse(
        problems, "contradict each other", where=where,
        todo="give two patients two ids, or correct the rows of the one",
    )  # fmt: skip
    return {
        patient_id: Patient(patient_id=patient_id, **{field: value for field, (value, _) in facts.items()})
        for patient_id, facts in known.items()
    }


# --- formats -------------------------------------------------------------------------------------------------------


def _read_rows(path: str | Path, as_of: date) -> list[Row]:
    suffix = PurePosixPath(str(path)).suffix.lower()
    if suffix not in {".json"} | _TABLES | _LINES | _PARQUET:
        raise DataError(
            f"files of type {suffix or 'none'!r} are not read", where=path,
            expected=".csv, .tsv, .json, .jsonl or .parquet",
        )  # fmt: skip
    content = storage.read_bytes(path)
    if suffix in _PARQUET:
        return _from_parquet(content, path)
    text = _decode(content, path)
    if suffix in _TABLES:
        return _from_csv(text, path)
    if suffix in _LINES:
        lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        return _from_objects([(f"line {number}", _parse(line, path, number)) for number, line in lines], path)
    found = _parse(text, path, 1)
    if isinstance(found, dict) and "resourceType" in found:
        from dermaflow.pathways.intake_fhir import rows_from_bundle

        return rows_from_bundle(found, where=path, as_of=as_of)
    if not isinstance(found, list):
        raise DataError("no list", where=path, expected="a list of objects, one a lesion, or a FHIR Bundle")
    return _from_objects([(f"entry {number}", entry) for number, entry in enumerate(found, 1)], path)


def _decode(content: bytes, path: object) -> str:
    for mark, encoding in _MARKS:
        if content.startswith(mark):
            return content.decode(encoding, errors="replace")
    if b"\0" in content:
        raise DataError("no text", where=path, expected="text in UTF-8 or Latin-1", todo="check the file's type")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        logger.info("%s: not UTF-8, read as Latin-1", path)
        return content.decode("cp1252", errors="replace")


def _parse(text: str, path: object, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(f"no JSON: {error.msg} in line {line}, column {error.colno}", where=path) from None
    except RecursionError:
        raise DataError("no JSON: nested too deeply", where=path) from None


def _from_csv(text: str, path: object) -> list[Row]:
    lines = text.splitlines()
    header_line = next((line for line in lines if line.strip()), "")
    delimiter = max(_DELIMITERS, key=header_line.count)
    try:
        records = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise DataError(f"no table: {error}", where=path, todo="check its quotation marks") from None
    numbered = [(number, record) for number, record in enumerate(records, 1) if any(cell.strip() for cell in record)]
    if not numbered:
        return []
    (_, header), *body = numbered
    fields = _fields(header, path)
    wrong = [f"row {number} has {len(record)} cells" for number, record in body if len(record) != len(header)]
    refuse(
        wrong, "do not fit the header", where=path,
        todo=f"give every row {len(header)} cells, as the header has; put text with {delimiter!r} in quotation marks",
    )  # fmt: skip
    return [Row(f"row {number}", dict(zip(fields, record, strict=True))) for number, record in body]


def _from_parquet(content: bytes, path: object) -> list[Row]:
    try:
        table = pq.read_table(pa.BufferReader(content))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"no Parquet file: {error}", where=path) from None
    fields = _fields(table.column_names, path)
    entries = table.rename_columns(fields).to_pylist()
    return [Row(f"row {number}", entry) for number, entry in enumerate(entries, 1)]


def _from_objects(entries: Sequence[tuple[str, Any]], path: object) -> list[Row]:
    wrong = [where for where, entry in entries if not isinstance(entry, dict)]
    refuse(wrong, "are no objects", where=path, todo='write one flat object a lesion: {"patient_id": ..., ...}')
    names = dict.fromkeys(name for _, entry in entries for name in entry)
    field = dict(zip(names, _fields(list(names), path), strict=True))
    return [Row(where, {field[name]: value for name, value in entry.items()}) for where, entry in entries]


def _fields(header: Sequence[str], path: object) -> list[str]:
    """The field of every column; all of them must be known, different and hold the two ids."""
    fields = [column_name(name) for name in header]
    unknown = [
        f"unknown column {name!r}{nearest(field, COLUMNS)}"
        for name, field in zip(header, fields, strict=True)
        if field not in COLUMNS
    ]
    refuse(unknown, "are no fields", where=path, todo="rename or remove the column; see dermaflow pathways fields")
    twice = [f"two columns for {field}" for field, count in Counter(fields).items() if count > 1]
    refuse(twice, "are double", where=path, todo="keep one of them")
    missing = [f"no column {field}" for field in IDS if field not in fields]
    if header:
        refuse(missing, "are missing", where=path, todo="give every row the ids of its patient and its lesion")
    return fields
