"""Who has which lesion where: classes, sites, proof, age, sex and body site as in the real HAM10000.

Every table counts lesions or images of HAM10000 (Tschandl et al., Sci Data 5, 180161, 2018), taken from its published
metadata with the ``dataset`` column; a lesion is counted once, by its first row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from dermaflow.errors import DataError
from dermaflow.taxonomy import CODES

Key = TypeVar("Key")

IMAGES = {"akiec": 327, "bcc": 514, "bkl": 1099, "df": 115, "mel": 1113, "nv": 6705, "vasc": 142}

SITE_AND_PROOF: dict[str, dict[tuple[str, str], int]] = {
    "akiec": {("rosendahl", "histo"): 211, ("vidir_modern", "histo"): 17},
    "bcc": {
        ("rosendahl", "histo"): 211, ("vidir_modern", "histo"): 110,
        ("vidir_molemax", "histo"): 2, ("vienna_dias", "histo"): 4,
    },
    "bkl": {
        ("rosendahl", "histo"): 349, ("vidir_modern", "confocal"): 34, ("vidir_modern", "consensus"): 88,
        ("vidir_modern", "histo"): 124, ("vidir_molemax", "consensus"): 118, ("vidir_molemax", "histo"): 6,
        ("vienna_dias", "histo"): 8,
    },
    "df": {
        ("rosendahl", "histo"): 16, ("vidir_modern", "consensus"): 14, ("vidir_modern", "histo"): 11,
        ("vidir_molemax", "consensus"): 30, ("vienna_dias", "histo"): 2,
    },
    "mel": {
        ("rosendahl", "histo"): 225, ("vidir_modern", "histo"): 330,
        ("vidir_molemax", "histo"): 15, ("vienna_dias", "histo"): 44,
    },
    "nv": {
        ("rosendahl", "histo"): 538, ("vidir_modern", "consensus"): 332, ("vidir_modern", "histo"): 596,
        ("vidir_molemax", "follow_up"): 3704, ("vidir_molemax", "histo"): 16, ("vienna_dias", "histo"): 217,
    },
    "vasc": {
        ("rosendahl", "histo"): 2, ("vidir_modern", "consensus"): 11, ("vidir_modern", "histo"): 28,
        ("vidir_molemax", "consensus"): 54, ("vienna_dias", "histo"): 3,
    },
}  # fmt: skip
"""Lesions by class, site (HAM10000's ``dataset``) and kind of proof (``dx_type``)."""

IMAGES_A_LESION = {  # lesions with 1, 2, ... 6 images
    "rosendahl": (980, 454, 102, 15, 1, 0),
    "vidir_modern": (433, 884, 353, 17, 4, 4),
    "vidir_molemax": (3945, 0, 0, 0, 0, 0),
    "vienna_dias": (156, 85, 35, 2, 0, 0),
}

AGES = {  # lesions at 0, 5, ... 85 years
    "akiec": (0, 0, 0, 0, 0, 0, 1, 0, 6, 7, 13, 18, 42, 27, 39, 30, 26, 19),
    "bcc": (0, 0, 0, 0, 1, 1, 2, 2, 15, 17, 18, 18, 25, 47, 52, 47, 49, 33),
    "bkl": (3, 1, 0, 0, 0, 0, 3, 18, 25, 39, 63, 58, 82, 71, 128, 103, 69, 55),
    "df": (0, 0, 0, 0, 0, 1, 3, 8, 6, 8, 10, 9, 8, 11, 3, 5, 1, 0),
    "mel": (0, 1, 0, 0, 4, 7, 16, 19, 27, 39, 49, 72, 65, 75, 89, 59, 48, 43),
    "nv": (16, 43, 21, 43, 94, 150, 283, 517, 705, 959, 823, 591, 371, 281, 183, 178, 77, 26),
    "vasc": (2, 2, 1, 2, 2, 2, 4, 6, 3, 11, 11, 14, 7, 3, 9, 8, 8, 3),
}
AGE_MISSING = {"bkl": 9 / 727, "mel": 1 / 614, "nv": 42 / 5403}

SEX = {  # female, male, unknown
    "akiec": (80, 148, 0),
    "bcc": (122, 205, 0),
    "bkl": (304, 414, 9),
    "df": (38, 35, 0),
    "mel": (243, 371, 0),
    "nv": (2584, 2778, 41),
    "vasc": (48, 50, 0),
}

LOCALIZATION: dict[str, tuple[int, ...]] = {  # akiec, bcc, bkl, df, mel, nv, vasc
    "abdomen": (3, 9, 36, 2, 31, 719, 22),
    "acral": (0, 0, 0, 0, 0, 3, 0),
    "back": (22, 123, 133, 1, 185, 1058, 12),
    "chest": (9, 32, 50, 0, 34, 112, 3),
    "ear": (2, 0, 4, 0, 10, 19, 0),
    "face": (84, 61, 194, 0, 65, 61, 5),
    "foot": (0, 2, 1, 1, 15, 209, 0),
    "genital": (0, 0, 1, 1, 0, 43, 0),
    "hand": (8, 1, 12, 0, 1, 39, 3),
    "lower extremity": (41, 36, 109, 54, 104, 1224, 16),
    "neck": (8, 11, 20, 0, 18, 60, 2),
    "scalp": (8, 11, 24, 0, 9, 24, 2),
    "trunk": (1, 6, 57, 0, 25, 1153, 27),
    "unknown": (0, 3, 19, 0, 6, 175, 0),
    "upper extremity": (42, 32, 67, 14, 111, 504, 6),
}

LEAST_LESIONS = 3
"""Lesions of every class in any set of 70 images or more: one each for train, calibration and test."""


@dataclass(frozen=True)
class Lesion:
    """One lesion of one patient.

    Attributes:
        number: Counts from 0.
        dx: One of `dermaflow.taxonomy.CODES`.
        dx_type: ``histo``, ``follow_up``, ``consensus`` or ``confocal``.
        age: Years, in steps of 5; None where missing.
        sex: ``female``, ``male`` or ``unknown``.
        localization: Body site.
        site: HAM10000's ``dataset``.
        images: How many images show it.
    """

    number: int
    dx: str
    dx_type: str
    age: int | None
    sex: str
    localization: str
    site: str
    images: int


def image_quotas(images: int) -> dict[str, int]:
    """How many images each class gets: the real shares, but no class fewer than can be split by lesion.

    Raises:
        DataError: Fewer images than classes.
    """
    if images < len(CODES):
        raise DataError(
            f"{images} images asked for", where="images", expected=f"at least {len(CODES)}", todo="ask for more images"
        )
    least = LEAST_LESIONS if images >= 70 else 1
    quotas = {code: max(least, round(images * IMAGES[code] / sum(IMAGES.values()))) for code in CODES}
    quotas["nv"] += images - sum(quotas.values())
    return quotas


def draw_lesions(rng: np.random.Generator, images: int) -> list[Lesion]:
    """Draw patients and their lesions until every class has its images.

    Args:
        rng: Source of chance.
        images: Images in all.

    Returns:
        Lesions in the order of `CODES`; their ``images`` sum to `images`.
    """
    lesions: list[Lesion] = []
    least = LEAST_LESIONS if images >= 70 else 1
    for column, (code, quota) in enumerate(image_quotas(images).items()):
        left, still_needed = quota, least
        while left:
            site, proof = _choose(rng, SITE_AND_PROOF[code])
            count = 1 + _pick(rng, IMAGES_A_LESION[site])
            still_needed = max(still_needed - 1, 0)
            count = min(count, left - still_needed)
            missing = rng.random() < AGE_MISSING.get(code, 0.0)
            age = None if missing else 5 * _pick(rng, AGES[code])
            sex = _choose(rng, dict(zip(("female", "male", "unknown"), SEX[code], strict=True)))
            where = _choose(rng, {name: row[column] for name, row in LOCALIZATION.items()})
            lesions.append(Lesion(len(lesions), code, proof, age, sex, where, site, count))
            left -= count
    return lesions


def _pick(rng: np.random.Generator, weights: tuple[int, ...]) -> int:
    """An index, by weight."""
    return int(np.searchsorted(np.cumsum(weights), rng.random() * sum(weights), side="right"))


def _choose(rng: np.random.Generator, weights: dict[Key, int]) -> Key:
    """A key, by weight."""
    return list(weights)[_pick(rng, tuple(weights.values()))]
