"""What a run of bulk scoring found, as a whole: class mix, drift, refusals, failures, and the flagged lesions first."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterable
from functools import cache
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from dermaflow import storage
from dermaflow.schemas.bundle import Bundle, SafetyPolicy
from dermaflow.scoring.plan import FINDINGS, PAGE, SUMMARY, Commit, Plan, Progress
from dermaflow.taxonomy import CODES, DIAGNOSES, MELANOMA
from dermaflow.trust.drift import stability_index
from dermaflow.trust.policy import flag

LISTED = 500
"""Flagged lesions named in the summary; the others are counted, and stand in the findings."""
STABLE, SHIFTED = 0.10, 0.25
"""Population stability index up to which a mix counts as the same, and from which it counts as another one: the
convention of credit scoring (Siddiqi, Credit Risk Scorecards, 2006), which knows no better one for other fields."""
_ROWS = 8192  # findings looked at at a time
_COLUMNS = ["image_id", "lesion_id", *(f"p_{code}" for code in CODES), "prediction", "conformal_set", "p_malignant",
            "ood", "quality_flags", "status"]  # fmt: skip


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ClassShare(_Strict):
    """One diagnosis among the assessable images.

    Attributes:
        predicted: Images whose most probable diagnosis it is.
        share: Mean of its probability: what the model expects the share to be.
        training: Its share of the training images.
    """

    code: str
    name: str
    malignant: bool
    predicted: int
    share: float | None
    training: float


class Flagged(_Strict):
    """A lesion that the safety policy flags; the figures are of its most suspicious image."""

    lesion_id: str
    image_id: str
    images: int
    prediction: str
    p_malignant: float
    p_mel: float
    conformal_set: list[str]


class Drift(_Strict):
    """How far the mix of diagnoses is from that of the training images.

    Attributes:
        psi: Population stability index of the mean probabilities; None without an assessable image.
        chance: What it would be on average for so few images of the very same mix.
        verdict: In words.
    """

    psi: float | None
    chance: float | None
    verdict: str


class Summary(_Strict):
    """The content of ``summary.json``. Counts are of images unless they say lesions.

    Attributes:
        ignored: Files that systems leave behind, which were not scored.
        seconds: In which something was scored, without pauses between runs.
        ood: Images unlike the training images; `ood_usual` is the share to be expected of images like them.
        quality: Not assessable images by quality flag; one can have several.
        reasons: Failed images by the code of their reason.
        flagged: The most suspicious of `flagged_lesions`, most probably malignant first.
        urgencies: Lesions by urgency of their pathway, where patients were given.
    """

    format: str = "dermaflow-scoring-summary/1"
    source: str
    model: str
    model_sha256: str
    created: str
    images: int
    ok: int
    not_assessable: int
    failed: int
    ignored: int
    lesions: int
    seconds: float
    images_per_second: float | None
    classes: list[ClassShare]
    drift: Drift
    ood: int
    ood_usual: float | None
    quality: dict[str, int]
    reasons: dict[str, int]
    flagged_lesions: int
    flagged: list[Flagged]
    urgencies: dict[str, int] | None = None


def summarise(out: str, plan: Plan, bundle: Bundle, progress: Progress) -> Summary:
    """Read the findings of a run once, a few at a time.

    Args:
        out: Folder of the run, with all findings.
        plan: Its plan.
        bundle: The model.
        progress: All commits of the run.
    """
    calibration = bundle.calibration
    assert calibration is not None  # as `resolve_model` found
    found = _Sums(calibration.policy)
    filesystem, path = storage.locate(storage.join(out, FINDINGS))
    with pq.ParquetFile(path, filesystem=filesystem) as file:
        for batch in file.iter_batches(_ROWS, columns=_COLUMNS):
            found.add(batch)
    status = progress.status()
    seconds = active_seconds(progress.commits.values())
    shares = found.mean_probabilities()
    flagged = sorted(found.flagged.values(), key=lambda lesion: (-lesion.p_malignant, lesion.lesion_id))
    return Summary(
        source=plan.source, model=plan.model, model_sha256=plan.model_sha256, created=plan.created, images=plan.inputs,
        ok=status.ok, not_assessable=status.not_assessable, failed=status.failed, ignored=plan.ignored,
        lesions=found.lesion_count(), seconds=seconds,
        images_per_second=plan.inputs / seconds if seconds else None,
        classes=[
            ClassShare(
                code=d.code, name=d.name, malignant=d.malignant, predicted=found.predicted[d.code],
                share=None if shares is None else float(shares[k]), training=bundle.train_priors[k],
            )
            for k, d in enumerate(DIAGNOSES)
        ],
        drift=drift(shares, np.array(bundle.train_priors), status.ok),
        ood=found.ood, ood_usual=None if calibration.ood is None else 1 - calibration.ood.quantile,
        quality=dict(found.quality.most_common()), reasons=dict(progress.reasons.most_common()),
        flagged_lesions=len(flagged), flagged=flagged[:LISTED],
    )  # fmt: skip


class _Sums:
    """What is kept of all findings: sums, hashes of lesions, and the flagged ones."""

    def __init__(self, policy: SafetyPolicy) -> None:
        self._policy = policy
        self._p, self._images = np.zeros(len(CODES)), 0
        self._lesions = array("q")  # hashes: ids of millions of lesions would take gigabytes
        self.predicted: Counter[str] = Counter()
        self.quality: Counter[str] = Counter()
        self.ood = 0
        self.flagged: dict[str, Flagged] = {}

    def add(self, batch: pa.RecordBatch) -> None:
        columns: dict[str, list[Any]] = batch.to_pydict()
        lesions = [lesion or image for lesion, image in zip(columns["lesion_id"], columns["image_id"], strict=True)]
        self._lesions.extend(map(hash, lesions))
        self.ood += sum(columns["ood"])
        for flags in columns["quality_flags"]:
            self.quality.update(flags or ())
        good = [i for i, status in enumerate(columns["status"]) if status == "ok"]
        if not good:
            return
        p = np.array([[columns[f"p_{code}"][i] for code in CODES] for i in good], np.float64)
        self._p += p.sum(axis=0)
        self._images += len(good)
        self.predicted.update(columns["prediction"][i] for i in good)
        sets = np.array([[code in columns["conformal_set"][i] for code in CODES] for i in good])
        for row in np.flatnonzero(flag(p, sets, self._policy)):
            self._flag(lesions[good[row]], columns, good[row], float(p[row, MELANOMA]))

    def _flag(self, lesion_id: str, columns: dict[str, list[Any]], i: int, p_mel: float) -> None:
        known, p_malignant = self.flagged.get(lesion_id), float(columns["p_malignant"][i])
        images = 1 if known is None else known.images + 1
        if known is None or p_malignant > known.p_malignant:
            known = Flagged(
                lesion_id=lesion_id, image_id=columns["image_id"][i], images=images, p_malignant=p_malignant,
                prediction=columns["prediction"][i], p_mel=p_mel, conformal_set=columns["conformal_set"][i],
            )  # fmt: skip
        self.flagged[lesion_id] = known.model_copy(update={"images": images})

    def mean_probabilities(self) -> np.ndarray | None:
        return self._p / self._p.sum() if self._images else None

    def lesion_count(self) -> int:
        return len(np.unique(np.frombuffer(self._lesions, np.int64))) if len(self._lesions) else 0


def drift(shares: np.ndarray | None, training: np.ndarray, images: int) -> Drift:
    """Compare two mixes of diagnoses.

    For N images drawn from the same mix the population stability index is about ``(K - 1) / N`` on average, which is
    said beside it.

    Args:
        shares: [7], sum 1, of the images scored; None where there are none.
        training: [7], sum 1.
        images: Number of images behind `shares`.
    """
    if shares is None or images == 0:
        return Drift(psi=None, chance=None, verdict="no assessable image to compare")
    psi = stability_index(shares, training)
    chance = (len(CODES) - 1) / images
    if psi < max(STABLE, 2 * chance):
        verdict = "like the training images"
    elif psi < SHIFTED:
        verdict = "somewhat different from the training images"
    else:
        verdict = "another mix than the training images: calibrate for this site before trusting the probabilities"
    return Drift(psi=psi, chance=chance, verdict=verdict)


def active_seconds(commits: Iterable[Commit]) -> float:
    """Seconds in which at least one part was worked on."""
    total, end = 0.0, -math.inf
    for start, finish in sorted((c.finished - c.seconds, c.finished) for c in commits):
        total += max(0.0, finish - max(start, end))
        end = max(end, finish)
    return total


def read_summary(out: str) -> Summary | None:
    """The summary of a finished run; None while it is not."""
    place = storage.join(out, SUMMARY)
    if not storage.exists(place):
        return None
    try:
        return Summary.model_validate_json(storage.read_bytes(place))
    except ValidationError:
        return None  # of another version: written anew


def write_summary(out: str, summary: Summary) -> None:
    """Write the page, and then ``summary.json``, with which the run is finished."""
    storage.write_bytes(storage.join(out, PAGE), summary_page(summary).encode())
    storage.write_bytes(storage.join(out, SUMMARY), summary.model_dump_json(indent=1).encode())


def summary_page(summary: Summary) -> str:
    """The summary as one HTML file that needs no other."""
    return _environment().get_template("summary.html.j2").render(s=summary, widest=_widest(summary))


def _widest(summary: Summary) -> float:
    return max([c.training for c in summary.classes] + [c.share or 0.0 for c in summary.classes] + [0.01])


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.ChoiceLoader(
            [
                jinja2.PackageLoader("dermaflow.scoring", "templates"),
                jinja2.PackageLoader("dermaflow.pathways.outputs", "templates"),  # page.css: one look for all pages
            ]
        ),
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
