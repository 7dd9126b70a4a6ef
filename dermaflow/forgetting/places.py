"""Whose data: ids that were asked for, and what they mean in each place that holds some of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict


class Link(NamedTuple):
    """What a place says belongs together; None where it does not know."""

    patient: str | None
    lesion: str | None
    image: str | None


class Ids(BaseModel):
    """People, lesions and images by id."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    patients: frozenset[str] = frozenset()
    lesions: frozenset[str] = frozenset()
    images: frozenset[str] = frozenset()

    def __or__(self, other: Ids) -> Ids:
        return Ids(
            patients=self.patients | other.patients,
            lesions=self.lesions | other.lesions,
            images=self.images | other.images,
        )

    def __bool__(self) -> bool:
        return bool(self.patients or self.lesions or self.images)


class Place(Protocol):
    """A folder that holds images, findings or pathways."""

    name: str

    def links(self) -> list[Link]:
        """Everything the place says of who belongs to what."""
        ...

    def holds(self, ids: Ids) -> dict[str, int]:
        """How much of what would go, by kind; only what is there."""
        ...

    def remove(self, ids: Ids) -> None:
        """Remove it. Doing it again, also after a kill in the middle, gives the same."""
        ...


def meaning(asked: Ids, places: Iterable[list[Link]]) -> list[Ids]:
    """What the ids that were asked for mean in each place.

    A person's lesions are found where people are known, a lesion's images everywhere. Ids are a site's own, and two
    places may use one for two people: where a place itself says that a lesion is somebody else's, or an image another
    lesion's, it stays there, unless it was asked for by that very id.

    Args:
        asked: Ids that were asked for.
        places: Links of each place.

    Returns:
        For each place, the ids that are to go from it.
    """
    every = list(places)
    lesions = set(asked.lesions)
    for links in every:
        lesions |= {link.lesion for link in links if link.lesion is not None and link.patient in asked.patients}
    own_lesions = [_own_lesions(asked, lesions, links) for links in every]
    images = set(asked.images)
    for links, own in zip(every, own_lesions, strict=True):  # an image without a lesion is a lesion of its own
        images |= {link.image for link in links if link.image is not None and (link.lesion or link.image) in own}
    found = []
    for links, own in zip(every, own_lesions, strict=True):
        there = {link.image for link in links if link.image is not None}
        others = {link.image for link in links if link.lesion is not None and link.lesion not in own} - asked.images
        gone = (images & there) - others
        # of an image alone, the lesion goes where it has no other image
        left = {link.lesion for link in links if link.image is not None and link.image not in gone}
        bare = {link.lesion for link in links if link.lesion is not None and link.image in gone} - left
        found.append(Ids(patients=asked.patients, lesions=frozenset(own | bare), images=frozenset(gone)))
    return found


def _own_lesions(asked: Ids, lesions: set[str], links: list[Link]) -> set[str]:
    people: dict[str | None, set[str]] = {}
    for link in links:
        if link.patient is not None:
            people.setdefault(link.lesion, set()).add(link.patient)
    return {
        lesion for lesion in lesions
        if lesion in asked.lesions or not people.get(lesion) or people[lesion] & asked.patients
    }  # fmt: skip
