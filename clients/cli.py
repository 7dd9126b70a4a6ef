"""`dermaflow federate`: train one model over sites that keep their images, simulated or real, and the hub of those."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dermaflow.cli.console import bars, command, console, local_only, print_table
from dermaflow.errors import DataError

if TYPE_CHECKING:
    from clients.plan import PresetName

app = typer.Typer(
    rich_markup_mode="markdown", invoke_without_command=True, pretty_exceptions_enable=False,
    help="""Train one model over sites that keep their images.

**--simulate** plays every site on this machine, or on the Ray cluster of RAY_ADDRESS; without it the run goes to
a **hub** that hospitals have joined (`dermaflow site`). Cut off? Run it again: finished rounds are kept.""",
)  # fmt: skip

State = Annotated[Path, typer.Option("--state", help="Folder of the hub.")]
HUB = Path("runs/hub")


@app.callback()
def main(
    context: typer.Context,
    recipe: Annotated[str, typer.Option(help="Network and local training: a shipped recipe or a .yaml.")] = "demo",
    out: Annotated[Path, typer.Option(help="Folder of the result, at the coordinator.")] = Path("runs/federated"),
    simulate: Annotated[bool, typer.Option("--simulate", help="Play every site here.")] = False,
    shards: Annotated[str | None, typer.Option(help="Simulation: shards to divide among the sites.")] = None,
    partition: Annotated[
        str, typer.Option(help="Simulation: natural (HAM10000's sources), iid:N or dirichlet:ALPHA:N.")
    ] = "natural",
    state: State = HUB,
    site: Annotated[list[str] | None, typer.Option(help="Site of the run: NAME=NODE-ID. Repeatable.")] = None,
    weights: Annotated[Path | None, typer.Option(help="First weights of the backbone (.pth, .safetensors).")] = None,
    preset: Annotated[
        Literal["plain", "label-skew"],
        typer.Option(help="label-skew: for sites that see different diagnoses; 96 short rounds, from weights."),
    ] = "plain",
    strategy: Annotated[
        Literal["fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "scaffold", "trimmed_mean", "median", "krum"],
        typer.Option(help="How updates are brought together."),
    ] = "fedavg",
    rounds: Annotated[int | None, typer.Option(min=0, help="20, or the preset's.")] = None,
    local_epochs: Annotated[
        float | None, typer.Option(help="Epochs of a site in a round, 0.25 for instance. 1, or the preset's.")
    ] = None,
    scope: Annotated[
        Literal["head", "last_block", "all"], typer.Option(help="What is trained and sent.")
    ] = "all",
    gpus: Annotated[float, typer.Option(min=0, help="Simulation: share of a GPU a site.")] = 0.0,
    compare: Annotated[
        bool, typer.Option("--compare", help="Simulation: train each site alone and pooled as well, as long.")
    ] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other choice of the run, loss=adjusted for instance: see docs/federation.md."),
    ] = None,
    recipe_set: Annotated[list[str] | None, typer.Option(help="Change a key of the recipe: optim.lr=3e-4.")] = None,
) -> None:  # fmt: skip
    """Train over sites.

    Example: dermaflow federate --simulate --shards runs/shards --recipe demo --rounds 3 --out runs/federated
    """
    if context.invoked_subcommand is None:
        choices: dict[str, Any] = {
            "strategy": strategy, "rounds": rounds, "local_epochs": local_epochs, "scope": scope,
            "out": str(out if ":/" in str(out) else out.absolute()),
        }  # fmt: skip
        if simulate:
            choices |= {"shards": shards or "", "partition": partition}
        else:
            choices["sites"] = ",".join(site or [])
        run(
            choices, preset, recipe, weights, set_ or [], recipe_set or [], None if simulate else state, gpus, compare
        )  # fmt: skip


@command
def run(
    choices: dict[str, Any], preset: PresetName, recipe: str, weights: Path | None, changes: list[str],
    recipe_changes: list[str], state: Path | None, gpus: float, compare: bool,
) -> None:  # fmt: skip
    """Make the plan, run it, show what came out."""
    local_only(Path(choices["out"]), "--out")
    from clients.matrix import comparisons
    from clients.result import left_out, make_plan, save_model, table
    from clients.simulation import simulate, submit_to_hub

    if threading.current_thread() is threading.main_thread():  # ended from outside, it stops what it started as well
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    plan = make_plan(choices, recipe, weights, changes, recipe_changes, real=state is not None, preset=preset)
    if compare and state is not None:
        raise DataError(
            "hospitals are not compared by this switch", where="--compare",
            todo="run each alone by naming it: --set only=NAME, then dermaflow federate matrix RUN RUN …",
        )  # fmt: skip
    with bars() as show:
        result = simulate(plan, gpus=gpus, progress=show) if state is None else submit_to_hub(plan, state, show)
        for title, other in comparisons(plan, result["training_sites"]).items() if compare else ():
            simulate(
                other,
                gpus=gpus,
                progress=lambda _, done, total, title=title: show(title, done, total),  # type: ignore[misc]
            )
    bundle = save_model(plan)
    header, rows = table(result)
    print_table(
        f"{plan.strategy}, {len(result['rounds'])} rounds, balanced accuracy on each site's test split", header, rows
    )
    for name, reasons in left_out(result).items():
        for reason, where in reasons.items():
            console.print(f"without {name} in {where}: {reason}", markup=False, soft_wrap=True)
    if given := result["privacy"]:
        console.print(
            f"differential privacy of {given['unit']}: epsilon {given['epsilon']:.2f} at delta {given['delta']:g}"
        )
    calibrated = "calibrated on sums of all sites" if result["calibration"] else "not calibrated"
    console.print(
        f"{bundle}: the model, {calibrated}. For one site's own images: dermaflow calibrate --model "
        f"{bundle} --shards ITS-SHARDS --out ITS-MODEL\nnext: dermaflow evaluate --model {bundle} --shards SHARDS "
        f"--out REPORT\nrounds, bytes, every model at every site: dermaflow federate report {plan.out}",
        markup=False, soft_wrap=True,
    )  # fmt: skip


@app.command()
@command
def hub(
    ca: Annotated[Path, typer.Option(help="Certificate of the authority, PEM; sites have the same.")],
    certificate: Annotated[Path, typer.Option(help="Certificate of the hub, PEM.")],
    key: Annotated[Path, typer.Option(help="Its private key, PEM.")],
    state: State = HUB,
    host: Annotated[str, typer.Option(help="Address that sites reach.")] = "0.0.0.0",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8443,
    admin_port: Annotated[int, typer.Option(min=1, max=65535, help="On loopback, for operators.")] = 9443,
) -> None:
    """Run the hub until Ctrl-C: sites reach it and nothing else of it; operators reach it from this machine only.

    Example: dermaflow federate hub --ca certs/ca.crt --certificate certs/server.crt --key certs/server.key
    """
    from clients.hub import HubOptions, run_hub

    paths = {"ca": ca.absolute(), "certificate": certificate.absolute(), "key": key.absolute()}
    run_hub(HubOptions(state=state, host=host, port=port, admin_port=admin_port, **paths))


@app.command()
@command
def register(
    public_key: Annotated[Path, typer.Argument(help="File that the site sent: dermaflow site init made it.")],
    name: Annotated[str, typer.Option(help="Name of the site.")],
    state: State = HUB,
) -> None:
    """Let a site in; prints what a run names it by.

    Example: dermaflow federate register st-mary.pub --name st-mary
    """
    from clients.hub import register_site

    console.print(f"{name}={register_site(state, public_key, name)}", markup=False)


@app.command()
@command
def attack(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run, or of a model.")],
    shards: Annotated[str, typer.Option(help="Shards that it was trained from.")],
    resamples: Annotated[int, typer.Option(min=1, help="Of the lesions, for the intervals.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of the resamples.")] = 0,
) -> None:
    """Try to tell from the model which images it was trained on: area 0.5 is guessing, 1 is certainty.

    Example: dermaflow federate attack runs/federated --shards runs/shards
    """
    from clients.result import MODEL
    from dermaflow.evaluation.membership import attack_model

    model = run / MODEL if (run / MODEL).is_dir() else run
    with bars() as progress:
        found = attack_model(str(model), shards, seed, resamples, progress)
    rows = []
    for name, one in found.items():
        interval = f"{one.low:.3f} to {one.high:.3f}" if one.low is not None else f"({one.reason})"
        rows.append([name, f"{one.value:.3f}", interval])
    print_table("membership inference: training split against test split", ["attack", "AUC", "95 %"], rows)


@app.command()
@command
def show(out: Annotated[Path, typer.Argument(help="Folder of a run.")]) -> None:
    """Rounds of a run so far, as JSON lines; for people: `dermaflow federate report`."""
    from clients.coordinator import read_rounds

    for record in read_rounds(out):
        console.print(json.dumps(record), markup=False, soft_wrap=True)


Runs = Annotated[list[Path] | None, typer.Argument(help="Folders of finished runs.")]
Models = Annotated[
    list[str] | None, typer.Option("--model", help="Another model, measured here: NAME=BUNDLE. Repeatable.")
]
Shards = Annotated[str | None, typer.Option(help="Shards for --model; by default those of the first run.")]
Partition = Annotated[str | None, typer.Option(help="How they are divided; by default as in the first run.")]


@app.command()
@command
def matrix(
    runs: Runs = None,
    model: Models = None,
    shards: Shards = None,
    partition: Partition = None,
    out: Annotated[Path | None, typer.Option(help="Also write it as JSON.")] = None,
) -> None:
    """Every model on every site's test lesions, with counts and 95 % intervals over lesions.

    Example: dermaflow federate matrix runs/federated --model central=runs/model
    """
    from clients.matrix import FIGURES, matrix_of, notes, runs_with_compared, table
    from dermaflow import storage

    with bars() as show:
        found = matrix_of(runs_with_compared(runs or []), _named(model), shards, partition, show)
    for name in FIGURES:
        print_table(name.replace("_", " "), *table(found, name))
    for note in notes(found):
        console.print(note, markup=False)
    if out:
        storage.write_bytes(out, found.model_dump_json(indent=1).encode())


@app.command()
@command
def report(
    run_: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    other: Annotated[list[Path] | None, typer.Option(help="Another run for the matrix. Repeatable.")] = None,
    model: Models = None,
    shards: Shards = None,
    partition: Partition = None,
    out: Annotated[Path, typer.Option(help="The page to write; matrix.json comes beside it.")] = Path("report.html"),
) -> None:
    """A page of a run: the matrix, rounds as curves, who took part, bytes, calibration by site, the plan.

    Example: dermaflow federate report runs/federated --out runs/federated/report.html
    """
    from clients.matrix import matrix_of, runs_with_compared
    from clients.report import write_report

    runs = runs_with_compared([run_, *(other or [])])
    with bars() as show:
        found = matrix_of(runs, _named(model), shards, partition, show)
    console.print(f"{write_report(runs[0], found, out)}", markup=False, soft_wrap=True)


def _named(models: list[str] | None) -> dict[str, str]:
    """Bundles by name."""
    found = {}
    for entry in models or []:
        name, equals, bundle = entry.partition("=")
        if not (name and equals and bundle):
            raise DataError(f"{entry!r} names no model", where="--model", expected="NAME=BUNDLE")
        found[name] = bundle
    return found
