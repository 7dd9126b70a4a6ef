"""Read one value of one field of a patient or a lesion, as people, spreadsheets and other programs write it."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable
from dataclasses import dataclass
from datetime import date
from difflib import get_close_matches
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from dermaflow.schemas.patient import Lesion, Patient, YesNo

FIELDS = {**Patient.model_fields, **Lesion.model_fields}
"""No field of a patient has the name of one of a lesion, so one flat row holds both."""

BIRTH_DATE = "birth_date"
ALIASES = {
    "localization": "site",  # HAM10000
    "age_approx": "age",  # ISIC archive, as the next two
    "fitzpatrick_skin_type": "fitzpatrick",
    "clin_size_long_diam_mm": "diameter_mm",
    "birthdate": BIRTH_DATE,
    "date_of_birth": BIRTH_DATE,
}
COLUMNS = (*FIELDS, BIRTH_DATE)

_UNKNOWN = {"", "unknown", "na", "n/a", "nan", "null", "?", "-"}
_YES_NO = {"yes": "yes", "y": "yes", "true": "yes", "1": "yes", "no": "no", "n": "no", "false": "no", "0": "no"}
_WORDS = {"f": "female", "m": "male"}
_ROMAN = {"i": "1", "ii": "2", "iii": "3", "iv": "4", "v": "5", "vi": "6"}
_DATE = re.compile(r"(\d{4})(?:-(\d{2})(?:-(\d{2}))?)?")
_MAX_LENGTH = 200  # characters of an id, and of a value in a message


class Unreadable(ValueError):
    """A value that does not fit its field; the text says what it was and what was expected."""


@dataclass(frozen=True)
class _Unknown:
    """The value of a field that was not given."""


UNKNOWN = _Unknown()


def column_name(text: str) -> str:
    """The field that a column stands for, or the name itself in lower case."""
    name = re.sub(r"[\s\-]+", "_", text.strip().lower())
    name = re.sub(r"^(patient|lesion)\.", "", name)
    return ALIASES.get(name, name)


def nearest(word: str, words: list[str] | tuple[str, ...]) -> str:
    """The closest of the words, as the end of a message; empty if none is close."""
    found = get_close_matches(word, words, n=1, cutoff=0.6)
    return f"; did you mean {found[0]!r}?" if found else ""


class FieldReader:
    """Reads values, each different one once: a column holds few different values."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, type, Hashable], Any] = {}

    def read(self, field: str, raw: object) -> Any:
        """The value as the schema wants it.

        Args:
            field: Of `FIELDS`.
            raw: Text, number, truth value, list or None.

        Returns:
            The value, or `UNKNOWN`.

        Raises:
            Unreadable: It does not fit the field.
        """
        if not isinstance(raw, Hashable):
            return _read(field, raw)
        key = (field, type(raw), raw)
        if key not in self._known:
            self._known[key] = _read(field, raw)
        return self._known[key]


def age_at(birth: object, as_of: date) -> float | _Unknown:
    """Completed years at a date; from a birth date without day or month, those of someone born in its middle.

    Raises:
        Unreadable: It is no ISO date, or lies after `as_of`. The text does not repeat the date.
    """
    if isinstance(birth, date):
        text = birth.isoformat()[:10]
    else:
        text = "" if birth is None or birth != birth else str(birth).strip()
    if text.lower() in _UNKNOWN:
        return UNKNOWN
    match = _DATE.fullmatch(text[:10]) if len(text) <= 10 or text[10] in "T " else None
    if match is None:
        raise Unreadable("is no date like 1958-11-23")
    year, month, day = (int(part) if part else None for part in match.groups())
    try:
        born = date(year or 1, month or 7, day or (15 if month else 1))
        earliest = date(year or 1, month or 1, day or 1)
    except ValueError:
        raise Unreadable("is no date of the calendar") from None
    if earliest > as_of:
        raise Unreadable(f"lies in the future, after {as_of}")
    return float(max(0, as_of.year - born.year - ((as_of.month, as_of.day) < (born.month, born.day))))


def _read(field: str, raw: object) -> Any:
    if field.endswith("_id"):
        return _identity(raw)
    if get_origin(FIELDS[field].annotation) is tuple:
        return _several(field, raw)
    if isinstance(raw, (list, tuple, dict)):
        raise Unreadable("holds several values; expected one")
    if raw is None or (isinstance(raw, float) and math.isnan(raw)):
        return UNKNOWN
    text = str(raw).strip()
    if text.lower() in _UNKNOWN:
        return UNKNOWN
    annotation = FIELDS[field].annotation
    if annotation == YesNo:
        return _yes_no(raw, text)
    if get_origin(annotation) is Literal:
        return _word(text, get_args(annotation))
    return _number(field, raw, text)


def _identity(raw: object) -> Any:
    if isinstance(raw, float) and raw.is_integer():
        raw = int(raw)  # how tables write a number with gaps in its column
    text = "" if raw is None or raw != raw else str(raw).strip()
    if isinstance(raw, (list, tuple, dict, bool)) or len(text) > _MAX_LENGTH or not text.isprintable():
        raise Unreadable(f"is no id; expected up to {_MAX_LENGTH} printable characters")
    return text or UNKNOWN


def _several(field: str, raw: object) -> Any:
    words = get_args(get_args(FIELDS[field].annotation)[0])
    if raw is None or raw != raw:
        return UNKNOWN
    if isinstance(raw, dict):
        raise Unreadable("is an object; expected words")
    parts = raw if isinstance(raw, (list, tuple)) else re.split(r"[|;,]", str(raw))
    found = [UNKNOWN if str(part).strip().lower() in _UNKNOWN else _word(str(part).strip(), words) for part in parts]
    named = dict.fromkeys("unknown" if part is UNKNOWN else part for part in found)
    if "none" in named and len(named) > 1:
        raise Unreadable("says 'none' and something else")
    return tuple(named) if set(named) - {"unknown"} else UNKNOWN


def _yes_no(raw: object, text: str) -> str:
    if isinstance(raw, float) and raw in (0.0, 1.0):
        text = str(int(raw))
    if text.lower() not in _YES_NO:
        raise Unreadable(f"is {_short(text)}; expected yes, no or unknown")
    return _YES_NO[text.lower()]


def _word(text: str, words: tuple[str, ...]) -> str:
    plain = {_plain(word): word for word in words}
    wanted = _plain(text)
    wanted = wanted if wanted in plain else _WORDS.get(wanted, wanted)
    if wanted not in plain:
        hint = nearest(wanted, tuple(plain)).replace("did you mean ", "the nearest is ").rstrip("?")
        raise Unreadable(f"is {_short(text)}{hint}; expected one of {', '.join(words)}")
    return plain[wanted]


def _plain(text: str) -> str:
    return re.sub(r"[\s_\-]+", " ", text.lower())


def _number(field: str, raw: object, text: str) -> int | float:
    expected = _bounds_text(field)
    if field == "fitzpatrick":
        text = _ROMAN.get(text.lower(), text)
    if re.fullmatch(r"[+-]?\d+,\d+", text):  # decimal comma
        text = text.replace(",", ".")
    try:
        value = float(text)
    except ValueError:
        raise Unreadable(f"is {_short(text)}; expected {expected}") from None
    if isinstance(raw, bool) or not math.isfinite(value) or not _within(field, value):
        raise Unreadable(f"is {_short(text)}; expected {expected}")
    if not _whole(field):
        return value
    if value != int(value):
        raise Unreadable(f"is {_short(text)}; expected {expected}")
    return int(value)


def _whole(field: str) -> bool:
    return set(get_args(FIELDS[field].annotation)) == {int, NoneType}


def _within(field: str, value: float) -> bool:
    for bound in FIELDS[field].metadata:
        if value < getattr(bound, "ge", -math.inf) or value > getattr(bound, "le", math.inf):
            return False
        if value <= getattr(bound, "gt", -math.inf):
            return False
    return True


def _bounds_text(field: str) -> str:
    low = next((getattr(b, k) for b in FIELDS[field].metadata for k in ("ge", "gt") if hasattr(b, k)), None)
    high = next((b.le for b in FIELDS[field].metadata if hasattr(b, "le")), None)
    exclusive = any(hasattr(b, "gt") for b in FIELDS[field].metadata)
    kind = "a whole number" if _whole(field) else "a number"
    return f"{kind} {'above' if exclusive else 'from'} {low:g} {'up ' if exclusive else ''}to {high:g}, or unknown"


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:39] + "…")
