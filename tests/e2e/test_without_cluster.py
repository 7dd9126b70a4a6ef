"""A hospital site installs neither Ray nor Prefect nor Flower, and still prepares, trains and evaluates."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
for absent in ("ray", "prefect", "flwr"):
    sys.modules[absent] = None  # any import of it fails, as where it is not installed
from dermaflow.cli import app
app({words})
"""


def run(*words: object) -> str:
    code = SCRIPT.format(words=[str(word) for word in words])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_way_from_images_to_a_report_needs_no_cluster(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(
        "name: tiny\ninput: {height: 24, width: 32}\nbackbone: {name: seed_cnn}\noptim: {head_epochs: 0, epochs: 1}\n"
    )
    data, shards, model = tmp_path / "data", tmp_path / "shards", tmp_path / "model"
    run("data", "synth", "--out", data, "--images", 100, "--height", 48, "--width", 64)
    assert "100 images read" in run("prepare", "--data", data, "--out", shards)
    run("train", "--shards", shards, "--recipe", tmp_path / "tiny.yaml", "--out", model)
    run("evaluate", "--model", model, "--shards", shards, "--out", tmp_path / "report", "--resamples", 20)
    assert (tmp_path / "report" / "report.html").stat().st_size > 10_000
