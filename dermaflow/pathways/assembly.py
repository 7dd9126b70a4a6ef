"""The pathway of one case, in words: what was decided (`decision`), by which rules, and why."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from dermaflow import __version__
from dermaflow.pathways.columns import Frame, Thresholds
from dermaflow.pathways.decision import ASKED, NOT_OFFERED, Decisions, Plan, Restricted
from dermaflow.pathways.facts import FACTS
from dermaflow.pathways.nodes import Node, open_questions, reasons
from dermaflow.pathways.utilities import expected_utilities
from dermaflow.schemas.finding import LesionFinding
from dermaflow.schemas.pathway import (
    URGENCIES,
    Fired,
    Line,
    Missing,
    Option,
    OptionStatus,
    Pathway,
    Versions,
)  # fmt: skip
from dermaflow.schemas.patient import Lesion, Patient
from dermaflow.taxonomy import CODES


def assemble(
    plan: Plan,
    decisions: Decisions,
    frame: Frame,
    patient: Patient,
    lesion: Lesion,
    finding: LesionFinding | None,
    thresholds: Thresholds,
) -> Pathway:
    """Put one case into words.

    Args:
        plan: Of the knowledge base.
        decisions: Of this case alone.
        frame: Of this case alone.
        patient: The person.
        lesion: The lesion.
        finding: What the model says of it, None if there is no picture.
        thresholds: That the decision was made with.

    Returns:
        The pathway, preliminary.
    """
    return _Assembly(plan, decisions, frame).pathway(patient, lesion, finding, thresholds)


class _Assembly:
    def __init__(self, plan: Plan, decisions: Decisions, frame: Frame) -> None:
        self.plan, self.decisions, self.frame = plan, decisions, frame
        self.rules = plan.knowledge.rules
        self.conditions = plan.knowledge.conditions
        self.level = int(decisions.level[0])
        self.holding = np.flatnonzero(decisions.holds[:, 0]).tolist()
        # what a reassuring rule says is only said where it may reassure
        self.speaking = [r for r in self.holding if self.level == 5 or not plan.reassures[r]]
        self.deciding = np.flatnonzero(decisions.level_by[:, 0]).tolist()

    def pathway(
        self, patient: Patient, lesion: Lesion, finding: LesionFinding | None, thresholds: Thresholds
    ) -> Pathway:
        knowledge, decisions = self.plan.knowledge, self.decisions
        assessable, confirmed = bool(decisions.assessable[0]), bool(decisions.confirmed[0])
        picture = finding if finding and assessable and not confirmed else None
        dx = int(decisions.dx[0])
        # a rule that counts as holding because nobody knows tells the patient nothing
        certain = [r for r in self.speaking if not decisions.unknown[r, 0]]
        texts = dict.fromkeys(key for r in certain for key in self.rules[r].effect.text)
        return Pathway(
            patient_id=patient.patient_id,
            lesion_id=lesion.lesion_id,
            image_ids=list(finding.image_ids) if finding else [],
            assessable=assessable,
            basis="none" if not assessable else "histology" if confirmed else "image",
            prediction=CODES[dx] if dx >= 0 else None,
            probabilities=dict(zip(CODES, picture.p, strict=True)) if picture else {},
            conformal_set=list(picture.conformal_set) if picture else [],
            p_malignant=picture.p_malignant if picture else None,
            quality_flags=list(finding.quality_flags) if finding else [],
            urgency=URGENCIES[self.level - 1],
            urgency_rules=[self.rules[r].id for r in self.deciding],
            notices=self.lines(r for r in self.speaking if self.rules[r].effect.notice or self.plan.gates[r]),
            options=self.options(),
            follow_up=self.lines(r for r in self.speaking if self.rules[r].effect.follow_up),
            missing=self.missing(),
            patient_texts={key: knowledge.texts[key] for key in texts},
            trace=self.trace(),
            versions=Versions(
                model=finding.model if finding else "none",
                model_sha256=finding.model_sha256 if finding else "",
                knowledge_base=knowledge.version,
                knowledge_sha256=knowledge.sha256,
                thresholds=dict(vars(thresholds)),
                dermaflow=__version__,
            ),
        )

    def lines(self, rules: Iterable[int]) -> list[Line]:
        """A line for each of some rules, in their order."""
        found = (self.rules[r] for r in sorted(set(rules)))
        return [Line(rule=r.id, text=r.action, source=r.cited, verification=r.verification) for r in found]

    def options(self) -> list[Option]:
        place = self.decisions.place[:, 0]
        order = [o for o in np.argsort(place, kind="stable").tolist() if place[o] < NOT_OFFERED]
        return [self.option(o) for o in order]

    def option(self, o: int) -> Option:
        catalogue = list(self.plan.knowledge.options.values())[o]
        status: OptionStatus = "available"
        for name in ("caution", "locked", "blocked"):
            if getattr(self.decisions, name)[o, 0]:
                status = name
        held, unknown = self.restrictions(o)
        if status == "blocked":
            rules = {restricted.rule for restricted in held if restricted.blocks}
            if self.level < self.plan.stands_until.get(o, 0):
                rules.update(self.deciding)
        else:
            rules = {restricted.rule for restricted in (*held, *unknown)}
        found: dict[str, np.ndarray] = {}
        if status == "locked":
            for restricted in unknown:
                self.questions(restricted.node, found)
        offering = {r for r, option, _ in self.plan.offers if option == o and self.decisions.holds[r, 0]}
        return Option(
            option=catalogue.id,
            title=catalogue.title,
            group=catalogue.group,
            status=status,
            offered_by=self.lines(offering or self.deciding),  # the referral that belongs to an urgency
            restrictions=self.lines(rules),
            confirm=[name for name in ASKED if name in found],
        )

    def restrictions(self, o: int) -> tuple[list[Restricted], list[Restricted]]:
        """Those on an option that hold, and those of which it is unknown."""
        held: list[Restricted] = []
        unknown: list[Restricted] = []
        for restricted in self.plan.restrictions:
            truth = restricted.node(self.frame, self.conditions)
            if o not in restricted.options or truth.no[0]:
                continue
            certain = truth.yes[0] or self.plan.holds_unknown[restricted.rule]
            (held if certain else unknown).append(restricted)
        return held, unknown

    def questions(self, node: Node, found: dict[str, np.ndarray]) -> None:
        open_questions(node, self.frame, self.conditions, np.ones(1, bool), found)

    def missing(self) -> list[Missing]:
        """The open questions, those that matter to most rules first."""
        offered = self.decisions.place[:, 0] < NOT_OFFERED
        open_rules = [(r, self.plan.nodes[r]) for r in np.flatnonzero(self.decisions.matters[:, 0]).tolist()]
        open_rules += [(part.rule, part.node) for part in self.plan.restrictions if offered[part.options].any()]
        asked_by: dict[str, set[int]] = {}
        for r, node in open_rules:
            found: dict[str, np.ndarray] = {}
            self.questions(node, found)
            for name in found:
                asked_by.setdefault(name, set()).add(r)
        order = sorted(asked_by, key=lambda name: (-len(asked_by[name]), ASKED.index(name)))
        return [
            Missing(
                fact=name, question=FACTS[name].question or "", rules=[self.rules[r].id for r in sorted(asked_by[name])]
            )
            for name in order
        ]

    def trace(self) -> list[Fired]:
        """Every rule that holds, with the facts that make it hold."""
        trace = []
        for r in self.holding:
            names = reasons(self.plan.nodes[r], self.frame, self.conditions)
            facts = {name: self.frame.value(name, 0) for name in names}
            if r == self.plan.decider and self.decisions.action[0] >= 0 and self.plan.knowledge.utilities:
                utilities = self.plan.knowledge.utilities
                expected = expected_utilities(self.frame, utilities)[:, 0]
                facts["expected_utility"] = {
                    a.id: round(float(e), 6) for a, e in zip(utilities.actions, expected, strict=True)
                }
                facts["best_action"] = utilities.actions[self.decisions.action[0]].id
            trace.append(Fired(rule=self.rules[r].id, facts=facts))
        return trace
