"""Several images, one lesion: the rules of the merge, one by one."""

from __future__ import annotations

import itertools

import pytest

from dermaflow.errors import DataError
from dermaflow.schemas.finding import Finding
from dermaflow.taxonomy import CODES
from dermaflow.trust.lesions import merge_lesion, merge_lesions


def finding(image_id: str, lesion_id: str | None = "L", sets: list[str] | None = None, **p: float) -> Finding:
    named = {f"p_{code}": p.get(code, 0.0) for code in CODES}
    prediction = max(CODES, key=lambda code: p.get(code, 0.0))
    return Finding(
        image_id=image_id, lesion_id=lesion_id, **named, prediction=prediction, conformal_set=sets or [prediction],
        p_malignant=p.get("mel", 0.0) + p.get("bcc", 0.0) + p.get("akiec", 0.0), ood_score=0.1, status="ok", model="m",
        model_sha256="s",
    )  # fmt: skip


def refused(image_id: str, status: str = "not_assessable", flags: tuple[str, ...] = (), ood: bool = False) -> Finding:
    return Finding(
        image_id=image_id, lesion_id="L", status=status, reason=f"because of {image_id}", quality_flags=list(flags),
        ood=ood, model="m", model_sha256="s",
    )  # fmt: skip


NEVUS = finding("b", nv=0.7, mel=0.2, bkl=0.1)
MELANOMA = finding("a", sets=["mel", "nv"], mel=0.6, nv=0.4)


def test_the_most_severe_wins_and_disagreement_is_flagged() -> None:
    merged = merge_lesion("L", [NEVUS, MELANOMA])
    assert merged.prediction == "mel" and merged.disagreement and merged.status == "ok" and merged.reason is None
    assert merged.image_ids == ("a", "b")
    assert merged.conformal_set == ("mel", "nv")
    assert dict(zip(CODES, merged.p, strict=True)) == pytest.approx(
        dict.fromkeys(CODES, 0.0) | {"nv": 0.55, "mel": 0.4, "bkl": 0.05}
    )
    assert merged.p_mel_max == pytest.approx(0.6) and merged.p_malignant == pytest.approx(0.6)


def test_severity_not_probability_decides() -> None:
    order = ["mel", "bcc", "akiec", "vasc", "bkl", "df", "nv"]
    for worse, milder in itertools.combinations(order, 2):
        merged = merge_lesion("L", [finding("a", **{worse: 0.5, milder: 0.4}), finding("b", **{milder: 1.0})])
        assert merged.prediction == worse
        assert merged.disagreement == (worse in order[:3] and milder not in order[:3])


def test_order_of_the_images_does_not_matter() -> None:
    images = [NEVUS, MELANOMA, refused("c", flags=("blur",))]
    merged = {merge_lesion("L", list(order)).model_dump_json() for order in itertools.permutations(images[:2])}
    assert len(merged) == 1


def test_what_cannot_be_assessed_is_left_out_and_named() -> None:
    merged = merge_lesion("L", [NEVUS, refused("c", flags=("blur",)), refused("d", "failed")])
    assert merged.status == "ok" and merged.prediction == "nv" and merged.quality_flags == () and not merged.ood
    assert merged.reason == "2 of 3 images left out: c because of c; d because of d"
    assert merged.image_ids == ("b", "c", "d")


def test_without_an_assessable_image_no_class_is_said() -> None:
    merged = merge_lesion(
        "L", [refused("c", flags=("occlusion", "blur")), refused("d", "failed"), refused("e", ood=True)]
    )
    assert merged.status == "not_assessable" and merged.ood and merged.quality_flags == ("blur", "occlusion")
    assert (merged.p, merged.prediction, merged.conformal_set, merged.p_malignant, merged.p_mel_max) == (
        (), None, (), None, None,
    )  # fmt: skip
    assert merge_lesion("L", [refused("d", "failed")]).status == "failed"


def test_lesions_are_grouped_and_an_image_without_lesion_stands_alone() -> None:
    merged = merge_lesions([NEVUS, finding("x", None, df=1.0), MELANOMA, finding("y", None, vasc=1.0)])
    assert [(lesion.lesion_id, lesion.prediction) for lesion in merged] == [("L", "mel"), ("x", "df"), ("y", "vasc")]


@pytest.mark.parametrize(
    "images", [[], [NEVUS, NEVUS], [NEVUS, MELANOMA.model_copy(update={"model_sha256": "another"})]]
)
def test_what_does_not_belong_together_is_refused(images: list[Finding]) -> None:
    with pytest.raises(DataError, match=r"lesion L: .* expected one finding for each of its images, all by one model"):
        merge_lesion("L", images)
