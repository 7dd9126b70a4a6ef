"""How every output reads a pathway: which lesion comes first, and what a blocked option means."""

from __future__ import annotations

from dermaflow.schemas.pathway import Option, Pathway


def most_urgent_first(pathway: Pathway) -> tuple[str, float, str, str]:
    """Sort key: urgency, then the probability of malignancy, those without one first, then the ids."""
    p = pathway.p_malignant
    return pathway.urgency, -(2.0 if p is None else p), pathway.patient_id, pathway.lesion_id


def overtaken(option: Option) -> bool:
    """Whether an option is blocked because the case is too urgent for it, not because it would harm."""
    return option.status == "blocked" and option.group in ("referral", "reassurance")
