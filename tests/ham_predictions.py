"""Predictions that look like those of a fair model on HAM10000, and the bundle that goes with them. Seeded."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd
from PIL import Image

from dermaflow.schemas.bundle import Bundle, Calibration, InputSpec, OperatingPoint, SafetyPolicy, TrainingRecord
from dermaflow.taxonomy import CODES, MELANOMA

MIX = np.array([0.0327, 0.0513, 0.1097, 0.0115, 0.1111, 0.6695, 0.0142])  # images by class in HAM10000
CONFUSED_WITH = np.array(  # how near the classes look; the row is the truth
    [
        [2.6, 1.0, 1.2, 0.1, 0.5, 0.0, 0.0],
        [0.8, 3.0, 0.3, 0.3, 0.2, 0.2, 0.2],
        [0.5, 0.2, 2.6, 0.1, 0.9, 1.0, 0.0],
        [0.2, 0.5, 0.4, 2.8, 0.2, 0.9, 0.1],
        [0.2, 0.1, 0.8, 0.0, 2.6, 1.5, 0.0],
        [0.0, 0.0, 0.4, 0.1, 0.8, 3.6, 0.1],
        [0.0, 0.3, 0.1, 0.0, 0.2, 0.6, 3.8],
    ]
)


def ham_like(images: int = 2000, lesions: int = 1500, seed: int = 7) -> pd.DataFrame:
    """A table as `evaluate` takes it, about as hard as the real test split."""
    rng = np.random.default_rng(seed)
    lesion = np.sort(np.concatenate([np.arange(lesions), rng.integers(0, lesions, images - lesions)]))
    truth_of_lesion = rng.choice(7, size=lesions, p=MIX)
    hardness = rng.normal(0, 0.9, (lesions, 7))
    truth = truth_of_lesion[lesion]
    logits = 1.15 * CONFUSED_WITH[truth] + 0.35 * np.log(MIX) + hardness[lesion] + rng.normal(0, 0.7, (images, 7))
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    nevus, consensus = truth == 5, np.isin(truth, (2, 3, 5, 6)) & (rng.random(images) < 0.2)
    per_lesion = {
        "age": np.where(rng.random(lesions) < 0.02, np.nan, np.clip(rng.normal(52, 17, lesions) // 5 * 5, 0, 85)),
        "sex": rng.choice(["male", "female", "unknown"], lesions, p=[0.54, 0.45, 0.01]),
        "localization": rng.choice(
            ["back", "lower extremity", "trunk", "face", "scalp", "acral"],
            lesions,
            p=[0.4, 0.3, 0.19, 0.08, 0.025, 0.005],
        ),
        "site": rng.choice(
            ["vidir_molemax", "vidir_modern", "rosendahl", "vienna_dias"], lesions, p=[0.4, 0.33, 0.22, 0.05]
        ),
    }
    table = pd.DataFrame(
        {
            "image_id": [f"ISIC_{24306 + i:07d}" for i in range(images)],
            "lesion_id": [f"HAM_{i:07d}" for i in lesion],
            "dx": np.array(CODES)[truth],
            "dx_type": np.where(
                nevus & (rng.random(images) < 0.55), "follow_up", np.where(consensus, "consensus", "histo")
            ),
            **{name: values[lesion] for name, values in per_lesion.items()},
        }
    )
    return table.assign(**{f"p_{code}": p[:, k] for k, code in enumerate(CODES)})


def ham_like_bundle(predictions: pd.DataFrame) -> Bundle:
    """A bundle whose calibration was fitted on the given predictions."""
    p = predictions[[f"p_{code}" for code in CODES]].to_numpy()
    truth = np.array([CODES.index(dx) for dx in predictions["dx"]])
    priors = np.bincount(truth, minlength=7) / len(truth)
    of_truth = 1 - p[np.arange(len(p)), truth]
    quantiles = [float(np.quantile(of_truth[truth == k], 0.9)) if (truth == k).any() else 1.0 for k in range(7)]
    threshold = float(np.quantile(p[truth == MELANOMA, MELANOMA], 0.05))
    rng = np.random.default_rng(0)
    history = [
        {
            "epoch": float(e),
            "loss": 1.6 * 0.82**e + 0.25 + 0.02 * float(rng.random()),
            "lr": 1e-3 * (1 - e / 20),
            "seconds": 170.0,
            **({"val_loss": 1.4 * 0.85**e + 0.42, "val_balanced_accuracy": 0.74 - 0.4 * 0.8**e} if e % 2 else {}),
        }
        for e in range(1, 17)
    ]
    return Bundle(
        name="ham10000-cpu",
        backbone="mobilenet_v2",
        input=InputSpec(height=144, width=192, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        dropout=0.2,
        weights_sha256="9f" * 32,
        train_priors=MIX.tolist(),
        training=TrainingRecord(
            recipe_name="ham10000-cpu",
            recipe={"backbone": "mobilenet_v2", "epochs": 16, "optimizer": {"name": "adamw", "lr": 0.001}},
            recipe_hash="c0" * 32,
            seed=42,
            data_hash="ab" * 32,
            started="2026-11-23T09:15:00+00:00",
            seconds=3120.5,
            epochs=16,
            device="cpu",
            workers=1,
            history=history,
            initial_weights="mobilenet_v2-7ebf99e0.pth",
            versions={"dermaflow": "0.1.0", "torch": "2.14.1", "torchvision": "0.29.1", "numpy": "2.4.6"},
        ),
        calibration=Calibration(
            temperature=1.31,
            priors=priors.tolist(),
            conformal_alpha=0.1,
            conformal_quantiles=quantiles,
            mel_threshold=threshold,
            malignant_threshold=threshold,
            entropy_threshold=1.3,
            policy=SafetyPolicy(mel_threshold=2 * threshold, malignant_threshold=3 * threshold),
            operating_points=[
                OperatingPoint(name="accuracy", tau=0.0),
                OperatingPoint(name="balanced", tau=0.7),
                OperatingPoint(name="melanoma_safe", tau=0.0, mel_threshold=threshold),
            ],
            ood=None,
            images=1500,
            lesions=1100,
        ),
    )


def lesion_picture(image_id: str) -> bytes:
    """A 600x450 JPEG with a brown spot whose place and colour follow from the id."""
    rng = np.random.default_rng(list(image_id.encode()))
    y, x = np.mgrid[0:450, 0:600]
    wobble = 1 + 0.25 * np.sin(rng.integers(2, 7) * np.arctan2(y - 225, x - 300) + rng.random() * 6)
    inside = np.clip(1.6 - np.hypot(x - 300, y - 225) / (rng.uniform(90, 150) * wobble), 0, 1)[..., None]
    skin, spot = np.array([224, 172, 150]), np.array([110, 62, 45]) + rng.integers(-25, 25, 3)
    pixels = skin * (1 - inside) + spot * inside + rng.normal(0, 5, (450, 600, 1))
    stream = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(stream, "JPEG", quality=85)
    return stream.getvalue()
