"""Several finished networks as one: their features side by side, and one head that gives their mean logits.

So an ensemble is a model like any other: calibrated, evaluated, scored, served and explained by the same code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dermaflow.bundles.bundle import LoadedBundle, load_bundle
from dermaflow.errors import BundleError
from dermaflow.learning.backbones import JOIN, Bodies, Network
from dermaflow.learning.calibration import Progress, calibrate_and_save, silent
from dermaflow.learning.inference import network_of
from dermaflow.preparation.reading import ShardFolder
from dermaflow.schemas.bundle import Bundle, InputSpec


def join_models(
    models: Mapping[str, LoadedBundle],
    shards: str | Path,
    out: Path,
    name: str,
    *,
    recipe: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> LoadedBundle:
    """Join finished models into an ensemble, calibrate it, write its bundle.

    The members' logits are divided by their temperatures, so that none counts more for being surer of itself, and
    averaged.

    Args:
        models: The members by name, two at least.
        shards: That all of them were trained from.
        out: Folder of the bundle.
        name: Of the ensemble.
        recipe: What is kept as its recipe; by default the members' recipes by name.
        progress: Called as the calibration goes on.

    Raises:
        BundleError: Fewer than two, an ensemble among them, or members that were trained on other data than the shards
            or look at images in another way than the first.
    """
    folder = ShardFolder(shards)
    _check(models, folder.manifest.data_hash)
    first = next(iter(models.values())).bundle
    records = [model.bundle.training for model in models.values()]
    members = {member: model.sha256 for member, model in models.items()}
    training = records[0].model_copy(
        update={
            "recipe_name": name,
            "recipe": dict(recipe or {member: record.recipe for member, record in zip(models, records, strict=True)}),
            "recipe_hash": hashlib.sha256("".join(members.values()).encode()).hexdigest(),
            "started": min(record.started for record in records),
            "seconds": sum(record.seconds for record in records),
            "epochs": sum(record.epochs for record in records),
            "history": [],
            "initial_weights": ", ".join(sorted({record.initial_weights or "none" for record in records})),
            "members": members,
        }
    )
    backbone = JOIN.join(model.bundle.backbone for model in models.values())
    bundle = Bundle(
        name=name, backbone=backbone, input=first.input, dropout=0, train_priors=first.train_priors, training=training
    )
    calibrate_and_save(joined(list(models.values())), bundle, folder, out, progress)
    return load_bundle(out)


def joined(models: list[LoadedBundle]) -> Network:
    """The network whose logits are the mean of the members', each divided by its temperature."""
    networks = [network_of(model) for model in models]
    network = Network(
        Bodies([member.body for member in networks]), sum(n.head.in_features for n in networks), dropout=0
    )
    scales = [1 / (_temperature(model) * len(models)) for model in models]
    with torch.no_grad():
        heads = [
            (member.head.weight * scale, member.head.bias * scale)
            for member, scale in zip(networks, scales, strict=True)
        ]
        network.head.weight.copy_(torch.cat([weight for weight, _ in heads], dim=1))
        network.head.bias.copy_(torch.stack([bias for _, bias in heads]).sum(0))
    return network.eval()


def _temperature(model: LoadedBundle) -> float:
    calibration = model.bundle.calibration
    return 1.0 if calibration is None else calibration.temperature


def _check(models: Mapping[str, LoadedBundle], data_hash: str) -> None:
    if len(models) < 2:
        raise BundleError(f"{len(models)} model", expected="two or more", todo="name the models to join")
    first = next(iter(models.values())).bundle
    for name, model in models.items():
        bundle = model.bundle
        if JOIN in bundle.backbone:
            raise BundleError("is an ensemble", where=name, expected="single networks", todo="name its members instead")
        if bundle.training.data_hash != data_hash:
            raise BundleError(
                f"was trained from other data ({bundle.training.data_hash[:12]})", where=name,
                expected=f"the shards ({data_hash[:12]}): a lesion that one member knows must be in nobody's test",
                todo="train it from these shards",
            )  # fmt: skip
        if _size(bundle) != _size(first):
            raise BundleError(
                f"sees {bundle.input.height}x{bundle.input.width} pixels, {bundle.input.views} views", where=name,
                expected=f"{first.input.height}x{first.input.width}, {first.input.views}, as the first",
                todo="train the members with the same `input`",
            )  # fmt: skip


def _size(bundle: Bundle) -> InputSpec:
    return bundle.input.model_copy(update={"copies": None})  # bundles of before do not know; `calibrate_and_save` looks
