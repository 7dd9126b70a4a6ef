"""One case of a folder of pathways changes: what follows from it is computed anew, the rest stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dermaflow import storage
from dermaflow.pathways.engine import Thresholds, recommend
from dermaflow.pathways.intake import Case
from dermaflow.pathways.knowledge import load_knowledge
from dermaflow.pathways.outputs.folder import (
    CASES,
    FHIR,
    INDEX,
    PAGES,
    PATHWAYS,
    RUN,
    TABLE,
    Run,
    _Folder,
    _Input,
    _lines,
    read_folder,
)
from dermaflow.pathways.outputs.identity import file_name
from dermaflow.pathways.outputs.page import page_name
from dermaflow.pathways.signoff import apply_sign_offs, open_log
from dermaflow.schemas.finding import LesionFinding
from dermaflow.schemas.pathway import Pathway


def revise_folder(
    out: Path, case: Case, finding_of: Callable[[str], LesionFinding | None], thresholds: Thresholds
) -> Pathway:
    """Put a case in place of the one of the same lesion, or add it, and compute what follows.

    What the case says of the person holds for all their lesions here, so their pathways are computed anew, too. A
    sign-off holds on where the pathway stays the same.

    Args:
        out: Folder that `write_folder` wrote; made if it is not there.
        case: Lesion and person as they are known now.
        finding_of: What the model said of a lesion, by its id; None where it said nothing.
        thresholds: Of that model.

    Returns:
        The pathway of the case's lesion.

    Raises:
        SignOffError: The folder was changed, or its log of sign-offs was tampered with; nothing is written then.
        StorageError: A file could not be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    with open_log(out) as log:
        new = not (out / PATHWAYS).exists()
        pathways, cases, run = ([], [], _new_run()) if new else read_folder(out)
        lesion_id, patient_id = case.lesion.lesion_id, case.patient.patient_id
        people = {c.patient.patient_id for c in cases if c.lesion.lesion_id == lesion_id} | {patient_id}
        own = [Case(case.patient, c.lesion) for c in cases
               if c.patient.patient_id == patient_id and c.lesion.lesion_id != lesion_id]  # fmt: skip
        own.append(case)
        decided = recommend(
            [c.patient for c in own], [c.lesion for c in own], [finding_of(c.lesion.lesion_id) for c in own],
            load_knowledge(), thresholds,
        )  # fmt: skip
        places = {c.lesion.lesion_id: i for i, c in enumerate(cases)}
        for i, changed in enumerate(own):
            pathway = decided.pathway(i)
            place = places.get(changed.lesion.lesion_id)
            if place is None:
                cases.append(changed)
                pathways.append(pathway)
            else:
                cases[place], pathways[place] = changed, pathway
        signed = apply_sign_offs(pathways, log.entries)
        folder = _Folder(out, signed, cases, run)
        for name in (FHIR, PAGES):
            if new or (out / name).exists():
                for person in people:
                    if person in folder.people:
                        folder.write_person(out / name, name, person)
                    else:
                        storage.delete(out / name / (file_name(person, ".json") if name == FHIR else page_name(person)))
        if new or (out / INDEX).exists():
            folder.write_index()
        storage.write_bytes(out / CASES, _lines([_Input(patient=c.patient, lesion=c.lesion) for c in cases]))
        if new:
            storage.write_bytes(out / RUN, run.model_dump_json(indent=1).encode())
        folder.write_pathways(_merged(None if new else pq.read_table(out / TABLE), decided.table(), signed))
        return next(p for p in signed if p.lesion_id == lesion_id)


def _new_run() -> Run:
    """Of a folder that begins with a case entered by hand."""
    now = datetime.now(UTC).replace(microsecond=0)
    return Run(recorded=now, as_of=now.date().isoformat(), findings_sha256="", patients_sha256="")


def _merged(old: pa.Table | None, new: pa.Table, pathways: list[Pathway]) -> pa.Table:
    """The rows of both in the order of the pathways; the new row where both have one."""
    if old is None:
        return new
    both = pa.concat_tables(
        [old.select(new.column_names).replace_schema_metadata(None), new.replace_schema_metadata(None)]
    )
    row = {lesion_id: i for i, lesion_id in enumerate(both["lesion_id"].to_pylist())}  # the last one wins
    return both.take([row[pathway.lesion_id] for pathway in pathways]).replace_schema_metadata(old.schema.metadata)
