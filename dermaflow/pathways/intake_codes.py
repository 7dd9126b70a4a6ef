"""Codes of other systems that say something of a patient: LOINC, SNOMED CT, ICD-10 and ATC.

Few and well known ones; a site checks them on its terminology server and adds its own. A code that is not here leaves
the field unknown.
"""

from __future__ import annotations

LOINC, SNOMED, ATC = "http://loinc.org", "http://snomed.info/sct", "http://www.whocc.no/atc"
ICD = (
    "http://hl7.org/fhir/sid/icd-10",
    "http://hl7.org/fhir/sid/icd-10-cm",
    "http://fhir.de/CodeSystem/bfarm/icd-10-gm",
)
OBSERVED = {(LOINC, "82810-3"): "pregnant", (LOINC, "6301-6"): "inr"}
ANSWERS = {
    (SNOMED, "77386006"): "yes", (SNOMED, "60001007"): "no",
    (LOINC, "LA15173-0"): "yes", (LOINC, "LA26683-5"): "no", (LOINC, "LA4489-6"): "unknown",
}  # fmt: skip
NO_ALLERGY = (SNOMED, "716186003")
CONDITIONS = (  # ICD-10 begins with, field, value; of several values of one field the first named here stands
    *((f"Z94.{digit}", "immunosuppression", "transplant") for digit in "012348"),  # not cornea, skin or bone
    ("C91.1", "immunosuppression", "cll"),
    *((f"B{number}", "immunosuppression", "hiv") for number in range(20, 25)),
    ("Z21", "immunosuppression", "hiv"),
    ("C43", "prior_melanoma", "yes"),
    ("C44", "prior_keratinocyte_cancer", "yes"),
    *((f"E80.{digit}", "porphyria", "yes") for digit in "012"),
    ("Q82.1", "syndrome", "xeroderma"),
    ("D89.1", "cold_urticaria", "yes"),
    ("L91.0", "keloid", "yes"),
    ("J45", "asthma_or_bradycardia", "yes"),
    ("R00.1", "asthma_or_bradycardia", "yes"),
    *((code, "autoimmune_disease", "yes") for code in ("L93", "M05", "M06", "M32")),
    ("Z95.810", "implant", "icd"),
    ("Z95.0", "implant", "pacemaker"),
)
MEDICATIONS = (  # as above, in ATC
    ("B01AA", "anticoagulant", "warfarin"),
    ("B01AE", "anticoagulant", "doac"),
    ("B01AF", "anticoagulant", "doac"),
    ("B01AC", "anticoagulant", "antiplatelet"),
    ("L04", "immunosuppression", "drug"),
)
SUBSTANCES = {
    "peanut": "peanut", "arachis": "arachis", "soya": "soya", "soy": "soya", "lidocaine": "lidocaine",
    "lignocaine": "lidocaine", "nsaid": "nsaid", "ibuprofen": "nsaid", "diclofenac": "nsaid", "naproxen": "nsaid",
    "aspirin": "nsaid", "acetylsalicylic": "nsaid", "adhesive": "adhesive", "chlorhexidine": "chlorhexidine",
}  # fmt: skip
