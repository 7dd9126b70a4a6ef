"""Every file that outlives a program names its format; a program says clearly when it does not know it."""

from __future__ import annotations

import json

from dermaflow.errors import DermaflowError


def check_format(content: bytes, known: str, where: object, error: type[DermaflowError]) -> None:
    """Refuse the format of another version, before its fields are taken for damage.

    Args:
        content: JSON with a field ``format``, ``name/number``.
        known: The format that this version reads and writes.
        where: For the message.
        error: What is raised.

    Raises:
        DermaflowError: Of the class `error`: another format. What is no JSON is left to whoever parses it.
    """
    try:
        found = json.loads(content)
    except ValueError:
        return
    stated = found.get("format") if isinstance(found, dict) else None
    if isinstance(stated, str) and stated != known:
        newer = _number(stated) > _number(known) and stated.partition("/")[0] == known.partition("/")[0]
        raise error(
            f"format {stated!r}" + (", of a newer DermaFlow" if newer else ""), where=where, expected=repr(known),
            todo="install the version of DermaFlow that wrote it, or a newer one" if newer
            else "check the path; docs/upkeep.md says which versions read what",
        )  # fmt: skip


def _number(stated: str) -> int:
    number = stated.rpartition("/")[2]
    return int(number) if number.isdigit() else 0
