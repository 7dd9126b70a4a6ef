"""What is known of a dermoscopy image before any model sees it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

METADATA_COLUMNS: tuple[str, ...] = (
    "image_id", "lesion_id", "dx", "dx_type", "age", "sex", "localization", "site",
)  # fmt: skip
"""Columns of `LesionArchive.images`, in order; ``site`` is the ``dataset`` column of HAM10000."""

UNKNOWN = "unknown"
"""Written where ``dx_type``, ``sex``, ``localization`` or ``site`` is missing; a missing ``age`` is NaN."""


@dataclass(frozen=True)
class LesionArchive:
    """Images of lesions with their metadata, from any source.

    Attributes:
        root: Where the archive was read.
        images: One row an image: `METADATA_COLUMNS` (str, ``age`` float years or NaN) and ``path`` (str, absolute).
            Unique ``image_id``, sorted by it. ``lesion_id`` is the same for known hidden duplicates.
        quarantined: Rows that were left out: ``image_id``, ``path``, ``reason``, ``detail`` (all str).
        aliases: Lesion ids of the source that hidden duplicates made another one, and which.
    """

    root: Path
    images: pd.DataFrame
    quarantined: pd.DataFrame
    aliases: dict[str, str] = field(default_factory=dict)


QUARANTINE_COLUMNS: tuple[str, ...] = ("image_id", "path", "reason", "detail")
