"""A knowledge base of a few rules, so that the tests of the engine do not change when a rule of the real one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from dermaflow.pathways.columns import Thresholds
from dermaflow.schemas.finding import LesionFinding
from dermaflow.taxonomy import CODES, MALIGNANT

THRESHOLDS = Thresholds(mel=0.06, malignant=0.2, entropy=1.2)

RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "G02": ("finding.quality != {}", {"gate": "not_assessable", "offer": ["dermoscopy_review", "cryotherapy"]}),
    "G07": ("lesion.red_flag", {"urgency": "U1", "no_reassurance": True, "notice": True, "offer": ["refer_urgent"]}),
    "S01": ("finding.p_mel >= threshold.mel", {"urgency": "U1", "block": ["destructive", "topical"]}),
    "S12": ("always", {}),
    "N01": (
        "case.dx == nv and finding.set == {nv} and not lesion.changing",
        {"reassure": True, "offer": ["reassure", "no_treatment"], "text": ["T-nv"]},
    ),
    "N04": ("case.dx == nv and patient.prior_melanoma", {"urgency": "U3", "follow_up": True}),
    "B01": (
        "case.dx == bcc",
        {"urgency_when": [{"when": "lesion.fast_growing", "urgency": "U1"}, {"when": "always", "urgency": "U3"}]},
    ),
    "B05": (
        "case.dx == bcc",
        {"offer": ["standard_excision", "fluorouracil", "imiquimod", "cryotherapy"], "text": ["T-bcc"]},
    ),
    "B16": ("case.dx == bcc and patient.frailty >= 7", {"urgency": "U4", "offer": ["watchful_waiting"]}),
    "C02": ("patient.pregnant or patient.age < 18", {"block": ["fluorouracil"]}),
    "C10": (
        "any(patient.pregnant, patient.immunosuppressed)",
        {
            "restrict_when": [
                {"when": "patient.pregnant", "block": ["imiquimod"]},
                {"when": "patient.immunosuppressed", "caution": ["imiquimod"]},
            ]
        },
    ),
    "C14": ("patient.fitzpatrick >= 4", {"caution": ["cryotherapy"]}),
    "C21": ("patient.keloid", {"rank_last": ["standard_excision"]}),
    "C23": ("patient.immunosuppressed", {"raise": 1, "follow_up": True}),
}

OPTIONS = {
    "dermoscopy_review": "diagnostic", "refer_urgent": "referral", "refer_soon": "referral",
    "refer_routine": "referral", "standard_excision": "surgery", "cryotherapy": "destructive",
    "fluorouracil": "topical", "imiquimod": "topical", "watchful_waiting": "observation",
    "no_treatment": "observation", "reassure": "reassurance",
}  # fmt: skip

UTILITIES = {
    "rule": "S12", "source": "made up", "verification": "M",
    "actions": [
        {"id": "dismiss", "title": "Dismiss", "utility": [-2, -3, 5, 5, -5, 5, 5]},
        {"id": "excise", "title": "Excise", "urgency": "U2", "utility": [2, 4.5, -3, -3, 5, -3, -3]},
    ],
}  # fmt: skip


def rule(rule_id: str, when: str, effect: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A rule as its YAML says it."""
    fixed = {"condition": "any", "applies": when, "action": f"Says {rule_id}.", "strength": "GPP", "rationale": "test"}
    return {"id": rule_id, "when": when, "effect": effect, "source": "test", "verification": "M", **fixed, **more}


def write(folder: Path, **rules: Any) -> Path:
    """Write the knowledge base; `rules` (id to condition and effect, or a whole rule) are added or replace others."""
    whole = {rule_id: rule(rule_id, *parts) for rule_id, parts in RULES.items()}
    whole |= {rule_id: r if isinstance(r, dict) else rule(rule_id, *r) for rule_id, r in rules.items()}
    folder.mkdir(exist_ok=True)
    options = [{"id": option, "title": option, "group": group} for option, group in OPTIONS.items()]
    for name, content in (
        ("rules.yaml", list(whole.values())), ("options.yaml", options), ("utilities.yaml", UTILITIES),
        ("texts.yaml", {"T-nv": "Low risk.", "T-bcc": "What matters most to you?"}),
    ):  # fmt: skip
        (folder / name).write_text(yaml.safe_dump(content, sort_keys=False))
    return folder


def finding(dx: str = "nv", share: float = 0.94, *, lesion_id: str = "L", **changes: Any) -> LesionFinding:
    """A finding with one probable class; the others share the rest."""
    p = tuple(share if code == dx else (1 - share) / 6 for code in CODES)
    usual: dict[str, Any] = {
        "lesion_id": lesion_id, "image_ids": ("I",), "p": p, "prediction": dx, "conformal_set": (dx,), "status": "ok",
        "p_malignant": sum(v for v, bad in zip(p, MALIGNANT, strict=True) if bad), "p_mel_max": p[CODES.index("mel")],
        "model": "test", "model_sha256": "0" * 64,
    }  # fmt: skip
    return LesionFinding(**usual | changes)


def unusable(**changes: Any) -> LesionFinding:
    """A finding of a picture that cannot be assessed."""
    usual: dict[str, Any] = {
        "lesion_id": "L", "image_ids": ("I",), "status": "not_assessable", "quality_flags": ("blur",), "reason": "blur",
        "model": "test", "model_sha256": "0" * 64,
    }  # fmt: skip
    return LesionFinding(**usual | changes)
