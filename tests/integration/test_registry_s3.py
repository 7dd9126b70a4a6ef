"""Bundles and the registry on an object store, over HTTP on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from s3_here import own_s3
from tiny_bundle import a_bundle, save_tiny

from dermaflow import storage
from dermaflow.bundles.bundle import load_bundle
from dermaflow.bundles.registry import Registry
from dermaflow.errors import BundleError, RegistryError, StorageError


@pytest.fixture
def bucket() -> Iterator[str]:
    """The address of an empty bucket on a server of its own."""
    with own_s3("hospital"):
        yield "s3://hospital"


def test_the_life_of_two_models(bucket: str, tmp_path: Path) -> None:
    registry = Registry(f"{bucket}/team/registry")
    with pytest.raises(RegistryError, match="holds no model"):
        registry.show("a")
    a = registry.add(save_tiny(tmp_path / "a", a_bundle(name="a", metrics={"accuracy": 0.8}), 1.0))
    b = registry.add(save_tiny(tmp_path / "b", a_bundle(name="b", metrics={"accuracy": 0.9}), 2.0))
    assert registry.add(tmp_path / "a") == a
    assert {version.id for version in registry.list()} == {a.id, b.id}
    assert registry.compare("a", "b").metrics[0].difference == pytest.approx(0.1)

    assert registry.champion() is None
    registry.promote("a", reason="first", by="Ada")
    registry.promote("b", reason="better", by="Ada")
    assert Registry(registry.uri).champion().id == b.id
    assert registry.rollback(reason="worse in the clinic", by="Bob").id == a.id
    assert [entry.to_version for entry in registry.history()] == [a.id, b.id, a.id]
    storage.delete(f"{registry.uri}/champion.json")
    assert registry.champion().id == a.id

    registry.fetch("champion", tmp_path / "fetched")
    assert load_bundle(tmp_path / "fetched").sha256 == a.sha256
    straight = load_bundle(f"{registry.uri}/models/{b.id}")
    assert straight.weights["w"].item() == 2.0


def test_an_interrupted_upload_is_not_listed_and_can_be_repeated(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, path = Registry(f"{bucket}/registry"), save_tiny(tmp_path / "a", a_bundle(name="a"))
    write, written = storage.write_bytes, []

    def cut_off_after_two(uri: str | Path, content: bytes) -> None:
        if len(written) == 2:
            raise StorageError("connection reset", where=uri)
        write(uri, content)
        written.append(uri)

    with monkeypatch.context() as patch, pytest.raises(StorageError, match="connection reset"):
        patch.setattr(storage, "write_bytes", cut_off_after_two)
        registry.add(path)
    half = storage.list_folder(f"{registry.uri}/models")
    assert len(half) == 1 and len(storage.list_folder(f"{registry.uri}/models/{half[0]}")) == 2
    assert registry.list() == []
    with pytest.raises(RegistryError, match="holds no model"):
        registry.promote(half[0], reason="r", by="Ada")
    assert registry.add(path).id == half[0]
    assert registry.promote(half[0], reason="r", by="Ada").champion


def test_a_byte_changed_in_the_store_is_refused(bucket: str, tmp_path: Path) -> None:
    registry = Registry(f"{bucket}/registry")
    version = registry.add(save_tiny(tmp_path / "a", a_bundle(name="a"))).id
    weights = f"{registry.uri}/models/{version}/weights.safetensors"
    content = storage.read_bytes(weights)
    storage.write_bytes(weights, content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(BundleError, match=r"s3://hospital/registry/models/.*/weights\.safetensors: changed"):
        registry.fetch(version, tmp_path / "fetched")
    assert not (tmp_path / "fetched").exists()


def test_storage_answers_in_its_own_errors(bucket: str, tmp_path: Path) -> None:
    for action in (storage.read_bytes, storage.sha256_file):
        with pytest.raises(StorageError, match=f"{bucket}/none: .*expected a readable file"):
            action(f"{bucket}/none")
    with pytest.raises(StorageError, match="s3://missing/x"):
        storage.write_bytes("s3://missing/x", b"1")
    assert storage.list_folder(f"{bucket}/none") == []
    assert not storage.exists(f"{bucket}/none")

    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "deep" / "file").write_bytes(b"content")
    storage.copy_folder(tmp_path / "in", f"{bucket}/folder")
    assert storage.read_bytes(f"{bucket}/folder/deep/file") == b"content"
    assert storage.sha256_file(f"{bucket}/folder/deep/file") == storage.sha256(b"content")
    storage.copy_folder(f"{bucket}/folder", tmp_path / "out")
    assert (tmp_path / "out" / "deep" / "file").read_bytes() == b"content"
    storage.delete(f"{bucket}/folder")
    assert not storage.exists(f"{bucket}/folder/deep/file")


def test_a_file_abandoned_midway_does_not_appear(bucket: str) -> None:
    with pytest.raises(RuntimeError), storage.open_atomic(f"{bucket}/folder/file") as stream:
        stream.write(b"half")
        raise RuntimeError
    assert not storage.exists(f"{bucket}/folder/file")


def test_an_endpoint_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody listens on the discard port
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(StorageError, match="s3://hospital/registry"):
        Registry("s3://hospital/registry").list()
