"""Which lesions belong to which site of a simulation: HAM10000's own sources, or drawn."""

from __future__ import annotations

import numpy as np
import pandas as pd

from dermaflow.errors import RecipeError
from dermaflow.taxonomy import CODES

POOLED = "pooled"
"""A site that holds everybody's images, to compare with: ``natural+pooled``."""


def site_names(partition: str, metadata: pd.DataFrame) -> list[str]:
    """Names of the sites, in order.

    Args:
        partition: ``natural``, ``iid:N`` or ``dirichlet:ALPHA:N``; with ``+pooled``, one more that holds everything.
        metadata: Of all splits, with column ``site``.

    Raises:
        RecipeError: No such partition.
    """
    if partition.endswith(f"+{POOLED}"):
        return [*site_names(partition.removesuffix(f"+{POOLED}"), metadata), POOLED]
    if partition == "natural":
        return sorted(metadata["site"].unique())
    return [f"site-{number + 1}" for number in range(_drawn(partition)[1])]


def site_of_lesions(partition: str, metadata: pd.DataFrame, seed: int) -> pd.Series:
    """Name of the site of each row of `metadata`, `POOLED` apart; images of a lesion stay together.

    Dirichlet draws, for each class, the sites' shares of its lesions (Hsu et al. 2019, arXiv 1909.06335).

    Args:
        partition: As for `site_names`.
        metadata: Of all splits, with columns ``site``, ``lesion_id`` and ``dx``.
        seed: Of the draws.
    """
    partition = partition.removesuffix(f"+{POOLED}")
    if partition == "natural":
        return metadata["site"]
    names = site_names(partition, metadata)
    alpha, _ = _drawn(partition)
    rng = np.random.default_rng(seed)
    lesions = metadata.drop_duplicates("lesion_id").sort_values("lesion_id")
    chosen = pd.Series(names[0], index=lesions["lesion_id"], dtype=object)
    for code in CODES:
        of_class = lesions.loc[lesions["dx"] == code, "lesion_id"].to_numpy()
        shares = np.full(len(names), 1 / len(names)) if alpha is None else rng.dirichlet(np.full(len(names), alpha))
        cuts = np.round(np.cumsum(shares)[:-1] * len(of_class)).astype(int)
        for name, part in zip(names, np.split(rng.permutation(of_class), cuts), strict=True):
            chosen[part] = name
    return metadata["lesion_id"].map(chosen)


def _drawn(partition: str) -> tuple[float | None, int]:
    """Alpha (None for iid) and number of sites."""
    kind, *values = partition.split(":")
    try:
        if kind == "iid" and len(values) == 1 and int(values[0]) > 0:
            return None, int(values[0])
        if kind == "dirichlet" and len(values) == 2 and float(values[0]) > 0 and int(values[1]) > 0:
            return float(values[0]), int(values[1])
    except ValueError:
        pass
    raise RecipeError(
        f"no partition {partition!r}", where="partition", expected="natural, pooled, iid:N or dirichlet:ALPHA:N"
    )
