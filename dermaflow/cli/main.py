"""prepare, train, evaluate, demo; the other commands and the groups have files of their own."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from dermaflow import __version__
from dermaflow.cli import data as data_commands
from dermaflow.cli import doctor as doctor_commands
from dermaflow.cli import models as model_commands
from dermaflow.cli import pathways as pathway_commands
from dermaflow.cli import recommend as recommend_commands
from dermaflow.cli import score as score_commands
from dermaflow.cli import sweep as sweep_commands
from dermaflow.cli import trust as trust_commands
from dermaflow.cli.console import bars, command, console, print_table
from dermaflow.errors import DataError, RecipeError
from dermaflow.settings import settings

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""From an archive of dermoscopy images to a trained, calibrated, evaluated model.

The main job, step by step: **data check**, **prepare**, **train**, **evaluate**, **models promote**; for patients,
**recommend** and **sign**; for one image, **explain**.
See all of it on synthetic images with **demo**. Machine settings are environment variables DERMAFLOW_*
(DATA, REGISTRY, THREADS, DEVICE, LOG_LEVEL).""",
)

app.add_typer(data_commands.app, name="data")
app.add_typer(model_commands.app, name="models")
app.add_typer(pathway_commands.app, name="pathways")
app.command()(sweep_commands.sweep)
app.command()(trust_commands.calibrate)
app.command()(trust_commands.explain)
app.command()(score_commands.score)
app.command()(recommend_commands.recommend)
app.command()(recommend_commands.sign)
app.command()(doctor_commands.doctor)
for _entry in entry_points(group="dermaflow.commands"):  # of packages that the library does not know, as `serve`
    app.add_typer(_entry.load(), name=_entry.name)

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
    recipe: Annotated[str | None, typer.Option(help="Take the section `split` of this recipe (name or .yaml).")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the splits; default 0.")] = None,
    train: Annotated[float | None, typer.Option(help="Share of the images for training; default 0.65.")] = None,
    calibration: Annotated[float | None, typer.Option(help="Share for calibration; default 0.15.")] = None,
    test: Annotated[float | None, typer.Option(help="Share for the test; default 0.20.")] = None,
    folds: Annotated[int | None, typer.Option(min=2, help="Cross-validation folds outside test; default 5.")] = None,
    strict: Annotated[bool, typer.Option(help="Fail on bad items instead of quarantining them.")] = False,
) -> None:
    """Split by lesion and write Parquet shards.

    Run it again after adding images: only the new work is done, and no lesion changes its split.

    Example: dermaflow prepare --data HAM10000 --out runs/shards
    """
    from dermaflow.learning.recipe import load_recipe
    from dermaflow.preparation.prepare import prepare as run
    from dermaflow.preparation.splits import SplitConfig

    chosen = load_recipe(recipe).split if recipe else SplitConfig()
    shares = {"train": train, "calibration": calibration, "test": test}
    data = data or settings().data
    if data is None:
        raise DataError(
            "no data folder", expected="--data DIR or DERMAFLOW_DATA", todo="or make one: dermaflow data synth"
        )
    with bars() as show:
        done = run(
            data, out, seed=chosen.seed if seed is None else seed, folds=folds or chosen.folds,
            fractions={split: shares[split] or share for split, share in chosen.fractions.items()},
            strict=strict, progress=show,
        )  # fmt: skip
    for split, counts in done.manifest.counts.items():
        classes = "  ".join(f"{dx} {n}" for dx, n in counts.items())
        console.print(
            f"{split:12} {sum(counts.values()):6} images of {done.manifest.lesions[split]:5} lesions   {classes}"
        )
    console.print(
        f"{out}: {len(done.manifest.shards)} shards, {done.written} written now, {done.inspected} images read, "
        f"{done.manifest.quarantined} quarantined, data {done.manifest.data_hash[:12]}",
        soft_wrap=True,
    )


@app.command()
@command
def train(
    shards: Shards,
    recipe: Annotated[
        str,
        typer.Option(
            help="demo, ham10000-cpu, ham10000-best, ham10000-distilled, ham10000-gpu, ham10000-seed or a .yaml file."
        ),
    ],
    out: Annotated[str, typer.Option(help="Folder of the model bundle to write, local or s3://.")],
    weights: Annotated[Path | None, typer.Option(help="First weights of the backbone (.pth, .safetensors).")] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Model to learn from, local or s3://, for a recipe with `distillation`.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Ray Train workers; without it, this process trains, without Ray.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Change a key of the recipe: --set optim.epochs=3. Repeatable.")
    ] = None,
) -> None:
    """Train a network, or an ensemble, and calibrate it on the calibration split.

    Cut off? Run the same command again: it goes on after the last finished epoch.

    Example: dermaflow train --shards runs/shards --recipe ham10000-cpu --out runs/model
    """
    from dermaflow import storage
    from dermaflow.learning.recipe import load_recipe
    from dermaflow.learning.train import train as run
    from dermaflow.schemas.bundle import DIGEST_NAME

    chosen = load_recipe(recipe, _changes(set_ or []))
    epochs = chosen.optim.head_epochs + chosen.optim.epochs
    with bars() as show, storage.output_folder(out, last=DIGEST_NAME) as folder:
        loaded = run(
            shards, chosen, folder, weights=weights, teacher=teacher, workers=workers,
            on_step=lambda epoch, step, steps, loss: show(f"epoch {epoch + 1}/{epochs}", step, steps),
        )  # fmt: skip
    record = loaded.bundle.training
    console.print(f"{out}: {record.epochs} epochs in {record.seconds / 60:.1f} min, model {loaded.sha256[:12]}")
    console.print(f"next: dermaflow evaluate --model {out} --shards {shards} --out REPORT", soft_wrap=True)


@app.command()
@command
def evaluate(
    model: Annotated[str, typer.Option(help="Model bundle, local or s3://.")],
    shards: Shards,
    out: Annotated[
        str, typer.Option(help="Folder of the report, local or s3://: report.html, metrics.json, predictions.parquet.")
    ],
    recipe: Annotated[str | None, typer.Option(help="Take the section `bootstrap` of this recipe.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the lesion bootstrap; default 0.")] = None,
    resamples: Annotated[int | None, typer.Option(min=1, help="Resamples of it; default 1000.")] = None,
) -> None:
    """Measure a model on the test split, with lesion-bootstrap intervals, and write the report.

    Example: dermaflow evaluate --model runs/model --shards runs/shards --out runs/report
    """
    from dermaflow import storage
    from dermaflow.evaluation.run import evaluate_bundle
    from dermaflow.learning.recipe import BootstrapConfig, load_recipe

    chosen = load_recipe(recipe).bootstrap if recipe else BootstrapConfig()
    seed = chosen.seed if seed is None else seed
    resamples = resamples or chosen.resamples
    typed = f"dermaflow evaluate --model {model} --shards {shards} --out {out} --seed {seed} --resamples {resamples}"
    with bars() as show, storage.output_folder(out) as folder:
        found = evaluate_bundle(model, shards, folder, seed=seed, resamples=resamples, command=typed, progress=show)
    rows = [[name.replace("_", " "), f"{value:.4f}"] for name, value in found.headline().items()]
    print_table("on the test split, all images; intervals are in the report", ["figure", "value"], rows)
    page = storage.join(out, "report.html")
    console.print(f"report: {page if storage.is_remote(out) else Path(page).absolute()}", soft_wrap=True)


@app.command()
@command
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo writes.")] = Path("demo-run"),
    images: Annotated[int, typer.Option(min=200, help="Synthetic images to draw.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything.")] = 0,
) -> None:
    """The main job on synthetic images: draw, check, prepare, train, evaluate, promote, recommend.

    Takes some minutes on two cores.

    Run it again: what is done is not done again.
    """
    registry = str(out / "registry")
    source, shards, model, report = out / "data", out / "shards", out / "model", out / "report"
    pathways = out / "pathways"
    steps = [
        ("draw a synthetic HAM10000", source.exists(),
         lambda: data_commands.synth(source, images=images, seed=seed, height=150, width=200)),
        ("check it", False, lambda: data_commands.check(source)),
        ("split by lesion, write shards", False, lambda: prepare(str(shards), data=source, seed=seed)),
        ("train", model.exists(), lambda: train(str(shards), "demo", str(model))),
        ("evaluate", (report / "report.html").exists(), lambda: evaluate(str(model), str(shards), str(report))),
        ("register and promote", False, lambda: model_commands.add(str(model), registry=registry)),
        ("", False, lambda: model_commands.promote("demo", reason="demo", registry=registry)),
        ("", False, lambda: model_commands.list_(registry=registry)),
        ("pathways for the patients of the test split", (pathways / "index.html").exists(),
         lambda: _demo_pathways(report, model, pathways, seed)),
    ]  # fmt: skip
    for title, done, step in steps:
        if title:
            console.rule(f"[bold]{title}{' (done before)' if done else ''}", align="left")
        if not done:
            step()
    console.print(f"\nThe pathways lie at {(pathways / 'index.html').absolute()}", soft_wrap=True)
    console.print(f"The report lies at {(report / 'report.html').absolute()}", soft_wrap=True)


def _demo_pathways(report: Path, model: Path, out: Path, seed: int) -> None:
    """Draw a patient for every test lesion and recommend."""
    import pandas as pd

    from dermaflow.datasets.synthetic.patients import draw_patients

    patients = report.parent / "patients.csv"
    draw_patients(pd.read_parquet(report / "predictions.parquet"), seed).to_csv(patients, index=False)
    recommend_commands.recommend(str(report / "findings.parquet"), str(patients), str(out), model=str(model))


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
