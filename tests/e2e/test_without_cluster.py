"""A hospital site installs neither Ray nor Prefect nor Flower, and still prepares, trains and evaluates."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pandas as pd

from dermaflow.datasets.synthetic.patients import draw_patients

SCRIPT = """
import sys
for absent in ("ray", "prefect", "flwr"):
    sys.modules[absent] = None  # any import of it fails, as where it is not installed
from dermaflow.cli.main import app
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
    report = tmp_path / "report"
    assert (report / "report.html").stat().st_size > 10_000
    draw_patients(pd.read_parquet(report / "predictions.parquet"), 0).to_csv(tmp_path / "patients.csv", index=False)
    pathways = tmp_path / "pathways"
    patients = ("--patients", tmp_path / "patients.csv", "--model", model)
    said = run("recommend", "--findings", report / "findings.parquet", *patients, "--out", pathways)
    urgency = pd.read_parquet(pathways / "pathways.parquet")["urgency"]
    assert f"{len(urgency)} lesions   U1 {(urgency == 'U1').sum()}" in said
    by_report = Counter[str]()
    for counts in json.loads((report / "metrics.json").read_text())["pathways"].values():
        by_report.update(counts)
    assert by_report.total() == len(urgency) == len(list((pathways / "patients").glob("*.html")))
