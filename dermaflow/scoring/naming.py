"""An id for every image of a source: the name of its file, and where that is not unique its path, and never one twice.

Names are compared by their hashes, eight bytes each, so that a source of millions fits into memory.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Mapping
from pathlib import PurePosixPath

import numpy as np

from dermaflow.scoring.references import Reference

_NUMBERED = re.compile(r".*#\d+")


class Seen:
    """Which of many texts were seen more than once; a collision of hashes only makes it say so of one more."""

    def __init__(self) -> None:
        self._hashes = array("q")
        self._twice: np.ndarray | None = None

    def add(self, text: str) -> None:
        """Note a text."""
        self._hashes.append(hash(text))

    def is_unique(self, text: str) -> bool:
        """Whether it was added once; nothing can be added after the first question."""
        if self._twice is None:
            values, counts = np.unique(np.frombuffer(self._hashes, np.int64), return_counts=True)
            self._twice = values[counts > 1]
        if not len(self._twice):
            return True
        value = hash(text)
        at = int(np.searchsorted(self._twice, value))
        return at == len(self._twice) or bool(self._twice[at] != value)


def stem(reference: Reference) -> str:
    """The name of the file without folders and suffix; of a frame, its number behind it."""
    path, frame = reference.path, ""
    if reference.frame is not None and path.endswith(f":{reference.frame + 1}"):
        path, _, number = path.rpartition(":")
        frame = f":{number}"
    name = path.rstrip("/").rpartition("/")[2]
    known = PurePosixPath(name)
    # "1.2.840.113" is a UID, and its last number is no suffix
    return (name if known.suffix[1:].isdigit() else known.stem or name) + frame


class Names:
    """Gives ids in two passes over the references: `learn` them all, then `settle`, then `name` each in the same order.

    Args:
        lesions: Lesion of an image by its id, file name or path, where a table says so.
    """

    def __init__(self, lesions: Mapping[str, str]) -> None:
        self._lesions = lesions
        self._stems, self._ids = Seen(), Seen()

    def learn(self, reference: Reference) -> None:
        """First pass."""
        if reference.image_id is None:
            self._stems.add(stem(reference))

    def settle(self, reference: Reference) -> None:
        """Second pass."""
        self._ids.add(self._wanted(reference))

    def name(self, reference: Reference, number: int) -> tuple[str, str | None]:
        """Third pass: image id and lesion id.

        Args:
            reference: The input.
            number: Its place within the source, which makes a name unique that is not.
        """
        wanted = self._wanted(reference)
        # A name that looks like a numbered one is numbered, too, so that no two numbered names are the same.
        unique = self._ids.is_unique(wanted) and not _NUMBERED.fullmatch(wanted)
        return wanted if unique else f"{wanted}#{number}", reference.lesion_id or self._lesion(reference, wanted)

    def _wanted(self, reference: Reference) -> str:
        if reference.image_id is not None:
            return reference.image_id
        short = stem(reference)
        return short if self._stems.is_unique(short) else reference.path

    def _lesion(self, reference: Reference, image_id: str) -> str | None:
        if not self._lesions:
            return None
        path = reference.path
        if reference.frame is not None and path.endswith(f":{reference.frame + 1}"):
            path = path.rpartition(":")[0]
        for key in (image_id, reference.path, path, path.rpartition("/")[2]):
            if key in self._lesions:
                return self._lesions[key]
        bare = stem(reference.but(path=path, frame=None))
        return self._lesions.get(bare)
