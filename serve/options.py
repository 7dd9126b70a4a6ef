"""Everything that can be set of a running service, in one place; `serve/config.yaml` and `dermaflow serve` fill it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from dermaflow.errors import DermaflowError

MIB = 1 << 20


class ServeError(DermaflowError):
    """The service cannot be started or changed as asked."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Limits(_Strict):
    """What one request may ask for. What is larger is refused, never cut."""

    body: int = Field(64 * MIB, ge=1, description="bytes of a request with images or cases")
    images: int = Field(64, ge=1, description="images of a request")
    image: int = Field(32 * MIB, ge=1, description="bytes of one image")
    pixels: int = Field(400_000_000, ge=1, description="pixels of all readable images of a request together")
    cases: int = Field(200, ge=1, description="cases of a request")
    upload: int = Field(8192 * MIB, ge=1, description="bytes of an upload to a batch")
    files: int = Field(20_000, ge=1, description="images of an upload that is no archive")
    members: int = Field(500_000, ge=1, description="members of an uploaded archive, where it says how many")
    patients: int = Field(64 * MIB, ge=1, description="bytes of a table of patients")
    spare: int = Field(512 * MIB, ge=0, description="bytes that an upload must leave free on the disk")
    queued: int = Field(200, ge=1, description="batches that wait")
    in_flight: int = Field(128, ge=1, description="requests that are worked on at once, by one ingress")
    streams: int = Field(64, ge=1, description="clients that watch a batch at once, by one ingress")
    timeout: float = Field(60, gt=0, description="seconds for a request; uploads and event streams excepted")
    upload_time: float = Field(4 * 3600, gt=0, description="seconds for an upload")
    idle: float = Field(30, gt=0, description="seconds without a byte after which an upload is given up")


class Oidc(_Strict):
    """Tokens of an identity provider, beside or instead of keys."""

    jwks: str = Field(pattern=r"^(https://.+|[^:]+)$", description="file or https address of its public keys (JWKS)")
    issuer: str = Field(min_length=1)
    audience: str = Field(min_length=1)
    scope_claim: str = "scope"  # text with blanks between, or a list


class Options(_Strict):
    """How the service runs."""

    model: str = Field("champion", description="bundle folder or address, or a version of the registry")
    state: Path = Field(Path("runs/serve"), description="jobs, uploads, results, audit log")
    database: SecretStr | None = Field(
        None, description="SQLAlchemy address of the jobs; default SQLite in the state folder. It may hold a password: "
        "better in PGPASSFILE"
    )  # fmt: skip
    keys: Path | None = Field(None, description="file of hashed keys")
    oidc: Oidc | None = None
    open: bool = Field(False, description="ask for no key; only for a service bound to loopback")
    hosts: tuple[str, ...] = Field((), description="host names that an open service answers to, beside loopback's")
    sources: tuple[str, ...] = Field((), description="folders and s3:// prefixes that a batch may name")
    rate: str = Field("1200/minute", description="requests of one key, per ingress replica")
    replicas: int = Field(1, ge=1, description="of the classifier")
    recommenders: int = Field(1, ge=1)
    ingresses: int = Field(1, ge=1)
    cpus: float = Field(0.5, ge=0, description="CPUs that Ray reserves for a classifier")
    gpus: float = Field(0, ge=0, description="share of a GPU for a classifier")
    threads: int | None = Field(None, ge=1, description="of a classifier; default DERMAFLOW_THREADS")
    batch: int = Field(16, ge=1, le=512, description="largest number of images scored at once")
    wait_ms: Annotated[float, Field(ge=0, le=1000)] = 4.0  # for more images to come, before a batch goes
    working: int = Field(
        128, ge=1, description="requests that one classifier holds; beyond, Serve asks again at ever longer intervals"
    )
    waiting: int = Field(64, ge=1, description="requests that wait for a classifier, per ingress, before 503")
    jobs: int = Field(1, ge=1, description="batches scored at once")
    limits: Limits = Limits()

    @model_validator(mode="after")
    def _absolute(self) -> Options:
        """Replicas start in another folder than the one the path was written for."""
        if ":/" not in str(self.state):  # an address is refused by who starts the service
            object.__setattr__(self, "state", self.state.absolute())
        if self.keys is not None:
            object.__setattr__(self, "keys", self.keys.absolute())
        return self

    @property
    def database_url(self) -> str:
        if self.database is not None:
            return self.database.get_secret_value()
        return f"sqlite:///{self.state / 'jobs.sqlite'}"

    def to_send(self) -> dict[str, Any]:
        """All but the model as JSON, for the process of a replica; the password is in the clear here only."""
        return self.model_dump(mode="json", exclude={"model"}) | {
            "database": None if self.database is None else self.database.get_secret_value()
        }


def checked(options: Options) -> Options:
    """The options, if they leave no door open.

    Raises:
        ServeError: Neither keys nor tokens are asked for, and that was not said on purpose.
    """
    if not options.open and options.keys is None and options.oidc is None:
        raise ServeError(
            "neither keys nor an identity provider", where="serve", expected="keys, oidc, or open: true on loopback",
            todo="make a key: python -m serve keys add --keys FILE --name NAME --scope classify",
        )  # fmt: skip
    return options
