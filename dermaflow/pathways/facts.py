"""The vocabulary of the rules: every fact a condition may name, its type, and the question that would make it known.

Facts of a person and a lesion are the fields of `Patient` and `Lesion`, so a field added there is a fact here once it
has a question. A fact may be unknown, and unknown is never no.

Facts of the picture (``finding.``) are unknown unless the finding is ``ok``, without a quality flag and not out of
distribution. Once histology is known they take their quiet value, the one that raises nothing (rule G10): ``ood``,
``quality`` and ``disagreement`` say no, probabilities are 0 and the set is empty, but for a confirmed harmless class,
which has probability 1 and is alone in the set; ``finding.prediction`` is that class, else ``none``.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin

from dermaflow.schemas.patient import Allergy, Lesion, Patient, YesNo
from dermaflow.taxonomy import CODES

Kind = Literal["bool", "number", "choice", "set"]

QUALITY_FLAGS = ("blur", "exposure", "occlusion", "lesion_out_of_frame", "not_dermoscopy")
FINDING_STATUS = ("ok", "not_assessable", "failed", "missing")

ZONES = {
    "H": ("face", "nose", "lip", "eyelid", "ear", "hand", "foot", "acral", "palm", "sole", "nail", "genital", "mucosa"),
    "M": ("scalp", "neck", "cheek", "forehead", "pretibia"),
    "L": ("back", "trunk", "chest", "abdomen", "upper extremity", "lower extremity"),
}
"""Recurrence risk of basal cell carcinoma by body site (NCCN BCC V2.2021); ``face`` is coarse, so it counts as H."""

OUT_OF_SCOPE_SITES = ("mucosa", "nail", "genital", "palm", "sole", "acral")
"""Rule G04: HAM10000 has next to none of them."""

DX_OF_HISTOLOGY = {
    "mel": "mel", "mel_in_situ": "mel", "nv": "nv", "bcc_superficial": "bcc", "bcc_nodular": "bcc",
    "bcc_infiltrative": "bcc", "bcc_other": "bcc", "ak": "akiec", "bowen": "akiec", "scc": "akiec", "bkl": "bkl",
    "df": "df", "vasc": "vasc",
}  # fmt: skip
"""Rule G10; ``other`` is none of the seven, so the class stays unknown."""


@dataclass(frozen=True)
class Fact:
    """Something a condition may ask for.

    Attributes:
        name: For instance ``patient.age``.
        kind: ``bool`` stands by itself, ``number`` is compared, ``choice`` is one of its words, ``set`` has some.
        words: Of a choice or a set, as in the data (``lower extremity`` may be written ``lower_extremity``).
        question: What to ask to make it known; None where nobody can be asked.
        meaning: Of a derived fact: in words, with the rule it stems from.
        definition: Of a derived yes/no fact: the condition it abbreviates.
        needs: Of a derived fact that is computed: the facts that make it known.
    """

    name: str
    kind: Kind
    words: tuple[str, ...] = ()
    question: str | None = None
    meaning: str = ""
    definition: str | None = None
    needs: tuple[str, ...] = ()


_QUESTIONS = {
    "patient.age": "How old is the person, in years?",
    "patient.sex": "What is the person's sex?",
    "patient.fitzpatrick": "Which Fitzpatrick skin type (1 to 6)?",
    "patient.pregnant": "Is the person pregnant?",
    "patient.third_trimester": "Is it the third trimester?",
    "patient.breast_feeding": "Is the person breast-feeding?",
    "patient.could_become_pregnant": "Could the person become pregnant?",
    "patient.partner_could_become_pregnant": "Could the person's partner become pregnant?",
    "patient.immunosuppression": "Is the immune system suppressed, and by what?",
    "patient.anticoagulant": "Does the person take a blood thinner, and which kind?",
    "patient.inr": "What is the last INR?",
    "patient.implant": "Is there a pacemaker, ICD or other electronic implant?",
    "patient.allergies": "Which allergies are there (peanut, soya, lidocaine, NSAID, adhesive, chlorhexidine)?",
    "patient.dpd_deficiency": "Is a DPD deficiency known or tested for?",
    "patient.porphyria": "Does the person have porphyria?",
    "patient.photosensitising": "Is there a photosensitising drug or disease?",
    "patient.autoimmune_disease": "Is there an autoimmune disease?",
    "patient.asthma_or_bradycardia": "Is there asthma or a slow heart rate?",
    "patient.causal_drug": "Does the person take a retinoid, an EGFR or BRAF inhibitor or an antiretroviral?",
    "patient.keloid": "Does the person form keloids?",
    "patient.cold_urticaria": "Is there cold urticaria or cryoglobulinaemia?",
    "patient.poor_leg_circulation": "Is the circulation of the legs poor (veins, arteries, oedema, diabetes)?",
    "patient.prior_melanoma": "Has the person had a melanoma?",
    "patient.prior_keratinocyte_cancer": "Has the person had a basal or squamous cell carcinoma?",
    "patient.family_melanoma": "How many first-degree relatives had a melanoma?",
    "patient.mole_count": "About how many moles are there?",
    "patient.atypical_moles": "How many of the moles are atypical?",
    "patient.syndrome": "Is a syndrome known (Gorlin, xeroderma pigmentosum, FAMMM)?",
    "patient.bcc_count": "How many basal cell carcinomas so far?",
    "patient.jaw_cysts_or_pits": "Are there jaw cysts or palmar pits?",
    "patient.weight_loss": "Has the person lost weight without trying?",
    "patient.frailty": "Which Clinical Frailty Scale (1 to 9)?",
    "patient.short_life_expectancy": "Is life expectancy under one to two years?",
    "patient.self_treatment": "Can the person, or a carer, apply a cream?",
    "patient.preference": "What matters most: cure, look, few visits, or avoiding surgery?",
    "patient.cosmetic_removal": "Does the person ask to have a harmless lesion removed?",
    "lesion.site": "Where on the body is the lesion?",
    "lesion.diameter_mm": "What is the largest diameter, in mm?",
    "lesion.morphology": "Is it flat, raised or nodular?",
    "lesion.pigmented": "Is it pigmented?",
    "lesion.firm": "Is it firm to the touch?",
    "lesion.new": "Is it new?",
    "lesion.changing": "Is it changing in size, shape or colour?",
    "lesion.growing": "Has it been growing for more than a month?",
    "lesion.fast_growing": "Is it growing fast?",
    "lesion.duration_months": "For how many months has it been there?",
    "lesion.solitary": "Is it unlike the person's other lesions?",
    "lesion.very_dark": "Is it very dark?",
    "lesion.grey_or_asymmetric": "Is it grey or asymmetric under the dermatoscope?",
    "lesion.change_in_size": "Has its size changed (7-point list)?",
    "lesion.irregular_shape": "Is its shape irregular (7-point list)?",
    "lesion.irregular_colour": "Is its colour irregular (7-point list)?",
    "lesion.inflamed": "Is it inflamed (7-point list)?",
    "lesion.oozing": "Does it ooze (7-point list)?",
    "lesion.sensation_changed": "Does it feel different (7-point list)?",
    "lesion.itch": "Does it itch?",
    "lesion.pain": "Is it painful or tender?",
    "lesion.bleeding": "Does it bleed?",
    "lesion.ulcerated": "Is it ulcerated?",
    "lesion.induration": "Is it indurated?",
    "lesion.bothersome": "Does it trouble the person (catches, irritates)?",
    "lesion.recurrent": "Has it come back after treatment?",
    "lesion.prior_radiotherapy": "Was there radiotherapy at this place?",
    "lesion.well_defined": "Is its margin well defined?",
    "lesion.hyperkeratotic": "Is it thick (hyperkeratotic)?",
    "lesion.multiple": "Are there several, or a field of them?",
    "lesion.eruptive": "Did many appear within months?",
    "lesion.congenital": "Has it been there since birth?",
    "lesion.dimple_sign": "Does it dimple when pinched?",
    "lesion.regressing": "Is it regressing?",
    "lesion.perineural": "Is there perineural growth?",
    "lesion.advanced": "Is it locally advanced or metastatic?",
    "lesion.treatment_response": "How did it respond to treatment so far?",
    "lesion.treated_with": "How was it treated so far?",
    "lesion.clear_margins": "Were the margins of the excision clear?",
    "lesion.subtype": "Which subtype does the clinician take it for?",
    "lesion.histology": "What did histology show, if there is any?",
    "lesion.breslow_mm": "What is the Breslow thickness, in mm?",
    "lesion.histology_high_risk": "Does histology show ulceration, mitoses or lymphovascular invasion?",
    "lesion.stage": "Which stage is the melanoma?",
    "lesion.surgery": "Is surgery suitable, unsuitable or declined?",
    "lesion.radiotherapy_suitable": "Is radiotherapy suitable?",
    "lesion.topicals": "Are creams suitable?",
    "lesion.clinician": "Does the clinician find it suspicious or harmless?",
    "lesion.red_flag": "Does the clinician see a red flag?",
    "lesion.clinically_certain": "Is the clinician sure of the diagnosis on sight?",
}


def _of_schema(prefix: str, schema: type[Patient] | type[Lesion]) -> list[Fact]:
    """The fields of a schema as facts; the ids are none."""
    facts = []
    for field, info in schema.model_fields.items():
        if field.endswith("_id"):
            continue
        kind, words = _kind(info.annotation)
        name = f"{prefix}.{field}"
        facts.append(Fact(name, kind, words, _QUESTIONS[name]))
    return facts


def _kind(annotation: Any) -> tuple[Kind, tuple[str, ...]]:
    if annotation == YesNo:
        return "bool", ()
    if get_origin(annotation) is Literal:
        return "choice", tuple(word for word in get_args(annotation) if word != "unknown")
    if get_origin(annotation) is tuple:
        return "set", tuple(word for word in get_args(Allergy) if word != "unknown")
    return "number", ()


_FINDING = [
    *(Fact(f"finding.p_{code}", "number") for code in CODES),  # p_mel: the highest over the lesion's images
    Fact("finding.p_malignant", "number"),  # mel, bcc and akiec together, the highest over the images
    Fact("finding.entropy", "number"),  # nats
    Fact("finding.ood", "bool"),
    Fact("finding.quality", "set", QUALITY_FLAGS),
    Fact("finding.set", "set", CODES),
    Fact("finding.set_size", "number"),
    Fact("finding.prediction", "choice", (*CODES, "none")),
    Fact("finding.disagreement", "bool"),
    Fact("finding.images", "number"),
    Fact("finding.site_calibrated", "bool"),
    Fact("finding.heatmap_shown", "bool"),
    Fact("finding.status", "choice", FINDING_STATUS),
]

_THRESHOLDS = [
    Fact(f"threshold.{name}", "number") for name in ("mel", "mel_review", "malignant", "entropy", "set_size")
]

_SEVEN_POINT_ITEMS = (
    "lesion.change_in_size", "lesion.irregular_shape", "lesion.irregular_colour", "lesion.diameter_mm",
    "lesion.inflamed", "lesion.oozing", "lesion.sensation_changed",
)  # fmt: skip

_DERIVED = [
    Fact("case.dx", "choice", CODES, meaning="G10: class of the histology where known, else the image's prediction"),
    Fact("case.confirmed", "bool", meaning="G10: histology is known"),
    Fact("case.zone", "choice", ("H", "M", "L"), meaning="B04: risk zone of the body site", needs=("lesion.site",)),
    Fact(
        "case.out_of_scope_site", "bool", meaning="G04: a site the model has hardly seen",
        definition=f"lesion.site in [{', '.join(OUT_OF_SCOPE_SITES)}]",
    ),
    Fact(
        "patient.immunosuppressed", "bool", meaning="C23: immunosuppression of any kind",
        definition="patient.immunosuppression != none",
    ),
    Fact(
        "case.seven_point", "number", needs=_SEVEN_POINT_ITEMS,
        meaning="S07: weighted 7-point score; `>= 3` is unknown while open items could still decide it",
    ),
    Fact("case.seven_point_min", "number", meaning="S07: weighted 7-point score, unknown items counted as no"),
    Fact("case.seven_point_max", "number", meaning="S07: weighted 7-point score, unknown items counted as yes"),
    Fact(
        "case.mel_suspected", "bool", meaning="M01: S01, S07, S08, a suspicious clinician, or melanoma in histology",
        definition="""(case.confirmed and lesion.histology in [mel, mel_in_situ]) or (not case.confirmed and any(
            lesion.clinician == suspicious,
            finding.p_mel >= threshold.mel,
            mel in finding.set and (lesion.morphology == nodular or lesion.changing),
            (unknown(lesion.pigmented) or lesion.pigmented) and case.seven_point >= 3,
            lesion.morphology in [raised, nodular] and lesion.firm and lesion.growing,
            lesion.morphology == nodular and any(lesion.changing, lesion.fast_growing, lesion.very_dark)))""",
    ),
    Fact(
        "case.bcc_high_risk", "bool", meaning="B04: any mark of high risk; certainly none is low risk",
        definition="""any(case.zone in [H, M], lesion.diameter_mm >= 20, not lesion.well_defined, lesion.recurrent,
            patient.immunosuppressed, lesion.prior_radiotherapy, lesion.perineural, case.bcc_infiltrative,
            case.confirmed and lesion.histology == bcc_other)""",
    ),
    *(
        Fact(
            f"case.{word}", "bool", meaning=f"{rules}: {word} by histology, or on sight while there is none",
            definition=f"""(case.confirmed and lesion.histology == {word})
                or (not case.confirmed and lesion.subtype == {word})""",
        )
        for word, rules in {
            "ak": "A03", "bowen": "A13", "bcc_superficial": "B09", "bcc_nodular": "B11", "bcc_infiltrative": "B04",
        }.items()
    ),
]  # fmt: skip

FACTS: dict[str, Fact] = {
    fact.name: fact
    for fact in [*_of_schema("patient", Patient), *_of_schema("lesion", Lesion), *_FINDING, *_THRESHOLDS, *_DERIVED]
}
"""Every fact by name, in a fixed order."""

IMAGE_FACTS = frozenset(
    [f"finding.p_{code}" for code in CODES]
    + ["finding.p_malignant", "finding.entropy", "finding.set", "finding.set_size", "finding.prediction"]
    + ["finding.disagreement", "case.dx"]
)
"""Unknown where the picture cannot be assessed; no question makes them known."""


def nearest(word: str, words: list[str] | tuple[str, ...]) -> str | None:
    """The most similar of `words`, for an error message; None if none is similar."""
    close = get_close_matches(word, words, n=1, cutoff=0.6)
    return close[0] if close else None
