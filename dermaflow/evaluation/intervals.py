"""95 % intervals by lesion bootstrap: lesions are drawn with replacement, each with all its images.

Images of one lesion are alike, so drawing images would make the intervals too narrow (cluster bootstrap; Field and
Welsh 2007, doi 10.1111/j.1467-9868.2007.00593.x). A resample is a weight for each image: how often its lesion was
drawn. So a figure over all resamples is a few matrix products, not a loop.
"""

from __future__ import annotations

import numpy as np

from dermaflow.evaluation.figures import Estimate

QUANTILES = (0.025, 0.975)
MIN_LESIONS = 5
"""Fewer lesions than this say nothing of the spread between lesions."""


def lesion_weights(lesions: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Draw lesions with replacement.

    Args:
        lesions: [N] lesion of each image, any comparable type.
        resamples: Number of resamples R.
        rng: Source of the draws.

    Returns:
        [R, N] float64: how often the lesion of each image was drawn.
    """
    index = np.unique(lesions, return_inverse=True)[1]
    count = index.max() + 1
    return rng.multinomial(count, np.full(count, 1 / count), size=resamples)[:, index].astype(np.float64)


def estimate(
    value: float, draws: np.ndarray, lesions: int, undefined: str = "not defined: no image to count"
) -> Estimate:
    """Join a figure with the percentile interval of its resamples.

    Args:
        value: The figure itself; NaN where it is not defined.
        draws: [R] the figure in each resample; NaN where a resample does not define it.
        lesions: Lesions the figure rests on: for a sensitivity those of its class, for an AUC the rarer side.
        undefined: The reason to give where the value is NaN.

    Returns:
        The estimate. The interval is null with a reason where it would only pretend to be one.
    """
    if not np.isfinite(value):
        return Estimate(value=None, reason=undefined)
    if lesions < MIN_LESIONS:
        return Estimate(value=value, reason=f"no interval: {lesions} lesions only")
    draws = draws[np.isfinite(draws)]
    if draws.size == 0 or np.ptp(draws) < 1e-12:
        return Estimate(value=value, reason="no interval: all resamples agree")
    low, high = np.quantile(draws, QUANTILES)
    return Estimate(value=value, low=float(low), high=float(high))
