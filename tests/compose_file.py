"""compose.yaml as Compose reads it: anchors resolved, ${NAME:-default} and ${NAME:?message} filled in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parents[1] / "deploy/compose"
_VARIABLE = re.compile(r"\$\$|\$\{(\w+)(?::([-?])([^}]*))?\}")


class Unset(Exception):
    """A variable that must be set is not."""


def filled(text: str, variables: Mapping[str, str]) -> str:
    """The text with its variables put in."""

    def value(found: re.Match[str]) -> str:
        if found[0] == "$$":
            return "$"
        given = variables.get(found[1], "")
        if given or found[2] is None:
            return given
        if found[2] == "?":
            raise Unset(f"{found[1]}: {found[3]}")
        return found[3]

    return _VARIABLE.sub(value, text)


def read_compose(variables: Mapping[str, str], name: str = "compose.yaml") -> dict[str, Any]:
    """A compose file."""
    return yaml.safe_load(filled((FOLDER / name).read_text(), variables))
