"""What an answer to a question must be like before the coordinator believes it: a site may be broken, or lie."""

from __future__ import annotations

from flwr.app import Message
from pydantic import ValidationError

from clients.messages import CONFIG, array_of
from clients.wire import WireError
from dermaflow.evaluation.metrics import ECE_BINS
from dermaflow.learning.linear_head import SCALES
from dermaflow.schemas.bundle import Copies
from dermaflow.taxonomy import CODES
from dermaflow.trust.pooled import DISTANCES, EDGES, ENTROPIES, RESAMPLES
from dermaflow.trust.thresholds import TAUS

ANY = -1
"""A length that is the site's own matter."""
SIGNED = {"sum", "sums", "products", "gradient", "curvature"}
"""What may be negative; everything else is a count, a loss or a share."""


def check_answer(answer: Message, width: int) -> None:
    """Look at the arrays of an answer to a question; answers to training are read by `read_update`.

    Args:
        answer: Of one site.
        width: Number of the backbone's features.

    Raises:
        WireError: An array is not there, of another shape, not finite, or negative where nothing can be; or the copies
            are none that there can be; or the answer does not say whose it is.
    """
    kind = answer.metadata.message_type.removeprefix("query.")
    for name, shape in _shapes(width).get(kind, {}).items():
        found = array_of(answer, name)
        if found.ndim != len(shape) or any(n not in (m, ANY) for n, m in zip(shape, found.shape, strict=True)):
            raise WireError(f"{name} is of shape {list(found.shape)}", expected=str(list(shape)).replace("-1", "any"))
        if name not in SIGNED and (found < 0).any():
            raise WireError(f"{name} is negative", expected="numbers from 0")
    if kind == "describe":
        copies_of(answer)
        if not {"site", "data"} <= set(answer.content.config_records.get(CONFIG, ())):
            raise WireError("the answer does not say which site and data it is of", expected="site, data")


def copies_of(described: Message) -> Copies | None:
    """How a site's training images are stored, if they are small JPEG copies alike."""
    height, width, quality = (int(number) for number in array_of(described, "copies"))
    if not height or not width or not quality:
        return None
    try:
        return Copies(height=height, width=width, quality=quality)
    except ValidationError as error:
        raise WireError(
            f"there are no copies of {height}x{width} pixels and JPEG quality {quality}",
            expected="pixels, a quality of 1 to 100, or zeros where images are not stored as copies alike",
        ) from error


def _shapes(width: int) -> dict[str, dict[str, tuple[int, ...]]]:
    """Arrays of the answer to each question."""
    classes, bins, taus = len(CODES), len(EDGES) - 1, len(TAUS)
    return {
        "describe": {"train": (classes,), "calibration": (classes,), "test": (classes,), "copies": (3,)},
        "centre": {"sum": (width,)},
        "class_sums": {"counts": (classes,), "sums": (classes, width), "products": (width, width)},
        "scale_losses": {"losses": (len(SCALES),)},
        "scaling_sums": {
            "images": (), "loss": (), "gradient": (classes + 1,), "curvature": (classes + 1, classes + 1),
        },
        "calibration_counts": {
            "images": (classes,), "lesions": (classes,), "true": (classes, bins), "melanoma": (RESAMPLES, bins),
            "malignant": (RESAMPLES, bins), "entropies": (len(ENTROPIES) - 1,), "distances": (len(DISTANCES) - 1,),
            "right": (taus, classes), "right_resampled": (RESAMPLES, taus, classes), "drawn": (RESAMPLES, classes),
        },
        "evaluate": {
            "confusion": (classes, classes), "lesions": (classes,), "hits": (ANY, classes), "totals": (ANY, classes),
        },
        "reliability": {"bins": (ECE_BINS, 3), "error": (ANY,)},
    }  # fmt: skip
