"""Look at every image of an archive once: size, hash, whether it can be read. What was seen before is not read again."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd
import pyarrow as pa

from dermaflow.datasets.images import ImageProblem, inspect_image

FACT_COLUMNS = ("name", "bytes", "modified", "width", "height", "sha256", "reason", "detail")
"""``name`` is the path relative to the archive, ``modified`` nanoseconds, ``reason`` empty for a good image."""
_ROWS_A_TASK = 512


def stat_images(images: pd.DataFrame, root: Path) -> pd.DataFrame:
    """Columns ``path``, ``name``, ``bytes``, ``modified`` of every image, without opening it."""
    stats = [os.stat(path) for path in images["path"]]
    return pd.DataFrame(
        {
            "path": images["path"].to_numpy(),
            "name": [os.path.relpath(path, root) for path in images["path"]],
            "bytes": [stat.st_size for stat in stats],
            "modified": [stat.st_mtime_ns for stat in stats],
        }
    )


def unseen(stats: pd.DataFrame, seen: pd.DataFrame | None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Split into what must be inspected and the facts already known (same name, size and time)."""
    if seen is None or seen.empty:
        return stats, pd.DataFrame(columns=list(FACT_COLUMNS))
    known = stats.merge(seen, on=["name", "bytes", "modified"], how="left", indicator=True)
    return stats[(known["_merge"] == "left_only").to_numpy()], known.loc[known["_merge"] == "both", list(FACT_COLUMNS)]


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
            found = inspect_image(Path(row["path"]).read_bytes())
            facts |= {"width": found.width, "height": found.height, "sha256": found.sha256}
        except ImageProblem as problem:
            facts |= {"reason": problem.reason, "detail": problem.what}
        except OSError as error:
            facts |= {"reason": "unreadable", "detail": str(error.strerror)}
        rows.append({key: row[key] for key in ("name", "bytes", "modified")} | facts)
    return pa.Table.from_pylist(rows)
