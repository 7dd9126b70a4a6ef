"""What a parsed condition is made of, and how it is computed on columns, asked back and explained.

Three-valued logic of Kleene: unknown and false is false, unknown or true is true, otherwise unknown.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dermaflow.pathways.columns import Choices, Frame, Numbers, Sets, Truth
from dermaflow.pathways.facts import FACTS

Rules = Mapping[str, "Node"]
"""Conditions by rule id, for ``fired(...)``."""


@dataclass(frozen=True, eq=False)
class Node:
    """A condition or a part of one. Equal text gives the same object, so every part is computed once for all rules."""

    names: ClassVar[tuple[str, ...]] = ()  # facts a leaf looks at

    def compute(self, frame: Frame, rules: Rules) -> Truth:
        raise NotImplementedError

    def children(self, rules: Rules) -> tuple[Node, ...]:
        return ()

    def __call__(self, frame: Frame, rules: Rules) -> Truth:
        """Whether it holds, row by row; `rules` are the conditions that ``fired`` may name."""
        if self not in frame.results:
            frame.results[self] = self.compute(frame, rules)
        return frame.results[self]

    def walk(self, rules: Rules) -> Iterator[Node]:
        """This node and everything under it, rules it refers to included."""
        yield self
        for child in self.children(rules):
            yield from child.walk(rules)

    def rules_named(self) -> set[str]:
        """Rules that ``fired`` names in it."""
        return set().union(*(child.rules_named() for child in self.children({})))


@dataclass(frozen=True, eq=False)
class Always(Node):
    def compute(self, frame: Frame, rules: Rules) -> Truth:
        return Truth(np.ones(frame.rows, bool), np.zeros(frame.rows, bool))


@dataclass(frozen=True, eq=False)
class And(Node):
    parts: tuple[Node, ...]

    def children(self, rules: Rules) -> tuple[Node, ...]:
        return self.parts

    def compute(self, frame: Frame, rules: Rules) -> Truth:
        first, *rest = (part(frame, rules) for part in self.parts)
        yes, no = first
        for truth in rest:
            yes, no = yes & truth.yes, no | truth.no
        return Truth(yes, no)


@dataclass(frozen=True, eq=False)
class Or(Node):
    parts: tuple[Node, ...]

    def children(self, rules: Rules) -> tuple[Node, ...]:
        return self.parts

    def compute(self, frame: Frame, rules: Rules) -> Truth:
        first, *rest = (part(frame, rules) for part in self.parts)
        yes, no = first
        for truth in rest:
            yes, no = yes | truth.yes, no & truth.no
        return Truth(yes, no)


@dataclass(frozen=True, eq=False)
class Not(Node):
    part: Node

    def children(self, rules: Rules) -> tuple[Node, ...]:
        return (self.part,)

    def compute(self, frame: Frame, rules: Rules) -> Truth:
        truth = self.part(frame, rules)
        return Truth(truth.no, truth.yes)


@dataclass(frozen=True, eq=False)
class Fired(Node):
    """The condition of another rule."""

    rule: str

    def children(self, rules: Rules) -> tuple[Node, ...]:
        return (rules[self.rule],)

    def rules_named(self) -> set[str]:
        return {self.rule}

    def compute(self, frame: Frame, rules: Rules) -> Truth:
        return rules[self.rule](frame, rules)


@dataclass(frozen=True, eq=False)
class Is(Node):
    """A yes/no fact by itself; one that abbreviates a condition stands for that."""

    name: str
    definition: Node | None = None

    @property
    def names(self) -> tuple[str, ...]:  # type: ignore[override]
        return () if self.definition else (self.name,)

    def children(self, rules: Rules) -> tuple[Node, ...]:
        return (self.definition,) if self.definition else ()

    def compute(self, frame: Frame, rules: Rules) -> Truth:
        if self.definition:
            return self.definition(frame, rules)
        column = frame.columns[self.name]
        assert isinstance(column, Truth)
        return column


@dataclass(frozen=True, eq=False)
class Known(Node):
    name: str

    @property
    def names(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.name,)

    def compute(self, frame: Frame, rules: Rules) -> Truth:
        unknown = frame.columns[self.name].unknown
        return Truth(~unknown, unknown)


@dataclass(frozen=True, eq=False)
class Compare(Node):
    """Numbers; `sign` is < <= or ==, the others are these with the sides swapped or negated."""

    sign: str
    left: str | float
    right: str | float

    @property
    def names(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(side for side in (self.left, self.right) if isinstance(side, str))

    def compute(self, frame: Frame, rules: Rules) -> Truth:
        a, b = (self._side(frame, side) for side in (self.left, self.right))
        if self.sign == "<":
            return Truth(a.high < b.low, a.low >= b.high)
        if self.sign == "<=":
            return Truth(a.high <= b.low, a.low > b.high)
        equal = (a.low == a.high) & (b.low == b.high) & (a.low == b.low)
        return Truth(equal, (a.high < b.low) | (a.low > b.high))

    @staticmethod
    def _side(frame: Frame, side: str | float) -> Numbers:
        column = frame.columns[side] if isinstance(side, str) else Numbers(np.array(side), np.array(side))
        assert isinstance(column, Numbers)
        return column


@dataclass(frozen=True, eq=False)
class OneOf(Node):
    """A choice is one of some words."""

    name: str
    codes: frozenset[int]

    @property
    def names(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.name,)

    def compute(self, frame: Frame, rules: Rules) -> Truth:
        column = frame.columns[self.name]
        assert isinstance(column, Choices)
        if len(self.codes) == 1:
            yes = column.codes == next(iter(self.codes))
        else:
            table = np.zeros(len(FACTS[self.name].words) + 1, bool)  # the last for -1
            table[list(self.codes)] = True
            yes = table[column.codes]
        return Truth(yes, ~(yes | column.unknown))


@dataclass(frozen=True, eq=False)
class Overlaps(Node):
    """A set has one of some words."""

    name: str
    bits: int

    @property
    def names(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.name,)

    def compute(self, frame: Frame, rules: Rules) -> Truth:
        column = frame.columns[self.name]
        assert isinstance(column, Sets)
        yes = (column.bits & np.uint16(self.bits)) != 0
        return Truth(yes, ~yes & column.complete)


@dataclass(frozen=True, eq=False)
class SetIs(Node):
    """A set has exactly some words."""

    name: str
    bits: int

    @property
    def names(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.name,)

    def compute(self, frame: Frame, rules: Rules) -> Truth:
        column = frame.columns[self.name]
        assert isinstance(column, Sets)
        yes = column.complete & (column.bits == self.bits)
        more = (column.bits & ~np.uint16(self.bits)) != 0  # what is known is already too much
        return Truth(yes, (column.complete & ~yes) | more)


def open_questions(node: Node, frame: Frame, rules: Rules, where: np.ndarray, found: dict[str, np.ndarray]) -> None:
    """Note which unknown facts keep a condition unknown; one that is decided anyway is not looked at.

    Args:
        node: The condition.
        frame: The cases.
        rules: Conditions that ``fired`` may name.
        where: [N], the rows to look at.
        found: Fact to [N], filled in; only facts with a question.
    """
    where = where & node(frame, rules).unknown
    if not where.any():
        return
    for child in node.children(rules):
        open_questions(child, frame, rules, where, found)
    for name in node.names:
        for base in FACTS[name].needs or (name,):
            if FACTS[base].question:
                unknown = where & frame.columns[base].unknown
                found[base] = found[base] | unknown if base in found else unknown


def reasons(node: Node, frame: Frame, rules: Rules) -> list[str]:
    """The facts that make a condition what it is, in a frame of one row.

    Of an ``and`` that holds these are the facts of every part, of one that does not hold only those of the parts that
    do not hold; the other way round for ``or``.
    """
    truth = node(frame, rules)
    state = (bool(truth.yes[0]), bool(truth.no[0]))
    children = node.children(rules)
    if isinstance(node, And | Or) and state != ((True, False) if isinstance(node, And) else (False, True)):
        parts = ((child, child(frame, rules)) for child in children)
        children = tuple(c for c, truth in parts if (bool(truth.yes[0]), bool(truth.no[0])) == state)
    names = [*node.names, *(name for child in children for name in reasons(child, frame, rules))]
    return list(dict.fromkeys(names))
