"""Look at every image of an archive once: size, hash, whether it can be read. What was seen is not read again."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd
import pyarrow as pa

from dermaflow.datasets.images import MAX_BYTES, ImageProblem, inspect_image

FACT_COLUMNS = ("name", "bytes", "modified", "width", "height", "sha256", "reason", "detail")
"""``name`` is the path relative to the archive, ``modified`` nanoseconds, ``reason`` empty for a good image."""
_ROWS_A_TASK = 512


def stat_images(images: pd.DataFrame, root: Path) -> pd.DataFrame:
    """Columns ``path``, ``name``, ``bytes``, ``modified`` of every image, not opened; -1 where even that is refused."""
    stats = [_stat(path) for path in images["path"]]
    return pd.DataFrame(
        {
            "path": images["path"].to_numpy(),
            "name": [os.path.relpath(path, root) for path in images["path"]],
            "bytes": [size for size, _ in stats],
            "modified": [modified for _, modified in stats],
        }
    )


def _stat(path: str) -> tuple[int, int]:
    try:
        stat = Path(path).stat()
    except OSError:  # a link to nowhere; inspecting it gives the reason
        return -1, -1
    return stat.st_size, stat.st_mtime_ns


def unseen(stats: pd.DataFrame, seen: pd.DataFrame | None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Split into what must be inspected and the facts already known (same name, size and time).

    A file that could not be read is tried again: a permission or a cable may have been mended since.
    """
    if seen is None:
        return stats, pd.DataFrame(columns=list(FACT_COLUMNS))
    seen = seen[seen["reason"] != "unreadable"]
    known = stats.merge(seen, on=["name", "bytes", "modified"])[list(FACT_COLUMNS)]  # inner: integers stay integers
    return stats[~stats["name"].isin(known["name"])], known


def as_tasks(stats: pd.DataFrame) -> list[pa.Table]:
    """Cut the table into tasks of a few hundred images."""
    starts = range(0, len(stats), _ROWS_A_TASK)
    return [pa.Table.from_pandas(stats.iloc[i : i + _ROWS_A_TASK], preserve_index=False) for i in starts]


def inspect_table(stats: pa.Table) -> pa.Table:
    """Inspect the images of a table with the columns of `stat_images`; returns `FACT_COLUMNS`."""
    rows = []
    for row in stats.to_pylist():
        facts = {"width": 0, "height": 0, "sha256": "", "reason": "", "detail": ""}
        try:
            with Path(row["path"]).open("rb") as stream:
                found = inspect_image(stream.read(MAX_BYTES + 1))
            facts |= {"width": found.width, "height": found.height, "sha256": found.sha256}
        except ImageProblem as problem:
            facts |= {"reason": problem.reason, "detail": problem.what}
        except OSError as error:
            facts |= {"reason": "unreadable", "detail": str(error.strerror)}
        rows.append({key: row[key] for key in ("name", "bytes", "modified")} | facts)
    return pa.Table.from_pylist(rows)
