"""Figures in words: how the report and the card write them."""

from __future__ import annotations

from dermaflow.evaluation.figures import Estimate, Population
from dermaflow.schemas.bundle import OperatingPoint, SafetyPolicy
from dermaflow.taxonomy import MELANOMA

MANY_LESIONS = 30
"""Below this many lesions of a class a single one moves its sensitivity by more than three points."""

POINT_TITLES = {"accuracy": "Accuracy", "balanced": "Balanced", "melanoma_safe": "Melanoma-safe"}

POLICY_TITLES = {
    "argmax": "Most probable diagnosis",
    "p_mel": "Melanoma threshold",
    "p_malignant": "Malignant threshold",
    "conformal_set": "Conformal set",
    "all_triggers": "All triggers",
    "policy": "The bundle's policy",
}


def triggers(policy: SafetyPolicy) -> str:
    """What a safety policy adds to the most probable diagnosis, in a few words."""
    found = [] if policy.mel_threshold is None else [f"p(mel) ≥ {policy.mel_threshold:.3f}"]
    found += [] if policy.malignant_threshold is None else [f"p(malignant) ≥ {policy.malignant_threshold:.3f}"]
    found += ["a malignant class in the set"] * policy.use_set
    return "or " + " or ".join(found) if found else "nothing added"


def rule(point: OperatingPoint) -> str:
    """How an operating point decides, in a few words."""
    base = f"rare classes lifted, τ\u00a0{point.tau:.2f}" if point.tau else "the most probable class"
    if point.mel_threshold is None:
        return base
    return f"melanoma wherever p ≥ {point.mel_threshold:.3f}" + (f", else {base}" if point.tau else "")


def percent(figure: Estimate) -> str:
    """``88.7 % (87.1–90.2)``, the interval where there is one; a dash where there is no figure."""
    return _join(_value(figure, 100, 1, "\u00a0%"), interval(figure, percentage=True))


def number(figure: Estimate) -> str:
    """``0.954 (0.940–0.966)``; as `percent`."""
    return _join(_value(figure, 1, 3, ""), interval(figure, percentage=False))


def value(figure: Estimate, percentage: bool) -> str:
    """The figure without its interval; a dash where there is none."""
    return _value(figure, 100, 1, "\u00a0%") if percentage else _value(figure, 1, 3, "")


def interval(figure: Estimate, percentage: bool) -> str:
    """``87.1–90.2``, empty where there is none."""
    if figure.low is None or figure.high is None:
        return ""
    factor, digits = (100, 1) if percentage else (1, 3)
    return f"{figure.low * factor:.{digits}f}–{figure.high * factor:.{digits}f}"


def _value(figure: Estimate, factor: int, digits: int, unit: str) -> str:
    return "–" if figure.value is None else f"{figure.value * factor:.{digits}f}{unit}"


def _join(text: str, between: str) -> str:
    return f"{text} ({between})" if between else text


def headline_sentences(population: Population, points: list[OperatingPoint]) -> list[str]:
    """For each operating point: how many melanomas are found, and how many other images are called melanoma."""
    melanomas = population.counts.images_by_class.get("mel", 0)
    if not melanomas:
        return ["The test split holds no melanoma, so nothing can be said of finding one."]
    others = population.counts.images - melanomas
    sentences = []
    for point in points:
        figures = population.points[point.name]
        found = figures.confusion[MELANOMA][MELANOMA]
        alarms = sum(row[MELANOMA] for row in figures.confusion) - found
        sensitivity = figures.classes["mel"].sensitivity
        between = interval(sensitivity, percentage=True)
        sentences.append(
            f"At the {POINT_TITLES[point.name].lower()} point ({rule(point)}) "
            f"{found:,} of {melanomas:,} melanoma images are found: {value(sensitivity, percentage=True)}"
            + (f" (95 % interval {between}\u00a0%)" if between else "")
            + f". {alarms:,} of {others:,} images of other lesions are called melanoma."
        )
    return sentences


def small_data_notes(population: Population) -> list[str]:
    """What the size of the test split does not allow to say."""
    notes = []
    few = {code: n for code, n in population.counts.lesions_by_class.items() if n < MANY_LESIONS}
    if few:
        counts = ", ".join(f"{code} ({n})" for code, n in few.items())
        notes.append(
            f"Few lesions of {counts}: their figures, and the balanced accuracy that averages them with the others, "
            "move by several points with a single lesion."
        )
    if population.absent:
        notes.append(f"No lesion of {', '.join(population.absent)}: these are left out of every average.")
    return notes
