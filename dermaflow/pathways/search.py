"""Look for cases in which a condition holds: a bounded search over the domain of every fact.

Cases are drawn at random from values that the rules themselves make interesting, and the best of them are changed again
and again. A case that is found is proof that a rule can hold; none found is a strong hint that it cannot.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dermaflow.pathways.columns import UNKNOWN, Choices, Column, Frame, Numbers, Sets, Truth, derive
from dermaflow.pathways.facts import FACTS
from dermaflow.pathways.knowledge import Knowledge
from dermaflow.pathways.nodes import Always, And, Compare, Node, Not, Or
from dermaflow.taxonomy import CODES

POPULATION, ROUNDS = 512, 40
_FREE = [fact for fact in FACTS.values() if not fact.meaning]  # what derived facts follow from
_PROBABILITIES = ("finding.p_malignant", *(f"finding.p_{code}" for code in CODES))


@dataclass(frozen=True)
class Searcher:
    """Draws cases for one knowledge base; `numbers` are the values worth trying for each number."""

    knowledge: Knowledge
    numbers: dict[str, np.ndarray]

    def find(self, node: Node, rng: np.random.Generator) -> Frame | None:
        """Cases in which a condition holds, at least one.

        Args:
            node: The condition.
            rng: Source of the draws.

        Returns:
            A frame of such cases only; None if none was found in `ROUNDS` rounds.
        """
        columns = self._draw(POPULATION, rng)
        conditions = self.knowledge.conditions
        for _ in range(ROUNDS):
            frame = derive(POPULATION, dict(columns))
            holds = node(frame, conditions).yes
            if holds.any():
                return _take(frame, np.flatnonzero(holds))
            best = np.argsort(-_score(node, frame, self.knowledge, True), kind="stable")[: POPULATION // 8]
            columns = self._change(_take(Frame(POPULATION, columns), np.resize(best, POPULATION)).columns, rng)
        return None

    def _draw(self, rows: int, rng: np.random.Generator) -> dict[str, Column]:
        return _consistent({fact.name: self._column(fact.name, rows, rng) for fact in _FREE})

    def _column(self, name: str, rows: int, rng: np.random.Generator) -> Column:
        fact, unknown = FACTS[name], rng.random(rows) < 0.25
        common = rng.random(rows) < 0.8  # most pictures can be used, else few cases would have a class
        if fact.kind == "bool":
            yes = rng.random(rows) < 0.5
            if name == "finding.ood":
                yes &= ~common
            return Truth(yes & ~unknown, ~yes & ~unknown)
        if fact.kind == "choice":
            codes = rng.integers(0, len(fact.words), rows)
            if name == "finding.status":
                codes[common] = 0
            return Choices(np.where(unknown, UNKNOWN, codes).astype(np.int16))
        if fact.kind == "set":
            few = rng.integers(0, 2 ** len(fact.words), rows) & rng.integers(0, 2 ** len(fact.words), rows)
            if name == "finding.quality":
                few[common] = 0
            return Sets(few.astype(np.uint16), ~unknown)
        values = np.where(unknown & (not name.startswith("threshold")), np.nan, rng.choice(self.numbers[name], rows))
        return Numbers(values, values)

    def _change(self, columns: dict[str, Column], rng: np.random.Generator) -> dict[str, Column]:
        """Draw about one fact in ten anew."""
        rows = POPULATION
        fresh = self._draw(rows, rng)
        changed: dict[str, Column] = {}
        for fact in _FREE:
            new = rng.random(rows) < 0.1
            pairs = zip(columns[fact.name], fresh[fact.name], strict=True)
            changed[fact.name] = type(columns[fact.name])(*(np.where(new, b, a) for a, b in pairs))
        return _consistent(changed)


def make_searcher(knowledge: Knowledge) -> Searcher:
    """Collect the numbers that the rules compare with, and their neighbours."""
    numbers: dict[str, set[float]] = {fact.name: {0.0, 1.0, 50.0} for fact in FACTS.values() if fact.kind == "number"}
    for name in (*_PROBABILITIES, *(name for name in numbers if name.startswith("threshold"))):
        numbers[name] = {0.0, 0.01, 0.05, 0.3, 0.9}
    nodes = [*knowledge.conditions.values(), *(part for parts in knowledge.parts.values() for part in parts)]
    for root in nodes:
        for node in root.walk(knowledge.conditions):
            if isinstance(node, Compare):
                for fact, value in ((node.left, node.right), (node.right, node.left)):
                    if isinstance(fact, str) and isinstance(value, float):
                        numbers[fact] |= {value, value + 1, value - 1} if value >= 1 else {value, value / 2}
    return Searcher(knowledge, {name: np.array(sorted(v for v in vs if v >= 0)) for name, vs in numbers.items()})


def _score(node: Node, frame: Frame, knowledge: Knowledge, wanted: bool) -> np.ndarray:
    """How near a condition is to being what is wanted [N], 0 to 1."""
    truth = node(frame, knowledge.conditions)
    children = node.children(knowledge.conditions)
    if isinstance(node, Not):
        return _score(node.part, frame, knowledge, not wanted)
    if not children or isinstance(node, Always):
        return (truth.yes if wanted else truth.no).astype(np.float64)
    parts = np.stack([_score(child, frame, knowledge, wanted) for child in children])
    every = isinstance(node, And) if wanted else isinstance(node, Or)
    return parts.mean(axis=0) if every else parts.max(axis=0)


def _take(frame: Frame, rows: np.ndarray) -> Frame:
    return Frame(len(rows), {n: type(c)(*(a[rows] for a in c)) for n, c in frame.columns.items()})


def _consistent(columns: dict[str, Column]) -> dict[str, Column]:
    """Make the facts of the picture fit each other as those of `build_frame` do."""
    status, quality, ood = (columns[f"finding.{name}"] for name in ("status", "quality", "ood"))
    assert isinstance(status, Choices) and isinstance(quality, Sets) and isinstance(ood, Truth)
    columns = dict(columns)
    status = columns["finding.status"] = Choices(np.maximum(status.codes, 0))
    quality = columns["finding.quality"] = Sets(quality.bits, np.ones_like(quality.complete))
    ood = columns["finding.ood"] = Truth(ood.yes, ~ood.yes)
    usable = (status.codes == 0) & (quality.bits == 0) & ~ood.yes
    prediction, members = columns["finding.prediction"], columns["finding.set"]
    assert isinstance(prediction, Choices) and isinstance(members, Sets)
    columns["finding.prediction"] = Choices(np.where(usable, prediction.codes % len(CODES), UNKNOWN).astype(np.int16))
    bits = np.where(usable, members.bits, 0).astype(np.uint16)
    columns["finding.set"] = Sets(bits, usable)
    size = np.where(usable, np.bitwise_count(bits), np.nan)
    columns["finding.set_size"] = Numbers(size, size)
    for name in (*_PROBABILITIES, "finding.entropy"):
        values = columns[name]
        assert isinstance(values, Numbers)
        seen = np.where(usable, np.nan_to_num(values.low), np.nan)
        columns[name] = Numbers(seen, seen)
    disagreement = columns["finding.disagreement"]
    assert isinstance(disagreement, Truth)
    columns["finding.disagreement"] = Truth(disagreement.yes & usable, ~disagreement.yes & usable)
    return columns
