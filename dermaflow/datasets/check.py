"""Look at every image of a HAM10000 folder and write down what is there: the data sheet.

Nothing found here is fatal. What cannot be used is listed with its reason in `DataSheet.quarantined`, and
`DataSheet.problems` says in sentences what a careful user would want to know before training.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from pydantic import BaseModel, ConfigDict

from dermaflow.datasets.ham10000 import hidden_duplicates, read_ham10000
from dermaflow.datasets.images import MAX_BYTES, ImageFacts, ImageProblem, inspect_image
from dermaflow.schemas.lesion import QUARANTINE_COLUMNS
from dermaflow.storage import open_atomic
from dermaflow.taxonomy import CODES

logger = logging.getLogger(__name__)

Table = tuple[str, list[str], list[list[str]]]
"""Title, header, rows."""

FORMAT_OF_SUFFIX = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG"}
LISTED = 20  # items a table shows before it only counts; the quarantine file holds them all


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ClassCount(_Strict):
    """How much there is of one diagnosis."""

    images: int
    lesions: int


class AgeSummary(_Strict):
    """Ages in years, over images; None where no age is known."""

    known: int
    missing: int
    minimum: float | None
    median: float | None
    mean: float | None
    maximum: float | None


class ImageNote(_Strict):
    """A remark on an image that can be used."""

    image_id: str
    path: str
    detail: str


class QuarantinedItem(ImageNote):
    """An image or a row that cannot be used."""

    reason: str


class Duplicate(_Strict):
    """Image ids that hold the same bytes; a leak if their lesions differ, for a split would part them."""

    sha256: str
    image_ids: list[str]
    lesion_ids: list[str]

    @property
    def leak(self) -> bool:
        return len(self.lesion_ids) > 1


class DataSheet(_Strict):
    """What a HAM10000 folder holds. Counts are of images that can be used; quarantined ones are not among them."""

    root: str
    images: int
    lesions: int  # hidden duplicates count as one
    classes: dict[str, ClassCount]  # every diagnosis, in the order of the taxonomy
    sites: dict[str, dict[str, int]]  # images by site and diagnosis
    site_lesions: dict[str, int]
    dx_type: dict[str, int]
    sex: dict[str, int]
    localization: dict[str, int]
    age: AgeSummary
    images_per_lesion: dict[int, int]  # lesions by their number of images
    sizes: dict[str, int]  # images by "width x height" in pixels, most common first
    formats: dict[str, int]
    odd_sizes: list[ImageNote]  # not of the most common size
    misnamed: list[ImageNote]  # the content is of another format than the file name says
    duplicates: list[Duplicate]
    hidden_duplicates: list[tuple[str, str]]  # see dermaflow.datasets.ham10000.HIDDEN_DUPLICATES
    quarantined: list[QuarantinedItem]

    @property
    def reasons(self) -> dict[str, int]:
        """Quarantined items by reason."""
        return _counts([item.reason for item in self.quarantined])

    @property
    def leaks(self) -> list[Duplicate]:
        """Byte-identical images of different lesions."""
        return [duplicate for duplicate in self.duplicates if duplicate.leak]

    @property
    def problems(self) -> list[str]:
        """What is wrong, a sentence each. Other sizes, missing ages and merged hidden duplicates are no problem."""
        found = [f"{count} items are quarantined as {reason}" for reason, count in self.reasons.items()]
        if self.leaks:
            found.append(f"{len(self.leaks)} groups of byte-identical images are spread over different lesions")
        if self.misnamed:
            found.append(f"{len(self.misnamed)} images are of another format than their names say")
        return found

    def tables(self) -> list[Table]:
        """The sheet as tables of text, for a terminal or a page; a table without rows is left out."""
        age = self.age
        tables: list[Table] = [
            ("Diagnoses", ["dx", "images", "share", "lesions"], self._class_rows()),
            ("Sites", ["site", "lesions", "images", *CODES], self._site_rows()),
            ("Ascertainment", ["dx_type", "images"], _rows(self.dx_type)),
            ("Sex", ["sex", "images"], _rows(self.sex)),
            ("Body site", ["localization", "images"], _rows(self.localization)),
            (
                "Age",
                ["known", "missing", "minimum", "median", "mean", "maximum"],
                [[str(age.known), str(age.missing), *map(_years, (age.minimum, age.median, age.mean, age.maximum))]],
            ),
            ("Images per lesion", ["images", "lesions"], _rows(self.images_per_lesion)),
            ("Image sizes", ["width x height", "images"], _short(_rows(self.sizes))),
            ("Image formats", ["format", "images"], _rows(self.formats)),
            ("Quarantined, by reason", ["reason", "items"], _rows(self.reasons)),
            (
                f"Quarantined: {len(self.quarantined)}",
                ["image_id", "reason", "detail"],
                _short([[item.image_id, item.reason, item.detail] for item in self.quarantined]),
            ),
            _notes("Other than the most common size", self.odd_sizes),
            _notes("Content does not match the file name", self.misnamed),
            (
                f"Byte-identical images: {len(self.duplicates)} groups, {len(self.leaks)} across lesions",
                ["image ids", "lesions", "leak"],
                _short(
                    [[" ".join(d.image_ids), " ".join(d.lesion_ids), "yes" if d.leak else ""] for d in self.duplicates]
                ),
            ),
            (
                f"Known hidden duplicates, merged into one lesion: {len(self.hidden_duplicates)}",
                ["image id", "image id"],
                _short([list(pair) for pair in self.hidden_duplicates]),
            ),
        ]
        return [table for table in tables if table[2]]

    def _class_rows(self) -> list[list[str]]:
        rows = [
            [dx, str(count.images), f"{100 * count.images / max(self.images, 1):.2f} %", str(count.lesions)]
            for dx, count in self.classes.items()
        ]
        return [*rows, ["all", str(self.images), "", str(self.lesions)]]

    def _site_rows(self) -> list[list[str]]:
        return [
            [site, str(self.site_lesions[site]), str(sum(by_class.values())), *(str(by_class[dx]) for dx in CODES)]
            for site, by_class in self.sites.items()
        ]


def check(root: Path, *, workers: int = 1, progress: Callable[[int, int], None] | None = None) -> DataSheet:
    """Read a HAM10000 folder, open every image once, and count.

    Args:
        root: Folder, as for `read_ham10000`.
        workers: Threads that read and decode; decoding releases the GIL.
        progress: Called with images done and images in all.

    Returns:
        The data sheet.

    Raises:
        DataError: The folder cannot be read as HAM10000 at all.
    """
    archive = read_ham10000(root)
    paths = archive.images["path"].tolist()
    facts: list[ImageFacts | _Unusable] = []
    with ThreadPoolExecutor(workers) as pool:
        for result in pool.map(_inspect, paths):
            facts.append(result)
            if progress:
                progress(len(facts), len(paths))
    usable = [isinstance(fact, ImageFacts) for fact in facts]
    images = archive.images[usable].reset_index(drop=True)
    images = images.join(
        pd.DataFrame([f for f in facts if isinstance(f, ImageFacts)], columns=list(ImageFacts._fields))
    )
    sheet = _describe(archive.root, images, [*_quarantined(archive.quarantined), *_unusable(archive.images, facts)])
    for problem in sheet.problems:
        logger.warning("%s: %s", root, problem)
    return sheet


def write_quarantine(sheet: DataSheet, path: Path) -> None:
    """Write the quarantined items as CSV (``image_id,path,reason,detail``); the file appears only when it is whole.

    Raises:
        StorageError: The place cannot be written.
    """
    items = pd.DataFrame([item.model_dump() for item in sheet.quarantined], columns=list(QUARANTINE_COLUMNS))
    with open_atomic(path) as stream:
        stream.write(items.to_csv(index=False).encode())


class _Unusable(NamedTuple):
    reason: str
    detail: str


def _inspect(path: str) -> ImageFacts | _Unusable:
    try:
        with Path(path).open("rb") as stream:
            return inspect_image(stream.read(MAX_BYTES + 1))  # one byte over the limit shows that it is exceeded
    except ImageProblem as problem:
        return _Unusable(problem.reason, str(problem))
    except OSError as error:
        return _Unusable("unreadable", str(error.strerror or error))


def _quarantined(items: pd.DataFrame) -> list[QuarantinedItem]:
    return [QuarantinedItem.model_validate(item) for item in items.to_dict("records")]


def _unusable(images: pd.DataFrame, facts: Sequence[ImageFacts | _Unusable]) -> list[QuarantinedItem]:
    return [
        QuarantinedItem(image_id=image_id, path=path, reason=fact.reason, detail=fact.detail)
        for image_id, path, fact in zip(images["image_id"], images["path"], facts, strict=True)
        if isinstance(fact, _Unusable)
    ]


def _describe(root: Path, images: pd.DataFrame, quarantined: list[QuarantinedItem]) -> DataSheet:
    """Count; `images` holds `LesionArchive.images` with the columns of `ImageFacts`."""
    lesions = images.drop_duplicates("lesion_id")
    lesions_of_class = lesions["dx"].value_counts()
    by_site = pd.crosstab(images["site"], images["dx"]).reindex(columns=list(CODES), fill_value=0)
    size = images["width"].astype(str) + " x " + images["height"].astype(str)
    sizes = _counts(size)
    expected = images["path"].map(lambda path: FORMAT_OF_SUFFIX[Path(path).suffix.lower()])
    return DataSheet(
        root=str(root),
        images=len(images),
        lesions=len(lesions),
        classes={
            dx: ClassCount(images=int((images["dx"] == dx).sum()), lesions=int(lesions_of_class.get(dx, 0)))
            for dx in CODES
        },
        sites={str(site): {dx: int(row[dx]) for dx in CODES} for site, row in by_site.iterrows()},
        site_lesions=_counts(lesions["site"]),
        dx_type=_counts(images["dx_type"]),
        sex=_counts(images["sex"]),
        localization=_counts(images["localization"]),
        age=_summarise_age(images["age"]),
        images_per_lesion={
            int(str(n)): int(count)
            for n, count in images["lesion_id"].value_counts().value_counts().sort_index().items()
        },
        sizes=sizes,
        formats=_counts(images["format"]),
        odd_sizes=_remark(images, size != next(iter(sizes), ""), size),
        misnamed=_remark(images, images["format"] != expected, "content is " + images["format"].astype(str)),
        duplicates=_find_duplicates(images),
        hidden_duplicates=hidden_duplicates(images["image_id"]),
        quarantined=quarantined,
    )


def _summarise_age(age: pd.Series) -> AgeSummary:
    known = age.dropna()
    if known.empty:
        return AgeSummary(known=0, missing=len(age), minimum=None, median=None, mean=None, maximum=None)
    return AgeSummary(
        known=len(known), missing=len(age) - len(known),
        minimum=known.min(), median=known.median(), mean=known.mean(), maximum=known.max(),
    )  # fmt: skip


def _remark(images: pd.DataFrame, chosen: pd.Series, detail: pd.Series) -> list[ImageNote]:
    return [
        ImageNote(image_id=image_id, path=path, detail=text)
        for image_id, path, text in zip(images["image_id"][chosen], images["path"][chosen], detail[chosen], strict=True)
    ]


def _find_duplicates(images: pd.DataFrame) -> list[Duplicate]:
    repeated = images[images["sha256"].duplicated(keep=False)]
    return [
        Duplicate(
            sha256=str(sha256), image_ids=group["image_id"].tolist(), lesion_ids=sorted(group["lesion_id"].unique())
        )
        for sha256, group in repeated.groupby("sha256")
    ]


def _counts(values: Iterable[str]) -> dict[str, int]:
    """How often each value occurs, most common first, equals by name."""
    counts = pd.Series(list(values), dtype=object).value_counts()
    return {
        str(value): int(count) for value, count in sorted(counts.items(), key=lambda item: (-item[1], str(item[0])))
    }


def _rows(counts: dict[str, int] | dict[int, int]) -> list[list[str]]:
    return [[str(value), str(count)] for value, count in counts.items()]


def _short(rows: list[list[str]]) -> list[list[str]]:
    if len(rows) <= LISTED:
        return rows
    return [*rows[:LISTED], [f"and {len(rows) - LISTED} more", *[""] * (len(rows[0]) - 1)]]


def _notes(title: str, notes: list[ImageNote]) -> Table:
    return f"{title}: {len(notes)}", ["image_id", "detail"], _short([[note.image_id, note.detail] for note in notes])


def _years(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
