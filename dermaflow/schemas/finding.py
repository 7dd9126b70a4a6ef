"""A finding: what a model says of one image, or of one lesion. One row an image, also for an image that failed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from dermaflow.taxonomy import CODES

Status = Literal["ok", "not_assessable", "failed"]


class Finding(BaseModel):
    """What a model says of one image.

    Probabilities are calibrated and sum to 1; they, the prediction (the most probable class) and the set are None
    unless the status is ``ok``. `ood` says whether `ood_score` is above the model's threshold.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    image_id: str
    lesion_id: str | None = None
    p_akiec: float | None = None
    p_bcc: float | None = None
    p_bkl: float | None = None
    p_df: float | None = None
    p_mel: float | None = None
    p_nv: float | None = None
    p_vasc: float | None = None
    prediction: str | None = None
    conformal_set: list[str] | None = None
    p_malignant: float | None = None
    ood_score: float | None = None
    ood: bool = False
    quality_flags: list[str] = []
    status: Status
    reason: str | None = None
    model: str
    model_sha256: str


class LesionFinding(BaseModel):
    """What a model says of one lesion, from all its images (`dermaflow.trust.lesions.merge_lesion`).

    Attributes:
        image_ids: All images of the lesion, sorted, also those that could not be assessed.
        p: Mean of the calibrated probabilities over the assessable images, in the order of `CODES`, sum 1; empty unless
            the status is ``ok``.
        prediction: The most severe of the images' predictions.
        conformal_set: Union of the images' sets, in the order of `CODES`.
        p_malignant: The largest of the images.
        p_mel_max: The largest ``p_mel`` of the images.
        ood: Whether an image was unlike everything the model was trained on. This and the next rest on the assessable
            images if there are any, so both are empty where the status is ``ok``; `reason` names what was left out.
        quality_flags: Union over the images, sorted.
        disagreement: Whether the images' predictions differ on malignant yes or no.
        status: ``ok`` if at least one image is; else ``not_assessable`` if one is that, else ``failed``.
        reason: Why not ``ok``, or which images were left out.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    lesion_id: str
    image_ids: tuple[str, ...]
    p: tuple[float, ...] = ()
    prediction: str | None = None
    conformal_set: tuple[str, ...] = ()
    p_malignant: float | None = None
    p_mel_max: float | None = None
    ood: bool = False
    quality_flags: tuple[str, ...] = ()
    disagreement: bool = False
    status: Status
    reason: str | None = None
    model: str
    model_sha256: str


FINDING_SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("lesion_id", pa.string()),
        *[(f"p_{code}", pa.float32()) for code in CODES],
        ("prediction", pa.string()),
        ("conformal_set", pa.list_(pa.string())),
        ("p_malignant", pa.float32()),
        ("ood_score", pa.float32()),
        ("ood", pa.bool_()),
        ("quality_flags", pa.list_(pa.string())),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("model", pa.string()),
        ("model_sha256", pa.string()),
    ]
)


def findings_table(findings: Iterable[Finding]) -> pa.Table:
    """Findings as a table of `FINDING_SCHEMA`, one row an image."""
    return pa.Table.from_pylist([finding.model_dump() for finding in findings], schema=FINDING_SCHEMA)


def findings_of(table: pa.Table) -> list[Finding]:
    """Findings back from a table of `FINDING_SCHEMA`."""
    return [Finding.model_validate(row) for row in table.to_pylist()]
