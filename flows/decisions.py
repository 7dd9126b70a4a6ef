"""A decision of the lifecycle as people read it: words, tables, artifacts, and the event that automations wait for.

No ids of images, lesions or patients are in any of them.
"""

from __future__ import annotations

from typing import Any

from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.events import emit_event

from dermaflow.evaluation.challenge import Verdict
from dermaflow.trust.drift import Limits, Measures, drifted
from flows.cycle import Decision

EVENT = "dermaflow.lifecycle."
"""Followed by one of nothing, drift, retraining-wanted, promoted, refused."""
RESOURCE = "dermaflow.lifecycle"
_TITLES = {
    "nothing": "Nothing is done",
    "retraining wanted": "A challenger should be trained",
    "promoted": "The challenger is the champion now",
    "refused": "The challenger is not promoted",
}


def publish(decision: Decision) -> str:
    """Show a decision in Prefect's pages and say it to the automations; returns it in words."""
    words = in_words(decision)
    create_markdown_artifact(words, key="decision", description="What the lifecycle decided, and why.")
    create_table_artifact(measure_rows(decision.measures, decision.limits), key="drift", description="New images.")
    if decision.verdict is not None:
        create_table_artifact(
            verdict_rows(decision.verdict), key="champion-challenger",
            description=f"{decision.verdict.images} frozen test images of {decision.verdict.lesions} lesions, 95 % "
            "paired lesion-bootstrap intervals.",
        )  # fmt: skip
    happened = decision.action.replace(" ", "-")
    if decision.action == "nothing" and drifted(decision.measures, decision.limits):
        happened = "drift"
    emit_event(
        EVENT + happened,
        resource={"prefect.resource.id": RESOURCE, "prefect.resource.name": "lifecycle"},
        payload=decision.model_dump(mode="json", include={"cycle", "action", "reasons", "champion", "challenger"}),
    )
    return words


def in_words(decision: Decision) -> str:
    """The decision as Markdown."""
    lines = [
        f"# {_TITLES[decision.action]}", "",
        f"Turn {decision.cycle}, {decision.at}, by {decision.by}, DermaFlow {decision.dermaflow_version}.", "",
        *(f"- {reason}" for reason in decision.reasons), "",
        f"Champion at the beginning: `{decision.champion}` (sha256 {decision.champion_sha256}).",
    ]  # fmt: skip
    if decision.challenger:
        lines += [
            f"Challenger: `{decision.challenger}` (sha256 {decision.challenger_sha256}), trained on shards with data "
            f"hash {decision.data_hash}.",
        ]  # fmt: skip
    lines += ["", "## New images", "", f"Landing area: `{decision.landing}`.", ""]
    lines += _table(measure_rows(decision.measures, decision.limits))
    if decision.left_out:
        lines += [
            "",
            "Left out: " + ", ".join(f"{reason} {count}" for reason, count in decision.left_out.items()) + ".",
        ]
    if decision.verdict:
        lines += [
            "", "## Champion and challenger on the frozen test", "",
            f"{decision.frozen_images} images of {decision.verdict.lesions} lesions, the same since the test was "
            f"frozen (sha256 {decision.frozen_sha256}); {decision.verdict.resamples} resamples of the lesions for "
            f"both models at once, seed {decision.verdict.seed}.", "",
            "Rule, all of which must hold:", "", *(f"- {sentence}" for sentence in decision.verdict.rule), "",
            *_table(verdict_rows(decision.verdict)),
        ]  # fmt: skip
    if decision.arrived:
        lines += [
            "", "## On test lesions that arrived since", "",
            f"{decision.arrived.images} images of {decision.arrived.lesions} lesions. This decides nothing: it is "
            "another test every time.", "", *_table(verdict_rows(decision.arrived)),
        ]  # fmt: skip
    if decision.served:
        s = decision.served
        said = f"answers as `{s.version}` after {s.seconds:.0f} s" if s.problem is None else s.problem
        lines += ["", "## Service", "", f"{s.url}: {said}."]
    if decision.way_back:
        lines += ["", "## The way back", "", f"`{decision.way_back}`"]
    return "\n".join(lines) + "\n"


def measure_rows(found: Measures, limits: Limits) -> list[dict[str, Any]]:
    """What was measured beside its limit."""
    rows: list[dict[str, Any]] = [
        {"what": "new images", "found": f"{found.images}", "by chance or usually": "", "limit": ""},
        {"what": "newly labelled lesions", "found": f"{found.labelled_lesions}", "by chance or usually": "",
         "limit": f"{limits.new_lesions} ({limits.few_lesions} with drift)"},
    ]  # fmt: skip
    if mix := found.mix:
        rows.append(
            {"what": f"mix of diagnoses, stability index ({mix.lesions} lesions)", "found": f"{mix.psi:.3f}",
             "by chance or usually": f"{mix.chance:.3f}", "limit": f"{limits.mix:g} beyond chance"}
        )  # fmt: skip
    if distance := found.distance:
        rows.append(
            {"what": f"pictures unlike the training images ({distance.images})",
             "found": f"{distance.share:.1%} ({distance.low:.1%} to {distance.high:.1%})",
             "by chance or usually": f"{distance.usual:.1%}", "limit": f"{limits.distance:.1%}"}
        )  # fmt: skip
    if outcomes := found.calibration:
        rows.append(
            {"what": f"malignant by histology ({outcomes.lesions} lesions)",
             "found": f"{outcomes.malignant} (z {outcomes.z:+.1f})",
             "by chance or usually": f"{outcomes.expected:.1f} announced", "limit": f"z {limits.calibration:g}"}
        )  # fmt: skip
    return rows


def verdict_rows(verdict: Verdict) -> list[dict[str, Any]]:
    """Every condition of the rule with its figures."""
    return [
        {"figure": c.name, "champion": f"{c.champion:.3f}", "challenger": f"{c.challenger:.3f}",
         "difference": f"{c.difference:+.3f}",
         "95 % interval": "too few lesions" if c.low is None else f"{c.low:+.3f} to {c.high:+.3f}",
         "must be above": f"{-c.margin:+g}", "lesions": c.lesions, "holds": "yes" if c.holds else "no"}
        for c in verdict.conditions
    ]  # fmt: skip


def _table(rows: list[dict[str, Any]]) -> list[str]:
    names = list(rows[0])
    body = ["| " + " | ".join(str(row[name]) for name in names) + " |" for row in rows]
    return ["| " + " | ".join(names) + " |", "|" + "---|" * len(names), *body]
