"""The person a lesion belongs to and what a clinician knows of the lesion.

Every field may be unknown, and unknown never means no: ``unknown`` in words, None in numbers. No names, dates of birth
or record numbers: a patient is an id that the sender can map back.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

YesNo = Literal["yes", "no", "unknown"]
Sex = Literal["female", "male", "other", "unknown"]

Implant = Literal["none", "pacemaker", "icd", "other", "unknown"]
Immunosuppression = Literal["none", "transplant", "cll", "hiv", "drug", "other", "unknown"]
Anticoagulant = Literal["none", "warfarin", "doac", "antiplatelet", "unknown"]
Allergy = Literal[
    "none", "peanut", "soya", "arachis", "lidocaine", "nsaid", "adhesive", "chlorhexidine", "other", "unknown"
]
Syndrome = Literal["none", "gorlin", "xeroderma", "fammm", "unknown"]
Preference = Literal["cure_first", "cosmesis", "fewest_visits", "avoid_surgery", "unknown"]

BodySite = Literal[
    "abdomen", "acral", "back", "chest", "ear", "face", "foot", "genital", "hand", "lower extremity", "neck", "scalp",
    "trunk", "upper extremity", "cheek", "forehead", "nose", "lip", "eyelid", "pretibia", "palm", "sole", "nail",
    "mucosa", "unknown",
]  # fmt: skip
"""The terms of HAM10000's ``localization``, and finer ones that a clinician may give."""

Morphology = Literal["flat", "raised", "nodular", "unknown"]
Histology = Literal[
    "unknown", "mel", "mel_in_situ", "nv", "bcc_superficial", "bcc_nodular", "bcc_infiltrative", "bcc_other", "ak",
    "bowen", "scc", "bkl", "df", "vasc", "other",
]  # fmt: skip
Subtype = Literal[
    "unknown", "ak", "bowen", "cheilitis", "seborrhoeic_keratosis", "solar_lentigo", "lplk", "angioma",
    "pyogenic_granuloma", "angiokeratoma", "haemorrhage", "bcc_superficial", "bcc_nodular", "bcc_infiltrative",
    "lentigo_maligna", "spitzoid", "other",
]  # fmt: skip
"""What a clinician takes the lesion for on sight, inside one of the seven diagnoses; ``other`` is none of these."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Patient(_Strict):
    """A person; the defaults know nothing."""

    patient_id: str = Field(min_length=1)
    age: float | None = Field(None, ge=0, le=120, description="years")
    sex: Sex = "unknown"
    fitzpatrick: int | None = Field(None, ge=1, le=6, description="skin type I to VI as 1 to 6")
    pregnant: YesNo = "unknown"
    third_trimester: YesNo = "unknown"
    breast_feeding: YesNo = "unknown"
    could_become_pregnant: YesNo = "unknown"
    partner_could_become_pregnant: YesNo = "unknown"
    immunosuppression: Immunosuppression = "unknown"
    anticoagulant: Anticoagulant = "unknown"
    inr: float | None = Field(None, ge=0.5, le=20)
    implant: Implant = "unknown"
    allergies: tuple[Allergy, ...] = ("unknown",)
    dpd_deficiency: YesNo = "unknown"
    porphyria: YesNo = "unknown"
    photosensitising: YesNo = Field("unknown", description="a photosensitising drug or disease")
    autoimmune_disease: YesNo = "unknown"
    asthma_or_bradycardia: YesNo = "unknown"
    causal_drug: YesNo = Field("unknown", description="retinoid, EGFR or BRAF inhibitor, antiretroviral")
    keloid: YesNo = "unknown"
    cold_urticaria: YesNo = Field("unknown", description="or cryoglobulinaemia")
    poor_leg_circulation: YesNo = Field("unknown", description="venous or arterial disease, oedema, diabetes")
    prior_melanoma: YesNo = "unknown"
    prior_keratinocyte_cancer: YesNo = "unknown"
    family_melanoma: int | None = Field(None, ge=0, le=20, description="first-degree relatives with melanoma")
    mole_count: int | None = Field(None, ge=0, le=2000)
    atypical_moles: int | None = Field(None, ge=0, le=500)
    syndrome: Syndrome = "unknown"
    bcc_count: int | None = Field(None, ge=0, le=200, description="basal cell carcinomas so far")
    jaw_cysts_or_pits: YesNo = "unknown"
    weight_loss: YesNo = "unknown"
    frailty: int | None = Field(None, ge=1, le=9, description="Clinical Frailty Scale")
    short_life_expectancy: YesNo = Field("unknown", description="under one to two years")
    self_treatment: YesNo = Field("unknown", description="can apply a cream, or has a carer who can")
    preference: Preference = "unknown"
    cosmetic_removal: YesNo = Field("unknown", description="asks to have a harmless lesion removed")


class Lesion(_Strict):
    """What is known of one lesion beside its pictures."""

    lesion_id: str = Field(min_length=1)
    site: BodySite = "unknown"
    diameter_mm: float | None = Field(None, gt=0, le=1000)
    morphology: Morphology = "unknown"
    pigmented: YesNo = "unknown"
    firm: YesNo = "unknown"
    new: YesNo = "unknown"
    changing: YesNo = Field("unknown", description="in size, shape or colour")
    growing: YesNo = Field("unknown", description="for more than a month")
    fast_growing: YesNo = "unknown"
    duration_months: float | None = Field(None, ge=0, le=1500)
    solitary: YesNo = Field("unknown", description="unlike the person's other lesions")
    very_dark: YesNo = "unknown"
    grey_or_asymmetric: YesNo = "unknown"
    change_in_size: YesNo = "unknown"
    irregular_shape: YesNo = "unknown"
    irregular_colour: YesNo = "unknown"
    inflamed: YesNo = "unknown"
    oozing: YesNo = "unknown"
    sensation_changed: YesNo = "unknown"
    itch: YesNo = "unknown"
    pain: YesNo = Field("unknown", description="pain or tenderness")
    bleeding: YesNo = "unknown"
    ulcerated: YesNo = "unknown"
    induration: YesNo = "unknown"
    bothersome: YesNo = Field("unknown", description="irritates, catches, troubles")
    recurrent: YesNo = "unknown"
    prior_radiotherapy: YesNo = Field("unknown", description="at this place")
    well_defined: YesNo = Field("unknown", description="margin")
    hyperkeratotic: YesNo = Field("unknown", description="thick")
    multiple: YesNo = Field("unknown", description="several or a field of them")
    eruptive: YesNo = Field("unknown", description="many within months")
    congenital: YesNo = "unknown"
    dimple_sign: YesNo = "unknown"
    regressing: YesNo = "unknown"
    perineural: YesNo = "unknown"
    advanced: YesNo = Field("unknown", description="locally advanced or metastatic")
    treatment_response: Literal["none_given", "complete", "partial", "failed", "unknown"] = "unknown"
    treated_with: Literal["none", "surgery", "topical", "pdt", "other", "unknown"] = "unknown"
    clear_margins: YesNo = "unknown"
    subtype: Subtype = "unknown"
    histology: Histology = "unknown"
    breslow_mm: float | None = Field(None, ge=0, le=100)
    histology_high_risk: YesNo = Field("unknown", description="ulceration, mitoses or lymphovascular invasion")
    stage: Literal["unknown", "0", "IA", "IB", "IIA", "IIB", "IIC", "IIIA", "IIIB", "IIIC", "IIID", "IV"] = "unknown"
    surgery: Literal["suitable", "unsuitable", "declined", "unknown"] = "unknown"
    radiotherapy_suitable: YesNo = "unknown"
    topicals: Literal["suitable", "unsuitable", "unknown"] = "unknown"
    clinician: Literal["suspicious", "benign", "unknown"] = Field("unknown", description="the clinician's own view")
    red_flag: YesNo = Field("unknown", description="a clinician's red flag")
    clinically_certain: YesNo = Field("unknown", description="the clinician is sure of the diagnosis on sight")
