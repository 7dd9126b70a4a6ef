"""Licences and bill of materials of the pinned packages, from what is installed: needs no network.

python .ci/licences.py docs/licences.md      the table
python .ci/licences.py build/sbom.json       CycloneDX 1.6, JSON
"""

from __future__ import annotations

import json
import re
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
PINS = ROOT / "deploy/constraints.txt"
RESTRICTED = re.compile(r"\bA?GPL|LGPL|EUPL|MPL|SSPL|Commons Clause|Proprietary", re.IGNORECASE)
PREFIX = "License :: "

HEAD = """# Licences

What `deploy/constraints.txt` pins, with the licence that each package states of itself; made by `make licences` from an
installation, and a test holds names and versions to the pins. DermaFlow comes with none of them: `pip` fetches them. Of
HAM10000 see the [README](../README.md).

The model that comes along (`dermaflow/bundles/shipped`) was trained on HAM10000, CC BY-NC 4.0, and is to be treated
alike: not for commercial use. Its first weights were MobileNetV2's of the ONNX Model Zoo, Apache 2.0.

Read the terms of those marked * before passing on an image that holds them: they are copyleft or not open.

| package | version | licence |
|---|---|---|
"""


def pinned() -> list[tuple[str, str]]:
    """Name and version of every pin."""
    lines = (line.partition("#")[0].strip() for line in PINS.read_text(encoding="utf-8").splitlines())
    return [(name, version) for name, _, version in (line.partition("==") for line in lines if line)]


def licence(name: str) -> str:
    """What a package states: the expression, else the classifiers, else the first line of the field."""
    try:
        found = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        return "not installed here"
    if found["License-Expression"]:
        return str(found["License-Expression"])
    classified = [c.rpartition(" :: ")[2] for c in found.get_all("Classifier") or () if c.startswith(PREFIX)]
    named = [c for c in classified if c != "OSI Approved"]
    first = str(found["License"] or "").strip().partition("\n")[0]
    return " / ".join(named) or (first if 0 < len(first) <= 80 and first != "UNKNOWN" else "see its files")


def table() -> str:
    rows = []
    for name, version in pinned():
        stated = licence(name)
        rows.append(f"| {name} | {version} | {stated}{' *' if RESTRICTED.search(stated) else ''} |\n")
    return HEAD + "".join(rows)


def bill() -> str:
    project = metadata.version("dermaflow")
    components = [
        {
            "type": "library", "name": name, "version": version, "bom-ref": f"pkg:pypi/{name.lower()}@{version}",
            "purl": f"pkg:pypi/{name.lower()}@{version}", "licenses": [{"license": {"name": licence(name)}}],
        }
        for name, version in pinned()
    ]  # fmt: skip
    content = {
        "bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1,
        "metadata": {"component": {"type": "application", "name": "dermaflow", "version": project,
                                   "bom-ref": f"pkg:pypi/dermaflow@{project}"}},
        "components": components,
    }  # fmt: skip
    return json.dumps(content, indent=1) + "\n"


def main(out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(bill() if out.suffix == ".json" else table(), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
