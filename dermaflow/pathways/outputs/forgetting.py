"""People, lesions and images leave a folder of pathways; the log of sign-offs stays whole and names them no more."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Collection
from pathlib import Path

import pyarrow.parquet as pq

from dermaflow import storage
from dermaflow.pathways.outputs.folder import (
    CASES,
    FHIR,
    INDEX,
    PAGES,
    TABLE,
    UNMATCHED,
    _Folder,
    _Input,
    _lines,
    read_folder,
)
from dermaflow.pathways.outputs.identity import file_name
from dermaflow.pathways.outputs.page import page_name
from dermaflow.pathways.signoff import apply_sign_offs, open_log, read_log
from dermaflow.schemas.pathway import Pathway


def pathway_goes(
    pathway: Pathway, patients: Collection[str], lesions: Collection[str], images: Collection[str]
) -> bool:
    """Whether a pathway is of one of them; of images, when it has no other."""
    return (
        pathway.patient_id in patients
        or pathway.lesion_id in lesions
        or (bool(pathway.image_ids) and set(pathway.image_ids) <= set(images))
    )


def sign_offs_about(folder: Path, patients: Collection[str], lesions: Collection[str]) -> int:
    """Number of entries in the log that name one of them."""
    return sum(entry.patient_id in patients or entry.lesion_id in lesions for entry in read_log(folder))


def forget_in_folder(
    folder: Path, patients: Collection[str], lesions: Collection[str], images: Collection[str],
    pseudonym: Callable[[str], str], *, by: str,
) -> None:  # fmt: skip
    """Take them out of every file; doing it again after a kill finishes it.

    A pathway that rests on other images as well stays as it was decided and names the images no more; as it is another
    one now, it is to be signed again.

    Raises:
        SignOffError: The folder was changed, or its log was tampered with; nothing is written then.
        StorageError: A file could not be written.
    """
    with open_log(folder) as log:
        pathways, cases, run = read_folder(folder)
        gone = [p for p in pathways if pathway_goes(p, patients, lesions, images)]
        lost = {p.lesion_id for p in gone} | set(lesions)
        people = {p.patient_id for p in gone} | set(patients)
        log.forget(lambda entry: entry.patient_id in patients or entry.lesion_id in lost, pseudonym, by=by)
        kept = [
            p.model_copy(update={"image_ids": [i for i in p.image_ids if i not in images]})
            for p in pathways
            if p.lesion_id not in lost and p.patient_id not in patients
        ]
        cases = [c for c in cases if c.lesion.lesion_id not in lost and c.patient.patient_id not in patients]
        kept = apply_sign_offs(kept, log.entries)
        written = _Folder(folder, kept, cases, run)
        people |= {p.patient_id for p in pathways if set(p.image_ids) & set(images)}
        for name in (FHIR, PAGES):
            for person in people if (folder / name).exists() else ():
                if person in written.people:
                    written.write_person(folder / name, name, person)
                else:
                    place = file_name(person, ".json") if name == FHIR else page_name(person)
                    storage.delete(folder / name / place)
        if (folder / INDEX).exists():
            written.write_index()
        if (folder / UNMATCHED).exists():
            _filter_unmatched(folder / UNMATCHED, people & set(patients), lost)
        storage.write_bytes(folder / CASES, _lines([_Input(patient=c.patient, lesion=c.lesion) for c in cases]))
        table = pq.read_table(folder / TABLE)
        order = {lesion: i for i, lesion in enumerate(table["lesion_id"].to_pylist())}
        table = table.take([order[p.lesion_id] for p in kept])
        written.write_pathways(table)


def _filter_unmatched(path: Path, patients: Collection[str], lesions: Collection[str]) -> None:
    header, *rows = csv.reader(io.StringIO(path.read_text(encoding="utf-8"), newline=""))
    text = io.StringIO(newline="")
    csv.writer(text).writerows([header, *(row for row in rows if row[0] not in patients and row[1] not in lesions)])
    storage.write_bytes(path, text.getvalue().encode())
