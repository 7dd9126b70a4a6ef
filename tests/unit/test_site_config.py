"""A site's folder: what is written is read back, and a mistake is named with its key."""

from __future__ import annotations

from pathlib import Path

import pytest

from clients.site_config import NAME, SiteConfig, SiteError, load_site, save_site

SITE = SiteConfig(name="st-mary", shards="shards", superlink="hub.example.org:8443")


def test_round_trip_with_paths_from_the_folder(tmp_path: Path) -> None:
    save_site(tmp_path, SITE)
    found = load_site(tmp_path)
    assert found.name == "st-mary" and (found.host, found.port) == ("hub.example.org", 8443)
    assert found.shards == str(tmp_path / "shards")
    assert found.key == tmp_path / "key" and found.root_certificate == tmp_path / "ca.crt"


def test_addresses(tmp_path: Path) -> None:
    save_site(tmp_path, SITE.model_copy(update={"shards": "s3://bucket/shards", "superlink": "[::1]:8443"}))
    found = load_site(tmp_path)
    assert found.shards == "s3://bucket/shards"
    assert (found.host, found.port, found.address) == ("::1", 8443, "https://[::1]:8443")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("name: st-mary", "name: St Mary"), "name"),
        (("superlink: hub.example.org:8443", "superlink: https://hub.example.org"), "superlink"),
        (("key: key", "keys: key"), "keys"),
        (("shards: shards", "shards: ''"), "shards"),
    ],
)
def test_errors_name_the_key(tmp_path: Path, change: tuple[str, str], said: str) -> None:
    path = save_site(tmp_path, SITE)
    text = path.read_text()
    assert change[0] in text
    path.write_text(text.replace(*change))
    with pytest.raises(SiteError, match=said):
        load_site(tmp_path)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(SiteError, match="site init"):
        load_site(tmp_path)
    (tmp_path / NAME).write_text("name: [")
    with pytest.raises(SiteError, match="no YAML"):
        load_site(tmp_path)
