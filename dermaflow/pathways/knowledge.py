"""The knowledge base: rules, options, texts and utilities as YAML that a clinician can read, and how they are checked.

A folder holds ``options.yaml`` (a list of `CatalogueOption`), ``texts.yaml`` (key: text for the shared decision),
``utilities.yaml`` (`Utilities`, optional) and rules (a list of `Rule`) in every other ``.yaml`` file, read in the order
of `FILES`, which is the order of the decision.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from dermaflow.errors import KnowledgeError
from dermaflow.pathways.conditions import parse
from dermaflow.pathways.facts import nearest
from dermaflow.pathways.nodes import Node
from dermaflow.pathways.rules import CatalogueOption, Effect, Rule, Utilities

FOLDER = Path(__file__).parent / "knowledge"

FILES = (
    "gates.yaml", "safety.yaml", "melanoma.yaml", "naevus.yaml", "bcc.yaml", "akiec.yaml", "bkl.yaml", "df.yaml",
    "vascular.yaml", "contraindications.yaml", "follow_up.yaml", "system.yaml",
)  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """Something wrong in a knowledge base."""

    level: Literal["error", "warning"]
    where: str  # file, and rule if it is in one
    message: str


@dataclass(frozen=True, eq=False)
class Knowledge:
    """A knowledge base that was checked."""

    rules: tuple[Rule, ...]
    options: dict[str, CatalogueOption]
    texts: dict[str, str]
    utilities: Utilities | None
    conditions: dict[str, Node]  # of each rule
    parts: dict[str, tuple[Node, ...]]  # `when` of the entries of its `urgency_when`, then of its `restrict_when`
    files: dict[str, str]  # name of the file each rule is in
    sha256: str

    @property
    def version(self) -> str:
        """How many rules there are and how many a clinician has reviewed."""
        reviewed = sum(rule.reviewed_by is not None for rule in self.rules)
        state = "reviewed" if reviewed == len(self.rules) else f"draft, {reviewed} reviewed"
        return f"{len(self.rules)} rules, {state}"

    def rule(self, rule_id: str) -> Rule:
        """Raises KnowledgeError if there is no such rule."""
        for rule in self.rules:
            if rule.id == rule_id:
                return rule
        raise KnowledgeError(f"no rule {rule_id!r}", expected=f"one of {len(self.rules)} rules", todo=_did_you_mean(
            rule_id, [rule.id for rule in self.rules]
        ))  # fmt: skip

    def members(self, names: Iterable[str]) -> list[str]:
        """Option ids for ids and groups, each once, in order."""
        found: dict[str, None] = {}
        for name in names:
            found |= dict.fromkeys([o.id for o in self.options.values() if o.group == name] or [name])
        return list(found)


def load_knowledge(folder: Path | None = None, utilities: Path | None = None) -> Knowledge:
    """Read and check a knowledge base.

    Args:
        folder: With the YAML files; default the one that comes with DermaFlow.
        utilities: A site's own ``utilities.yaml``.

    Returns:
        The knowledge base.

    Raises:
        KnowledgeError: A file cannot be read, a rule does not fit the schema or does not make sense; names the first
            problem and says how many there are.
    """
    knowledge, problems = read_knowledge(folder, utilities)
    if problems or knowledge is None:
        more = f"dermaflow pathways lint lists all {len(problems)} problems" if len(problems) > 1 else None
        raise KnowledgeError(problems[0].message, where=problems[0].where, todo=more)
    return knowledge


def read_knowledge(folder: Path | None = None, utilities: Path | None = None) -> tuple[Knowledge | None, list[Problem]]:
    """As `load_knowledge`, but with all problems instead of the first; the knowledge base is None if there are any."""
    reader = _Reader(folder or FOLDER)
    return reader.read(utilities), reader.problems


T = TypeVar("T")


class _Reader:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problems: list[Problem] = []
        self.digest = hashlib.sha256()

    def read(self, utilities: Path | None) -> Knowledge | None:
        names = sorted(path.name for path in self.folder.glob("*.yaml"))
        order = [*(name for name in FILES if name in names), *(name for name in names if name not in FILES)]
        special = {"options.yaml", "texts.yaml", "utilities.yaml"}
        if not set(order) - special:
            self.wrong(str(self.folder), "no rules here; expected a folder with gates.yaml, options.yaml and so on")
            return None
        options = self.options()
        texts = self.one("texts.yaml", dict[str, str]) or {}
        used = utilities or (self.folder / "utilities.yaml" if "utilities.yaml" in names else None)
        table = self.document(used, used.name, Utilities) if used else None
        rules: dict[str, Rule] = {}
        files: dict[str, str] = {}
        for name in order:
            for rule in [] if name in special else self.items(name, Rule):
                if rule.id in rules:
                    self.wrong(f"{name}: rule {rule.id}", f"its id is taken in {files[rule.id]}")
                rules[rule.id], files[rule.id] = rule, name
        parsed = self.conditions(rules, files)
        self.references(rules, files, options, texts, table)
        if self.problems:
            return None
        conditions = {rule: nodes[0] for rule, nodes in parsed.items()}
        parts = {rule: tuple(nodes[1:]) for rule, nodes in parsed.items()}
        return Knowledge(
            tuple(rules.values()), options, texts, table, conditions, parts, files, self.digest.hexdigest()
        )

    def wrong(self, where: str, message: str) -> None:
        self.problems.append(Problem("error", where, message))

    def options(self) -> dict[str, CatalogueOption]:
        options: dict[str, CatalogueOption] = {}
        for option in self.items("options.yaml", CatalogueOption):
            if option.id in options:
                self.wrong(f"options.yaml: option {option.id}", "a second option with this id")
            options[option.id] = option
        return options

    def one(self, name: str, kind: type[T]) -> T | None:
        return self.document(self.folder / name, name, kind)

    def content(self, path: Path, name: str) -> Any:
        """What a YAML file holds; None where it cannot be read, which is noted."""
        try:
            data = path.read_bytes()
            self.digest.update(f"{name}\0{len(data)}\0".encode() + data)
            return yaml.load(data, _Loader)
        except OSError as error:
            self.wrong(name, f"cannot be read: {error.strerror}")
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            self.wrong(name, "no YAML: " + " ".join(str(error).split()))
        return None

    def document(self, path: Path, name: str, kind: type[T]) -> T | None:
        content = self.content(path, name)
        return None if content is None else self.fits(content, name, kind)

    def items(self, name: str, kind: type[T]) -> list[T]:
        content = self.content(self.folder / name, name)
        if content is None:
            return []
        if not isinstance(content, list):
            self.wrong(name, f"holds a {type(content).__name__}, expected a list of entries that start with '- id:'")
            return []
        label = "rule" if kind is Rule else "option"
        found = []
        for number, item in enumerate(content, 1):
            title = item.get("id") if isinstance(item, dict) else None
            fitting = self.fits(item, f"{name}: {label} {title or f'number {number}'}", kind)
            if fitting is not None:
                found.append(fitting)
        return found

    def fits(self, content: Any, where: str, kind: type[T]) -> T | None:
        try:
            return TypeAdapter(kind).validate_python(content)
        except ValidationError as error:
            for problem in error.errors(include_url=False):
                field = ".".join(map(str, problem["loc"]))
                todo = ""
                if problem["type"] == "extra_forbidden":
                    known = [*Rule.model_fields, *(f.alias or n for n, f in Effect.model_fields.items())]
                    todo = _did_you_mean(field.rpartition(".")[2], known) or ""
                self.wrong(where, " ".join(f"{field}: {problem['msg']}. {todo}".split()))
        return None

    def conditions(self, rules: dict[str, Rule], files: dict[str, str]) -> dict[str, list[Node]]:
        """Parse what every rule says: its `when`, then those of its `urgency_when` and `restrict_when`."""
        parsed: dict[str, list[Node]] = {rule: [] for rule in rules}
        refers: dict[str, set[str]] = {}
        for rule in rules.values():
            where = f"{files[rule.id]}: rule {rule.id}"
            refers[rule.id] = set()
            effect = rule.effect
            texts = [rule.when, *(a.when for a in effect.urgency_when), *(r.when for r in effect.restrict_when)]
            for text in texts:
                try:
                    node = parse(text)
                except KnowledgeError as error:
                    self.wrong(where, str(error))
                    continue
                parsed[rule.id].append(node)
                named = node.rules_named()
                for name in sorted(named - set(rules)):
                    self.wrong(where, f"fired({name}), but there is no rule {name}")
                refers[rule.id] |= named & set(rules)
        for cycle in _cycles(refers):
            self.wrong(f"{files[cycle[0]]}: rule {cycle[0]}", "refers to itself: " + " -> ".join([*cycle, cycle[0]]))
        return parsed

    def references(
        self, rules: dict[str, Rule], files: dict[str, str], options: dict[str, CatalogueOption],
        texts: dict[str, str], utilities: Utilities | None,
    ) -> None:  # fmt: skip
        known = [*options, *dict.fromkeys(option.group for option in options.values())]
        for rule in rules.values():
            where = f"{files[rule.id]}: rule {rule.id}"
            for kind, names, catalogue in (
                ("option or group", rule.effect.options, known), ("text", set(rule.effect.text), list(texts))
            ):  # fmt: skip
                for name in sorted(names - set(catalogue)):
                    self.wrong(where, f"unknown {kind} {name!r}. {_did_you_mean(name, catalogue) or ''}".strip())
        if utilities and utilities.rule not in rules:
            self.wrong("utilities.yaml", f"rule: there is no rule {utilities.rule}")


class _Loader(yaml.SafeLoader):
    """A key given twice is a mistake, not a correction."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _did_you_mean(word: str, words: list[str]) -> str | None:
    near = nearest(word, words)
    return f"Did you mean {near}?" if near else None


def _cycles(refers: dict[str, set[str]]) -> list[list[str]]:
    """Rings of rules that refer to each other, each once."""
    rings: dict[frozenset[str], list[str]] = {}
    done: set[str] = set()

    def follow(rule: str, path: list[str]) -> None:
        if rule in path:
            ring = path[path.index(rule) :]
            rings.setdefault(frozenset(ring), ring)
        elif rule not in done:
            for other in sorted(refers[rule]):
                follow(other, [*path, rule])
            done.add(rule)

    for rule in refers:
        follow(rule, [])
    return list(rings.values())
