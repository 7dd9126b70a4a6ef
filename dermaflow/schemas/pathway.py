"""A pathway: what should happen to one lesion of one patient, why, and what must not happen."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Urgency = Literal["U1", "U2", "U3", "U4", "U5"]
URGENCIES: tuple[Urgency, ...] = ("U1", "U2", "U3", "U4", "U5")
URGENCY_TEXT: dict[str, str] = {
    "U1": "urgent suspected cancer: refer now",
    "U2": "soon: clinician or dermatology within 2 to 6 weeks",
    "U3": "routine dermatology",
    "U4": "monitor with a dated review",
    "U5": "low estimated risk: reassure and safety-net, after a clinician signs",
}
OptionStatus = Literal["available", "caution", "locked", "blocked"]
"""locked: an input that could block it is unknown, confirm before use. blocked: stays visible, with the reason."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Line(_Strict):
    """One sentence and the rule it comes from."""

    rule: str  # rule id
    text: str
    source: str  # source and year as in the knowledge base, "-" where none is known
    verification: Literal["V", "P", "M"]


class Option(_Strict):
    """Something that can be done, in the order in which it should be considered."""

    option: str  # id in the catalogue
    title: str
    group: str
    status: OptionStatus
    offered_by: list[Line]
    restrictions: list[Line] = []  # why it is blocked, locked or needs caution
    confirm: list[str] = []  # unknown inputs that keep it locked, as fact names


class Missing(_Strict):
    """An input that is unknown and would matter."""

    fact: str  # for instance patient.pregnant
    question: str
    rules: list[str]


class Fired(_Strict):
    """A rule that held, and the facts that made it hold."""

    rule: str
    facts: dict[str, Any]


class SignOff(_Strict):
    """What a named clinician made of it."""

    by: str
    at: str  # ISO 8601, UTC
    decision: Literal["accepted", "edited", "rejected"]
    reason: str | None = None  # required unless accepted


class Versions(_Strict):
    """What it was computed with."""

    model: str
    model_sha256: str
    knowledge_base: str
    knowledge_sha256: str
    thresholds: dict[str, float]
    dermaflow: str


class Pathway(_Strict):
    """One lesion of one patient. ``preliminary`` until a clinician signs; the same input gives the same pathway."""

    patient_id: str
    lesion_id: str
    image_ids: list[str]
    status: Literal["preliminary", "final", "rejected"] = "preliminary"
    assessable: bool
    basis: Literal["image", "histology", "none"]
    prediction: str | None  # most severe wins over several images; None unless assessable
    probabilities: dict[str, float] = Field(default_factory=dict)
    conformal_set: list[str] = []
    p_malignant: float | None = None
    quality_flags: list[str] = []
    urgency: Urgency
    urgency_rules: list[str]  # those that give this urgency
    notices: list[Line]  # what has to be said first: gates, banners, warnings
    options: list[Option]
    follow_up: list[Line]
    missing: list[Missing]
    patient_texts: dict[str, str]  # key (T-SN ...) and text for the shared decision; a clinician edits it before use
    trace: list[Fired]
    versions: Versions
    sign_off: SignOff | None = None
