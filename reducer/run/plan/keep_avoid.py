"""Read the ids that are always kept; read a column or the lines of a file."""

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
    """Find the rows of the manifest that are always kept.

    Parameters
    ----------
    job : Job
        Job whose ``always_keep`` names the file of ids.
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
    wanted, lines = read_column_or_lines(where, job.always_keep, job.id_column)
    if len(wanted) == 0:
        raise InputError(f"{where} holds no id")
    unknown = wanted.filter(pc.invert(pc.is_in(wanted, value_set=ids.combine_chunks())))
    if len(unknown):
        shown = ", ".join(map(repr, unknown[:EXAMPLES].to_pylist()))
        raise InputError(
            f"{where}: {len(unknown)} of {len(wanted)} ids are not in the manifest: {shown}"
            f"{' ...' if len(unknown) > EXAMPLES else ''}{no_column_hint(job.id_column) if lines else ''}"
        )
    is_kept: NDArray[np.bool_] = pc.is_in(ids, value_set=wanted).to_numpy()
    return is_kept


def read_column_or_lines(where: str, path: str, name: str) -> tuple[pa.Array, bool]:
    """Read a named column of a CSV or Parquet file, or else the lines of a text file.

    Parameters
    ----------
    where : str
        The option and the file, for messages.
    path : str
        Path of the file.
    name : str
        Name of the column.

    Returns
    -------
    pyarrow.Array of string
        The column, or the lines.
    bool
        Whether they are lines.

    Raises
    ------
    InputError
        If the file cannot be read, or is a Parquet file without that column.
    """
    location = Location(path)
    if name in column_names(where, location) or is_parquet(where, location):
        return read_columns(where, location, [name], "Give that column, or a text file")[name].combine_chunks(), False
    return pa.array(read_lines(where, location), pa.string()), True


def no_column_hint(name: str) -> str:
    """Return the end of a message about lines that are not what they should be."""
    return f". (It has no column {name!r}, so each line was taken for one.)"
