"""Keys, tokens, scopes and rates: who gets in, who does not, and what is kept of a key."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from serve.access import Access, Keys, add_key, allow, is_loopback, read_keys, revoke_key
from serve.errors import Refused
from serve.options import Oidc, Options, ServeError, checked

jwt = pytest.importorskip("jwt")
pytest.importorskip("limits")


def door(path: Path, **choices: Any) -> Access:
    return Access(Options(state=path.parent, keys=path, **choices))


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


def refused(access: Access, headers: dict[str, str]) -> Refused:
    with pytest.raises(Refused) as caught:
        access.caller(headers)
    return caught.value


def test_a_key_opens_and_only_its_hash_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    secret = add_key(path, "clinic", ["classify", "batches"])
    assert secret not in path.read_text()
    assert path.stat().st_mode & 0o077 == 0
    for headers in (bearer(secret), {"x-api-key": secret}):
        found = door(path).caller(headers)
        assert (found.name, found.scopes) == ("clinic", {"classify", "batches"})


@pytest.mark.parametrize(
    ("headers", "code"),
    [({}, "no_key"), (bearer(""), "no_key"), (bearer("dfk_wrong"), "unknown_key"), ({"x-api-key": "x"}, "unknown_key"),
     ({"authorization": "Basic dXNlcjpwYXNz"}, "no_key"), (bearer("dfk_" + "é" * 40), "unknown_key")],
)  # fmt: skip
def test_no_key_and_a_wrong_key_are_401(tmp_path: Path, headers: dict[str, str], code: str) -> None:
    path = tmp_path / "keys.json"
    add_key(path, "clinic", ["classify"])
    error = refused(door(path), headers)
    assert (error.status, error.code) == (401, code)
    assert error.response("r").headers["www-authenticate"] == "Bearer"


def test_an_expired_key_is_told_so(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    secret = add_key(path, "old", ["classify"], days=0)
    error = refused(door(path), bearer(secret))
    assert (error.status, error.code) == (401, "expired")


def test_a_missing_scope_is_403_and_names_it(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    caller = door(path).caller(bearer(add_key(path, "clinic", ["classify"])))
    allow(caller, ["classify"])
    with pytest.raises(Refused) as caught:
        allow(caller, ["classify", "review"])
    assert caught.value.status == 403
    assert "review" in caught.value.message


def test_a_revoked_key_stops_working_while_the_service_runs(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    secret = add_key(path, "clinic", ["classify"])
    keys = Keys(path)
    assert keys.find(secret) is not None
    revoke_key(path, "clinic")
    time.sleep(0.6)
    assert keys.find(secret) is None


def test_a_name_is_given_once_and_scopes_are_known(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    add_key(path, "clinic", ["classify"])
    for name, scopes in (("clinic", ["classify"]), ("x", ["everything"]), ("x", []), ("a b", ["classify"])):
        with pytest.raises(ServeError):
            add_key(path, name, scopes)
    assert [key.name for key in read_keys(path).keys] == ["clinic"]


def test_beyond_the_rate_is_429_with_a_time(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    one, other = add_key(path, "one", ["classify"]), add_key(path, "other", ["classify"])
    access = door(path, rate="3/minute")
    for _ in range(3):
        access.caller(bearer(one))
    error = refused(access, bearer(one))
    assert error.status == 429
    assert 0 < int(error.response("r").headers["retry-after"]) <= 60
    access.caller(bearer(other))  # one key's haste is not another's


def test_open_only_on_purpose(tmp_path: Path) -> None:
    with pytest.raises(ServeError, match="neither keys"):
        checked(Options(state=tmp_path))
    assert checked(Options(state=tmp_path, open=True)).open
    assert [is_loopback(h) for h in ("127.0.0.1", "localhost", "::1", "0.0.0.0", "10.0.0.1")] == [True] * 3 + [
        False
    ] * 2


# --- tokens ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def provider(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Oidc]:
    """The private key of an identity provider, and where its public one lies."""
    from cryptography.hazmat.primitives.asymmetric import ec

    private = ec.generate_private_key(ec.SECP256R1())
    public = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(private.public_key())) | {"kid": "k1", "alg": "ES256"}
    path = tmp_path_factory.mktemp("jwks") / "jwks.json"
    path.write_text(json.dumps({"keys": [public]}))
    return private, Oidc(jwks=str(path), issuer="https://id.example", audience="dermaflow")


def a_token(private: Any, kid: str = "k1", algorithm: str = "ES256", **changes: Any) -> str:
    claims = {"iss": "https://id.example", "aud": "dermaflow", "sub": "dr.ada", "scope": "classify review other",
              "exp": datetime.now(UTC) + timedelta(minutes=5)} | changes  # fmt: skip
    return str(jwt.encode({k: v for k, v in claims.items() if v is not None}, private, algorithm, headers={"kid": kid}))


def test_a_token_gives_its_scopes_and_no_name_of_a_person(tmp_path: Path, provider: tuple[Any, Oidc]) -> None:
    access = Access(Options(state=tmp_path, oidc=provider[1]))
    caller = access.caller(bearer(a_token(provider[0])))
    assert caller.scopes == {"classify", "review"}
    assert "ada" not in caller.name


@pytest.mark.parametrize(
    "changes",
    [{"exp": datetime(2020, 1, 1, tzinfo=UTC)}, {"aud": "another"}, {"iss": "https://evil.example"}, {"exp": None},
     {"kid": "k2"}],
)  # fmt: skip
def test_a_token_of_another_time_place_or_key_is_401(
    tmp_path: Path, provider: tuple[Any, Oidc], changes: dict[str, Any]
) -> None:
    access = Access(Options(state=tmp_path, oidc=provider[1]))
    assert refused(access, bearer(a_token(provider[0], **changes))).status == 401


def test_a_token_cannot_choose_how_it_is_checked(tmp_path: Path, provider: tuple[Any, Oidc]) -> None:
    access = Access(Options(state=tmp_path, oidc=provider[1]))
    unsigned = jwt.encode({"iss": "https://id.example", "aud": "dermaflow", "sub": "x", "exp": time.time() + 60}, "",
                          "none", headers={"kid": "k1"})  # fmt: skip
    symmetric = a_token("public key as secret, long enough for HS256", algorithm="HS256")
    for token in (unsigned, symmetric, "a.b.c", "x"):
        assert refused(access, bearer(token)).status == 401
