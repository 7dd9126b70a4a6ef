"""CDS Hooks cards: what an electronic health record shows of a pathway while a clinician works.

Source: HL7 CDS Hooks 2.0, https://cds-hooks.hl7.org/2.0/. A card informs and proposes; it never orders by itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from dermaflow.pathways.outputs.fhir import service_request
from dermaflow.pathways.outputs.fhir_parts import cited, patient_identifier
from dermaflow.pathways.outputs.identity import BASE, pathway_key, stable_id
from dermaflow.pathways.outputs.reading import most_urgent_first, overtaken
from dermaflow.schemas.pathway import URGENCY_TEXT, Option, Pathway, Urgency

MAX_SUMMARY = 139  # "less than 140 characters"
INDICATORS: dict[Urgency, Literal["info", "warning", "critical"]] = {
    "U1": "critical", "U2": "warning", "U3": "warning", "U4": "info", "U5": "info",
}  # fmt: skip
SERVICE = "dermaflow-pathways"
HOOKS = ("patient-view", "order-select", "order-sign")
OVERRIDE_REASONS = {
    "already-managed": "Already seen or treated for this lesion",
    "histology-known": "Histology is known and decides",
    "clinical-judgement": "Clinical judgement differs from the suggestion",
    "patient-declines": "The patient declines after discussion",
    "wrong-lesion": "Picture or record belongs to another lesion",
}
PREFETCH = {
    "patient": "Patient/{{context.patientId}}",
    "questionnaires": "QuestionnaireResponse?patient={{context.patientId}}",
    "observations": "Observation?patient={{context.patientId}}",
    "conditions": "Condition?patient={{context.patientId}}",
    "allergies": "AllergyIntolerance?patient={{context.patientId}}",
    "medications": "MedicationStatement?patient={{context.patientId}}",
    "lesions": "BodyStructure?patient={{context.patientId}}",
}


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Coding(_Part):
    code: str
    system: str
    display: str


class Source(_Part):
    label: str
    topic: Coding | None = None


class Action(_Part):
    type: Literal["create"] = "create"
    description: str
    resource: dict[str, Any]


class Suggestion(_Part):
    label: str
    uuid: str
    isRecommended: bool = False
    actions: list[Action] = []


class Card(_Part):
    """A card as CDS Hooks defines it; ``model_dump(exclude_none=True)`` is what goes over the wire."""

    uuid: str
    summary: str = Field(min_length=1, max_length=MAX_SUMMARY)
    detail: str
    indicator: Literal["info", "warning", "critical"]
    source: Source
    suggestions: list[Suggestion] | None = None
    selectionBehavior: Literal["at-most-one", "any"] | None = None
    overrideReasons: list[Coding] | None = None


def cards(pathways: Iterable[Pathway], patient: str | None = None) -> list[Card]:
    """The cards of one person, most urgent first: one a lesion, and one more where options are blocked or locked.

    Args:
        pathways: All of one person.
        patient: Reference of the person in the record that asks, for instance ``Patient/123``; without it, proposals
            name the person by id only.
    """
    return [card for pathway in sorted(pathways, key=most_urgent_first) for card in _cards_of(pathway, patient)]


def discovery() -> dict[str, Any]:
    """What ``GET /cds-services`` answers: one service for each hook."""
    return {
        "services": [
            {
                "hook": hook,
                "id": f"{SERVICE}-{hook}",
                "title": "DermaFlow pathways for skin lesions",
                "description": "Urgency, options and contraindications for skin lesions that were photographed. "
                "Research and education only; every card is preliminary until a clinician signs.",
                "prefetch": PREFETCH,
            }
            for hook in HOOKS
        ]
    }


def _cards_of(pathway: Pathway, patient: str | None) -> list[Card]:
    what = f"{pathway.urgency} {URGENCY_TEXT[pathway.urgency]}"
    suggestions = _suggestions(pathway, patient)
    main = Card(
        uuid=stable_id(*pathway_key(pathway), "card"),
        summary=_summary(f"{pathway.status.upper()}: {what}", pathway.lesion_id),
        detail=_detail(pathway),
        indicator=INDICATORS[pathway.urgency],
        source=_source(pathway, pathway.urgency),
        suggestions=suggestions or None,
        selectionBehavior="at-most-one" if suggestions else None,
        overrideReasons=[
            Coding(code=code, system=f"{BASE}/CodeSystem/override-reason", display=text)
            for code, text in OVERRIDE_REASONS.items()
        ],
    )
    restricted = [o for o in pathway.options if o.status in ("blocked", "locked") and not overtaken(o)]
    return [main, _restrictions(pathway, restricted)] if restricted else [main]


def _restrictions(pathway: Pathway, options: list[Option]) -> Card:
    titles = ", ".join(option.title for option in options)
    lines = [
        f"- **{option.title}** ({option.status}): " + "; ".join(map(cited, option.restrictions))
        + (f". Confirm first: {', '.join(option.confirm)}" if option.confirm else "")
        for option in options
    ]  # fmt: skip
    return Card(
        uuid=stable_id(*pathway_key(pathway), "restrictions"),
        summary=_summary(f"Not for this patient, or to be confirmed first: {titles}", pathway.lesion_id),
        detail="\n".join(lines),
        indicator="warning",
        source=_source(pathway, "contraindication"),
    )


def _summary(text: str, lesion: str) -> str:
    """At most 139 characters; the lesion's name gives way first, then the end of the text."""
    room = MAX_SUMMARY - len(text) - len(" (lesion )")
    if room >= min(len(lesion), 8):
        return f"{text} (lesion {_cut(lesion, room)})"
    return _cut(text, MAX_SUMMARY)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _detail(pathway: Pathway) -> str:
    """Markdown; probabilities, set, quality and notices always stand together."""
    if pathway.assessable and pathway.probabilities:
        order = sorted(pathway.probabilities.items(), key=lambda item: -item[1])
        finding = [
            "Probabilities: " + ", ".join(f"{code} {100 * p:.0f} %" for code, p in order),
            "Conformal set: " + (", ".join(pathway.conformal_set) or "empty"),
        ]
    else:
        finding = ["Not assessable: no class is shown" if not pathway.assessable else "No probabilities"]
    quality = ["Picture quality: " + (", ".join(pathway.quality_flags) or "no flag")]
    options = [f"{number}. {option.title} ({option.status}; {', '.join(line.rule for line in option.offered_by)})"
               for number, option in enumerate(pathway.options, 1)]  # fmt: skip
    parts = [
        ("Finding", [f"- {line}" for line in [*finding, *quality, f"Basis: {pathway.basis}"]]),
        ("Notices", [f"- {cited(line)}" for line in pathway.notices]),
        ("Options", options),
        ("Unknown inputs that matter", [f"- {m.question} ({', '.join(m.rules)})" for m in pathway.missing]),
        ("Follow-up", [f"- {cited(line)}" for line in pathway.follow_up]),
    ]
    text = [f"**{title}**\n\n" + "\n".join(lines) for title, lines in parts if lines]
    versions = pathway.versions
    text.append(
        f"Urgency from {', '.join(pathway.urgency_rules) or 'no rule'}. Model {versions.model} "
        f"{versions.model_sha256[:12]}, knowledge base {versions.knowledge_sha256[:12]}. Research and education only."
    )
    return "\n\n".join(text)


def _source(pathway: Pathway, topic: str) -> Source:
    display = URGENCY_TEXT.get(topic, topic)
    return Source(
        label=f"DermaFlow {pathway.versions.dermaflow}, guideline rules (draft)",
        topic=Coding(code=topic, system=f"{BASE}/CodeSystem/urgency", display=display),
    )


def _suggestions(pathway: Pathway, patient: str | None) -> list[Suggestion]:
    """Referral as a proposal: the record creates it only when the clinician picks it."""
    request = service_request(pathway)
    if request is None or pathway.sign_off is not None:  # what is signed needs no suggestion any more
        return []
    who = {"reference": patient} if patient else {"identifier": patient_identifier(pathway.patient_id)}
    text = f"Propose: {request['code']['text']}"
    action = Action(description=text, resource=request | {"subject": who})
    return [Suggestion(label=text, uuid=stable_id(*pathway_key(pathway), "suggestion"), isRecommended=True,
                       actions=[action])]  # fmt: skip
