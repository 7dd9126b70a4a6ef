"""Drawn patients: one a lesion, seeded, read by the intake, with gaps, and nothing impossible."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pandas as pd
import pytest

from dermaflow.datasets.synthetic.patients import UNKNOWN_SHARE, draw_patients
from dermaflow.pathways.intake import read_cases


@pytest.fixture(scope="module")
def images() -> pd.DataFrame:
    """400 lesions of two images each, every tenth without an age."""
    lesions = pd.DataFrame(
        {
            "lesion_id": [f"HAM_{9_000_000 + i}" for i in range(400)],
            "age": [float("nan") if i % 10 == 0 else float(20 + 5 * (i % 13)) for i in range(400)],
            "sex": ["female" if i % 2 else "male" for i in range(400)],
            "localization": ["back" if i % 3 else "face" for i in range(400)],
        }
    )
    return pd.concat([lesions, lesions], ignore_index=True)


def test_one_patient_a_lesion_whatever_the_order_of_the_images(images: pd.DataFrame) -> None:
    drawn = draw_patients(images, 0)
    assert len(drawn) == 400 and drawn["lesion_id"].is_unique and drawn["patient_id"].is_unique
    pd.testing.assert_frame_equal(drawn, draw_patients(images.sample(frac=1, random_state=1), 0))
    assert not drawn.equals(draw_patients(images, 1))


def test_the_intake_reads_them_and_gaps_stay_unknown(images: pd.DataFrame, tmp_path: Path) -> None:
    drawn = draw_patients(images, 0)
    drawn.to_csv(tmp_path / "patients.csv", index=False)
    cases = read_cases(tmp_path / "patients.csv", as_of=date(2026, 1, 1))
    assert [case.lesion.lesion_id for case in cases] == drawn["lesion_id"].tolist()
    assert sum(case.patient.age is None for case in cases) == 40
    gaps = sum(case.patient.immunosuppression == "unknown" for case in cases) / 400
    assert abs(gaps - UNKNOWN_SHARE) < 0.06
    assert sum(case.patient.fitzpatrick is None for case in cases) / 400 == pytest.approx(UNKNOWN_SHARE, abs=0.06)


def test_only_women_of_an_age_to_be_are_pregnant(images: pd.DataFrame) -> None:
    drawn = pd.concat([draw_patients(images, seed) for seed in range(5)])
    pregnant = drawn[drawn["pregnant"] == "yes"]
    assert len(pregnant) > 10
    assert (pregnant["sex"] == "female").all() and pregnant["age"].between(15, 50).all()
    assert set(drawn.loc[drawn["age"].isna(), "pregnant"]) == {"unknown"}, "a man of unknown age is asked, too"
