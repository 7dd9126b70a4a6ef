"""From an archive to Parquet shards, doing only the work that is not done yet.

A shard is named by its content, so a second run finds it and a run killed midway goes on where it stopped. The manifest
is written last and atomically: a folder without it, or files it does not name, are never read.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import pandas as pd
import pyarrow as pa

from dermaflow import __version__, monitoring, storage
from dermaflow.datasets.ham10000 import read_ham10000
from dermaflow.errors import DataError, ShardError
from dermaflow.preparation import inspection, layout
from dermaflow.preparation.splits import FRACTIONS, assign_lesions, lesion_table
from dermaflow.schemas.lesion import QUARANTINE_COLUMNS, LesionArchive
from dermaflow.schemas.shard import LESIONS_NAME, MANIFEST_NAME, QUARANTINE_NAME, Manifest, ShardFile, Split

log = logging.getLogger(__name__)

INSPECTION_NAME = "inspection.parquet"
_PROTECTED = ("test", "calibration", "train")  # the split whose images must least move to another comes first

Progress = Callable[[str, int, int], None]
"""Called with the step, the units done and the units in all."""
MapTables = Callable[[Iterable[pa.Table], Callable[[pa.Table], pa.Table]], Iterator[pa.Table]]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a run of `prepare` did: the manifest, and how much of it was new work."""

    manifest: Manifest
    inspected: int  # images read for the first time
    written: int  # shards written


def prepare(
    data: Path,
    out: str | Path,
    *,
    seed: int = 0,
    fractions: Mapping[Split, float] = FRACTIONS,
    folds: int = 5,
    strict: bool = False,
    use_ray: bool | None = None,
    progress: Progress = lambda step, done, total: None,
) -> Prepared:
    """Prepare a HAM10000 folder.

    Args:
        data: Folder as published, see `dermaflow.datasets.ham10000`.
        out: Shard folder, local or ``s3://``. On a cluster of several machines it must be reachable from all of them.
        seed: Seed of the splits.
        fractions: Share of images of each split.
        folds: Cross-validation folds over all lesions outside ``test``.
        strict: Raise on the first kind of bad item instead of leaving it in quarantine.
        use_ray: Run on Ray Data; by default where Ray is installed. Without it the same functions run in this process.
        progress: Called as the work goes on.

    Raises:
        DataError: The archive cannot be read, or `strict` and an item is bad.
        ShardError: The folder was prepared with another seed, other fractions or folds.
        StorageError: The disk is full; what is complete stays and the next run goes on.
    """
    began = time.monotonic()
    mapper = _mapper(use_ray)
    out = str(out) if storage.is_remote(out) else str(Path(out).absolute())  # a worker may stand in another folder
    archive = read_ham10000(data)
    previous = layout.read_manifest(out) if storage.exists(storage.join(out, MANIFEST_NAME)) else None
    if previous is not None and (previous.seed, previous.fractions, previous.folds) != (seed, dict(fractions), folds):
        raise ShardError(
            f"prepared with seed {previous.seed}, fractions {previous.fractions}, folds {previous.folds}", where=out,
            expected=f"seed {seed}, fractions {dict(fractions)}, folds {folds}",
            todo="use the same choices, or another folder",
        )  # fmt: skip
    images, inspected = _inspect(archive, out, mapper, progress)
    old_lesions = layout.read_lesions(out) if previous else None
    images, quarantined = _quarantine(archive, images, old_lesions)
    if strict and not quarantined.empty:
        first = quarantined.iloc[0]
        raise DataError(
            f"{len(quarantined)} bad items, the first: {first['reason']} {first['detail']}",
            where=first["path"] or data,
            todo="repair or remove them, or prepare without strict: bad items are then set apart",
        )
    if images.empty:
        raise DataError("no image is left after quarantine", where=data, todo="run dermaflow data check on the folder")

    lesions = assign_lesions(lesion_table(images), fractions, seed, folds=folds, previous=old_lesions)
    images = images.merge(lesions[["lesion_id", "split"]], on="lesion_id")
    buckets = layout.bucket_counts(images, previous.buckets if previous else None)
    plan = layout.plan_shards(images, buckets)
    shards, written = _write(plan, out, previous, mapper, progress)

    manifest = Manifest(
        seed=seed, fractions=dict(fractions), folds=folds, buckets=buckets, shards=shards,
        counts={s: dict(sorted(Counter(images.loc[images["split"] == s, "dx"]).items())) for s in fractions},
        lesions={s: int((lesions["split"] == s).sum()) for s in fractions},
        quarantined=len(quarantined),
        data_hash=layout.data_hash(shards),
        dermaflow_version=__version__,
    )  # fmt: skip
    if manifest != previous:
        layout.write_table(out, LESIONS_NAME, pa.Table.from_pandas(lesions, preserve_index=False))
    if manifest != previous or inspected:  # another bad item in place of one gives the same manifest
        storage.write_bytes(storage.join(out, QUARANTINE_NAME), quarantined.to_csv(index=False).encode())
    if manifest != previous:
        storage.write_bytes(storage.join(out, MANIFEST_NAME), manifest.model_dump_json(indent=1).encode())
    layout.remove_unnamed(out, manifest)
    monitoring.prepared(
        inspected=inspected, quarantined=len(quarantined), shards=written, seconds=time.monotonic() - began
    )
    return Prepared(manifest, inspected, written)


def _mapper(use_ray: bool | None) -> MapTables:
    if use_ray is None:
        use_ray = importlib.util.find_spec("ray") is not None
    if not use_ray:
        return lambda tables, function: map(function, tables)
    from dermaflow.preparation.cluster import map_tables  # a hospital site has no Ray

    return map_tables


def _inspect(
    archive: LesionArchive, out: str | Path, mapper: MapTables, progress: Progress
) -> tuple[pd.DataFrame, int]:
    """`archive.images` with the facts of each image; facts of earlier runs are taken from the folder."""
    stats = inspection.stat_images(archive.images, archive.root)
    seen = None
    if storage.exists(storage.join(out, INSPECTION_NAME)):
        seen = layout.read_table(out, INSPECTION_NAME).to_pandas()
    todo, known = inspection.unseen(stats, seen)
    parts, done = [known], 0
    for part in mapper(inspection.as_tasks(todo), inspection.inspect_table) if len(todo) else ():
        parts.append(part.to_pandas())
        done += len(part)
        progress("inspect", done, len(todo))
    facts = pd.concat([part for part in parts if len(part)], ignore_index=True).sort_values("name", ignore_index=True)
    if len(todo):
        layout.write_table(out, INSPECTION_NAME, pa.Table.from_pandas(facts, preserve_index=False))
    facts = stats[["path", "name"]].merge(facts, on="name")
    return archive.images.merge(facts, on="path"), len(todo)


def _quarantine(
    archive: LesionArchive, images: pd.DataFrame, old_lesions: pd.DataFrame | None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Set bad images apart and group lesions that share an identical image."""
    bad = images[images["reason"] != ""]
    good = images[images["reason"] == ""].copy()
    clash = good.groupby("sha256")["dx"].transform("nunique") > 1
    clashing = good[clash].assign(reason="conflicting_diagnosis", detail="identical image under another diagnosis")
    good = good[~clash].copy()
    good["lesion_id"] = merge_identical(good["lesion_id"], good["sha256"], old_lesions, archive.aliases)
    columns = list(QUARANTINE_COLUMNS)
    parts = [archive.quarantined[columns], bad[columns], clashing[columns]]
    quarantined = pd.concat([part for part in parts if len(part)] or [parts[0]], ignore_index=True)
    for reason, count in quarantined["reason"].value_counts().items():
        log.warning("quarantined: %d x %s", count, reason)
    return good, quarantined


def merge_identical(
    lesion_ids: pd.Series,
    hashes: pd.Series,
    old_lesions: pd.DataFrame | None = None,
    aliases: Mapping[str, str] | None = None,
) -> pd.Series:
    """Give lesions that share a byte-identical image one id, also through chains of such images.

    Args:
        lesion_ids: Lesion of each image.
        hashes: SHA-256 of each image.
        old_lesions: Columns ``lesion_id`` and ``split`` of the run before.
        aliases: Other ids of these lesions, under which the run before may have known them.

    Returns:
        The lesion of each image. Of several ids, one that was in the test split before comes first, so that its images
        stay there, then one of calibration, then of train, then the smallest.
    """
    rank: dict[str, int] = {}
    if old_lesions is not None:
        rank = dict(zip(old_lesions["lesion_id"], old_lesions["split"].map(_PROTECTED.index), strict=True))
    parent: dict[str, str] = {}

    def root(lesion: str) -> str:
        while (up := parent.get(lesion, lesion)) != lesion:
            lesion = up
        return lesion

    identical = lesion_ids.groupby(hashes.to_numpy()).unique()
    for group in [*(aliases or {}).items(), *identical]:
        roots = sorted({root(lesion) for lesion in group}, key=lambda lesion: (rank.get(lesion, 3), lesion))
        for other in roots[1:]:
            parent[other] = roots[0]
    return lesion_ids.map(root)


def _write(
    plan: list[layout.PlannedShard], out: str | Path, previous: Manifest | None, mapper: MapTables, progress: Progress
) -> tuple[list[ShardFile], int]:
    """Write the shards that are not there yet; returns all of them in the order of their names."""
    there = layout.complete_shards(out, plan, previous)
    todo = [shard for shard in plan if shard.path not in there]
    done = 0

    def write(table: pa.Table) -> pa.Table:
        return layout.write_shards(table, str(out))

    for part in mapper((layout.as_task(shard) for shard in todo), write) if todo else ():
        for row in part.to_pylist():
            there[row["path"]] = ShardFile(**row)
            done += 1
        progress("write", done, len(todo))
    return [there[shard.path] for shard in sorted(plan, key=lambda shard: shard.path)], len(todo)
