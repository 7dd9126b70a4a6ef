"""What a batch has given, read from its output folder: work list, one lesion, failures, tables, pictures.

Nothing is kept in memory between requests but the tables of the few batches that were looked at last, by the time of
their files.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from dermaflow.datasets.images import decode
from dermaflow.errors import DermaflowError
from dermaflow.pathways.outputs.folder import CASES, FHIR, PATHWAYS, TABLE, read_folder
from dermaflow.pathways.outputs.reading import most_urgent_first
from dermaflow.schemas.finding import Finding, LesionFinding, findings_of
from dermaflow.schemas.pathway import Pathway
from dermaflow.schemas.patient import Lesion, Patient
from dermaflow.taxonomy import CODES
from dermaflow.trust.lesions import merge_lesions

FINDINGS, PATHWAYS_FOLDER = "findings.parquet", "pathways"
WIDEST = 1024  # pixels of a picture that is sent
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


class NotThere(DermaflowError):
    """The batch does not hold this."""


def pathways_folder(out: str) -> Path:
    return Path(out) / PATHWAYS_FOLDER


def has_pathways(out: str) -> bool:
    return (pathways_folder(out) / PATHWAYS).exists()


def findings_table(out: str) -> pa.Table:
    """All findings of a finished batch; of one that is under way, those of the committed parts."""
    whole = Path(out) / FINDINGS
    if whole.exists():
        return _table(str(whole), whole.stat().st_mtime_ns)
    logs = sorted(Path(out).glob("log/part-*.json"))
    tables = []
    for log in logs:
        part = Path(out) / "parts" / f"{log.stem}.parquet"
        if part.exists():
            tables.append(pq.read_table(part))
    return pa.concat_tables(tables) if tables else pa.table({"image_id": pa.array([], pa.string())})


@lru_cache(8)
def _table(path: str, _time: int) -> pa.Table:
    return pq.read_table(path)


def failures(out: str, limit: int) -> tuple[int, list[dict[str, Any]]]:
    """Images that gave no class, how many and the first of them."""
    table = findings_table(out)
    if "status" not in table.column_names:
        return 0, []
    rest = table.filter(pc.not_equal(table["status"], "ok")).select(["image_id", "status", "reason"])
    return rest.num_rows, rest.slice(0, limit).to_pylist()


# --- work list ------------------------------------------------------------------------------------------------------


def worklist(out: str, thresholds: dict[str, float]) -> list[dict[str, Any]]:
    """One entry a lesion, the most urgent first; where there is no pathway, flagged ones first, then by p_malignant."""
    signs = tuple(
        (path.stat().st_mtime_ns if path.exists() else 0)
        for path in (Path(out) / FINDINGS, pathways_folder(out) / PATHWAYS, pathways_folder(out) / "audit.jsonl")
    )
    if signs[0] == 0:
        return _worklist(out, thresholds)
    return _kept(out, signs, tuple(sorted(thresholds.items())))


@lru_cache(8)
def _kept(out: str, _signs: tuple[int, ...], thresholds: tuple[tuple[str, float], ...]) -> list[dict[str, Any]]:
    return _worklist(out, dict(thresholds))


def _worklist(out: str, thresholds: dict[str, float]) -> list[dict[str, Any]]:
    table = findings_table(out)
    merged = {finding.lesion_id: finding for finding in merge_lesions(findings_of(table))} if table.num_rows else {}
    pathways: dict[str, Pathway] = {}
    if has_pathways(out):
        pathways = {pathway.lesion_id: pathway for pathway in read_folder(pathways_folder(out))[0]}
    entries = []
    for lesion_id in dict.fromkeys([*merged, *pathways]):
        finding, pathway = merged.get(lesion_id), pathways.get(lesion_id)
        entry = {
            "lesion_id": lesion_id,
            "patient_id": pathway.patient_id if pathway else None,
            "urgency": pathway.urgency if pathway else None,
            "status": finding.status if finding else "missing",
            "prediction": finding.prediction if finding else None,
            "p_malignant": finding.p_malignant if finding else None,
            "conformal_set": list(finding.conformal_set) if finding and finding.status == "ok" else None,
            "flagged": finding is not None and flagged(finding, thresholds),
            "signed": pathway.sign_off.decision if pathway and pathway.sign_off else None,
        }
        if entry["patient_id"] == f"unknown-{lesion_id}":  # nobody: the table of patients did not hold this lesion
            entry["patient_id"] = None
        entries.append((_order(pathway, finding, bool(entry["flagged"]), lesion_id), entry))
    return [entry for _, entry in sorted(entries, key=lambda pair: pair[0])]


def _order(pathway: Pathway | None, finding: LesionFinding | None, suspicious: bool, lesion_id: str) -> tuple[Any, ...]:
    if pathway is not None:
        return (0, *most_urgent_first(pathway))
    p = finding.p_malignant if finding else None
    unread = finding is None or finding.status != "ok"
    return (1, "1" if suspicious else "2" if unread else "3", -(2.0 if p is None else p), "", lesion_id)


def flagged(finding: LesionFinding, thresholds: dict[str, float]) -> bool:
    """Whether a lesion is suspicious by the safety policy of its model (`dermaflow.trust.policy.flag`)."""
    from dermaflow.schemas.bundle import SafetyPolicy
    from dermaflow.trust.policy import flag

    if finding.status != "ok":
        return False
    # the largest of its images, not the mean: any picture may give rise to suspicion
    if finding.prediction in ("mel", "bcc", "akiec"):
        return True
    policy = SafetyPolicy(
        mel_threshold=thresholds.get("policy_mel_threshold"),
        malignant_threshold=thresholds.get("policy_malignant_threshold"),
        use_set=bool(thresholds.get("policy_use_set", 0.0)),
    )
    if policy.mel_threshold is not None and (finding.p_mel_max or 0.0) >= policy.mel_threshold:
        return True
    if policy.malignant_threshold is not None and (finding.p_malignant or 0.0) >= policy.malignant_threshold:
        return True
    sets = np.array([[code in finding.conformal_set for code in CODES]])
    return bool(flag(np.array([finding.p]), sets, SafetyPolicy(use_set=policy.use_set))[0])


# --- one lesion -----------------------------------------------------------------------------------------------------


def lesion_findings(out: str, lesion_id: str) -> list[Finding]:
    """The findings of a lesion's images; of an image without a lesion, by the image's id.

    Raises:
        NotThere: The batch has no such lesion.
    """
    table = findings_table(out)
    if "lesion_id" in table.column_names:
        own = pc.equal(pc.coalesce(table["lesion_id"], table["image_id"]), lesion_id)
        if (found := table.filter(own)).num_rows:
            return findings_of(found)
    raise NotThere("no such lesion in this batch", expected="a lesion_id of the work list")


def lesion_case(out: str, lesion_id: str) -> tuple[Pathway | None, Patient | None, Lesion | None]:
    """The pathway of a lesion and what it was made from; None where there is none."""
    if not has_pathways(out):
        return None, None, None
    folder = pathways_folder(out)
    # a pathway a line: the one that is wanted is parsed, the others are only searched
    needle = json.dumps({"lesion_id": lesion_id}, separators=(",", ":"), ensure_ascii=False)[1:-1].encode()
    pathway = _line(folder / PATHWAYS, needle, Pathway, lambda found: found.lesion_id == lesion_id)
    if pathway is None:
        return None, None, None
    for line in (folder / CASES).read_bytes().splitlines():
        if needle in line:
            content = json.loads(line)
            if content["lesion"]["lesion_id"] == lesion_id:
                return pathway, Patient.model_validate(content["patient"]), Lesion.model_validate(content["lesion"])
    return pathway, None, None


def _line(path: Path, needle: bytes, model: Any, fits: Any) -> Any:
    for line in path.read_bytes().splitlines():
        if needle in line and fits(found := model.model_validate_json(line)):
            return found
    return None


def patient_pathways(out: str, patient_id: str) -> list[Pathway]:
    """The pathways of one person; empty if the batch does not know them."""
    table = pathways_folder(out) / TABLE
    if not table.exists() or not has_pathways(out):
        return []
    if not pc.any(pc.equal(pq.read_table(table, columns=["patient_id"])["patient_id"], patient_id)).as_py():
        return []
    return [p for p in read_folder(pathways_folder(out))[0] if p.patient_id == patient_id]


# --- pictures -------------------------------------------------------------------------------------------------------


def image_bytes(out: str, image_id: str) -> bytes:
    """The image as it was in the source.

    Raises:
        NotThere: The batch has no such image, or it cannot be read any more.
    """
    from dermaflow.scoring.reading import Reader
    from dermaflow.scoring.references import LIMITS, BadMember

    try:
        table = pq.read_table(Path(out) / "inputs.parquet", filters=[("image_id", "=", image_id)])
    except FileNotFoundError:
        raise NotThere("the batch has not begun") from None
    if not table.num_rows:
        raise NotThere("no such image in this batch", expected="an image_id of its findings")
    from types import SimpleNamespace

    row = SimpleNamespace(**table.slice(0, 1).to_pylist()[0])
    with Reader(LIMITS) as reader:
        [[(_, content)]] = list(reader.chunks([row]))
    if isinstance(content, BadMember):
        raise NotThere(f"the image cannot be read: {content.reason}")
    return content


def picture(data: bytes) -> bytes:
    """A JPEG of at most `WIDEST` pixels: what is sent is never what came.

    Raises:
        ImageProblem: The image cannot be read.
    """
    pixels = Image.fromarray(decode(data, 1, WIDEST))
    if pixels.width > WIDEST:
        pixels = pixels.resize((WIDEST, max(1, round(pixels.height * WIDEST / pixels.width))), Image.Resampling.BOX)
    stream = io.BytesIO()
    pixels.save(stream, "JPEG", quality=90)
    return stream.getvalue()


# --- exports --------------------------------------------------------------------------------------------------------


def as_csv(out: str) -> Iterator[bytes]:
    """Findings as CSV. A text that a spreadsheet would take for a formula gets an apostrophe in front."""
    table = findings_table(out)
    yield _csv_rows([table.column_names])
    for batch in table.to_batches(4096):
        rows = ([_cell(value) for value in row.values()] for row in batch.to_pylist())
        yield _csv_rows(rows)


def _cell(value: Any) -> Any:
    if isinstance(value, list):
        value = " ".join(value)
    if isinstance(value, str) and value.startswith(_FORMULA):
        return "'" + value
    return "" if value is None else value


def _csv_rows(rows: Any) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


def as_jsonl(out: str) -> Iterator[bytes]:
    """Findings as JSON, one a line."""
    for batch in findings_table(out).to_batches(4096):
        for row in batch.to_pylist():
            yield json.dumps(row, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


def as_fhir(out: str) -> Iterator[bytes]:
    """The FHIR Bundle of each person, one a line."""
    for path in sorted((pathways_folder(out) / FHIR).glob("*.json")):
        yield json.dumps(json.loads(path.read_bytes()), separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


def fhir_there(out: str) -> bool:
    return (pathways_folder(out) / FHIR).is_dir()
