"""A run whose normalisation stays at the sites: what the common model lacks, and what a site makes of it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from federation_here import a_plan, run_here
from safetensors.numpy import load_file
from tiny_data import tiny_shards
from typer.testing import CliRunner, Result

from clients.result import save_model
from clients.simulation import claim
from clients.site_cli import app
from clients.site_config import SiteConfig, make_site
from dermaflow.bundles.bundle import load_bundle
from dermaflow.preparation.reading import ShardFolder

pytestmark = pytest.mark.usefixtures("one_thread")
MAKE_CERTIFICATES = Path(__file__).parents[2] / "deploy/federation/make_certificates.sh"
RUN = "0123456789ab"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("personal"), seed=1)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    subprocess.run([MAKE_CERTIFICATES, folder, "localhost"], check=True, capture_output=True)
    return folder / "ca.crt"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_site_puts_its_own_normalisation_into_the_common_model(shards: Path, tmp_path: Path, authority: Path) -> None:
    plan = a_plan(shards, tmp_path / "hub", rounds=1, norm="local", name=RUN)
    claim(plan)
    run_here(plan)
    common = load_bundle(save_model(plan))
    assert common.bundle.calibration is None and "dermaflow site model" in common.card
    make_site(tmp_path / "site", SiteConfig(name="st-mary", shards=str(shards), superlink="hub:1"), authority)
    missing = run("model", tmp_path / "hub/model", "--out", tmp_path / "own", "--site", tmp_path / "site")
    assert missing.exit_code == 1 and "no normalisation of the run" in " ".join(missing.output.split())
    shutil.copytree(tmp_path / "hub/sites/rosendahl", tmp_path / "site/state", dirs_exist_ok=True)

    done = run("model", tmp_path / "hub/model", "--out", tmp_path / "own", "--site", tmp_path / "site")
    assert done.exit_code == 0, done.output
    own, norm = load_bundle(tmp_path / "own"), load_file(tmp_path / f"site/state/{RUN}/norm.safetensors")
    for name, tensor in own.weights.items():
        expected = torch.from_numpy(norm[name]) if name in norm else common.weights[name]
        assert torch.equal(tensor, expected), name
    assert any(not torch.equal(own.weights[name], common.weights[name]) for name in norm)
    assert own.bundle.name.endswith("-st-mary") and own.bundle.calibration is not None
    assert own.bundle.calibration.data_hash == ShardFolder(shards).manifest.data_hash
