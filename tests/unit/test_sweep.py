"""A sweep trains each variant on the same folds, once, keeps a record, and says how much the variants differ."""

from __future__ import annotations

import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from sklearn.metrics import accuracy_score, balanced_accuracy_score, log_loss, roc_auc_score
from tiny_data import tiny_shards
from typer.testing import CliRunner

from dermaflow.cli.main import app
from dermaflow.errors import DataError, RecipeError
from dermaflow.experiments.sweep import RECORD_NAME, Record, load_sweep, run_sweep, run_trial, trial_folder
from dermaflow.experiments.table import compare, compare_sources, write_runs
from dermaflow.preparation.reading import ShardFolder, labels_of
from dermaflow.taxonomy import CODES

RECIPE = {
    "name": "toy", "input": {"height": 24, "width": 32}, "backbone": {"name": "seed_cnn"},
    "optim": {"batch_size": 8, "head_epochs": 0, "epochs": 2, "lr": 0.003, "layer_decay": 1.0},
}  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_shards(tmp_path_factory.mktemp("sweep")))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("plan")
    (root / "toy.yaml").write_text(yaml.safe_dump(RECIPE))
    path = root / "rates.yaml"
    variants = {"usual": {}, "slow": {"optim.lr": 0.0003}}
    content = {"question": "Slower?", "recipe": str(root / "toy.yaml"), "folds": [0, 1], "variants": variants}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def out(file: Path, shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the sweep was run by its command."""
    out = tmp_path_factory.mktemp("out")
    said = CliRunner().invoke(app, ["sweep", str(file), "--shards", shards, "--out", str(out), "--resamples", "50"])
    assert said.exit_code == 0, said.output
    assert "Slower?" in said.output and "slow" in said.output
    return out


def test_each_trial_holds_its_fold_out_and_keeps_a_record(file: Path, shards: str, out: Path) -> None:
    done: list[int] = []
    places = run_sweep(load_sweep(file), shards, out, on_trial=done.append)
    assert done == [1, 2, 3, 4] and len(set(places.values())) == 4
    train = ShardFolder(shards).metadata("train")
    for (name, fold, seed), place in places.items():
        found = pd.read_parquet(place / "predictions.parquet")
        assert set(found["image_id"]) == set(train.loc[train["fold"] == fold, "image_id"])
        assert np.allclose(found[[f"p_{code}" for code in CODES]].sum(axis=1), 1)
        record = Record.model_validate_json((place / "record.json").read_bytes())
        assert (record.fold, record.seed, record.images) == (fold, seed, len(found))
        assert record.data_hash == ShardFolder(shards).manifest.data_hash and len(record.history) == 2
        assert record.recipe["optim"]["lr"] == (0.003 if name == "usual" else 0.0003)
        assert record.seconds > 0 and "torch" in record.versions and not list(place.glob("*.pt"))


def test_the_command_leaves_a_page_and_a_plot(out: Path) -> None:
    page = (out / "rates.md").read_text()
    assert "| usual |" in page and "optim.lr" in page and "(rates.png)" in page
    assert (out / "rates.png").read_bytes().startswith(b"\x89PNG")


def test_all_runs_of_the_folder_stand_in_one_table(file: Path, shards: str, out: Path, tmp_path: Path) -> None:
    """Of this sweep and of another, with what tells their recipes apart."""
    shutil.copytree(out, tmp_path / "out")
    sweep = load_sweep(file).model_copy(update={"variants": {"larger steps": {"optim.batch_size": 4}}, "folds": [0]})
    run_sweep(sweep, shards, tmp_path / "out")
    page, plot = write_runs(tmp_path / "out")
    lines = [line.split(" | ") for line in page.read_text().splitlines() if line.startswith("| ")]
    assert [line[-2:] for line in lines] == [
        ["optim.batch_size", "optim.lr |"], ["8", "0.003 |"], ["8", "0.0003 |"], ["8", "0.003 |"], ["8", "0.0003 |"],
        ["4", "0.003 |"],
    ]  # fmt: skip
    table = pd.read_parquet(sorted((tmp_path / "out/trials").iterdir())[0] / "predictions.parquet")
    accuracy = (table[[f"p_{code}" for code in CODES]].to_numpy().argmax(1) == labels_of(table["dx"])).mean()
    assert f"{accuracy:.3f}" in {line[7] for line in lines}
    assert (out / "runs.md").exists() and plot.read_bytes().startswith(b"\x89PNG")


def test_sources_are_shown_each_alone(file: Path, shards: str, tmp_path: Path) -> None:
    sites = ["rosendahl", "vidir_modern"]
    variants = {"usual": {"optim.epochs": 1}, "slow": {"optim.epochs": 1, "optim.lr": 0.0003}}
    content = yaml.safe_load(file.read_text()) | {"folds": sites, "variants": variants}
    (tmp_path / "unseen.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    arguments = ["sweep", str(tmp_path / "unseen.yaml"), "--shards", shards, "--out", str(tmp_path)]
    said = CliRunner().invoke(app, [*arguments, "--resamples", "20"])
    assert said.exit_code == 0, said.output
    page = (tmp_path / "unseen.md").read_text()
    sweep = load_sweep(tmp_path / "unseen.yaml")
    places = run_sweep(sweep, shards, tmp_path)
    found = compare_sources(sweep, places, 20)
    for site in sites:
        alone = page.split(f"Images of {site} alone")[1].split("\n\n")[1]
        assert [line.split("|")[1].strip() for line in alone.splitlines()[2:]] == ["usual", "slow"]
        table = pd.read_parquet(places["slow", site, 0] / "predictions.parquet")
        p = table[[f"p_{code}" for code in CODES]].to_numpy()
        accuracy = accuracy_score(labels_of(table["dx"]), p.argmax(1))
        assert found[site][1].figures["accuracy"].value == pytest.approx(accuracy) and f"| {accuracy:.3f}" in alone
    assert not compare_sources(load_sweep(file), {})


def test_what_was_trained_is_not_trained_again(file: Path, shards: str, out: Path) -> None:
    trained: list[str] = []
    sweep = load_sweep(file)
    more = sweep.model_copy(update={"variants": sweep.variants | {"short": {"optim.epochs": 1}}, "folds": [0]})
    run_sweep(more, shards, out, on_step=lambda trial, step, steps, loss: trained.append(trial))
    assert set(trained) == {"short fold 0 seed 0, epoch 1/1"}


def test_a_trial_that_was_cut_off_ends_like_one_that_was_not(file: Path, shards: str, tmp_path: Path) -> None:
    recipe = load_sweep(file).recipe_of("usual", 0, 0)
    threads = torch.get_num_threads()
    whole = run_trial(recipe, shards, tmp_path / "whole")

    class Cut(Exception):
        """Stands for a kill."""

    def cut(epoch: int, step: int, steps: int, loss: float) -> None:
        if epoch == 1:
            raise Cut

    with pytest.raises(Cut):
        run_trial(recipe, shards, tmp_path / "cut", cut)
    place = trial_folder(recipe, ShardFolder(shards), tmp_path / "cut")
    assert (place / "latest.pt").exists() and not (place / "record.json").exists()
    epochs: list[int] = []
    run_trial(recipe, shards, tmp_path / "cut", lambda epoch, step, steps, loss: epochs.append(epoch))
    assert set(epochs) == {1}
    pd.testing.assert_frame_equal(
        *(pd.read_parquet(folder / "predictions.parquet") for folder in (whole, place)), rtol=1e-4
    )
    torch.set_num_threads(threads)


def test_a_trial_that_another_sweep_runs_is_waited_for(
    file: Path, shards: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sweep = load_sweep(file)
    recipe = sweep.recipe_of(*sweep.trials[0])
    others: list[Future[Path]] = []
    with ThreadPoolExecutor(1) as pool, caplog.at_level("INFO"):

        def begin_another(*progress: object) -> None:
            if not others:
                others.append(pool.submit(run_trial, recipe, shards, tmp_path, lambda *p: pytest.fail("trained twice")))
                while "waiting for another sweep" not in caplog.text:
                    time.sleep(0.01)

        place = run_trial(recipe, shards, tmp_path, begin_another)
        assert others[0].result(60) == place and (place / RECORD_NAME).exists()


def test_figures_are_those_of_scikit_learn_and_differences_are_paired(file: Path, shards: str, out: Path) -> None:
    sweep = load_sweep(file)
    same = sweep.model_copy(update={"variants": sweep.variants | {"the same": {}}})
    places = run_sweep(same, shards, out)
    found = {variant.name: variant for variant in compare(same, places, resamples=200)}
    table = pd.concat([pd.read_parquet(places["slow", fold, 0] / "predictions.parquet") for fold in (0, 1)])
    truth, p = labels_of(table["dx"]), table[[f"p_{code}" for code in CODES]].to_numpy()
    there = np.unique(truth)
    expected = {
        "accuracy": accuracy_score(truth, p.argmax(1)),
        "balanced accuracy": balanced_accuracy_score(truth, p.argmax(1)),
        "macro AUC": np.mean([roc_auc_score(truth == k, p[:, k]) for k in there]),
        "log loss": log_loss(truth, p, labels=range(7)),
    }  # fmt: skip
    assert {name: figure.value for name, figure in found["slow"].figures.items()} == pytest.approx(expected)
    assert all(
        found["slow"].figures[name].low < expected[name] < found["slow"].figures[name].high
        for name in ("accuracy", "log loss")
    )
    assert not found["usual"].differences
    assert all(difference.value == 0 for difference in found["the same"].differences.values())
    loss = found["slow"].differences["log loss"]
    assert loss.value == pytest.approx(
        found["slow"].figures["log loss"].value - found["usual"].figures["log loss"].value
    )
    assert loss.low < loss.value < loss.high


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"variants": {"a": {"optim.lrr": 1}}}, "did you mean 'lr'"),
        ({"variants": {}}, "variants"),
        ({"recipe": "ham10000-cup"}, "ham10000-cpu"),
        ({"fold": 3}, "fold"),
        ({"recipe": "ham10000-best"}, "members: an ensemble is no trial"),
        ({"recipe": "ham10000-distilled"}, "distillation: a taught network is no trial"),
    ],
)
def test_a_wrong_sweep_is_refused_before_anything_is_trained(
    file: Path, tmp_path: Path, changes: dict, expected: str
) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | changes))
    with pytest.raises(RecipeError, match=expected):
        load_sweep(wrong)


def test_a_fold_that_the_shards_lack_and_a_recipe_without_one_are_refused(
    file: Path, shards: str, tmp_path: Path
) -> None:
    sweep = load_sweep(file)
    with pytest.raises(DataError, match="fold 9"):
        run_sweep(sweep.model_copy(update={"folds": [9]}), shards, tmp_path)
    recipe = sweep.recipe_of("usual", 0, 0).model_copy(update={"validation_fold": None})
    with pytest.raises(RecipeError, match="holds no fold out"):
        run_trial(recipe, shards, tmp_path)


def test_other_first_weights_are_another_trial(file: Path, shards: str, tmp_path: Path) -> None:
    weights = tmp_path / "first.pth"
    sweep = load_sweep(file)
    with_file = sweep.model_copy(update={"variants": {"a": {"backbone.weights": str(weights)}}})
    places = set()
    for content in (b"one", b"two"):
        weights.write_bytes(content)
        places.add(trial_folder(with_file.recipe_of("a", 0, 0), ShardFolder(shards), tmp_path))
    assert len(places) == 2
    weights.unlink()
    with pytest.raises(RecipeError, match="no such weights"):
        trial_folder(with_file.recipe_of("a", 0, 0), ShardFolder(shards), tmp_path)
