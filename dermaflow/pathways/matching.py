"""Bring findings and patients together by lesion id; what has no counterpart is an error, or listed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from dermaflow import storage
from dermaflow.errors import DataError
from dermaflow.pathways.intake import SHOWN, Case, refuse
from dermaflow.schemas.finding import FINDING_SCHEMA, Finding, LesionFinding, findings_of
from dermaflow.schemas.patient import Lesion, Patient
from dermaflow.taxonomy import CODES
from dermaflow.trust.lesions import merge_lesions

NEEDED = ("image_id", "lesion_id", *(f"p_{code}" for code in CODES), "prediction", "conformal_set", "p_malignant",
          "status", "model", "model_sha256")  # fmt: skip
SUM_TOLERANCE = 0.01  # of the seven probabilities, which were written as float32

NO_PATIENT = "no patient: everything about the person and the lesion was taken as unknown"
NO_FINDING = "no finding: no picture of this lesion was scored, so there is no pathway"


class Unmatched(NamedTuple):
    """A lesion that stands on one side only."""

    patient_id: str
    lesion_id: str
    reason: str


class Matched(NamedTuple):
    """Three sequences that belong together row by row, and what could not be brought together."""

    patients: list[Patient]
    lesions: list[Lesion]
    findings: list[LesionFinding]
    unmatched: list[Unmatched]


def read_findings(path: str | Path) -> list[LesionFinding]:
    """Read the findings of a model and merge those of one lesion.

    Args:
        path: Parquet file of `FINDING_SCHEMA`, one row an image; local or s3://.

    Returns:
        One finding a lesion; an image without lesion id is a lesion of its own, under the image's id.

    Raises:
        DataError: It is no such file, is empty, an image stands twice, a finding that is ``ok`` has no probabilities
            that sum to 1, or the findings are of several models.
        StorageError: The file is not there.
    """
    try:
        table = pq.read_table(pa.BufferReader(storage.read_bytes(path)))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"no Parquet file: {error}", where=path, expected="findings in Parquet") from None
    missing = [f"no column {name}" for name in NEEDED if name not in table.column_names]
    refuse(missing, "are missing", where=path, todo="give the findings that `dermaflow` wrote, not another table")
    table = table.select([name for name in FINDING_SCHEMA.names if name in table.column_names])
    try:
        table = table.cast(pa.schema([FINDING_SCHEMA.field(name) for name in table.column_names]))
        found = findings_of(table)
    except (pa.ArrowException, ValueError) as error:
        raise DataError(f"no findings: {error}", where=path, todo="score the images again") from None
    _check(found, path)
    return merge_lesions(found)


def match(cases: Sequence[Case], findings: Sequence[LesionFinding], *, allow_unmatched: bool = False) -> Matched:
    """Bring cases and findings together by lesion id.

    Args:
        cases: One a lesion.
        findings: One a lesion.
        allow_unmatched: Go on without a counterpart. A finding without a patient gets one of whom nothing is known; a
            patient without a finding gets no pathway. Both are listed.

    Returns:
        In the order of the cases, then the findings without a patient.

    Raises:
        DataError: A side has no counterpart and that is not allowed, or nothing fits at all.
    """
    by_lesion = {finding.lesion_id: finding for finding in findings}
    known = {case.lesion.lesion_id for case in cases}
    lonely = [finding for finding in findings if finding.lesion_id not in known]
    waiting = [case for case in cases if case.lesion.lesion_id not in by_lesion]
    if not allow_unmatched and (lonely or waiting):
        raise DataError(
            _unmatched_text(lonely, waiting), where="lesion_id", expected="the same lesions in findings and patients",
            todo="correct the ids, or go on without the missing half with --allow-unmatched",
        )  # fmt: skip
    pairs = [(case, by_lesion[case.lesion.lesion_id]) for case in cases if case.lesion.lesion_id in by_lesion]
    taken = {case.patient.patient_id for case in cases}
    pairs += [(_nobody(finding.lesion_id, taken), finding) for finding in lonely]
    return Matched(
        [case.patient for case, _ in pairs],
        [case.lesion for case, _ in pairs],
        [finding for _, finding in pairs],
        [*(Unmatched(case.patient.patient_id, case.lesion.lesion_id, NO_FINDING) for case in waiting),
         *(Unmatched("", finding.lesion_id, NO_PATIENT) for finding in lonely)],
    )  # fmt: skip


def _nobody(lesion_id: str, taken: set[str]) -> Case:
    """A person of whom nothing is known, with an id that says so and belongs to nobody else."""
    patient_id = f"unknown-{lesion_id}"
    while patient_id in taken:
        patient_id += "_"
    return Case(Patient(patient_id=patient_id), Lesion(lesion_id=lesion_id))


def _unmatched_text(lonely: Sequence[LesionFinding], waiting: Sequence[Case]) -> str:
    def listed(ids: Sequence[str]) -> str:
        return ", ".join(ids[:SHOWN]) + (", …" if len(ids) > SHOWN else "")

    parts = []
    if lonely:
        parts.append(f"{len(lonely)} findings without a patient ({listed([f.lesion_id for f in lonely])})")
    if waiting:
        parts.append(f"{len(waiting)} patients without a finding ({listed([c.lesion.lesion_id for c in waiting])})")
    return " and ".join(parts)


def _check(findings: Sequence[Finding], path: object) -> None:
    if not findings:
        raise DataError("no findings", where=path, expected="at least one row", todo="score some images first")
    models = sorted({f"{finding.model} {finding.model_sha256[:12]}" for finding in findings})
    if len(models) > 1:
        raise DataError(
            f"findings of {len(models)} models: {', '.join(models[:SHOWN])}", where=path, expected="one model",
            todo="score all images with one model",
        )  # fmt: skip
    problems = []
    seen: set[str] = set()
    for finding in findings:
        if finding.image_id in seen:
            problems.append(f"image {finding.image_id} stands twice")
        seen.add(finding.image_id)
        p = [getattr(finding, f"p_{code}") for code in CODES]
        if finding.status == "ok" and (
            any(value is None or not 0 <= value <= 1 for value in p)
            or abs(sum(p) - 1) > SUM_TOLERANCE
            or finding.prediction not in CODES
            or not set(finding.conformal_set or ()) <= set(CODES)
        ):
            problems.append(f"image {finding.image_id} is ok without probabilities, prediction and set")
    refuse(problems, "cannot be used", where=path, todo="score the images again")
