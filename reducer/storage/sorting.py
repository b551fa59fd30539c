"""Sort texts, number them, and find groups of equal rows. Pure."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

#: Texts that are compared with their neighbours at a time.
COMPARED_ROWS = 2**20


def is_new(*columns: NDArray[Any]) -> NDArray[np.bool_]:
    """Mark the rows that differ from the row before in any column.

    Parameters
    ----------
    *columns : ndarray, shape (rows,)
        One or more.

    Returns
    -------
    ndarray of bool, shape (rows,)
        True for the first row.
    """
    new = np.ones(len(columns[0]), dtype=bool)
    if len(new):
        new[1:] = np.logical_or.reduce([column[1:] != column[:-1] for column in columns])
    return new


def in_groups(new: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Return the positions of rows that are equal to the row before or after them.

    Parameters
    ----------
    new : ndarray of bool, shape (rows,)
        From `is_new`.
    """
    equal = ~new
    equal[:-1] |= ~new[1:]
    return np.flatnonzero(equal)


def position_in_group(group: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the position of each row in its group, counted from 0.

    Parameters
    ----------
    group : ndarray of int64, shape (rows,)
        Number of each row's group; the rows of a group stand together.
    """
    starts = np.flatnonzero(is_new(group))
    return np.arange(len(group)) - np.repeat(starts, np.diff(starts, append=len(group)))


def text_ranks(column: pa.ChunkedArray) -> NDArray[np.int64]:
    """Return whole numbers that sort as texts do (by code point), equal for equal texts.

    Parameters
    ----------
    column : pyarrow.ChunkedArray of string, shape (n,)
        Texts, without nulls.
    """
    return ranked(column)[0].astype(np.int64)


def numbered(column: pa.ChunkedArray) -> tuple[NDArray[np.int64], list[str]]:
    """Number texts in their order (by code point), and return the different texts in that order, too.

    Parameters
    ----------
    column : pyarrow.ChunkedArray of string, shape (n,)
        Texts, without nulls.
    """
    rank, texts = ranked(column)
    return rank.astype(np.int64), texts.to_pylist()


def ranked(column: pa.ChunkedArray) -> tuple[NDArray[np.int32], pa.Array]:
    """Number texts as `numbered` does, in little memory where few of them are different."""
    encoded = column.combine_chunks().dictionary_encode()
    order = pc.sort_indices(encoded.dictionary)
    rank = np.empty(len(order), dtype=np.int32)
    rank[order.to_numpy()] = np.arange(len(order), dtype=np.int32)
    return rank[encoded.indices.to_numpy()], encoded.dictionary.take(order)


def text_order(column: pa.ChunkedArray) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Sort texts that are nearly all different, by code point.

    Parameters
    ----------
    column : pyarrow.ChunkedArray of string, shape (n,)
        Texts, without nulls.

    Returns
    -------
    ndarray of int64, shape (n,)
        Positions of the texts in sorted order; equal texts stay in their order.
    ndarray of bool, shape (n,)
        Whether each text differs from the one before it in this order.
    """
    texts = column.combine_chunks()
    # Stable, and by the bytes of UTF-8, whose order is that of code points.
    order = pc.sort_indices(texts)
    new = np.ones(len(order), dtype=bool)
    for start in range(0, len(order) - 1, COMPARED_ROWS):
        neighbours = texts.take(order.slice(start, COMPARED_ROWS + 1))
        differs = pc.not_equal(neighbours[1:], neighbours[:-1])
        new[start + 1 : start + len(neighbours)] = differs.to_numpy(zero_copy_only=False)
    return order.to_numpy().view(np.int64), new
