"""Patients in: every format, every way to write a value, and an error that helps for everything that is wrong."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dermaflow.errors import DataError, StorageError
from dermaflow.pathways.intake import Case, read_cases
from dermaflow.pathways.intake_fields import COLUMNS, FIELDS
from dermaflow.schemas.patient import Lesion, Patient

AS_OF = date(2026, 3, 1)
ROW = {"patient_id": "P1", "lesion_id": "L1"}


def read(path: Path) -> list[Case]:
    return read_cases(path, as_of=AS_OF)


def csv_file(folder: Path, text: str | bytes, name: str = "patients.csv") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def json_file(folder: Path, *rows: Any) -> Path:
    path = folder / "patients.json"
    path.write_text(json.dumps(rows))
    return path


def one(folder: Path, **values: Any) -> Case:
    [case] = read(json_file(folder, ROW | values))
    return case


def error_of(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read(path)
    return str(caught.value)


def test_fields_of_patients_and_lesions_have_different_names() -> None:
    assert len(FIELDS) == len(Patient.model_fields) + len(Lesion.model_fields)


def test_a_row_with_two_ids_knows_nothing_else(tmp_path: Path) -> None:
    assert one(tmp_path) == Case(Patient(patient_id="P1"), Lesion(lesion_id="L1"))


def test_the_columns_of_ham10000_are_understood(tmp_path: Path) -> None:
    path = csv_file(tmp_path, "lesion_id,patient_id,age,sex,localization\nHAM_1,P1,85.0,male,lower extremity\n")
    [case] = read(path)
    assert (case.patient.age, case.patient.sex, case.lesion.site) == (85, "male", "lower extremity")


TABLE = "patient_id,lesion_id,age,site,pregnant,diameter_mm\nMüller,L1,31,back,yes,6.5\n"


@pytest.mark.parametrize(
    "content",
    [
        TABLE.encode(),
        b"\xef\xbb\xbf" + TABLE.encode(),
        TABLE.encode("latin-1"),
        TABLE.encode("utf-16"),
        TABLE.replace(",", ";").replace("6.5", "6,5").encode(),
        TABLE.replace(",", "\t").replace("6.5", "6,5").encode(),
        TABLE.replace("\n", "\r\n").encode(),
        TABLE.replace("\n", "\n\n").encode() + b"   \n",
        TABLE.replace("back", '"back"').replace("patient_id", " Patient ID ").replace("yes", " YES ").encode(),
    ],
    ids=["utf-8", "bom", "latin-1", "utf-16", "semicolons", "tabs", "crlf", "blank-lines", "spaces-and-quotes"],
)
def test_a_table_reads_the_same_however_it_was_saved(tmp_path: Path, content: bytes) -> None:
    [case] = read(csv_file(tmp_path, content))
    assert (case.patient.patient_id, case.patient.age, case.patient.pregnant) == ("Müller", 31, "yes")
    assert (case.lesion.site, case.lesion.diameter_mm) == ("back", 6.5)


def test_json_lines_and_parquet_read_like_json(tmp_path: Path) -> None:
    rows = [ROW | {"age": 31, "pregnant": True, "allergies": ["peanut", "soya"], "fitzpatrick": 5},
            ROW | {"lesion_id": "L2"}]  # fmt: skip
    expected = read(json_file(tmp_path, *rows))
    assert expected[0].patient.allergies == ("peanut", "soya")
    lines = csv_file(tmp_path, "\n".join(json.dumps(row) for row in rows) + "\n\n", "patients.jsonl")
    parquet = tmp_path / "patients.parquet"
    pq.write_table(pa.Table.from_pylist(rows), parquet)
    assert read(lines) == read(parquet) == expected


def test_numbers_that_pandas_made_floats_are_ids_and_truth_values(tmp_path: Path) -> None:
    table = pd.DataFrame(
        {"patient_id": [17, 18], "lesion_id": [1.0, 2.0], "pregnant": [1.0, None], "mole_count": [12.0, None]}
    )
    table.to_parquet(tmp_path / "patients.parquet")
    first, second = read(tmp_path / "patients.parquet")
    assert (first.patient.patient_id, first.lesion.lesion_id) == ("17", "1")
    assert (first.patient.pregnant, first.patient.mole_count) == ("yes", 12)
    assert (second.patient.pregnant, second.patient.mole_count) == ("unknown", None)


@pytest.mark.parametrize("blank", ["", "unknown", "Unknown", "NA", "n/a", "null", "?", "-", None, float("nan"), []])
def test_unknown_is_always_allowed_and_never_no(tmp_path: Path, blank: Any) -> None:
    case = one(tmp_path, **{field: blank for field in COLUMNS if not field.endswith("_id") and blank != []})
    assert case == Case(Patient(patient_id="P1"), Lesion(lesion_id="L1"))
    assert one(tmp_path, allergies=blank).patient.allergies == ("unknown",)


@pytest.mark.parametrize(
    ("field", "raw", "value"),
    [
        ("pregnant", "Y", "yes"), ("pregnant", 0, "no"), ("pregnant", False, "no"), ("pregnant", "TRUE", "yes"),
        ("sex", "F", "female"), ("sex", "Male", "male"), ("fitzpatrick", "IV", 4), ("fitzpatrick", "4", 4),
        ("age", "31,5", 31.5), ("age", " 31 ", 31), ("mole_count", "12.0", 12), ("immunosuppression", "CLL", "cll"),
        ("preference", "Cure first", "cure_first"), ("allergies", "Peanut; soya", ("peanut", "soya")),
        ("allergies", "none", ("none",)), ("allergies", "peanut|unknown", ("peanut", "unknown")),
        ("implant", "none", "none"),
    ],
)  # fmt: skip
def test_a_patients_value_is_read_as_people_write_it(tmp_path: Path, field: str, raw: Any, value: Any) -> None:
    assert getattr(one(tmp_path, **{field: raw}).patient, field) == value


@pytest.mark.parametrize(
    ("field", "raw", "value"),
    [
        ("site", "Lower_Extremity", "lower extremity"), ("site", "UPPER extremity", "upper extremity"),
        ("stage", "iib", "IIB"), ("histology", "BCC nodular", "bcc_nodular"), ("red_flag", "n", "no"),
    ],
)  # fmt: skip
def test_a_lesions_value_is_read_as_people_write_it(tmp_path: Path, field: str, raw: Any, value: Any) -> None:
    assert getattr(one(tmp_path, **{field: raw}).lesion, field) == value


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"age": -3}, "age is '-3'; expected a number from 0 to 120, or unknown"),
        ({"age": "old"}, "age is 'old'; expected a number"),
        ({"age": 121}, "age is '121'"),
        ({"age": "inf"}, "age is 'inf'"),
        ({"age": True}, "age is 'True'"),
        ({"diameter_mm": 0}, "diameter_mm is '0'; expected a number above 0 up to 1000"),
        ({"fitzpatrick": 7}, "fitzpatrick is '7'; expected a whole number from 1 to 6"),
        ({"mole_count": 3.5}, "mole_count is '3.5'; expected a whole number"),
        (
            {"site": "lower extremty"},
            "site is 'lower extremty'; the nearest is 'lower extremity'; expected one of abdomen",
        ),
        ({"site": "moon"}, "site is 'moon'; expected one of"),
        ({"pregnant": "maybe"}, "pregnant is 'maybe'; expected yes, no or unknown"),
        ({"pregnant": 2}, "pregnant is '2'"),
        ({"anticoagulant": "warfarine"}, "anticoagulant is 'warfarine'; the nearest is 'warfarin'"),
        ({"histology": "melanoma"}, "histology is 'melanoma'; expected one of"),
        ({"allergies": "peanuts"}, "allergies is 'peanuts'; the nearest is 'peanut'"),
        ({"allergies": "none, soya"}, "allergies says 'none' and something else"),
        ({"allergies": {"peanut": True}}, "allergies is an object"),
        ({"age": [1, 2]}, "age holds several values"),
        ({"patient_id": ""}, "no patient_id"),
        ({"lesion_id": None}, "no lesion_id"),
        ({"patient_id": "a\x00b"}, "patient_id is no id"),
        ({"patient_id": "x" * 201}, "patient_id is no id"),
    ],
)
def test_a_wrong_value_is_named_with_its_place_and_what_was_expected(
    tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    text = error_of(json_file(tmp_path, ROW | values))
    assert f"patients.json: entry 1: {message}" in text


def test_many_wrong_values_are_counted_and_the_first_named(tmp_path: Path) -> None:
    rows = [{"patient_id": f"P{n}", "lesion_id": f"L{n}", "age": -n} for n in range(1, 9)]
    text = error_of(json_file(tmp_path, *rows))
    assert "8 entries cannot be read: entry 1: age is '-1'" in text
    assert "entry 5" in text
    assert "entry 6" not in text
    assert "and 3 more" in text


@pytest.mark.parametrize(
    ("birth", "age"),
    [
        ("1990-03-01", 36),
        ("1990-03-02", 35),
        ("1990", 35),
        ("1990-01", 36),
        ("2026-02-28", 0),
        ("1990-03-01T00:00:00Z", 36),
    ],
)
def test_a_birth_date_becomes_an_age_and_is_dropped(tmp_path: Path, birth: str, age: int) -> None:
    case = one(tmp_path, birth_date=birth)
    assert case.patient.age == age
    assert "1990" not in case.patient.model_dump_json()


def test_a_birth_date_in_parquet_is_a_date(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([ROW | {"birthDate": date(1990, 3, 2)}]), tmp_path / "patients.parquet")
    assert read(tmp_path / "patients.parquet")[0].patient.age == 35


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"birth_date": "2031-05-06"}, "birth_date lies in the future, after 2026-03-01"),
        ({"birth_date": "06.05.1931"}, "birth_date is no date like 1958-11-23"),
        ({"birth_date": "1931-02-30"}, "birth_date is no date of the calendar"),
        ({"birth_date": "1831-02-03"}, "birth_date is more than 120 years ago"),
        ({"birth_date": "1990-01-01", "age": 20}, "age contradicts the age"),
    ],
)
def test_an_impossible_birth_date_is_refused_without_repeating_it(
    tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    text = error_of(json_file(tmp_path, ROW | values))
    assert message.replace("age contradicts", "contradicts") in text
    assert str(values["birth_date"]) not in text


def test_age_and_birth_date_may_differ_by_a_birthday(tmp_path: Path) -> None:
    assert one(tmp_path, age=35, birth_date="1990-01-01").patient.age == 36


def test_an_unknown_column_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    text = error_of(csv_file(tmp_path, "patient_id,lesion_id,pregnent\nP1,L1,yes\n"))
    assert "unknown column 'pregnent'; did you mean 'pregnant'?" in text
    assert "unknown column 'xyzzy'" in error_of(json_file(tmp_path, ROW | {"xyzzy": 1}))


def test_two_columns_for_one_field_are_refused(tmp_path: Path) -> None:
    assert "two columns for site" in error_of(
        csv_file(tmp_path, "patient_id,lesion_id,site,localization\nP1,L1,back,back\n")
    )
    assert "two columns for age" in error_of(csv_file(tmp_path, "patient_id,lesion_id,age,age\nP1,L1,1,1\n"))


def test_the_two_ids_are_needed(tmp_path: Path) -> None:
    assert "no column lesion_id" in error_of(csv_file(tmp_path, "patient_id,age\nP1,3\n"))


def test_rows_of_one_patient_add_up(tmp_path: Path) -> None:
    first, second = read(
        json_file(tmp_path, ROW | {"age": 31}, ROW | {"lesion_id": "L2", "age": 31, "pregnant": "yes"})
    )
    assert first.patient == second.patient
    assert (first.patient.age, first.patient.pregnant) == (31, "yes")


def test_two_patients_with_one_id_are_refused(tmp_path: Path) -> None:
    rows = [
        ROW | {"age": 31},
        ROW | {"lesion_id": "L2", "age": 64},
        ROW | {"lesion_id": "L3", "age": 31, "sex": "male"},
    ]
    text = error_of(json_file(tmp_path, *rows))
    assert "patient 'P1': age differs between entry 1 and entry 2" in text
    assert "give two patients two ids" in text.lower()


def test_a_lesion_stands_once(tmp_path: Path) -> None:
    text = error_of(
        json_file(tmp_path, ROW, ROW, {"patient_id": "P2", "lesion_id": "L1"}, {"patient_id": "P2", "lesion_id": "L2"})
    )
    assert "lesion 'L1' in 3 rows" in text
    assert "L2" not in text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("patients.csv", b"", "no patients"),
        ("patients.csv", b"patient_id,lesion_id\n", "no patients"),
        ("patients.csv", b"patient_id,lesion_id\nP1,L1,x\n", "row 2 has 3 cells"),
        ("patients.csv", b'patient_id,lesion_id\nP1,"L1\n', "no table"),
        ("patients.csv", b"\x89PNG\r\n\x1a\n\x00\x00", "no text"),
        ("patients.json", b'[{"patient_id": "P1",}]', "no JSON"),
        ("patients.json", b'{"patient_id": "P1"}', "no list"),
        ("patients.json", b"[]", "no patients"),
        ("patients.json", b"[1]", "entry 1"),
        ("patients.json", b"[" * 100_000, "nested too deeply"),
        (
            "patients.jsonl",
            b'{"patient_id": "P1", "lesion_id": "L1"}\n{',
            "no JSON: Expecting property name enclosed in double quotes in line 2",
        ),
        ("patients.parquet", b"PAR1 or not", "no Parquet file"),
        ("patients.xlsx", b"", "files of type '.xlsx' are not read"),
        ("patients", b"", "files of type 'none' are not read"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    assert message in error_of(csv_file(tmp_path, content, name))


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        read(tmp_path / "nowhere.csv")


def test_many_rows_are_read_quickly(tmp_path: Path) -> None:
    frame = pd.DataFrame({"patient_id": [f"P{n}" for n in range(5000)], "lesion_id": [f"L{n}" for n in range(5000)],
                          "age": 50, "site": "back", "pregnant": "no"})  # fmt: skip
    frame.to_csv(tmp_path / "patients.csv", index=False)
    assert len(read(tmp_path / "patients.csv")) == 5000
