"""calibrate and explain: make a bundle's findings believable, and look into one of them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dermaflow.cli.console import bars, command, console, print_table
from dermaflow.errors import DataError
from dermaflow.taxonomy import DIAGNOSES

FINDING_NAME, HEAT_NAME, OVERLAY_NAME, NEIGHBOURS_NAME = "finding.json", "heat.npy", "overlay.png", "neighbours.png"


@command
def calibrate(
    model: Annotated[str, typer.Option(help="Model bundle, local or s3://, of this or an older format.")],
    shards: Annotated[str, typer.Option(help="Folder that `dermaflow prepare` wrote, local or s3://.")],
    out: Annotated[str, typer.Option(help="Folder of the new bundle, local or s3://.")],
) -> None:
    """Fit probabilities, sets, thresholds and the reference for unusual images again, on the shards' calibration split.

    The weights stay. A site does this with its own images, so that the probabilities hold for its patients.

    Example: dermaflow calibrate --model runs/model --shards site/shards --out site/model
    """
    from dermaflow import storage
    from dermaflow.learning.calibration import recalibrate
    from dermaflow.schemas.bundle import DIGEST_NAME

    with bars() as show, storage.output_folder(out, last=DIGEST_NAME) as folder:
        loaded = recalibrate(model, shards, folder, progress=show)
    fitted = loaded.bundle.calibration
    assert fitted is not None  # just fitted
    policy = ", ".join(f"{name} {value}" for name, value in fitted.policy.model_dump(exclude_none=True).items())
    rows = [
        ["images, lesions", f"{fitted.images}, {fitted.lesions}"],
        ["temperature", f"{fitted.temperature:.3f}"],
        ["melanoma threshold", f"{fitted.mel_threshold:.4f}"],
        ["malignant threshold", f"{fitted.malignant_threshold:.4f}"],
        ["safety policy", policy],
        ["entropy threshold, nats", f"{fitted.entropy_threshold:.3f}"],
        ["unusual from distance", "no reference" if fitted.ood is None else f"{fitted.ood.threshold:.3f}"],
    ]
    print_table("fitted on the calibration split", ["what", "value"], rows)
    console.print(f"next: dermaflow evaluate --model {out} --shards {shards} --out REPORT", soft_wrap=True)


@command
def explain(
    image: Annotated[Path, typer.Argument(help="A dermoscopy image.")],
    out: Annotated[Path, typer.Option(help="Folder for finding.json, heat.npy, overlay.png, neighbours.png.")],
    model: Annotated[str, typer.Option(help="'champion', another version of the registry, or a bundle.")] = "champion",
    shards: Annotated[str | None, typer.Option(help="Shards with the pictures of the nearest lesions.")] = None,
    diagnosis: Annotated[str | None, typer.Option(help="Class to look at; default the predicted one.")] = None,
) -> None:
    """One image: the finding, where the model looked, and the nearest training lesions.

    Example: dermaflow explain lesion.jpg --model runs/model --out runs/explained --shards runs/shards
    """
    import numpy as np

    from dermaflow import storage
    from dermaflow.bundles.bundle import load_bundle
    from dermaflow.preparation.reading import ShardFolder
    from dermaflow.scoring.planning import resolve_model
    from dermaflow.scoring.predictor import Predictor
    from dermaflow.trust.explain import LABEL, neighbour_sheet
    from dermaflow.trust.explain import explain as run

    if not image.is_file():
        raise DataError("no such image", where=image, expected="a JPEG, PNG, BMP or WebP file")
    found = run(Predictor(load_bundle(resolve_model(model).uri)), image.read_bytes(), image.stem, diagnosis=diagnosis)
    finding = found.finding
    report = {
        "finding": finding.model_dump(),
        "explained": found.diagnosis,
        "map": LABEL if found.heat is not None else None,
        "nearest_training_lesions": [asdict(neighbour) for neighbour in found.neighbours],
    }
    storage.write_bytes(out / FINDING_NAME, json.dumps(report, indent=2).encode())
    rows = [["status", finding.status], ["reason", finding.reason or ""]]
    if finding.status == "ok":
        rows += [
            ["prediction", str(finding.prediction)],
            ["cannot be left out", " ".join(finding.conformal_set or [])],
            ["p malignant", f"{finding.p_malignant:.3f}"],
            *([d.name, f"{getattr(finding, f'p_{d.code}'):.3f}"] for d in DIAGNOSES),
        ]
    if finding.ood_score is not None:
        rows.append(["distance from the training images", f"{finding.ood_score:.3f}"])
    print_table(finding.image_id, ["what", "value"], rows)
    if found.heat is not None and found.overlay is not None:
        with storage.open_atomic(out / HEAT_NAME) as stream:
            np.save(stream, found.heat)
        storage.write_bytes(out / OVERLAY_NAME, found.overlay)
        console.print(f"map of {found.diagnosis}: {LABEL}", soft_wrap=True)
    if found.neighbours:
        near = [[n.lesion_id, n.image_id, n.dx, f"{n.distance:.3f}"] for n in found.neighbours]
        print_table("nearest training lesions", ["lesion", "image", "diagnosis", "distance"], near)
        if shards:
            pictures = dict(ShardFolder(shards).images("train", {n.image_id for n in found.neighbours}))
            storage.write_bytes(out / NEIGHBOURS_NAME, neighbour_sheet(found.neighbours, pictures))
    console.print(f"{out}: {', '.join(sorted(path.name for path in out.iterdir()))}", soft_wrap=True)
