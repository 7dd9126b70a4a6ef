"""dermaflow data synth | fetch | check."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dermaflow.cli.console import bars, command, console, print_table
from dermaflow.errors import DataError
from dermaflow.settings import settings

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", help="Make, download and check data sets.")


@app.command()
@command
def synth(
    out: Annotated[Path, typer.Option(help="Folder to write, in the layout of HAM10000.")],
    images: Annotated[int, typer.Option(min=7, help="Number of images.")] = 1500,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same bytes.")] = 0,
    height: Annotated[int, typer.Option(min=48, help="Pixels.")] = 450,
    width: Annotated[int, typer.Option(min=48, help="Pixels.")] = 600,
) -> None:
    """Draw a synthetic HAM10000: seven kinds of lesion, four sites, several images of a lesion, masks.

    It is for trying things out, and says nothing about real skin.

    Example: dermaflow data synth --out synthetic --images 500 --seed 1
    """
    from dermaflow.datasets.synthetic import generate

    with bars() as show:
        summary = generate(
            out, images, seed, height=height, width=width, workers=settings().threads,
            progress=lambda done, total: show("draw", done, total),
        )  # fmt: skip
    classes = "  ".join(f"{dx} {n}" for dx, n in summary.counts.items())
    console.print(f"{out}: {summary.images} images of {summary.lesions} lesions   {classes}", soft_wrap=True)


@app.command()
@command
def fetch(out: Annotated[Path, typer.Option(help="Folder to download and unpack into; about 6 GB.")]) -> None:
    """Download HAM10000 from Harvard Dataverse: goes on after a break, checks the published checksums.

    The data are licensed CC BY-NC 4.0: not for commercial use, and to be cited.
    """
    from dermaflow.datasets.fetch import LICENCE
    from dermaflow.datasets.fetch import fetch as run

    console.print(LICENCE, soft_wrap=True)
    with bars() as show:
        files = run(out, progress=show)
    console.print(f"{out}: {len(files)} files; next: dermaflow data check {out}", soft_wrap=True)


@app.command()
@command
def check(
    folder: Annotated[Path | None, typer.Argument(help="HAM10000 folder; default DERMAFLOW_DATA.")] = None,
    quarantine: Annotated[Path | None, typer.Option(help="Write bad items and their reasons to this CSV file.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the data sheet to this JSON file.")] = None,
    strict: Annotated[bool, typer.Option(help="End with status 1 if there is any problem.")] = False,
) -> None:
    """Print a data sheet: counts, sites, missing values, unreadable images, duplicates, leaks.

    Bad items are listed with a reason and left out by `prepare`; they never stop it unless you say --strict.

    Example: dermaflow data check HAM10000 --quarantine bad.csv
    """
    from dermaflow import storage
    from dermaflow.datasets.check import check as run
    from dermaflow.datasets.check import write_quarantine

    folder = folder or settings().data
    if folder is None:
        raise DataError(
            "no data folder", expected="an argument or DERMAFLOW_DATA", todo="or make one: dermaflow data synth"
        )
    with bars() as show:
        sheet = run(folder, workers=settings().threads, progress=lambda done, total: show("check", done, total))
    for title, header, rows in sheet.tables():
        print_table(title, header, rows)
    if quarantine:
        write_quarantine(sheet, quarantine)
    if json:
        storage.write_bytes(json, sheet.model_dump_json(indent=1).encode())
    for problem in sheet.problems:
        console.print(f"[yellow]![/] {problem}", soft_wrap=True)
    if not sheet.problems:
        console.print("no problems found")
    if strict and sheet.problems:
        raise DataError(f"{len(sheet.problems)} kinds of problems", where=folder, todo="see the list above")


Repeated = list[str] | None


@app.command()
@command
def forget(
    by: Annotated[str, typer.Option(help="Who has it done, for the log.")],
    patient: Annotated[Repeated, typer.Option(help="Id of a person: all their lesions and images. Repeatable.")] = None,
    lesion: Annotated[Repeated, typer.Option(help="Id of a lesion: all its images. Repeatable.")] = None,
    image: Annotated[Repeated, typer.Option(help="Id of an image. Repeatable.")] = None,
    shards: Annotated[Repeated, typer.Option(help="Folder of `prepare`, local or s3://. Repeatable.")] = None,
    run: Annotated[Repeated, typer.Option(help="Folder of `score`, local or s3://. Repeatable.")] = None,
    report: Annotated[Repeated, typer.Option(help="Folder of `evaluate`. Repeatable.")] = None,
    pathways: Annotated[Repeated, typer.Option(help="Folder of `recommend`. Repeatable.")] = None,
    state: Annotated[Repeated, typer.Option(help="State folder of `serve`: all finished batches. Repeatable.")] = None,
    registry: Annotated[str | None, typer.Option(help="Whose models to list; default DERMAFLOW_REGISTRY.")] = None,
    log: Annotated[Path, typer.Option(help="Folder of the log that says what was forgotten.")] = Path("runs/forgotten"),
    yes: Annotated[bool, typer.Option("--yes", help="Do it; without it, only say what would go.")] = False,
) -> None:
    """Remove a person, a lesion or an image from shards, findings, pathways, reports, batches; list models that saw it.

    Cut off? Run the same command again: it does the rest. Weights are left as they are: decide about the models listed.

    Example: dermaflow data forget --patient P17 --run runs/scored --state runs/serve --by "Ada Byron" --yes
    """
    from dermaflow.forgetting.forget import LOG_NAME, Places, Records, look
    from dermaflow.forgetting.forget import forget as do
    from dermaflow.forgetting.places import Ids

    asked = Ids(patients=frozenset(patient or ()), lesions=frozenset(lesion or ()), images=frozenset(image or ()))
    places = Places(shards=tuple(shards or ()), runs=tuple(run or ()), reports=tuple(report or ()),
                    pathways=tuple(pathways or ()), states=tuple(state or ()))  # fmt: skip
    records = Records(log)
    found = look(asked, places, records, registry=registry or settings().registry, by=by)
    if found.resumed:
        console.print("begun earlier and cut off; this is what it found then")
    rows = [
        [place, ", ".join(f"{kind} {count}" for kind, count in counts.items()) or "nothing"]
        for place, counts in found.order.counts.items()
    ]
    print_table("removed" if yes else "would be removed", ["place", "what"], rows)
    for name, why in found.order.models.items():
        console.print(f"[yellow]![/] model {name} saw it ({why}): decide whether to train anew", soft_wrap=True)
    for folder in found.unfinished:
        console.print(f"[yellow]![/] {folder}: not finished, not looked at", soft_wrap=True)
    if found.empty and not found.resumed:
        console.print("nothing of it is here")
    elif not yes:
        console.print("nothing was changed; do it with --yes")
    else:
        with bars() as show:
            done = iter(range(1, len(rows) + 1))
            entry = do(found, records, progress=lambda place: show("forget", next(done), len(rows)))
        console.print(f"{log / LOG_NAME}: entry {entry}", soft_wrap=True)
        console.print("the archive that was prepared or scored is yours: delete it there too, or it comes back")
