"""The seven diagnoses of HAM10000: order, names, malignancy, severity.

Source: Tschandl, Rosendahl, Kittler, The HAM10000 dataset, Sci Data 5, 180161 (2018), doi 10.1038/sdata.2018.161.
"""

from __future__ import annotations

from dataclasses import dataclass

from dermaflow.errors import DataError


@dataclass(frozen=True)
class Diagnosis:
    """One diagnosis.

    Attributes:
        code: Short code, as in the ``dx`` column of HAM10000.
        name: Name for people.
        malignant: Whether a missed one harms: melanoma, basal cell carcinoma, actinic keratosis or intraepithelial
            carcinoma.
        severity: Rank when several images of one lesion disagree; 0 is the most severe.
    """

    code: str
    name: str
    malignant: bool
    severity: int


DIAGNOSES: tuple[Diagnosis, ...] = (
    Diagnosis("akiec", "actinic keratosis / intraepithelial carcinoma", True, 2),
    Diagnosis("bcc", "basal cell carcinoma", True, 1),
    Diagnosis("bkl", "benign keratosis-like lesion", False, 4),
    Diagnosis("df", "dermatofibroma", False, 5),
    Diagnosis("mel", "melanoma", True, 0),
    Diagnosis("nv", "melanocytic nevus", False, 6),
    Diagnosis("vasc", "vascular lesion", False, 3),
)
CODES: tuple[str, ...] = tuple(d.code for d in DIAGNOSES)
"""Codes in the order of every probability vector of the project."""

INDEX: dict[str, int] = {code: i for i, code in enumerate(CODES)}
MALIGNANT: tuple[bool, ...] = tuple(d.malignant for d in DIAGNOSES)
MELANOMA: int = INDEX["mel"]

_ALIASES = {"vas": "vasc", "vasc": "vasc", "ak": "akiec", "scc": "akiec"}
# ISIC 2019 splits HAM10000's akiec into AK and SCC, so both read as akiec here.


def parse_diagnosis(text: str) -> str:
    """Read a diagnosis code as written in any HAM10000-like file.

    Args:
        text: For instance ``mel``, ``MEL``, ``vas``, ``VASC``.

    Returns:
        One of `CODES`.

    Raises:
        DataError: The text is no known diagnosis.
    """
    code = str(text).strip().lower()
    code = _ALIASES.get(code, code)
    if code not in INDEX:
        raise DataError(
            f"unknown diagnosis {text!r}", expected="one of " + " ".join(CODES), todo="correct the row or remove it"
        )
    return code
