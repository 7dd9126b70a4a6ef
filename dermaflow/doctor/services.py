"""What this machine is to reach: storage, Prefect, Ray, certificates; and what their clocks say of ours.

Neither Prefect nor Ray is imported: a look at them must not start them, and must work where only one is installed.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import os
import secrets
import socket
import ssl
import threading
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import httpx

from dermaflow import storage
from dermaflow.doctor.checks import Check, ok, problem, warning
from dermaflow.errors import DermaflowError, StorageError

PATIENCE = 10.0  # seconds for one answer
STORE_PATIENCE = 30.0  # seconds for an object store, whose client tries again by itself
SKEW, FAR = 5.0, 60.0
"""Seconds between two clocks at which it is said, and from which on signed requests and tokens are refused."""
SOON = 30  # days before a certificate's end at which it is said
_UNSYNCHRONISED = 5  # what adjtimex returns then: TIME_ERROR


def plain(url: str) -> str:
    """The address without user, password and query, which must not be printed."""
    at = urlsplit(url)
    host = at.hostname or ""
    host = f"[{host}]" if ":" in host else host
    return urlunsplit((at.scheme, host + (f":{at.port}" if at.port else ""), at.path, "", ""))


# --- storage -------------------------------------------------------------------------------------------------------


def check_readable(name: str, place: str) -> Iterator[Check]:
    """A folder or prefix that is read."""
    if not _in_time(lambda: storage.exists(place), place):
        yield problem(name, f"{place} is not there", "correct the address, or leave the setting out")
    elif not storage.is_remote(place) and not os.access(place, os.R_OK | os.X_OK):
        yield problem(name, f"{place} may not be read by this user", "change its rights")
    else:
        yield ok(name, f"{place} can be read")


def check_writable(name: str, place: str) -> Iterator[Check]:
    """A folder or prefix that is written: a small file is written, read back and deleted."""
    there = _in_time(lambda: storage.exists(place), place)
    if not there and not storage.is_remote(place):
        parent = next(path for path in Path(place).absolute().parents if path.exists())
        if os.access(parent, os.W_OK | os.X_OK):
            yield ok(name, f"{place} is not there yet and can be made")
        else:
            yield problem(
                name, f"{place} cannot be made: {parent} may not be written", "change its rights, or the setting"
            )
        return

    def probe() -> bool:
        file, content = storage.join(place, f".dermaflow-doctor-{secrets.token_hex(8)}"), secrets.token_bytes(16)
        storage.write_bytes(file, content)
        try:
            return storage.read_bytes(file) == content
        finally:
            storage.delete(file)

    if _in_time(probe, place):
        yield ok(name, f"{place} can be read and written")
    else:
        yield problem(name, f"{place} gives back other bytes than were written", "do not use this storage")


def _in_time(look, place: str):  # type: ignore[no-untyped-def]
    """The result of a look that may wait for a network without an end.

    Raises:
        StorageError: No answer in `STORE_PATIENCE` seconds, or what the look raised.
    """
    if not storage.is_remote(place):
        return look()
    result: list[object] = []

    def run() -> None:
        try:
            result.append(look())
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(STORE_PATIENCE)
    todo = "check AWS_ENDPOINT_URL, the network, the bucket, and the keys: AWS_ACCESS_KEY_ID or ~/.aws or the role"
    if not result:
        raise StorageError(f"no answer in {STORE_PATIENCE:.0f} s", where=place, todo=todo)
    if isinstance(result[0], DermaflowError):
        raise StorageError(result[0].what, where=result[0].where, expected=result[0].expected, todo=todo)
    if isinstance(result[0], Exception):
        raise result[0]
    return result[0]


# --- Prefect and Ray -----------------------------------------------------------------------------------------------


class Clocks:
    """What the clocks of other machines say: seconds that ours is ahead, by the name of the service."""

    def __init__(self) -> None:
        self.ahead: dict[str, float] = {}

    def note(self, name: str, answer: httpx.Response) -> None:
        """Take the time from an answer; the header gives whole seconds, cut off, so half of one is added."""
        if date := answer.headers.get("date"):
            self.ahead[name] = (datetime.now(UTC) - parsedate_to_datetime(date)).total_seconds() - 0.5


def prefect_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """``PREFECT_*`` as Prefect finds them: the environment, then the active profile of ``profiles.toml``."""
    home = Path(environment.get("PREFECT_HOME", Path.home() / ".prefect"))
    file = Path(environment.get("PREFECT_PROFILES_PATH", home / "profiles.toml"))
    found: dict[str, str] = {}
    try:
        profiles = tomllib.loads(file.read_text(encoding="utf-8"))
        active = environment.get("PREFECT_PROFILE") or profiles.get("active", "")
        found = {name: str(value) for name, value in profiles.get("profiles", {}).get(active, {}).items()}
    except (OSError, tomllib.TOMLDecodeError):
        pass
    return found | {name: value for name, value in environment.items() if name.startswith("PREFECT_")}


def check_prefect(clocks: Clocks, environment: Mapping[str, str] = os.environ) -> Iterator[Check]:
    """The server of ``PREFECT_API_URL``: reached, and of a version that goes with the one here."""
    own = _version("prefect")
    chosen = prefect_settings(environment)
    url = chosen.get("PREFECT_API_URL", "").rstrip("/")
    if not url:
        there = f"prefect {own}" if own else "not installed"
        yield ok("prefect", f"{there}, no PREFECT_API_URL: a flow brings a temporary server of its own")
        return
    headers = {}
    if key := chosen.get("PREFECT_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    elif pair := chosen.get("PREFECT_API_AUTH_STRING"):
        headers["Authorization"] = "Basic " + base64.b64encode(pair.encode()).decode()
    authority = chosen.get("PREFECT_API_SSL_CERT_FILE")
    context = ssl.create_default_context(cafile=authority) if authority else ssl.create_default_context()
    todo = "start it (prefect server start), or correct PREFECT_API_URL, which ends with /api"
    with httpx.Client(headers=headers, verify=context, timeout=PATIENCE) as client:
        try:
            health, version = client.get(f"{url}/health"), client.get(f"{url}/admin/version")
        except httpx.HTTPError as error:
            yield problem("prefect", f"{plain(url)}: {error}", todo)
            return
    clocks.note("Prefect", health)
    if {health.status_code, version.status_code} & {401, 403}:
        yield problem("prefect", f"{plain(url)} refuses the key", "set PREFECT_API_KEY or PREFECT_API_AUTH_STRING")
        return
    if health.status_code != 200 or version.status_code != 200:
        yield problem(
            "prefect", f"{plain(url)}/health answers {health.status_code}, /admin/version {version.status_code}", todo
        )
        return
    server = str(version.json())
    found = f"{plain(url)} is up, version {server}" + (f", here {own}" if own else ", not installed here")
    if own and _older(server, own):
        yield warning("prefect", found, "upgrade the server first, then those who ask it (docs/upkeep.md)")
    else:
        yield ok("prefect", found)


def check_ray(clocks: Clocks, environment: Mapping[str, str] = os.environ) -> Iterator[Check]:
    """The cluster of ``RAY_ADDRESS``: reached, of the very same version, and with what resources.

    Its dashboard is asked, at ``RAY_API_SERVER_ADDRESS`` or port 8265 of the head.
    """
    own, address = _version("ray"), environment.get("RAY_ADDRESS", "")
    if not address or address in ("auto", "local"):
        there = f"ray {own}" if own else "not installed: work runs in one process"
        yield ok("ray", f"{there}, no RAY_ADDRESS: a cluster of this machine is started when needed")
        return
    at = urlsplit(address if "://" in address else f"ray-head://{address}")
    try:
        socket.create_connection((at.hostname or "", at.port or 6379), PATIENCE).close()
    except OSError as error:
        yield problem(
            "ray", f"{address}: {error.strerror or error}", "start the head (ray start --head), or correct RAY_ADDRESS"
        )
        return
    here = f"http://{at.hostname}:8265" if at.scheme != "http" else address
    dashboard = environment.get("RAY_API_SERVER_ADDRESS", here).rstrip("/")
    headers = _ray_token(environment)
    try:
        with httpx.Client(headers=headers, timeout=PATIENCE) as client:
            version = client.get(f"{dashboard}/api/version")
            if version.status_code in (401, 403):
                yield problem(
                    "ray",
                    f"{plain(dashboard)} refuses the token",
                    "set RAY_AUTH_TOKEN, or copy ~/.ray/auth_token of the head",
                )
                return
            status = client.get(f"{dashboard}/api/cluster_status")
            version.raise_for_status()
            status.raise_for_status()
            running = str(version.json()["ray_version"])
            usage = status.json()["data"]["clusterStatus"]["loadMetricsReport"]["usage"]
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        said = str(error).partition("\n")[0]
        yield warning("ray", f"{address} answers, its dashboard at {plain(dashboard)} does not: {said}",
                      "set RAY_API_SERVER_ADDRESS to the dashboard's address, or look with: ray status")  # fmt: skip
        return
    clocks.note("Ray", version)
    if own != running:
        yield problem("ray", f"the cluster runs {running}, here is {own or 'none'}", f"pip install 'ray=={running}'")
    else:
        yield ok("ray", f"{address}, version {running}")
    cpus, gpus = (usage.get(kind, [0.0, 0.0]) for kind in ("CPU", "GPU"))
    found = f"{cpus[0]:g} of {cpus[1]:g} CPUs and {gpus[0]:g} of {gpus[1]:g} GPUs are taken"
    if cpus[1] < 1:
        yield problem("ray resources", found, "add a worker: ray start --address HEAD:6379")
    elif cpus[1] - cpus[0] < 1:
        yield warning("ray resources", found, "work waits until others are done; add a worker")
    else:
        yield ok("ray resources", found)


def _ray_token(environment: Mapping[str, str]) -> dict[str, str]:
    """The header of a cluster that asks for a token, as Ray does where ``~/.ray/auth_token`` is there."""
    if environment.get("RAY_AUTH_MODE") == "disabled":
        return {}
    token = environment.get("RAY_AUTH_TOKEN", "")
    path = Path(environment.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray/auth_token"))
    if not token and path.is_file():
        token = path.read_text(encoding="utf-8").strip()
    return {"Authorization": f"Bearer {token}"} if token else {}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _older(server: str, client: str) -> bool:
    from packaging.version import Version

    return Version(server) < Version(client)


# --- certificates and clocks ---------------------------------------------------------------------------------------


def check_certificates(places: Sequence[str], authority: str | None = None) -> Iterator[Check]:
    """How long certificates are valid: of files (PEM, each certificate in it), and of servers ``https://host:port``.

    Args:
        places: Files and addresses.
        authority: Certificates that servers are held to, PEM; by default those of the system.
    """
    for place in places:
        name = f"certificate {plain(place) if '://' in place else place}"
        try:
            ends = _served_until(place, authority) if "://" in place else _file_until(Path(place))
        except ssl.SSLCertVerificationError as error:
            yield problem(
                name, error.verify_message, "renew it, or name the authority that signed it: --authority FILE"
            )
            continue
        except (OSError, ValueError) as error:
            yield problem(name, str(error), "name a PEM file or an address https://host:port")
            continue
        days = (ends - datetime.now(UTC)).days
        if ends < datetime.now(UTC):
            yield problem(name, f"expired on {ends:%Y-%m-%d}", "renew it")
        elif days < SOON:
            yield warning(name, f"valid until {ends:%Y-%m-%d}, {days} days", "renew it now")
        else:
            yield ok(name, f"valid until {ends:%Y-%m-%d}")


def _served_until(url: str, authority: str | None) -> datetime:
    at = urlsplit(url)
    context = ssl.create_default_context(cafile=authority)
    with (
        socket.create_connection((at.hostname or "", at.port or 443), PATIENCE) as wire,
        context.wrap_socket(wire, server_hostname=at.hostname) as tls,
    ):
        found = tls.getpeercert() or {}
    return datetime.fromtimestamp(ssl.cert_time_to_seconds(str(found["notAfter"])), UTC)


def _file_until(path: Path) -> datetime:
    """When the first of the certificates in a file ends."""
    try:
        from cryptography import x509
    except ImportError:
        raise ValueError("reading certificates needs the package cryptography: pip install cryptography") from None
    return min(found.not_valid_after_utc for found in x509.load_pem_x509_certificates(path.read_bytes()))


def check_clock(clocks: Clocks, environment: Mapping[str, str] = os.environ) -> Iterator[Check]:
    """This clock against those of the services that answered and of the object store, and whether it is kept at all."""
    if endpoint := environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL"):
        with contextlib.suppress(httpx.HTTPError):  # that it does not answer is said with the storage
            clocks.note("the object store", httpx.get(endpoint, timeout=PATIENCE))
    for name, ahead in clocks.ahead.items():
        found = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} {name}"
        todo = "synchronise both clocks (NTP): signatures and tokens hold for minutes only"
        if abs(ahead) < SKEW:
            yield ok("clock", f"as that of {name}")
        else:
            yield problem("clock", found, todo) if abs(ahead) >= FAR else warning("clock", found, todo)
    kept = synchronised()
    if kept is None:
        if not clocks.ahead:
            yield warning("clock", "nothing to compare it with here", "compare it with that of another machine")
    elif kept:
        yield ok("clock", "synchronised (NTP)")
    else:
        yield warning(
            "clock", "the system says that it is not synchronised", "start chrony or systemd-timesyncd on the host"
        )


def synchronised() -> bool | None:
    """Whether the kernel's clock is kept by NTP; None where it cannot be asked."""
    try:
        ask = ctypes.CDLL(None, use_errno=True).adjtimex
    except (OSError, AttributeError):
        return None
    answer = ask(ctypes.create_string_buffer(512))  # all zero: only asks; struct timex is smaller than this
    return None if answer < 0 else answer != _UNSYNCHRONISED
