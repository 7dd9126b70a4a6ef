"""A bundle comes back as it was written, or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_bundle import REFERENCE, a_bundle, a_calibration, a_reference, some_weights

from dermaflow import storage
from dermaflow.bundles import bundle as bundle_module
from dermaflow.bundles.bundle import load_bundle, load_uncalibrated, save_bundle, update_bundle
from dermaflow.errors import BundleError
from dermaflow.taxonomy import CODES

FILES = ["weights.safetensors", "ood.safetensors", "reference.json", "bundle.json", "bundle.sha256", "card.md"]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    bundle = a_bundle(a_calibration(), metrics={"accuracy": 0.8, "ece": float("nan")})
    save_bundle(tmp_path / "model", bundle, some_weights(), REFERENCE, "# Card\n")
    return tmp_path / "model"


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def rewrite_description(folder: Path, **changes: object) -> None:
    """Change the description and its digest: what a newer version, or a person, might have written."""
    content = json.dumps(json.loads((folder / "bundle.json").read_text()) | changes).encode()
    (folder / "bundle.json").write_bytes(content)
    (folder / "bundle.sha256").write_text(storage.sha256(content))


def test_everything_comes_back(saved: Path) -> None:
    loaded = load_bundle(saved)
    for name, tensor in some_weights().items():
        assert loaded.weights[name].dtype == tensor.dtype
        assert torch.equal(loaded.weights[name], tensor)
    assert loaded.reference is not None and loaded.reference.features.dtype == np.float16
    for name in ("features", "mean", "whitener"):
        np.testing.assert_array_equal(getattr(loaded.reference, name), getattr(REFERENCE, name))
    for name in ("image_ids", "lesion_ids", "dx"):
        assert getattr(loaded.reference, name) == getattr(REFERENCE, name)
    assert loaded.card == "# Card\n"
    assert loaded.bundle.calibration is not None and loaded.bundle.calibration.temperature == 1.3
    assert loaded.bundle.metrics is not None and loaded.bundle.metrics["accuracy"] == 0.8
    assert np.isnan(loaded.bundle.metrics["ece"])
    assert loaded.sha256 == storage.sha256_file(saved / "bundle.json")


def test_the_same_model_has_the_same_hash_and_another_has_not(saved: Path, tmp_path: Path) -> None:
    first = load_bundle(saved)
    save_bundle(tmp_path / "again", first.bundle, some_weights(), REFERENCE, "# Card\n")
    assert load_bundle(tmp_path / "again").sha256 == first.sha256
    other = some_weights()
    other["a"][0, 0] += 1e-3
    save_bundle(tmp_path / "other", first.bundle, other, REFERENCE, "# Card\n")
    assert load_bundle(tmp_path / "other").sha256 != first.sha256


def test_description_is_strict_json(saved: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    json.loads((saved / "bundle.json").read_text(), parse_constant=refuse)


@pytest.mark.parametrize("name", FILES)
def test_one_changed_byte_is_refused(saved: Path, name: str) -> None:
    flip_a_byte(saved / name)
    with pytest.raises(
        BundleError, match=r"changed since it was written.*expected \S{64}.*Fetch the bundle again"
    ) as raised:
        load_bundle(saved)
    assert str(raised.value.where).endswith("bundle.json" if name == "bundle.sha256" else name)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(BundleError, match=f"{name}: no such file; expected a bundle with"):
        load_bundle(saved)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"nowhere/bundle\.sha256: no such file.*Check the path"):
        load_bundle(tmp_path / "nowhere")


def test_text_that_is_not_json_is_refused(saved: Path) -> None:
    (saved / "bundle.json").write_text("weights: 7")
    (saved / "bundle.sha256").write_text(storage.sha256(b"weights: 7"))
    with pytest.raises(BundleError, match=r"bundle\.json: not JSON"):
        load_bundle(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "dermaflow-bundle/9"}, "bundle format 'dermaflow-bundle/9'; expected 'dermaflow-bundle/2'"),
        (
            {"classes": list(reversed(CODES))},
            "classes are vasc nv .*expected akiec bcc bkl df mel nv vasc, in this order",
        ),
        ({"colour": "blue"}, "colour: Extra inputs are not permitted"),
        ({"dropout": "a lot"}, "dropout: Input should be a valid number"),
    ],
)
def test_a_description_of_another_kind_is_refused(saved: Path, change: dict[str, object], message: str) -> None:
    rewrite_description(saved, **change)
    with pytest.raises(BundleError, match=message):
        load_bundle(saved)


def test_a_pickle_in_place_of_the_weights_is_never_run(saved: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "exploded",)

    torch.save({"a": Bomb()}, saved / "weights.safetensors")
    rewrite_description(saved, weights_sha256=storage.sha256_file(saved / "weights.safetensors"))
    with pytest.raises(BundleError, match="not safetensors"):
        load_bundle(saved)
    assert not (tmp_path / "exploded").exists()


def test_a_huge_file_is_not_read(saved: Path) -> None:
    with (saved / "weights.safetensors").open("r+b") as stream:
        stream.truncate(bundle_module.MAX_BYTES + 1)  # sparse: takes no room on disk
    with pytest.raises(
        BundleError, match=f"{bundle_module.MAX_BYTES + 1} bytes; expected at most {bundle_module.MAX_BYTES}"
    ):
        load_bundle(saved)


def test_an_older_bundle_says_how_to_go_on_and_its_network_can_be_read(saved: Path) -> None:
    old = {"temperature": 1.3, "conformal_alpha": 0.1}  # what an older calibration held is not asked
    rewrite_description(saved, format="dermaflow-bundle/1", calibration=old)
    with pytest.raises(BundleError, match=r"bundle format 'dermaflow-bundle/1'.*dermaflow calibrate --model OLD"):
        load_bundle(saved)
    found = load_uncalibrated(saved)
    assert torch.equal(found.weights["a"], some_weights()["a"])
    assert found.bundle.calibration is None and found.bundle.metrics is None and found.reference is None
    flip_a_byte(saved / "weights.safetensors")
    with pytest.raises(BundleError, match="changed since it was written"):
        load_uncalibrated(saved)
    rewrite_description(saved, format="dermaflow-bundle/9")
    with pytest.raises(BundleError, match="Use the DermaFlow version that wrote it"):
        load_uncalibrated(saved)


def test_features_and_their_statistics_come_together(tmp_path: Path) -> None:
    for calibration, features in [(None, REFERENCE), (a_calibration(ood=False), REFERENCE), (a_calibration(), None)]:
        with pytest.raises(BundleError, match="must come together"):
            save_bundle(tmp_path / "model", a_bundle(calibration), some_weights(), features, "")
    assert not (tmp_path / "model").exists()


def test_a_failed_write_leaves_the_old_bundle(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load_bundle(saved).sha256
    write, calls = storage.write_bytes, []

    def fails_at_the_third(uri: str | Path, content: bytes) -> None:
        calls.append(uri)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        write(uri, content)

    monkeypatch.setattr(storage, "write_bytes", fails_at_the_third)
    with pytest.raises(OSError, match="No space"):
        save_bundle(saved, a_bundle(), some_weights(), None, "new")
    assert load_bundle(saved).sha256 == before
    assert [p.name for p in saved.parent.iterdir()] == ["model"]


def test_update_changes_only_what_is_given(saved: Path) -> None:
    before = load_bundle(saved).bundle
    update_bundle(saved, metrics={"accuracy": 0.84, "ece": float("nan")}, card="# New\n")
    after = load_bundle(saved)
    assert after.card == "# New\n"
    assert after.bundle.metrics is not None and after.bundle.metrics["accuracy"] == 0.84
    assert np.isnan(after.bundle.metrics["ece"])
    assert after.bundle.weights_sha256 == before.weights_sha256
    assert after.bundle.calibration == before.calibration

    update_bundle(saved, calibration=a_calibration(2.0), reference=a_reference(6))
    last = load_bundle(saved)
    assert last.bundle.calibration is not None and last.bundle.calibration.temperature == 2.0
    assert last.reference is not None and len(last.reference.features) == len(last.reference.dx) == 6
    assert last.card == "# New\n" and last.bundle.metrics["accuracy"] == 0.84

    update_bundle(saved, calibration=a_calibration(2.0, ood=False))
    assert load_bundle(saved).reference is None
    assert not (saved / "ood.safetensors").exists() and not (saved / "reference.json").exists()
