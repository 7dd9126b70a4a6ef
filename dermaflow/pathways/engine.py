"""Recommend: people, lesions and findings in, pathways out; one lesion or a hundred thousand take the same way."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from dermaflow import __version__
from dermaflow.errors import DataError
from dermaflow.pathways.assembly import assemble
from dermaflow.pathways.columns import Frame, Thresholds, build_frame
from dermaflow.pathways.decision import ASKED, NOT_OFFERED, Decisions, Plan, decide, make_plan
from dermaflow.pathways.knowledge import Knowledge
from dermaflow.schemas.finding import LesionFinding
from dermaflow.schemas.pathway import URGENCIES, Pathway
from dermaflow.schemas.patient import Lesion, Patient
from dermaflow.taxonomy import CODES

__all__ = ["Recommendations", "Thresholds", "recommend"]

ROWS = 8192  # cases decided at once; their arrays stay in the processor's cache, and memory does not grow with N


def recommend(
    patients: Sequence[Patient],
    lesions: Sequence[Lesion],
    findings: Sequence[LesionFinding | None],
    knowledge: Knowledge,
    thresholds: Thresholds,
    *,
    site_calibrated: bool | None = None,
    heatmap_shown: bool = False,
) -> Recommendations:
    """Decide what should happen to each lesion.

    Args:
        patients: [N], the person of each lesion.
        lesions: [N]
        findings: [N], of each lesion, merged over its images; None where there is no picture.
        knowledge: Of `load_knowledge`.
        thresholds: Of the model that made the findings.
        site_calibrated: Whether that model was calibrated on this site's own images (rule G09).
        heatmap_shown: Whether a heat map is shown beside the pathway (rule X06).

    Returns:
        The decisions, as a table or as one pathway at a time. The same case has the same pathway in whatever company.

    Raises:
        DataError: The three do not belong together.
    """
    if not len(patients) == len(lesions) == len(findings):
        raise DataError(
            f"{len(patients)} patients, {len(lesions)} lesions, {len(findings)} findings",
            expected="one of each in every row",
        )
    for lesion, finding in zip(lesions, findings, strict=True):
        if finding is not None and finding.lesion_id != lesion.lesion_id:
            raise DataError(
                f"the finding is of lesion {finding.lesion_id!r}", where=f"lesion {lesion.lesion_id!r}",
                expected="lesions and findings in the same order",
            )  # fmt: skip
    plan = make_plan(knowledge)
    context = _Context(patients, lesions, findings, thresholds, site_calibrated, heatmap_shown)
    starts = range(0, max(len(patients), 1), ROWS)
    parts = [decide(context.frame(slice(start, start + ROWS)), plan) for start in starts]
    names = [field.name for field in dataclasses.fields(Decisions)]
    whole = {name: np.concatenate([getattr(part, name) for part in parts], axis=-1) for name in names}
    return Recommendations(plan, Decisions(**whole), context)


@dataclass(frozen=True, eq=False)
class _Context:
    patients: Sequence[Patient]
    lesions: Sequence[Lesion]
    findings: Sequence[LesionFinding | None]
    thresholds: Thresholds
    site_calibrated: bool | None
    heatmap_shown: bool

    def frame(self, rows: slice) -> Frame:
        return build_frame(
            self.patients[rows], self.lesions[rows], self.findings[rows], self.thresholds,
            site_calibrated=self.site_calibrated, heatmap_shown=self.heatmap_shown,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Recommendations:
    """What was decided of N lesions."""

    plan: Plan
    decisions: Decisions
    context: _Context

    def __len__(self) -> int:
        return len(self.context.lesions)

    @property
    def urgency(self) -> np.ndarray:
        """[N], U1 to U5."""
        return np.array(URGENCIES)[self.decisions.level - 1]

    def pathway(self, i: int) -> Pathway:
        """The pathway of one row, in words."""
        one = slice(i, i + 1)
        names = [field.name for field in dataclasses.fields(Decisions)]
        decisions = Decisions(**{name: getattr(self.decisions, name)[..., one] for name in names})
        context = self.context
        return assemble(
            self.plan, decisions, context.frame(one),
            context.patients[i], context.lesions[i], context.findings[i], context.thresholds,
        )  # fmt: skip

    def table(self) -> pa.Table:
        """One row a lesion: urgency and the ids of rules, options and missing facts.

        Columns: patient_id, lesion_id, urgency, urgency_rules, assessable, basis (image, histology, none), prediction,
        rules (that hold), first_option, options (in order, without the blocked), blocked, locked, caution, missing.
        The metadata of the schema holds the versions.
        """
        decisions, context, knowledge = self.decisions, self.context, self.plan.knowledge
        rules, options = [rule.id for rule in knowledge.rules], list(knowledge.options)
        offered = decisions.place < NOT_OFFERED
        order = np.argsort(decisions.place, axis=0, kind="stable")
        usable = np.take_along_axis(offered & ~decisions.blocked, order, axis=0)
        first = np.where(usable[0], order[0], len(options))  # the blocked stand last
        basis = np.where(decisions.assessable, np.where(decisions.confirmed, 1, 0), 2)
        columns = {
            "patient_id": pa.array([patient.patient_id for patient in context.patients], pa.string()),
            "lesion_id": pa.array([lesion.lesion_id for lesion in context.lesions], pa.string()),
            "urgency": _words(decisions.level - 1, URGENCIES),
            "urgency_rules": _lists(decisions.level_by, rules),
            "assessable": pa.array(decisions.assessable),
            "basis": _words(basis, ("image", "histology", "none")),
            "prediction": _words(decisions.dx, (*CODES, None)),
            "rules": _lists(decisions.holds, rules),
            "first_option": _words(first, (*options, None)),
            "options": _lists(usable, options, order),
            **{name: _lists(getattr(decisions, name), options) for name in ("blocked", "locked", "caution")},
            "missing": _lists(decisions.missing, ASKED),
        }
        versions = {"knowledge_sha256": knowledge.sha256, "dermaflow": __version__}
        models = {finding.model_sha256 for finding in context.findings if finding}
        versions |= {"model_sha256": " ".join(sorted(models)), "thresholds": repr(context.thresholds)}
        return pa.table(columns).replace_schema_metadata(versions)


def _words(codes: np.ndarray, words: Sequence[str | None]) -> pa.Array:
    """A column of words for codes, -1 is the last word."""
    return pa.array(words, pa.string()).take(pa.array(np.where(codes < 0, len(words) - 1, codes).astype(np.int32)))


def _lists(mask: np.ndarray, names: Sequence[str], order: np.ndarray | None = None) -> pa.Array:
    """A column of lists of names: those set in the mask [K, N], whose rows `order` [K, N] may have moved."""
    case, which = np.nonzero(mask.T)
    if order is not None:
        which = order[which, case]
    offsets = np.concatenate([[0], np.cumsum(mask.sum(axis=0))]).astype(np.int32)
    return pa.ListArray.from_arrays(
        pa.array(offsets), pa.array(names, pa.string()).take(pa.array(which.astype(np.int32)))
    )
