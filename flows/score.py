"""The flow `score`."""

from __future__ import annotations

from prefect import flow

from flows.caching import Output
from flows.running import library_run
from flows.steps import scored


@flow
def score(source: str, output: str, model: str = "champion", patients: str | None = None, hours: float = 24) -> Output:
    """Score every image of a source once, and with patients write their pathways. A run that was cut off goes on.

    Args:
        source: Folder, .zip, .tar (.gz, .zst), Parquet shards, .csv of URIs or DICOM file; local or s3://.
        output: Folder of findings and summary, local or s3://; a new one for a source that changed.
        model: 'champion', another version of the registry, or a bundle.
        patients: Table of patients; its column image_id, where it has one, maps images to lesions.
        hours: Longest time it may take.
    """
    with library_run():
        return scored(source, output, model=model, patients=patients, hours=hours)
