"""prepare, train, evaluate, demo; the groups `data` and `models` have files of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from dermaflow import __version__
from dermaflow.cli.console import bars, command, console
from dermaflow.errors import DataError, RecipeError
from dermaflow.settings import settings

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""From an archive of dermoscopy images to a trained, calibrated, evaluated model.

The main job, step by step: **data check**, **prepare**, **train**, **evaluate**, **models promote**.
See all of it on synthetic images with **demo**. Machine settings are environment variables DERMAFLOW_*
(DATA, REGISTRY, THREADS, DEVICE, LOG_LEVEL).""",
)

Shards = Annotated[str, typer.Option(help="Folder that `dermaflow prepare` wrote, local or s3://.")]


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        console.print(f"dermaflow {__version__}")
        raise typer.Exit


@app.command()
@command
def prepare(
    out: Annotated[str, typer.Option(help="Shard folder to write, local or s3://.")],
    data: Annotated[Path | None, typer.Option(help="HAM10000 folder; default DERMAFLOW_DATA.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the splits.")] = 0,
    train: Annotated[float, typer.Option(help="Share of the images for training.")] = 0.65,
    calibration: Annotated[float, typer.Option(help="Share for calibration, never trained on.")] = 0.15,
    test: Annotated[float, typer.Option(help="Share for the test, never looked at before evaluate.")] = 0.20,
    folds: Annotated[int, typer.Option(help="Cross-validation folds over all lesions outside test.")] = 5,
    strict: Annotated[bool, typer.Option(help="Fail on bad items instead of quarantining them.")] = False,
) -> None:
    """Split by lesion and write Parquet shards.

    Run it again after adding images: only the new work is done, and no lesion changes its split.

    Example: dermaflow prepare --data HAM10000 --out runs/shards
    """
    from dermaflow.preparation.prepare import prepare as run

    data = data or settings().data
    if data is None:
        raise DataError("no data folder", expected="--data DIR or DERMAFLOW_DATA", todo="or make one: dermaflow data synth")
    with bars() as show:
        done = run(
            data, out, seed=seed, fractions={"train": train, "calibration": calibration, "test": test}, folds=folds,
            strict=strict, progress=show,
        )  # fmt: skip
    for split, counts in done.manifest.counts.items():
        classes = "  ".join(f"{dx} {n}" for dx, n in counts.items())
        console.print(f"{split:12} {sum(counts.values()):6} images of {done.manifest.lesions[split]:5} lesions   {classes}")
    console.print(
        f"{out}: {len(done.manifest.shards)} shards, {done.written} written now, {done.inspected} images read, "
        f"{done.manifest.quarantined} quarantined, data {done.manifest.data_hash[:12]}",
        soft_wrap=True,
    )


@app.command()
@command
def train(
    shards: Shards,
    recipe: Annotated[str, typer.Option(help="ham10000-cpu, ham10000-seed, demo, or a .yaml file.")],
    out: Annotated[Path, typer.Option(help="Folder of the model bundle to write.")],
    weights: Annotated[Path | None, typer.Option(help="First weights of the backbone (.pth, .safetensors).")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Ray Train workers; without it, this process trains, without Ray.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Change a key of the recipe: --set optim.epochs=3. Repeatable.")
    ] = None,
) -> None:
    """Train a network and calibrate it on the calibration split.

    Cut off? Run the same command again: it goes on after the last finished epoch.

    Example: dermaflow train --shards runs/shards --recipe ham10000-cpu --out runs/model
    """
    from dermaflow.learning.recipe import load_recipe
    from dermaflow.learning.train import train as run

    chosen = load_recipe(recipe, _changes(set_ or []))
    epochs = chosen.optim.head_epochs + chosen.optim.epochs
    with bars() as show:
        loaded = run(
            shards, chosen, out, weights=weights, workers=workers,
            on_step=lambda epoch, step, steps, loss: show(f"epoch {epoch + 1}/{epochs}", step, steps),
        )  # fmt: skip
    record = loaded.bundle.training
    console.print(f"{out}: {record.epochs} epochs in {record.seconds / 60:.1f} min, model {loaded.sha256[:12]}")
    console.print(f"next: dermaflow evaluate --model {out} --shards {shards} --out REPORT", soft_wrap=True)


def _changes(pairs: list[str]) -> dict[str, Any]:
    changes = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign:
            raise RecipeError(f"--set {pair!r}", expected="key=value, for instance optim.epochs=3")
        changes[key] = yaml.safe_load(value)
    return changes


if __name__ == "__main__":
    app()
