"""Models that learned from what is to be forgotten: nothing is taken out of weights, so people decide about them."""

from __future__ import annotations

import json
from collections.abc import Collection

from dermaflow import storage
from dermaflow.bundles.registry import Registry
from dermaflow.errors import DermaflowError
from dermaflow.forgetting.places import Ids
from dermaflow.schemas.bundle import REFERENCE_NAME


def models_trained_on(registry: str, ids: Ids, data_hashes: Collection[str]) -> dict[str, str]:
    """Models of a registry that saw the images, and why that is known.

    Args:
        registry: Folder or s3://.
        ids: What is to be forgotten.
        data_hashes: Of the shards that held it.

    Returns:
        Id of a version to ``names it`` (its reference holds features of one of the images), ``same data`` (trained on
        these very shards), ``calibrated on it``. A model of earlier shards without a reference cannot be told.
    """
    if not storage.exists(storage.join(registry, "models")):
        return {}
    found = {}
    for version in Registry(registry).list():
        calibration = version.bundle.calibration
        if _names(storage.join(registry, "models", version.id), ids):
            found[version.id] = "names it"
        elif version.bundle.training.data_hash in data_hashes:
            found[version.id] = "same data"
        elif calibration is not None and calibration.data_hash in data_hashes:
            found[version.id] = "calibrated on it"
    return found


def _names(place: str, ids: Ids) -> bool:
    try:
        reference = json.loads(storage.read_bytes(storage.join(place, REFERENCE_NAME)))
    except (DermaflowError, ValueError):
        return False  # a bundle without a reference names no image
    return bool(ids.images & set(reference["image_ids"]) or ids.lesions & set(reference["lesion_ids"]))
