"""What an evaluation says: every figure with its interval, as it stands in ``metrics.json``."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from dermaflow.schemas.bundle import SafetyPolicy


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())


class Estimate(_Strict):
    """A figure with its 95 % lesion-bootstrap interval; what cannot be said is null, with the reason."""

    value: float | None
    low: float | None = None
    high: float | None = None
    reason: str | None = None


class Counts(_Strict):
    """How many images and lesions a figure rests on; only classes that are present are listed."""

    images: int
    lesions: int
    images_by_class: dict[str, int]
    lesions_by_class: dict[str, int]


class ClassFigures(_Strict):
    """One diagnosis against the six others, at an operating point."""

    sensitivity: Estimate
    specificity: Estimate
    precision: Estimate


class PointFigures(_Strict):
    """One diagnosis an image, at an operating point.

    Attributes:
        confusion: [7, 7] images; the row is the true class, the column the predicted one, in the order of `CODES`.
        classes: By code, for the classes present.
        melanomas_called_benign: Share of melanoma images given one of the benign classes.
    """

    confusion: list[list[int]]
    accuracy: Estimate
    balanced_accuracy: Estimate
    macro_f1: Estimate
    classes: dict[str, ClassFigures]
    melanomas_called_benign: Estimate


class RankingFigures(_Strict):
    """How well the probabilities rank the images, at no threshold or at a declared one (all one-vs-rest)."""

    macro_auc: Estimate
    auc: dict[str, Estimate]
    melanoma_auc: Estimate
    malignant_auc: Estimate
    melanoma_sensitivity_at_90_specificity: Estimate
    melanoma_sensitivity_at_95_specificity: Estimate
    specificity_at_95_melanoma_sensitivity: Estimate


class CalibrationFigures(_Strict):
    """How far the probabilities can be taken at their word.

    Attributes:
        ece: Expected calibration error of the largest probability, 15 equal bins (Guo et al. 2017). Resampling adds
            noise to every bin, so the interval leans upwards.
        brier: Multi-class Brier score, the sum over the classes, in [0, 2].
        nll: Negative log-likelihood, nats an image.
    """

    ece: Estimate
    brier: Estimate
    nll: Estimate


class ConformalFigures(_Strict):
    """What the conformal sets hold (`trust.conformal.conformal_sets`)."""

    target: float  # 1 - alpha
    coverage: Estimate
    coverage_by_class: dict[str, Estimate]
    mean_set_size: Estimate
    set_size_by_class: dict[str, Estimate]
    singletons: Estimate
    melanoma_sets_with_a_malignant_class: Estimate


class Population(_Strict):
    """Every figure for one part of the test split.

    Attributes:
        absent: Codes of the classes it does not hold; they are left out of every average.
        points: By operating point: accuracy, balanced, melanoma_safe.
        argmax: Of the most probable class, which is what papers report; None in an evaluation older than this figure.
    """

    counts: Counts
    absent: list[str]
    points: dict[str, PointFigures]
    argmax: PointFigures | None = None
    ranking: RankingFigures
    calibration: CalibrationFigures
    conformal: ConformalFigures


class LesionFigures(_Strict):
    """One decision a lesion, from the mean probability of its images, by operating point."""

    lesions: int
    accuracy: dict[str, Estimate]
    balanced_accuracy: dict[str, Estimate]


class PolicyFigures(_Strict):
    """What a safety policy dismisses and flags (`dermaflow.trust.policy`); counts are of images or of lesions."""

    policy: SafetyPolicy
    melanomas: int
    melanomas_dismissed: int
    melanomas_dismissed_share: Estimate
    malignant: int
    malignant_dismissed: int
    malignant_dismissed_share: Estimate
    benign: int
    benign_flagged: int
    benign_flagged_share: Estimate


class GateFigures(_Strict):
    """Share of the test images that are refused; all of them are real, so these are false alarms but for bad pictures.

    Attributes:
        not_assessable: By the quality gate or as out of distribution.
        by_flag: By quality flag; an image can have several.
        out_of_distribution: None where the model keeps no reference.
    """

    not_assessable: Estimate
    quality: Estimate
    by_flag: dict[str, Estimate]
    out_of_distribution: Estimate | None
    melanomas_not_assessable: Estimate


class SafetyFigures(_Strict):
    """Policies by name (`dermaflow.trust.policy.policies`), and the gate if it was run."""

    images: dict[str, PolicyFigures]
    lesions: dict[str, PolicyFigures]
    gate: GateFigures | None


class Slice(_Strict):
    """A part of the test split that shares a site, sex, age band, localization, way of confirmation or skin type.

    Attributes:
        accuracy: At the accuracy point.
        balanced_accuracy: At the balanced point, over the classes present.
        melanoma_sensitivity: At the accuracy and the melanoma_safe point.
        malignant_sensitivity: Share of the malignant images whose most probable class is malignant (``accuracy``), and
            that the bundle's safety policy flags (``policy``).
        melanoma_flagged: Share of the melanoma images that the safety policy flags.
        benign_flagged: Share of the benign images that the safety policy flags.
        coverage: Of the conformal sets.
        note: Why the figures are left out, where they are.
    """

    kind: str
    name: str
    counts: Counts
    absent: list[str]
    accuracy: Estimate | None = None
    balanced_accuracy: Estimate | None = None
    melanoma_sensitivity: dict[str, Estimate] | None = None
    malignant_sensitivity: dict[str, Estimate] | None = None
    melanoma_flagged: Estimate | None = None
    benign_flagged: Estimate | None = None
    coverage: Estimate | None = None
    melanoma_auc: Estimate | None = None
    macro_auc: Estimate | None = None
    note: str | None = None


class Evaluation(_Strict):
    """The content of ``metrics.json``.

    Attributes:
        populations: ``all`` images, and ``histology`` (``dx_type`` histo), which is left out where there is none.
        lesion_level: By population.
        pathways: Lesions by true diagnosis and urgency, where the findings were taken to pathways.
        provenance: Model, data hash, command: written with the report.
    """

    format: str = "dermaflow-evaluation/1"
    seed: int
    resamples: int
    populations: dict[str, Population]
    lesion_level: dict[str, LesionFigures]
    safety: SafetyFigures
    slices: list[Slice]
    pathways: dict[str, dict[str, int]] = {}
    provenance: dict[str, str] = {}

    def headline(self) -> dict[str, float]:
        """The figures a bundle and the registry carry, for all images; undefined ones are left out."""
        population = self.populations["all"]
        points, ranking = population.points, population.ranking
        figures = {} if population.argmax is None else {
            "argmax_accuracy": population.argmax.accuracy,
            "argmax_balanced_accuracy": population.argmax.balanced_accuracy,
        }  # fmt: skip
        figures |= {
            "accuracy": points["accuracy"].accuracy,
            "balanced_accuracy": points["accuracy"].balanced_accuracy,
            "macro_f1": points["accuracy"].macro_f1,
            "balanced_accuracy_at_balanced": points["balanced"].balanced_accuracy,
            "melanoma_auc": ranking.melanoma_auc,
            "malignant_auc": ranking.malignant_auc,
            "macro_auc": ranking.macro_auc,
            "melanoma_sensitivity_at_90_specificity": ranking.melanoma_sensitivity_at_90_specificity,
            "ece": population.calibration.ece,
            "brier": population.calibration.brier,
            "coverage": population.conformal.coverage,
        }
        for name, point in points.items():
            if "mel" in point.classes:
                figures[f"melanoma_sensitivity_at_{name}"] = point.classes["mel"].sensitivity
        return {name: figure.value for name, figure in figures.items() if figure.value is not None}
