"""Who may ask for what: keys that are only known by their hash, tokens of an identity provider, rates.

A key is ``dfk_`` and 43 random characters (256 bits), so its SHA-256 without salt cannot be guessed back. The file of
keys is read again when it changes: a key that is taken out or has expired stops working at once.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import threading
import time
import urllib.request
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from dermaflow import storage
from serve.errors import Refused
from serve.options import Oidc, Options, ServeError

Scope = Literal["classify", "recommend", "batches", "review", "metrics"]
SCOPES: tuple[str, ...] = get_args(Scope)
PREFIX = "dfk_"
ALGORITHMS = ("RS256", "ES256")
LEEWAY = 30  # seconds that clocks may differ
REFETCH = 30  # seconds between two fetches of the provider's keys, whatever tokens name
MAX_JWKS = 1 << 20


class Key(BaseModel):
    """A key as it is kept."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    scopes: list[Scope] = Field(min_length=1)
    created: datetime
    expires: datetime | None = None


class KeyFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    keys: list[Key] = []


class Caller(BaseModel):
    """Who asks. `name` is that of the key, or the subject of the token as a hash: subjects can be persons."""

    name: str
    scopes: frozenset[str]


ANYONE = Caller(name="loopback", scopes=frozenset(SCOPES))


def read_keys(path: Path) -> KeyFile:
    """The keys of a file; none if it is not there.

    Raises:
        ServeError: It is no file of keys.
    """
    if not path.exists():
        return KeyFile()
    try:
        return KeyFile.model_validate_json(path.read_bytes())
    except (ValidationError, OSError) as error:
        raise ServeError("no file of keys", where=path, expected="what `python -m serve keys add` wrote") from error


def add_key(path: Path, name: str, scopes: Iterable[str], days: float | None = None) -> str:
    """Make a key and keep its hash; the key itself is nowhere but in the result.

    Raises:
        ServeError: The name is taken or none, or a scope is unknown.
    """
    found = read_keys(path)
    if any(key.name == name for key in found.keys):
        raise ServeError(f"a key {name!r} is there", where=path, todo="revoke it first, or choose another name")
    secret = PREFIX + secrets.token_urlsafe(32)
    now = datetime.now(UTC)
    try:
        key = Key(name=name, sha256=_hash(secret), scopes=sorted(set(scopes)), created=now,
                  expires=None if days is None else now + timedelta(days=days))  # fmt: skip
    except ValidationError as error:
        raise ServeError(
            f"{'.'.join(map(str, error.errors()[0]['loc']))}: {error.errors()[0]['msg']}", where="key",
            expected=f"a plain name, scopes of {', '.join(SCOPES)}",
        ) from None  # fmt: skip
    _write(path, KeyFile(keys=[*found.keys, key]))
    return secret


def revoke_key(path: Path, name: str) -> None:
    """Take a key out; a running service notices within a second.

    Raises:
        ServeError: There is none of that name.
    """
    found = read_keys(path)
    kept = [key for key in found.keys if key.name != name]
    if len(kept) == len(found.keys):
        raise ServeError(f"no key {name!r}", where=path, expected=", ".join(k.name for k in found.keys) or "a key")
    _write(path, KeyFile(keys=kept))


def _write(path: Path, content: KeyFile) -> None:
    storage.write_bytes(path, content.model_dump_json(indent=1).encode())
    path.chmod(0o600)


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


class Keys:
    """The keys of a file, read again when it changes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int] | None = None
        self._checked = 0.0
        self._keys: list[Key] = []

    def find(self, secret: str) -> Key | None:
        """The key, compared with every one in constant time."""
        self._refresh()
        given = _hash(secret)
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.sha256, given):
                found = key
        return found

    def _refresh(self) -> None:
        if time.monotonic() - self._checked < 0.5:
            return
        self._checked = time.monotonic()
        try:
            stat = self._path.stat()
            seen = (stat.st_mtime_ns, stat.st_size)
        except OSError:
            seen = None
        if seen != self._seen or seen is None:
            self._keys, self._seen = read_keys(self._path).keys if seen else [], seen


class Tokens:
    """Tokens (JWT) of an identity provider, signed with RS256 or ES256."""

    def __init__(self, oidc: Oidc) -> None:
        self._oidc = oidc
        self._keys: dict[str | None, Any] = {}
        self._fetched = float("-inf")
        self._lock = threading.Lock()

    def check(self, token: str) -> Caller:
        """Who a token speaks for. May wait for the provider: call it in a thread.

        Raises:
            Refused: 401, whatever is wrong with it.
        """
        import jwt

        try:
            kid = jwt.get_unverified_header(token).get("kid")
            claims = jwt.decode(
                token, self._key(kid), algorithms=list(ALGORITHMS), audience=self._oidc.audience,
                issuer=self._oidc.issuer, leeway=LEEWAY, options={"require": ["exp", "iss", "aud", "sub"]},
            )  # fmt: skip
        except jwt.ExpiredSignatureError:
            raise Refused(401, "expired", "the token has expired", todo="get a new one") from None
        except (jwt.PyJWTError, ValueError, TypeError):
            raise _unknown() from None
        scopes = claims.get(self._oidc.scope_claim, "")
        words = scopes.split() if isinstance(scopes, str) else [str(s) for s in scopes]
        name = "token-" + hashlib.sha256(str(claims["sub"]).encode()).hexdigest()[:12]
        return Caller(name=name, scopes=frozenset(words) & frozenset(SCOPES))

    def _key(self, kid: str | None) -> Any:
        import jwt

        with self._lock:
            if kid not in self._keys and time.monotonic() - self._fetched > REFETCH:
                self._fetched = time.monotonic()
                found = jwt.PyJWKSet.from_dict(json.loads(_read_jwks(self._oidc.jwks)))
                self._keys = {key.key_id: key.key for key in found.keys}
            if kid is None and len(self._keys) == 1:
                return next(iter(self._keys.values()))
            if kid not in self._keys:
                raise ValueError("unknown key id")
            return self._keys[kid]


def _read_jwks(where: str) -> bytes:
    if "://" not in where:
        return Path(where).read_bytes()
    if not where.startswith("https://"):
        raise ValueError("keys of an identity provider come by https")
    with urllib.request.urlopen(where, timeout=5) as answer:
        return answer.read(MAX_JWKS)


class Access:
    """The door of one ingress replica."""

    def __init__(self, options: Options) -> None:
        from limits import parse
        from limits.storage import MemoryStorage
        from limits.strategies import MovingWindowRateLimiter

        self._open = options.open
        self._keys = Keys(options.keys) if options.keys else None
        self._tokens = Tokens(options.oidc) if options.oidc else None
        self._rate = parse(options.rate)
        self._limiter = MovingWindowRateLimiter(MemoryStorage())

    @property
    def waits(self) -> bool:
        """Whether a check may wait for the network."""
        return self._tokens is not None

    def caller(self, headers: Mapping[str, str]) -> Caller:
        """Who asks, within the rate that everybody has.

        Raises:
            Refused: 401 without a valid key, 429 beyond the rate.
        """
        found = ANYONE if self._open else self._identify(headers)
        if not self._limiter.hit(self._rate, found.name):
            until = self._limiter.get_window_stats(self._rate, found.name).reset_time - time.time()
            raise Refused(429, "rate", "too many requests with this key", expected=str(self._rate),
                          retry_after=max(until, 1))  # fmt: skip
        return found

    def _identify(self, headers: Mapping[str, str]) -> Caller:
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        secret = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "").strip()
        if not secret:
            raise Refused(401, "no_key", "no key", expected="Authorization: Bearer KEY, or X-API-Key: KEY")
        if self._tokens and not secret.startswith(PREFIX):
            return self._tokens.check(secret)
        key = self._keys.find(secret) if self._keys else None
        if key is None:
            raise _unknown()
        if key.expires is not None and key.expires <= datetime.now(UTC):
            raise Refused(401, "expired", "the key has expired", todo="ask for a new one")
        return Caller(name=key.name, scopes=frozenset(key.scopes))


def allow(caller: Caller, scopes: Iterable[str]) -> None:
    """Refuse with 403 unless the caller has all of the scopes."""
    if missing := [scope for scope in scopes if scope not in caller.scopes]:
        raise Refused(403, "scope", f"the key may not do this: no scope {', '.join(missing)}",
                      expected=f"a key with scope {', '.join(scopes)}")  # fmt: skip


def _unknown() -> Refused:
    return Refused(401, "unknown_key", "the key is not known", todo="check that it was copied whole")


def is_loopback(host: str) -> bool:
    """Whether a server bound to this host can only be reached from this machine."""
    return host in ("localhost", "::1") or host.startswith("127.")
