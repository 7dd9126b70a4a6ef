"""score: a whole archive, folder or bucket of images to findings, and with patients to pathways."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dermaflow import storage
from dermaflow.cli.console import command, console, errors, print_table

if TYPE_CHECKING:
    from dermaflow.scoring.plan import Status
    from dermaflow.scoring.summary import Summary

LISTED = 10  # flagged lesions shown on the terminal


@command
def score(
    source: Annotated[
        str, typer.Argument(help="Folder, .zip, .tar(.gz, .zst), Parquet shards, .csv of URIs, DICOM; local or s3://.")
    ],
    out: Annotated[str, typer.Option(help="Folder of the run, local or s3://.")],
    model: Annotated[str, typer.Option(help="'champion', another version of the registry, or a bundle.")] = "champion",
    patients: Annotated[
        str | None, typer.Option(help="Patients and lesions, for pathways; a column image_id maps images to lesions.")
    ] = None,
    views: Annotated[
        int | None, typer.Option(help="1, or 4 for the mean over the image and its flips; default as calibrated.")
    ] = None,
    part_size: Annotated[int | None, typer.Option(min=1, help="Images a part; default 16 to 512.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default one a CPU.")] = None,
) -> None:
    """Score every image of a source once; what cannot be read is a row with a reason.

    Cut off? Run the same command again: it does what is missing, and no more.

    Example: dermaflow score archive.zip --out runs/scored --patients patients.csv
    """
    from dermaflow.scoring.bulk import score as run
    from dermaflow.scoring.plan import Options

    if views not in (None, 1, 4):
        raise typer.BadParameter("1 or 4", param_hint="--views")
    options = Options.model_validate({"part_size": part_size, "views": views, "workers": workers})
    with _shown() as show:
        summary = run(source, out, model=model, patients=patients, options=options, progress=show)
    _print(summary, out)


class Shown:
    """A progress bar with rate, time left and failures; a line for every tenth where the output is no terminal."""

    def __init__(self, bar: Progress) -> None:
        self._bar, self._task = bar, bar.add_task("listing", total=None, said="")
        self._last: tuple[str, int] | None = None

    def __call__(self, status: Status) -> None:
        said = self._said(status)
        if sys.stderr.isatty():
            total = None if status.state == "planning" else status.total
            done = status.total if status.state == "planning" else status.done
            self._bar.update(self._task, description=status.state, total=total, completed=done, said=said)
            return
        step = (status.state, 10 * status.done // status.total if status.total else 0)
        if step != self._last and (status.total or status.state != "planning"):
            self._last = step
            errors.print(f"{status.state}: {status.done:,} of {status.total:,}  {said}", highlight=False)

    @staticmethod
    def _said(status: Status) -> str:
        parts = []
        if status.images_per_second:
            parts.append(f"{status.images_per_second:.0f} images/s")
        if status.eta_seconds:
            minutes, seconds = divmod(round(status.eta_seconds), 60)
            parts.append(f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d} left")
        if status.failed:
            parts.append(f"{status.failed:,} failed")
        return "  ".join(parts)


@contextmanager
def _shown() -> Iterator[Shown]:
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.fields[said]}"),
    )  # fmt: skip
    with Progress(*columns, console=errors) as bar:
        yield Shown(bar)


def _print(summary: Summary, out: str) -> None:
    from dermaflow.scoring.plan import FINDINGS, PAGE, PATHWAYS

    rows = [
        [c.code, c.name, f"{c.predicted:,}", "–" if c.share is None else f"{c.share:.1%}", f"{c.training:.1%}"]
        for c in summary.classes
    ]
    print_table("class mix", ["", "diagnosis", "most probable in", "mean probability", "training"], rows)
    psi = "" if summary.drift.psi is None else f"population stability index {summary.drift.psi:.3f}: "
    console.print(psi + summary.drift.verdict, soft_wrap=True)
    if summary.flagged:
        rows = [
            [escape(f.lesion_id), escape(f.image_id), f.prediction, f"{f.p_malignant:.1%}", " ".join(f.conformal_set)]
            for f in summary.flagged[:LISTED]
        ]
        title = f"{summary.flagged_lesions:,} of {summary.lesions:,} lesions flagged, most probably malignant first"
        print_table(title, ["lesion", "image", "prediction", "p of malignancy", "set"], rows)
    else:
        console.print(f"none of {summary.lesions:,} lesions flagged")
    if summary.reasons:
        rows = [[reason.replace("_", " "), f"{count:,}"] for reason, count in summary.reasons.items()]
        print_table(f"{summary.failed:,} images could not be used", ["reason", "images"], rows)
    rate = f", {summary.images_per_second:.0f} images/s" if summary.images_per_second else ""
    console.print(
        f"{out}: {summary.images:,} images, {summary.ok:,} assessed, {summary.not_assessable:,} not assessable, "
        f"{summary.failed:,} failed{rate}",
        soft_wrap=True, markup=False,
    )  # fmt: skip
    console.print(f"summary: {_place(out, PAGE)}", soft_wrap=True, markup=False)
    if summary.urgencies is not None:
        counts = "  ".join(f"{urgency} {count}" for urgency, count in summary.urgencies.items())
        console.print(f"pathways: {_place(out, PATHWAYS, 'index.html')}   {counts}", soft_wrap=True, markup=False)
        following = f"dermaflow sign {storage.join(out, PATHWAYS)} --lesion ID --by NAME --decision accepted"
    else:
        following = f"dermaflow recommend --findings {storage.join(out, FINDINGS)} --patients FILE --out FOLDER"
    console.print(f"next: {following}", soft_wrap=True, markup=False)


def _place(out: str, *name: str) -> str:
    place = storage.join(out, *name)
    return place if storage.is_remote(out) else str(Path(place).absolute())
