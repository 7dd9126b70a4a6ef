"""A bundle of a few numbers, for the tests of bundles and of the registry."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from dermaflow.bundles.bundle import save_bundle
from dermaflow.schemas.bundle import (
    Bundle,
    Calibration,
    InputSpec,
    OodSpec,
    OperatingPoint,
    Reference,
    SafetyPolicy,
    TrainingRecord,
)


def a_reference(images: int = 12) -> Reference:
    """Features of a few images, two of each lesion."""
    features = np.random.default_rng(0).normal(size=(12, 8))[:images].astype(np.float16)
    rows = range(images)
    return Reference(
        features=features,
        mean=np.zeros(8, np.float32),
        whitener=np.eye(8, dtype=np.float32),
        image_ids=tuple(f"image{i}" for i in rows),
        lesion_ids=tuple(f"lesion{i // 2}" for i in rows),
        dx=("mel", "nv") * (images // 2),
    )


REFERENCE = a_reference()


def a_calibration(temperature: float = 1.3, ood: bool = True) -> Calibration:
    return Calibration(
        temperature=temperature,
        priors=[1 / 7] * 7,
        conformal_alpha=0.1,
        conformal_quantiles=[0.5] * 7,
        mel_threshold=0.08,
        malignant_threshold=0.1,
        entropy_threshold=1.2,
        policy=SafetyPolicy(mel_threshold=0.08),
        operating_points=[OperatingPoint(name="accuracy", tau=0.0)],
        ood=OodSpec(quantile=0.98, threshold=1.4) if ood else None,
        images=12,
        lesions=10,
    )


def a_bundle(
    calibration: Calibration | None = None,
    *,
    name: str = "tiny",
    recipe: dict[str, object] | None = None,
    data_hash: str = "d",
    metrics: dict[str, float] | None = None,
) -> Bundle:
    return Bundle(
        name=name,
        metrics=metrics,
        backbone="seed_cnn",
        input=InputSpec(height=36, width=48, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2)),
        dropout=0.1,
        train_priors=[1 / 7] * 7,
        training=TrainingRecord(
            recipe_name="tiny", recipe=recipe or {"lr": 1e-3}, recipe_hash="r", seed=1, data_hash=data_hash,
            started="2026-01-01T00:00:00Z",
            seconds=1.0, epochs=1, device="cpu", workers=1, history=[{"epoch": 1, "loss": 1.0}],
            initial_weights=None, versions={"torch": "2"},
        ),
        calibration=calibration,
    )  # fmt: skip


def some_weights() -> dict[str, torch.Tensor]:
    shared = torch.arange(6.0).reshape(2, 3)
    return {"a": shared, "transposed": shared.T, "count": torch.tensor(3), "half": torch.ones(4, dtype=torch.bfloat16)}


def save_tiny(path: Path, bundle: Bundle, weight: float = 0.0) -> Path:
    """Write a bundle with one weight and no calibration."""
    save_bundle(path, bundle, {"w": torch.tensor([weight])}, None, "# Card\n")
    return path
