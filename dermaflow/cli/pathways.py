"""dermaflow pathways lint | show | fields."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from dermaflow.cli.console import command, console, print_table

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="markdown",
    help="The knowledge base behind the pathways: rules, options and texts in YAML.",
)  # fmt: skip

Folder = Annotated[Path | None, typer.Option(help="Folder of a knowledge base; default the one of DermaFlow.")]


@app.command()
@command
def lint(
    knowledge: Folder = None,
    utilities: Annotated[Path | None, typer.Option(help="A site's own utilities.yaml.")] = None,
) -> None:
    """Check the knowledge base: typos, rules that cannot hold or contradict each other, sources, reviews.

    Ends with status 1 if there is an error; a warning is for a human to judge.

    Example: dermaflow pathways lint --knowledge my-rules
    """
    from dermaflow.pathways.lint import lint as run

    report = run(knowledge, utilities)
    if report.problems:
        rows = [[problem.level, problem.where, escape(problem.message)] for problem in report.problems]
        print_table("knowledge base", ["", "where", "what"], rows)
    if report.rules:
        marks = ", ".join(f"{report.marks.get(mark, 0)} {mark}" for mark in "VPM")
        console.print(f"{report.rules} rules: {marks} (verified, partly, from memory)", soft_wrap=True)
        done = report.rules - len(report.unreviewed)
        state = "every rule is reviewed" if not report.unreviewed else "a draft: every output says so"
        console.print(f"{done} of {report.rules} reviewed by a clinician; {state}", soft_wrap=True)
    console.print(f"{len(report.errors)} errors, {len(report.problems) - len(report.errors)} warnings")
    if report.errors:
        raise SystemExit(1)


@app.command()
@command
def show(rule: Annotated[str, typer.Argument(help="Id, for instance C02.")], knowledge: Folder = None) -> None:
    """One rule: when it holds, what follows, where it comes from, who has reviewed it.

    Example: dermaflow pathways show S01
    """
    from dermaflow.pathways.knowledge import load_knowledge

    base = load_knowledge(knowledge)
    found = base.rule(rule)
    effect = found.effect.model_dump(by_alias=True, exclude_defaults=True, mode="json")
    review = f"{found.reviewed_by}, {found.review_date}" if found.reviewed_by else "not reviewed: a draft"
    rows = [
        ["condition", found.condition], ["applies", found.applies], ["when", found.when], ["action", found.action],
        *([f"effect: {name}", _text(value)] for name, value in effect.items()),
        ["if unknown", found.if_unknown], ["urgency", found.urgency], ["strength", found.strength],
        ["rationale", found.rationale], ["source", f"{found.cited} [{found.verification}]"], ["review", review],
        *([name, text] for name, text in (("note", found.note), ("honoured by", found.honoured_by)) if text),
        ["file", base.files[found.id]],
    ]  # fmt: skip
    print_table(found.id, ["", ""], [[name, escape(text)] for name, text in rows])


@app.command()
@command
def fields() -> None:
    """What a table of patients may hold: columns, values, and the question each answers. All but the ids may be empty.

    Example: dermaflow pathways fields
    """
    from dermaflow.pathways.facts import FACTS

    values = {"bool": "yes, no", "number": "a number"}
    rows = [["patient_id", "an id", "Who is it?"], ["lesion_id", "an id, as in the findings", "Which lesion is it?"]]
    for fact in FACTS.values():
        if fact.question:
            words = values.get(fact.kind) or ", ".join(fact.words) + ("; several with |" if fact.kind == "set" else "")
            rows.append([fact.name.partition(".")[2], words, fact.question])
    print_table("columns of --patients; unknown, or an empty cell, is always allowed", ["column", "values", ""], rows)


def _text(value: object) -> str:
    if not isinstance(value, list):
        return str(value).lower() if isinstance(value, bool) else str(value)
    parts = (", ".join(f"{k}: {_text(v)}" for k, v in x.items()) if isinstance(x, dict) else str(x) for x in value)
    return "; ".join(parts)
