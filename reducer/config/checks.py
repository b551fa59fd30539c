"""Checks of single values, with messages that name the flag."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from reducer.config.settings import LARGEST_HASH, SMALLEST_HASH
from reducer.errors import InputError, nearest
from reducer.formatting import parse_bytes


def channels(name: str, value: object) -> tuple[float, ...]:
    """Return three numbers, for the red, green and blue channel, from a sequence or from text with commas.

    Raises
    ------
    InputError
        If the value is something else; names the flag.
    """
    parts = value.split(",") if isinstance(value, str) else value
    try:
        numbers = tuple(float(number) for number in parts)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != 3 or not all(map(math.isfinite, numbers)):
        raise InputError(f"{flag(name)} is {value!r}: expected three numbers, such as 0.485,0.456,0.406")
    return numbers


def file_digest(where: str, path: str) -> str:
    """Return the SHA-256 of a local file, in hex; the file is read once while its size and mtime stay the same.

    Raises
    ------
    InputError
        If it cannot be read.
    """
    try:
        state = os.stat(path)
        return _digest(path, state.st_size, state.st_mtime_ns)
    except OSError as error:
        raise InputError(f"{where} {path} cannot be read: {error.strerror or error}") from None


@lru_cache(maxsize=8)
def _digest(path: str, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def choose(name: str, value: str, known: tuple[str, ...]) -> None:
    """Refuse a value that is not one of the known values.

    Raises
    ------
    InputError
        Naming the flag, the nearest known value and all known values.
    """
    if value not in known:
        raise InputError(f"{flag(name)} {value!r}{nearest(str(value), known)}: expected one of {', '.join(known)}")


def known_keys(where: str, content: object, known: tuple[str, ...]) -> dict[str, Any]:
    """Check that a YAML mapping has only known keys, and return it.

    Raises
    ------
    InputError
        If it is no mapping, or has another key.
    """
    if not isinstance(content, dict):
        # Not the value itself: it may be a secret.
        kind = "nothing" if content is None else f"a {type(content).__name__}"
        raise InputError(f"{where}: expected the keys {', '.join(known)}; found {kind}")
    for key in content:
        if key not in known:
            raise InputError(f"{where}: unknown key {key!r}{nearest(str(key), known)}; known are {', '.join(known)}")
    return content


def bytes_of(name: str, text: str) -> int:
    """Return a number of bytes from text such as ``20GB``.

    Raises
    ------
    InputError
        If the text is no number of bytes; names the flag.
    """
    try:
        return parse_bytes(text)
    except (ValueError, OverflowError):
        raise InputError(
            f"{flag(name)} is {text!r}: expected a number of bytes such as 20GB (20 x 10^9), 500MB or 20GiB"
        ) from None


def check_count(name: str, value: object) -> None:
    """Refuse a value that is neither None nor a whole number of 1 or more.

    Raises
    ------
    InputError
        Naming the flag.
    """
    if value is not None and (not isinstance(value, int) or value < 1):
        raise InputError(f"{flag(name)} is {value!r}: expected a whole number of 1 or more")


def check_bits(name: str, value: object, bits: int) -> None:
    """Refuse a distance that is no whole number of bits from 0 to those of a hash.

    Raises
    ------
    InputError
        Naming the flag.
    """
    if not isinstance(value, int) or not 0 <= value <= bits:
        raise InputError(f"{flag(name)} is {value!r}: expected a whole number of bits from 0 to {bits}")


def check_hash(name: str, size: object) -> None:
    """Refuse a size that a perceptual hash cannot have.

    Raises
    ------
    InputError
        Naming the flag.
    """
    if not isinstance(size, int) or not SMALLEST_HASH <= size <= LARGEST_HASH:
        raise InputError(f"--hash-size is {size!r}: expected a whole number from {SMALLEST_HASH} to {LARGEST_HASH}")
    if name == "whash" and size.bit_count() != 1:
        raise InputError(f"--hash-size is {size}: whash needs a power of two (2, 4, 8, 16 or 32)")


def texts(name: str, values: Iterable[object]) -> tuple[str, ...]:
    """Return the values of a field that takes several as text, such as labels.

    Raises
    ------
    InputError
        If they are one text instead of a list.
    """
    if isinstance(values, str):
        raise InputError(f"{name}: give a list of {'labels' if name == 'labels' else 'patterns'}, not one text")
    return tuple(map(str, values))


def flag(name: str) -> str:
    """Return the flag of a field, as the command line writes it."""
    return "--" + name.replace("_", "-")


def is_whole(value: object) -> bool:
    """Tell whether a value is a whole number, and not true or false."""
    return isinstance(value, int) and not isinstance(value, bool)


def shown(value: object) -> str:
    """Return a value as a message shows it: without the content of lists and mappings, which may be a secret."""
    return f"a {type(value).__name__}" if isinstance(value, dict | list) else repr(value)
