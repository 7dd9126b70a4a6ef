"""The language of the rules' conditions: parsed and type-checked at load, never evaluated as Python.

    lesion.pigmented and lesion.site in [face, lower_extremity] and not known(patient.inr)
    finding.set == {nv} and finding.p_mel < threshold.mel_review
    any(overlaps(finding.set, [bcc, akiec]), peanut in patient.allergies, fired(S01))

Facts (`facts`) and words are names; a word with a space is written with an underscore or in quotes. ``fired(S01)`` is
the condition of that rule. Three-valued: unknown and false is false, unknown or true is true, otherwise unknown.
"""

from __future__ import annotations

import ast
from collections.abc import Callable

from dermaflow.errors import KnowledgeError
from dermaflow.pathways.facts import FACTS, Fact, Kind, nearest
from dermaflow.pathways.nodes import Always, And, Compare, Fired, Is, Known, Node, Not, OneOf, Or, Overlaps, SetIs

MAX_LENGTH = 4000  # characters of a condition; a longer one is no longer read by anybody
MAX_DEPTH = 40  # of parentheses in each other


def parse(text: str, where: object = None) -> Node:
    """Read a condition.

    Args:
        text: As in the module's description.
        where: For the error message, for instance ``bcc.yaml: rule B04``.

    Returns:
        Its root; equal conditions give the same object.

    Raises:
        KnowledgeError: It is no condition, names no fact of the vocabulary, or compares what cannot be compared.
    """
    if len(text) > MAX_LENGTH:
        raise KnowledgeError(f"condition of {len(text)} characters", where=where, expected=f"at most {MAX_LENGTH}")
    text = " ".join(text.split())
    if "#" in text:  # Python would silently drop what follows
        raise KnowledgeError(f"'#' in condition {text!r}", where=where, expected="a comment outside the condition")
    try:
        tree = ast.parse(text, mode="eval")
        return _Parser(where, text).condition(tree.body)
    except SyntaxError as error:
        raise KnowledgeError(f"condition {text!r} cannot be read: {error.msg}", where=where) from None
    except (ValueError, RecursionError, MemoryError):
        raise KnowledgeError("condition cannot be read: nested too deeply or strange characters", where=where) from None


_POOL: dict[tuple[object, ...], Node] = {}


def _one(kind: Callable[..., Node], *fields: object) -> Node:
    """The node of this kind with these fields; there is only one."""
    key = (kind, *fields)
    if key not in _POOL:
        _POOL[key] = kind(*fields)
    return _POOL[key]


class _Parser:
    def __init__(self, where: object, text: str) -> None:
        self.where = where
        self.text = text

    def wrong(self, what: str, expected: str | None = None, todo: str | None = None) -> KnowledgeError:
        return KnowledgeError(f"{what} in condition {self.text!r}", where=self.where, expected=expected, todo=todo)

    def condition(self, node: ast.expr, depth: int = 0) -> Node:
        if depth > MAX_DEPTH:
            raise RecursionError

        def part(inner: ast.expr) -> Node:
            return self.condition(inner, depth + 1)

        match node:
            case ast.BoolOp(op=operator, values=values):
                return _one(And if isinstance(operator, ast.And) else Or, tuple(map(part, values)))
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return _one(Not, part(operand))
            case ast.Compare(left=left, ops=signs, comparators=others):
                pairs = zip([left, *others], signs, others, strict=False)
                parts = tuple(self.comparison(*pair) for pair in pairs)
                return parts[0] if len(parts) == 1 else _one(And, parts)
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
                return self.call(name, arguments, part)
            case ast.Name(id="always"):
                return _one(Always)
            case ast.Attribute():
                fact = self.fact(node, "bool")
                definition = parse(fact.definition, fact.name) if fact.definition else None
                return _one(Is, fact.name, definition)
        raise self.wrong(f"{ast.unparse(node)!r}", "a condition", "compare the fact, or write always")

    def call(self, name: str, arguments: list[ast.expr], part: Callable[[ast.expr], Node]) -> Node:
        match name, arguments:
            case (("any" | "all"), [_, *_]):
                return _one(Or if name == "any" else And, tuple(map(part, arguments)))
            case "known", [fact]:
                return self.known(fact)
            case "unknown", [fact]:
                return _one(Not, self.known(fact))
            case "fired", [ast.Name(id=rule)]:
                return _one(Fired, rule)
            case "overlaps", [fact, (ast.List() | ast.Set() | ast.Tuple()) as words]:
                found = self.fact(fact, "set")
                return _one(Overlaps, found.name, self.bits(words, found))
        expected = "any(...), all(...), known(fact), unknown(fact), fired(RULE) or overlaps(fact, [words])"
        raise self.wrong(f"{name}(...)", expected)

    def known(self, node: ast.expr) -> Node:
        fact = self.fact(node)
        if fact.definition:
            raise self.wrong(f"known({fact.name}), which is derived", "a fact that can be asked for")
        return _one(Known, fact.name)

    def comparison(self, left: ast.expr, sign: ast.cmpop, right: ast.expr) -> Node:
        negated = isinstance(sign, ast.NotEq | ast.NotIn)
        node = self.membership(left, right) if isinstance(sign, ast.In | ast.NotIn) else self.order(left, sign, right)
        return _one(Not, node) if negated else node

    def membership(self, left: ast.expr, right: ast.expr) -> Node:
        if isinstance(right, ast.Attribute):
            fact = self.fact(right, "set")
            return _one(Overlaps, fact.name, 1 << self.word(left, fact))
        if isinstance(right, ast.List | ast.Set | ast.Tuple):
            fact = self.fact(left, "choice")
            return _one(OneOf, fact.name, frozenset(self.word(word, fact) for word in right.elts))
        raise self.wrong(f"{ast.unparse(right)!r} after `in`", "[word, word] or a set fact")

    def order(self, left: ast.expr, sign: ast.cmpop, right: ast.expr) -> Node:
        if isinstance(sign, ast.Eq | ast.NotEq) and isinstance(left, ast.Attribute):
            fact = self.fact(left)
            if fact.kind == "choice":
                return _one(OneOf, fact.name, frozenset([self.word(right, fact)]))
            if fact.kind == "set":
                return _one(SetIs, fact.name, self.bits(right, fact))
            if fact.kind == "bool":
                raise self.wrong(
                    f"{ast.unparse(right)!r} compared with {fact.name}", f"`{fact.name}` or `not {fact.name}`"
                )
        a, b = self.number(left), self.number(right)
        if not isinstance(a, str) and not isinstance(b, str):
            raise self.wrong("two numbers compared", "a fact on one side")
        match sign:
            case ast.Lt():
                return _one(Compare, "<", a, b)
            case ast.LtE():
                return _one(Compare, "<=", a, b)
            case ast.Gt():
                return _one(Compare, "<", b, a)
            case ast.GtE():
                return _one(Compare, "<=", b, a)
            case ast.Eq() | ast.NotEq():
                return _one(Compare, "==", a, b)
        raise self.wrong("`is`", "== != < <= > >= in")

    def number(self, node: ast.expr) -> str | float:
        match node:
            case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
                return float(value)
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
                return -float(value)
            case ast.Attribute():
                return self.fact(node, "number").name
        raise self.wrong(f"{ast.unparse(node)!r}", "a number or a number fact")

    def fact(self, node: ast.expr, kind: Kind | None = None) -> Fact:
        name = ast.unparse(node)
        if name not in FACTS:
            near = nearest(name, list(FACTS))
            raise self.wrong(
                f"unknown fact {name!r}", "a fact of the vocabulary", f"did you mean {near}?" if near else None
            )
        fact = FACTS[name]
        if kind and fact.kind != kind:
            hint = {"bool": f"a yes/no fact; {name} is a {fact.kind}: compare it"}.get(kind, f"a {kind}")
            raise self.wrong(f"{name}, a {fact.kind} fact", hint)
        return fact

    def word(self, node: ast.expr, fact: Fact) -> int:
        match node:
            case ast.Name(id=text) | ast.Constant(value=str() as text):
                pass
            case ast.Constant(value=int() as value):
                text = str(value)
            case _:
                raise self.wrong(f"{ast.unparse(node)!r}", f"a word of {fact.name}")
        words = [word.replace(" ", "_") for word in fact.words]
        if text.replace(" ", "_") in words:
            return words.index(text.replace(" ", "_"))
        near = nearest(text, words)
        todo = f"write unknown({fact.name})" if text == "unknown" else f"did you mean {near}?" if near else None
        raise self.wrong(f"{text!r} is no word of {fact.name}", "one of " + " ".join(words), todo)

    def bits(self, node: ast.expr, fact: Fact) -> int:
        if isinstance(node, ast.Dict) and not node.keys:  # {} is Python's empty dictionary
            return 0
        if not isinstance(node, ast.List | ast.Set | ast.Tuple):
            raise self.wrong(f"{ast.unparse(node)!r}", "{word, word}")
        return sum(1 << code for code in {self.word(word, fact) for word in node.elts})
