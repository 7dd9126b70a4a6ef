"""What the pathways would do with the test lesions, knowing no more of a person than the shards do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, get_args

import pandas as pd

from dermaflow.pathways.engine import Thresholds, recommend
from dermaflow.pathways.knowledge import load_knowledge
from dermaflow.schemas.bundle import Calibration
from dermaflow.schemas.finding import Finding
from dermaflow.schemas.patient import BodySite, Lesion, Patient, Sex
from dermaflow.taxonomy import CODES
from dermaflow.trust.lesions import merge_lesions


def urgencies(
    findings: Iterable[Finding], predictions: pd.DataFrame, calibration: Calibration
) -> dict[str, dict[str, int]]:
    """Lesions by true diagnosis and urgency.

    Age, sex and body site are known; everything else, which a clinic would ask, is unknown.

    Args:
        findings: Of the test images.
        predictions: Metadata of the same images: ``lesion_id``, ``dx``, ``age``, ``sex``, ``localization``.
        calibration: Thresholds of the model.

    Returns:
        For each diagnosis of the test split, counts by ``U1`` ... ``U5``.
    """
    merged = merge_lesions(findings)
    known = predictions.drop_duplicates("lesion_id").set_index("lesion_id").to_dict("index")
    patients, lesions = [], []
    for finding in merged:
        row = known[finding.lesion_id]
        age = None if pd.isna(row["age"]) else float(row["age"])
        patients.append(Patient(patient_id=finding.lesion_id, age=age, sex=_known(row["sex"], Sex)))
        lesions.append(Lesion(lesion_id=finding.lesion_id, site=_known(row["localization"], BodySite)))
    decided = recommend(patients, lesions, merged, load_knowledge(), Thresholds.of(calibration))
    counts: dict[str, Counter[str]] = {code: Counter() for code in CODES}
    for finding, urgency in zip(merged, decided.urgency, strict=True):
        counts[known[finding.lesion_id]["dx"]][str(urgency)] += 1
    return {code: dict(sorted(count.items())) for code, count in counts.items() if count}


def _known(word: str, words: Any) -> Any:
    """The word if a patient may have it; another archive's own word is as good as unknown here."""
    return word if word in get_args(words) else "unknown"
