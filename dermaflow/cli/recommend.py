"""recommend and sign: pathways for patients, and a clinician's decision on them."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from dermaflow.cli.console import bars, command, console, print_table

LISTED = 10  # most urgent lesions shown on the terminal


@command
def recommend(
    findings: Annotated[str, typer.Option(help="Findings, Parquet, one row an image.")],
    patients: Annotated[str, typer.Option(help="Patients and lesions: CSV, JSON, JSONL, Parquet or a FHIR Bundle.")],
    out: Annotated[str, typer.Option(help="Folder to write, local or s3://; pathways are signed in local ones.")],
    format_: Annotated[str, typer.Option("--format", help="Some of json,fhir,html; JSON is always written.")] = (
        "json,fhir,html"
    ),
    model: Annotated[str | None, typer.Option(help="Bundle that made the findings, for its thresholds.")] = None,
    allow_unmatched: Annotated[
        bool, typer.Option("--allow-unmatched", help="Go on when findings or patients have no counterpart.")
    ] = False,
    as_of: Annotated[
        datetime | None,
        typer.Option(formats=["%Y-%m-%d"], help="Date at which birth dates become ages; default today."),
    ] = None,
    utilities: Annotated[Path | None, typer.Option(help="A site's own utilities.yaml.")] = None,
) -> None:
    """Pathways for patients: urgency, options, contraindications, missing inputs. Preliminary until a clinician signs.

    A row of the patients is one lesion: patient_id, lesion_id, and whatever is known; the rest is unknown.

    Example: dermaflow recommend --findings findings.parquet --patients patients.csv --out runs/pathways
    """
    from dermaflow import storage
    from dermaflow.pathways.outputs.folder import INDEX, UNMATCHED
    from dermaflow.pathways.outputs.reading import most_urgent_first
    from dermaflow.pathways.run import recommend_files

    formats = [name.strip().lower() for name in format_.split(",") if name.strip()]
    with bars() as show, storage.output_folder(out) as folder:
        done = recommend_files(
            findings, patients, folder, formats=formats, model=model, allow_unmatched=allow_unmatched,
            as_of=as_of.date() if as_of else None, utilities=utilities, progress=show,
        )  # fmt: skip
    if model is None:
        console.print("[yellow]![/] no --model: cautious default thresholds, not those of the model")
    rows = [
        [
            p.urgency,
            escape(p.patient_id),
            escape(p.lesion_id),
            next((o.title for o in p.options if o.status == "available"), ""),
        ]
        for p in sorted(done.pathways, key=most_urgent_first)[:LISTED]
    ]
    print_table("most urgent first", ["urgency", "patient", "lesion", "first option"], rows)
    counts = "  ".join(f"{urgency} {count}" for urgency, count in done.urgencies.items())
    console.print(f"{out}: {len(done.pathways)} lesions   {counts}", soft_wrap=True)
    if done.unmatched:
        console.print(f"[yellow]![/] {len(done.unmatched)} without a counterpart, see {storage.join(out, UNMATCHED)}")
    if done.outdated:
        console.print(f"[yellow]![/] {len(done.outdated)} signed earlier, changed since: to be signed again")
    page = storage.join(out, INDEX)
    if storage.exists(page):
        console.print(f"pages: {page if storage.is_remote(out) else Path(page).absolute()}", soft_wrap=True)
    if storage.is_remote(out):
        console.print("to sign, copy the folder to a disk: the log of sign-offs needs a lock", soft_wrap=True)
        return
    console.print(f"next: dermaflow sign {out} --lesion ID --by NAME --decision accepted", soft_wrap=True)


@command
def sign(
    folder: Annotated[Path, typer.Argument(help="Local folder that `dermaflow recommend` wrote.")],
    lesion: Annotated[str, typer.Option(help="The lesion.")],
    by: Annotated[str, typer.Option(help="Name of the clinician who decides.")],
    decision: Annotated[str, typer.Option(help="accepted, edited or rejected.")],
    reason: Annotated[str | None, typer.Option(help="Why; needed unless accepted, and to amend a sign-off.")] = None,
) -> None:
    """Sign a pathway: final if accepted or edited, else rejected. Every decision stays in the folder's audit.jsonl.

    Example: dermaflow sign runs/pathways --lesion L1 --by "Dr Ada Byron" --decision edited --reason "Mohs instead"
    """
    from dermaflow.pathways.outputs.folder import sign_folder

    entry, pathway = sign_folder(folder, lesion, by=by, decision=decision, reason=reason)
    console.print(
        f"{lesion}: {pathway.status}, {entry.decision} by {entry.by} at {entry.at}", markup=False, soft_wrap=True
    )
    console.print(f"{folder / 'audit.jsonl'}: entry {entry.sequence}, {entry.sha256[:12]}", soft_wrap=True)
