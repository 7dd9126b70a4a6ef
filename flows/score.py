"""The flow `score`."""

from __future__ import annotations

from datetime import UTC, timedelta

from prefect import flow
from prefect.runtime import flow_run

from flows.caching import Output
from flows.running import library_run
from flows.steps import scored


@flow
def score(source: str, output: str, model: str = "champion", patients: str | None = None, hours: float = 24) -> Output:
    """Score every image of a source once, and with patients write their pathways. A run that was cut off goes on.

    In source and output, {today} and {yesterday} stand for the date (UTC) of the day the run is due, and the day
    before, as in 2026-05-31: for a folder a day, and a schedule.

    Args:
        source: Folder, .zip, .tar (.gz, .zst), Parquet shards, .csv of URIs or DICOM file; local or s3://.
        output: Folder of findings and summary, local or s3://; a new one for a source that changed.
        model: 'champion', another version of the registry, or a bundle.
        patients: Table of patients; its column image_id, where it has one, maps images to lesions.
        hours: Longest time it may take.
    """
    with library_run():
        return scored(_dated(source), _dated(output), model=model, patients=patients, hours=hours)


def _dated(address: str) -> str:
    """The address for the day the run is due; one that starts late or is tried again still works on its own day."""
    day = flow_run.scheduled_start_time.astimezone(UTC).date()
    return address.replace("{today}", f"{day}").replace("{yesterday}", f"{day - timedelta(days=1)}")
