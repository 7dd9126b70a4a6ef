"""dermaflow models list | add | shrink | join | show | promote | rollback | history | compare."""

from __future__ import annotations

import getpass
from pathlib import Path
from typing import Annotated

import typer

from dermaflow.bundles.bundle import load_bundle
from dermaflow.bundles.registry import CHAMPION, Registry, Version
from dermaflow.bundles.small import make_small
from dermaflow.cli.console import bars, command, console, print_table
from dermaflow.settings import settings

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="markdown",
    help="The registry of models: versions, where they come from, and which one is the champion.",
)  # fmt: skip

Where = Annotated[str | None, typer.Option("--registry", help="Folder or s3://; default DERMAFLOW_REGISTRY.")]
Id = Annotated[str, typer.Argument(help="A version, the unique beginning of one, or 'champion'.")]
_SHORT = {"accuracy": "acc", "balanced_accuracy": "bacc", "macro_auc": "auc", "ece": "ece"}


def _open(where: str | None) -> Registry:
    return Registry(where or settings().registry)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


@app.command("list")
@command
def list_(registry: Where = None) -> None:
    """All versions, the oldest first; the champion is marked."""
    rows = []
    for version in _open(registry).list():
        metrics = version.bundle.metrics or {}
        figures = "  ".join(f"{short} {metrics[name]:.3f}" for name, short in _SHORT.items() if name in metrics)
        mark = "★" if version.champion else ""
        rows.append([mark, version.id, f"{version.added:%Y-%m-%d %H:%M}", figures or "not evaluated"])
    print_table("models", ["", "version", "added (UTC)", "on its test split"], rows)


@app.command()
@command
def add(
    bundle: Annotated[str, typer.Argument(help="Bundle that `dermaflow train` wrote, local or s3://.")],
    name: Annotated[str | None, typer.Option(help="Name of the model; default that of its recipe.")] = None,
    registry: Where = None,
) -> None:
    """Put a bundle into the registry as a version that never changes again."""
    version = _open(registry).add(bundle, name=name)
    console.print(f"{version.id}; next: dermaflow models promote {version.id} --reason WHY", soft_wrap=True)


@app.command()
@command
def shrink(
    model: Annotated[str, typer.Argument(help="Calibrated bundle, local or s3://.")],
    out: Annotated[Path, typer.Option(help="Folder of the small bundle.")],
    name: Annotated[str | None, typer.Option(help="Name of the small model; default the old one with -small.")] = None,
) -> None:
    """Store a model at a quarter of its size: float16 weights, no training image named."""
    small = make_small(model, out, name)
    size = sum(file.stat().st_size for file in out.iterdir()) / 1e6
    console.print(f"{out}: {small.bundle.name}, {size:.1f} MB; next: dermaflow evaluate --model {out} --shards SHARDS")


@app.command()
@command
def join(
    models: Annotated[list[str], typer.Argument(help="Two or more models trained from the same shards.")],
    shards: Annotated[str, typer.Option(help="These shards, local or s3://: the ensemble is calibrated on them.")],
    out: Annotated[Path, typer.Option(help="Folder of the ensemble.")],
    name: Annotated[str, typer.Option(help="Name of the ensemble.")] = "ensemble",
) -> None:
    """Join finished models into an ensemble: one model, which gives the mean of their logits.

    Example: dermaflow models join runs/a runs/b --shards runs/shards --out runs/both
    """
    from dermaflow.learning.ensemble import join_models

    found = [load_bundle(model) for model in models]
    loaded = {f"{model.bundle.name}-{model.sha256[:10]}": model for model in found}
    with bars() as show_bar:
        joined = join_models(loaded, shards, out, name, progress=show_bar)
    console.print(
        f"{out}: {joined.bundle.backbone}; next: dermaflow evaluate --model {out} --shards {shards} --out REPORT"
    )


@app.command()
@command
def show(version: Id = CHAMPION, registry: Where = None) -> None:
    """One version: figures, lineage, card."""
    found = _open(registry).show(version)
    training = found.bundle.training
    rows = [
        ["sha256", found.sha256], ["recipe", f"{training.recipe_name} ({training.recipe_hash[:12]})"],
        ["data", training.data_hash], ["seed", str(training.seed)], ["trained", training.started],
        ["duration", f"{training.seconds / 60:.1f} min, {training.epochs} epochs on {training.device}"],
        *([["teacher", training.teacher]] if training.teacher else []),
        *([["members", ", ".join(training.members)]] if training.members else []),
        *([["federation", training.federation.in_words()]] if training.federation else []),
        ["initial weights", training.initial_weights or "none"],
        ["versions", ", ".join(f"{k} {v}" for k, v in training.versions.items())],
        *([name.replace("_", " "), _figure(value)] for name, value in (found.bundle.metrics or {}).items()),
    ]  # fmt: skip
    print_table(found.id + (" ★ champion" if found.champion else ""), ["", ""], rows)


@app.command()
@command
def promote(
    version: Id,
    reason: Annotated[str, typer.Option(help="Why, for those who read the history a year later.")],
    by: Annotated[str, typer.Option(help="Who decides.")] = getpass.getuser(),
    registry: Where = None,
) -> None:
    """Make a version the champion; the old one stays, and the history says who changed it and why."""
    models = _open(registry)
    before = models.champion()
    _said(models.promote(version, reason=reason, by=by), before)


@app.command()
@command
def rollback(
    reason: Annotated[str, typer.Option(help="Why.")],
    by: Annotated[str, typer.Option(help="Who decides.")] = getpass.getuser(),
    registry: Where = None,
) -> None:
    """Go back to the champion before this one; nothing is deleted, and `promote` brings the later one back."""
    models = _open(registry)
    before = models.champion()
    _said(models.rollback(reason=reason, by=by, instead_of=before.id if before else None), before)


def _said(version: Version, before: Version | None) -> None:
    if before is None or before.id == version.id:
        console.print(f"champion: {version.id}" + (" already" if before else ""), soft_wrap=True)
        return
    console.print(f"champion: {version.id}, in place of {before.id}", soft_wrap=True)
    console.print("a running `dermaflow serve --model champion` takes it within half a minute", soft_wrap=True)


@app.command()
@command
def history(registry: Where = None) -> None:
    """Every promotion and rollback, the first one first: when, who, from which to which, why."""
    rows = [
        [f"{entry.at:%Y-%m-%d %H:%M}", entry.action, entry.from_version or "", entry.to_version, entry.by, entry.reason]
        for entry in _open(registry).history()
    ]
    print_table("champions", ["when (UTC)", "", "from", "to", "by", "why"], rows)


@app.command()
@command
def compare(a: Id, b: Id, registry: Where = None) -> None:
    """Two versions side by side: figures, and what differs in their recipes."""
    found = _open(registry).compare(a, b)
    rows = [[m.name.replace("_", " "), _figure(m.a), _figure(m.b), _figure(m.difference)] for m in found.metrics]
    print_table("figures on the test split", ["", found.a.id, found.b.id, "b - a"], rows)
    changes = [[key, str(old), str(new)] for key, (old, new) in found.recipe.items()]
    print_table("recipe", ["", found.a.id, found.b.id], changes)
    if not found.same_data:
        console.print("[yellow]![/] trained on different data: the figures are of different test splits")


@app.command()
@command
def verify(registry: Where = None) -> None:
    """Read every byte of every model and check it against its hash; after a restore, or now and then.

    Example: dermaflow models verify --registry s3://hospital/registry
    """
    found = _open(registry)
    console.print(f"{found.uri}: models {found.verify()}, each as it was written", soft_wrap=True)
