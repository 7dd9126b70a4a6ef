"""Everything of `dermaflow.trust` for a network, fitted on shards: after training, or again on a site's own images."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from dermaflow.bundles.bundle import LoadedBundle, load_bundle, load_uncalibrated, save_bundle
from dermaflow.errors import DataError
from dermaflow.learning.backbones import Network
from dermaflow.learning.inference import network_of, predict
from dermaflow.learning.optimisation import pick_device
from dermaflow.preparation.reading import ShardFolder, labels_of
from dermaflow.schemas.bundle import Bundle, InputSpec
from dermaflow.schemas.shard import Split
from dermaflow.settings import settings
from dermaflow.trust.calibrate import calibrate
from dermaflow.trust.ood import make_reference

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with the step, images done and images in all."""


def silent(step: str, done: int, total: int) -> None:
    """No progress is shown."""


def recalibrate(model: str | Path, shards: str | Path, out: Path, *, progress: Progress = silent) -> LoadedBundle:
    """Fit everything of `dermaflow.trust` again, for a bundle of this or an older format.

    The weights stay; probabilities, sets, thresholds and the out-of-distribution reference become those of the shards.
    Figures of an earlier evaluation no longer hold and are left out.

    Args:
        model: Bundle, local or ``s3://``.
        shards: Shard folder: its calibration split is fitted on, its training split becomes the reference. For a site
            that is a folder of its own images, of lesions the network was never trained on.
        out: Folder of the new bundle.
        progress: Called as the work goes on.

    Raises:
        BundleError: The bundle is damaged.
        DataError: The training or the calibration split is empty.
    """
    loaded = load_uncalibrated(model)
    folder = ShardFolder(shards)
    if folder.manifest.data_hash != loaded.bundle.training.data_hash:
        log.warning(
            "the shards are not those the model was trained from (%s, %s): the calibration holds only if none of their "
            "lesions was trained on", folder.manifest.data_hash[:12], loaded.bundle.training.data_hash[:12],
        )  # fmt: skip
    calibrate_and_save(network_of(loaded), loaded.bundle, folder, out, progress)
    return load_bundle(out)


def calibrate_and_save(
    network: Network, bundle: Bundle, folder: ShardFolder, out: Path, progress: Progress = silent
) -> None:
    """Fit everything of `dermaflow.trust` on the calibration split and write the bundle.

    The features of the training split, which new images are compared with, come from one view of each image even if the
    model looks at four: they are three quarters of the work, and every later image is compared in the same way.

    Where these are the shards that it was trained from, it is noted how their images are stored (`ShardFolder.copies`).

    Args:
        network: Trained.
        bundle: What it is, without calibration.
        folder: Shards.
        out: Folder of the bundle.
        progress: Called as the work goes on.

    Raises:
        DataError: The training or the calibration split is empty, or the network's output is not finite.
    """
    for split in ("train", "calibration"):
        if not folder.manifest.counts[split]:
            raise DataError(f"no {split} image", where=folder.uri, todo="prepare a larger data set")
    network = network.to(device=pick_device(), memory_format=torch.channels_last)  # type: ignore[call-overload]
    if bundle.training.data_hash == folder.manifest.data_hash:
        bundle = bundle.model_copy(update={"input": bundle.input.model_copy(update={"copies": folder.copies()})})
    spec = bundle.input
    log.info("calibrating on %d images", sum(folder.manifest.counts["calibration"].values()))
    logits, features = _predict(network, spec, folder, "calibration", progress)
    _, known = _predict(network, spec.model_copy(update={"views": 1}), folder, "train", progress)
    trained, meta = folder.metadata("train"), folder.metadata("calibration")
    reference = make_reference(known, *(trained[name].tolist() for name in ("image_id", "lesion_id", "dx")))
    calibration = calibrate(
        logits, features, labels_of(meta["dx"]), meta["lesion_id"].to_numpy(), reference=reference,
        seed=bundle.training.seed,
    )  # fmt: skip
    calibration = calibration.model_copy(update={"data_hash": folder.manifest.data_hash})
    bundle = bundle.model_copy(update={"calibration": calibration})
    save_bundle(out, bundle, network.state_dict(), reference, _card(bundle))


def _predict(
    network: Network, spec: InputSpec, folder: ShardFolder, split: Split, progress: Progress
) -> tuple[np.ndarray, np.ndarray]:
    """Logits and features of a split."""
    pixels = folder.pixels(split, spec.height, spec.width, spec.copies, threads=settings().threads)
    return predict(network, pixels, spec, progress=lambda done, total: progress(split, done, total))


def _card(bundle: Bundle) -> str:
    """The card of a model that was not evaluated yet; `dermaflow evaluate` writes the full one."""
    return (
        f"# {bundle.name}\n\nTrained by recipe `{bundle.training.recipe_name}`, seed {bundle.training.seed}, "
        f"{bundle.training.epochs} epochs. Not evaluated yet: run `dermaflow evaluate`.\n"
    )
