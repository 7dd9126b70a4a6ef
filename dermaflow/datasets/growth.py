"""An archive that grows: the one a model was first trained from, and every labelled image that arrived since.

The folder reads like HAM10000 as published (`dermaflow.datasets.ham10000`), so everything that prepares one prepares
the other. Images of the first archive are links; those that arrived are copies, because a landing area is emptied one
day and the archive has to stay as it was trained from.
"""

from __future__ import annotations

import logging
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from dermaflow import storage
from dermaflow.datasets.ham10000 import read_ham10000
from dermaflow.errors import StorageError
from dermaflow.schemas.lesion import METADATA_COLUMNS

log = logging.getLogger(__name__)

TABLE, ARRIVED = "HAM10000_metadata.csv", "arrived.parquet"
_COLUMNS = [*METADATA_COLUMNS, "by", "file"]


def arrived(folder: Path) -> pd.DataFrame:
    """Images that were added so far: `METADATA_COLUMNS`, ``by`` (who named the diagnosis) and ``file``."""
    path = folder / ARRIVED
    return pq.read_table(path).to_pandas() if path.exists() else pd.DataFrame(columns=_COLUMNS)


def unlearnt(folder: Path, base: Path, labels: pd.DataFrame) -> pd.DataFrame:
    """The labels that the archive does not hold yet, or holds with another diagnosis or lesion.

    Args:
        folder: The archive.
        base: HAM10000 folder it begins with; its own images are known.
        labels: As in `grow`.
    """
    labels = _learnable(labels, read_ham10000(base).images)
    return labels[~_key(labels).isin(_key(arrived(folder)))].reset_index(drop=True)


def grow(folder: Path, base: Path, labels: pd.DataFrame, places: dict[str, str]) -> int:
    """Add labelled images to an archive; doing it twice changes nothing, and one cut off midway is done by the next.

    Args:
        folder: The archive, made if it is not there.
        base: HAM10000 folder it begins with. An image id that it holds already stays as it is there.
        labels: `METADATA_COLUMNS` and ``by``, one row an image; later ones replace what was said of an image before.
            Those that give a lesion of the first archive another diagnosis are left out.
        places: Address of each image by its id, local or ``s3://``.

    Returns:
        How many images arrived in all since the archive was begun.

    Raises:
        DataError: The first archive cannot be read.
        StorageError: An image cannot be read, or the disk is full.
    """
    first = read_ham10000(base).images
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    for image_id, path in zip(first["image_id"], first["path"], strict=True):
        _link(Path(path), images / f"{image_id}{Path(path).suffix}")
    labels = _learnable(labels, first)
    files = []
    for image_id in labels["image_id"]:
        place = places[image_id]
        target = folder / "arrived" / f"{image_id}.{place.rpartition('.')[2].lower()}"
        content = storage.read_bytes(place)
        if not target.exists() or target.stat().st_size != len(content) or target.read_bytes() != content:
            storage.write_bytes(target, content)  # not written anew where it is the same: its time is its identity
        files.append(str(target.relative_to(folder)))
    known = arrived(folder)
    known = known[~known["image_id"].isin(labels["image_id"])]
    parts = [part for part in (known, labels.assign(file=files)) if len(part)] or [known]
    all_arrived = pd.concat(parts, ignore_index=True)[_COLUMNS].sort_values("image_id", ignore_index=True)
    table = pd.concat([first[list(METADATA_COLUMNS)], all_arrived[list(METADATA_COLUMNS)]], ignore_index=True)
    storage.write_bytes(folder / TABLE, table.rename(columns={"site": "dataset"}).to_csv(index=False).encode())
    with storage.open_atomic(folder / ARRIVED) as stream:  # last: with it, the labels count as learnt
        pq.write_table(pa.Table.from_pandas(all_arrived.astype({"age": float}), preserve_index=False), stream)
    return len(all_arrived)


def _learnable(labels: pd.DataFrame, first: pd.DataFrame) -> pd.DataFrame:
    """Labels of new images that do not contradict what the first archive says of their lesion.

    A lesion of two diagnoses is set apart whole, and with it the images of it that were learnt or frozen for the test.
    """
    said = labels["lesion_id"].map(first.drop_duplicates("lesion_id").set_index("lesion_id")["dx"])
    contradicting = said.notna() & (said != labels["dx"])
    if contradicting.any():
        log.warning(
            "%d labels give a lesion of the first archive another diagnosis and are left out; if they are right, "
            "correct its table", contradicting.sum(),
        )  # fmt: skip
    return labels[~contradicting & ~labels["image_id"].isin(first["image_id"])]


def _key(labels: pd.DataFrame) -> pd.Series:
    return labels["image_id"].astype(str) + "\0" + labels["lesion_id"].astype(str) + "\0" + labels["dx"].astype(str)


def _link(target: Path, link: Path) -> None:
    if link.is_symlink() and link.readlink() == target:
        return
    try:
        link.unlink(missing_ok=True)
        link.symlink_to(target)
    except OSError as error:
        raise StorageError(f"no link can be made: {error.strerror}", where=link, expected="a local disk") from error
