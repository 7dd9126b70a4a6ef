"""From a bundle and encoded images to findings. Serving, bulk scoring, `dermaflow explain` and the tests come here."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from dermaflow.bundles.bundle import LoadedBundle
from dermaflow.datasets.images import ImageProblem, decode_field
from dermaflow.datasets.quality import FLAG_TEXT, HEIGHT, WIDTH, Flag, quality_flags
from dermaflow.errors import BundleError, DataError
from dermaflow.learning.inference import network_of
from dermaflow.learning.optimisation import pick_device
from dermaflow.preparation.transforms import pixels
from dermaflow.schemas.bundle import Calibration, InputSpec
from dermaflow.schemas.finding import Finding
from dermaflow.scoring.runtime import make_runtime
from dermaflow.settings import settings
from dermaflow.taxonomy import CODES, MALIGNANT
from dermaflow.trust.conformal import conformal_sets
from dermaflow.trust.ood import ood_score
from dermaflow.trust.prior_shift import check_priors, correct
from dermaflow.trust.temperature import calibrated_probabilities

_MALIGNANT = np.array(MALIGNANT)


@dataclass(frozen=True)
class Answers:
    """What network and gate say of images, before anything is withheld.

    Attributes:
        p: float64 [N, 7], calibrated probabilities; NaN where the image could not be read.
        ood: float32 [N], distance from the training images; NaN where it could not be read, or is not known.
        flags: Quality flags of each image.
        problems: Why an image could not be read, None where it could.
    """

    p: np.ndarray
    ood: np.ndarray
    flags: list[list[Flag]]
    problems: list[ImageProblem | None]


class Predictor:
    """A bundle, ready to look at images.

    Args:
        loaded: From `load_bundle`.
        priors: [7], class frequencies of the site, to correct the probabilities for; conformal sets are taken from the
            uncorrected ones (`dermaflow.trust.prior_shift`). None leaves all as it was calibrated.
        device: Of the network; by default that of the settings.
        at_once: Threads that call `predict` at the same time and share the cores; more than one only where the network
            is compiled (`dermaflow.scoring.runtime.is_compiled`).

    Raises:
        BundleError: The bundle was never calibrated, or its weights do not fit.
        DataError: The priors are none.
    """

    def __init__(
        self, loaded: LoadedBundle, *, priors: Sequence[float] | None = None, device: torch.device | None = None,
        at_once: int = 1,
    ) -> None:  # fmt: skip
        if loaded.bundle.calibration is None:
            raise BundleError("no calibration", where=loaded.bundle.name, todo="run dermaflow calibrate")
        self.loaded = loaded
        self.calibration: Calibration = loaded.bundle.calibration
        device = device or pick_device()
        self.network = network_of(loaded).to(device)
        self.run = make_runtime(self.network, loaded.bundle.input, device, at_once)
        self._readers = max(1, settings().threads // at_once)
        self._priors = None if priors is None else check_priors(priors, "site priors").tolist()

    def predict(
        self, images: Sequence[bytes], image_ids: Sequence[str], lesion_ids: Sequence[str | None] | None = None
    ) -> list[Finding]:
        """Findings of encoded images, one each, in their order; an image that is no use is a finding with a reason.

        Args:
            images: Encoded images.
            image_ids: Of the images.
            lesion_ids: Of their lesions, None where not known.

        Raises:
            DataError: Not as many ids as images.
        """
        lesion_ids = [None] * len(images) if lesion_ids is None else lesion_ids
        if not len(images) == len(image_ids) == len(lesion_ids):
            raise DataError(
                f"{len(images)} images, {len(image_ids)} image ids, {len(lesion_ids)} lesion ids",
                expected="one of each for every image",
            )
        answers = self.answer(images)
        return findings(self.loaded, answers, image_ids, lesion_ids, self._priors)

    def answer(self, images: Sequence[bytes]) -> Answers:
        """What network and gate say of encoded images, with nothing withheld."""
        spec = self.loaded.bundle.input
        with ThreadPoolExecutor(self._readers) as pool:
            read = list(pool.map(lambda data: _read(data, spec), images))
        good = np.array([not isinstance(found, ImageProblem) for found in read], dtype=bool)
        p, ood = np.full((len(read), len(CODES)), np.nan), np.full(len(read), np.nan, np.float32)
        if good.any():
            batch = np.stack([found[0] for found in read if not isinstance(found, ImageProblem)])
            logits, features = self.run(batch)
            p[good] = calibrated_probabilities(logits, self.calibration)
            if self.calibration.ood is not None and self.loaded.reference is not None:
                ood[good] = ood_score(features, self.loaded.reference)
        return Answers(
            p,
            ood,
            flags=[[] if isinstance(found, ImageProblem) else found[1] for found in read],
            problems=[found if isinstance(found, ImageProblem) else None for found in read],
        )


def image_flags(data: bytes) -> list[Flag]:
    """Quality flags of an encoded image.

    Raises:
        ImageProblem: The bytes are no readable image.
    """
    return quality_flags(decode_field(data, HEIGHT, WIDTH))


def _read(data: bytes, spec: InputSpec) -> tuple[np.ndarray, list[Flag]] | ImageProblem:
    try:
        return pixels(data, spec.height, spec.width, spec.copies), image_flags(data)
    except ImageProblem as problem:
        return problem


def findings(
    loaded: LoadedBundle, answers: Answers, image_ids: Sequence[str], lesion_ids: Sequence[str | None],
    priors: Sequence[float] | None = None,
) -> list[Finding]:  # fmt: skip
    """Answers as findings: what must not be said is withheld.

    Args:
        loaded: The calibrated bundle that gave the answers.
        answers: Of `Predictor.answer`, or the same arrays from an evaluation.
        image_ids: [N].
        lesion_ids: [N].
        priors: [7], class frequencies of the site.
    """
    calibration = loaded.bundle.calibration
    assert calibration is not None  # as in Predictor
    limit = np.inf if calibration.ood is None else calibration.ood.threshold
    unlike = np.nan_to_num(answers.ood, nan=0.0) > limit
    sets = conformal_sets(np.nan_to_num(answers.p, nan=1 / len(CODES)), np.array(calibration.conformal_quantiles))
    p = answers.p if priors is None else correct(answers.p, calibration.priors, priors)
    found = []
    for i, (image_id, lesion_id) in enumerate(zip(image_ids, lesion_ids, strict=True)):
        known = {
            "image_id": image_id, "lesion_id": lesion_id, "model": loaded.bundle.name, "model_sha256": loaded.sha256,
            "quality_flags": list(answers.flags[i]), "ood": bool(unlike[i]),
            "ood_score": None if np.isnan(answers.ood[i]) else float(answers.ood[i]),
        }  # fmt: skip
        problem = answers.problems[i]
        reasons = [FLAG_TEXT[flag] for flag in answers.flags[i]]
        if unlike[i]:
            reasons.append(f"unlike the training images (distance {answers.ood[i]:.3f}, usual up to {limit:.3f})")
        if problem is not None:
            found.append(Finding(**known, status="failed", reason=f"{problem.reason}: {problem.what}"))
        elif reasons:
            found.append(Finding(**known, status="not_assessable", reason="; ".join(reasons)))
        else:
            found.append(
                Finding(
                    **known,
                    **{f"p_{code}": float(p[i, k]) for k, code in enumerate(CODES)},
                    prediction=CODES[int(p[i].argmax())],
                    conformal_set=[code for k, code in enumerate(CODES) if sets[i, k]],
                    p_malignant=float(p[i, _MALIGNANT].sum()),
                    status="ok",
                )
            )
    return found
