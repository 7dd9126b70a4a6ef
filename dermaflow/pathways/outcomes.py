"""What clinicians' sign-offs say of lesions: the diagnosis by histology, or the one that a named clinician accepted.

Only a signed pathway counts. Histology in an accepted or edited case is the diagnosis. Without histology, accepting a
pathway that rests on the image accepts its diagnosis; editing or rejecting it names no other, so nothing is learnt.

A model that learns from what clinicians accepted of it learns its own opinion again where they were too polite, so the
two kinds stay apart (`by`), and calibration is only ever measured on histology.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dermaflow.pathways.facts import DX_OF_HISTOLOGY
from dermaflow.pathways.outputs.folder import CASES, PATHWAYS, RUN, read_folder
from dermaflow.pathways.signoff import HEAD_NAME, LOG_NAME, apply_sign_offs, read_log

FILES = (PATHWAYS, CASES, RUN, LOG_NAME, HEAD_NAME)
"""What is read of a folder that `dermaflow recommend`, `dermaflow score --patients` or the service wrote."""


@dataclass(frozen=True)
class Outcome:
    """One lesion that a clinician signed for. `dx` is one of `taxonomy.CODES`; `age` is in years, None if unknown."""

    lesion_id: str
    image_ids: tuple[str, ...]
    dx: str
    by: Literal["histology", "sign_off"]
    age: float | None
    sex: str
    localization: str


def read_outcomes(folder: Path) -> tuple[list[Outcome], int]:
    """The outcomes of a folder of pathways, and how many signed pathways name no diagnosis.

    Raises:
        SignOffError: The folder was changed, or its log of sign-offs was tampered with: nothing is learnt from it.
    """
    pathways, cases, _ = read_folder(folder)
    known = {case.lesion.lesion_id: case for case in cases}
    found, nothing = [], 0
    for pathway in apply_sign_offs(pathways, read_log(folder)):
        if pathway.sign_off is None:
            continue
        case = known[pathway.lesion_id]
        proven = DX_OF_HISTOLOGY.get(case.lesion.histology) if pathway.status == "final" else None
        accepted = pathway.prediction if pathway.sign_off.decision == "accepted" and pathway.basis == "image" else None
        if (dx := proven or accepted) is None:
            nothing += 1
            continue
        found.append(
            Outcome(
                lesion_id=pathway.lesion_id,
                image_ids=tuple(pathway.image_ids),
                dx=dx,
                by="histology" if proven else "sign_off",
                age=case.patient.age,
                sex=case.patient.sex,
                localization=case.lesion.site,
            )
        )
    return found, nothing
