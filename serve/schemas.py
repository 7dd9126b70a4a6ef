"""Requests and responses, typed and bounded. What comes in is checked here once; `/openapi.json` is made of this."""

from __future__ import annotations

import binascii
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    WithJsonSchema,
    model_validator,
)

from dermaflow.schemas.bundle import InputSpec
from dermaflow.schemas.finding import Finding
from dermaflow.schemas.pathway import Pathway
from dermaflow.schemas.patient import Lesion, Patient
from dermaflow.taxonomy import CODES

SUM_TOLERANCE = 0.01  # of seven probabilities, which may have been rounded
MAX_DATA = 90 << 20  # characters of base64; the service's own limit is lower

Id = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$")]
Code = Literal["akiec", "bcc", "bkl", "df", "mel", "nv", "vasc"]
Probability = Annotated[float, Field(ge=0, le=1)]
BatchState = Literal["queued", "running", "finished", "failed", "cancelled"]
Format = Literal["parquet", "csv", "jsonl", "fhir"]


def _decoded(value: Any) -> Any:
    if not isinstance(value, str):
        raise ValueError("should be text in base64")
    try:
        return binascii.a2b_base64(value.encode("ascii"), strict_mode=True) if value else b""
    except (ValueError, UnicodeEncodeError):
        raise ValueError("is no base64") from None


ImageData = Annotated[
    bytes,
    BeforeValidator(_decoded),
    WithJsonSchema({"type": "string", "contentEncoding": "base64", "maxLength": MAX_DATA}),
]
"""JPEG, PNG, BMP or WebP, in base64."""


class _In(BaseModel):
    """A body of a request: nothing unknown, no NaN, no text for a number."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())


class _Out(BaseModel):
    model_config = ConfigDict(protected_namespaces=())


# --- what comes in --------------------------------------------------------------------------------------------------


class PatientIn(Patient):
    """A person; every field but the id may be left out, and is unknown then."""

    model_config = ConfigDict(allow_inf_nan=False, title="PatientIn")

    patient_id: Id


class LesionIn(Lesion):
    """What is known of a lesion beside its pictures."""

    model_config = ConfigDict(allow_inf_nan=False, title="LesionIn")

    lesion_id: Id


class FindingIn(Finding):
    """A finding as this service gave it."""

    model_config = ConfigDict(allow_inf_nan=False, title="FindingIn")

    image_id: Id
    lesion_id: Id | None = None
    p_akiec: Probability | None = None
    p_bcc: Probability | None = None
    p_bkl: Probability | None = None
    p_df: Probability | None = None
    p_mel: Probability | None = None
    p_nv: Probability | None = None
    p_vasc: Probability | None = None
    prediction: Code | None = None
    conformal_set: list[Code] | None = Field(None, max_length=7)
    p_malignant: Probability | None = None
    quality_flags: list[Annotated[str, StringConstraints(max_length=100)]] = Field([], max_length=20)
    reason: Annotated[str, StringConstraints(max_length=4000)] | None = None
    model: Annotated[str, StringConstraints(max_length=200)]
    model_sha256: Annotated[str, StringConstraints(max_length=64)]

    @model_validator(mode="after")
    def _whole(self) -> FindingIn:
        if self.status == "ok":
            p = [getattr(self, f"p_{code}") for code in CODES]
            if any(value is None for value in p) or abs(sum(p) - 1) > SUM_TOLERANCE:
                raise ValueError("a finding that is ok has seven probabilities with sum 1")
            if self.prediction is None or self.conformal_set is None or self.p_malignant is None:
                raise ValueError("a finding that is ok has a prediction, a set and p_malignant")
        return self


class ImageIn(_In):
    image_id: Id
    data: ImageData


class LesionImageIn(ImageIn):
    lesion_id: Id | None = None


class ClassifyRequest(_In):
    """Images to classify."""

    images: list[LesionImageIn] = Field(min_length=1, max_length=1000)

    @model_validator(mode="after")
    def _once(self) -> ClassifyRequest:
        _refuse_twice([image.image_id for image in self.images])
        return self


class CaseIn(_In):
    """A lesion, whose it is, and what the model said of its images; without findings, only words decide."""

    patient: PatientIn
    lesion: LesionIn
    findings: list[FindingIn] = Field(max_length=100)

    @model_validator(mode="after")
    def _belong(self) -> CaseIn:
        _refuse_twice([finding.image_id for finding in self.findings])
        if any(finding.lesion_id not in (None, self.lesion.lesion_id) for finding in self.findings):
            raise ValueError("a finding is of another lesion")
        if len({(finding.model, finding.model_sha256) for finding in self.findings}) > 1:
            raise ValueError("the findings are of several models")
        return self


class RecommendRequest(_In):
    cases: list[CaseIn] = Field(min_length=1, max_length=1000)


class AssessCaseIn(_In):
    patient: PatientIn
    lesion: LesionIn
    images: list[ImageIn] = Field(min_length=1, max_length=100)


class AssessRequest(_In):
    """Lesions with their images: findings and pathways in one call."""

    cases: list[AssessCaseIn] = Field(min_length=1, max_length=1000)

    @model_validator(mode="after")
    def _once(self) -> AssessRequest:
        _refuse_twice([image.image_id for case in self.cases for image in case.images])
        return self


class ExplainRequest(_In):
    image: ImageIn
    diagnosis: Code | None = None


class BatchRequest(_In):
    """A source that the service may read: a folder, an archive, a table of addresses, shards."""

    source: Annotated[str, StringConstraints(min_length=1, max_length=2000, pattern=r"^[^\x00-\x1f\x7f]+$")]
    patients: Annotated[str, StringConstraints(min_length=1, max_length=2000)] | None = None


class CaseUpdate(_In):
    """What is known now; the pathway is computed anew from it."""

    patient: PatientIn
    lesion: LesionIn


class ReviewRequest(_In):
    batch_id: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9-]{1,64}$")]
    lesion_id: Id
    by: Annotated[str, StringConstraints(min_length=1, max_length=120)]
    decision: Literal["accepted", "edited", "rejected"]
    reason: Annotated[str, StringConstraints(max_length=2000)] | None = None


class CdsRequest(BaseModel):
    """A call of CDS Hooks 2.0; what else a record sends is passed over."""

    model_config = ConfigDict(extra="ignore")

    hook: Annotated[str, StringConstraints(min_length=1, max_length=100)]
    hookInstance: Annotated[str, StringConstraints(min_length=1, max_length=100)]
    context: dict[str, Any]
    prefetch: dict[str, Any] | None = None


class CdsFeedbackItem(BaseModel):
    model_config = ConfigDict(extra="ignore")

    card: Annotated[str, StringConstraints(min_length=1, max_length=100)]
    outcome: Literal["accepted", "overridden"]
    outcomeTimestamp: Annotated[str, StringConstraints(max_length=50)]
    overrideReason: dict[str, Any] | None = None


class CdsFeedback(BaseModel):
    model_config = ConfigDict(extra="ignore")

    feedback: list[CdsFeedbackItem] = Field(min_length=1, max_length=100)


def _refuse_twice(ids: list[str]) -> None:
    if len(set(ids)) != len(ids):
        raise ValueError("an image_id stands twice")


# --- what goes out --------------------------------------------------------------------------------------------------


class ModelName(_Out):
    """Which model answered; `version` as in the registry."""

    name: str
    version: str
    sha256: str


class ClassifyResponse(_Out):
    model: ModelName
    findings: list[Finding]


class RecommendResponse(_Out):
    model: ModelName
    pathways: list[Pathway]


class AssessResponse(_Out):
    model: ModelName
    findings: list[Finding]
    pathways: list[Pathway]


class NeighbourOut(_Out):
    """A training lesion that looks alike to the network; distance 0 (the same) to 2."""

    image_id: str
    lesion_id: str
    dx: str
    distance: float


class ExplainResponse(_Out):
    """Where the network looked, no evidence about the lesion; empty unless the finding is ``ok``."""

    model: ModelName
    finding: Finding
    diagnosis: str | None
    overlay: str | None = Field(description="PNG in base64")
    neighbours: list[NeighbourOut]


class ClassOut(_Out):
    code: str
    name: str
    malignant: bool


class ModelResponse(ModelName):
    """The model in use."""

    backbone: str
    input: InputSpec
    classes: list[ClassOut]
    metrics: dict[str, float | None] | None
    thresholds: dict[str, float]
    card: str = Field(description="Markdown")


class FieldOut(_Out):
    """One thing that may be known of a person or a lesion."""

    name: str
    type: Literal["number", "choice", "choices"]
    choices: list[str]
    description: str
    min: float | None
    max: float | None
    unit: str | None


class FieldsResponse(_Out):
    patient: list[FieldOut]
    lesion: list[FieldOut]


class Batch(_Out):
    """A batch and how far it is."""

    id: str
    state: BatchState
    created: datetime
    finished: datetime | None
    name: str
    total: int | None
    done: int
    ok: int
    not_assessable: int
    failed: int
    images_per_second: float | None
    eta_seconds: float | None
    error: str | None
    has_pathways: bool
    model: ModelName


class BatchList(_Out):
    batches: list[Batch]


class FailureOut(_Out):
    image_id: str
    status: str
    reason: str | None


class Failures(_Out):
    total: int
    failures: list[FailureOut]


class WorklistEntry(_Out):
    lesion_id: str
    patient_id: str | None
    urgency: str | None
    status: str
    prediction: str | None
    p_malignant: float | None
    conformal_set: list[str] | None
    flagged: bool
    signed: Literal["accepted", "edited", "rejected"] | None


class Worklist(_Out):
    """Most urgent first."""

    total: int
    lesions: list[WorklistEntry]


class LesionView(_Out):
    findings: list[Finding]
    pathway: Pathway | None
    patient: Patient | None
    lesion: Lesion | None


class ReviewResponse(_Out):
    entry: dict[str, Any]
    pathway: Pathway
    sequence: int
    sha256: str


class Health(_Out):
    status: Literal["ok"]
