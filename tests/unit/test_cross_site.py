"""Every model at every site: counts against the images themselves, rows of runs and of bundles, the page."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics as sk
from federated_result import RESAMPLES, SITES, test_table, write_compared
from federation_here import a_plan, a_recipe, run_here
from tiny_data import draw, prepare_here

from clients.matrix import FinishedRun, comparisons, matrix_of, notes, read_run, runs_with_compared, table
from clients.report import write_report
from clients.result import save_model
from dermaflow.bundles.bundle import load_bundle
from dermaflow.bundles.registry import Registry
from dermaflow.errors import DataError, FederationError
from dermaflow.evaluation.crosssite import calibration_error, cell_of, count_test, reliability_of, row_of
from dermaflow.evaluation.evaluate import read_sample
from dermaflow.evaluation.population import point_figures
from dermaflow.learning.recipe import Recipe
from dermaflow.schemas.bundle import OperatingPoint
from dermaflow.taxonomy import CODES, MELANOMA

TABLE = test_table()
LABELS = np.array([CODES.index(dx) for dx in TABLE["dx"]])
P = TABLE[[f"p_{code}" for code in CODES]].to_numpy()
LESIONS = TABLE["lesion_id"].to_numpy()


def counted(mask: np.ndarray, resamples: int = 200):
    return count_test(LABELS[mask], P[mask].argmax(1), LESIONS[mask], seed=0, resamples=resamples)


def at(site: str) -> np.ndarray:
    return (TABLE["site"] == site).to_numpy()


def test_a_cell_is_what_scikit_learn_finds_on_the_images() -> None:
    mine = at("rosendahl")
    cell = cell_of(counted(mine))
    truth, found = LABELS[mine], P[mine].argmax(1)
    assert cell.accuracy.value == pytest.approx(sk.accuracy_score(truth, found))
    assert cell.balanced_accuracy.value == pytest.approx(sk.balanced_accuracy_score(truth, found))
    assert cell.melanoma_sensitivity.value == pytest.approx(sk.recall_score(truth == MELANOMA, found == MELANOMA))
    assert cell.counts.images == mine.sum() and cell.counts.lesions == TABLE[mine]["lesion_id"].nunique()
    for figure in (cell.accuracy, cell.balanced_accuracy, cell.melanoma_sensitivity):
        assert figure.low < figure.value < figure.high


def test_intervals_from_counts_are_those_of_the_evaluation() -> None:
    """The same resamples of the same lesions, once from images and once from the counts that a site sends."""
    mine = at("vidir_modern")
    sample = read_sample(TABLE[mine], seed=0, resamples=200)
    whole = point_figures(sample, OperatingPoint(name="accuracy", tau=0.0), [1 / 7] * 7)
    cell = cell_of(counted(mine))
    for name in ("accuracy", "balanced_accuracy"):
        found, expected = getattr(cell, name), getattr(whole, name)
        assert (found.value, found.low, found.high) == pytest.approx((expected.value, expected.low, expected.high))


def test_classes_that_a_site_lacks_are_named_and_not_counted() -> None:
    few = cell_of(counted(at("vienna_dias")))
    assert few.absent == [code for code in CODES if code != "nv"] and list(few.counts.images_by_class) == ["nv"]
    assert few.melanoma_sensitivity.value is None and few.melanoma_sensitivity.reason == "no melanoma here"
    assert few.accuracy.low is None and "3 lesions" in few.accuracy.reason
    nobody = cell_of(counted(np.zeros(len(TABLE), bool)))
    assert nobody.counts.images == 0 and nobody.balanced_accuracy.value is None


def test_all_sites_are_the_sum_and_the_mean_counts_each_alike() -> None:
    tests = {site: counted(at(site)) for site in SITES}
    row = row_of("a model", tests, ["rosendahl"])
    assert row.everything.accuracy.value == pytest.approx(sk.accuracy_score(LABELS, P.argmax(1)))
    assert row.everything.counts.images == len(TABLE)
    each = [row.cells[site].balanced_accuracy.value for site in SITES]
    assert row.mean_of_sites.value == pytest.approx(np.mean(each))
    assert row.mean_of_sites.low < row.mean_of_sites.value < row.mean_of_sites.high


def test_calibration_of_a_site_is_that_of_its_images_and_bins_add_up() -> None:
    from torch import from_numpy
    from torchmetrics.functional.classification import multiclass_calibration_error

    found = [reliability_of(P[at(site)], LABELS[at(site)], LESIONS[at(site)], seed=0, resamples=100) for site in SITES]
    expected = multiclass_calibration_error(from_numpy(P), from_numpy(LABELS), 7, n_bins=15)
    assert calibration_error(np.sum([part.bins for part in found], axis=0)) == pytest.approx(float(expected), abs=1e-6)
    value, low, high = found[0].error
    assert low < high and value == pytest.approx(calibration_error(found[0].bins))
    assert len(found[3].error) == 1  # three lesions tell nothing of the spread
    none = reliability_of(P[:0], LABELS[:0], LESIONS[:0], seed=0, resamples=10)
    assert none.error.size == 0 and np.isnan(calibration_error(none.bins))


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_compared(tmp_path_factory.mktemp("runs") / "fed")


def test_the_matrix_holds_a_run_and_what_it_is_compared_with(compared: Path) -> None:
    matrix = matrix_of(runs_with_compared([compared]), {}, None)
    assert [row.model for row in matrix.rows] == [
        "federated, fedavg", "pooled", *(f"{site} alone" for site in SITES)
    ]  # fmt: skip
    assert matrix.sites == sorted(SITES) and matrix.resamples == RESAMPLES
    assert matrix.rows[1].trained_on == sorted(SITES) and matrix.rows[2].trained_on == ["rosendahl"]
    header, rows = table(matrix, "balanced_accuracy")
    assert header == ["model", *sorted(SITES), "all", "mean of sites"] and len(rows) == 7
    assert rows[0][-2] == f"{len(TABLE)} / {TABLE['lesion_id'].nunique()}"
    assert any(note.startswith("vidir_molemax: over bcc") and "holds no akiec" in note for note in notes(matrix))


def test_what_cannot_be_compared_is_refused(compared: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no model"):
        matrix_of([], {}, None)
    with pytest.raises(DataError, match="only on shards that are here"):
        matrix_of(runs_with_compared([compared]), {"x": "some/bundle"}, None)
    with pytest.raises(FederationError, match="no finished run"):
        read_run(tmp_path)
    run = read_run(compared)
    with pytest.raises(DataError, match="twice"):
        matrix_of([run, run], {}, None)
    fewer = FinishedRun(run.folder, run.plan, run.result | {"sites": {"rosendahl": run.result["sites"]["rosendahl"]}})
    with pytest.raises(DataError, match="Compare runs over the same sites"):
        matrix_of([read_run(compared / "compare" / "pooled"), fewer], {}, None)


def test_the_page_says_who_was_left_out_and_why_and_names_no_path(compared: Path, tmp_path: Path) -> None:
    runs = runs_with_compared([compared])
    matrix = matrix_of(runs, {}, None)
    page = write_report(runs[0], matrix, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "round 4: strategy fedavg is not allowed after 20:00" in page and "11 of 12" in page
    assert page.count("<svg") == 5 and "vienna_dias alone" in page
    assert str(compared) not in page and "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
    sent = 9.4 + 10 * 9.1, 11 * 9.1  # MB to rosendahl and from it, in eleven rounds
    assert f"<td>{sent[0]:.2f}</td><td>{sent[1]:.2f}</td>" in page
    assert json.loads((tmp_path / "matrix.json").read_text())["rows"][0]["model"] == "federated, fedavg"


def test_a_run_of_private_sums_has_a_page_without_rounds_and_calibration(compared: Path, tmp_path: Path) -> None:
    run = read_run(compared)
    sites = {site: {k: v for k, v in part.items() if k != "reliability"} for site, part in run.result["sites"].items()}
    given = {"unit": "one lesion of one site", "epsilon": 8.0, "delta": 1e-5, "noise_at": "site"}
    result = run.result | {"calibration": None, "rounds": [], "sites": sites, "privacy": given}
    private = FinishedRun(run.folder, run.plan, result)
    page = write_report(private, matrix_of([private], {}, None), tmp_path / "r.html").read_text(encoding="utf-8")
    assert "epsilon 8.00 at delta 1e-05 for one lesion of one site" in page
    assert "did not send how well" in page and "each site does that on its own images" in page


def test_comparisons_train_one_place_at_a_time_for_the_same_rounds(tmp_path: Path) -> None:
    plan = a_plan("shards", tmp_path, strategy="fedadam", norm="local", rounds=7, local_epochs=0.5, secure=True)
    found = comparisons(plan, ["north", "south"])
    assert list(found) == ["pooled", "north alone", "south alone"]
    assert {(p.strategy, p.norm, p.rounds, p.local_epochs, p.recipe, p.secure) for p in found.values()} == {
        ("fedavg", "shared", 7, 0.5, plan.recipe, False)
    }
    assert found["pooled"].only == "pooled" and found["pooled"].partition == "natural+pooled"
    assert found["south alone"].only == "south" and found["south alone"].partition == "natural"
    assert len({p.out for p in found.values()}) == 3


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs over small shards: one whose normalisation stays at the sites, and one with all images in one place."""
    folder = tmp_path_factory.mktemp("real")
    draw(folder / "data", 80, 1)
    shards = prepare_here(folder / "data", folder / "shards") and folder / "shards"
    run_here(a_plan(shards, folder / "own", rounds=1, norm="local", name="run"))
    small = Recipe.model_validate(a_recipe().model_dump() | {"backbone": {"name": "seed_cnn"}})
    plan = a_plan(shards, folder / "pooled", rounds=1, only="pooled", partition="natural+pooled", recipe=small)
    run_here(plan, sites=5)
    save_model(plan)
    return folder


def test_bundles_count_as_the_sites_do_and_personal_models_meet_every_site(real: Path) -> None:
    runs = [read_run(real / "own"), read_run(real / "pooled")]
    matrix = matrix_of(runs, {"pooled again": str(real / "pooled" / "model")}, None)
    rows = {row.model: row for row in matrix.rows}
    assert rows["pooled again"].cells == rows["pooled"].cells
    assert rows["pooled again"].everything == rows["pooled"].everything
    own = rows["federated, fedavg, own normalisation"]
    for site in SITES:  # at home, a personal model is what the site itself counted
        assert rows[f"federated, normalisation of {site}"].cells[site] == own.cells[site]


def test_a_federated_bundle_says_where_it_comes_from_and_is_one_version(real: Path, tmp_path: Path) -> None:
    run = read_run(real / "pooled")
    bundle = load_bundle(real / "pooled" / "model")
    record = bundle.bundle.training.federation
    assert record is not None and record.origin == "simulation" and record.rounds == 1 and record.sites == ["pooled"]
    manifest = json.loads((real / "shards" / "manifest.json").read_text())
    assert bundle.bundle.training.data_hash == manifest["data_hash"] == record.data["pooled"]
    registry = Registry(tmp_path)
    first = registry.add(real / "pooled" / "model")
    save_model(run.plan)  # as the same command does when it is run again
    assert registry.add(real / "pooled" / "model").id == first.id and len(registry.list()) == 1
    assert registry.show(first.id).bundle.training.federation == record


def test_a_run_counts_its_bytes_and_looks_at_each_site(real: Path) -> None:
    assert all("reliability" not in part for part in read_run(real / "own").result["sites"].values())
    result = read_run(real / "pooled").result
    for site in SITES:
        assert result["asked"][site]["received"] > 0 < result["asked"][site]["sent"]
        assert np.array(result["sites"][site]["reliability"]["bins"])[:, 0].sum() == np.sum(
            result["sites"][site]["confusion"]
        )
    seen = [figures for figures in result["rounds"][0]["sites"].values() if "balanced_accuracy" in figures]
    assert seen and all(0 <= figures["balanced_accuracy"] <= 1 for figures in seen)
