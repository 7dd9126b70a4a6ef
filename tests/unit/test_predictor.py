"""From bytes to findings: what is said, what is withheld, and that evaluation comes the same way."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny_bundle import a_bundle, a_calibration
from tiny_data import draw, prepare_here

from dermaflow.bundles.bundle import LoadedBundle
from dermaflow.datasets import quality
from dermaflow.errors import BundleError, DataError
from dermaflow.evaluation.run import evaluate_bundle
from dermaflow.learning.backbones import BackboneConfig, build
from dermaflow.learning.calibration import calibrate_and_save, recalibrate
from dermaflow.learning.inference import predict
from dermaflow.preparation.reading import ShardFolder
from dermaflow.preparation.transforms import pixels
from dermaflow.schemas.finding import FINDING_SCHEMA, Finding, findings_of, findings_table
from dermaflow.scoring.predictor import Predictor, findings
from dermaflow.taxonomy import CODES, MALIGNANT
from dermaflow.trust.conformal import conformal_sets
from dermaflow.trust.prior_shift import correct
from dermaflow.trust.temperature import calibrated_probabilities


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardFolder:
    root = tmp_path_factory.mktemp("predictor")
    prepare_here(draw(root / "data", 150), root / "shards")
    return ShardFolder(root / "shards")


@pytest.fixture(scope="module")
def loaded(shards: ShardFolder, tmp_path_factory: pytest.TempPathFactory) -> LoadedBundle:
    """An untrained network, calibrated: what it says is worth nothing, how it says it is what is tested."""
    from dermaflow.bundles.bundle import load_bundle

    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("bundle") / "model"
    calibrate_and_save(build(BackboneConfig(name="seed_cnn")), a_bundle(), shards, out)
    return load_bundle(out)


@pytest.fixture
def no_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of the images of 64 x 48 pixels are too coarse for the gate."""
    monkeypatch.setattr(quality, "LIMITS", ())


def some(shards: ShardFolder, count: int = 12) -> tuple[list[str], list[bytes]]:
    pairs = list(shards.images("test"))[:count]
    return [name for name, _ in pairs], [data for _, data in pairs]


def without_distance(loaded: LoadedBundle) -> LoadedBundle:
    bundle = loaded.bundle.model_copy(
        update={"calibration": loaded.bundle.calibration.model_copy(update={"ood": None})}
    )
    return LoadedBundle(bundle, loaded.weights, None, loaded.card, loaded.sha256)


def test_an_ordinary_image_gets_probabilities_prediction_and_set(shards, loaded, no_gate) -> None:
    ids, images = some(shards)
    predictor = Predictor(without_distance(loaded))
    found = predictor.predict(images, ids, [f"L{i}" for i in range(len(ids))])
    spec, calibration = loaded.bundle.input, loaded.bundle.calibration
    batch = np.stack([pixels(data, spec.height, spec.width) for data in images])
    p = calibrated_probabilities(predict(predictor.network, batch, spec)[0], calibration)
    sets = conformal_sets(p, np.array(calibration.conformal_quantiles))
    for i, finding in enumerate(found):
        assert (finding.image_id, finding.lesion_id, finding.status, finding.reason) == (ids[i], f"L{i}", "ok", None)
        np.testing.assert_allclose([getattr(finding, f"p_{code}") for code in CODES], p[i], atol=1e-6)
        assert finding.prediction == CODES[p[i].argmax()]
        assert finding.conformal_set == [code for k, code in enumerate(CODES) if sets[i, k]]
        assert finding.p_malignant == pytest.approx(p[i, np.array(MALIGNANT)].sum())
        assert (finding.model, finding.model_sha256) == ("tiny", loaded.sha256)


def test_bytes_that_are_no_image_fail_with_a_reason_and_do_not_stop_the_others(shards, loaded, no_gate) -> None:
    _, images = some(shards, 3)
    cut = images[1][: len(images[1]) // 2]
    found = Predictor(without_distance(loaded)).predict(
        [images[0], b"", b"GIF89a nonsense", cut, images[2]], list("abcde")
    )
    assert [finding.status for finding in found] == ["ok", "failed", "failed", "failed", "ok"]
    assert [str(finding.reason).split(":")[0] for finding in found[1:4]] == ["empty", "not_an_image", "truncated"]
    assert all(finding.p_mel is None and finding.prediction is None for finding in found[1:4])
    only_bad = Predictor(loaded).predict([b""], ["a"])
    assert only_bad[0].status == "failed" and Predictor(loaded).predict([], []) == []


def test_the_gate_withholds_every_class(shards, loaded) -> None:
    _, images = some(shards, 2)
    black = io.BytesIO()
    Image.new("RGB", (200, 150)).save(black, "PNG")
    found = Predictor(without_distance(loaded)).predict([images[0], black.getvalue()], ["lesion", "black"])
    refused = [finding for finding in found if finding.status == "not_assessable"]
    assert "black" in [finding.image_id for finding in refused]
    for finding in refused:
        assert finding.quality_flags and finding.reason
        said = finding.model_dump()
        assert all(
            said[name] is None for name in [*(f"p_{c}" for c in CODES), "prediction", "conformal_set", "p_malignant"]
        )


def test_an_unusual_image_is_withheld_with_its_distance(shards, loaded, no_gate) -> None:
    ids, images = some(shards, 5)
    ood = loaded.bundle.calibration.ood.model_copy(update={"threshold": 0.0})
    strict = loaded.bundle.model_copy(update={"calibration": loaded.bundle.calibration.model_copy(update={"ood": ood})})
    found = Predictor(LoadedBundle(strict, loaded.weights, loaded.reference, "", "x")).predict(images, ids)
    assert all(finding.status == "not_assessable" and finding.ood and finding.prediction is None for finding in found)
    assert all(f"distance {finding.ood_score:.3f}, usual up to 0.000" in str(finding.reason) for finding in found)
    usual = [finding for finding in Predictor(loaded).predict(images, ids) if not finding.ood]
    assert usual and all(finding.status == "ok" for finding in usual)


def test_site_priors_correct_the_probabilities_and_leave_the_sets(shards, loaded, no_gate) -> None:
    ids, images = some(shards, 6)
    site = [0.1, 0.1, 0.1, 0.1, 0.3, 0.2, 0.1]
    plain = Predictor(without_distance(loaded)).predict(images, ids)
    moved = Predictor(without_distance(loaded), priors=site).predict(images, ids)
    p = np.array([[getattr(finding, f"p_{code}") for code in CODES] for finding in plain])
    expected = correct(p, loaded.bundle.calibration.priors, site)
    found = np.array([[getattr(finding, f"p_{code}") for code in CODES] for finding in moved])
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert abs(found - p).max() > 0.01
    assert [finding.conformal_set for finding in moved] == [finding.conformal_set for finding in plain]
    with pytest.raises(DataError, match="site priors"):
        Predictor(loaded, priors=[1.0] * 7)


def test_wrong_calls_are_named(loaded) -> None:
    with pytest.raises(DataError, match="2 images, 1 image ids, 2 lesion ids"):
        Predictor(loaded).predict([b"", b""], ["a"])
    uncalibrated = LoadedBundle(a_bundle(), {}, None, "", "")
    with pytest.raises(BundleError, match=r"no calibration.*dermaflow calibrate"):
        Predictor(uncalibrated)


def test_findings_survive_the_table(shards, loaded, no_gate) -> None:
    ids, images = some(shards, 4)
    found = Predictor(without_distance(loaded)).predict([*images, b""], [*ids, "bad"])
    table = findings_table(found)
    assert table.schema == FINDING_SCHEMA
    back = findings_of(table)
    assert [finding.model_dump(exclude={"p_malignant"}) for finding in back if finding.status == "failed"] == [
        found[-1].model_dump(exclude={"p_malignant"})
    ]
    assert back[0].conformal_set == found[0].conformal_set
    assert back[0].p_mel == pytest.approx(found[0].p_mel, abs=1e-6)


def test_evaluation_says_what_the_predictor_says(shards, loaded, tmp_path: Path) -> None:
    from dermaflow.bundles.bundle import save_bundle

    save_bundle(tmp_path / "model", loaded.bundle, loaded.weights, loaded.reference, "# Card\n")
    evaluation = evaluate_bundle(tmp_path / "model", shards.uri, tmp_path / "report", resamples=20)
    found = findings_of(pq.read_table(tmp_path / "report" / "findings.parquet"))
    ids, images = zip(*shards.images("test"), strict=True)
    meta = shards.metadata("test")
    again = Predictor(loaded).predict(images, ids, meta["lesion_id"].tolist())
    assert [finding.image_id for finding in found] == list(ids)
    for mine, theirs in zip(found, again, strict=True):
        assert mine.model_dump(include={"status", "quality_flags", "ood", "lesion_id", "prediction"}) == (
            theirs.model_dump(include={"status", "quality_flags", "ood", "lesion_id", "prediction"})
        )
    refused = np.mean([finding.status == "not_assessable" for finding in found])
    assert evaluation.safety.gate is not None and evaluation.safety.gate.not_assessable.value == pytest.approx(refused)
    assert evaluation.populations["all"].counts.images == len(found)  # refused ones count in every figure


def test_calibrating_again_keeps_the_weights_and_forgets_the_figures(shards, loaded, tmp_path: Path) -> None:
    from dermaflow.bundles.bundle import save_bundle

    before = loaded.bundle.model_copy(update={"metrics": {"accuracy": 0.5}, "calibration": a_calibration(ood=False)})
    save_bundle(tmp_path / "old", before, loaded.weights, None, "# Old card\n")
    after = recalibrate(tmp_path / "old", shards.uri, tmp_path / "new")
    assert after.bundle.weights_sha256 == loaded.bundle.weights_sha256
    assert after.bundle.calibration == loaded.bundle.calibration  # the same shards, the same fit
    assert after.bundle.metrics is None and "Not evaluated yet" in after.card
    assert after.reference is not None and after.reference.image_ids == tuple(shards.metadata("train")["image_id"])


def test_a_finding_without_a_class_stays_without_one_when_priors_are_given(shards, loaded) -> None:
    answers = Predictor(loaded).answer([b""])
    found: list[Finding] = findings(loaded, answers, ["a"], [None], loaded.bundle.calibration.priors)
    assert found[0].status == "failed" and found[0].p_nv is None
