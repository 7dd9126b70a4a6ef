"""People, lesions and findings for the tests of the pathways, written as changes to a base in YAML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dermaflow.pathways.columns import Frame, Thresholds, build_frame
from dermaflow.schemas.finding import Finding, LesionFinding
from dermaflow.schemas.patient import Lesion, Patient
from dermaflow.taxonomy import CODES, MALIGNANT
from dermaflow.trust.lesions import merge_lesion

THRESHOLDS = Thresholds(mel=0.05, malignant=0.15, entropy=1.2)

Words = Mapping[str, Any]


@dataclass(frozen=True)
class Person:
    """One case: somebody, a lesion, what the model says of it, and what is known of the place."""

    patient: Patient
    lesion: Lesion
    finding: LesionFinding | None
    site_calibrated: bool | None = None
    heatmap_shown: bool = False

    def frame(self) -> Frame:
        """The case alone, as the engine takes it."""
        return build_frame(
            [self.patient], [self.lesion], [self.finding], THRESHOLDS,
            site_calibrated=self.site_calibrated, heatmap_shown=self.heatmap_shown,
        )  # fmt: skip


def read(name: str) -> Any:
    """A YAML file of this folder."""
    return yaml.safe_load((Path(__file__).parent / name).read_text())


def person(*layers: Words, patient_id: str = "P1", lesion_id: str = "L1") -> Person:
    """A case from layers of ``{patient: ..., lesion: ..., finding: ...}``, later ones over earlier ones.

    ``finding.p`` gives some of the seven probabilities, the others share the rest of 1; prediction and set are the most
    probable class unless they are given. ``finding.pictures`` are several such, merged. ``finding: none`` is a lesion
    without a picture.
    """
    parts: dict[str, dict[str, Any]] = {"patient": {}, "lesion": {}, "finding": {}}
    pictured = True
    for layer in layers:
        for name, changes in layer.items():
            if changes == "none":
                pictured = False
            else:
                parts[name] |= changes
    about = parts["finding"]
    return Person(
        patient=Patient(patient_id=patient_id, **_answers(parts["patient"])),
        lesion=Lesion(lesion_id=lesion_id, **_answers(parts["lesion"])),
        finding=_finding(about, lesion_id) if pictured else None,
        site_calibrated=about.get("site_calibrated"),
        heatmap_shown=about.get("heatmap_shown", False),
    )


def _answers(facts: Words) -> dict[str, Any]:
    """YAML reads yes and no as booleans; the schemas want the words, and None for an unknown number."""
    words = {True: "yes", False: "no"}
    numbers = {*_numbers(Patient), *_numbers(Lesion)}
    return {
        name: None if name in numbers and value == "unknown" else words[value] if isinstance(value, bool) else value
        for name, value in facts.items()
    }


def _numbers(schema: type[Patient] | type[Lesion]) -> set[str]:
    return {name for name, field in schema.model_fields.items() if field.default is None}


def _finding(about: Words, lesion_id: str) -> LesionFinding:
    if "pictures" in about:
        return merge_lesion(lesion_id, [_picture(one, lesion_id, k) for k, one in enumerate(about["pictures"], 1)])
    images = tuple(f"{lesion_id}-{k + 1}" for k in range(about.get("images", 1)))
    common: dict[str, Any] = {
        "lesion_id": lesion_id, "image_ids": images, "ood": about.get("ood", False), "model": "test",
        "model_sha256": "0" * 64, "quality_flags": tuple(about.get("quality", ())), "status": about.get("status", "ok"),
    }  # fmt: skip
    if common["status"] != "ok":
        return LesionFinding(**common, reason=about.get("reason", "not assessable"))
    p, prediction, chosen = _classes(about)
    return LesionFinding(
        **common, p=p, prediction=prediction, conformal_set=chosen, p_malignant=_malignant(p),
        p_mel_max=p[CODES.index("mel")], disagreement=about.get("disagreement", False),
    )  # fmt: skip


def _picture(about: Words, lesion_id: str, number: int) -> Finding:
    p, prediction, chosen = _classes(about)
    return Finding(
        image_id=f"{lesion_id}-{number}", lesion_id=lesion_id, prediction=prediction, conformal_set=list(chosen),
        p_malignant=_malignant(p), status="ok", model="test", model_sha256="0" * 64,
        **{f"p_{code}": value for code, value in zip(CODES, p, strict=True)},
    )  # fmt: skip


def _classes(about: Words) -> tuple[tuple[float, ...], str, tuple[str, ...]]:
    """Probabilities, prediction and set."""
    given: dict[str, float] = about["p"]
    rest = (1 - sum(given.values())) / max(len(CODES) - len(given), 1)
    p = tuple(given.get(code, rest) for code in CODES)
    prediction = about.get("prediction") or CODES[p.index(max(p))]
    chosen: Sequence[str] = about.get("set", [prediction])
    return p, prediction, tuple(code for code in CODES if code in chosen)


def _malignant(p: Sequence[float]) -> float:
    return sum(value for value, bad in zip(p, MALIGNANT, strict=True) if bad)
