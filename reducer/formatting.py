"""Numbers as people write and read them. Knows nothing of photos, runs or commands."""

from __future__ import annotations

import re
from collections.abc import Mapping

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
