"""The synthetic HAM10000: layout, reproducibility, marginals, and that colour alone does not give the classes away."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dermaflow.datasets.synthetic import generate
from dermaflow.datasets.synthetic.generate import COLUMNS, View, draw_view
from dermaflow.datasets.synthetic.lesions import KINDS, Film, draw_lesion
from dermaflow.datasets.synthetic.marginals import AGES, IMAGES, LEAST_LESIONS, SEX, Lesion, draw_lesions, image_quotas
from dermaflow.datasets.synthetic.scene import SITES
from dermaflow.errors import DataError, StorageError
from dermaflow.taxonomy import CODES

SMALL = {"height": 60, "width": 80}


def read_all(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synthetic") / "ham"
    generate(out, 300, 7, height=75, width=100)
    return out


@pytest.fixture(scope="module")
def table(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "HAM10000_metadata.csv")


@pytest.fixture(scope="module")
def lesions() -> list[Lesion]:
    """As many as in the real HAM10000."""
    return draw_lesions(np.random.default_rng(1), 10_015)


def test_the_same_seed_writes_the_same_bytes_whatever_the_workers(tmp_path: Path) -> None:
    generate(tmp_path / "one", 24, 3, **SMALL)
    generate(tmp_path / "again", 24, 3, **SMALL)
    generate(tmp_path / "two", 24, 3, workers=2, **SMALL)
    one = read_all(tmp_path / "one")
    assert len(one) == 49
    assert one == read_all(tmp_path / "again")
    assert one == read_all(tmp_path / "two")


def test_another_seed_draws_other_lesions(tmp_path: Path) -> None:
    generate(tmp_path / "a", 8, 3, **SMALL)
    generate(tmp_path / "b", 8, 4, **SMALL)
    a, b = read_all(tmp_path / "a"), read_all(tmp_path / "b")
    assert a.keys() == b.keys()
    assert all(a[name] != b[name] for name in a)


def test_an_existing_folder_is_replaced_as_a_whole_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    out = tmp_path / "ham"
    generate(out, 9, 1, **SMALL)
    generate(out, 7, 1, **SMALL)
    assert len(list(out.glob("*/*.jpg"))) == 7

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    before = read_all(out)
    with pytest.raises(KeyboardInterrupt):
        generate(out, 9, 2, progress=stop, **SMALL)
    assert read_all(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["ham"]


def test_progress_and_summary_count_what_was_written(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    summary = generate(tmp_path / "ham", 10, 5, progress=lambda done, total: seen.append((done, total)), **SMALL)
    table = pd.read_csv(tmp_path / "ham" / "HAM10000_metadata.csv")
    assert seen == [(i, 10) for i in range(1, 11)]
    assert summary.images == 10
    assert summary.lesions == table.lesion_id.nunique()
    assert summary.counts == {code: (table.dx == code).sum() for code in CODES}
    assert list(summary.counts) == list(CODES)


def test_the_layout_is_the_published_one(folder: Path, table: pd.DataFrame) -> None:
    assert tuple(table.columns) == COLUMNS
    assert table.image_id.is_unique
    assert sorted(p.name for p in folder.iterdir()) == [
        "HAM10000_images_part_1", "HAM10000_images_part_2", "HAM10000_metadata.csv", "HAM10000_segmentations",
    ]  # fmt: skip
    for part in (1, 2):
        assert len(list((folder / f"HAM10000_images_part_{part}").iterdir())) == 150
    images = {p.stem: p for p in folder.glob("HAM10000_images_part_*/*.jpg")}
    assert set(images) == set(table.image_id)
    for name, path in images.items():
        with Image.open(path) as image, Image.open(folder / f"HAM10000_segmentations/{name}_segmentation.png") as mask:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (100, 75))
            assert (mask.format, mask.mode, mask.size) == ("PNG", "L", (100, 75))


def test_numbers_do_not_meet_those_of_real_images(table: pd.DataFrame) -> None:
    assert table.image_id.str.fullmatch(r"ISIC_9\d{6}").all()
    assert table.lesion_id.str.fullmatch(r"HAM_9\d{6}").all()


def test_masks_hold_a_lesion_of_plausible_size_that_differs_from_the_skin(folder: Path, table: pd.DataFrame) -> None:
    shares, contrasts = [], []
    for path in folder.glob("HAM10000_images_part_*/*.jpg"):
        mask = np.asarray(Image.open(folder / f"HAM10000_segmentations/{path.stem}_segmentation.png"))
        assert set(np.unique(mask)) == {0, 255}
        image = np.asarray(Image.open(path).convert("L"), float)
        shares.append((mask > 0).mean())
        contrasts.append(np.median(image[mask == 0]) - np.median(image[mask > 0]))
    assert min(shares) > 0.015 and max(shares) < 0.8
    assert 0.1 < np.median(shares) < 0.35
    assert np.mean(np.array(contrasts) > 5) > 0.8  # nearly every lesion is darker than the skin around it


def test_all_classes_and_sites_are_there_and_sisters_agree(table: pd.DataFrame) -> None:
    assert set(table.dx) == set(CODES)
    assert set(table.dataset) == set(SITES)
    assert (table.groupby("lesion_id")[["dx", "dx_type", "sex", "localization", "dataset"]].nunique() == 1).all(
        axis=None
    )
    sizes = table.groupby("lesion_id").size()
    assert 1.2 < sizes.mean() < 1.5
    assert (sizes > 1).sum() > 30
    assert table[table.dataset == "vidir_molemax"].lesion_id.is_unique


@pytest.mark.parametrize("images", [70, 100, 333, 2000])
def test_small_sets_have_lesions_enough_to_split_every_class(images: int) -> None:
    lesions = draw_lesions(np.random.default_rng(0), images)
    assert sum(lesion.images for lesion in lesions) == images
    for code in CODES:
        assert sum(lesion.dx == code for lesion in lesions) >= LEAST_LESIONS


def test_beyond_the_floor_the_class_mix_is_the_real_one() -> None:
    assert image_quotas(10_015) == IMAGES
    assert image_quotas(7) == dict.fromkeys(CODES, 1)
    with pytest.raises(DataError, match="at least 7"):
        image_quotas(6)


def share(lesions: list[Lesion], code: str, test: Callable[[Lesion], bool]) -> float:
    return float(np.mean([test(lesion) for lesion in lesions if lesion.dx == code]))


def test_patients_are_as_in_the_real_data(lesions: list[Lesion]) -> None:
    """Real figures: lesions and images of HAM10000's metadata; tolerances are about four standard errors."""
    assert len(lesions) == pytest.approx(7470, abs=200)
    melanomas = [lesion.images for lesion in lesions if lesion.dx == "mel"]
    assert np.mean(melanomas) == pytest.approx(1113 / 614, abs=0.15)
    for code, mean in {"akiec": 66.5, "bcc": 66.8, "bkl": 64.3, "mel": 60.7, "nv": 46.5}.items():
        ages = [lesion.age for lesion in lesions if lesion.dx == code and lesion.age is not None]
        assert np.mean(ages) == pytest.approx(mean, abs=4)
        assert set(ages) <= {5 * i for i, count in enumerate(AGES[code]) if count}
    assert 10 < sum(lesion.age is None for lesion in lesions) < 100
    assert share(lesions, "mel", lambda x: x.sex == "male") == pytest.approx(SEX["mel"][1] / 614, abs=0.08)
    assert share(lesions, "df", lambda x: x.localization == "lower extremity") == pytest.approx(54 / 73, abs=0.2)
    assert share(lesions, "nv", lambda x: x.dx_type == "follow_up") == pytest.approx(3704 / 5403, abs=0.03)
    assert share(lesions, "mel", lambda x: x.dx_type == "histo") == 1
    assert share(lesions, "akiec", lambda x: x.site in ("vidir_molemax", "vienna_dias")) == 0
    assert share(lesions, "nv", lambda x: x.site == "vidir_molemax") == pytest.approx(3720 / 5403, abs=0.03)


def test_sisters_show_the_same_lesion_in_another_pose() -> None:
    lesion = draw_lesions(np.random.default_rng(0), 70)[0]
    (first, mask), (second, other) = (draw_view(View(i, lesion), seed=1, height=75, width=100) for i in (0, 1))
    assert first != second and mask != other
    film, inside = draw_lesion("mel", np.random.default_rng(2), 75)
    again, same = draw_lesion("mel", np.random.default_rng(2), 75)
    assert np.array_equal(film.melanin, again.melanin) and np.array_equal(inside, same)


@pytest.mark.parametrize("code", CODES)
def test_a_lesion_ends_within_its_square(code: str) -> None:
    for seed in range(8):
        film, inside = draw_lesion(code, np.random.default_rng(seed), 100)
        rim = np.ones_like(inside)
        rim[2:-2, 2:-2] = False
        assert not inside[rim].any()
        assert film.optics()[0][rim].mean() > 0.93  # almost clear, so that no square shows


def test_each_class_has_its_own_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Means over typical lesions, inside the mask, of what the criteria of each class are made of."""
    monkeypatch.setattr("dermaflow.datasets.synthetic.lesions.ATYPICAL", dict.fromkeys(KINDS, 0.0))

    def mean(code: str, mark: Callable[[Film, np.ndarray], float]) -> float:
        drawn = [draw_lesion(code, np.random.default_rng(seed), 150) for seed in range(24)]
        return float(np.mean([mark(film, inside) for film, inside in drawn]))

    def amount(name: str) -> Callable[[Film, np.ndarray], float]:
        return lambda film, inside: getattr(film, name)[inside].mean()

    assert mean("mel", amount("deep")) > 10 * mean("nv", amount("deep")) + 0.05  # blue-white veil
    assert mean("vasc", amount("blood")) > 2 * mean("nv", amount("blood"))  # lacunae
    assert mean("akiec", amount("keratin")) > 0.05 > mean("nv", amount("keratin"))  # scale
    assert mean("nv", amount("melanin")) > 3 * mean("bcc", amount("melanin"))  # pearly, not brown

    def central_white(film: Film, inside: np.ndarray) -> float:
        middle = slice(int(0.45 * len(inside)), int(0.55 * len(inside)))
        return film.white[middle, middle].mean() - film.white[inside].mean()

    assert mean("df", central_white) > 0.2 > mean("bkl", central_white)


def test_bad_requests_say_what_is_possible(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least 48 pixels"):
        generate(tmp_path / "x", 10, 0, height=20, width=30)
    with pytest.raises(DataError, match="0 or more"):
        generate(tmp_path / "x", 10, -1, **SMALL)
    with pytest.raises(DataError, match="at least 7"):
        generate(tmp_path / "x", 3, 0, **SMALL)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file/x"):
        generate(tmp_path / "file" / "x", 7, 0, **SMALL)


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StorageError, match="No space left on device"):
        generate(tmp_path / "ham", 7, 0, **SMALL)
    assert not list(tmp_path.iterdir())


def test_mean_colour_does_not_separate_the_classes_but_structure_helps(tmp_path: Path) -> None:
    """Logistic regression on the mean colour stays weak; adding local contrast at three scales beats it clearly."""
    generate(tmp_path / "ham", 700, 12, height=75, width=100)
    table = pd.read_csv(tmp_path / "ham" / "HAM10000_metadata.csv")
    paths = {p.stem: p for p in (tmp_path / "ham").glob("HAM10000_images_part_*/*.jpg")}
    pixels = np.stack([np.asarray(Image.open(paths[name]), np.float32) / 255 for name in table.image_id])
    colour = pixels.mean((1, 2))
    blurred = [pixels, *(gaussian_filter(pixels, (0, s, s, 0)) for s in (1, 3, 9))]
    contrast = np.concatenate([(a - b).std((1, 2)) for a, b in itertools.pairwise(blurred)], 1)

    def score(features: np.ndarray) -> float:
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, class_weight="balanced"))
        folds = StratifiedGroupKFold(3, shuffle=True, random_state=0)
        guess = cross_val_predict(model, features, table.dx, groups=table.lesion_id, cv=folds)
        return balanced_accuracy_score(table.dx, guess)

    weak, better = score(colour), score(np.concatenate([colour, contrast], 1))
    assert 1 / 7 + 0.05 < weak < 0.6
    assert better > weak + 0.08
