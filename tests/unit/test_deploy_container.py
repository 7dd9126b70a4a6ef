"""The container file: hadolint, what enters the build, and that the image holds every file the installed code needs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy/container"
DOCKERFILE = (FOLDER / "Dockerfile").read_text()


def test_hadolint_has_nothing_to_say(tmp_path: Path) -> None:
    hadolint = shutil.which("hadolint") or str(Path(sys.executable).with_name("hadolint"))
    if not Path(hadolint).exists():
        pytest.skip("needs hadolint")
    found = subprocess.run([hadolint, str(FOLDER / "Dockerfile")], capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stdout
    careless = tmp_path / "Dockerfile"
    careless.write_text("FROM python\nRUN cd /x && pip install torch\n")
    assert subprocess.run([hadolint, str(careless)], capture_output=True, timeout=60).returncode != 0


def test_the_image_is_pinned_and_runs_as_nobody_in_particular() -> None:
    assert re.search(r"^ARG BASE=python:3\.11\.\d+-slim-bookworm$", DOCKERFILE, re.M), "Python as in constraints.txt"
    stages = re.findall(r"^FROM (\S+) AS (\w+)$", DOCKERFILE, re.M)
    assert stages == [("${BASE}", "build"), ("${BASE}", "run")]
    run = DOCKERFILE.split("AS run")[1]
    assert re.findall(r"^USER (\S+)$", run, re.M) == ["10001:10001"] and "pip" not in run and "apt-get" not in run
    assert "TORCH_INDEX:?" in DOCKERFILE, "the cpu variant without the address of its wheels ends with a message"


def test_everything_that_is_copied_enters_the_build_and_nothing_else_does() -> None:
    lines = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    assert lines[1] == "*", "all is left out first"
    let_in = {line[1:] for line in lines if line.startswith("!")}
    copied = {
        name
        for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.M)
        for name in line.split()[:-1]
    }  # fmt: skip
    assert copied == let_in
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {name.rstrip("*") for name in packages} <= copied
    assert all((ROOT / name).exists() for name in copied)


@pytest.mark.slow
def test_the_wheel_holds_what_the_code_reads(tmp_path: Path) -> None:
    """The image installs a wheel, not a link to the sources: what package-data forgets is missing there only."""
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)],
        check=True, timeout=280,
    )  # fmt: skip
    [wheel] = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    for package in ("dermaflow", "flows", "clients", "serve"):
        for path in (ROOT / package).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert str(path.relative_to(ROOT)) in held
