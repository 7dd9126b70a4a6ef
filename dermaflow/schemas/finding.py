"""A finding: what a model says of one image. One row an image, also for an image that failed."""

from __future__ import annotations

from typing import Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from dermaflow.taxonomy import CODES

Status = Literal["ok", "not_assessable", "failed"]


class Finding(BaseModel):
    """Probabilities are calibrated and sum to 1; they are None unless the status is ``ok``."""

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
    quality_flags: list[str] = []
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
        ("quality_flags", pa.list_(pa.string())),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("model", pa.string()),
        ("model_sha256", pa.string()),
    ]
)
