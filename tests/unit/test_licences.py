"""The licences that are listed are those of the versions that are pinned, and the bill of materials names them all."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / ".ci/licences.py"))


def test_every_pin_has_its_licence_in_the_page() -> None:
    lines = (ROOT / "docs/licences.md").read_text(encoding="utf-8").splitlines()
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines if line.startswith("| ")]
    listed = [(name, version) for name, version, _ in rows[1:]]
    assert listed == script()["pinned"](), "run make licences"
    assert all(licence not in ("", "not installed here") for *_, licence in rows[1:])


def test_the_bill_of_materials_is_cyclonedx_and_names_every_pin(tmp_path: Path) -> None:
    made = script()
    made["main"](tmp_path / "build/sbom.json")
    bill = json.loads((tmp_path / "build/sbom.json").read_text())
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    purls = [component["purl"] for component in bill["components"]]
    assert purls == [f"pkg:pypi/{name.lower()}@{version}" for name, version in made["pinned"]()]
    assert len(set(purls)) == len(purls) and all(c["licenses"] for c in bill["components"])
