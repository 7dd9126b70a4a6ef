"""One readable, self-contained page for one person with all lesions, and an index over many people.

The pages print on A4, run no script and load nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import jinja2
from pydantic import BaseModel

from dermaflow.pathways.outputs.identity import file_name
from dermaflow.pathways.outputs.reading import most_urgent_first, overtaken
from dermaflow.schemas.pathway import URGENCIES, URGENCY_TEXT, Line, Option, Pathway
from dermaflow.schemas.patient import Lesion, Patient
from dermaflow.taxonomy import DIAGNOSES

STATUS_TEXT = {
    "available": "possible",
    "caution": "with caution",
    "locked": "locked: confirm first",
    "blocked": "blocked",
}
ASKED = 8  # questions shown; the rest opens on demand
VERIFICATION_TEXT = {"V": "read in a published source", "P": "partly seen", "M": "from memory, needs a check"}
FLAG_TEXT = {
    "blur": "blurred",
    "exposure": "too dark or too bright",
    "occlusion": "covered by hair or ink",
    "lesion_out_of_frame": "lesion not wholly in the picture",
    "not_dermoscopy": "not a dermoscopic picture",
}
BASIS_TEXT = {"image": "the pictures", "histology": "histology", "none": "neither pictures nor histology"}
LABELS = {"fitzpatrick": "skin type (Fitzpatrick)", "inr": "INR", "dpd_deficiency": "DPD deficiency"}
TEXT_TITLES = {
    "T-SN": "Safety net", "T-mel": "Suspicious spot", "T-bcc": "Basal cell carcinoma", "T-ak": "Sun damage",
    "T-nv": "Harmless-looking spot", "T-bkl": "Harmless-looking spot", "T-df": "Harmless-looking spot",
    "T-vasc": "Harmless-looking spot", "T-dark": "Darker skin", "T-preg": "Pregnancy and breast-feeding",
    "T-bloodthinner": "Blood thinner",
}  # fmt: skip


def patient_page(
    pathways: Sequence[Pathway],
    *,
    patient: Patient | None = None,
    lesions: Mapping[str, Lesion] | None = None,
    index: str | None = None,
) -> str:
    """The page of one person, most urgent lesion first.

    Args:
        pathways: All of one person.
        patient: What was known of the person, to be shown beside.
        lesions: What was known of each lesion, by its id.
        index: Relative address of the index page, for a link back.

    Returns:
        HTML.

    Raises:
        ValueError: The pathways are of several people, or there is none.
    """
    [patient_id] = {pathway.patient_id for pathway in pathways}
    ordered = sorted(pathways, key=most_urgent_first)
    return _environment().get_template("patient.html.j2").render(
        patient_id=patient_id,
        pathways=ordered,
        status=_status(ordered),
        facts=_known(patient),
        lesion_facts={p.lesion_id: _known((lesions or {}).get(p.lesion_id)) for p in ordered},
        versions=list({p.versions.model_dump_json(): p.versions for p in ordered}.values()),
        index=index,
    )  # fmt: skip


def index_page(pathways: Sequence[Pathway], folder: str) -> str:
    """A table of all lesions, most urgent first, each with a link to its person's page.

    Args:
        pathways: Of any number of people.
        folder: Relative address of the folder of the persons' pages.

    Returns:
        HTML.
    """
    ordered = sorted(pathways, key=most_urgent_first)
    counts = {urgency: sum(p.urgency == urgency for p in ordered) for urgency in URGENCIES}
    return _environment().get_template("index.html.j2").render(
        pathways=ordered,
        counts=counts,
        people=len({p.patient_id for p in ordered}),
        waiting=sum(p.status == "preliminary" for p in ordered),
        links={p.patient_id: f"{folder}/{page_name(p.patient_id)}" for p in ordered},
    )  # fmt: skip


def page_name(patient_id: str) -> str:
    """File name of a person's page."""
    return file_name(patient_id, ".html")


@dataclass(frozen=True)
class Bar:
    """One class on the page: ``share`` in per cent."""

    code: str
    name: str
    share: float
    malignant: bool
    in_set: bool


def bars(pathway: Pathway) -> list[Bar]:
    """The classes, most probable first; none where no class may be shown."""
    if not pathway.assessable:
        return []
    found = [
        Bar(d.code, d.name, 100 * pathway.probabilities[d.code], d.malignant, d.code in pathway.conformal_set)
        for d in DIAGNOSES
        if d.code in pathway.probabilities
    ]
    return sorted(found, key=lambda bar: -bar.share)


def why(pathway: Pathway) -> list[Line]:
    """The lines of the rules that give the urgency, where the pathway holds them."""
    lines = [*pathway.notices, *pathway.follow_up]
    lines += [line for option in pathway.options for line in [*option.offered_by, *option.restrictions]]
    by_rule = {line.rule: line for line in reversed(lines)}
    return [by_rule[rule] for rule in pathway.urgency_rules if rule in by_rule]


def same_reason(options: Sequence[Option]) -> list[tuple[list[Option], list[Line]]]:
    """Neighbouring options that are offered for the same reasons, with those reasons, so that they are said once."""
    groups: list[tuple[list[Option], list[Line]]] = []
    for option in options:
        if groups and groups[-1][1] == option.offered_by:
            groups[-1][0].append(option)
        else:
            groups.append(([option], option.offered_by))
    return groups


def say(lines: Sequence[Line], said: set[str]) -> tuple[list[Line], list[str]]:
    """Lines that were not said of this lesion yet, and the rules of those that were; all count as said from now on."""
    new = [line for line in lines if line.rule not in said]
    old = [line.rule for line in lines if line.rule in said]
    said.update(line.rule for line in lines)
    return new, old


def percent(share: float) -> str:
    """``72 %``; never 0 or 100, which nothing certain is: ``< 1 %`` and ``> 99 %``."""
    if share < 1:
        return "<\u00a01\u00a0%"
    return ">\u00a099\u00a0%" if share > 99 else f"{share:.0f}\u00a0%"


def fact_text(value: Any) -> str:
    """The value of a fact, as people write it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {fact_text(part)}" for name, part in value.items())
    if isinstance(value, (list, tuple, set, frozenset)):
        return ", ".join(map(fact_text, value)) or "none"
    return str(value).replace("_", " ")


def _status(pathways: Sequence[Pathway]) -> str:
    """Of the page as a whole: preliminary as long as one lesion is."""
    found = {pathway.status for pathway in pathways}
    return "preliminary" if "preliminary" in found else "signed"


def _known(record: BaseModel | None) -> list[tuple[str, str]]:
    """Fields that are known, with their values in words."""
    if record is None:
        return []
    return [
        (LABELS.get(name, name.replace("_", " ")), fact_text(value))
        for name, value in record
        if value not in (None, "unknown", ("unknown",)) and not name.endswith("_id")
    ]


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dermaflow.pathways.outputs", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(
        urgency_text=URGENCY_TEXT, status_text=STATUS_TEXT, flag_text=FLAG_TEXT, basis_text=BASIS_TEXT,
        text_titles=TEXT_TITLES, verification_text=VERIFICATION_TEXT, bars=bars, why=why, same_reason=same_reason,
        percent=percent, fact_text=fact_text, overtaken=overtaken, asked=ASKED, say=say, fresh=set,
    )  # fmt: skip
    return environment
