"""Several images of one lesion, one finding: a lesion is treated, not a picture.

- The prediction is the most severe of the images' predictions (order of severity: `taxonomy.DIAGNOSES`).
- The probabilities are the mean over the images; ``p_mel_max`` and ``p_malignant`` are the maximum, because the safety
  policy asks whether any picture gives rise to suspicion.
- The set is the union of the sets, so it covers at least as often as each of them.
- Images that disagree on malignant yes or no are flagged: a person has to look.
- Images that could not be assessed are left out and named in the reason; if none is left, neither is the lesion.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from dermaflow.errors import DataError
from dermaflow.schemas.finding import Finding, LesionFinding
from dermaflow.taxonomy import CODES, DIAGNOSES, INDEX, MALIGNANT


def merge_lesions(findings: Iterable[Finding]) -> list[LesionFinding]:
    """One finding a lesion, in the order in which the lesions first appear.

    Args:
        findings: Of one model. An image without a lesion id is a lesion of its own, under the image's id.

    Raises:
        DataError: As in `merge_lesion`.
    """
    lesions: dict[str, list[Finding]] = {}
    for finding in findings:
        lesions.setdefault(finding.lesion_id or finding.image_id, []).append(finding)
    return [merge_lesion(lesion_id, images) for lesion_id, images in lesions.items()]


def merge_lesion(lesion_id: str, findings: list[Finding]) -> LesionFinding:
    """Merge the findings of the images of one lesion.

    Raises:
        DataError: There is no finding, an image comes twice, or the findings are of different models.
    """
    ids = sorted(finding.image_id for finding in findings)
    models = {(finding.model, finding.model_sha256) for finding in findings}
    if len(set(ids)) != len(ids) or len(models) != 1:
        raise DataError(
            f"{len(ids)} findings of {len(set(ids))} images by {len(models)} models", where=f"lesion {lesion_id}",
            expected="one finding for each of its images, all by one model",
        )  # fmt: skip
    model, sha256 = models.pop()
    assessable = [finding for finding in findings if finding.status == "ok"]
    left_out = [finding for finding in findings if finding.status != "ok"]
    if not assessable:
        unusable = any(finding.status == "not_assessable" for finding in findings)
        return LesionFinding(
            lesion_id=lesion_id, image_ids=tuple(ids), ood=any(finding.ood for finding in findings),
            quality_flags=_flags(findings), status="not_assessable" if unusable else "failed",
            reason="; ".join(dict.fromkeys(str(finding.reason) for finding in findings)),
            model=model, model_sha256=sha256,
        )  # fmt: skip
    p = np.array([[getattr(finding, f"p_{code}") for code in CODES] for finding in assessable], dtype=np.float64)
    mean = p.mean(axis=0) / p.mean(axis=0).sum()  # float32 rows sum to 1 only nearly
    predicted = [INDEX[str(finding.prediction)] for finding in assessable]
    named = {code for finding in assessable for code in finding.conformal_set or ()}
    return LesionFinding(
        lesion_id=lesion_id,
        image_ids=tuple(ids),
        p=tuple(mean.tolist()),
        prediction=CODES[min(predicted, key=lambda k: DIAGNOSES[k].severity)],
        conformal_set=tuple(code for code in CODES if code in named),
        p_malignant=float(max(finding.p_malignant or 0.0 for finding in assessable)),
        p_mel_max=float(p[:, INDEX["mel"]].max()),
        ood=any(finding.ood for finding in assessable),
        quality_flags=_flags(assessable),
        disagreement=len({MALIGNANT[k] for k in predicted}) > 1,
        status="ok",
        reason=f"{len(left_out)} of {len(ids)} images left out: "
        + "; ".join(f"{finding.image_id} {finding.reason}" for finding in left_out)
        if left_out
        else None,
        model=model,
        model_sha256=sha256,
    )


def _flags(findings: list[Finding]) -> tuple[str, ...]:
    return tuple(sorted({flag for finding in findings for flag in finding.quality_flags}))
