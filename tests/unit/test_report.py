"""`write_report`: what the page, the JSON and the card say, and that nothing hostile or half-written gets through."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from ham_predictions import ham_like, ham_like_bundle, lesion_picture
from PIL import Image

from dermaflow import storage
from dermaflow.errors import BundleError, DataError, StorageError
from dermaflow.evaluation import plots
from dermaflow.evaluation.evaluate import evaluate, read_sample
from dermaflow.evaluation.figures import Estimate, Evaluation
from dermaflow.evaluation.mistakes import PICTURE_SIDE, SHOWN, worst_mistakes
from dermaflow.evaluation.report import write_report
from dermaflow.evaluation.wording import headline_sentences, number, percent, small_data_notes
from dermaflow.schemas.bundle import Bundle
from dermaflow.taxonomy import CODES, INDEX, MALIGNANT, MELANOMA

HOSTILE = "\"><script>alert('x')</script><img src=http://evil.example/x>"


@pytest.fixture(scope="module")
def predictions() -> pd.DataFrame:
    return ham_like(images=400, lesions=300)


@pytest.fixture(scope="module")
def bundle(predictions: pd.DataFrame) -> Bundle:
    return ham_like_bundle(predictions)


@pytest.fixture(scope="module")
def evaluation(predictions: pd.DataFrame, bundle: Bundle) -> Evaluation:
    return evaluate(predictions, bundle.calibration, resamples=60)


@pytest.fixture(scope="module")
def report(tmp_path_factory, predictions, bundle, evaluation) -> Path:
    return write_report(
        tmp_path_factory.mktemp("report"),
        evaluation,
        predictions,
        bundle,
        images=lesion_picture,
        data_sheet=[("Missing values", ["field", "images"], [["age", "57"]])],
        command="dermaflow evaluate --model runs/bundle",
    )


class Page(HTMLParser):
    """Collects tags with their attributes, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def loads(page: Page) -> list[str]:
    """Everything a browser would fetch for the page."""
    return [
        value
        for tag, attributes in page.tags
        for name, value in attributes.items()
        if name in {"src", "srcset", "data", "poster"} or (name == "href" and tag != "a")
        if value and not value.startswith(("data:", "#"))
    ]


def test_the_page_loads_nothing_and_runs_nothing(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    page = Page(text)
    assert loads(page) == []
    assert "script" not in {tag for tag, _ in page.tags}
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert {link.removeprefix("#") for link in links} <= set(ids)
    assert len(ids) == len(set(ids))


def test_the_page_says_the_figures_of_the_evaluation(report: Path, evaluation: Evaluation, bundle: Bundle) -> None:
    text = Page(report.read_text(encoding="utf-8")).text
    population = evaluation.populations["all"]
    for sentence in headline_sentences(population, bundle.calibration.operating_points):
        assert sentence in text
    for point in population.points.values():
        assert f"{point.accuracy.value * 100:.1f}\u00a0%" in text
    for heading in ("Confusion matrices", "Slices", "Worst mistakes", "Training", "Data sheet", "Model card"):
        assert heading in text
    assert "Missing values" in text
    for part in evaluation.slices:
        assert part.name in text


def test_headline_counts_melanomas_from_the_confusion_matrix(evaluation, bundle) -> None:
    population = evaluation.populations["all"]
    sentences = headline_sentences(population, bundle.calibration.operating_points)
    safe = np.array(population.points["melanoma_safe"].confusion)
    melanomas = safe[MELANOMA].sum()
    assert f"{safe[MELANOMA, MELANOMA]} of {melanomas} melanoma images are found" in sentences[2]
    alarms, others = safe[:, MELANOMA].sum() - safe[MELANOMA, MELANOMA], safe.sum() - melanomas
    assert f"{alarms} of {others} images of other lesions are called melanoma" in sentences[2]


def test_metrics_json_is_the_evaluation_with_its_provenance(report: Path, evaluation, bundle) -> None:
    text = (report.parent / "metrics.json").read_text(encoding="utf-8")
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in metrics.json"))
    read = Evaluation.model_validate_json(text)
    assert read.provenance["weights_sha256"] == bundle.weights_sha256
    assert read.provenance["data_hash"] == bundle.training.data_hash
    assert read.provenance["command"] == "dermaflow evaluate --model runs/bundle"
    assert read.model_copy(update={"provenance": {}}) == evaluation


def test_the_card_says_what_it_is_for_and_where_it_comes_from(report: Path, bundle: Bundle, evaluation) -> None:
    card = (report.parent / "card.md").read_text(encoding="utf-8")
    for words in ("not for diagnosis", "CC BY-NC 4.0", "no field for skin type", bundle.training.data_hash, "seed: 42"):
        assert words in card
    assert f"accuracy: {percent(evaluation.populations['all'].points['accuracy'].accuracy)}" in card
    assert "\n    dermaflow evaluate --model runs/bundle\n" in card
    assert '\n      "backbone": "mobilenet_v2"' in card
    assert "&" not in card


@pytest.mark.parametrize(("first", "words"), [("ISIC_9", "No patient is in it"), ("clinic_", "licence is that of")])
def test_the_card_claims_ham10000_only_for_its_images(tmp_path, predictions, bundle, evaluation, first, words) -> None:
    other = predictions.assign(image_id=[f"{first}{i:06d}" for i in range(len(predictions))])
    page = write_report(tmp_path, evaluation, other, bundle, images=None)
    card = (tmp_path / "card.md").read_text(encoding="utf-8")
    assert words in card
    assert words in Page(page.read_text(encoding="utf-8")).text
    assert "CC BY-NC" not in card


def test_hostile_text_is_shown_and_not_run(tmp_path, predictions, bundle, evaluation) -> None:
    hostile = predictions.assign(image_id=HOSTILE, site=HOSTILE)
    bad_bundle = bundle.model_copy(update={"name": HOSTILE})
    sheet = [(HOSTILE, [HOSTILE], [[HOSTILE]])]
    measured = evaluate(hostile, bundle.calibration, resamples=10)
    path = write_report(tmp_path, measured, hostile, bad_bundle, images=None, data_sheet=sheet, command=HOSTILE)
    page = Page(path.read_text(encoding="utf-8"))
    assert "script" not in {tag for tag, _ in page.tags}
    assert loads(page) == []
    assert page.text.count(HOSTILE) > 10


def test_mistakes_are_melanomas_called_benign_first_and_the_surest_first(predictions: pd.DataFrame) -> None:
    sample = read_sample(predictions, seed=0, resamples=1)
    predicted = sample.probabilities.argmax(axis=1)
    dismissed, others = worst_mistakes(predictions, sample, predicted, None)
    assert dismissed
    assert others
    rows = predictions.set_index("image_id")
    for mistake in dismissed:
        assert mistake.truth == rows.loc[mistake.image_id, "dx"] == "mel"
        assert not MALIGNANT[INDEX[mistake.predicted]]
    for mistake in others:
        assert mistake.truth == rows.loc[mistake.image_id, "dx"] != mistake.predicted
        assert mistake.truth != "mel" or MALIGNANT[INDEX[mistake.predicted]]
    for shown in (dismissed, others):
        assert len(shown) <= SHOWN
        assert len({mistake.lesion_id for mistake in shown}) == len(shown)
        assert [m.p_predicted for m in shown] == sorted((m.p_predicted for m in shown), reverse=True)
    wrong_mel = rows[(rows["dx"] == "mel") & (predicted == INDEX["nv"])]
    assert dismissed[0].p_predicted >= wrong_mel["p_nv"].max()


def test_pictures_are_small_jpegs_in_the_page(report: Path) -> None:
    pictures = [attributes["src"] for tag, attributes in Page(report.read_text("utf-8")).tags if tag == "img"]
    assert len(pictures) >= SHOWN
    for picture in pictures:
        kind, content = picture.split(",", 1)
        image = Image.open(io.BytesIO(base64.b64decode(content)))
        assert kind == "data:image/jpeg;base64"
        assert image.format == "JPEG"
        assert max(image.size) == PICTURE_SIDE


def test_a_picture_that_cannot_be_had_is_named_and_the_report_is_written(
    tmp_path, predictions, bundle, evaluation, caplog
) -> None:
    def images(image_id: str) -> bytes:
        if image_id.endswith("1"):
            raise DataError("not in the shards", where=image_id)
        return b"\xff\xd8 no picture"

    page = Page(write_report(tmp_path, evaluation, predictions, bundle, images=images).read_text("utf-8"))
    assert "img" not in {tag for tag, _ in page.tags}
    assert "no picture" in page.text
    assert "no picture of ISIC_" in caplog.text


def test_small_and_absent_classes_are_said(predictions, bundle) -> None:
    kept = predictions[predictions["dx"] != "vasc"]
    notes = small_data_notes(evaluate(kept, bundle.calibration, resamples=10).populations["all"])
    lesions = kept[kept["dx"] == "df"]["lesion_id"].nunique()
    assert f"df ({lesions})" in notes[0]
    assert "No lesion of vasc" in notes[1]


def test_a_report_of_nevi_only_and_without_history_is_still_written(tmp_path, predictions, bundle) -> None:
    nevi = predictions[predictions["dx"] == "nv"].assign(dx_type="follow_up")
    training = bundle.training.model_copy(update={"history": []})
    measured = evaluate(nevi, bundle.calibration, resamples=10)
    path = write_report(tmp_path, measured, nevi, bundle.model_copy(update={"training": training}), images=None)
    text = Page(path.read_text("utf-8")).text
    assert "holds no melanoma" in text
    assert "no training history" in text
    assert "Histology-proven only" not in text


def test_a_bundle_without_calibration_is_refused(tmp_path, predictions, bundle, evaluation) -> None:
    with pytest.raises(BundleError, match="no calibration"):
        write_report(tmp_path, evaluation, predictions, bundle.model_copy(update={"calibration": None}), images=None)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_report_that_was_there(tmp_path, predictions, bundle, evaluation, monkeypatch) -> None:
    (tmp_path / "report.html").write_text("the old one")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        write_report(tmp_path, evaluation, predictions, bundle, images=None)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text() == "the old one"


def test_plots_are_reproducible_and_their_ids_do_not_collide(predictions) -> None:
    sample = read_sample(predictions, seed=0, resamples=1)
    drawn = [
        plot(sample.truth, sample.probabilities) for plot in (plots.roc, plots.precision_recall, plots.reliability)
    ]
    assert drawn[0] == plots.roc(sample.truth, sample.probabilities)
    ids = [name for svg in drawn for name in re.findall(r' id="([^"]*)"', svg)]
    assert ids
    assert len(ids) == len(set(ids))
    for svg in drawn:
        own = set(re.findall(r' id="([^"]*)"', svg))
        assert set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg)) == own
    for code in CODES:
        assert f">{code}<" in drawn[0]


def test_figures_in_words() -> None:
    assert percent(Estimate(value=0.8868, low=0.871, high=0.9019)) == "88.7\u00a0% (87.1–90.2)"
    assert number(Estimate(value=0.95449, low=0.94, high=0.966)) == "0.954 (0.940–0.966)"
    assert percent(Estimate(value=1.0, reason="no interval: 4 lesions only")) == "100.0\u00a0%"
    assert number(Estimate(value=None, reason="no image is melanoma")) == "–"
