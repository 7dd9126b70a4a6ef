"""The model of a run whose normalisation stayed at the sites (FedBN), as one of them has it."""

from __future__ import annotations

from pathlib import Path

import torch

from clients.memory import Memory
from clients.site_config import SiteError, load_site
from dermaflow.bundles.bundle import LoadedBundle, load_bundle, load_uncalibrated
from dermaflow.learning.calibration import Progress, calibrate_and_save, silent
from dermaflow.learning.inference import network_of
from dermaflow.preparation.reading import ShardFolder


def personal_model(model: str, site: Path, out: Path, *, progress: Progress = silent) -> LoadedBundle:
    """Put the site's own normalisation into a run's model, calibrate it on the site's images and write the bundle.

    Args:
        model: Bundle that the coordinator sent, local or ``s3://``.
        site: The site's folder.
        out: Folder of the new bundle.
        progress: Called as the work goes on.

    Raises:
        SiteError: This site kept no normalisation of that run.
        BundleError: The bundle is damaged.
        DataError: The training or the calibration split is empty.
    """
    config, loaded = load_site(site), load_uncalibrated(model)
    record = loaded.bundle.training.federation
    own = Memory(site / "state", record.run).recall("norm") if record and record.run else None
    if own is None:
        raise SiteError(
            "no normalisation of the run of this model", where=site / "state",
            expected="a run with norm=local, in which this site trained",
            todo="for any other run: dermaflow calibrate",
        )  # fmt: skip
    network = network_of(loaded)
    network.load_state_dict({name: torch.from_numpy(array) for name, array in own.items()}, strict=False)
    bundle = loaded.bundle.model_copy(update={"name": f"{loaded.bundle.name}-{config.name}"})
    calibrate_and_save(network, bundle, ShardFolder(config.shards), out, progress)
    return load_bundle(out)
