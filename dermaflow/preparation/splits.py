"""Splits by lesion: two images of one lesion never stand on both sides of a split or fold.

A random split by image leaks: with 80/20, 38.8 % of HAM10000's test images (68 % of the melanomas) have a sister image
in train. Lesions are therefore assigned whole, stratified by diagnosis and site.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TypeVar

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field

from dermaflow.errors import DataError
from dermaflow.schemas.shard import Split

Part = TypeVar("Part", Split, int)  # a split or a fold

FRACTIONS: dict[Split, float] = {"train": 0.65, "calibration": 0.15, "test": 0.20}


class SplitConfig(BaseModel):
    """How the lesions are divided."""

    model_config = ConfigDict(extra="forbid")

    seed: int = Field(0, ge=0, description="Seed of the order in which lesions are dealt out.")
    fractions: dict[Split, float] = Field(FRACTIONS, description="Share of the images of each split, sum 1.")
    folds: int = Field(5, ge=2, description="Cross-validation folds over all lesions outside test.")


def lesion_table(images: pd.DataFrame) -> pd.DataFrame:
    """One row a lesion.

    Args:
        images: Columns ``lesion_id``, ``dx``, ``site`` among others, one row an image.

    Returns:
        Columns ``lesion_id``, ``dx``, ``site``, ``images``, sorted by ``lesion_id``.
    """
    groups = images.groupby("lesion_id", sort=True)
    return groups.agg(dx=("dx", "first"), site=("site", "first"), images=("dx", "size")).reset_index()


def assign_lesions(
    lesions: pd.DataFrame,
    fractions: Mapping[Split, float],
    seed: int,
    *,
    folds: int = 5,
    previous: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Give every lesion a split, and every lesion outside ``test`` a cross-validation fold.

    Lesions come in an order drawn from the seed; each goes where its stratum (diagnosis and site) and its diagnosis
    lack most images. A lesion that was assigned before keeps its place, so a test lesion never becomes a training
    lesion when new images arrive.

    Args:
        lesions: From `lesion_table`.
        fractions: Share of images of each split; positive, sum 1.
        seed: Seed of the order.
        folds: Number of folds over everything but ``test``.
        previous: An earlier result of this function.

    Returns:
        `lesions` with ``split`` (str) and ``fold`` (int, -1 on ``test``).

    Raises:
        DataError: The fractions are not positive or do not sum to 1, or there are fewer than 2 folds.
    """
    if not (abs(sum(fractions.values()) - 1) < 1e-6 and min(fractions.values()) > 0):
        raise DataError(f"split fractions {dict(fractions)}", expected="positive fractions that sum to 1")
    if folds < 2:
        raise DataError(f"{folds} folds", expected="2 or more")
    old_splits: dict[str, Split] = {}
    old_folds: dict[str, int] = {}
    if previous is not None:
        old_splits = dict(zip(previous["lesion_id"], previous["split"], strict=True))
        old_folds = dict(zip(previous["lesion_id"], previous["fold"].astype(int), strict=True))
        old_folds = {lesion_id: fold for lesion_id, fold in old_folds.items() if 0 <= fold < folds}
    result = lesions.copy()
    result["split"] = _spread(result, fractions, f"split-{seed}", old_splits)
    inside = (result["split"] != "test").to_numpy()
    equal = dict.fromkeys(range(folds), 1 / folds)
    result["fold"] = -1
    result.loc[inside, "fold"] = _spread(result[inside], equal, f"fold-{seed}", old_folds)
    return result


def _spread(lesions: pd.DataFrame, fractions: Mapping[Part, float], salt: str, known: Mapping[str, Part]) -> list[Part]:
    """Error diffusion: the part that lags furthest behind its share, in stratum and diagnosis, gets the next lesion.

    A part without any lesion of the diagnosis comes first, so that a diagnosis of few lesions also stands in each part.
    """
    parts = list(fractions)
    lag: dict[tuple[str, ...], dict[Part, float]] = {}
    missing: dict[str, set[Part]] = {}
    place: dict[str, Part] = {}

    def order(lesion_id: str) -> tuple[bool, bytes]:  # known lesions first: the new ones even out what they left
        return lesion_id not in known, hashlib.sha256(f"{salt}:{lesion_id}".encode()).digest()

    rows = list(zip(lesions["lesion_id"], lesions["dx"], lesions["site"], lesions["images"], strict=True))
    for lesion_id, dx, site, images in sorted(rows, key=lambda row: order(row[0])):
        tallies = [lag.setdefault(key, dict.fromkeys(parts, 0.0)) for key in ((dx,), (dx, site))]
        for tally in tallies:
            for part in parts:
                tally[part] += fractions[part] * images
        if lesion_id in known:
            chosen = known[lesion_id]
        else:
            candidates = [part for part in parts if part in missing.get(dx, parts)] or parts
            chosen = max(candidates, key=lambda part: sum(tally[part] for tally in tallies))
        missing.setdefault(dx, set(parts)).discard(chosen)
        for tally in tallies:
            tally[chosen] -= images
        place[lesion_id] = chosen
    return [place[lesion_id] for lesion_id in lesions["lesion_id"]]
