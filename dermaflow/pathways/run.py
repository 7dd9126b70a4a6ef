"""From files to a folder: findings and patients in, pathways out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path

from dermaflow import storage
from dermaflow.errors import BundleError, DataError
from dermaflow.pathways.engine import Thresholds, recommend
from dermaflow.pathways.intake import Case, read_cases
from dermaflow.pathways.knowledge import load_knowledge
from dermaflow.pathways.matching import Unmatched, match, read_findings
from dermaflow.pathways.outputs.folder import FORMATS, Progress, Run, write_folder
from dermaflow.schemas.bundle import Bundle
from dermaflow.schemas.pathway import URGENCIES, Pathway

CAUTIOUS = Thresholds(mel=0.10, malignant=0.10, entropy=1.0)
"""Without a bundle: the largest melanoma threshold that the reference allows (D3), the same for all malignant classes,
and half of the entropy that seven equal classes have."""


@dataclass(frozen=True)
class Done:
    """What a run gave."""

    pathways: list[Pathway]
    unmatched: list[Unmatched]
    outdated: list[Pathway]  # signed once, and changed since

    @property
    def urgencies(self) -> dict[str, int]:
        """Lesions by urgency, the most urgent first."""
        counts = Counter(pathway.urgency for pathway in self.pathways)
        return {urgency: counts[urgency] for urgency in URGENCIES}


def recommend_files(
    findings: str | Path,
    patients: str | Path,
    out: Path,
    *,
    formats: Sequence[str] = FORMATS,
    model: str | Path | None = None,
    allow_unmatched: bool = False,
    as_of: date | None = None,
    utilities: Path | None = None,
    progress: Progress | None = None,
) -> Done:
    """Read findings and patients, decide, and write the folder.

    Args:
        findings: Parquet file of findings, one row an image.
        patients: See `read_cases`.
        out: Folder to write, see `dermaflow.pathways.outputs.folder`.
        formats: Of ``json``, ``fhir``, ``html``.
        model: Bundle that made the findings: gives the thresholds. Without it, `CAUTIOUS`.
        allow_unmatched: See `match`.
        as_of: Date at which birth dates become ages; default today.
        utilities: A site's own table of utilities.
        progress: Called with step, done and total.

    Raises:
        DataError: An input is not as it should be, or `as_of` lies in the future.
        BundleError: The bundle is damaged, not calibrated, or did not make the findings.
        SignOffError: The folder's log of sign-offs was tampered with.
    """
    today = datetime.now(UTC).date()
    as_of = as_of or today
    if as_of > today:
        raise DataError(f"{as_of} lies in the future", where="--as-of", expected=f"a date up to today, {today}")
    if unknown := [name for name in formats if name not in FORMATS]:
        raise DataError(f"unknown format {unknown[0]!r}", where="--format", expected=", ".join(FORMATS))
    scored = read_findings(findings)
    thresholds = thresholds_of(model, scored[0].model_sha256) if model else CAUTIOUS
    matched = match(read_cases(patients, as_of=as_of), scored, allow_unmatched=allow_unmatched)
    if not matched.findings:
        raise DataError(
            "no lesion has both a finding and a patient", where=patients, expected=f"lesion ids as in {findings}",
            todo="check that the two files belong together",
        )  # fmt: skip
    decided = recommend(
        matched.patients, matched.lesions, matched.findings, load_knowledge(utilities=utilities), thresholds
    )
    pathways = []
    for i in range(len(decided)):
        pathways.append(decided.pathway(i))
        if progress:
            progress("pathways", i + 1, len(decided))
    run = Run(
        recorded=datetime.now(UTC).replace(microsecond=0), as_of=as_of.isoformat(),
        findings_sha256=storage.sha256_file(findings), patients_sha256=storage.sha256_file(patients),
    )  # fmt: skip
    cases = [Case(patient, lesion) for patient, lesion in zip(matched.patients, matched.lesions, strict=True)]
    outdated = write_folder(
        out, pathways, cases, decided.table(), run, unmatched=matched.unmatched, formats=formats, progress=progress
    )
    return Done(pathways, matched.unmatched, outdated)


def thresholds_of(model: str | Path, findings_sha256: str) -> Thresholds:
    """The thresholds of the bundle that made the findings.

    Raises:
        BundleError: It is damaged or has no calibration, or another model made the findings.
    """
    from dermaflow.bundles.bundle import parse_bundle, read_description

    content, sha256 = read_description(model)
    bundle: Bundle = parse_bundle(content, where=model)
    if sha256 != findings_sha256:
        raise BundleError(
            f"the findings are of model {findings_sha256[:12]}, this is {sha256[:12]}", where=model,
            expected="the bundle that made the findings", todo="give that one, or score the images with this one",
        )  # fmt: skip
    fitted = bundle.calibration
    if fitted is None:
        raise BundleError("no calibration", where=model, todo="calibrate it: dermaflow calibrate")
    return Thresholds.of(fitted)
