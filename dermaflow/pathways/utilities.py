"""Expected utility over actions (decision step 5 of the reference).

Alone it is too bold: published tables of utilities imply that melanoma is acted on from p = 0.20 to 0.56 (Barata 2023),
so it may only make a case more urgent than the rules do, never less.
"""

from __future__ import annotations

import numpy as np

from dermaflow.pathways.columns import Frame, Numbers
from dermaflow.pathways.rules import Utilities
from dermaflow.schemas.pathway import URGENCIES
from dermaflow.taxonomy import CODES

NO_LEVEL = 9  # less urgent than U5: gives no urgency


def expected_utilities(frame: Frame, utilities: Utilities) -> np.ndarray:
    """Of every action, from the calibrated probabilities; of melanoma it is the highest over the lesion's images.

    Returns:
        [A, N]; NaN where the picture has no probabilities or histology has replaced them.
    """
    p = []
    for code in CODES:
        column = frame.columns[f"finding.p_{code}"]
        assert isinstance(column, Numbers)
        p.append(column.low)
    table = np.array([action.utility for action in utilities.actions])
    expected = np.zeros((len(table), frame.rows))
    for k, values in enumerate(p):  # no matrix product, whose last digits may depend on the number of rows
        expected += table[:, k : k + 1] * values
    confirmed = frame.columns["case.confirmed"]
    expected[:, ~confirmed.unknown & confirmed[0]] = np.nan
    return expected


def best_actions(expected: np.ndarray, utilities: Utilities) -> tuple[np.ndarray, np.ndarray]:
    """The action with the highest expected utility, of equal ones the most urgent.

    Returns:
        Index into the actions [N], -1 where nothing is expected, and its urgency level [N], 1 to 5 or `NO_LEVEL`.
    """
    levels = np.array([URGENCIES.index(a.urgency) + 1 if a.urgency else NO_LEVEL for a in utilities.actions])
    order = np.argsort(levels, kind="stable")
    known = ~np.isnan(expected).any(axis=0)
    best = order[np.where(known, expected[order], 0.0).argmax(axis=0)]
    return np.where(known, best, -1), np.where(known, levels[best], NO_LEVEL)
