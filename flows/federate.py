"""The flow `federate`: one model over sites that keep their images, evaluated and, if it is better, promoted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from prefect import flow
from pydantic import Field

from dermaflow.errors import DataError
from dermaflow.preparation.reading import ShardFolder
from flows.agreed import Rule
from flows.caching import Output
from flows.running import library_run
from flows.steps import agreed, evaluated, federated, reported


@flow
def federate(
    out: Path,
    shards: str | None = None,
    sites: list[str] | None = None,
    test: str | None = None,
    registry: str | None = None,
    metric: Literal["balanced_accuracy", "accuracy", "macro_f1", "melanoma_sensitivity", "melanoma_auc"] = (
        "balanced_accuracy"
    ),
    margin: Annotated[float, Field(ge=-1, le=1)] = 0.0,
    recipe: str = "ham10000-cpu",
    weights: Path | None = None,
    strategy: str = "fedavg",
    preset: Literal["plain", "label-skew"] = "plain",
    rounds: Annotated[int | None, Field(ge=1)] = None,
    local_epochs: Annotated[float | None, Field(gt=0)] = None,
    partition: str = "natural",
    choices: list[str] | None = None,
    recipe_changes: list[str] | None = None,
    compare: bool = False,
    gpus: Annotated[float, Field(ge=0)] = 0.0,
    state: Path = Path("runs/hub"),
    resamples: Annotated[int, Field(ge=1)] = 1000,
    seed: Annotated[int, Field(ge=0)] = 0,
    hours: Annotated[float, Field(gt=0)] = 72,
) -> dict[str, Output]:
    """Train over sites, measure on the agreed test, and promote only what is better by the margin.

    With shards, every site is played here; with sites, those that joined the hub of this machine train, and the flow
    waits for them. A run that was cut off or failed goes on after its last finished round.

    Args:
        out: Folder of the run, its model, evaluation and report; it belongs to one plan.
        shards: Simulation: shard folder that is divided among the sites.
        sites: Deployment: NAME=NODE-ID of each site that trains; repeatable.
        test: Shard folder whose test split is the agreed test; in a simulation by default that of shards.
        registry: Model registry, a folder or s3://. The model is added, and promoted if it is better than the champion.
        metric: What is compared, of the most probable class, or the area under melanoma's ROC curve.
        margin: What the lower end of the 95 % interval of the difference to the champion must be above.
        recipe: Network and local training: name of a shipped recipe, or a .yaml file.
        weights: First weights of the backbone, in place of the recipe's.
        strategy: How updates are brought together, fedavg for instance.
        preset: label-skew for sites that see different diagnoses (docs/federation.md); needs pretrained weights.
        rounds: Rounds of training; 20, or the preset's.
        local_epochs: Epochs of a site in a round; 1, or the preset's.
        partition: Simulation: natural, iid:N or dirichlet:ALPHA:N.
        choices: Any other choice of the run, as key=value (docs/federation.md); repeatable.
        recipe_changes: Changes of the recipe, as key=value; repeatable.
        compare: Simulation: train each site alone and pooled as well, for the matrix.
        gpus: Simulation: share of a GPU for each site at work.
        state: Deployment: folder of the hub.
        resamples: Resamples of the lesion bootstrap.
        seed: Seed of the bootstrap; that of training is the choice seed=N.
        hours: Longest time that each step may take.
    """
    with library_run():
        if bool(shards) == bool(sites):
            raise DataError(
                "shards and sites" if shards else "neither shards nor sites", where="federate",
                expected="shards to play every site here, or sites that joined the hub", todo="give one of the two",
            )  # fmt: skip
        test = test or shards
        if registry and test is None:
            raise DataError(
                "no agreed test", where="test", expected="a shard folder whose test split all models are measured on",
                todo="give one, or leave the registry out",
            )  # fmt: skip
        if test is not None:
            ShardFolder(test)  # first: a misspelt folder shall not cost a training
        out = out.absolute()
        where = ["--simulate", "--shards", str(shards), "--partition", partition, "--gpus", str(gpus)]
        if sites:
            where = ["--state", str(state.absolute()), *(part for site in sites for part in ("--site", site))]
        model = federated(
            [
                "--out", str(out), *where, "--recipe", recipe, "--strategy", strategy, "--preset", preset,
                *(["--rounds", str(rounds)] if rounds else []),
                *(["--local-epochs", str(local_epochs)] if local_epochs else []),
                *(["--weights", str(weights)] if weights else []),
                *(part for choice in choices or [] for part in ("--set", choice)),
                *(part for change in recipe_changes or [] for part in ("--recipe-set", change)),
                *(["--compare"] if compare else []),
            ],
            out, hours=hours,
        )  # fmt: skip
        done = {"model": model}
        if test is not None:
            done["evaluation"] = evaluated(
                model.path, test, out / "evaluation", seed=seed, resamples=resamples, hours=hours
            )
        done["report"] = reported(out, registry=registry, shards=shards, hours=hours)
        if registry and test is not None:
            rule = Rule(metric=metric, margin=margin, resamples=resamples, seed=seed)
            agreed(model.path, registry, test, done["evaluation"].path, rule, hours=hours)
    return done
