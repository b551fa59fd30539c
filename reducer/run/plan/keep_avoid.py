"""The ids that are always kept, and columns or lines of a file."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from reducer.config.job import Job
from reducer.errors import InputError
from reducer.storage.location import Location
from reducer.storage.tables import EXAMPLES, column_names, is_parquet, read_columns, read_lines


def find_always_keep(job: Job, ids: pa.ChunkedArray) -> NDArray[np.bool_]:
    """Which rows of the manifest are always kept.

    Parameters
    ----------
    job : Job
        Whose ``always_keep`` names the file.
    ids : pyarrow.ChunkedArray of string, shape (n,)
        The manifest's ids.

    Returns
    -------
    ndarray of bool, shape (n,)

    Raises
    ------
    InputError
        If the file cannot be read, or names an id that the manifest does not have.
    """
    if job.always_keep is None:
        return np.zeros(len(ids), dtype=bool)
    where = f"--always-keep {job.always_keep}"
    wanted, lines = _column_or_lines(where, job.always_keep, job.id_column)
    if len(wanted) == 0:
        raise InputError(f"{where} holds no id")
    unknown = wanted.filter(pc.invert(pc.is_in(wanted, value_set=ids.combine_chunks())))
    if len(unknown):
        shown = ", ".join(map(repr, unknown[:EXAMPLES].to_pylist()))
        raise InputError(
            f"{where}: {len(unknown)} of {len(wanted)} ids are not in the manifest: {shown}"
            f"{' ...' if len(unknown) > EXAMPLES else ''}{_no_column(job.id_column) if lines else ''}"
        )
    found: NDArray[np.bool_] = pc.is_in(ids, value_set=wanted).to_numpy()
    return found


def _column_or_lines(where: str, path: str, name: str) -> tuple[pa.Array, bool]:
    """A named column of a CSV or Parquet file, or else a text file's lines; and whether it is lines."""
    place = Location(path)
    names = column_names(where, place)
    if name in names or is_parquet(where, place):
        return read_columns(where, place, [name], "Give that column, or a text file")[name].combine_chunks(), False
    return pa.array(read_lines(where, place), pa.string()), True


def _no_column(name: str) -> str:
    return f". (It has no column {name!r}, so each line was taken for one.)"
