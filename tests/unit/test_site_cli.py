"""`dermaflow site` without a hub: what it writes, what it says, and its exit status."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from federation_processes import MAKE_CERTIFICATES
from tiny_data import draw
from typer.testing import CliRunner, Result

from clients.launcher import check_app
from clients.policy import Refused, load_policy
from clients.site_cli import app
from clients.site_config import load_site
from dermaflow.audit import AuditLog
from dermaflow.preparation.prepare import prepare


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import subprocess

    folder = tmp_path_factory.mktemp("certificates")
    subprocess.run([MAKE_CERTIFICATES, folder, "localhost"], check=True, capture_output=True)
    return folder / "ca.crt"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    prepare(draw(folder / "archive"), folder / "shards", use_ray=False)
    return folder / "shards"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def init(folder: Path, authority: Path, shards: Path = Path("shards"), **options: str) -> Result:
    chosen = {"name": "st-mary", "superlink": "localhost:1"} | options
    flags = [part for name, value in chosen.items() for part in (f"--{name}", value)]
    return run("init", "--site", folder, "--shards", shards, "--ca", authority, *flags)


def test_init_makes_a_key_that_only_this_user_reads(tmp_path: Path, authority: Path) -> None:
    done = init(tmp_path / "site", authority)
    assert done.exit_code == 0, done.output
    site = load_site(tmp_path / "site")
    private = load_ssh_private_key(site.key.read_bytes(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey) and private.curve.name == "secp384r1"
    assert site.key.stat().st_mode & 0o777 == 0o600
    public = (tmp_path / "site/key.pub").read_text().strip()
    assert public in done.output and public.endswith(" st-mary")
    loaded = load_ssh_public_key(public.encode())
    assert isinstance(loaded, ec.EllipticCurvePublicKey)
    assert loaded.public_numbers() == private.public_key().public_numbers()
    assert site.root_certificate.read_bytes() == authority.read_bytes()
    assert Path(site.shards).is_absolute()
    assert load_policy(tmp_path / "site").approved_apps == []


def test_init_never_replaces_a_key(tmp_path: Path, authority: Path) -> None:
    assert init(tmp_path, authority).exit_code == 0
    before = (tmp_path / "key").read_bytes()
    assert init(tmp_path, authority).exit_code == 1
    assert (tmp_path / "key").read_bytes() == before


@pytest.mark.parametrize("options", [{"name": "St Mary"}, {"superlink": "https://hub:1"}, {"superlink": "hub"}])
def test_init_refuses_what_cannot_work(tmp_path: Path, authority: Path, options: dict[str, str]) -> None:
    assert init(tmp_path / "site", authority, **options).exit_code != 0
    assert not (tmp_path / "site").exists()


def test_init_wants_a_certificate(tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_text("no certificate")
    assert init(tmp_path / "site", tmp_path / "ca.crt").exit_code == 1
    assert not (tmp_path / "site").exists()


def lines(result: Result) -> dict[str, bool]:
    found = [line for line in result.output.splitlines() if line.startswith(("ok", "failed"))]
    return {line[7:].split(":")[0]: line.startswith("ok") for line in found}


def test_check_looks_at_everything_and_says_what_to_do(tmp_path: Path, authority: Path, shards: Path) -> None:
    init(tmp_path, authority, shards)
    done = run("check", "--site", tmp_path)
    assert done.exit_code == 1
    assert [name for name, ok in lines(done).items() if not ok] == ["hub"]  # nothing listens on port 1
    assert "firewall" in done.output and "images, train" in lines(done)

    (tmp_path / "key").chmod(0o644)
    policy = tmp_path / "policy.yaml"
    policy.write_text(policy.read_text().replace("min_images_per_class: 0", "min_images_per_class: 1000"))
    done = run("check", "--site", tmp_path)
    assert [name for name, ok in lines(done).items() if not ok] == ["key", "least counts", "hub"]
    assert "chmod 600" in done.output


def test_check_finds_a_public_key_that_is_another_sites(tmp_path: Path, authority: Path, shards: Path) -> None:
    """The coordinator would register it, and refuse every message of this site."""
    init(tmp_path / "site", authority, shards)
    init(tmp_path / "other", authority, shards)
    shutil.copy(tmp_path / "other" / "key.pub", tmp_path / "site" / "key.pub")
    done = run("check", "--site", tmp_path / "site")
    assert not lines(done)["key"] and "key.pub: not the public half of the key" in done.output


def test_check_without_images_or_configuration(tmp_path: Path, authority: Path) -> None:
    init(tmp_path / "site", authority, tmp_path / "none")
    assert lines(run("check", "--site", tmp_path / "site"))["images"] is False
    (tmp_path / "site/site.yaml").write_text("name: [")
    assert lines(run("check", "--site", tmp_path / "site")) == {"configuration": False}


def test_an_app_is_checked_by_its_own_bytes(tmp_path: Path, authority: Path) -> None:
    init(tmp_path, authority)
    content = b"an app"
    with pytest.raises(Refused, match="not approved"):
        check_app(tmp_path, content)
    assert run("approve", hashlib.sha256(content).hexdigest(), "--site", tmp_path).exit_code == 0
    check_app(tmp_path, content)
    with pytest.raises(Refused):
        check_app(tmp_path, content + b"!")
    (tmp_path / "policy.yaml").write_text("approved_app: []")
    with pytest.raises(Refused, match="cannot be read"):  # closed, not open, when in doubt
        check_app(tmp_path, content)


def test_status_shows_the_log_and_notices_a_change(tmp_path: Path, authority: Path) -> None:
    init(tmp_path, authority)
    log = AuditLog(tmp_path / "audit.jsonl")
    log.append("message in", bytes=70, run="1")
    last = log.append("message out", bytes=50, run="1")
    done = run("status", "--site", tmp_path)
    assert done.exit_code == 0 and "no node runs" in done.output and last in done.output
    log.path.write_text(log.path.read_text().replace('"bytes":70', '"bytes":71'))
    assert run("status", "--site", tmp_path).exit_code == 1
    assert "no node runs" in run("leave", "--site", tmp_path).output


def test_approve_without_a_hash_takes_the_app_of_this_installation(tmp_path: Path, authority: Path) -> None:
    init(tmp_path, authority)
    assert run("approve", "--site", tmp_path).exit_code == 0
    assert run("approve", "abc", "--site", tmp_path).exit_code == 1
    assert len(load_policy(tmp_path).approved_apps) == 1
