"""Look for what is wrong or suspicious in a knowledge base beyond what loading refuses.

Errors: everything `read_knowledge` refuses (unknown facts, words, options and texts, rules that refer to each other in
a ring), rules that cannot hold, one condition that both offers and blocks an option. Warnings: an offer that another
rule always blocks, rules without a source, options and texts that no rule uses, words no patient must read (rule X02).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np

from dermaflow.pathways.decision import REFERRALS, make_plan
from dermaflow.pathways.knowledge import Knowledge, Problem, read_knowledge
from dermaflow.pathways.nodes import And, Not
from dermaflow.pathways.rules import Rule
from dermaflow.pathways.search import make_searcher

SEED = 0  # of the search for cases

FORBIDDEN = re.compile(r"\b(benign|no cancer|not cancer|cancer[- ]free)\b", re.IGNORECASE)
"""Rule X02; a patient reads the texts."""


@dataclass(frozen=True)
class Report:
    """What was found, and how far the rules are reviewed."""

    problems: list[Problem]
    rules: int
    marks: dict[str, int]  # rules by how far their source was verified
    unreviewed: list[str]  # ids

    @property
    def errors(self) -> list[Problem]:
        return [problem for problem in self.problems if problem.level == "error"]


def lint(folder: Path | None = None, utilities: Path | None = None) -> Report:
    """Check a knowledge base.

    Args:
        folder: With the YAML files; default the one that comes with DermaFlow.
        utilities: A site's own ``utilities.yaml``.

    Returns:
        The problems, errors first.
    """
    knowledge, problems = read_knowledge(folder, utilities)
    if knowledge is None:
        return Report(problems, 0, {}, [])
    problems = [*_contradictions(knowledge), *_reachability(knowledge), *_sources(knowledge), *_unused(knowledge)]
    problems += [
        Problem("warning", "texts.yaml", f"{key}: says {match[0]!r}, which rule X02 forbids")
        for key, text in knowledge.texts.items()
        if (match := FORBIDDEN.search(text))
    ]
    return Report(
        sorted(problems, key=lambda problem: problem.level != "error"),
        len(knowledge.rules),
        dict(Counter(rule.verification for rule in knowledge.rules)),
        [rule.id for rule in knowledge.rules if rule.reviewed_by is None],
    )


def _where(rule: Rule, knowledge: Knowledge) -> str:
    return f"{knowledge.files[rule.id]}: rule {rule.id}"


def _contradictions(knowledge: Knowledge) -> Iterator[Problem]:
    """Equal conditions that offer and block the same option, or that reassure and hurry."""
    groups: dict[object, list[Rule]] = {}
    for rule in knowledge.rules:
        groups.setdefault(knowledge.conditions[rule.id], []).append(rule)
    for rules in groups.values():
        for one in rules:
            for other in rules:
                both = {*knowledge.members(one.effect.offer)} & {*knowledge.members(other.effect.block)}
                for option in sorted(both):
                    text = "offers and blocks" if one is other else f"offers what {other.id} blocks on equal terms:"
                    yield Problem("error", _where(one, knowledge), f"{text} {option}")
                hurried = other.effect.urgency not in (None, "U5") or other.effect.no_reassurance
                if one.effect.reassure and hurried:
                    text = f"reassures where {other.id}, with the same condition, does not allow it"
                    yield Problem("error", _where(one, knowledge), text)


def _reachability(knowledge: Knowledge) -> Iterator[Problem]:
    """Rules that cannot hold, and offers that are blocked whenever they are made."""
    searcher, rng, plan = make_searcher(knowledge), np.random.default_rng(SEED), make_plan(knowledge)
    options = list(knowledge.options)
    for rule, node in zip(knowledge.rules, plan.nodes, strict=True):
        where = _where(rule, knowledge)
        frame = searcher.find(node, rng)
        if frame is None:
            yield Problem("error", where, f"no case was found in which it holds: {rule.when}")
            continue
        texts = [*(part.when for part in rule.effect.urgency_when), *(part.when for part in rule.effect.restrict_when)]
        for text, when in zip(texts, knowledge.parts[rule.id], strict=True):
            if searcher.find(And((node, when)), rng) is None:
                yield Problem("error", where, f"no case was found for its part: {text}")
        for option in knowledge.members(rule.effect.offer):
            for blocker in plan.restrictions:
                other = knowledge.rules[blocker.rule]
                blocks = blocker.blocks and options.index(option) in blocker.options and other is not rule
                if not blocks or not blocker.node(frame, knowledge.conditions).yes.all():
                    continue  # one of the cases at hand has it unblocked
                if searcher.find(And((node, Not(blocker.node))), rng) is None:
                    yield Problem("warning", where, f"offers {option}, which {other.id} seems to block always")


def _sources(knowledge: Knowledge) -> Iterator[Problem]:
    for rule in knowledge.rules:
        where = _where(rule, knowledge)
        if rule.source.strip() in ("", "-"):
            yield Problem("warning", where, "has no source")
        if (rule.reviewed_by is None) != (rule.review_date is None):
            yield Problem("error", where, "reviewed_by and review_date belong together")
        if rule.review_date and rule.review_date > date.today():
            yield Problem("error", where, f"review_date {rule.review_date} lies in the future")


def _unused(knowledge: Knowledge) -> Iterator[Problem]:
    """Options and texts that nobody would miss."""
    offered = {option for rule in knowledge.rules for option in knowledge.members(rule.effect.offer)}
    for option in knowledge.options:
        if option not in offered and option not in REFERRALS.values():
            yield Problem("warning", "options.yaml", f"no rule offers {option}")
    used = {key for rule in knowledge.rules for key in rule.effect.text}
    for key in knowledge.texts:
        if key not in used:
            yield Problem("warning", "texts.yaml", f"no rule uses {key}")
