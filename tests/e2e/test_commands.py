"""The commands as a user types them, from synthetic images to a promoted model, and what they say to bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from dermaflow.cli.main import app
from dermaflow.learning.recipe import load_recipe

TINY = """
name: tiny
input: {height: 24, width: 32}
backbone: {name: seed_cnn}
optim: {head_epochs: 0, epochs: 2, batch_size: 16}
"""


def run(*words: object, status: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == status, result.output + (result.stderr or "")
    return result


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every command ran once, in order."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "tiny.yaml").write_text(TINY)
    run("data", "synth", "--out", folder / "data", "--images", 210, "--seed", 3, "--height", 48, "--width", 64)
    run("prepare", "--data", folder / "data", "--out", folder / "shards")
    run("train", "--shards", folder / "shards", "--recipe", folder / "tiny.yaml", "--out", folder / "model")
    run(
        "evaluate",
        "--model",
        folder / "model",
        "--shards",
        folder / "shards",
        "--out",
        folder / "report",
        "--resamples",
        50,
    )
    return folder


def test_check_prints_a_data_sheet(work: Path) -> None:
    output = run("data", "check", work / "data", "--json", work / "sheet.json", "--strict").output
    assert "mel" in output and "vidir_modern" in output and "no problems found" in output
    assert json.loads((work / "sheet.json").read_text())["images"] == 210


def test_evaluate_writes_what_others_script_against(work: Path) -> None:
    metrics = json.loads((work / "report" / "metrics.json").read_text())
    assert 0 <= metrics["populations"]["all"]["points"]["accuracy"]["accuracy"]["value"] <= 1
    assert metrics["provenance"]["command"].startswith("dermaflow evaluate --model")
    assert "<html" in (work / "report" / "report.html").read_text()
    bundle = json.loads((work / "model" / "bundle.json").read_text())
    assert bundle["metrics"]["accuracy"] == pytest.approx(
        metrics["populations"]["all"]["points"]["accuracy"]["accuracy"]["value"]
    )


def test_prepare_again_does_nothing(work: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (work / "shards").rglob("*") if path.is_file()}
    assert "0 written now, 0 images read" in run("prepare", "--data", work / "data", "--out", work / "shards").output
    assert before == {path: path.stat().st_mtime_ns for path in (work / "shards").rglob("*") if path.is_file()}


def test_registry_commands(work: Path, tmp_path: Path) -> None:
    registry = ["--registry", tmp_path / "registry"]
    run(
        "train",
        "--shards",
        work / "shards",
        "--recipe",
        work / "tiny.yaml",
        "--out",
        tmp_path / "other",
        "--set",
        "seed=1",
    )
    first = run("models", "add", work / "model", *registry).output.split(";")[0]
    second = run("models", "add", tmp_path / "other", "--name", "other", *registry).output.split(";")[0]
    run("models", "promote", first, "--reason", "first model", "--by", "me", *registry)
    assert f"champion: {second}" in run("models", "promote", second, "--reason", "trial", *registry).output
    assert f"champion: {first}" in run("models", "rollback", "--reason", "worse", *registry).output
    listed = run("models", "list", *registry).output
    assert "★" in listed and "tiny" in listed and "other" in listed
    assert "data" in run("models", "show", *registry).output
    assert "seed" in run("models", "compare", first, second, *registry).output


def test_a_changed_byte_in_a_bundle_is_refused(work: Path, tmp_path: Path) -> None:
    shutil.copytree(work / "model", tmp_path / "model")
    weights = tmp_path / "model" / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    message = run(
        "evaluate", "--model", tmp_path / "model", "--shards", work / "shards", "--out", tmp_path / "r", status=1
    ).stderr
    assert "BundleError" in message and "weights.safetensors" in message and "Traceback" not in message
    assert not (tmp_path / "r").exists()


def test_a_misspelt_key_is_named_with_the_right_one(work: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("name: bad\noptim: {epoch: 3}\n")
    message = run(
        "train", "--shards", work / "shards", "--recipe", tmp_path / "bad.yaml", "--out", tmp_path / "m", status=1
    ).stderr
    assert "'optim.epoch'" in message and "'epochs'" in message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("image_id,lesion_id\nISIC_1,HAM_1\n", "dx"),
        ("image_id,lesion_id,dx\nISIC_1,HAM_1,mel\nISIC_1,HAM_2,nv\n", "ISIC_1"),
    ],
    ids=["missing column", "duplicate image id"],
)
def test_bad_metadata_ends_with_one_message(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "HAM10000_metadata.csv").write_text(content)
    (tmp_path / "ISIC_1.jpg").write_bytes(b"\xff\xd8\xff")
    message = run("prepare", "--data", tmp_path, "--out", tmp_path / "out", status=1).stderr
    assert "DataError" in message and said in message and "Traceback" not in message


def test_an_empty_folder_ends_with_one_message(tmp_path: Path) -> None:
    assert "DataError" in run("data", "check", tmp_path, status=1).stderr


def test_a_checkpoint_of_another_recipe_is_not_continued(work: Path, tmp_path: Path) -> None:
    import torch

    checkpoints = tmp_path / "model.checkpoints"
    checkpoints.mkdir()
    torch.save({"recipe": "0" * 64, "data": "0" * 64, "epoch": 0}, checkpoints / "latest.pt")
    message = run(
        "train", "--shards", work / "shards", "--recipe", work / "tiny.yaml", "--out", tmp_path / "model", status=1
    ).stderr
    assert "CheckpointError" in message and "another recipe" in message


def test_every_recipe_that_comes_along_loads_and_help_names_it() -> None:
    from dermaflow.learning.recipe import shipped_recipes

    text = run("train", "--help").output
    for name in shipped_recipes():
        assert load_recipe(name).name == name
        assert name in text
