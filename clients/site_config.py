"""What a site knows of itself and its hub: `site.yaml` in the site's folder.

site-folder/
    site.yaml        name, images, address of the hub
    policy.yaml      what is allowed here
    key, key.pub     who this site is; `key` never leaves it
    ca.crt           who the hub must be
    audit.jsonl      what came in and went out
    state/           what the model keeps here between rounds
    run/             of the running node
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from dermaflow import storage
from dermaflow.errors import DermaflowError

NAME = "site.yaml"
AUDIT_NAME = "audit.jsonl"


class SiteError(DermaflowError):
    """A site's folder is incomplete, or the site cannot join as it is."""


class SiteConfig(BaseModel):
    """A site."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")] = Field(
        description="of the hospital, in lower case letters, digits and hyphens"
    )
    shards: str = Field(min_length=1, description="folder that `dermaflow prepare` wrote, or s3://")
    superlink: Annotated[str, StringConstraints(pattern=r"^(\[[0-9a-fA-F:]+\]|[A-Za-z0-9.-]+):\d{1,5}$")] = Field(
        description="the hub, host:port"
    )
    root_certificate: Path = Field(Path("ca.crt"), description="certificate of the authority that signed the hub's")
    key: Path = Field(Path("key"), description="private key of this site")

    @property
    def host(self) -> str:
        """Host name or address of the hub, without brackets."""
        return self.superlink.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        return int(self.superlink.rpartition(":")[2])

    @property
    def address(self) -> str:
        """Of the hub, https."""
        return f"https://{self.superlink}"


def load_site(folder: str | Path) -> SiteConfig:
    """Read a site's folder; relative paths in the file are relative to the folder.

    Raises:
        SiteError: The file is missing, is no YAML, or holds an unknown key or an impossible value.
    """
    folder = Path(folder).absolute()
    path = folder / NAME
    try:
        content = yaml.safe_load(path.read_text()) or {}
        site = SiteConfig.model_validate(content)
    except OSError as error:
        raise SiteError(
            error.strerror or str(error), where=path, expected="a site's folder", todo="make one: dermaflow site init"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SiteError(f"no YAML: {error}", where=path) from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise SiteError(
            f"{place}: {first['msg']}, found {first['input']!r}", where=path,
            expected=_expected(place), todo="correct the file",
        ) from error  # fmt: skip
    shards = site.shards if storage.is_remote(site.shards) else str(folder / site.shards)
    return site.model_copy(
        update={"shards": shards, "root_certificate": folder / site.root_certificate, "key": folder / site.key}
    )


def _expected(place: str) -> str:
    field = SiteConfig.model_fields.get(place)
    return str(field.description) if field else f"keys {' '.join(SiteConfig.model_fields)}"


def save_site(folder: str | Path, site: SiteConfig) -> Path:
    """Write `site.yaml`, with a comment on each key.

    Returns:
        Its path.
    """
    lines = ["# This site and its hub. Relative paths are relative to this folder."]
    for name, field in SiteConfig.model_fields.items():
        value = yaml.safe_dump({name: str(getattr(site, name))}, allow_unicode=True).strip()
        lines.append(f"{value}  # {field.description}")
    path = Path(folder) / NAME
    storage.write_bytes(path, ("\n".join(lines) + "\n").encode())
    return path


def make_site(folder: str | Path, site: SiteConfig, authority: str | Path) -> str:
    """Write a site's folder: configuration, policy, a new key pair, the certificate of the hub's authority.

    Args:
        folder: New or empty.
        site: Its paths must be the defaults.
        authority: PEM file that the coordinator sent.

    Returns:
        The public key, one line in OpenSSH's format, for the coordinator.

    Raises:
        SiteError: There is a site already, or the certificate is none.
    """
    from cryptography import x509

    from clients.policy import NAME as POLICY_NAME
    from clients.policy import TEMPLATE

    folder = Path(folder)
    if (folder / NAME).exists() or (folder / site.key).exists():
        raise SiteError("there is a site already", where=folder, todo="choose another folder; its key stays its key")
    try:
        certificate = Path(authority).read_bytes()
        x509.load_pem_x509_certificate(certificate)
    except (OSError, ValueError) as error:
        raise SiteError(
            str(error), where=authority, expected="a certificate, PEM", todo="ask the coordinator for ca.crt"
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    storage.write_bytes(folder / site.root_certificate, certificate)
    public = _make_key(folder / site.key, site.name)
    storage.write_bytes(folder / POLICY_NAME, TEMPLATE.encode())
    save_site(folder, site)
    return public


def _make_key(path: Path, comment: str) -> str:
    """A new ECDSA P-384 pair, the kind that Flower takes for a node; the private half for this user's eyes only."""
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.OpenSSH, form.NoEncryption())
    public = key.public_key().public_bytes(form.Encoding.OpenSSH, form.PublicFormat.OpenSSH).decode()
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
        stream.write(private)
    storage.write_bytes(path.with_suffix(".pub"), f"{public} {comment}\n".encode())
    return f"{public} {comment}"
