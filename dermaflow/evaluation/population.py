"""Every figure for one part of the test split, each with its interval.

The figure itself comes from scikit-learn or torchmetrics where they have it, its interval from the weighted twin in
`metrics`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    log_loss,
    precision_score,
    recall_score,
    roc_auc_score,
    roc_curve,
)
from torchmetrics.functional.classification import multiclass_calibration_error

from dermaflow.evaluation import metrics
from dermaflow.evaluation.figures import (
    CalibrationFigures,
    ClassFigures,
    ConformalFigures,
    Counts,
    Estimate,
    LesionFigures,
    PointFigures,
    Population,
    RankingFigures,
)
from dermaflow.evaluation.intervals import estimate
from dermaflow.schemas.bundle import Calibration, OperatingPoint
from dermaflow.taxonomy import CODES, DIAGNOSES, MALIGNANT, MELANOMA
from dermaflow.trust.conformal import conformal_sets
from dermaflow.trust.decision import decide

_MALIGNANT = np.array(MALIGNANT)
_ARGMAX = OperatingPoint(name="accuracy", tau=0.0)  # no prior correction: the most probable class
_SEVERITY = np.array([diagnosis.severity for diagnosis in DIAGNOSES])


@dataclass(frozen=True)
class Sample:
    """Images with their truth, their calibrated probabilities and the resamples they are part of.

    Attributes:
        truth: [N] int, indices into `CODES`.
        probabilities: [N, 7] float64, rows sum to 1.
        lesions: [N] int, equal for images of one lesion.
        weights: [R, N] float64, from `intervals.lesion_weights`.
    """

    truth: np.ndarray
    probabilities: np.ndarray
    lesions: np.ndarray
    weights: np.ndarray

    def only(self, mask: np.ndarray) -> Sample:
        """The images where the mask [N] holds, in the same resamples."""
        return Sample(self.truth[mask], self.probabilities[mask], self.lesions[mask], self.weights[:, mask])

    def by_lesion(self) -> Sample:
        """One row a lesion: the mean probability of its images and, should they disagree, the most severe truth."""
        order = np.lexsort((_SEVERITY[self.truth], self.lesions))
        lesions, first, group, images = np.unique(
            self.lesions[order], return_index=True, return_inverse=True, return_counts=True
        )
        total = np.zeros((len(lesions), len(CODES)))
        np.add.at(total, group, self.probabilities[order])
        leader = order[first]
        return Sample(self.truth[leader], total / images[:, None], lesions, self.weights[:, leader])

    @property
    def present(self) -> np.ndarray:
        """Indices of the classes that the truth holds, ascending."""
        return np.unique(self.truth)

    def lesions_where(self, mask: np.ndarray) -> int:
        """Number of distinct lesions among the images where the mask [N] holds."""
        return len(np.unique(self.lesions[mask]))

    def counts(self) -> Counts:
        """Images and lesions, in all and by class."""
        masks = {CODES[k]: self.truth == k for k in self.present}
        return Counts(
            images=len(self.truth),
            lesions=len(np.unique(self.lesions)),
            images_by_class={code: int(mask.sum()) for code, mask in masks.items()},
            lesions_by_class={code: self.lesions_where(mask) for code, mask in masks.items()},
        )

    def absent(self) -> list[str]:
        """Codes of the classes that the truth does not hold."""
        return [code for k, code in enumerate(CODES) if k not in self.present]

    def mean(
        self, values: np.ndarray, among: np.ndarray | None = None, undefined: str = "no image to count"
    ) -> Estimate:
        """Mean of one value an image [N], among the images where a mask [N] holds."""
        part = self if among is None else self.only(among)
        values = values if among is None else values[among]
        value = float(values.mean()) if len(values) else np.nan
        return estimate(value, metrics.mean(values, part.weights), len(np.unique(part.lesions)), undefined)


def describe(sample: Sample, calibration: Calibration) -> Population:
    """Every figure of a sample."""
    return Population(
        counts=sample.counts(),
        absent=sample.absent(),
        points={point.name: point_figures(sample, point, calibration.priors) for point in calibration.operating_points},
        argmax=point_figures(sample, _ARGMAX, calibration.priors),
        ranking=ranking_figures(sample),
        calibration=calibration_figures(sample),
        conformal=conformal_figures(sample, calibration),
    )


def point_figures(sample: Sample, point: OperatingPoint, priors: list[float]) -> PointFigures:
    """Figures of the diagnoses named at an operating point; averages are over the classes present."""
    truth, present = sample.truth, sample.present
    predicted = decide(sample.probabilities, point, priors)
    draws = metrics.confusion_matrices(truth, predicted, sample.weights)
    counts = confusion_matrix(truth, predicted, labels=range(len(CODES)))
    lesions = len(np.unique(sample.lesions))
    sensitivity = recall_score(truth, predicted, labels=present, average=None)
    precision = precision_score(truth, predicted, labels=present, average=None, zero_division=np.nan)
    specificity = metrics.specificities(counts[None].astype(np.float64))[0]
    sensitivity_draws, specificity_draws = metrics.sensitivities(draws), metrics.specificities(draws)
    precision_draws = metrics.precisions(draws)
    classes = {}
    for row, k in enumerate(present):
        mine = truth == k
        classes[CODES[k]] = ClassFigures(
            sensitivity=estimate(sensitivity[row], sensitivity_draws[:, k], sample.lesions_where(mine)),
            specificity=estimate(
                specificity[k], specificity_draws[:, k], sample.lesions_where(~mine), f"every image is {CODES[k]}"
            ),
            precision=estimate(
                precision[row],
                precision_draws[:, k],
                sample.lesions_where(predicted == k),
                f"none is called {CODES[k]}",
            ),
        )
    return PointFigures(
        confusion=counts.tolist(),
        accuracy=estimate(accuracy_score(truth, predicted), metrics.accuracy(draws), lesions),
        balanced_accuracy=estimate(float(sensitivity.mean()), metrics.balanced_accuracy(draws), lesions),
        macro_f1=estimate(
            f1_score(truth, predicted, labels=present, average="macro"), metrics.macro_f1(draws), lesions
        ),
        classes=classes,
        melanomas_called_benign=sample.mean(~_MALIGNANT[predicted], truth == MELANOMA, "no image is melanoma"),
    )


class _Ranking:
    """One class, or a group of classes, against the rest; undefined where the sample holds one side only."""

    def __init__(self, sample: Sample, positive: np.ndarray, score: np.ndarray, name: str) -> None:
        self.defined = bool(positive.any() and not positive.all())
        self.undefined = f"every image is {name}" if positive.any() else f"no image is {name}"
        self.lesions = min(sample.lesions_where(positive), sample.lesions_where(~positive))
        if self.defined:
            fpr, tpr, _ = roc_curve(positive, score, drop_intermediate=False)
            self.curve = fpr[None], tpr[None]
            self.curve_draws = metrics.roc_curves(positive, score, sample.weights)
            self.area, self.area_draws = roc_auc_score(positive, score), metrics.area(*self.curve_draws)

    def auc(self) -> Estimate:
        if not self.defined:
            return Estimate(value=None, reason=self.undefined)
        return estimate(self.area, self.area_draws, self.lesions)

    def at(self, figure: Callable[[np.ndarray, np.ndarray, float], np.ndarray], rate: float) -> Estimate:
        if not self.defined:
            return Estimate(value=None, reason=self.undefined)
        return estimate(figure(*self.curve, rate)[0], figure(*self.curve_draws, rate), self.lesions)


def _rank_melanoma(sample: Sample) -> _Ranking:
    return _Ranking(sample, sample.truth == MELANOMA, sample.probabilities[:, MELANOMA], "melanoma")


def _rank_classes(sample: Sample) -> dict[str, _Ranking]:
    return {CODES[k]: _Ranking(sample, sample.truth == k, sample.probabilities[:, k], CODES[k]) for k in sample.present}


def melanoma_auc(sample: Sample) -> Estimate:
    """Area under the ROC curve of melanoma against the rest."""
    return _rank_melanoma(sample).auc()


def macro_auc(sample: Sample) -> Estimate:
    """Mean one-vs-rest area under the ROC curve over the classes present."""
    return _macro_auc(list(_rank_classes(sample).values()), sample)


def _macro_auc(classes: list[_Ranking], sample: Sample) -> Estimate:
    if not all(ranking.defined for ranking in classes):  # one class only
        return Estimate(value=None, reason=classes[0].undefined)
    draws = metrics.mean_of_defined(np.stack([ranking.area_draws for ranking in classes], axis=1))
    return estimate(float(np.mean([ranking.area for ranking in classes])), draws, len(np.unique(sample.lesions)))


def ranking_figures(sample: Sample) -> RankingFigures:
    """Areas under the ROC curve, and the melanoma figures at a declared specificity or sensitivity."""
    classes, melanoma = _rank_classes(sample), _rank_melanoma(sample)
    malignant = _Ranking(sample, _MALIGNANT[sample.truth], sample.probabilities[:, _MALIGNANT].sum(axis=1), "malignant")
    return RankingFigures(
        macro_auc=_macro_auc(list(classes.values()), sample),
        auc={code: ranking.auc() for code, ranking in classes.items()},
        melanoma_auc=melanoma.auc(),
        malignant_auc=malignant.auc(),
        melanoma_sensitivity_at_90_specificity=melanoma.at(metrics.sensitivity_at_specificity, 0.90),
        melanoma_sensitivity_at_95_specificity=melanoma.at(metrics.sensitivity_at_specificity, 0.95),
        specificity_at_95_melanoma_sensitivity=melanoma.at(metrics.specificity_at_sensitivity, 0.95),
    )


def calibration_figures(sample: Sample) -> CalibrationFigures:
    """Expected calibration error, Brier score and negative log-likelihood."""
    p, truth, lesions = sample.probabilities, sample.truth, len(np.unique(sample.lesions))
    below_one = torch.from_numpy(np.minimum(p, 1 - 1e-7))  # torchmetrics would give exactly 1 a bin of its own
    ece = multiclass_calibration_error(below_one, torch.from_numpy(truth), len(CODES), n_bins=metrics.ECE_BINS)
    ece_draws = metrics.expected_calibration_error(p.max(axis=1), p.argmax(axis=1) == truth, sample.weights)
    surprise = -np.log(np.maximum(p[np.arange(len(p)), truth], np.finfo(np.float64).eps))
    return CalibrationFigures(
        ece=estimate(float(ece), ece_draws, lesions),
        brier=sample.mean(((p - np.eye(len(CODES))[truth]) ** 2).sum(axis=1)),
        nll=estimate(log_loss(truth, p, labels=range(len(CODES))), metrics.mean(surprise, sample.weights), lesions),
    )


def conformal_figures(sample: Sample, calibration: Calibration) -> ConformalFigures:
    """What the conformal sets hold and how large they are."""
    sets = conformal_sets(sample.probabilities, np.array(calibration.conformal_quantiles))
    covered = sets[np.arange(len(sets)), sample.truth]
    size = sets.sum(axis=1)
    return ConformalFigures(
        target=1 - calibration.conformal_alpha,
        coverage=sample.mean(covered),
        coverage_by_class={CODES[k]: sample.mean(covered, sample.truth == k) for k in sample.present},
        mean_set_size=sample.mean(size),
        set_size_by_class={CODES[k]: sample.mean(size, sample.truth == k) for k in sample.present},
        singletons=sample.mean(size == 1),
        melanoma_sets_with_a_malignant_class=sample.mean(
            sets[:, _MALIGNANT].sum(axis=1) > 0, sample.truth == MELANOMA, "no image is melanoma"
        ),
    )


def lesion_figures(sample: Sample, calibration: Calibration) -> LesionFigures:
    """One decision a lesion, from the mean probability of its images."""
    merged = sample.by_lesion()
    points = {point.name: point_figures(merged, point, calibration.priors) for point in calibration.operating_points}
    return LesionFigures(
        lesions=len(merged.truth),
        accuracy={name: figures.accuracy for name, figures in points.items()},
        balanced_accuracy={name: figures.balanced_accuracy for name, figures in points.items()},
    )
