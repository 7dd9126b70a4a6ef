"""doctor: is this machine, or this cluster, fit for work?"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from dermaflow.cli.console import command, console

_MARKS = {"ok": "[green]ok     [/]", "warning": "[yellow]warning[/]", "problem": "[bold red]problem[/]"}
PORTS = (8000,)  # of `dermaflow serve`


@command
def doctor(
    storage: Annotated[
        list[str] | None, typer.Option(help="Folder or s3:// prefix to be written, beside the registry. Repeatable.")
    ] = None,
    port: Annotated[list[int] | None, typer.Option(help="Port to be free; default 8000. Repeatable.")] = None,
    certificate: Annotated[
        list[str] | None, typer.Option(help="PEM file or https://host:port whose end to look at. Repeatable.")
    ] = None,
    authority: Annotated[
        Path | None, typer.Option(help="Certificates that servers are held to, PEM; default the system's.")
    ] = None,
    constraints: Annotated[
        Path | None, typer.Option(help="Versions tested together; default deploy/constraints.txt.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON: a list of name, state, found, todo.")] = False,
) -> None:
    """Look at this machine and what its settings name: versions, GPUs, storage, Prefect, Ray, ports, clock, disk.

    Ends with status 1 when there is a problem; a warning is none.

    Example: dermaflow doctor --storage s3://hospital/runs --certificate certs/server.crt
    """
    from pydantic import TypeAdapter

    from dermaflow.doctor.checks import Check
    from dermaflow.doctor.examine import examine

    lines: list[Check] = []
    for check in examine(
        places=storage or (), ports=port or PORTS, certificates=certificate or (), constraints=constraints,
        authority=str(authority) if authority else None,
    ):  # fmt: skip
        lines.append(check)
        if json:
            continue
        console.print(f"{_MARKS[check.state]} {check.name}: {escape(check.found)}", soft_wrap=True, highlight=False)
        if check.todo:
            console.print(f"        {escape(check.todo)}", soft_wrap=True, highlight=False)
    states = Counter(check.state for check in lines)
    if json:
        typer.echo(TypeAdapter(list[Check]).dump_json(lines, indent=1).decode())
    else:
        said = ", ".join(
            f"{states[state]} {state}{'' if states[state] == 1 else 's'}" for state in ("problem", "warning")
        )
        console.print(f"{len(lines)} lines: {said}", highlight=False)
    if states["problem"]:
        raise typer.Exit(1)
