"""The end of `make demo`: the test images as an archive, through the running endpoint, to a work list."""

from __future__ import annotations

import io
import logging
import time
import zipfile
from pathlib import Path
from typing import Any

import httpx
import pandas as pd
import pyarrow.parquet as pq

from dermaflow.cli.console import bars, console, print_table
from dermaflow.errors import DataError
from dermaflow.ports import free_port
from serve.cli import start, stop
from serve.models import choose
from serve.options import Options, checked

IMAGES, LISTED, PATIENCE = 60, 5, 600.0  # images in the archive, lesions shown, seconds


def score_through_endpoint(run: Path) -> None:
    """Start the service with the demo's model, post an archive with its patients, wait, print, stop.

    Args:
        run: Folder that `dermaflow demo` wrote.

    Raises:
        DataError: There is no such run.
    """
    model, patients = run / "model", run / "patients.csv"
    if not patients.exists():
        raise DataError("no demo here", where=run, expected="what `dermaflow demo` writes", todo="run make demo")
    archive, lesions = _archive(run)
    known = pd.read_csv(patients, dtype=str)
    chosen_patients = known[known["lesion_id"].isin(set(lesions.values()))]
    table = chosen_patients.merge(pd.DataFrame(lesions.items(), columns=["image_id", "lesion_id"]), on="lesion_id")
    options = Options(model=str(model), state=run / "serve", open=True)
    port = free_port()
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for every look at the progress
    try:
        start(checked(options), choose(options.model), "127.0.0.1", port)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            files = {
                "archive": ("demo.zip", archive, "application/zip"),
                "patients": ("patients.csv", table.to_csv(index=False).encode(), "text/csv"),
            }
            console.print(f"POST http://127.0.0.1:{port}/v1/batches  demo.zip, patients.csv", highlight=False)
            batch = _json(client.post("/v1/batches", files=files))
            batch = _wait(client, batch["id"])
            work = _json(client.get(f"/v1/batches/{batch['id']}/worklist"))["lesions"]
    finally:
        stop()
    rows = [
        [str(row["urgency"]), str(row["patient_id"]), row["lesion_id"], str(row["prediction"] or row["status"])]
        for row in work[:LISTED]
    ]
    print_table("work list, most urgent first", ["urgency", "patient", "lesion", "most probable"], rows)
    console.print(
        f"batch {batch['state']}: {batch['total']} images, {batch['ok']} assessed, {batch['not_assessable']} not "
        f"assessable, {batch['failed']} failed",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    console.print("the page, with this batch in it: make serve", highlight=False)


def _archive(run: Path) -> tuple[bytes, dict[str, str]]:
    """Some test images as a zip in memory, and the lesion of each."""
    lesions, whole = {}, io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        for file in sorted((run / "shards" / "test").glob("*.parquet")):
            for row in pq.read_table(file, columns=["image_id", "lesion_id", "image"]).to_pylist():
                if len(lesions) < IMAGES:
                    lesions[row["image_id"]] = row["lesion_id"]
                    archive.writestr(f"{row['image_id']}.jpg", row["image"])
        archive.writestr("notes.txt", "no image: it becomes a row with a reason")
    return whole.getvalue(), lesions


def _wait(client: httpx.Client, batch_id: str) -> dict[str, Any]:
    end = time.monotonic() + PATIENCE
    with bars() as show:
        while (batch := _json(client.get(f"/v1/batches/{batch_id}")))["state"] in ("queued", "running"):
            show("scored", batch["done"], batch["total"] or None)
            if time.monotonic() > end:
                raise DataError(f"batch {batch_id} still {batch['state']}", expected=f"the end within {PATIENCE:.0f} s")
            time.sleep(1)
    return batch


def _json(answer: httpx.Response) -> dict[str, Any]:
    if answer.is_error:
        raise DataError(f"{answer.status_code}: {answer.text[:500]}", where=str(answer.request.url.path))
    found: dict[str, Any] = answer.json()
    return found
