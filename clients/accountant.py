"""What a site has spent of its privacy: every release with noise, over all runs, on the site's own disk.

The sums are those of Opacus' Rényi accountant (Mironov, CSF 2017, arXiv 1702.07476). A lesion of the site is in every
run, so releases of all runs add up. A release is written down before it is made: a crash in between costs budget and
never hides a release.
"""

from __future__ import annotations

import json
import math
from functools import lru_cache
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from clients.policy import Refused
from dermaflow import storage
from dermaflow.errors import DermaflowError
from dermaflow.locks import locked

NAME = "privacy.json"
ALPHAS = [1.1, 1.2, 1.3, 1.4, 1.5, 1.75, *range(2, 17), 20, 24, 28, 32, 40, 48, 64, 96, 128, 192, 256, 512]
"""Orders of the Rényi divergence, small ones for large epsilon. Any choice of them is valid, more cost time."""


class LedgerError(DermaflowError):
    """What was spent cannot be read; then nothing more is released."""


class Release(BaseModel):
    """Gaussian noise on sums over a site's units, some times."""

    model_config = ConfigDict(extra="forbid")

    run: str
    what: str
    unit: Literal["lesion", "site"]
    noise: float = Field(gt=0, description="Standard deviation over the most that one unit can change.")
    steps: int = Field(1, ge=1)


class Ledger:
    """Releases of a site, in its folder."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME

    def releases(self) -> list[Release]:
        """All so far.

        Raises:
            LedgerError: The file is damaged.
        """
        if not self._path.exists():
            return []
        try:
            return TypeAdapter(list[Release]).validate_json(self._path.read_bytes())
        except ValidationError as error:
            raise LedgerError(
                f"what was spent cannot be read: {error.errors()[0]['msg']}", where=self._path,
                todo="restore the file from a backup; without it no guarantee can be given",
            ) from error  # fmt: skip

    def spend(self, release: Release, delta: float, limit: float | None) -> float:
        """Write a release down that is about to be made.

        Args:
            release: What.
            delta: Of the guarantee.
            limit: Largest epsilon of the site over all runs; None for no limit.

        Returns:
            Epsilon of everything so far, this included.

        Raises:
            Refused: The limit would be passed; nothing is written.
        """
        with locked(self._path.with_suffix(".lock")):  # runs at the same time, each in a process of its own
            releases = [*self.releases(), release]
            found = epsilon(releases, delta)
            if limit is not None and found > limit:
                raise Refused(
                    f"with this release of {release.what} epsilon would be {found:.2f} at delta {delta:g}, "
                    "over all runs",
                    expected=f"at most {limit:g}, the limit of this site's policy",
                    todo="ask for a smaller epsilon, or let the site raise max_epsilon in its policy",
                )  # fmt: skip
            text = json.dumps([item.model_dump() for item in releases], indent=1)
            storage.write_bytes(self._path, text.encode())
        return found


def epsilon(releases: list[Release], delta: float) -> float:
    """Epsilon of releases together; infinite where the noise is too small for a figure."""
    from opacus.accountants import RDPAccountant  # takes seconds to import

    accountant = RDPAccountant()
    accountant.history = [(release.noise, 1.0, release.steps) for release in releases]
    with_nan = accountant.get_epsilon(delta, alphas=ALPHAS) if releases else 0.0
    return with_nan if math.isfinite(with_nan) else math.inf


@lru_cache
def noise_for(target: float, delta: float, parts: tuple[float, ...]) -> float:
    """The smallest noise, to 1 %, with which some releases together stay within an epsilon.

    Args:
        target: Epsilon.
        delta: Of the guarantee.
        parts: Of each release: its noise in units of what is returned.
    """

    def spent(noise: float) -> float:
        return epsilon([Release(run="", what="", unit="lesion", noise=noise * part) for part in parts], delta)

    low, high = 0.0, 0.5
    while spent(high) > target:
        low, high = high, 2 * high
    while high - low > 0.01 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > target else (low, middle)
    return high
