"""Decide many cases at once: which rules hold, how urgent it is, what is offered, blocked and still to be asked.

Everything is an array with one column a case. The order of the decision is that of the reference (D3): gates, clinical
triggers, thresholds, conformal sets and expected utility each give an urgency, the most urgent wins; contraindications
and modifiers then filter and order the options.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from dermaflow.pathways.columns import Choices, Frame, Truth
from dermaflow.pathways.facts import FACTS, IMAGE_FACTS
from dermaflow.pathways.knowledge import Knowledge
from dermaflow.pathways.nodes import And, Node, open_questions
from dermaflow.pathways.rules import Rule
from dermaflow.pathways.utilities import NO_LEVEL, best_actions, expected_utilities
from dermaflow.schemas.pathway import URGENCIES, Urgency

DEFAULT_LEVEL = 3  # of a case that no rule says anything about: routine dermatology

REASSURE = "reassure"

STANDS_UNTIL = {REASSURE: 5, "refer_routine": 3, "refer_soon": 2}
"""An option that a more urgent case rules out, and the level down to which it stands."""

REFERRALS = {1: "refer_urgent", 2: "refer_soon", 3: "refer_routine"}
"""What a case of this level is offered whatever else is."""

NOT_ASSESSABLE_GROUPS = ("diagnostic", "referral")
"""Options of a case without a class; no treatment is among them."""

NOT_OFFERED = np.iinfo(np.int32).max
_BLOCKED, _RANKED = 1_000_000, 100_000  # far more than there are offers

ASKED = tuple(fact.name for fact in FACTS.values() if fact.question)
"""Facts that may be missing, in the order of `Decisions.missing`."""


class Restricted(NamedTuple):
    """Options that a rule blocks, or wants used with caution, and when."""

    rule: int
    node: Node
    options: list[int]
    blocks: bool


@dataclass(frozen=True, eq=False)
class Plan:
    """A knowledge base as numbers. Rules [R] and options [O] are in its order."""

    knowledge: Knowledge
    nodes: list[Node]
    levels: np.ndarray  # [R], the most urgent level a rule can give, NO_LEVEL if none
    fixed: np.ndarray  # [R], the level it always gives
    alternatives: list[tuple[int, Node, int]]  # rule, when, level
    holds_unknown: np.ndarray  # [R]
    reassures: np.ndarray  # [R]
    forbids: np.ndarray  # [R], no reassurance
    gates: np.ndarray  # [R]
    raises: np.ndarray  # [R]
    speaks: np.ndarray  # [R], says something that is worth a question by itself
    sees_image: np.ndarray  # [R], cannot be decided without a class or a probability
    offers: list[tuple[int, int, int]]  # rule, option, place; the lowest place comes first
    restrictions: list[Restricted]
    ranks: list[tuple[int, int, int]]  # rule, option, shift of its place
    treatment: np.ndarray  # [O], not for a case without a class
    stands_until: dict[int, int]  # option, level
    referrals: dict[int, int]  # level, option
    reassurance: int  # option, -1 if there is none
    decider: int  # the rule that carries what no other does: expected utility, and the default; -1 if there is none


@lru_cache(maxsize=8)
def make_plan(knowledge: Knowledge) -> Plan:
    """Prepare a knowledge base for `decide`."""
    rules, option = knowledge.rules, {name: o for o, name in enumerate(knowledge.options)}
    fixed = np.array([_level(rule.effect.urgency) for rule in rules])
    fixed[[rule.effect.reassure for rule in rules]] = 5
    alternatives = [
        (r, knowledge.parts[rule.id][k], _level(alternative.urgency))
        for r, rule in enumerate(rules)
        for k, alternative in enumerate(rule.effect.urgency_when)
    ]
    levels = fixed.copy()
    for r, _, level in alternatives:
        levels[r] = min(levels[r], level)
    offers = [(r, option[name]) for r, rule in enumerate(rules) for name in knowledge.members(rule.effect.offer)]
    # what an urgent rule offers comes first; a rule that gives no urgency stands after those of routine dermatology
    order = sorted(offers, key=lambda offer: 3.5 if levels[offer[0]] == NO_LEVEL else levels[offer[0]])
    return Plan(
        knowledge=knowledge,
        nodes=[knowledge.conditions[rule.id] for rule in rules],
        levels=levels,
        fixed=fixed,
        alternatives=alternatives,
        holds_unknown=np.array([rule.if_unknown == "hold" for rule in rules]),
        reassures=np.array([rule.effect.reassure for rule in rules]),
        forbids=np.array([rule.effect.no_reassurance for rule in rules]),
        gates=np.array([rule.effect.gate is not None for rule in rules]),
        raises=np.array([rule.effect.raise_ for rule in rules]),
        speaks=np.array([_speaks(rule, level) for rule, level in zip(rules, levels.tolist(), strict=True)]),
        sees_image=np.array([_sees_image(knowledge.conditions[rule.id], knowledge) for rule in rules]),
        offers=[(r, o, place) for place, (r, o) in enumerate(order)],
        restrictions=[
            Restricted(r, node, [option[name] for name in knowledge.members(names)], blocks)
            for r, rule in enumerate(rules)
            for node, names, blocks in _restrictions(rule, knowledge)
        ],
        ranks=[
            (r, option[name], shift + place)
            for r, rule in enumerate(rules)
            for names, shift in ((rule.effect.rank_first, -_RANKED), (rule.effect.rank_last, _RANKED))
            for place, name in enumerate(knowledge.members(names))
        ],
        treatment=np.array([o.group not in NOT_ASSESSABLE_GROUPS for o in knowledge.options.values()], bool),
        stands_until={option[name]: level for name, level in STANDS_UNTIL.items() if name in option},
        referrals={level: option[name] for level, name in REFERRALS.items() if name in option},
        reassurance=option.get(REASSURE, -1),
        decider=[rule.id for rule in rules].index(knowledge.utilities.rule) if knowledge.utilities else -1,
    )


def _restrictions(rule: Rule, knowledge: Knowledge) -> list[tuple[Node, tuple[str, ...], bool]]:
    """When, options, and whether they are blocked, of the restrictions that are not empty."""
    effect, node = rule.effect, knowledge.conditions[rule.id]
    found = [(node, effect.block, True), (node, effect.caution, False)]
    parts = knowledge.parts[rule.id][len(effect.urgency_when) :]
    for part, when in zip(effect.restrict_when, parts, strict=True):
        both = And((node, when))
        found += [(both, part.block, True), (both, part.caution, False)]
    return [restriction for restriction in found if restriction[1]]


def _speaks(rule: Rule, level: int) -> bool:
    effect = rule.effect  # the notice of a rule that gives an urgency is only worth a question if the urgency is
    return effect.follow_up or (level == NO_LEVEL and (effect.notice or bool(effect.text)))


def _sees_image(node: Node, knowledge: Knowledge) -> bool:
    return any(IMAGE_FACTS.intersection(part.names) for part in node.walk(knowledge.conditions))


@dataclass(frozen=True, eq=False)
class Decisions:
    """What was decided of N cases."""

    holds: np.ndarray  # [R, N]
    unknown: np.ndarray  # [R, N]
    matters: np.ndarray  # [R, N], unknown, and the answer could change something
    level: np.ndarray  # [N], 1 to 5 for U1 to U5
    level_by: np.ndarray  # [R, N], the rules that give this urgency
    assessable: np.ndarray  # [N]
    confirmed: np.ndarray  # [N], by histology
    dx: np.ndarray  # [N], index of the class, -1 unknown
    action: np.ndarray  # [N], index of the action with the highest expected utility, -1 if none
    place: np.ndarray  # [O, N], order of the options, NOT_OFFERED for the others
    blocked: np.ndarray  # [O, N]; this and the next two are among those offered
    locked: np.ndarray  # [O, N]
    caution: np.ndarray  # [O, N]
    missing: np.ndarray  # [len(ASKED), N]


def decide(frame: Frame, plan: Plan) -> Decisions:
    """Decide the cases of a frame.

    Args:
        frame: Of `build_frame`, N cases.
        plan: Of `make_plan`.

    Returns:
        Arrays with one column a case; the same case gives the same column in whatever company.
    """
    conditions = plan.knowledge.conditions
    truths = [node(frame, conditions) for node in plan.nodes]
    yes = np.stack([truth.yes for truth in truths])
    unknown = ~(yes | np.stack([truth.no for truth in truths]))
    holds = yes | unknown & plan.holds_unknown[:, None]

    dx, prediction, confirmed = (frame.columns[name] for name in ("case.dx", "finding.prediction", "case.confirmed"))
    assert isinstance(dx, Choices) and isinstance(prediction, Choices) and isinstance(confirmed, Truth)
    assessable = (confirmed.yes | ~prediction.unknown) & ~holds[plan.gates].any(axis=0)
    level, level_by, action, could_reassure, possible = _urgency(frame, plan, yes, unknown, holds, assessable)
    place, blocked, locked, caution = _options(frame, plan, holds, level, assessable)
    matters = unknown & _matters(plan, possible, level, could_reassure, place, assessable)
    found: dict[str, np.ndarray] = {}
    for r in np.flatnonzero(matters.any(axis=1)).tolist():
        open_questions(plan.nodes[r], frame, conditions, matters[r], found)
    for _, node, options, _ in plan.restrictions:
        offered = np.asarray((place[options] < NOT_OFFERED).any(axis=0))
        open_questions(node, frame, conditions, offered, found)
    nothing = np.zeros(frame.rows, bool)
    return Decisions(
        holds, unknown, matters, level, level_by, assessable, confirmed.yes, np.where(assessable, dx.codes, -1), action,
        place, blocked, locked, caution, np.stack([found.get(name, nothing) for name in ASKED]),
    )  # fmt: skip


def _urgency(
    frame: Frame, plan: Plan, yes: np.ndarray, unknown: np.ndarray, holds: np.ndarray, assessable: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """How urgent it is, step by step.

    Returns:
        Level [N], the rules that give it [R, N], the best action [N], where no rule is more urgent than U5 [N], and the
        level that each rule would give if it held [R, N].
    """
    conditions, utilities = plan.knowledge.conditions, plan.knowledge.utilities
    # what is unknown counts where it makes a case more urgent than the default, never where it makes it less urgent
    certain = np.where((plan.fixed > DEFAULT_LEVEL)[:, None], yes, holds)
    levels = np.where(certain, plan.fixed[:, None], NO_LEVEL).astype(np.int8)
    possible = np.repeat(plan.fixed[:, None], frame.rows, axis=1)  # if the rule held
    for r, node, alternative in plan.alternatives:
        truth = node(frame, conditions)
        possible[r] = np.where(truth.no, possible[r], np.minimum(possible[r], alternative))
        applies = yes[r] & truth.yes if alternative > DEFAULT_LEVEL else holds[r] & ~truth.no
        levels[r] = np.where(applies, np.minimum(levels[r], alternative), levels[r])
    action = np.full(frame.rows, -1)
    if utilities:
        action, by_utility = best_actions(expected_utilities(frame, utilities), utilities)
        applies = assessable & (action >= 0)
        action = np.where(applies, action, -1)
        levels[plan.decider] = np.where(applies, np.minimum(levels[plan.decider], by_utility), levels[plan.decider])
    level = levels.min(axis=0)
    could_reassure = level >= 5

    by = levels == level
    by[:, level == NO_LEVEL] = False
    if plan.decider >= 0:
        by[plan.decider] |= level == NO_LEVEL
    level = np.where(level == NO_LEVEL, DEFAULT_LEVEL, level)

    # U5 is not said while an answer could still make the case more urgent. It falls no further than the mildest answer
    # would, so that the answer itself never makes a case less urgent.
    forbids = (plan.forbids | plan.gates)[:, None]
    open_rules = unknown & ~holds & ((possible < 5) | forbids | (plan.raises > 0)[:, None])
    routine = (open_rules & ((possible <= DEFAULT_LEVEL) | forbids)).any(axis=0)
    limits: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = [
        (np.where(routine, 3, 4), open_rules.any(axis=0) & (level == 5), open_rules),
        (np.array(3), holds[plan.forbids].any(axis=0), holds & plan.forbids[:, None]),
        (np.array(2), ~assessable, holds & plan.gates[:, None]),
    ]
    for limit, applies, rules in limits:
        applies = applies & (level > limit)
        level, by = np.where(applies, limit, level), np.where(applies, rules, by)
    raised = np.where(holds, plan.raises[:, None], 0)
    shift = raised.max(axis=0)
    by = by | (raised > 0) & (level > 1)
    return np.maximum(level - shift, 1).astype(np.int8), by, action, could_reassure, possible


def _options(
    frame: Frame, plan: Plan, holds: np.ndarray, level: np.ndarray, assessable: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Place, and whether blocked, locked, to be used with caution: all [O, N]."""
    shape = (len(plan.knowledge.options), len(level))
    place = np.full(shape, NOT_OFFERED, np.int32)
    blocked, locked, caution = np.zeros(shape, bool), np.zeros(shape, bool), np.zeros(shape, bool)
    for referral_level, o in plan.referrals.items():
        place[o, level == referral_level] = 0
    for r, o, where in plan.offers:
        # of what a reassuring rule offers, only the reassurance itself stays in sight where it may not be given
        offers = holds[r] & (level == 5) if plan.reassures[r] and o != plan.reassurance else holds[r]
        place[o] = np.minimum(place[o], np.where(offers, where + 1, NOT_OFFERED))
    place[plan.treatment[:, None] & ~assessable] = NOT_OFFERED
    offered = place < NOT_OFFERED
    for r, o, shift in plan.ranks:
        place[o] += np.where(holds[r] & offered[o], shift, 0)
    for r, node, options, blocks in plan.restrictions:
        truth = node(frame, plan.knowledge.conditions)
        applies = ~truth.no if plan.holds_unknown[r] else truth.yes
        for o in options:
            (blocked if blocks else caution)[o] |= applies
            locked[o] |= ~(applies | truth.no)
    for o, until in plan.stands_until.items():
        blocked[o] |= level < until
    blocked &= offered
    locked &= offered & ~blocked
    place[blocked] += _BLOCKED
    return place, blocked, locked, caution & offered & ~blocked & ~locked


def _matters(
    plan: Plan,
    possible: np.ndarray,
    level: np.ndarray,
    could_reassure: np.ndarray,
    place: np.ndarray,
    assessable: np.ndarray,
) -> np.ndarray:
    """Where knowing whether a rule holds could change the result, options that it restricts aside [R, N]."""
    held_back = could_reassure & (level < 5)
    urgent = possible < level
    urgent |= plan.holds_unknown[:, None] & (possible == level)  # it holds now, but might not
    urgent |= held_back & ((possible < 5) | plan.reassures[:, None])
    urgent |= (plan.raises > 0)[:, None] & (level > 1)
    urgent |= plan.gates[:, None] & (level > 2)
    urgent |= plan.forbids[:, None] & ((level > 3) | held_back)
    offered = place < NOT_OFFERED
    wanted = plan.speaks[:, None] | urgent
    for r, o, _ in plan.offers:
        if not plan.reassures[r]:
            wanted[r] |= ~offered[o] & (assessable | ~plan.treatment[o])
    for r, o, _ in plan.ranks:
        wanted[r] |= offered[o]
    return wanted & (assessable | ~plan.sees_image[:, None])


def _level(urgency: Urgency | None) -> int:
    return NO_LEVEL if urgency is None else URGENCIES.index(urgency) + 1
