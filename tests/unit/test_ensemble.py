"""Members joined into one model, and a network taught by a finished one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_data import draw, prepare_here, tiny_shards
from typer.testing import CliRunner

from dermaflow.bundles.bundle import LoadedBundle, load_bundle
from dermaflow.cli.main import app
from dermaflow.errors import BundleError, CheckpointError, RecipeError
from dermaflow.evaluation.run import evaluate_bundle
from dermaflow.learning import local, loop
from dermaflow.learning.ensemble import join_models
from dermaflow.learning.inference import network_of, predict
from dermaflow.learning.losses import distance
from dermaflow.learning.recipe import Recipe
from dermaflow.learning.train import train
from dermaflow.preparation.reading import ShardFolder
from dermaflow.preparation.transforms import normalise
from dermaflow.scoring.predictor import Predictor
from dermaflow.trust.explain import explain

CHOICES: dict[str, Any] = {
    "name": "pair", "input": {"height": 24, "width": 32}, "backbone": {"name": "seed_cnn"},
    "optim": {"batch_size": 16, "head_epochs": 0, "epochs": 2},
    "members": {"first": {"seed": 1}, "second": {"seed": 2, "backbone.name": "mobilenet_v2", "optim.epochs": 1}},
}  # fmt: skip
PAIR = Recipe.model_validate(CHOICES)
TAUGHT = {"name": "taught", "members": {}, "distillation": {"weight": 1.0, "temperature": 2.0}}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("ensemble"))


@pytest.fixture(scope="module")
def pair(shards: Path) -> Path:
    out = shards.parent / "pair"
    train(shards, PAIR, out)
    return out


def members_of(pair: Path) -> dict[str, LoadedBundle]:
    return {name: load_bundle(pair.with_name("pair.members") / name) for name in PAIR.members}


def test_an_ensemble_gives_the_mean_of_its_members_logits(shards: Path, pair: Path) -> None:
    found, members = load_bundle(pair), members_of(pair)
    pixels = ShardFolder(shards).pixels("test", 24, 32)
    logits, features = predict(network_of(found), pixels, found.bundle.input)
    apart = [
        predict(network_of(model), pixels, model.bundle.input)[0] / model.bundle.calibration.temperature
        for model in members.values()
    ]
    np.testing.assert_allclose(logits, np.mean(apart, axis=0), atol=1e-4)
    assert np.abs(apart[0] - apart[1]).max() > 0.1 and features.shape[1] == 128 + 1280
    bundle, record = found.bundle, found.bundle.training
    assert (bundle.name, bundle.backbone, bundle.input) == ("pair", "seed_cnn+mobilenet_v2", PAIR.input_spec)
    assert record.members == {name: model.sha256 for name, model in members.items()}
    assert record.epochs == 3 and Recipe.model_validate(record.recipe) == PAIR


def test_it_is_evaluated_scored_and_explained_as_any_model(shards: Path, pair: Path, tmp_path: Path) -> None:
    report = evaluate_bundle(pair, shards, tmp_path / "report", seed=0, resamples=10, command="-")
    assert 0 <= report.headline()["accuracy"] <= 1 and (tmp_path / "report" / "report.html").exists()
    found = load_bundle(pair)
    predictor = Predictor(found)
    image = next(iter(dict(ShardFolder(shards).images("test")).values()))
    told = explain(predictor, image, "one", diagnosis="mel")
    if told.heat is not None:  # not so where the image is refused
        assert told.heat.shape == (24, 32)
    pixels = ShardFolder(shards).pixels("test", 24, 32)[:5]
    torch.testing.assert_close(
        torch.from_numpy(predictor.run(pixels)[0]),
        torch.from_numpy(predict(network_of(found), pixels, found.bundle.input)[0]), rtol=1e-3, atol=1e-3,
    )  # fmt: skip


def test_what_was_trained_is_not_trained_again(shards: Path, pair: Path, tmp_path: Path) -> None:
    out = tmp_path / "pair"
    shutil.copytree(pair.with_name("pair.members"), tmp_path / "pair.members")
    steps: list[int] = []
    again = train(shards, PAIR, out, on_step=lambda epoch, step, *_: steps.append(step))
    assert not steps and again.bundle.training.members == load_bundle(pair).bundle.training.members
    other = PAIR.model_copy(update={"members": PAIR.members | {"first": {"seed": 9}}})
    with pytest.raises(CheckpointError, match=r"first: was trained by another recipe .*another --out"):
        train(shards, other, out)


def test_one_file_of_weights_cannot_start_two_kinds(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"--weights: one file of first weights for mobilenet_v2 and seed_cnn"):
        train(shards, PAIR, tmp_path / "out", weights=tmp_path / "any.pth")


def test_members_that_do_not_fit(shards: Path, pair: Path, tmp_path: Path) -> None:
    members = members_of(pair)
    one = members["first"]

    def changed(**changes: Any) -> LoadedBundle:
        return LoadedBundle(one.bundle.model_copy(update=changes), one.weights, one.reference, one.card, one.sha256)

    elsewhere = one.bundle.training.model_copy(update={"data_hash": "f" * 64})
    larger = one.bundle.input.model_copy(update={"height": 48})
    for models, message in (
        ({"a": one}, "1 model; expected two or more"),
        ({"a": one, "b": load_bundle(pair)}, "b: is an ensemble"),
        ({"a": one, "b": changed(training=elsewhere)}, "b: was trained from other data"),
        ({"a": one, "b": changed(input=larger)}, "b: sees 48x32 pixels, 1 views; expected 24x32"),
    ):
        with pytest.raises(BundleError, match=message):
            join_models(models, shards, tmp_path / "none", "none")
    assert not (tmp_path / "none").exists()


def test_the_command_joins(shards: Path, pair: Path, tmp_path: Path) -> None:
    folders = [str(pair.with_name("pair.members") / name) for name in PAIR.members]
    run = CliRunner().invoke(
        app, ["models", "join", *folders, "--shards", str(shards), "--out", str(tmp_path / "both")]
    )
    assert run.exit_code == 0 and "seed_cnn+mobilenet_v2" in run.output, run.output
    ours, trained = load_bundle(tmp_path / "both"), load_bundle(pair)
    assert all(torch.equal(ours.weights[name], tensor) for name, tensor in trained.weights.items())
    names = [f"{name}-{model.sha256[:10]}" for name, model in members_of(pair).items()]
    assert list(ours.bundle.training.members) == names, "no path of this machine"


def test_a_student_comes_nearer_to_its_teacher(shards: Path, pair: Path, tmp_path: Path) -> None:
    """The same student with and without a teacher: what it says of new images is nearer to what the teacher says."""
    pixels = ShardFolder(shards).pixels("calibration", 24, 32)
    teacher = load_bundle(pair)
    wanted = torch.from_numpy(predict(network_of(teacher), pixels, teacher.bundle.input)[0])
    away = []
    for name, changes, master in (("taught", TAUGHT, pair), ("alone", {"name": "alone", "members": {}}, None)):
        recipe = Recipe.model_validate(CHOICES | changes | {"optim": CHOICES["optim"] | {"epochs": 20, "lr": 0.003}})
        student = train(shards, recipe, tmp_path / name, teacher=master)
        assert student.bundle.training.teacher == (teacher.sha256 if master else None)
        logits = torch.from_numpy(predict(network_of(student), pixels, student.bundle.input)[0])
        away.append(float(distance(logits, wanted, 1.0)))
    assert away[0] < 0.9 * away[1], away


def test_a_teacher_sees_the_picture_whole_while_its_student_sees_it_small(
    shards: Path, pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    network = network_of(load_bundle(pair))
    network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    monkeypatch.setattr(local, "network_of", lambda teacher: network)
    shown: list[torch.Tensor] = []
    real = loop.augment

    def spy(*arguments: Any) -> torch.Tensor:
        shown.append(real(*arguments))
        return shown[-1]

    monkeypatch.setattr(loop, "augment", spy)
    size = {"height": 24, "width": 32, "small_epochs": 1}
    train(shards, Recipe.model_validate(CHOICES | TAUGHT | {"input": size}), tmp_path / "out", teacher=pair)
    spec = PAIR.input_spec
    assert len(seen) == len(shown) and all(torch.equal(a, normalise(b, spec)) for a, b in zip(seen, shown, strict=True))
    assert {tuple(views.shape[1:3]) for views in shown} == {(24, 32)}


def test_a_teacher_and_what_to_do_with_it_belong_together(shards: Path, pair: Path, tmp_path: Path) -> None:
    taught = Recipe.model_validate(CHOICES | TAUGHT)
    with pytest.raises(RecipeError, match=r"no teacher; .*Pass --teacher MODEL"):
        train(shards, taught, tmp_path / "out")
    alone = taught.model_copy(update={"distillation": None})
    with pytest.raises(RecipeError, match=r"does not say how to learn from it"):
        train(shards, alone, tmp_path / "out", teacher=pair)
    prepare_here(draw(tmp_path / "data", images=80, seed=5), tmp_path / "other")
    with pytest.raises(BundleError, match="was trained from other data"):
        train(tmp_path / "other", taught, tmp_path / "out", teacher=pair)


def test_the_distance_is_that_of_distributions() -> None:
    a, b = torch.randn(4, 7), torch.randn(4, 7)
    p, q = torch.softmax(b / 3, 1), torch.softmax(a / 3, 1)
    wanted = 9 * (p * (p.log() - q.log())).sum(1).mean()
    torch.testing.assert_close(distance(a, b, 3.0), wanted)
    torch.testing.assert_close(distance(a, a + 5, 1.0), torch.tensor(0.0), atol=1e-6, rtol=0)


def test_a_key_that_is_not_used_does_not_make_another_recipe() -> None:
    plain = Recipe(name="a")
    assert plain.digest != plain.model_copy(update={"members": {"b": {"seed": 1}}}).digest
    assert '"members"' in plain.model_dump_json() and plain.digest == Recipe.model_validate(plain.model_dump()).digest
