"""A bundle comes back as it was written, or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dermaflow import storage
from dermaflow.bundles import bundle as bundle_module
from dermaflow.bundles.bundle import load_bundle, save_bundle, update_bundle
from dermaflow.errors import BundleError
from dermaflow.schemas.bundle import Bundle, Calibration, InputSpec, OodSpec, OperatingPoint, TrainingRecord
from dermaflow.taxonomy import CODES

FEATURES = np.random.default_rng(0).normal(size=(12, 8)).astype(np.float16)


def a_calibration(temperature: float = 1.3, ood: bool = True) -> Calibration:
    return Calibration(
        temperature=temperature,
        priors=[1 / 7] * 7,
        conformal_alpha=0.1,
        conformal_quantiles=[0.5] * 7,
        mel_threshold=0.08,
        operating_points=[OperatingPoint(name="accuracy", tau=0.0)],
        ood=OodSpec(k=5, threshold=0.4) if ood else None,
        images=12,
        lesions=10,
    )


def a_bundle(calibration: Calibration | None = None) -> Bundle:
    return Bundle(
        name="tiny",
        backbone="seed_cnn",
        input=InputSpec(height=36, width=48, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2)),
        dropout=0.1,
        train_priors=[1 / 7] * 7,
        training=TrainingRecord(
            recipe_name="tiny", recipe={"lr": 1e-3}, recipe_hash="r", seed=1, data_hash="d",
            started="2026-01-01T00:00:00Z",
            seconds=1.0, epochs=1, device="cpu", workers=1, history=[{"epoch": 1, "loss": float("nan")}],
            initial_weights=None, versions={"torch": "2"},
        ),
        calibration=calibration,
    )  # fmt: skip


def some_weights() -> dict[str, torch.Tensor]:
    shared = torch.arange(6.0).reshape(2, 3)
    return {"a": shared, "transposed": shared.T, "count": torch.tensor(3), "half": torch.ones(4, dtype=torch.bfloat16)}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_bundle(tmp_path / "model", a_bundle(a_calibration()), some_weights(), FEATURES, "# Card\n")
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
    assert loaded.ood_features is not None and loaded.ood_features.dtype == np.float16
    np.testing.assert_array_equal(loaded.ood_features, FEATURES)
    assert loaded.card == "# Card\n"
    assert loaded.bundle.calibration is not None and loaded.bundle.calibration.temperature == 1.3
    assert np.isnan(loaded.bundle.training.history[0]["loss"])
    assert loaded.sha256 == storage.sha256_file(saved / "bundle.json")


def test_the_same_model_has_the_same_hash_and_another_has_not(saved: Path, tmp_path: Path) -> None:
    sha256 = load_bundle(saved).sha256
    save_bundle(tmp_path / "again", a_bundle(a_calibration()), some_weights(), FEATURES, "# Card\n")
    assert load_bundle(tmp_path / "again").sha256 == sha256
    other = some_weights()
    other["a"][0, 0] += 1e-3
    save_bundle(tmp_path / "other", a_bundle(a_calibration()), other, FEATURES, "# Card\n")
    assert load_bundle(tmp_path / "other").sha256 != sha256


def test_description_is_strict_json(saved: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    json.loads((saved / "bundle.json").read_text(), parse_constant=refuse)


@pytest.mark.parametrize("name", ["weights.safetensors", "ood.safetensors", "bundle.json", "bundle.sha256", "card.md"])
def test_one_changed_byte_is_refused(saved: Path, name: str) -> None:
    flip_a_byte(saved / name)
    with pytest.raises(
        BundleError, match=r"changed since it was written.*expected \S{64}.*Fetch the bundle again"
    ) as raised:
        load_bundle(saved)
    assert str(raised.value.where).endswith("bundle.json" if name == "bundle.sha256" else name)


@pytest.mark.parametrize("name", ["weights.safetensors", "ood.safetensors", "bundle.json", "bundle.sha256", "card.md"])
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
        ({"format": "dermaflow-bundle/9"}, "bundle format 'dermaflow-bundle/9'; expected 'dermaflow-bundle/1'"),
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


def test_features_and_their_statistics_come_together(tmp_path: Path) -> None:
    for calibration, features in [(None, FEATURES), (a_calibration(ood=False), FEATURES), (a_calibration(), None)]:
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

    update_bundle(saved, calibration=a_calibration(2.0), ood_features=FEATURES[:5])
    last = load_bundle(saved)
    assert last.bundle.calibration is not None and last.bundle.calibration.temperature == 2.0
    assert last.ood_features is not None and len(last.ood_features) == 5
    assert last.card == "# New\n" and last.bundle.metrics["accuracy"] == 0.84

    update_bundle(saved, calibration=a_calibration(2.0, ood=False))
    assert load_bundle(saved).ood_features is None
    assert not (saved / "ood.safetensors").exists()
