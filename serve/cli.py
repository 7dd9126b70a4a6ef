"""`dermaflow serve`: Ray, Serve and the page on this machine, and the keys that open them."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import SecretStr
from rich.markup import escape

from dermaflow.cli.console import command, console, local_only, print_table
from serve.access import SCOPES, add_key, is_loopback, read_keys, revoke_key
from serve.models import Chosen, choose
from serve.options import Oidc, Options, ServeError, checked

log = logging.getLogger(__name__)

app = typer.Typer(
    rich_markup_mode="markdown", invoke_without_command=True, pretty_exceptions_enable=False,
    help="Serve a model: findings, pathways, batches and the page for dermatologists, on Ray Serve.",
)  # fmt: skip
keys_app = typer.Typer(no_args_is_help=True, help="Keys: only their hashes are kept.")
app.add_typer(keys_app, name="keys")

MAKE_A_KEY = "make a key: dermaflow serve keys add --keys FILE --name NAME --scope classify"
WATCH = 15.0  # seconds between two looks at the registry
KeyPath = Annotated[Path, typer.Option("--keys", help="File of hashed keys.")]


@app.callback()
def main(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="Bundle folder or s3://, a version of the registry, or 'champion'.")] = (
        "champion"
    ),
    host: Annotated[str, typer.Option(help="Address to listen on; other than loopback only with keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    state: Annotated[Path, typer.Option(help="Folder for batches, uploads, results, audit log.")] = Path("runs/serve"),
    keys: Annotated[Path | None, typer.Option(help="File of hashed keys: `dermaflow serve keys add`.")] = None,
    database: Annotated[
        str | None,
        typer.Option(
            envvar="DERMAFLOW_DATABASE",
            show_envvar=True,
            help="Batches' table, postgresql+psycopg://…; default SQLite in the state folder.",
        ),
    ] = None,
    source: Annotated[
        list[str] | None, typer.Option(help="Folder or s3:// prefix that a batch may name. Repeatable.")
    ] = None,
    replicas: Annotated[int, typer.Option(min=1, help="Classifiers.")] = 1,
    gpus: Annotated[float, typer.Option(min=0, help="Share of a GPU a classifier.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Most images scored at once.")] = 16,
    jobs: Annotated[int, typer.Option(min=1, help="Batches scored at once.")] = 1,
    rate: Annotated[str, typer.Option(help="Requests a key may make.")] = "1200/minute",
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain, PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key, PEM.")] = None,
    oidc_jwks: Annotated[str | None, typer.Option(help="Identity provider's keys: file or https address.")] = None,
    oidc_issuer: Annotated[str | None, typer.Option()] = None,
    oidc_audience: Annotated[str | None, typer.Option()] = None,
) -> None:
    """Serve until Ctrl-C. A champion that is promoted meanwhile takes over without an interruption.

    Example: dermaflow serve --model runs/model --port 8000
    """
    if context.invoked_subcommand is None:
        oidc = None
        if oidc_jwks:
            if not oidc_issuer or not oidc_audience:
                raise typer.BadParameter("--oidc-jwks needs --oidc-issuer and --oidc-audience")
            oidc = Oidc(jwks=oidc_jwks, issuer=oidc_issuer, audience=oidc_audience)
        options = Options(
            model=model, state=state, keys=keys, sources=tuple(source or ()), replicas=replicas,
            database=None if database is None else SecretStr(database),
            gpus=gpus, batch=batch, jobs=jobs, rate=rate, oidc=oidc, open=keys is None and oidc is None,
        )  # fmt: skip
        run(options, host, port, tls_cert, tls_key)


@command
def run(options: Options, host: str, port: int, cert: Path | None = None, key: Path | None = None) -> None:
    """Start everything, wait for Ctrl-C or SIGTERM, stop everything.

    Raises:
        ServeError: The address needs keys, or is taken; a certificate without its key.
    """
    local_only(options.state, "--state")
    check_host(options, host)
    checked(options)
    if (cert is None) != (key is None):
        raise ServeError("a certificate and its key belong together", where="--tls-cert", expected="both or neither")
    for file in filter(None, (cert, key)):
        if not file.is_file():
            raise ServeError("no such file", where=file, expected="PEM")
    check_port(host, port)
    chosen = choose(options.model)
    stopped = threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        start(options, chosen, host, port, cert, key)
        for number in before:
            signal.signal(number, lambda *_: stopped.set())
        shown = f"[{host}]" if ":" in host else host
        console.print(f"model {chosen.version}", highlight=False)
        console.print(f"page: {'https' if cert else 'http'}://{shown}:{port}/", soft_wrap=True)
        console.print(f"state: {options.state}   stop with Ctrl-C", soft_wrap=True, highlight=False)
        watch(options, chosen, stopped)
    finally:
        stop()
        for number, handler in before.items():
            signal.signal(number, handler)
    console.print("stopped; batches under way go on at the next start")


def check_host(options: Options, host: str) -> None:
    """Raise ServeError for an address that others reach, while nobody is asked for a key."""
    if options.open and not is_loopback(host):
        raise ServeError(
            f"{host} without keys", where="--host", expected="127.0.0.1, or --keys with at least one key",
            todo=MAKE_A_KEY,
        )  # fmt: skip
    if options.keys is not None and not read_keys(options.keys).keys:
        raise ServeError("no key in it", where=options.keys, todo=MAKE_A_KEY)


def check_port(host: str, port: int) -> None:
    """Raise ServeError if something listens there: Serve's own message would name an actor, not the port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServeError(f"port {port}: {error.strerror}", where=host, todo="choose another --port") from None


def start(
    options: Options, chosen: Chosen, host: str, port: int, cert: Path | None = None, key: Path | None = None
) -> None:
    """Start Ray where there is none, Serve, and the application; returns when it answers."""
    from dermaflow.preparation.cluster import connect
    from dermaflow.settings import settings

    # Ray's workers give way to every other process of the machine, which is right for batches and wrong for answers;
    # and on a busy machine its proxy needs longer than Serve waits by default.
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
    # Fewer hand-overs between threads for each request, half again as many requests a second (docs/results.md): nothing
    # here blocks a loop. But no replica opens a port of its own for what comes from outside.
    os.environ.setdefault("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1")
    os.environ.setdefault("RAY_SERVE_ENABLE_DIRECT_INGRESS", "0")
    # Ray counts what Serve reserves: one more, and the batches still have all of the machine
    connect(settings().threads + 1)
    from ray import serve
    from ray.serve.config import HTTPOptions

    from serve.app import NAME, QUIET, bind

    for name in ("ray.serve", "ray"):
        logging.getLogger(name).setLevel(logging.WARNING)
    tls: dict[str, Any] = {} if cert is None else {"ssl_certfile": str(cert), "ssl_keyfile": str(key)}
    http = HTTPOptions(host=host, port=port, keep_alive_timeout_s=75, **tls)
    serve.start(proxy_location="HeadOnly", http_options=http, logging_config=QUIET)
    serve.run(bind(options, chosen), name=NAME, route_prefix="/")


def deploy(options: Options, chosen: Chosen) -> None:
    """Change the model of the running application; nothing is restarted."""
    from ray import serve

    from serve.app import NAME, bind

    serve.run(bind(options, chosen), name=NAME, route_prefix="/")


def watch(options: Options, chosen: Chosen, stopped: threading.Event) -> None:
    """Wait; when the registry has a new champion, take it."""
    from dermaflow.errors import DermaflowError

    while not stopped.wait(WATCH):
        try:
            found = choose(options.model)
            if found.sha256 != chosen.sha256:
                deploy(options, found)
                console.print(f"model {found.version}", highlight=False)
                chosen = found
        except DermaflowError as error:  # the registry may be out of reach for a while
            log.warning("the model stays %s: %s", chosen.version, error)


def stop() -> None:
    """Stop the application, and Serve and Ray where they were started here."""
    import ray

    if not ray.is_initialized():
        return
    from ray import serve

    from dermaflow.preparation.cluster import disconnect
    from serve.app import NAME

    if os.environ.get("RAY_ADDRESS"):
        serve.delete(NAME)
    else:
        serve.shutdown()
    disconnect()


@app.command("demo")
@command
def demo(run: Annotated[Path, typer.Option(help="Folder that `dermaflow demo` wrote.")] = Path("demo-run")) -> None:
    """Post an archive of the demo's test images with their patients, and show the work list that comes back."""
    from serve.demo import score_through_endpoint

    score_through_endpoint(run)


@keys_app.command("add")
@command
def keys_add(
    name: Annotated[str, typer.Option(help="Who it is for.")],
    scope: Annotated[list[str], typer.Option(help=f"Of {', '.join(SCOPES)}. Repeatable.")],
    keys: KeyPath = Path("keys.json"),
    days: Annotated[float | None, typer.Option(min=0, help="Days until it expires; default never.")] = None,
) -> None:
    """Make a key and print it, once: only its hash is kept."""
    secret = add_key(keys, name, scope, days)
    console.print(f"{escape(str(keys))}: added {name}; this is the only time the key is shown", soft_wrap=True)
    typer.echo(secret)


@keys_app.command("list")
@command
def keys_list(keys: KeyPath = Path("keys.json")) -> None:
    """The keys by name."""

    def day(time: datetime | None) -> str:
        return f"{time:%Y-%m-%d}" if time else ""

    found = read_keys(keys).keys
    rows = [[key.name, " ".join(key.scopes), day(key.created), day(key.expires)] for key in found]
    print_table("keys", ["name", "scopes", "created", "expires"], rows)


@keys_app.command("revoke")
@command
def keys_revoke(name: Annotated[str, typer.Option()], keys: KeyPath = Path("keys.json")) -> None:
    """Take a key out; a running service refuses it at once."""
    revoke_key(keys, name)
    console.print(f"{escape(str(keys))}: {name} is out", soft_wrap=True)
