"""Versions: what pyproject.toml asks for, and the versions that were tested together (deploy/constraints.txt)."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from dermaflow.doctor.checks import Check, ok, problem, warning
from dermaflow.errors import DataError

CONSTRAINTS = Path("deploy/constraints.txt")
TOGETHER = (("torch", "torchvision"), ("prefect", "fastapi"), ("ray", "pyarrow"))
"""Pairs of which one can be right alone and wrong beside the other."""
_SHOWN = 6  # versions named in one line
_EXTRAS = {"cluster": "ray", "flows": "prefect", "federated": "flwr", "serve": "limits"}
"""The package by which one sees that an extra is meant to be there."""


def default_constraints() -> Path | None:
    """The file of tested versions: in this folder, or beside the sources of an editable installation."""
    beside = Path(__file__).parents[2] / CONSTRAINTS
    return next((path for path in (CONSTRAINTS, beside) if path.is_file()), None)


def read_constraints(path: Path) -> dict[str, str]:
    """Version of each package, by its normalised name.

    Raises:
        DataError: It cannot be read, or a line is no ``name==version``.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(str(error.strerror), where=path, expected="lines of name==version") from error
    pins: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        name, same, version = text.partition("==")
        if not same:
            raise DataError(f"line {number}: {text!r}", where=path, expected="name==version")
        pins[canonicalize_name(name.strip())] = version.partition(";")[0].strip()
    return pins


def installed() -> dict[str, str]:
    """Version of every installed package, by its normalised name."""
    found = ((dist.metadata["Name"], dist.version) for dist in metadata.distributions())
    return {canonicalize_name(name): version for name, version in found if name}


def check_packages(constraints: Path | None, have: Mapping[str, str] | None = None) -> Iterator[Check]:
    """Python, what DermaFlow needs, and what differs from the tested versions.

    Args:
        constraints: File of tested versions; None where there is none.
        have: Installed versions; by default those of this Python.
    """
    have = installed() if have is None else have
    yield _python()
    yield from _needed(have)
    if constraints is None:
        yield warning("tested versions", "no deploy/constraints.txt here", "name it: --constraints FILE")
        return
    pins = read_constraints(constraints)
    differ = {name: (have[name], pin) for name, pin in pins.items() if name in have and _plain(have[name]) != pin}
    if not differ:
        yield ok("tested versions", f"all {len(pins.keys() & have.keys())} as in {constraints}")
        return
    shown = ", ".join(f"{name} {found} (tested {pin})" for name, (found, pin) in sorted(differ.items())[:_SHOWN])
    more = f" and {len(differ) - _SHOWN} more" if len(differ) > _SHOWN else ""
    yield warning("tested versions", shown + more, f"pip install -c {constraints} -e '.[all]'")


def _plain(version: str) -> str:
    """Without what a build adds, as in 2.9.1+cpu."""
    return version.partition("+")[0]


def _python() -> Check:
    asked = metadata.metadata("dermaflow")["Requires-Python"]
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if Version(platform.python_version()) in Requirement(f"python{asked}").specifier:
        return ok("python", found)
    return problem("python", f"{found}, {sys.executable}", f"use Python {asked}")


def _needed(have: Mapping[str, str]) -> Iterator[Check]:
    missing, wrong, extras = [], [], set()
    for text in metadata.requires("dermaflow") or ():
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        if name == "dermaflow":
            continue
        extra = next((e for e in _EXTRAS if requirement.marker and f'"{e}"' in str(requirement.marker)), None)
        if requirement.marker and extra is None:  # of `all` and `dev`: repeated elsewhere, or not for work
            continue
        if extra and _EXTRAS[extra] not in have:
            extras.add(extra)
            continue
        if name not in have:
            missing.append(text.partition(";")[0])
        elif Version(have[name]) not in requirement.specifier:
            wrong.append(f"{name} {have[name]}, needed {requirement.specifier}")
    if missing or wrong:
        said = [f"missing {', '.join(missing)}"] if missing else []
        yield problem("packages", "; ".join([*said, *wrong]), "make install, or pip install -e '.[all]'")
    else:
        left = f"; not installed: {', '.join(sorted(extras))}" if extras else ""
        yield ok("packages", f"dermaflow {metadata.version('dermaflow')}, all that it needs{left}")
