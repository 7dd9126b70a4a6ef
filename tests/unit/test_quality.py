"""The gate lets dermoscopy by, at any size, and stops what is none. The kinds are those of bench/nonlesions.py."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dermaflow.datasets.images import decode
from dermaflow.datasets.quality import FLAG_TEXT, FLAGS, LIMITS, Measures, measure, quality_flags
from dermaflow.datasets.synthetic.generate import generate

sys.path.append(str(Path(__file__).parents[2] / "bench"))
import nonlesions


@pytest.fixture(scope="module")
def lesions(tmp_path_factory: pytest.TempPathFactory) -> list[np.ndarray]:
    """Synthetic dermoscopy of 200 x 150 pixels."""
    folder = tmp_path_factory.mktemp("quality") / "data"
    generate(folder, 60, 3, height=150, width=200)
    return [decode(path.read_bytes(), 150, 200) for path in sorted(folder.glob("*part_*/*.jpg"))]


def caught(images: list[np.ndarray]) -> float:
    return float(np.mean([bool(quality_flags(image)) for image in images]))


def test_every_flag_has_a_limit_and_a_text_and_every_limit_a_measure() -> None:
    assert {limit.flag for limit in LIMITS} == set(FLAGS) == set(FLAG_TEXT)
    assert {limit.measure for limit in LIMITS} == set(Measures.__dataclass_fields__)


def test_synthetic_lesions_mostly_pass(lesions: list[np.ndarray]) -> None:
    assert caught(lesions) <= 0.1


@pytest.mark.parametrize("kind", sorted(set(nonlesions.DRAWN) - {"scenes in skin colours"}))
@pytest.mark.parametrize("height", [150, 450])
def test_what_is_no_lesion_is_stopped(kind: str, height: int) -> None:
    draw = partial(nonlesions.DRAWN[kind], height=height, width=height * 4 // 3)
    assert caught([draw(np.random.default_rng(seed)) for seed in range(12)]) >= 0.9


@pytest.mark.parametrize(
    ("kind", "flag"),
    [
        ("heavy blur", "blur"),
        ("under-exposed", "exposure"),
        ("over-exposed", "exposure"),
        ("ink", "occlusion"),
        ("hair", "occlusion"),
    ],
)
def test_a_spoilt_image_is_flagged_for_what_is_wrong(lesions: list[np.ndarray], kind: str, flag: str) -> None:
    spoilt = [nonlesions.SPOILT[kind](np.random.default_rng(i), image) for i, image in enumerate(lesions[:20])]
    assert np.mean([flag in quality_flags(image) for image in spoilt]) >= 0.85


def test_a_blank_image_and_a_black_one_have_no_lesion() -> None:
    for value in (0, 128, 255):
        assert "lesion_out_of_frame" in quality_flags(np.full((150, 200, 3), value, np.uint8))


def test_a_lesion_at_the_edge_is_out_of_frame() -> None:
    y, x = np.mgrid[0:150, 0:200]
    rng = np.random.default_rng(0)
    for shift, expected in ((0, False), (95, True)):
        spot = np.hypot(x - 100 - shift, y - 75)[..., None] < 35
        image = np.where(spot, [110, 62, 45], [214, 162, 150]) + rng.normal(0, 4, (150, 200, 3))
        assert ("lesion_out_of_frame" in quality_flags(image.astype(np.uint8))) == expected


def test_the_size_of_the_picture_does_not_matter(lesions: list[np.ndarray]) -> None:
    for image in lesions[:10]:
        larger = np.asarray(Image.fromarray(image).resize((600, 450), Image.Resampling.BICUBIC))
        small, large = measure(image), measure(larger)
        assert large.brightness == pytest.approx(small.brightness, abs=0.01)
        assert large.contrast == pytest.approx(small.contrast, abs=0.02)
        assert large.offset == pytest.approx(small.offset, abs=0.02)
        assert large.sharpness == pytest.approx(small.sharpness, rel=0.12)


def test_a_square_picture_is_judged_as_a_whole_and_an_upright_one_as_it_would_lie(lesions: list[np.ndarray]) -> None:
    for image in lesions[:10]:
        lying = np.asarray(Image.fromarray(image).resize((600, 450), Image.Resampling.BICUBIC))
        square = np.asarray(Image.fromarray(image).resize((600, 600), Image.Resampling.BICUBIC))
        whole, squeezed = measure(lying), measure(square)
        assert squeezed.offset == pytest.approx(whole.offset, abs=0.02)
        assert squeezed.contrast == pytest.approx(whole.contrast, abs=0.02)
        assert measure(lying.transpose(1, 0, 2)) == whole


@pytest.mark.parametrize("shape", [(1, 1), (3, 400), (400, 3), (150, 200), (97, 331)])
def test_any_shape_gives_an_answer(shape: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    assert set(quality_flags(image)) <= set(FLAGS)


@pytest.mark.realdata
@pytest.mark.skipif("DERMAFLOW_DATA" not in os.environ, reason="needs the real HAM10000 in DERMAFLOW_DATA")
def test_real_images_pass_at_both_sizes() -> None:
    """False alarms on real dermoscopy, and the same answer at 600x450 as at 200x150."""
    root = Path(os.environ["DERMAFLOW_DATA"])
    large = sorted((root / "originals_600x450_sample").rglob("*.jpg"))
    if not large:
        pytest.skip("no sample of originals in DERMAFLOW_DATA")
    small = {path.name: path for path in root.glob("HAM10000_images_part_*/*.jpg")}
    answers = [
        [quality_flags(decode(path.read_bytes(), 150, 200)) for path in (original, small[original.name])]
        for original in large
    ]
    assert np.mean([bool(flags) for _, flags in answers]) <= 0.04  # 225 images: 2 % and two standard errors
    assert np.mean([first != second for first, second in answers]) <= 0.02
