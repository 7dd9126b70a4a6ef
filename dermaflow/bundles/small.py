"""A model made small enough to live with the code, and the one that does.

``dermaflow/bundles/shipped`` holds a small model trained on HAM10000, which is used where nobody has trained one yet.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
import torch

from dermaflow.bundles.bundle import LoadedBundle, load_bundle, save_bundle
from dermaflow.errors import BundleError
from dermaflow.schemas.bundle import Reference


def shipped_model() -> Path:
    """The folder of the model that comes with DermaFlow."""
    return Path(str(resources.files("dermaflow.bundles") / "shipped"))


def make_small(model: str | Path, out: Path, name: str | None = None) -> LoadedBundle:
    """Write a model again at about a quarter of its size.

    Weights of convolutions and linear layers and the whitening matrix of the out-of-distribution distance are stored in
    float16 (bfloat16, three bits shorter, moved a MobileNetV2's probabilities by up to 0.13), and no training image is
    named, so that nearest training lesions cannot be told. The calibration stays; figures on a test split are for
    ``dermaflow evaluate`` to measure anew.

    Args:
        model: Folder or s3:// of a calibrated bundle.
        out: Folder to write.
        name: Of the small model; by default that of the large one with ``-small``.

    Returns:
        The small model, as it is read back.

    Raises:
        BundleError: The model is damaged, has no calibration, or is small already.
    """
    full = load_bundle(model)
    bundle = full.bundle
    if bundle.calibration is None:
        raise BundleError("no calibration", where=model, todo="run dermaflow calibrate")
    if bundle.made_small_from is not None:
        raise BundleError("is small already", where=model, expected="the model that it was made from")
    weights = {
        key: tensor.to(torch.float16) if tensor.is_floating_point() and tensor.ndim > 1 else tensor
        for key, tensor in full.weights.items()
    }
    reference = full.reference
    if reference is not None:
        none = np.zeros((0, len(reference.mean)), np.float16)
        reference = Reference(none, reference.mean, reference.whitener, (), (), ())
    chosen = name or f"{bundle.name}-small"
    changes = {"name": chosen, "made_small_from": full.sha256, "metrics": None}
    heading = f"# Model card: {chosen}"
    said = (
        f"Made small from the model `{bundle.name}` ({full.sha256[:12]}): weights in float16, no training image "
        "named. The figures below are those of the large model, unless this one was evaluated since."
    )
    rest = full.card.partition("\n")[2] if full.card.startswith("# ") else full.card
    save_bundle(out, bundle.model_copy(update=changes), weights, reference, f"{heading}\n\n{said}\n{rest}")
    return load_bundle(out)
