"""Patients for the lesions of a synthetic HAM10000: the published columns, and a history drawn by chance.

The history is made up and independent of the image. It shows what a pathway does with it, and how often something is
unknown; it says nothing of how common anything is.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

UNKNOWN_SHARE = 0.15
"""Of every answer: records have gaps, and a pathway must say what it would need to know."""
_SHARES: dict[str, float] = {
    "prior_melanoma": 0.06, "prior_keratinocyte_cancer": 0.12, "autoimmune_disease": 0.05, "porphyria": 0.01,
    "dpd_deficiency": 0.04, "photosensitising": 0.05, "keloid": 0.05,
    "changing": 0.15, "new": 0.15, "bleeding": 0.05, "itch": 0.15, "red_flag": 0.02,
}  # fmt: skip
_CHOICES: dict[str, tuple[tuple[str, ...], tuple[float, ...]]] = {
    "immunosuppression": (("none", "transplant", "drug", "hiv"), (0.9, 0.04, 0.05, 0.01)),
    "anticoagulant": (("none", "warfarin", "doac", "antiplatelet"), (0.78, 0.04, 0.08, 0.10)),
    "implant": (("none", "pacemaker", "icd"), (0.94, 0.04, 0.02)),
    "allergies": (("none", "lidocaine", "peanut", "nsaid"), (0.94, 0.01, 0.02, 0.03)),
    "fitzpatrick": (("1", "2", "3", "4", "5", "6"), (0.12, 0.38, 0.30, 0.10, 0.06, 0.04)),
    "preference": (("cure_first", "cosmesis", "fewest_visits", "avoid_surgery"), (0.4, 0.2, 0.2, 0.2)),
    "morphology": (("flat", "raised", "nodular"), (0.6, 0.35, 0.05)),
}
_NUMERIC = ("fitzpatrick",)  # a number's unknown is an empty cell
_FERTILE = (15, 50)  # years


def draw_patients(lesions: pd.DataFrame, seed: int) -> pd.DataFrame:
    """One patient a lesion, as `dermaflow recommend --patients` reads them.

    Args:
        lesions: ``lesion_id``, ``age`` (years or NaN), ``sex``, ``localization``, one row an image or a lesion.
        seed: Not negative; the same lesions and seed give the same patients.

    Returns:
        One row a lesion, sorted by it: ``patient_id``, ``lesion_id``, the columns given, and the history.
    """
    table = lesions.drop_duplicates("lesion_id").sort_values("lesion_id", ignore_index=True)
    table = table[["lesion_id", "age", "sex", "localization"]]
    table.insert(0, "patient_id", table["lesion_id"].str.replace("HAM_", "SYN_P"))
    rng = np.random.default_rng(seed)

    def with_gaps(answers: np.ndarray, gap: str) -> np.ndarray:
        return np.where(rng.random(len(answers)) < UNKNOWN_SHARE, gap, answers)

    for name, share in _SHARES.items():
        table[name] = with_gaps(np.where(rng.random(len(table)) < share, "yes", "no"), "unknown")
    for name, (choices, shares) in _CHOICES.items():
        table[name] = with_gaps(rng.choice(choices, len(table), p=shares), "" if name in _NUMERIC else "unknown")
    able = (table["sex"] == "female") & table["age"].between(*_FERTILE)
    for name, share in (("pregnant", 0.05), ("breast_feeding", 0.05)):
        answers = with_gaps(np.where(rng.random(len(table)) < share, "yes", "no"), "unknown")
        table[name] = np.where(able, answers, np.where(table["age"].isna(), "unknown", "no"))
    return table
