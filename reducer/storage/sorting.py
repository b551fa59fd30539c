"""Equal rows that stand together: where each group of them starts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
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


def position_in_group(group: NDArray[np.int64]) -> NDArray[np.int64]:
    """Place of each row in its group, the first is 0; equal groups stand together."""
    starts = np.flatnonzero(is_new(group))
    return np.arange(len(group)) - np.repeat(starts, np.diff(starts, append=len(group)))


def text_ranks(column: pa.ChunkedArray) -> NDArray[np.int64]:
    """Whole numbers that sort as the texts do (by code point), equal for equal texts."""
    return ranked(column)[0].astype(np.int64)


def numbered(column: pa.ChunkedArray) -> tuple[NDArray[np.int64], list[str]]:
    """The same, and the text of each number."""
    rank, texts = ranked(column)
    return rank.astype(np.int64), texts.to_pylist()


def ranked(column: pa.ChunkedArray) -> tuple[NDArray[np.int32], pa.Array]:
    """As `numbered`, in little memory where there are few different texts."""
    encoded = column.combine_chunks().dictionary_encode()
    order = pc.sort_indices(encoded.dictionary)
    rank = np.empty(len(order), dtype=np.int32)
    rank[order.to_numpy()] = np.arange(len(order), dtype=np.int32)
    return rank[encoded.indices.to_numpy()], encoded.dictionary.take(order)


def text_order(column: pa.ChunkedArray) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Sort texts that are nearly all different, by code point.

    Eight bytes of a text are compared at a time, as a whole number: for ids, mostly the first eight decide.

    Parameters
    ----------
    column : pyarrow.ChunkedArray of string, shape (n,)
        The texts, without nulls.

    Returns
    -------
    ndarray of int64, shape (n,)
        Which text comes first, second and so on; equal texts stay in their order.
    ndarray of bool, shape (n,)
        Which texts differ from the one before them in this order.
    """
    lengths = pc.binary_length(column).to_numpy()
    # So that eight bytes can be read from every byte of the column's.
    texts = pa.concat_arrays([*column.chunks, pa.array(["\0" * 8])])
    key = _eight_bytes(texts, 0, slice(len(lengths)))
    order = np.argsort(key, kind="stable")
    key = key[order]
    new = is_new(key)
    at = 8
    while len(places := in_groups(new)):
        rows = order[places]
        # A text that is another one with NULs behind it is told from that by its length alone.
        is_last = at >= lengths[rows].max()
        key = lengths[rows] if is_last else _eight_bytes(texts, at, rows)
        own = np.lexsort((key, np.cumsum(new)[places]))
        order[places], key = rows[own], key[own]
        new[places[1:]] |= key[1:] != key[:-1]
        if is_last:
            break
        at += 8
    return order, new


def _eight_bytes(texts: pa.Array, at: int, rows: slice | NDArray[np.int64]) -> NDArray[np.uint64]:
    """Bytes of texts from one on, as numbers that sort as they do; zeros where a text has ended."""
    _, offsets, content = texts.buffers()
    ends = np.frombuffer(offsets, np.int32)
    left = np.clip(ends[1:][rows] - ends[:-1][rows] - at, 0, 8)
    from_any_byte = np.ndarray((content.size - 7,), ">u8", content, strides=(1,))
    key: NDArray[np.uint64] = from_any_byte[np.where(left, ends[:-1][rows] + at, 0)].astype(np.uint64)
    beyond = (64 - 8 * left).astype(np.uint8)
    key >>= beyond
    key <<= beyond
    return key
