"""The worst mistakes as pictures: a reader learns more from them than from any average."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from PIL import Image

from dermaflow.datasets.images import decode
from dermaflow.errors import DermaflowError
from dermaflow.evaluation.population import Sample
from dermaflow.taxonomy import CODES, MALIGNANT, MELANOMA

log = logging.getLogger(__name__)

PICTURE_SIDE = 240  # pixels, the longer side
SHOWN = 12
"""Mistakes of each kind; one image a lesion."""


@dataclass(frozen=True)
class Mistake:
    """An image that was called wrong.

    Attributes:
        image_id: Of the image.
        lesion_id: Of its lesion.
        truth: Code of the true class.
        predicted: Code of the class it was given.
        p_predicted: Probability of the class it was given.
        p_truth: Probability of the true class.
        picture: Data URI of a JPEG, or None if no picture could be had.
    """

    image_id: str
    lesion_id: str
    truth: str
    predicted: str
    p_predicted: float
    p_truth: float
    picture: str | None


def worst_mistakes(
    predictions: pd.DataFrame, sample: Sample, predicted: np.ndarray, images: Callable[[str], bytes] | None
) -> tuple[list[Mistake], list[Mistake]]:
    """Melanomas called benign, then the other mistakes, each with the most confident first.

    Args:
        predictions: One row an image, aligned with the sample.
        sample: The same images as arrays.
        predicted: [N] int, the class each image was given.
        images: Encoded bytes of an image by its id; None shows no picture.
    """
    benign = ~np.array(MALIGNANT)[predicted]
    dismissed = (sample.truth == MELANOMA) & benign
    others = (sample.truth != predicted) & ~dismissed
    sure = sample.probabilities[np.arange(len(predicted)), predicted]

    def most_sure(mask: np.ndarray) -> list[Mistake]:
        rows = np.flatnonzero(mask)[np.argsort(-sure[mask], kind="stable")]
        _, first = np.unique(sample.lesions[rows], return_index=True)
        return [_mistake(int(row)) for row in rows[np.sort(first)][:SHOWN]]

    def _mistake(row: int) -> Mistake:
        image_id = str(predictions["image_id"].iloc[row])
        return Mistake(
            image_id=image_id,
            lesion_id=str(predictions["lesion_id"].iloc[row]),
            truth=CODES[sample.truth[row]],
            predicted=CODES[predicted[row]],
            p_predicted=float(sure[row]),
            p_truth=float(sample.probabilities[row, sample.truth[row]]),
            picture=_picture(image_id, images),
        )

    return most_sure(dismissed), most_sure(others)


def _picture(image_id: str, images: Callable[[str], bytes] | None) -> str | None:
    if images is None:
        return None
    try:
        pixels = decode(images(image_id), PICTURE_SIDE, PICTURE_SIDE)
    except (DermaflowError, KeyError, OSError) as error:  # a report without one picture is better than no report
        log.warning("no picture of %s in the report: %s", image_id, error)
        return None
    picture = Image.fromarray(pixels)
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
