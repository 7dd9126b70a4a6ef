"""Read HAM10000 from a folder, in any of the layouts in which it is passed around.

Source: Tschandl, Rosendahl, Kittler, The HAM10000 dataset, Sci Data 5, 180161 (2018), doi 10.1038/sdata.2018.161.

Read are the published metadata table, ISIC 2018/2019 one-hot truth files, and class folders without any table. Images
are listed, not opened; `dermaflow.datasets.check` opens them.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pandas as pd

from dermaflow.errors import DataError
from dermaflow.schemas.lesion import METADATA_COLUMNS, QUARANTINE_COLUMNS, UNKNOWN, LesionArchive
from dermaflow.taxonomy import parse_diagnosis

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png"})
TABLE_SUFFIXES = frozenset({".csv", ".tab", ".tsv"})
METADATA_STEM = "ham10000_metadata"  # published without a suffix, as .tab by Dataverse, as .csv elsewhere
NEEDED_COLUMNS = ("image_id", "lesion_id", "dx")
MAX_AGE = 120  # years; nobody photographed was older

COLUMN_ALIASES = {
    "image": "image_id",  # ISIC truth files
    "dataset": "site",  # HAM10000 since version 4
    "age_approx": "age",  # ISIC 2019 metadata
    "anatom_site_general": "localization",  # ISIC 2019 metadata
    "diagnosis_confirm_type": "dx_type",  # ISIC 2018 lesion groupings
}
ONE_HOT_COLUMNS = ("mel", "nv", "bcc", "akiec", "ak", "bkl", "df", "vasc", "scc")  # ISIC 2018 and 2019; UNK is none
CONFIRMATIONS = {  # the ISIC archive's words for HAM10000's dx_type
    "histopathology": "histo",
    "serial imaging showing no change": "follow_up",
    "single image expert consensus": "consensus",
    "confocal microscopy with consensus dermoscopy": "confocal",
}

_PART_FOLDER = re.compile(r"part_?\d+$", re.IGNORECASE)

HIDDEN_DUPLICATES: tuple[tuple[str, str], ...] = tuple(
    (f"ISIC_{a}", f"ISIC_{b}")
    for a, b in (
        ("0033481", "0033421"), ("0033556", "0032634"), ("0029152", "0033173"), ("0029036", "0027027"),
        ("0027820", "0028209"), ("0027689", "0032647"), ("0030906", "0024879"), ("0033391", "0034186"),
        ("0025226", "0030074"), ("0026087", "0025664"), ("0024736", "0029748"), ("0024770", "0027811"),
        ("0027162", "0029061"), ("0024602", "0032283"), ("0029625", "0024629"), ("0030000", "0031392"),
        ("0024437", "0031299"), ("0033374", "0033417"),
    )
)  # fmt: skip
"""Images of one lesion published under two lesion ids: Abhishek, Jain, Hamarneh, Sci Data 12:196 (2025)."""


def read_ham10000(root: Path) -> LesionArchive:
    """Read a HAM10000 folder.

    Read as the metadata, first match wins: ``HAM10000_metadata`` (with or without suffix), another table with
    `NEEDED_COLUMNS`, one-hot truth files (joined with a table of lesion ids, if there is one), class folders. Known
    hidden duplicates get one lesion id, and a lesion from two sites is given to the site of most of its images.

    Args:
        root: Folder with images (.jpg, .jpeg, .png) in any sub-folders and usually a metadata table. Of several files
            with one image id, the one in a ``part_*`` folder is read, else the first by path. Segmentation masks are
            left out.

    Returns:
        The images that can be used, and what was left out with its reason: ``no_row``, ``no_image``, ``no_image_id``,
        ``unknown_diagnosis`` or ``conflicting_diagnosis`` (one lesion, two diagnoses).

    Raises:
        DataError: The folder is missing or empty, no metadata can be found, a needed column is missing, an image id
            stands twice, or nothing usable is left.
    """
    root = Path(root).absolute()
    if not root.is_dir():
        raise DataError(
            "no such folder", where=root, expected="the folder of HAM10000",
            todo="correct the path, or download the data with: dermaflow data fetch",
        )  # fmt: skip
    images, tables = _list_files(root)
    if not images:
        raise DataError(
            "the folder holds no images", where=root, expected="*.jpg, *.jpeg or *.png in it or its sub-folders",
            todo="unpack the image archives here, or download the data with: dermaflow data fetch",
        )  # fmt: skip
    rows, source = _read_rows(root, images, tables)
    paths = _one_path_each(images)
    archive = _assemble(root, rows, source, paths)
    if archive.images.empty:
        reasons = archive.quarantined["reason"].value_counts().items()
        raise DataError(
            "no image can be used: " + ", ".join(f"{reason} {count}" for reason, count in reasons), where=source,
            expected="image ids equal to image file names without suffix",
            todo="check that the table and the images belong together",
        )  # fmt: skip
    logger.info(
        "read %d images of %d lesions from %s; %d quarantined",
        len(archive.images), archive.images["lesion_id"].nunique(), root, len(archive.quarantined),
    )  # fmt: skip
    return archive


def hidden_duplicates(image_ids: Iterable[str]) -> list[tuple[str, str]]:
    """The pairs of `HIDDEN_DUPLICATES` of which both images are given."""
    present = set(image_ids)
    return [pair for pair in HIDDEN_DUPLICATES if present.issuperset(pair)]


# --- files ---------------------------------------------------------------------------------------------------------


def _list_files(root: Path) -> tuple[list[Path], list[Path]]:
    """Image files and table files below a folder, each sorted by path."""
    images, tables = [], []
    for path in _walk(root):
        suffix = path.suffix.lower()
        if suffix in IMAGE_SUFFIXES:
            if not path.stem.lower().endswith("_segmentation"):
                images.append(path)
        elif suffix in TABLE_SUFFIXES or path.name.lower() == METADATA_STEM:
            tables.append(path)
    return sorted(images), sorted(tables)


def _walk(root: Path) -> Iterator[Path]:
    """Files below a folder, through symbolic links to folders; without hidden files and segmentation folders."""

    def refuse(error: OSError) -> None:
        raise DataError(
            f"the folder cannot be read: {error.strerror}", where=error.filename, expected="a readable folder",
            todo="correct its permissions or move it away",
        ) from error  # fmt: skip

    visited: set[str] = set()
    for folder, subfolders, names in os.walk(root, onerror=refuse, followlinks=True):
        if os.path.realpath(folder) in visited:  # a link that leads back
            subfolders.clear()
            continue
        visited.add(os.path.realpath(folder))
        subfolders[:] = [
            name for name in subfolders
            if not name.startswith((".", "__MACOSX")) and "segmentation" not in name.lower()
        ]  # fmt: skip
        yield from (Path(folder, name) for name in names if not name.startswith("."))


def _one_path_each(images: list[Path]) -> pd.Series:
    """The path to read for each image id: index image_id, value path (str)."""
    ranked = sorted(images, key=lambda path: (not any(_PART_FOLDER.search(p.name) for p in path.parents), path))
    chosen: dict[str, str] = {}
    for path in ranked:
        chosen.setdefault(path.stem, str(path))
    if extra := len(images) - len(chosen):
        logger.info("%d further copies of image ids in other folders are ignored", extra)
    return pd.Series(chosen, dtype=str, name="path")


# --- tables --------------------------------------------------------------------------------------------------------


def _read_rows(root: Path, images: list[Path], tables: list[Path]) -> tuple[pd.DataFrame, Path]:
    """One row an image as the source says it, column ``dx`` unparsed, and where it was read."""
    frames = _read_tables(tables)
    truths = {path: frame for path, frame in frames.items() if {"image_id", "mel", "nv"} <= set(frame.columns)}
    others = {path: frame for path, frame in frames.items() if path not in truths}
    path = _choose(others, NEEDED_COLUMNS)
    if path is not None and ("dx" in others[path] or not truths):
        return _need_columns(others[path], path, NEEDED_COLUMNS), path
    if truths:
        return _join_truth(truths, others), next(iter(truths))
    if any(_is_diagnosis(image.parent.name) for image in images):
        return _rows_from_folders(images), root
    for path, frame in others.items():
        if {"image_id", "dx"} & set(frame.columns):  # meant as the metadata
            _need_columns(frame, path, NEEDED_COLUMNS)
    raise DataError(
        "no metadata found", where=root,
        expected="HAM10000_metadata.csv, an ISIC truth file (image,MEL,NV,...) or class folders (mel/, nv/, ...)",
        todo="put the metadata table into the folder, or download it with: dermaflow data fetch",
    )  # fmt: skip


def _read_tables(paths: list[Path]) -> dict[Path, pd.DataFrame]:
    """The tables that can be read; a foreign table that cannot is passed over."""
    frames = {}
    for path in paths:
        try:
            frames[path] = _read_table(path)
        except DataError as error:
            if path.stem.lower() == METADATA_STEM:
                raise
            logger.warning("%s", error)
    return frames


def _read_table(path: Path) -> pd.DataFrame:
    """A table with text cells and lower-case column names by our names; commas, semicolons or tabs."""
    try:
        with path.open(encoding="utf-8-sig") as stream:
            separator = max(",;\t", key=stream.readline().count)
        frame = pd.read_csv(path, sep=separator, dtype=str, encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # pandas' parser errors are ValueErrors
        raise DataError(
            f"the table cannot be read: {error}", where=path, expected="a UTF-8 table with a header line",
            todo="download it again",
        ) from error  # fmt: skip
    frame.columns = frame.columns.str.strip().str.lower()
    return frame.rename(columns={old: new for old, new in COLUMN_ALIASES.items() if new not in frame})


def _choose(frames: dict[Path, pd.DataFrame], needed: tuple[str, ...]) -> Path | None:
    """The table named HAM10000_metadata, else the one with the needed columns."""
    named = [path for path in frames if path.stem.lower() == METADATA_STEM]
    fitting = [path for path, frame in frames.items() if set(needed) <= set(frame.columns)]
    candidates = named or fitting
    if len(candidates) > 1:
        raise DataError(
            "several metadata tables: " + ", ".join(path.name for path in candidates), where=candidates[0].parent,
            expected="one", todo="keep the one to be read and move the others out of the folder",
        )  # fmt: skip
    return candidates[0] if candidates else None


def _need_columns(frame: pd.DataFrame, path: Path, needed: tuple[str, ...]) -> pd.DataFrame:
    missing = [column for column in needed if column not in frame]
    if missing:
        raise DataError(
            f"missing column {', '.join(missing)}; found {', '.join(frame.columns)}", where=path,
            expected="the columns " + ", ".join(needed), todo="restore the column, or use the published table",
        )  # fmt: skip
    return frame


def _join_truth(truths: dict[Path, pd.DataFrame], others: dict[Path, pd.DataFrame]) -> pd.DataFrame:
    """Truth files, one below the other, with the columns of a table that knows more about the same images."""
    truth = pd.concat([_read_one_hot(frame) for frame in truths.values()], ignore_index=True)
    path = _choose(others, ("image_id", "lesion_id"))
    if path is None:
        return truth
    more = _need_columns(others[path], path, ("image_id",)).drop(columns="dx", errors="ignore")
    more = more.dropna(subset="image_id")
    _refuse_duplicates(more["image_id"], path)
    return truth.merge(more, on="image_id", how="left")


def _read_one_hot(frame: pd.DataFrame) -> pd.DataFrame:
    """``image_id`` and ``dx`` of a one-hot truth file; ``dx`` is empty where not exactly one diagnosis is marked."""
    columns = [column for column in ONE_HOT_COLUMNS if column in frame]
    marked = frame[columns].apply(pd.to_numeric, errors="coerce").fillna(0.0) > 0.5
    return pd.DataFrame({"image_id": frame["image_id"], "dx": marked.idxmax(axis=1).where(marked.sum(axis=1) == 1)})


def _rows_from_folders(images: list[Path]) -> pd.DataFrame:
    """Class folders: the folder's name is the diagnosis."""
    rows = pd.DataFrame([(path.stem, path.parent.name) for path in images], columns=["image_id", "dx"])
    return rows.drop_duplicates(ignore_index=True)  # copies of an image; under two diagnoses it is refused later


def _is_diagnosis(text: str) -> bool:
    try:
        parse_diagnosis(text)
    except DataError:
        return False
    return True


# --- rows ----------------------------------------------------------------------------------------------------------


def _assemble(root: Path, rows: pd.DataFrame, source: Path, paths: pd.Series) -> LesionArchive:
    """Clean the rows, join them with the image files, and set apart what cannot be used."""
    rows = _text_columns(rows, source)
    without_id = rows[rows["image_id"] == ""]
    rows = rows.drop(without_id.index)
    _refuse_duplicates(rows["image_id"], source)
    lesion, aliases = _lesion_of_image(rows, source)
    rows = rows.assign(lesion_id=lesion, age=_parse_age(rows, source))
    rows = rows.join(paths, on="image_id")

    known = {text: parse_diagnosis(text) for text in rows["dx"].unique() if _is_diagnosis(text)}
    code = rows["dx"].map(known)
    conflicting = code.groupby(rows["lesion_id"]).transform("nunique") > 1
    rows["reason"], rows["detail"] = "", ""
    for reason, hit, detail in (  # the last that fits counts
        ("no_image", rows["path"].isna(), f"row in {source.name}"),
        ("conflicting_diagnosis", conflicting, "the images of lesion " + rows["lesion_id"] + " differ in dx"),
        ("unknown_diagnosis", code.isna(), "dx is " + rows["dx"].map(repr)),
    ):
        rows["reason"] = rows["reason"].mask(hit, reason)
        rows["detail"] = rows["detail"].mask(hit, detail)

    good = rows.assign(dx=code)[rows["reason"] == ""].sort_values("image_id", ignore_index=True)
    good["site"] = _site_of_lesion(good)
    stray = paths[~paths.index.isin(rows["image_id"])]
    lines = [f"line {i + 2} of {source.name}" for i in without_id.index]  # line 1 is the header
    quarantined = pd.concat(
        [
            rows.loc[rows["reason"] != "", list(QUARANTINE_COLUMNS)],
            pd.DataFrame(
                {"image_id": stray.index, "path": stray, "reason": "no_row", "detail": f"not in {source.name}"}
            ),
            pd.DataFrame({"image_id": "", "path": "", "reason": "no_image_id", "detail": lines}),
        ]
    )
    quarantined = quarantined.fillna("").astype("str").sort_values(["reason", "image_id"], ignore_index=True)
    return LesionArchive(root, good[[*METADATA_COLUMNS, "path"]], quarantined, aliases)


def _refuse_duplicates(image_ids: pd.Series, where: Path) -> None:
    repeated = sorted(image_ids[image_ids.duplicated()].unique())
    if repeated:
        raise DataError(
            f"{len(repeated)} image ids stand more than once: {_some(repeated)}", where=where,
            expected="each image id once", todo="remove the surplus rows or rename the images",
        )  # fmt: skip


def _text_columns(rows: pd.DataFrame, source: Path) -> pd.DataFrame:
    """`METADATA_COLUMNS` as stripped text; what describes the image is ``unknown`` where it is not given."""
    missing = [column for column in METADATA_COLUMNS if column not in rows and column != "lesion_id"]
    if missing:
        logger.warning("%s: no column %s; unknown for every image", source, ", ".join(missing))
    rows = rows.reindex(columns=list(METADATA_COLUMNS)).astype(object).fillna("").astype(str)
    rows = rows.apply(lambda column: column.str.strip())
    for column in ("dx_type", "sex", "localization", "site"):
        rows[column] = rows[column].str.lower().replace({"": UNKNOWN, **CONFIRMATIONS})
    return rows


def _parse_age(rows: pd.DataFrame, source: Path) -> pd.Series:
    """Age in years, NaN if unknown."""
    age = pd.to_numeric(rows["age"], errors="coerce").astype(float)
    age = age.where(age.between(0, MAX_AGE))  # HAM10000 holds 39 images with age 0; they are kept as given
    wrong = age.isna() & ~rows["age"].str.lower().isin(["", UNKNOWN])
    if wrong.any():
        logger.warning(
            "%s: %d ages are not 0 to %d years and count as unknown: %s",
            source, wrong.sum(), MAX_AGE, _some(rows["image_id"][wrong] + "=" + rows["age"][wrong]),
        )  # fmt: skip
    return age


def _lesion_of_image(rows: pd.DataFrame, source: Path) -> tuple[pd.Series, dict[str, str]]:
    """The lesion id of each row, the same for hidden duplicates; the image id where the source names no lesion.

    Also the ids that became another one by this.
    """
    nameless = rows["lesion_id"] == ""
    if nameless.any():
        logger.warning(
            "%s: %d of %d images have no lesion id and count as a lesion each; images of one lesion cannot be kept "
            "together in a split", source, nameless.sum(), len(rows),
        )  # fmt: skip
    lesion = rows["lesion_id"].mask(nameless, rows["image_id"])
    of_image = pd.Series(lesion.to_numpy(), index=rows["image_id"])
    aliases: dict[str, str] = {}
    for a, b in hidden_duplicates(rows["image_id"]):
        first, second = sorted((of_image[a], of_image[b]))
        if first != second:
            of_image[of_image == second] = first
            aliases[second] = first
    return pd.Series(of_image.to_numpy(), index=rows.index), aliases


def _site_of_lesion(images: pd.DataFrame) -> pd.Series:
    """The site of most images of the lesion, for each image; of equals, the first by name."""
    counts = images.groupby(["lesion_id", "site"]).size().reset_index(name="images")
    counts = counts.sort_values(["lesion_id", "images", "site"], ascending=[True, False, True])
    return images["lesion_id"].map(counts.drop_duplicates("lesion_id").set_index("lesion_id")["site"])


def _some(items: Iterable[str], limit: int = 5) -> str:
    """The first few, and how many more there are."""
    items = list(items)
    return ", ".join(items[:limit]) + (f" and {len(items) - limit} more" if len(items) > limit else "")
