"""Recipes: a wrong key or value is named with the right one, and the digest stands for the content."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from dermaflow.errors import RecipeError
from dermaflow.learning.recipe import Recipe, load_recipe, shipped_recipes


def write(folder: Path, **content: Any) -> str:
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump({"name": "mine"} | content))
    return str(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"optin": {}}, r"unknown key 'optin', did you mean 'optim'\?"),
        ({"optim": {"epoch": 3}}, r"unknown key 'optim\.epoch', did you mean 'epochs'\?"),
        ({"augment": {"rotations": 3}}, r"unknown key 'augment\.rotations', did you mean 'rotation'\?"),
        ({"input": {"zzz": 3}}, r"unknown key 'input\.zzz', expected one of height, width, views"),
    ],
)
def test_a_misspelt_key_is_named_with_the_right_one(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=rf"mine\.yaml: {message}"):
        load_recipe(write(tmp_path, **content))


def test_every_wrong_thing_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"'optim\.epoch'.*'optim\.lr_head'.*'sed'"):
        load_recipe(write(tmp_path, optim={"epoch": 3, "lr_head": 1}, sed=0))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", -1),
        ("seed", "many"),
        ("input.height", 8),
        ("input.views", 3),
        ("backbone.name", "resnet9"),
        ("backbone.dropout", 1.0),
        ("balance.strategy", "smote"),
        ("loss.name", "hinge"),
        ("loss.label_smoothing", -0.1),
        ("augment.rotation", 181),
        ("augment.zoom", 1.0),
        ("optim.optimizer", "lion"),
        ("optim.batch_size", 0),
        ("optim.epochs", -1),
        ("optim.lr", 0),
        ("optim.warmup", 1.0),
        ("optim.ema", 1.0),
        ("optim.precision", "float16"),
        ("monitor_every", 0),
    ],
)
def test_an_impossible_value_is_named_and_shown(key: str, value: object) -> None:
    with pytest.raises(RecipeError, match=rf"demo: {key}: .*\(found {value!r}\)"):
        load_recipe("demo", {key: value})


def test_patience_needs_a_validation_fold() -> None:
    with pytest.raises(RecipeError, match=r"optim\.patience needs validation_fold: nothing may be chosen on"):
        load_recipe("demo", {"optim.patience": 3})
    assert load_recipe("demo", {"optim.patience": 3, "validation_fold": 0}).optim.patience == 3


def test_an_unknown_recipe_is_told_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no recipe 'ham'; expected one of demo, ham10000-best, ham10000-cpu, "):
        load_recipe("ham")
    with pytest.raises(RecipeError, match=r"none\.yaml: no such file"):
        load_recipe(str(tmp_path / "none.yaml"))


@pytest.mark.parametrize(
    ("text", "message"), [("- a", "a list; expected keys"), ("{", "not YAML"), ("", "a NoneType; expected keys")]
)
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mine.yml").write_text(text)
    with pytest.raises(RecipeError, match=rf"mine\.yml: {message}"):
        load_recipe(str(tmp_path / "mine.yml"))


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_loads_and_says_what_it_is_for(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name and len(recipe.description) > 30
    assert recipe.input_spec.views == recipe.input.views
    assert Recipe.model_validate(recipe.model_dump(mode="json")).digest == recipe.digest


def test_the_issue_asks_for_these_recipes() -> None:
    names = {"demo", "ham10000-best", "ham10000-cpu", "ham10000-distilled", "ham10000-gpu", "ham10000-seed"}
    assert names == set(shipped_recipes())


def test_the_first_member_of_the_ensemble_is_the_single_network() -> None:
    single, ensemble = load_recipe("ham10000-cpu"), load_recipe("ham10000-best")
    first, *others = ensemble.member_recipes().values()
    same = {"name": single.name, "description": single.description}
    assert first.model_copy(update=same).digest == single.digest
    assert len({member.model_copy(update=same).digest for member in others} - {single.digest}) == len(others) == 2
    assert all(member.input_spec == single.input_spec for member in others)


def test_a_member_with_a_misspelt_key_is_named() -> None:
    recipe = Recipe.model_validate({"name": "a", "members": {"wrong": {"optim.rate": 1}}})
    with pytest.raises(RecipeError, match=r"wrong: unknown key 'optim\.rate'"):
        recipe.member_recipes()


def test_a_recipe_takes_from_its_base_what_it_does_not_say(tmp_path: Path) -> None:
    (tmp_path / "first.yaml").write_text("name: first\nbase: ham10000-cpu\noptim: {epochs: 5}\n")
    mine = load_recipe(write(tmp_path, base="first.yaml", optim={"lr": 0.1}, distillation={"weight": 0.5}))
    usual = load_recipe("ham10000-cpu")
    assert (mine.name, mine.description) == ("mine", "") and mine.distillation is not None
    assert mine.optim == usual.optim.model_copy(update={"epochs": 5, "lr": 0.1})
    assert (mine.input, mine.backbone, mine.augment) == (usual.input, usual.backbone, usual.augment)
    (tmp_path / "nameless.yaml").write_text("base: ham10000-cpu\n")
    with pytest.raises(RecipeError, match="name: Field required"):
        load_recipe(str(tmp_path / "nameless.yaml"))


@pytest.mark.parametrize(
    ("base", "message"),
    [("mine.yaml", r"mine\.yaml: is its own base"), ("none.yaml", r"none\.yaml: no such file"), (3, "no recipe '3'")],
)
def test_a_base_that_cannot_be_read_is_named(tmp_path: Path, base: object, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(tmp_path, base=base))


def test_one_key_of_a_member_is_changed_and_its_other_keys_stay() -> None:
    recipe = load_recipe("ham10000-best", {"members.lite0-0.backbone.weights": "lite0.pth", "backbone.dropout": 0.4})
    lite, first = recipe.member_recipes()["lite0-0"].backbone, recipe.member_recipes()["mobilenet-0"].backbone
    assert (lite.name, lite.weights, lite.dropout) == ("efficientnet_lite0", "lite0.pth", 0.4)
    assert (first.name, first.weights, first.dropout) == ("mobilenet_v2", "imagenet", 0.4)
    assert load_recipe("ham10000-cpu", {"optim": {"lr": 0.1}}) == load_recipe("ham10000-cpu", {"optim.lr": 0.1})


def test_two_members_that_would_be_the_same_network_are_refused() -> None:
    """With the seed of the whole set to that of a member, say."""
    with pytest.raises(RecipeError, match="the same training as mobilenet-0") as caught:
        load_recipe("ham10000-best", {"seed": 1}).member_recipes()
    assert "--set members.mobilenet-1.seed=2" in str(caught.value)
    other = load_recipe("ham10000-best", {"seed": 1, "members.mobilenet-1.seed": 2}).member_recipes()
    assert [member.seed for member in other.values()] == [1, 2, 1]


def test_the_student_looks_as_the_single_network_does() -> None:
    """So that it is as fast when it scores, and sees what its teacher sees."""
    single, student = load_recipe("ham10000-cpu"), load_recipe("ham10000-distilled")
    assert (student.input_spec, student.backbone.name) == (single.input_spec, single.backbone.name)


def test_the_digest_changes_with_the_content_and_not_with_the_spelling(tmp_path: Path) -> None:
    demo = load_recipe("demo")
    same = load_recipe(write(tmp_path, **demo.model_dump(mode="json")))
    assert same.digest == demo.digest == load_recipe("demo", {"optim.lr": "1e-3"}).digest
    changes: list[dict[str, Any]] = [{"seed": 1}, {"optim.lr": 0.003}, {"augment.flips": False}, {"validation_fold": 0}]
    changes += [{"train_share": 0.5}, {"augment.noise": 3}, {"augment.sharpness": 0.5}]
    assert len({load_recipe("demo", change).digest for change in changes} | {demo.digest}) == 8


def test_changes_on_top() -> None:
    assert load_recipe("demo", {"optim.epochs": 3, "loss.name": "focal"}).loss.name == "focal"  # demo has no loss block
    with pytest.raises(RecipeError, match=r"name\.first: 'name' holds no keys; expected a key such as optim\.epochs"):
        load_recipe("demo", {"name.first": 3})
