"""Pathways written by hand, for the tests of what is made of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from dermaflow.schemas.finding import Finding, findings_table
from dermaflow.schemas.pathway import Fired, Line, Missing, Option, Pathway, Versions
from dermaflow.taxonomy import CODES

PRELIMINARY = Line(rule="G01", text="Preliminary until a clinician signs.", source="NICE HTE24 2025", verification="V")
REFER = Line(rule="S01", text="Refer as urgent suspected cancer.", source="NICE NG12 2015", verification="V")
LABEL = Line(rule="C02", text="Blocked in pregnancy.", source="Efudex PI", verification="V")
LATER = Line(rule="F06", text="Examine at 3 and 12 months.", source="Metvix SmPC", verification="P")


def a_pathway(**changes: Any) -> Pathway:
    """A suspected melanoma of a pregnant person: an available, a locked and a blocked option."""
    content: dict[str, Any] = {
        "patient_id": "P1",
        "lesion_id": "L1",
        "image_ids": ["ISIC_1", "ISIC_2"],
        "assessable": True,
        "basis": "image",
        "prediction": "nv",
        "probabilities": {
            "akiec": 0.01, "bcc": 0.02, "bkl": 0.05, "df": 0.01, "mel": 0.18, "nv": 0.72, "vasc": 0.01,
        },
        "conformal_set": ["mel", "nv"],
        "p_malignant": 0.21,
        "urgency": "U1",
        "urgency_rules": ["S01"],
        "notices": [PRELIMINARY],
        "options": [
            Option(option="excision_biopsy", title="Excision biopsy", group="diagnostic", status="available",
                   offered_by=[REFER]),
            Option(option="cryotherapy", title="Cryotherapy", group="destructive", status="locked", offered_by=[REFER],
                   restrictions=[LABEL], confirm=["lesion.pigmented"]),
            Option(option="fluorouracil", title="Fluorouracil cream", group="topical", status="blocked",
                   offered_by=[REFER], restrictions=[LABEL]),
        ],
        "follow_up": [LATER],
        "missing": [Missing(fact="patient.fitzpatrick", question="What is the skin type?", rules=["K04"])],
        "patient_texts": {"T-mel": "This spot needs to be looked at under a microscope soon."},
        "trace": [Fired(rule="S01", facts={"finding.p_mel": 0.18, "threshold.mel": 0.08})],
        "versions": Versions(model="tiny", model_sha256="a" * 64, knowledge_base="draft", knowledge_sha256="b" * 64,
                             thresholds={"mel": 0.08}, dermaflow="0.1.0"),
    }  # fmt: skip
    return Pathway.model_validate(content | changes)


def a_blurred_pathway(**changes: Any) -> Pathway:
    """No picture that can be assessed."""
    content = {
        "lesion_id": "L2", "assessable": False, "basis": "none", "prediction": None, "probabilities": {},
        "conformal_set": [], "p_malignant": None, "quality_flags": ["blur"], "urgency": "U2", "urgency_rules": ["G02"],
        "options": [], "patient_texts": {}, "follow_up": [],
    }  # fmt: skip
    return a_pathway(**(content | changes))


def a_finding(image: str, lesion: str | None, **changes: Any) -> Finding:
    """A picture that looks like a naevus."""
    content: dict[str, Any] = {
        "image_id": image, "lesion_id": lesion, **{f"p_{code}": 0.94 if code == "nv" else 0.01 for code in CODES},
        "prediction": "nv", "conformal_set": ["nv"], "p_malignant": 0.03, "status": "ok", "model": "tiny",
        "model_sha256": "a" * 64,
    }  # fmt: skip
    return Finding.model_validate(content | changes)


def write_findings(path: Path, images: Mapping[str, str], changes: Mapping[str, Mapping[str, Any]]) -> None:
    """Findings of images (image id: lesion id), as a Parquet file."""
    found = [a_finding(image, lesion, **changes.get(image, {})) for image, lesion in images.items()]
    pq.write_table(findings_table(found), path)
