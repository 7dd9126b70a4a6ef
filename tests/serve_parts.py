"""A model that can be served, images for it, and an ingress without Serve, for the tests of `serve`."""

from __future__ import annotations

import io
import json
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tiny_bundle import a_bundle, a_calibration

from dermaflow.bundles.bundle import save_bundle
from dermaflow.learning.backbones import BackboneConfig, build
from dermaflow.schemas.finding import Finding
from dermaflow.taxonomy import CODES
from serve.options import Limits, Options
from serve.recommender import Recommender

PATIENT = {"patient_id": "P1", "age": 61, "sex": "female"}
LESION = {"lesion_id": "L1", "site": "back"}


def save_servable(path: Path, seed: int = 0, name: str = "tiny") -> Path:
    """An untrained network with a calibration: what it says is worth nothing, but it says it like a real one."""
    torch.manual_seed(seed)
    network = build(BackboneConfig(name="seed_cnn", dropout=0.1))
    save_bundle(path, a_bundle(a_calibration(ood=False), name=name), network.state_dict(), None, "# Card\n")
    return path


def a_jpeg(seed: int = 0, height: int = 150, width: int = 200) -> bytes:
    """A brown spot on skin, sharp enough for the quality gate."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    away = np.hypot((y - height / 2) / height, (x - width / 2) / width)
    spot = 1 / (1 + np.exp((away - 0.2 - 0.01 * (seed % 5)) * 60))
    skin, mole = np.array([214, 160, 140.0]), np.array([110, 66, 50.0])
    picture = skin + (mole - skin) * spot[..., None]
    picture += random.normal(0, 9, (height, width, 1))
    stream = io.BytesIO()
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=92)
    return stream.getvalue()


def a_zip(count: int, extra: dict[str, bytes] | None = None) -> bytes:
    """An archive of so many images, ``L0.jpg`` and on, and of what else is named."""
    stream, images = io.BytesIO(), [a_jpeg(seed) for seed in range(6)]
    with zipfile.ZipFile(stream, "w") as archive:
        for i in range(count):
            archive.writestr(f"L{i}.jpg", images[i % len(images)])
        for name, content in (extra or {}).items():
            archive.writestr(name, content)
    return stream.getvalue()


def a_finding(image_id: str = "I1", lesion_id: str | None = "L1", **changes: Any) -> dict[str, Any]:
    p = {f"p_{code}": 0.02 for code in CODES} | {"p_nv": 0.88}
    content = {
        "image_id": image_id, "lesion_id": lesion_id, **p, "prediction": "nv", "conformal_set": ["nv"],
        "p_malignant": 0.06, "status": "ok", "model": "tiny", "model_sha256": "a" * 64,
    }  # fmt: skip
    return Finding(**(content | changes)).model_dump()


class FakeBackend:
    """Answers at once, as the deployments would; `fails` is raised instead."""

    def __init__(self) -> None:
        self.fails: Exception | None = None
        self.added = 0
        self.images: list[bytes] = []

    async def classify(self, images: list[bytes], image_ids: list[str], lesion_ids: list[str | None]) -> dict[str, Any]:
        if self.fails:
            raise self.fails
        self.images = images
        found = [a_finding(*ids) for ids in zip(image_ids, lesion_ids, strict=True)]
        return {"model": MODEL, "thresholds": THRESHOLDS, "findings": json.dumps(found).encode(),
                "statuses": ["ok"] * len(found), "together": len(found)}  # fmt: skip

    async def explain(self, image: bytes, image_id: str, diagnosis: str | None) -> dict[str, Any]:
        return {"model": MODEL, "finding": json.dumps(a_finding(image_id, None)).encode(), "diagnosis": "nv",
                "overlay": b"png", "neighbours": []}  # fmt: skip

    async def recommend(self, body: bytes, thresholds: dict[str, float]) -> dict[str, Any]:
        return await _recommender().recommend(body, thresholds)

    async def describe(self) -> dict[str, Any]:
        if self.fails:
            raise self.fails
        return FACTS

    def batch_added(self) -> None:
        self.added += 1


@lru_cache(1)
def _recommender() -> Recommender:
    return Recommender()


MODEL = {"name": "tiny", "version": "tiny-aaaaaaaaaa", "sha256": "a" * 64}
THRESHOLDS = {"mel": 0.08, "malignant": 0.1, "entropy": 1.2, "policy_mel_threshold": 0.08, "policy_use_set": 0.0}
FACTS = {
    **MODEL, "uri": "/models/tiny", "backbone": "seed_cnn", "card": "# Card", "metrics": {"accuracy": float("nan")},
    "input": {"height": 36, "width": 48, "mean": [0.5] * 3, "std": [0.2] * 3, "views": 1}, "thresholds": THRESHOLDS,
    "classes": [{"code": code, "name": code, "malignant": False} for code in CODES], "problem": None,
}  # fmt: skip


def small_options(state: Path, **changes: Any) -> Options:
    """Options with limits that a test can reach."""
    limits = Limits(
        body=200_000, images=3, image=100_000, pixels=200_000, cases=3, upload=300_000, files=3, members=50,
        patients=5000, spare=0, in_flight=4, streams=2, timeout=60, idle=10,
    )  # fmt: skip
    return Options(**({"state": state, "open": True, "limits": limits} | changes))
