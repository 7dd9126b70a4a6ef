"""What `dermaflow site check` looks at before a site joins: each a function, each failure with what to do."""

from __future__ import annotations

import hashlib
import logging
import os
import ssl
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib import resources
from pathlib import Path

from clients.offline import SWITCHES
from clients.policy import Policy, load_policy
from clients.site_config import SiteConfig, SiteError, load_site
from dermaflow.errors import DermaflowError
from dermaflow.taxonomy import CODES

AHEAD, BEHIND = 4.0, 240.0
"""Seconds that the site's clock may differ. Flower's hub refuses signatures from 5 s ahead or 305 s behind its own."""
SOON = 30  # days before a certificate's end at which it is said


@dataclass(frozen=True)
class Check:
    """One line of the result."""

    name: str
    ok: bool
    found: str
    todo: str = ""


@dataclass(frozen=True)
class HubView:
    """The hub as this site sees it."""

    status: int  # of GET /health
    certificate_ends: datetime
    ahead: float | None  # seconds that this machine's clock is ahead of the hub's, known to a second; None: not told


def check_site(folder: str | Path) -> Iterator[Check]:
    """Look at a site's folder, its images and its hub, as far as one rests on the other."""
    try:
        site, policy = load_site(folder), load_policy(folder)
    except DermaflowError as error:
        yield _failed("configuration", error)
        return
    yield Check("configuration", True, f"{site.name}, hub {site.superlink}")
    yield _tried("key", lambda: _key(site))
    yield _tried("authority", lambda: _authority(site))
    yield from _images(site, policy)
    yield _apps(policy)
    yield from _hub(site)


def _failed(name: str, error: DermaflowError) -> Check:
    where = f"{error.where}: " if error.where else ""
    expected = f"; expected {error.expected}" if error.expected else ""
    return Check(name, False, f"{where}{error.what}{expected}", error.todo or "")


def _tried(name: str, look: Callable[[], str]) -> Check:
    try:
        return Check(name, True, look())
    except DermaflowError as error:
        return _failed(name, error)


def _key(site: SiteConfig) -> str:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_private_key

    todo = "make a new site with dermaflow site init and send its public key to the coordinator"
    try:
        key = load_ssh_private_key(site.key.read_bytes(), None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise SiteError(str(error), where=site.key, expected="a private key, OpenSSH", todo=todo) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise SiteError("not an elliptic curve key", where=site.key, expected="ECDSA P-384", todo=todo)
    if (mode := stat.S_IMODE(site.key.stat().st_mode)) & 0o077:
        raise SiteError(
            f"mode {mode:o}", where=site.key, expected="600: no others may read it", todo=f"chmod 600 {site.key}"
        )
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    sent = site.key.with_suffix(".pub")
    if sent.exists() and sent.read_bytes().split()[:2] != public.split():
        raise SiteError("not the public half of the key", where=sent, todo=todo)
    return f"{key.curve.name}, only this user reads it"


def _authority(site: SiteConfig) -> str:
    from cryptography import x509

    todo = "ask the coordinator for ca.crt"
    try:
        certificate = x509.load_pem_x509_certificate(site.root_certificate.read_bytes())
    except (OSError, ValueError) as error:
        raise SiteError(str(error), where=site.root_certificate, expected="a certificate, PEM", todo=todo) from error
    return _until(certificate.not_valid_after_utc, str(site.root_certificate), todo)


def _until(end: datetime, where: str, todo: str) -> str:
    days = (end - datetime.now(UTC)).days
    if end < datetime.now(UTC):
        raise SiteError(f"expired on {end:%Y-%m-%d}", where=where, todo=todo)
    return f"valid until {end:%Y-%m-%d}" + (f": only {days} days, {todo}" if days < SOON else "")


def _images(site: SiteConfig, policy: Policy) -> Iterator[Check]:
    from dermaflow.preparation.reading import ShardFolder

    try:
        counts = ShardFolder(site.shards).manifest.counts
    except DermaflowError as error:
        yield _failed("images", error)
        return
    for split, of_class in counts.items():
        found = " ".join(f"{dx} {of_class.get(dx, 0)}" for dx in CODES)
        yield Check(f"images, {split}", True, f"{sum(of_class.values())}: {found}")
    unknown = sorted({dx for of_class in counts.values() for dx in of_class} - set(CODES))
    yield Check(
        "diagnoses", not unknown, f"unknown: {' '.join(unknown)}" if unknown else f"all of {' '.join(CODES)}",
        "prepare the shards with this version of DermaFlow",
    )  # fmt: skip
    least, train = policy.min_images_per_class, counts.get("train", {})
    few = [f"{dx} {train[dx]}" for dx in CODES if 0 < train.get(dx, 0) < least]
    yield Check(
        "least counts", not few and any(train.values()),
        f"below {least}: {', '.join(few)}" if few else f"every diagnosis that is there has {least} or more",
        "lower min_images_per_class in policy.yaml, or leave these images out of the shards",
    )  # fmt: skip


def _apps(policy: Policy) -> Check:
    """No app approved is no failure: the coordinator sends the hash later."""
    if not policy.approved_apps:
        return Check("apps", True, "none approved yet: this site refuses every run. dermaflow site approve HASH")
    return Check("apps", True, f"approved: {' '.join(app[:12] for app in policy.approved_apps)}")


def _hub(site: SiteConfig) -> Iterator[Check]:
    try:
        view = look_at_hub(site)
    except DermaflowError as error:
        yield _failed("hub", error)
        return
    yield Check(
        "hub", view.status == 200, f"{site.address}/health answers {view.status}",
        "ask the coordinator whether the hub runs",
    )  # fmt: skip
    yield _tried(
        "hub's certificate",
        lambda: f"for {site.host}, " + _until(view.certificate_ends, site.superlink, "tell the coordinator"),
    )
    if view.ahead is None:
        yield Check("clock", True, "cannot be compared: what answers at the hub's address does not say its time")
        return
    yield Check(
        "clock", -BEHIND < view.ahead < AHEAD, f"{abs(view.ahead):.0f} s {'ahead of' if view.ahead > 0 else 'behind'} "
        "the hub", "synchronise this machine's clock (NTP): the hub refuses signatures from another time",
    )  # fmt: skip


def look_at_hub(site: SiteConfig) -> HubView:
    """Connect to the hub as the node will, proxy included, and see what its certificate and its clock say.

    Raises:
        SiteError: No connection, or a certificate that does not hold, and why.
    """
    import httpx

    logging.getLogger("httpx").setLevel(logging.WARNING)  # or it tells of every request
    try:
        context = ssl.create_default_context(cafile=str(site.root_certificate))
    except (OSError, ssl.SSLError) as error:
        raise SiteError(str(error), where=site.root_certificate, todo="ask the coordinator for ca.crt") from error
    try:
        with (
            httpx.Client(verify=context, timeout=10) as client,
            client.stream("GET", f"{site.address}/health") as answer,
        ):
            now = datetime.now(UTC)
            ends = answer.extensions["network_stream"].get_extra_info("ssl_object").getpeercert()["notAfter"]
            date = answer.headers.get("date")
    except httpx.HTTPError as error:
        raise _no_connection(site, error) from error
    # the header gives whole seconds, cut off, so half of the last one is added
    ahead = (now - parsedate_to_datetime(date)).total_seconds() - 0.5 if date else None
    return HubView(answer.status_code, datetime.fromtimestamp(ssl.cert_time_to_seconds(ends), UTC), ahead)


def _no_connection(site: SiteConfig, error: Exception) -> SiteError:
    link: BaseException | None = error
    while link is not None and not isinstance(link, ssl.SSLCertVerificationError):
        link = link.__cause__ or link.__context__
    if not isinstance(link, ssl.SSLCertVerificationError):
        return SiteError(
            f"no connection: {error}", where=site.superlink, expected="the hub's public address",
            todo="check superlink in site.yaml and the firewall (outwards only); is the hub up?",
        )  # fmt: skip
    todo = {
        9: "synchronise this machine's clock, or wait: the certificate is of the future",
        10: "tell the coordinator: the hub needs a new certificate (make_certificates.sh); ca.crt stays",
        62: "use the host name that the certificate holds, or ask the coordinator to add this one",
        64: "use the address that the certificate holds, or ask the coordinator to add this one",
    }.get(link.verify_code, "this is not the hub that ca.crt stands for: ask the coordinator, and do not go on")
    return CertificateError(f"the hub's certificate: {link.verify_message}", where=site.superlink, todo=todo)


class CertificateError(SiteError):
    """Who answers at the hub's address cannot prove to be the hub."""


def installed_app() -> str:
    """SHA-256 of the app that comes with this DermaFlow, as a hub sends it."""
    with resources.as_file(resources.files("clients") / "app") as app:
        return fab_hash(app)


def fab_hash(app: Path) -> str:
    """SHA-256 of an app's bundle (FAB), which Flower makes the same way from the same files everywhere."""
    os.environ.update(SWITCHES)
    from flwr.cli.build import build_fab_from_disk

    return hashlib.sha256(build_fab_from_disk(app)).hexdigest()
