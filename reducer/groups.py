"""Equal rows that stand together: where each group of them starts."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def is_new(*columns: NDArray[Any]) -> NDArray[np.bool_]:
    """Which rows differ from the row before in any column; the first row does.

    Parameters
    ----------
    *columns : ndarray, shape (rows,)
        One or more.
    """
    new = np.ones(len(columns[0]), dtype=bool)
    if len(new):
        new[1:] = np.logical_or.reduce([column[1:] != column[:-1] for column in columns])
    return new


def in_groups(new: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Places of rows that are equal to the one before or behind them, by which ones differ from the former."""
    equal = ~new
    equal[:-1] |= ~new[1:]
    return np.flatnonzero(equal)


def place_in_group(group: NDArray[np.int64]) -> NDArray[np.int64]:
    """Place of each row in its group, the first is 0; equal groups stand together."""
    starts = np.flatnonzero(is_new(group))
    return np.arange(len(group)) - np.repeat(starts, np.diff(starts, append=len(group)))
