"""The facts of many cases as columns of numpy arrays, unknowns included.

One row is one lesion of one person with its finding. A condition computes on whole columns, so one person and a hundred
thousand take the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from dermaflow.pathways.facts import DX_OF_HISTOLOGY, FACTS, ZONES, Fact
from dermaflow.schemas.bundle import Calibration
from dermaflow.schemas.finding import LesionFinding
from dermaflow.schemas.patient import Lesion, Patient
from dermaflow.taxonomy import CODES, INDEX, MALIGNANT

UNKNOWN = -1  # code of an unknown choice

_ANSWERS = {"no": 0, "yes": 1, "unknown": UNKNOWN}


class Truth(NamedTuple):
    """Three-valued: two boolean arrays [N], never both true; unknown where both are false (Kleene 1938)."""

    yes: np.ndarray
    no: np.ndarray

    @property
    def unknown(self) -> np.ndarray:
        return ~(self.yes | self.no)


class Numbers(NamedTuple):
    """Bounds [N] of a number, the same array twice where it is exact; NaN is unknown."""

    low: np.ndarray
    high: np.ndarray

    @property
    def unknown(self) -> np.ndarray:
        return ~(self.low == self.high)


class Choices(NamedTuple):
    """Index [N] into the words of the fact, -1 is unknown."""

    codes: np.ndarray

    @property
    def unknown(self) -> np.ndarray:
        return self.codes == UNKNOWN


class Sets(NamedTuple):
    """One bit a word [N]; where not `complete`, there may be more than the bits say."""

    bits: np.ndarray
    complete: np.ndarray

    @property
    def unknown(self) -> np.ndarray:
        return ~self.complete


Column = Truth | Numbers | Choices | Sets


@dataclass(frozen=True)
class Thresholds:
    """Where a probability starts to matter; the first, third and fourth come from the bundle's calibration.

    Attributes:
        mel: T1, p_mel from which melanoma is suspected; at most 0.10.
        malignant: p_mel + p_bcc + p_akiec from which the lesion is suspicious.
        entropy: Nats above which the finding is indeterminate.
        mel_review: p_mel from which nobody is reassured; NICE NG12 refers from a risk of 3 %.
        set_size: Classes in the conformal set from which the finding is indeterminate.
    """

    mel: float
    malignant: float
    entropy: float
    mel_review: float = 0.03
    set_size: float = 4

    @classmethod
    def of(cls, calibration: Calibration) -> Thresholds:
        """Those of a model."""
        return cls(
            mel=calibration.mel_threshold,
            malignant=calibration.malignant_threshold,
            entropy=calibration.entropy_threshold,
        )


@dataclass
class Frame:
    """Columns by fact name, and what was already computed of them."""

    rows: int
    columns: dict[str, Column]
    results: dict[Any, Truth] = field(default_factory=dict, repr=False)

    def row(self, i: int) -> Frame:
        """The same facts of one row alone."""
        return Frame(1, {n: type(c)(*(a[i : i + 1] for a in c)) for n, c in self.columns.items()})

    def value(self, name: str, i: int) -> Any:
        """A fact of one row as people read it: True, a number, a word, a list of words, or "unknown"."""
        column, words = self.columns[name], FACTS[name].words
        if isinstance(column, Numbers):
            low, high = float(column.low[i]), float(column.high[i])
            return "unknown" if np.isnan(low) else round(low, 6) if low == high else f"{low:g} to {high:g}"
        if isinstance(column, Sets):
            found = [word for k, word in enumerate(words) if column.bits[i] >> k & 1]
            return found if column.complete[i] else [*found, "unknown"] if found else "unknown"
        if column.unknown[i]:
            return "unknown"
        return words[column.codes[i]] if isinstance(column, Choices) else bool(column.yes[i])


def build_frame(
    patients: Sequence[Patient],
    lesions: Sequence[Lesion],
    findings: Sequence[LesionFinding | None],
    thresholds: Thresholds,
    *,
    site_calibrated: bool | None = None,
    heatmap_shown: bool = False,
) -> Frame:
    """Turn cases into columns; the three sequences belong together row by row.

    Args:
        patients: [N], a person with two lesions stands there twice.
        lesions: [N]
        findings: [N], None where no picture was scored.
        thresholds: Of the model that made the findings.
        site_calibrated: Whether the model was calibrated on the site's own images; None if nobody knows.
        heatmap_shown: Whether a heat map is shown beside the pathway.

    Returns:
        Every fact of the vocabulary, derived ones that are conditions excepted: those are computed when asked for.
    """
    columns: dict[str, Column] = {}
    for prefix, cases in (("patient", patients), ("lesion", lesions)):
        records = [vars(case) for case in cases]
        for fact in FACTS.values():
            if fact.name.startswith(prefix) and fact.question:
                key = fact.name.partition(".")[2]
                columns[fact.name] = _column(fact, [record[key] for record in records])
    columns |= _finding_columns(findings, site_calibrated, heatmap_shown)
    for name, value in vars(thresholds).items():
        columns[f"threshold.{name}"] = _exact(np.full(len(findings), value, np.float64))
    return derive(len(findings), columns)


def derive(rows: int, columns: dict[str, Column]) -> Frame:
    """Add the facts that follow from others (`facts`), and quieten the picture where histology is known."""
    histology, prediction = columns["lesion.histology"], columns["finding.prediction"]
    assert isinstance(histology, Choices) and isinstance(prediction, Choices)
    confirmed = ~histology.unknown
    dx = np.where(confirmed, _DX_OF_HISTOLOGY[histology.codes], prediction.codes)
    dx[dx == len(CODES)] = UNKNOWN  # a prediction of `none`
    columns = columns | _quiet(columns, confirmed, dx) | _seven_point(columns)
    columns["case.confirmed"] = Truth(confirmed, ~confirmed)
    columns["case.dx"] = Choices(dx)
    site = columns["lesion.site"]
    assert isinstance(site, Choices)
    columns["case.zone"] = Choices(_ZONE_OF_SITE[site.codes])
    return Frame(rows, columns)


def _finding_columns(
    findings: Sequence[LesionFinding | None], site_calibrated: bool | None, heatmap_shown: bool
) -> dict[str, Column]:
    rows = len(findings)
    status = _column(FACTS["finding.status"], [f.status if f else "missing" for f in findings])
    images = np.array([len(f.image_ids) if f else 0 for f in findings], np.float64)
    assert isinstance(status, Choices)
    # a flag of a lesion with several images, one of them good, is that of an image which was left out
    left_out = (status.codes == 0) & (images > 1)
    quality = np.where(left_out, 0, _bits("finding.quality", [f.quality_flags if f else () for f in findings]))
    ood = np.array([f is not None and f.ood for f in findings], bool) & ~left_out
    usable = (status.codes == 0) & (quality == 0) & ~ood
    p = np.full((rows, len(CODES)), np.nan)
    extra = np.full((rows, 2), np.nan)
    for i in np.flatnonzero(usable).tolist():
        finding = findings[i]
        assert finding is not None
        p[i] = finding.p
        extra[i] = finding.p_mel_max, finding.p_malignant
    members = _bits("finding.set", [f.conformal_set if f else () for f in findings]) * usable
    named = _column(FACTS["finding.prediction"], [(f.prediction if f else None) or "unknown" for f in findings])
    assert isinstance(named, Choices)
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.where(p > 0, p * np.log(p), 0 * p).sum(axis=1)  # 0 * NaN keeps unknown rows unknown
    disagree = np.array([f is not None and f.disagreement for f in findings], bool) & usable
    calibrated = np.full(rows, site_calibrated is True)
    columns: dict[str, Column] = {f"finding.p_{code}": _exact(p[:, k]) for k, code in enumerate(CODES)}
    return columns | {
        "finding.p_mel": _exact(extra[:, 0]),
        "finding.p_malignant": _exact(extra[:, 1]),
        "finding.entropy": _exact(entropy),
        "finding.ood": Truth(ood, ~ood),
        "finding.quality": Sets(quality, np.ones(rows, bool)),
        "finding.set": Sets(members, usable),
        "finding.set_size": _exact(np.where(usable, np.bitwise_count(members), np.nan)),
        "finding.prediction": Choices(np.where(usable, named.codes, UNKNOWN)),
        "finding.disagreement": Truth(disagree, usable & ~disagree),
        "finding.images": _exact(images),
        "finding.site_calibrated": Truth(calibrated, np.full(rows, site_calibrated is False)),
        "finding.heatmap_shown": Truth(np.full(rows, heatmap_shown), np.full(rows, not heatmap_shown)),
        "finding.status": status,
    }


def _quiet(columns: Mapping[str, Column], confirmed: np.ndarray, dx: np.ndarray) -> dict[str, Column]:
    """The facts of the picture, raising nothing where histology is known (rule G10)."""
    harmless = confirmed & (dx >= 0) & ~np.array([*MALIGNANT, True])[dx]
    bit = np.where(harmless, 1 << np.maximum(dx, 0), 0).astype(np.uint16)
    quiet: dict[str, Any] = {f"finding.p_{code}": (harmless & (dx == k)) * 1.0 for k, code in enumerate(CODES)}
    quiet |= {"finding.p_malignant": 0.0, "finding.entropy": 0.0, "finding.set_size": harmless * 1.0}
    changed: dict[str, Column] = {}
    for name, value in quiet.items():
        column = columns[name]
        assert isinstance(column, Numbers)
        changed[name] = _exact(np.where(confirmed, value, column.low))
    for name in ("finding.ood", "finding.disagreement"):
        column = columns[name]
        assert isinstance(column, Truth)
        changed[name] = Truth(column.yes & ~confirmed, column.no | confirmed)
    for name, bits in (("finding.quality", np.uint16(0)), ("finding.set", bit)):
        column = columns[name]
        assert isinstance(column, Sets)
        changed[name] = Sets(np.where(confirmed, bits, column.bits), column.complete | confirmed)
    prediction = columns["finding.prediction"]
    assert isinstance(prediction, Choices)
    none = np.int16(len(CODES))
    changed["finding.prediction"] = Choices(np.where(confirmed, np.where(harmless, dx, none), prediction.codes))
    return changed


def _seven_point(columns: Mapping[str, Column]) -> dict[str, Column]:
    """The weighted 7-point score (NICE NG12): 2 each for the first three, 1 each for the others."""
    diameter = columns["lesion.diameter_mm"]
    assert isinstance(diameter, Numbers)
    low = (diameter.low >= 7).astype(np.float64)
    high = (~(diameter.low < 7)).astype(np.float64)
    weights = {"change_in_size": 2, "irregular_shape": 2, "irregular_colour": 2}
    for item in (*weights, "inflamed", "oozing", "sensation_changed"):
        column = columns[f"lesion.{item}"]
        assert isinstance(column, Truth)
        low = low + weights.get(item, 1) * column.yes
        high = high + weights.get(item, 1) * ~column.no
    return {
        "case.seven_point": Numbers(low, high),
        "case.seven_point_min": _exact(low),
        "case.seven_point_max": _exact(high),
    }


def _column(fact: Fact, values: list[Any]) -> Column:
    if fact.kind == "number":
        return _exact(np.array(values, np.float64))  # None becomes NaN
    if fact.kind == "bool":
        answers = np.array([_ANSWERS[v] for v in values], np.int8)
        return Truth(answers == 1, answers == 0)
    if fact.kind == "set":
        return Sets(_bits(fact.name, values), np.array(["unknown" not in v for v in values], bool))
    codes = {word: k for k, word in enumerate(fact.words)} | {"unknown": UNKNOWN}
    return Choices(np.array([codes[v] for v in values], np.int16))


def _bits(name: str, values: Sequence[Sequence[str]]) -> np.ndarray:
    bit = {word: 1 << k for k, word in enumerate(FACTS[name].words)}
    known: dict[Sequence[str], int] = {}  # few different sets, many rows
    for value in values:
        if value not in known:
            known[value] = sum(bit.get(word, 0) for word in dict.fromkeys(value))
    return np.array([known[value] for value in values], np.uint16)


def _exact(values: np.ndarray) -> Numbers:
    return Numbers(values, values)


def _lookup(words: Sequence[str], meaning: Mapping[str, int]) -> np.ndarray:
    """Codes of words to codes of something else; the last entry serves the code -1, unknown."""
    return np.array([*(meaning.get(word, UNKNOWN) for word in words), UNKNOWN], np.int16)


_DX_OF_HISTOLOGY = _lookup(
    FACTS["lesion.histology"].words, {word: INDEX[code] for word, code in DX_OF_HISTOLOGY.items()}
)
_ZONE_OF_SITE = _lookup(
    FACTS["lesion.site"].words, {site: k for k, sites in enumerate(ZONES.values()) for site in sites}
)
