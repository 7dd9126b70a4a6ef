"""`python -m flows …`: run a flow here, or offer all of them to a Prefect server."""

from __future__ import annotations

import inspect
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import prefect
import typer
from prefect import Flow
from prefect.utilities.callables import parameter_docstrings

from dermaflow.errors import DermaflowError
from flows.evaluate import evaluate
from flows.federate import federate
from flows.lifecycle import lifecycle
from flows.pipeline import pipeline
from flows.prepare import prepare
from flows.score import score
from flows.train import train

FLOWS: tuple[Flow[Any, Any], ...] = (prepare, train, evaluate, pipeline, score, federate, lifecycle)

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="The main job as Prefect flows. They run against the server of PREFECT_API_URL, or with a temporary one.",
)


@app.command()
def serve(
    name: Annotated[str, typer.Option(help="Name of the deployments.")] = "dermaflow",
    limit: Annotated[int, typer.Option(min=1, help="Flow runs at a time.")] = 1,
) -> None:
    """Offer the flows to the server of PREFECT_API_URL and run what is asked for, until stopped.

    Runs started this way can be cancelled from Prefect's pages; their Ray work is stopped, too.
    """
    prefect.serve(*(flow.to_deployment(name) for flow in FLOWS), limit=limit)  # type: ignore[arg-type]


@app.command()
def deploy(
    pool: Annotated[str, typer.Option(help="Work pool; made if it is not there.")] = "dermaflow",
    type_: Annotated[str, typer.Option("--type", help="Of a new pool: process, docker or kubernetes.")] = "process",
    home: Annotated[
        Path | None,
        typer.Option(help="Where relative paths begin; default this folder, or /var/lib/dermaflow in containers."),
    ] = None,
    schedules: Annotated[bool, typer.Option(help="Schedules are active from now on.")] = False,
    notify: Annotated[str | None, typer.Option(help="Notification block of Prefect, TYPE/NAME.")] = None,
    folder: Annotated[Path, typer.Option(help="Folder with prefect.yaml.")] = Path("deploy"),
) -> None:
    """Put deployments, schedules, limits and automations on the server of PREFECT_API_URL, or bring them up to date.

    Then start a worker where the work is to be done: prefect worker start --pool dermaflow
    """
    from flows.deployment import deploy as run

    with _clear_errors():
        run(folder, pool=pool, kind=type_, home=home, schedules=schedules, notify=notify, say=typer.echo)


@contextmanager
def _clear_errors() -> Iterator[None]:
    """End with status 1 and one message where the user can cure the error."""
    try:
        yield
    except DermaflowError as error:
        typer.secho(f"error: {type(error).__name__}: {error}", err=True, fg="red")
        raise typer.Exit(1) from None


def _command(flow: Flow[Any, Any]) -> Callable[..., None]:
    """A command with the flow's parameters; their help comes from its docstring, as in Prefect's pages."""
    hints, about = get_type_hints(flow.fn), parameter_docstrings(inspect.getdoc(flow.fn))

    def run(**given: Any) -> None:
        # Prefect hands SIGTERM on to the handler before its own. The default one ends the process at once; after this
        # one the server still hears that the run ended.
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        with _clear_errors():
            flow(**given)

    options = [
        parameter.replace(
            kind=parameter.KEYWORD_ONLY, annotation=Annotated[hints[name], typer.Option(help=about[name])]
        )
        for name, parameter in inspect.signature(flow.fn).parameters.items()
    ]
    run.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    run.__annotations__ = {option.name: option.annotation for option in options}
    return run


for _flow in FLOWS:
    app.command(_flow.name, help=str(_flow.description).split("\n\nArgs:")[0])(_command(_flow))

if __name__ == "__main__":
    app(prog_name="python -m flows")
