"""The worked cases of docs/pathways.md: decided by the engine, and written as the second half of that page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pathway_persons import THRESHOLDS, person, read

from dermaflow.pathways.engine import recommend
from dermaflow.pathways.knowledge import load_knowledge
from dermaflow.schemas.pathway import URGENCY_TEXT, Line, Option, Pathway

PAGE = Path(__file__).parents[1] / "docs" / "pathways.md"
MARKER = "<!-- Below this line the page is written by tests/worked_cases.py from tests/worked_cases.yaml. -->\n"
QUESTIONS = 6  # that are shown of a case; the rest is counted
SPELT_OUT = 2  # restrictions of an option up to which they are shown with their text

IN_EVERY_CASE = {"G01"}  # said once at the top


@dataclass(frozen=True)
class Worked:
    """One person of a case, and what has to come out."""

    case: str
    who: str
    given: dict[str, Any]  # what differs from the base
    expect: Mapping[str, Any]
    pathway: Pathway
    rules: frozenset[str]  # that hold


@dataclass(frozen=True)
class Case:
    title: str
    why: str
    people: tuple[Worked, ...]


def work() -> list[Case]:
    """Every case of worked_cases.yaml through the engine."""
    knowledge, base = load_knowledge(), read("pathway_cases.yaml")["base"]
    cases = []
    for number, case in enumerate(read("worked_cases.yaml"), 1):
        people = []
        for letter, one in zip("abcdefg", case["people"], strict=False):
            given = [case["shared"], one["facts"]]
            layers = given if case.get("base") == "none" else [base, *given]
            who = person(*layers, patient_id=f"case-{number}{letter}", lesion_id=f"lesion-{number}{letter}")
            pathway = recommend(
                [who.patient], [who.lesion], [who.finding], knowledge, THRESHOLDS,
                site_calibrated=who.site_calibrated, heatmap_shown=who.heatmap_shown,
            ).pathway(0)  # fmt: skip
            rules = frozenset(fired.rule for fired in pathway.trace)
            people.append(Worked(case["title"], one["who"], _merged(given), one["expect"], pathway, rules))
        cases.append(Case(case["title"], case["why"], tuple(people)))
    return cases


def page(cases: Iterable[Case]) -> str:
    """What stands below the marker."""
    parts = []
    for number, case in enumerate(cases, 1):
        first, *others = case.people
        parts += [f"### {number}. {case.title}", case.why, _whole(first)]
        parts += [_difference(first, other) for other in others]
    return "\n\n".join(parts) + "\n"


def _whole(worked: Worked) -> str:
    pathway = worked.pathway
    parts = [_heading(worked), _table(pathway.options)]
    parts += _lines("Said first", pathway.notices) + _lines("Follow-up", pathway.follow_up)
    if pathway.patient_texts:
        parts.append(f"For the patient: {', '.join(pathway.patient_texts)}.")
    if pathway.missing:
        asked = [f"{missing.question} (`{missing.fact}`)" for missing in pathway.missing]
        more = f", and {len(asked) - QUESTIONS} more" if len(asked) > QUESTIONS else ""
        parts.append(f"To ask: {'; '.join(asked[:QUESTIONS])}{more}.")
    return "\n\n".join(parts)


def _difference(first: Worked, other: Worked) -> str:
    """What comes out otherwise for another person of the same case."""
    before, after = first.pathway, other.pathway
    parts = [_heading(other)]
    known = {option.option: option for option in before.options}
    changed = [o for o in after.options if o.option not in known or _row(known[o.option]) != _row(o)]
    if changed:
        parts.append(_table(changed))
    still = {option.option for option in after.options}
    gone = [option.title for option in before.options if option.option not in still]
    if gone:
        parts.append(f"No longer offered: {', '.join(gone)}.")
    for title, old, new in (
        ("Said first as well", before.notices, after.notices),
        ("Follow-up as well", before.follow_up, after.follow_up),
    ):
        parts += _lines(title, [line for line in new if line not in old])
    silent = [line.rule for line in before.notices if line not in after.notices]
    if silent:
        parts.append(f"No longer said: {', '.join(silent)}.")
    if list(before.patient_texts) != list(after.patient_texts):
        parts.append(f"For the patient: {', '.join(after.patient_texts) or 'nothing prepared'}.")
    asked = [m for m in after.missing if m not in before.missing]
    if asked:
        parts.append(f"To ask: {'; '.join(f'{m.question} (`{m.fact}`)' for m in asked[:QUESTIONS])}.")
    return "\n\n".join(parts)


def _heading(worked: Worked) -> str:
    pathway = worked.pathway
    shown = f"shown as {pathway.prediction} by {pathway.basis}" if pathway.prediction else "no class is shown"
    given = "; ".join(f"{part}: {', '.join(words)}" for part, words in _words(worked.given).items()) or "the base alone"
    return "\n".join(
        [
            f"**{worked.who}.** *{given}* →",
            f"**{pathway.urgency}**, {URGENCY_TEXT[pathway.urgency]} ({', '.join(pathway.urgency_rules)}); {shown}.",
        ]
    )


def _words(given: Mapping[str, Any]) -> dict[str, list[str]]:
    """The facts of a case in words, by part."""
    words: dict[str, list[str]] = {}
    for part, facts in given.items():
        if facts == "none":
            words["picture"] = ["none"]
            continue
        for name, value in facts.items():
            where = "picture" if part == "finding" else part
            words.setdefault(where, []).extend(_fact(name, value))
    return words


def _fact(name: str, value: Any) -> list[str]:
    match name, value:
        case "p", dict():
            return [f"p({code}) {p:g}" for code, p in value.items()]
        case "pictures", list():
            return [f"no. {n}: {' '.join(_fact('p', one['p']))}" for n, one in enumerate(value, 1)]
        case (("set" | "quality" | "allergies"), list()):
            return [f"{name} {{{', '.join(value)}}}"]
        case _, bool():
            return [f"{name} {'yes' if value else 'no'}"]
    return [f"{name} {value}"]


def _table(options: Sequence[Option]) -> str:
    rows = ["| option | status | offered by | restricted by |", "|---|---|---|---|"]
    return "\n".join(rows + [f"| {' | '.join(_row(option))} |" for option in options])


def _row(option: Option) -> tuple[str, str, str, str]:
    offered = ", ".join(line.rule for line in option.offered_by)
    lines = option.restrictions
    if len(lines) > SPELT_OUT:
        why = ", ".join(line.rule for line in lines)
    else:
        why = " ".join(f"{line.rule}: {line.text}" for line in lines)
    if option.confirm:
        why += f" Confirm: {', '.join(f'`{fact}`' for fact in option.confirm)}."
    status = option.status if option.status == "available" else f"**{option.status}**"
    return option.title, status, offered, why


def _lines(title: str, lines: Iterable[Line]) -> list[str]:
    shown = [f"- {line.rule} [{line.verification}] {line.text} ({line.source})" for line in lines]
    shown = [text for text, line in zip(shown, lines, strict=True) if line.rule not in IN_EVERY_CASE]
    return [f"{title}:\n\n" + "\n".join(shown)] if shown else []


def _merged(layers: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for layer in layers:
        for part, facts in layer.items():
            merged[part] = facts if facts == "none" else {**merged.get(part, {}), **facts}
    return merged
