"""The landing area: a folder or s3:// prefix where new images, tables of diagnoses and signed pathways arrive.

Nothing in it needs an order: images (.jpg, .jpeg, .png) lie in any sub-folder, their id is the file name without
suffix; a ``.csv`` with ``image_id``, ``lesion_id`` and ``dx`` (the columns of HAM10000) says what they show; a folder
with ``audit.jsonl`` is one of pathways, whose signed cases say it too. Nothing is ever written or removed here.
"""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from pyarrow import fs as pafs

from dermaflow import storage
from dermaflow.datasets.ham10000 import COLUMN_ALIASES, IMAGE_SUFFIXES, NEEDED_COLUMNS
from dermaflow.errors import DataError, SignOffError, StorageError
from dermaflow.pathways.outcomes import FILES, read_outcomes
from dermaflow.pathways.signoff import LOG_NAME
from dermaflow.schemas.lesion import METADATA_COLUMNS, UNKNOWN
from dermaflow.scoring.references import suffix
from dermaflow.taxonomy import parse_diagnosis

log = logging.getLogger(__name__)

IMAGE_COLUMNS = ("image_id", "uri", "bytes", "modified")
BY_TABLE, BY_HISTOLOGY, BY_SIGN_OFF = "table", "histology", "sign_off"
_RANK = {BY_TABLE: 0, BY_HISTOLOGY: 1, BY_SIGN_OFF: 2}  # the site's own table knows best, a glance at a screen least


@dataclass(frozen=True)
class Landing:
    """What lies in the landing area.

    Attributes:
        images: `IMAGE_COLUMNS`, one row an image, sorted by id; ``modified`` is in seconds since 1970.
        labels: `METADATA_COLUMNS` and ``by`` (table, histology, sign_off), one row for each image with a diagnosis.
        left_out: How many images or labels were left out, by reason.
    """

    images: pd.DataFrame
    labels: pd.DataFrame
    left_out: dict[str, int]


def read_landing(uri: str, site: str = "landing") -> Landing:
    """List images and read what is known of them.

    Args:
        uri: Folder or ``s3://`` prefix; one that is not there yet is empty.
        site: Where the images come from, for the column ``site``, unless a table says it.

    Raises:
        StorageError: The store does not answer.
        DataError: A table cannot be read.
    """
    left_out: Counter[str] = Counter()
    files = _list(uri)
    images = _images(files, left_out)
    parts = [_of_table(place, site, left_out) for place in files if suffix(place) == ".csv"]
    folders = [place.rpartition("/")[0] for place in files if place.rpartition("/")[2] == LOG_NAME]
    parts += [_of_pathways(folder, site, left_out) for folder in folders]
    labels = pd.concat([part for part in parts if len(part)] or [_no_labels()], ignore_index=True)
    return Landing(images, _settle(labels, images, left_out), dict(left_out))


def _list(uri: str) -> dict[str, pafs.FileInfo]:
    """Every file by its address, hidden ones left out, in order."""
    filesystem, root = storage.locate(uri)
    try:
        found = filesystem.get_file_info(pafs.FileSelector(root, allow_not_found=True, recursive=True))
    except OSError as error:
        raise StorageError(str(error), where=uri, expected="a folder or s3://bucket/prefix") from error
    root = root.rstrip("/")
    names = {info.path[len(root) + 1 :]: info for info in found if info.is_file}
    visible = {n: info for n, info in names.items() if not any(part.startswith(".") for part in n.split("/"))}
    base = uri if storage.is_remote(uri) else root
    return {storage.join(base, name): visible[name] for name in sorted(visible)}


def _images(files: Mapping[str, pafs.FileInfo], left_out: Counter[str]) -> pd.DataFrame:
    places: dict[str, list[str]] = {}
    for place in files:
        if suffix(place) in IMAGE_SUFFIXES:
            places.setdefault(place.rpartition("/")[2].rpartition(".")[0], []).append(place)
    rows = []
    for image_id in sorted(places):
        first, *others = places[image_id]
        if others and len({storage.sha256_file(place) for place in places[image_id]}) > 1:
            left_out["different images of one name"] += 1  # nobody can tell which of them a label means
            continue
        rows.append((image_id, first, int(files[first].size), float(files[first].mtime.timestamp())))
    table = pd.DataFrame(rows, columns=list(IMAGE_COLUMNS))
    return table.astype({"bytes": "int64", "modified": "float64"})


def _no_labels() -> pd.DataFrame:
    return pd.DataFrame(columns=[*METADATA_COLUMNS, "by"])


def _of_table(place: str, site: str, left_out: Counter[str]) -> pd.DataFrame:
    """The labels of a table; a table about something else has none."""
    try:
        with storage.locate(place)[0].open_input_stream(storage.locate(place)[1]) as stream:
            table = pd.read_csv(stream, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # pandas' parser errors are ValueErrors
        raise DataError(f"cannot be read: {error}", where=place, expected="a UTF-8 table with a header line") from error
    table.columns = table.columns.str.strip().str.lower()
    table = table.rename(columns={old: new for old, new in COLUMN_ALIASES.items() if new not in table})
    if not set(NEEDED_COLUMNS) <= set(table.columns):
        return _no_labels()
    rows = []
    for row in table.to_dict("records"):
        try:
            dx = parse_diagnosis(row["dx"])
        except DataError:
            left_out["a diagnosis that is none of the seven"] += 1
            continue
        said = {name: str(row.get(name, "")).strip() or UNKNOWN for name in ("dx_type", "sex", "localization")}
        age = pd.to_numeric(row.get("age", ""), errors="coerce")
        rows.append(
            {"image_id": row["image_id"].strip(), "lesion_id": row["lesion_id"].strip() or row["image_id"].strip(),
             "dx": dx, **said, "age": age, "site": str(row.get("site", "")).strip() or site, "by": BY_TABLE}
        )  # fmt: skip
    return pd.DataFrame(rows, columns=[*METADATA_COLUMNS, "by"])


def _of_pathways(folder: str, site: str, left_out: Counter[str]) -> pd.DataFrame:
    """The labels of a folder of pathways; one whose log was tampered with is left out, with a warning."""
    with tempfile.TemporaryDirectory(prefix="dermaflow-signed-") as temporary:
        here = Path(folder)
        if storage.is_remote(folder):
            here = Path(temporary)
            for name in FILES:
                if storage.exists(place := storage.join(folder, name)):
                    (here / name).write_bytes(storage.read_bytes(place))
        try:
            outcomes, nothing = read_outcomes(here)
        except SignOffError as error:
            log.warning("nothing is learnt from %s: %s", folder, error.what)
            left_out["a folder of pathways that was changed"] += 1
            return _no_labels()
    left_out["signed, and no diagnosis named"] += nothing
    rows = [
        {"image_id": image_id, "lesion_id": o.lesion_id, "dx": o.dx,
         "dx_type": "histo" if o.by == BY_HISTOLOGY else BY_SIGN_OFF, "age": o.age, "sex": o.sex,
         "localization": o.localization, "site": site, "by": o.by}
        for o in outcomes for image_id in o.image_ids
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=[*METADATA_COLUMNS, "by"])


def _settle(labels: pd.DataFrame, images: pd.DataFrame, left_out: Counter[str]) -> pd.DataFrame:
    """One label an image, from the best source; lesions of two diagnoses from equally good sources are left out."""
    here = labels[labels["image_id"].isin(images["image_id"])]
    left_out["a label without its image"] += int(labels["image_id"].nunique() - here["image_id"].nunique())
    rank = here["by"].map(_RANK)
    best = here[rank == rank.groupby(here["lesion_id"]).transform("min")]
    torn = best.groupby("lesion_id")["dx"].transform("nunique") > 1
    left_out["two diagnoses of one lesion"] += int(best.loc[torn, "lesion_id"].nunique())
    settled = best[~torn].drop_duplicates("image_id").sort_values("image_id", ignore_index=True)
    for reason in [reason for reason, count in left_out.items() if not count]:
        del left_out[reason]
    return settled


def lesion_of(images: Sequence[str], labels: pd.DataFrame) -> list[str]:
    """The lesion of each image; an image of which nothing is known counts as a lesion of its own."""
    known = dict(zip(labels["image_id"], labels["lesion_id"], strict=True))
    return [known.get(image_id, image_id) for image_id in images]
