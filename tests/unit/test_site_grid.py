"""The start of a run: who is waited for, and who is not."""

from __future__ import annotations

from pathlib import Path

import pytest
from federation_here import GridHere, a_plan

from clients.grid import SiteGrid
from dermaflow.errors import FederationError

NAMES = {100: "north", 101: "south", 102: "east", 103: "west"}


@pytest.fixture
def failed() -> dict[str, str]:
    return {}


@pytest.fixture
def grid(tmp_path: Path, failed: dict[str, str]) -> SiteGrid:
    """Three of four sites are online."""
    return SiteGrid(GridHere(a_plan(tmp_path, tmp_path), 3), NAMES, failed=failed.update)


def test_enough_sites_begin_and_the_missing_one_is_named(grid: SiteGrid, failed: dict[str, str]) -> None:
    grid.wait(0.2, least=3)
    assert failed == {"west": "not online after 0.2 s"}


def test_too_few_sites_do_not_begin(grid: SiteGrid, failed: dict[str, str]) -> None:
    with pytest.raises(FederationError, match=r"not online after 0.2 s: west.*at least 4 sites"):
        grid.wait(0.2, least=4)
    assert not failed
