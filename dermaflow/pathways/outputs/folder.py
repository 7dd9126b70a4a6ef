"""The folder of a run: pathways and their inputs, tables, FHIR bundles and pages, and how a sign-off changes them.

``pathways.jsonl`` and ``pathways.parquet`` hold one lesion a row, ``cases.jsonl`` what was known of each, ``run.json``
when and from what it was made, ``fhir/`` and ``patients/`` one file a person, ``index.html`` all lesions, most urgent
first, ``unmatched.csv`` what had no counterpart, and ``audit.jsonl`` every sign-off (`dermaflow.pathways.signoff`).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from dermaflow import storage
from dermaflow.errors import SignOffError, StorageError
from dermaflow.pathways.intake import Case
from dermaflow.pathways.matching import Unmatched
from dermaflow.pathways.outputs.fhir import patient_bundle
from dermaflow.pathways.outputs.identity import file_name
from dermaflow.pathways.outputs.page import index_page, page_name, patient_page
from dermaflow.pathways.signoff import Entry, apply_sign_offs, open_log, outdated
from dermaflow.schemas.pathway import Pathway
from dermaflow.schemas.patient import Lesion, Patient

PATHWAYS, TABLE, CASES, RUN = "pathways.jsonl", "pathways.parquet", "cases.jsonl", "run.json"
UNMATCHED, FHIR, PAGES, INDEX = "unmatched.csv", "fhir", "patients", "index.html"
FORMATS = ("json", "fhir", "html")
Progress = Callable[[str, int, int], None]


class Run(BaseModel):
    """When and from what a folder was made."""

    model_config = ConfigDict(extra="forbid")

    recorded: datetime
    as_of: str
    findings_sha256: str
    patients_sha256: str


def write_folder(
    out: Path,
    pathways: Sequence[Pathway],
    cases: Sequence[Case],
    table: pa.Table,
    run: Run,
    *,
    unmatched: Sequence[Unmatched] = (),
    formats: Iterable[str] = FORMATS,
    progress: Progress | None = None,
) -> list[Pathway]:
    """Write everything; what an earlier run left there is replaced, sign-offs stay and hold where nothing changed.

    Args:
        out: Folder; made if it is not there.
        pathways: [N]
        cases: [N], what each was made from.
        table: [N] rows, see `Recommendations.table`.
        run: When and from what.
        unmatched: What had no counterpart.
        formats: Of `FORMATS`; JSON and the table are written always, because a sign-off needs them.
        progress: Called with step, done and total.

    Returns:
        Pathways that an earlier sign-off does not hold for any more, because they changed.

    Raises:
        SignOffError: The log of sign-offs was tampered with; nothing is written then.
        StorageError: A file could not be written.
    """
    if out.exists() and not out.is_dir():
        raise StorageError("is a file", where=out, expected="a folder to write", todo="choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    with open_log(out) as log:
        signed = apply_sign_offs(pathways, log.entries)
        written = _Folder(out, signed, cases, run)
        for name, wanted in ((FHIR, "fhir" in formats), (PAGES, "html" in formats)):
            if wanted:
                written.write_people(name, progress)
            else:
                storage.delete(out / name)
        if "html" in formats:
            written.write_index()
        else:
            storage.delete(out / INDEX)
        if unmatched:
            storage.write_bytes(out / UNMATCHED, _unmatched_csv(unmatched))
        else:
            storage.delete(out / UNMATCHED)
        storage.write_bytes(out / CASES, _lines([_Input(patient=c.patient, lesion=c.lesion) for c in cases]))
        storage.write_bytes(out / RUN, run.model_dump_json(indent=1).encode())
        written.write_pathways(table)
        return outdated(signed, log.entries)


def sign_folder(
    out: Path, lesion_id: str, *, by: str, decision: str, reason: str | None = None, at: datetime | None = None
) -> tuple[Entry, Pathway]:
    """Sign the pathway of one lesion, and write its new status wherever the folder shows it.

    Args:
        out: Folder that `write_folder` wrote.
        lesion_id: The lesion.
        by: Name of the clinician.
        decision: ``accepted``, ``edited`` or ``rejected``.
        reason: Needed unless accepted, and for an amendment.
        at: When; default now.

    Returns:
        The entry in the log, and the pathway with its new status.

    Raises:
        SignOffError: There is no such folder or lesion, the sign-off is incomplete, or the log was tampered with.
    """
    with open_log(out) as log:
        pathways, cases, run = read_folder(out)
        found = next((p for p in pathways if p.lesion_id == lesion_id), None)
        if found is None:
            raise SignOffError(
                f"no lesion {lesion_id!r}", where=out / PATHWAYS, expected=f"one of {len(pathways)} lesions"
            )
        entry = log.sign(found, by=by, decision=decision, reason=reason, at=at)
        signed = apply_sign_offs(pathways, log.entries)
        folder = _Folder(out, signed, cases, run)
        for name in (FHIR, PAGES):
            if (out / name).exists():
                folder.write_person(out / name, name, found.patient_id)
        if (out / INDEX).exists():
            folder.write_index()
        folder.write_pathways(pq.read_table(out / TABLE))
        return entry, next(p for p in signed if p.lesion_id == lesion_id)


def read_folder(out: Path) -> tuple[list[Pathway], list[Case], Run]:
    """The pathways of a folder, what they were made from, and when.

    Raises:
        SignOffError: It is no folder that `write_folder` wrote, or it was changed.
    """
    try:
        pathways = [Pathway.model_validate_json(line) for line in (out / PATHWAYS).read_bytes().splitlines()]
        inputs = [_Input.model_validate_json(line) for line in (out / CASES).read_bytes().splitlines()]
        run = Run.model_validate_json((out / RUN).read_bytes())
    except (FileNotFoundError, ValidationError) as error:
        what = "no pathways here" if isinstance(error, FileNotFoundError) else "not as it was written"
        raise SignOffError(
            what, where=out, expected=f"{PATHWAYS}, {CASES} and {RUN}", todo="run dermaflow recommend again"
        ) from None
    return pathways, [Case(entry.patient, entry.lesion) for entry in inputs], run


class _Input(BaseModel):
    model_config = ConfigDict(extra="forbid")

    patient: Patient
    lesion: Lesion


class _Folder:
    """Everything that is written, by person."""

    def __init__(self, out: Path, pathways: Sequence[Pathway], cases: Sequence[Case], run: Run) -> None:
        self.out, self.pathways, self.run = out, pathways, run
        self.people: dict[str, list[Pathway]] = {}
        for pathway in pathways:
            self.people.setdefault(pathway.patient_id, []).append(pathway)
        self.patients = {case.patient.patient_id: case.patient for case in cases}
        self.lesions = {case.lesion.lesion_id: case.lesion for case in cases}

    def write_people(self, name: str, progress: Progress | None) -> None:
        with storage.folder_atomic(self.out / name) as folder:
            for done, patient_id in enumerate(self.people, 1):
                self.write_person(folder, name, patient_id)
                if progress:
                    progress(name, done, len(self.people))

    def write_person(self, folder: Path, name: str, patient_id: str) -> None:
        pathways = self.people[patient_id]
        if name == FHIR:
            bundle = patient_bundle(pathways, recorded=self.run.recorded, lesions=self.lesions)
            path, content = folder / file_name(patient_id, ".json"), bundle.model_dump_json(indent=1)
        else:
            path = folder / page_name(patient_id)
            content = patient_page(
                pathways, patient=self.patients.get(patient_id), lesions=self.lesions, index=f"../{INDEX}"
            )
        storage.write_bytes(path, content.encode())

    def write_index(self) -> None:
        storage.write_bytes(self.out / INDEX, index_page(self.pathways, PAGES).encode())

    def write_pathways(self, table: pa.Table) -> None:
        kept = table.drop_columns([name for name in ("status", "signed_by") if name in table.column_names])
        signers = [p.sign_off.by if p.sign_off else None for p in self.pathways]
        kept = kept.append_column("status", pa.array([p.status for p in self.pathways], pa.string()))
        kept = kept.append_column("signed_by", pa.array(signers, pa.string()))
        with storage.open_atomic(self.out / TABLE) as stream:
            pq.write_table(kept, stream)
        storage.write_bytes(self.out / PATHWAYS, _lines(self.pathways))


def _lines(records: Sequence[BaseModel]) -> bytes:
    return b"".join(record.model_dump_json().encode() + b"\n" for record in records)


def _unmatched_csv(unmatched: Sequence[Unmatched]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(Unmatched._fields)
    writer.writerows(unmatched)
    return text.getvalue().encode()
