"""``dermaflow sweep``: variants of a recipe, compared on held-out lesion folds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dermaflow.cli.console import bars, command, console, print_table


@command
def sweep(
    file: Annotated[Path, typer.Argument(help="The sweep (.yaml): question, recipe, variants, folds, seeds.")],
    shards: Annotated[str, typer.Option(help="Folder that `dermaflow prepare` wrote, local or s3://.")],
    out: Annotated[Path, typer.Option(help="Folder of all trials; several sweeps may share it.")],
    at_once: Annotated[
        int | None, typer.Option(min=1, help="Trials at a time, as Ray tasks; without it one after another, no Ray.")
    ] = None,
    resamples: Annotated[int, typer.Option(min=1, help="Of the lesion bootstrap.")] = 1000,
) -> None:
    """Try variants of a recipe on held-out lesion folds of the training split and compare them in pairs.

    A sweep file:

        question: Does a larger batch cost accuracy?
        recipe: ham10000-cpu
        folds: [0, 1]
        seeds: [0]
        variants:
          32 a step: {}
          64 a step: {optim.batch_size: 64}

    The test split is not looked at. Cut off, or a variant added? Run it again: what was trained is not trained again.

    Example: dermaflow sweep batch.yaml --shards runs/shards --out runs/sweeps
    """
    from dermaflow.experiments.sweep import load_sweep, run_sweep
    from dermaflow.experiments.table import FIGURES, compare, compare_sources, write_runs, write_table

    plan = load_sweep(file)
    with bars() as show:
        places = run_sweep(
            plan, shards, out, at_once=at_once,
            on_step=lambda trial, step, steps, loss: show(trial, step, steps),
            on_trial=lambda done: show("trials", done, len(plan.trials)),
        )  # fmt: skip
    found = compare(plan, places, resamples)
    rows = [
        [variant.name, *(f"{variant.figures[name].value:.3f}" for name in FIGURES), f"{variant.minutes:.1f}"]
        for variant in found
    ]
    print_table(plan.question, ["variant", *FIGURES, "minutes"], rows)
    page, plot = write_table(plan, found, compare_sources(plan, places, resamples), file.stem, out)
    everything, curves = write_runs(out)
    console.print(f"with intervals and differences: {page}, {plot}", soft_wrap=True)
    console.print(f"all runs of {out} and their losses: {everything}, {curves}", soft_wrap=True)
