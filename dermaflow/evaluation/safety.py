"""What the safety policy buys and costs, and how often gate and distance refuse a real image."""

from __future__ import annotations

import numpy as np
import pandas as pd

from dermaflow.datasets.quality import FLAGS
from dermaflow.evaluation.figures import GateFigures, PolicyFigures, SafetyFigures
from dermaflow.evaluation.population import Sample
from dermaflow.schemas.bundle import Calibration, SafetyPolicy
from dermaflow.taxonomy import MALIGNANT, MELANOMA
from dermaflow.trust.conformal import conformal_sets
from dermaflow.trust.policy import flag, policies

FLAGS_COLUMN = "quality_flags"
OOD_COLUMN = "ood_score"

_MALIGNANT = np.array(MALIGNANT)


def safety_figures(predictions: pd.DataFrame, sample: Sample, calibration: Calibration) -> SafetyFigures:
    """Figures of every policy, by image and by lesion, and of gate and distance where they were taken.

    Args:
        predictions: One row an image, aligned with the sample; ``quality_flags`` and ``ood_score`` where known.
        sample: The same images as arrays.
        calibration: Thresholds and policy.
    """
    sets = conformal_sets(sample.probabilities, np.array(calibration.conformal_quantiles))
    flagged = {name: flag(sample.probabilities, sets, policy) for name, policy in policies(calibration).items()}
    chosen = policies(calibration)
    return SafetyFigures(
        images={name: _figures(sample, mask, chosen[name]) for name, mask in flagged.items()},
        lesions={name: _figures(*_by_lesion(sample, mask), chosen[name]) for name, mask in flagged.items()},
        gate=_gate(predictions, sample, calibration),
    )


def _figures(sample: Sample, flagged: np.ndarray, policy: SafetyPolicy) -> PolicyFigures:
    """What is dismissed and what is flagged; one row of the sample counts once."""
    melanoma, malignant = sample.truth == MELANOMA, _MALIGNANT[sample.truth]
    return PolicyFigures(
        policy=policy,
        melanomas=int(melanoma.sum()),
        melanomas_dismissed=int((melanoma & ~flagged).sum()),
        melanomas_dismissed_share=sample.mean(~flagged, melanoma, "no melanoma"),
        malignant=int(malignant.sum()),
        malignant_dismissed=int((malignant & ~flagged).sum()),
        malignant_dismissed_share=sample.mean(~flagged, malignant, "nothing malignant"),
        benign=int((~malignant).sum()),
        benign_flagged=int((~malignant & flagged).sum()),
        benign_flagged_share=sample.mean(flagged, ~malignant, "nothing benign"),
    )


def _by_lesion(sample: Sample, flagged: np.ndarray) -> tuple[Sample, np.ndarray]:
    """One row a lesion; it is flagged if one of its images is."""
    merged = sample.by_lesion()
    any_flagged = np.zeros(len(merged.truth), dtype=bool)
    any_flagged[np.searchsorted(merged.lesions, sample.lesions[flagged])] = True
    return merged, any_flagged


def _gate(predictions: pd.DataFrame, sample: Sample, calibration: Calibration) -> GateFigures | None:
    if FLAGS_COLUMN not in predictions:
        return None
    raised = {name: np.array([name in flags for flags in predictions[FLAGS_COLUMN]]) for name in FLAGS}
    gate = np.any(list(raised.values()), axis=0)
    known = OOD_COLUMN in predictions and calibration.ood is not None
    unlike = np.zeros(len(gate), dtype=bool)
    if known and calibration.ood is not None:
        unlike = predictions[OOD_COLUMN].to_numpy() > calibration.ood.threshold
    return GateFigures(
        not_assessable=sample.mean(gate | unlike),
        quality=sample.mean(gate),
        by_flag={name: sample.mean(mask) for name, mask in raised.items()},
        out_of_distribution=sample.mean(unlike) if known else None,
        melanomas_not_assessable=sample.mean(gate | unlike, sample.truth == MELANOMA, "no melanoma"),
    )
