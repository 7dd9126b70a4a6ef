"""`dermaflow site`: a hospital's side of a federation, from an empty folder to a running node."""

from __future__ import annotations

import logging
import time
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from clients.policy import approve as approve_app
from clients.policy import load_policy
from clients.site_config import AUDIT_NAME, SiteConfig, load_site, make_site
from dermaflow.audit import entries
from dermaflow.cli.console import bars, command, console

log = logging.getLogger(__name__)

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_enable=False,
    help="""A hospital's side of a federation: its images stay, the model comes.

**init** a folder, send its public key to the coordinator, **check**, **approve** the app that may run, **join**.""",
)  # fmt: skip

SiteFolder = Annotated[Path, typer.Option("--site", help="The site's folder.")]
FOLDER = Path("site")
LAST = 5  # events that `status` shows


@app.command()
@command
def init(
    name: Annotated[str, typer.Option(help="Of the site: lower case letters, digits, hyphens.")],
    shards: Annotated[str, typer.Option(help="Folder that `dermaflow prepare` wrote, or s3://.")],
    superlink: Annotated[str, typer.Option(help="The hub, host:port.")],
    authority: Annotated[Path, typer.Option("--ca", help="The file ca.crt that the coordinator sent.")],
    site: SiteFolder = FOLDER,
) -> None:
    """Make a site's folder and its key pair, and print the public key.

    Example: dermaflow site init --name st-mary --shards shards --superlink hub.example.org:8443 --ca ca.crt
    """
    from pydantic import ValidationError

    where = shards if "://" in shards else str(Path(shards).absolute())
    try:
        config = SiteConfig(name=name, shards=where, superlink=superlink)
    except ValidationError as error:
        first = error.errors()[0]
        raise typer.BadParameter(f"{first['loc'][0]}: {first['msg']}") from None
    public = make_site(site, config, authority)
    console.print(f"made {escape(str(site))}; read policy.yaml in it: it says what is allowed here", soft_wrap=True)
    console.print("send this line to the coordinator, who registers it; the private key stays here:")
    typer.echo(public)


@app.command()
@command
def check(site: SiteFolder = FOLDER) -> None:
    """Look at the images, the key, the certificate, the clock and the way to the hub, one line each.

    Ends with status 1 when one failed. Example: dermaflow site check
    """
    from clients.site_checks import check_site

    failed = 0
    for found in check_site(site):
        mark = "[green]ok    [/]" if found.ok else "[bold red]failed[/]"
        console.print(f"{mark} {found.name}: {escape(found.found)}", soft_wrap=True, highlight=False)
        if not found.ok:
            failed += 1
            if found.todo:
                console.print(f"       {escape(found.todo)}", soft_wrap=True, highlight=False)
    if failed:
        raise typer.Exit(1)


@app.command()
@command
def join(site: SiteFolder = FOLDER) -> None:
    """Take part until Ctrl-C or SIGTERM. A node that ends is started again; a hub that is away is waited for.

    Example: dermaflow site join
    """
    from clients.node import run_node
    from clients.site_checks import CertificateError, look_at_hub
    from clients.site_config import SiteError

    config = load_site(site)
    try:
        look_at_hub(config)
    except CertificateError:
        raise
    except SiteError as error:  # a hub that is away comes back; the wrong hub does not become the right one
        log.warning("%s", error)
    console.print(f"{config.name} joins {config.superlink}; leave with Ctrl-C", soft_wrap=True, highlight=False)
    logging.getLogger("clients").setLevel(logging.INFO)
    run_node(site)
    console.print("left")


@app.command()
@command
def status(site: SiteFolder = FOLDER) -> None:
    """What the node and the audit log say; the log's chain of hashes is checked.

    Example: dermaflow site status
    """
    from clients.node import read_state, running

    config = load_site(site)
    pid, state = running(site), read_state(site)
    if pid is None:
        console.print(f"{config.name}: no node runs")
    else:
        since = datetime.fromtimestamp(state.get("since", time.time())).strftime("%Y-%m-%d %H:%M:%S")
        node = f" as node {state['node_id']}" if "node_id" in state else ""
        said = f"{state.get('state', 'starting')}{node} since {since}, process {pid}"
        console.print(f"{config.name}: {said}", highlight=False, soft_wrap=True)
        if state.get("reason"):
            console.print(escape(state["reason"]), highlight=False, soft_wrap=True)
    console.print(f"apps approved: {len(load_policy(site).approved_apps)}", highlight=False)
    if not (site / AUDIT_NAME).exists():
        return
    log_entries = list(entries(site / AUDIT_NAME))
    sums = {way: [e for e in log_entries if e["event"] == f"message {way}"] for way in ("in", "out")}
    told = ", ".join(f"{len(found)} {way} ({sum(e['bytes'] for e in found):,} bytes)" for way, found in sums.items())
    console.print(f"messages: {told}", highlight=False)
    for entry in log_entries[-LAST:]:
        console.print(f"  {_line(entry)}", highlight=False, soft_wrap=True)
    last = log_entries[-1]["hash"] if log_entries else ""
    console.print(f"audit log: {len(log_entries)} entries, unbroken; last {last}", highlight=False, soft_wrap=True)


@app.command()
@command
def model(
    bundle: Annotated[str, typer.Argument(metavar="MODEL", help="Bundle of the run, from the coordinator.")],
    out: Annotated[Path, typer.Option(help="Folder of this site's model.")],
    site: SiteFolder = FOLDER,
) -> None:
    """This site's model of a run with norm=local: its own normalisation in the common model, calibrated on its images.

    Example: dermaflow site model federated/model --out own-model
    """
    from clients.personal import personal_model

    with bars() as show:
        made = personal_model(bundle, site, out, progress=show)
    shards = load_site(site).shards
    console.print(
        f"{out}: {made.bundle.name}, calibrated on this site's images\n"
        f"next: dermaflow evaluate --model {out} --shards {shards} --out REPORT",
        markup=False, soft_wrap=True,
    )  # fmt: skip


def _line(entry: dict[str, Any]) -> str:
    hidden = {"n", "at", "event", "previous", "hash"}
    rest = " ".join(f"{key}={value}" for key, value in entry.items() if key not in hidden and value not in (None, ""))
    return escape(f"{entry['at'][:19]}Z {entry['event']} {rest}".rstrip())


@app.command()
@command
def leave(site: SiteFolder = FOLDER) -> None:
    """Have the running node leave; nothing is removed.

    Example: dermaflow site leave
    """
    from clients.node import stop_node

    console.print("left" if stop_node(site) else "no node runs")


@app.command()
@command
def approve(
    sha256: Annotated[
        str | None, typer.Argument(metavar="[HASH]", help="SHA-256 of the app; default that of this DermaFlow.")
    ] = None,
    site: SiteFolder = FOLDER,
) -> None:
    """Let an app run here; it holds at once. Withdraw it by taking its line out of policy.yaml.

    Without a hash, approves the app that comes with the DermaFlow installed here, whose code can be read here.

    Example: dermaflow site approve
    """
    from clients.site_checks import installed_app

    chosen = sha256 or installed_app()
    new = approve_app(site, chosen, f"{datetime.now():%Y-%m-%d}")
    console.print(f"{'approved' if new else 'was approved already'}: {chosen}", soft_wrap=True, highlight=False)
