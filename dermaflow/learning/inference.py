"""Run a network over pixels. Evaluation, calibration, scoring and serving all come through here."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from dermaflow.bundles.bundle import LoadedBundle
from dermaflow.errors import BundleError
from dermaflow.learning.backbones import Network, build_named
from dermaflow.preparation.transforms import normalise
from dermaflow.schemas.bundle import InputSpec


def network_of(loaded: LoadedBundle) -> Network:
    """The network of a bundle, with its weights, on the CPU in channels_last, ready to predict.

    Raises:
        BundleError: The weights do not fit the backbone that the bundle names.
    """
    bundle = loaded.bundle
    try:
        network = build_named(bundle.backbone, bundle.dropout)
        network.load_state_dict(loaded.weights)
    except (ValueError, RuntimeError) as error:
        raise BundleError(
            f"weights and backbone {bundle.backbone} do not fit: {error}", where=bundle.name,
            expected="a bundle that this version of DermaFlow wrote", todo="train it again",
        ) from error  # fmt: skip
    return network.to(memory_format=torch.channels_last).eval()


def predict(
    network: Network, pixels: np.ndarray, spec: InputSpec, *, device: torch.device | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Logits and features in float32, without augmentation.

    Args:
        network: On its device, any mode; comes back in the mode it had.
        pixels: uint8 [N, H, W, 3] of the size of `spec`.
        spec: Normalisation and views.
        device: Device of the network; by default that of its parameters.
        progress: Called with images done and in all.

    Returns:
        Logits float32 [N, 7] and features float32 [N, D]; means over the views.
    """
    device = device or next(network.parameters()).device
    batch_size = 8 if device.type == "cpu" else 256  # larger tensors go back to the system and come anew: half the time
    was_training = network.training
    network.eval()
    logits, features = [], []
    with torch.inference_mode():
        for start in range(0, len(pixels), batch_size):
            images = normalise(torch.from_numpy(pixels[start : start + batch_size]).to(device), spec)
            views = [images] if spec.views == 1 else [images, images.flip(2), images.flip(3), images.flip(2, 3)]
            found = torch.stack([network.features(view) for view in views]).mean(0)
            # The head is linear, so the logits of the mean features are the mean logits of the views.
            logits.append(network.head(found).float().cpu())
            features.append(found.float().cpu())
            progress(min(start + batch_size, len(pixels)), len(pixels))
    network.train(was_training)
    return torch.cat(logits).numpy(), torch.cat(features).numpy()
