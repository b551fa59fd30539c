"""Expected failures: one clear message for a person, and the exit code of the command."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ReducerError(Exception):
    """An expected failure: one clear message for a person, and the exit code of the command.

    Attributes
    ----------
    exit_code : int
        What the command line exits with.
    """

    exit_code = 1


class InputError(ReducerError):
    """Something is wrong with the input or the configuration; found before the first photo is hashed."""

    exit_code = 2


class BudgetError(InputError):
    """A budget is under what is guaranteed."""


class ListingError(InputError):
    """The options do not fit the photos, which only the shards could tell of."""


class TooManyFailuresError(ReducerError):
    """More photos could not be read than the job allows."""

    exit_code = 3


class LostLockError(ReducerError):
    """Another run has taken the run folder: nothing may be written any more."""


class StoreError(ReducerError):
    """A store takes our credentials no more, or answers no request: no fault of the photos that were asked for."""


class ClusterError(ReducerError):
    """The cluster failed in the middle of a job."""


def one_line(error: BaseException) -> str:
    """An error's kind and message in one line, not too long."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def nearest(word: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the nearest known word, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
