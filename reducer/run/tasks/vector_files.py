"""Which vectors there are: what files of them hold, by their footers."""

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

#: A file's digest is of so many samples of its bytes, and so many bytes each.
SAMPLES, SAMPLE_BYTES = 16, 2**16
#: Bytes that are asked for at a time, of a column of lists, and of each column of numbers.
LIST_BUFFER, COLUMN_BUFFER = 2**23, 2**20


@dataclass(frozen=True)
class VectorFiles:
    """Parquet files of vectors.

    Attributes
    ----------
    where : str
        What error messages call them, such as ``--vectors vectors.parquet``.
    paths : tuple of str
        Absolute paths or URLs.
    id_column : str
    columns : tuple of str
        One of lists of numbers, or one a dimension.
    dimensions : int
    groups : tuple of (int, int, int)
        Row groups: number of the file, number in the file, rows.
    digest : str
        SHA-256, in hex, of the files' footers, which tell sizes and extremes of all that is stored, and of samples of
        their bytes: what else they hold is read once only.
    """

    where: str
    paths: tuple[str, ...]
    id_column: str
    columns: tuple[str, ...]
    dimensions: int
    groups: tuple[tuple[int, int, int], ...] = field(repr=False)
    digest: str


def find_vectors(job: Job) -> VectorFiles | None:
    """Look at the files of vectors of a job: at what they hold, and no more of it than a few rows and samples.

    Parameters
    ----------
    job : Job
        Whose ``vectors`` names a file, or a folder of such.

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
    places = _files(where, job.vectors_location)
    digest = hashlib.sha256()
    groups: list[tuple[int, int, int]] = []
    found: tuple[tuple[str, ...], int] | None = None
    for number, place in enumerate(places):
        name = where if len(places) == 1 else f"{where}: {place.path}"
        with open_parquet(name, place) as file:
            metadata = file.metadata
            for sample in _samples(place):
                digest.update(sample)
            if not metadata.num_rows:  # one of the parts that Spark writes
                continue
            own = vector_columns(name, file, job.id_column, {job.label_column, job.path_column})
            if found is not None and found != own:
                raise InputError(
                    f"{name} has {own[1]} dimensions in {', '.join(own[0][:3])}, the files before it {found[1]} in "
                    f"{', '.join(found[0][:3])}: give files that are alike"
                )
            found = own
            groups += [(number, n, metadata.row_group(n).num_rows) for n in range(metadata.num_row_groups)]
    if found is None:
        raise InputError(f"{where} holds no vector: it has no rows")
    columns, dimensions = found
    paths = tuple(absolute(place.path) for place in places)
    return VectorFiles(where, paths, job.id_column, columns, dimensions, tuple(groups), digest.hexdigest())


def _samples(place: Location) -> Iterator[bytes]:
    """A Parquet file's footer, and some bytes from all over it; no others are read."""
    system, path = place.open()
    size = system.size(path)
    # Its last 8 bytes are the footer's size, and the format's name.
    footer = int.from_bytes(system.cat_file(path, start=size - 8, end=size - 4), "little")
    yield system.cat_file(path, start=size - 8 - footer, end=size)
    for number in range(SAMPLES):
        start = number * size // SAMPLES
        yield system.cat_file(path, start=start, end=min(size, start + SAMPLE_BYTES))


def _files(where: str, place: Location) -> list[Location]:
    with explaining_errors(place, where):
        system, path = place.open()
        if not system.isdir(path):
            return [place]
        names = sorted(os.path.basename(name) for name in system.ls(path, detail=False))
    found = [place.below(name) for name in names if name.endswith(".parquet") and not name.startswith(".")]
    if not found:
        raise InputError(f"{where} is a folder without .parquet files: give a Parquet file, or a folder of such")
    return found


@contextmanager
def open_parquet(where: str, place: Location, buffer: int = COLUMN_BUFFER) -> Iterator[pq.ParquetFile]:
    """A Parquet file, of which a little is in memory at a time; whatever is wrong with it names it."""
    try:
        with explaining_errors(place, where), _raw(place) as raw:
            yield pq.ParquetFile(raw, buffer_size=buffer, pre_buffer=False)
    except pa.ArrowInvalid as error:
        raise InputError(f"{where} cannot be read as a Parquet file: {' '.join(str(error).split())[:200]}") from None


def _raw(place: Location) -> IO[bytes]:
    if not place.remote:
        return place.open_file()
    system, path = place.open()
    # Columns are read in turn: what a cache reads ahead would be of no use for the next one.
    file: IO[bytes] = system.open(path, "rb", cache_type="none")
    return file


def vector_columns(
    where: str, file: pq.ParquetFile, id_column: str, others: Collection[str | None] = ()
) -> tuple[tuple[str, ...], int]:
    """Which columns hold the vectors, and how many dimensions these have.

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
        If that cannot be told, or there is no column of ids.
    """
    schema = file.schema_arrow
    if id_column not in schema.names:
        raise InputError(f"{where} has no column {id_column!r} (--id-column); it has {_shown(schema.names)}")
    named = [
        own.name for own in schema if own.name == id_column or pa.types.is_floating(own.type) or _is_list(own.type)
    ]
    twice = [name for name, count in Counter(named).items() if count > 1]
    if twice:
        raise InputError(f"{where} has several columns of one name ({_shown(twice)}): leave one in")
    kind = schema.field(id_column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_integer, pa.types.is_null)
    if not any(check(kind) for check in text):
        raise InputError(f"{where}: column {id_column!r} is {kind}; expected text or whole numbers")
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
        log.info("%s: vectors of %d columns, %s to %s", where, len(numbers), numbers[0], numbers[-1])
        return tuple(numbers), len(numbers)
    kind = schema.field(lists[0]).type
    dimensions = kind.list_size if pa.types.is_fixed_size_list(kind) else _usual_length(file, lists[0])
    if dimensions < 1:
        raise InputError(f"{where}: column {lists[0]!r} holds no vector")
    return (lists[0],), dimensions


def _is_list(kind: pa.DataType) -> bool:
    return any(check(kind) for check in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list))


def _stem(name: str) -> str | None:
    """What a numbered name begins with; None of others."""
    stem = name.rstrip("0123456789")
    return None if stem == name else stem


def _usual_length(file: pq.ParquetFile, name: str) -> int:
    """Of most of the first lists; empty ones do not count."""
    for batch in file.iter_batches(1024, columns=[name]):
        lengths = pc.list_value_length(batch.column(0)).drop_null().to_numpy(zero_copy_only=False)
        if lengths.any():
            return int(np.bincount(lengths[lengths > 0]).argmax())
    return 0


def _shown(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:10])) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
