"""Numbers as people write and read them. Knows nothing of photos, runs or commands."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping

#: Bytes of each unit that a size may be written in, lower case: powers of 1000, and of 1024 with an ``i``.
BYTE_UNITS = {"": 1, "b": 1}
for _power, _prefix in enumerate("kmgtp", start=1):
    BYTE_UNITS |= {_prefix: 1000**_power, f"{_prefix}b": 1000**_power}
    BYTE_UNITS |= {f"{_prefix}i": 1024**_power, f"{_prefix}ib": 1024**_power}
#: Seconds of each unit that a length of time may be written in, lower case.
SECOND_UNITS = {"": 1.0, "ms": 0.001, "us": 1e-6, "ns": 1e-9, "s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
for _name in ("second", "minute", "hour", "day", "week"):
    SECOND_UNITS |= {_name: SECOND_UNITS[_name[0]], f"{_name}s": SECOND_UNITS[_name[0]]}
for _name in ("milli", "micro", "nano"):
    _seconds = {"milli": 1e-3, "micro": 1e-6, "nano": 1e-9}[_name]
    SECOND_UNITS |= {f"{_name}second": _seconds, f"{_name}seconds": _seconds}


#: Characters that are shown of a text from outside, where there is little room.
SHOWN_CHARACTERS = 160
#: Those of C0 and C1 but line breaks and tabs, and Unicode's marks of direction.
CONTROLS = r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]"


def parse_bytes(text: str) -> int:
    """Return the number of bytes that a text such as ``20GB``, ``1.5 MiB`` or ``500`` stands for.

    Raises
    ------
    ValueError
        If it does not begin with a number, or the unit is unknown.
    OverflowError
        If it is infinite.
    """
    return int(_parse(text, BYTE_UNITS))


def parse_seconds(text: str) -> float:
    """Return the seconds that a text such as ``60s``, ``10 minutes`` or ``1.5`` stands for.

    Raises
    ------
    ValueError
        If it does not begin with a number, or the unit is unknown.
    """
    return float(_parse(text, SECOND_UNITS))


def _parse(text: str, units: Mapping[str, float]) -> float:
    found = re.fullmatch(r"(\d[\d.]*(?:e[+-]?\d+)?)([a-z]*)", text.replace(" ", "").lower())
    if found is None or found[2] not in units:
        raise ValueError(text)
    return float(found[1]) * units[found[2]]


def format_distance(distance: float, unit: str) -> str:
    """A distance as people read it."""
    if unit == "cosine":
        return f"{distance:.4f}"
    return f"{distance:g} bit{'' if distance == 1 else 's'}"


def format_bytes(count: int) -> str:
    """A number of bytes as people write it (20 GB = 20 x 10^9 bytes)."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def format_duration(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def clip(text: object, most: int = SHOWN_CHARACTERS) -> str:
    """A text that is too long without its middle: paths begin alike, and messages end alike.

    Characters that control others, the direction of writing among them, are shown as what cannot be shown.
    """
    shown, half = re.sub(CONTROLS, "\ufffd", str(text)), most // 2
    return shown if len(shown) <= most else f"{shown[:half]}…{shown[len(shown) - half :]}"


def format_labels(labels: Iterable[str]) -> str:
    """Labels as ``--labels`` takes them (`reducer.formatting.parse_labels`)."""
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(labels)
    return text.getvalue()


def parse_labels(text: str) -> tuple[str, ...]:
    """Labels separated by commas; one that holds a comma stands in double quotes, as in CSV."""
    return tuple(label for row in csv.reader([text]) for label in row)
