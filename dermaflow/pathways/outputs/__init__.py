"""What a pathway is written as: FHIR, CDS Hooks cards, pages. Each reads a `Pathway` and nothing behind it."""
