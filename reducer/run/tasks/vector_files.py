"""Files of vectors: the columns, dimensions and row groups that their footers tell."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from reducer.config.job import Job
from reducer.errors import InputError
from reducer.storage.location import Location, absolute, explaining_errors

log = logging.getLogger("reducer")

#: Samples that the digest of a file is made of, and bytes of each.
SAMPLES, SAMPLE_BYTES = 16, 2**16
#: Bytes that are asked for at a time: of a column of lists, and of each column of numbers.
LIST_BUFFER, COLUMN_BUFFER = 2**23, 2**20


@dataclass(frozen=True)
class VectorFiles:
    """Parquet files of vectors.

    Attributes
    ----------
    where : str
        The files as error messages call them, such as ``--vectors vectors.parquet``.
    paths : tuple of str
        Absolute paths or URLs.
    id_column : str
        The column of ids.
    columns : tuple of str
        One column of lists of numbers, or one per dimension.
    dimensions : int
        Numbers of a vector.
    groups : tuple of (int, int, int)
        Row groups: number of the file, number in the file, rows.
    digest : str
        SHA-256, in hex, of the files' footers, which tell sizes and extremes of all that is stored, and of samples of
        their bytes; the rest is not read twice.
    """

    where: str
    paths: tuple[str, ...]
    id_column: str
    columns: tuple[str, ...]
    dimensions: int
    groups: tuple[tuple[int, int, int], ...] = field(repr=False)
    digest: str


def find_vectors(job: Job) -> VectorFiles | None:
    """Return the files of vectors of a job, of which only footers, a few rows and samples are read.

    Parameters
    ----------
    job : Job
        The job; its ``vectors`` names a file, or a folder of files.

    Returns
    -------
    VectorFiles or None
        None where none are given.

    Raises
    ------
    InputError
        If they cannot be read, or hold no ids or no vectors.
    """
    if job.vectors is None:
        return None
    where = f"--vectors {job.vectors}"
    locations = _files(where, job.vectors_location)
    digest = hashlib.sha256()
    groups: list[tuple[int, int, int]] = []
    shape: tuple[tuple[str, ...], int] | None = None
    for number, location in enumerate(locations):
        name = where if len(locations) == 1 else f"{where}: {location.path}"
        with open_parquet(name, location) as file:
            metadata = file.metadata
            for sample in _samples(location):
                digest.update(sample)
            if not metadata.num_rows:  # one of the parts that Spark writes
                continue
            columns, dimensions = vector_columns(name, file, job.id_column, {job.label_column, job.path_column})
            if shape is not None and shape != (columns, dimensions):
                raise InputError(
                    f"{name} has {dimensions} dimensions in {', '.join(columns[:3])}, the files before it "
                    f"{shape[1]} in {', '.join(shape[0][:3])}: give files that are alike"
                )
            shape = columns, dimensions
            groups += [(number, n, metadata.row_group(n).num_rows) for n in range(metadata.num_row_groups)]
    if shape is None:
        raise InputError(f"{where} holds no vector: it has no rows")
    columns, dimensions = shape
    paths = tuple(absolute(location.path) for location in locations)
    return VectorFiles(where, paths, job.id_column, columns, dimensions, tuple(groups), digest.hexdigest())


def _samples(location: Location) -> Iterator[bytes]:
    """Yield a Parquet file's footer, and some bytes from all over it; no others are read."""
    system, path = location.open()
    size = system.size(path)
    # Its last 8 bytes are the footer's size, and the format's name.
    footer = int.from_bytes(system.cat_file(path, start=size - 8, end=size - 4), "little")
    yield system.cat_file(path, start=size - 8 - footer, end=size)
    for number in range(SAMPLES):
        start = number * size // SAMPLES
        yield system.cat_file(path, start=start, end=min(size, start + SAMPLE_BYTES))


def _files(where: str, location: Location) -> list[Location]:
    """Return a file, or the Parquet files of a folder."""
    with explaining_errors(location, where):
        system, path = location.open()
        if not system.isdir(path):
            return [location]
        names = sorted(os.path.basename(name) for name in system.ls(path, detail=False))
    files = [location.below(name) for name in names if name.endswith(".parquet") and not name.startswith(".")]
    if not files:
        raise InputError(f"{where} is a folder without .parquet files: give a Parquet file, or a folder of such")
    return files


@contextmanager
def open_parquet(where: str, location: Location, buffer: int = COLUMN_BUFFER) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file, of which a little is in memory at a time; errors name it.

    Parameters
    ----------
    where : str
        What error messages call the file.
    location : Location
        The file.
    buffer : int
        Bytes that are asked for at a time, of each column.

    Raises
    ------
    InputError
        If the file cannot be read.
    """
    try:
        with explaining_errors(location, where), _raw(location) as raw:
            yield pq.ParquetFile(raw, buffer_size=buffer, pre_buffer=False)
    except pa.ArrowInvalid as error:
        raise InputError(f"{where} cannot be read as a Parquet file: {' '.join(str(error).split())[:200]}") from None


def _raw(location: Location) -> IO[bytes]:
    if not location.remote:
        return location.open_file()
    system, path = location.open()
    # Columns are read in turn: bytes that a cache reads ahead would be of no use for the next column.
    file: IO[bytes] = system.open(path, "rb", cache_type="none")
    return file


def vector_columns(
    where: str, file: pq.ParquetFile, id_column: str, others: Collection[str | None] = ()
) -> tuple[tuple[str, ...], int]:
    """Return the columns that hold the vectors, and the number of dimensions.

    Parameters
    ----------
    where : str
        What error messages call the file.
    file : pyarrow.parquet.ParquetFile
        The file.
    id_column : str
        Its column of ids.
    others : collection of str
        Columns that are no dimensions, whatever they hold.

    Raises
    ------
    InputError
        If the columns cannot be told, or there is no column of ids.
    """
    schema = file.schema_arrow
    _check_ids(where, schema, id_column)
    rest = [field for field in schema if field.name not in {id_column, *others}]
    lists = [field.name for field in rest if _is_list(field.type) and pa.types.is_floating(field.type.value_type)]
    numbers = [field.name for field in rest if pa.types.is_floating(field.type)]
    if len(lists) > 1:
        raise InputError(f"{where} has several columns of lists of numbers ({_shown(lists)}): leave one in")
    if not lists and len(numbers) < 2:
        raise InputError(
            f"{where} has no vectors: expected a column of lists of floating-point numbers, or a column of such a "
            f"dimension; it has {_shown([f'{field.name} ({field.type})' for field in rest])}"
        )
    if not lists:
        _check_numbers(where, schema, numbers)
        log.info("%s: vectors of %d columns, %s to %s", where, len(numbers), numbers[0], numbers[-1])
        return tuple(numbers), len(numbers)
    kind = schema.field(lists[0]).type
    dimensions = kind.list_size if pa.types.is_fixed_size_list(kind) else _usual_length(file, lists[0])
    if dimensions < 1:
        raise InputError(f"{where}: column {lists[0]!r} holds no vector")
    return (lists[0],), dimensions


def _check_ids(where: str, schema: pa.Schema, id_column: str) -> None:
    """Refuse a file without a column of ids, or with two columns of one name that may matter."""
    if id_column not in schema.names:
        raise InputError(f"{where} has no column {id_column!r} (--id-column); it has {_shown(schema.names)}")
    names = Counter(
        field.name
        for field in schema
        if field.name == id_column or pa.types.is_floating(field.type) or _is_list(field.type)
    )
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise InputError(f"{where} has several columns of one name ({_shown(twice)}): leave one in")
    kind = schema.field(id_column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_integer, pa.types.is_null)
    if not any(check(kind) for check in text):
        raise InputError(f"{where}: column {id_column!r} is {kind}; expected text or whole numbers")


def _check_numbers(where: str, schema: pa.Schema, numbers: Sequence[str]) -> None:
    """Refuse columns of numbers that do not look like the dimensions of one vector."""
    kinds = {str(schema.field(name).type) for name in numbers}
    if len(kinds) > 1:
        raise InputError(
            f"{where}: columns of numbers are of several kinds ({', '.join(sorted(kinds))}), so they are not all "
            "dimensions of one vector: leave the others out, or put the vectors into one column of lists"
        )
    stems = Counter(stem for name in numbers if (stem := _stem(name)) is not None)
    usual = max(stems, key=stems.__getitem__, default=None)
    odd = [name for name in numbers if _stem(name) != usual]
    if odd and stems.total() > 1:
        raise InputError(
            f"{where}: columns {_shown(odd)} are not named as the others, so they may be no dimensions: leave them "
            "out, or put the vectors into one column of lists"
        )


def _is_list(kind: pa.DataType) -> bool:
    return any(check(kind) for check in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list))


def _stem(name: str) -> str | None:
    """Return the part of a numbered name before its number; None for other names."""
    stem = name.rstrip("0123456789")
    return None if stem == name else stem


def _usual_length(file: pq.ParquetFile, name: str) -> int:
    """Return the length of most of the first lists; empty ones do not count."""
    for batch in file.iter_batches(1024, columns=[name]):
        lengths = pc.list_value_length(batch.column(0)).drop_null().to_numpy(zero_copy_only=False)
        if lengths.any():
            return int(np.bincount(lengths[lengths > 0]).argmax())
    return 0


def _shown(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:10])) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
