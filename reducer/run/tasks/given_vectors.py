"""Vectors of `--vectors` files: read once by the client, kept in a temporary file, and put into the tasks."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tqdm.auto import tqdm

from reducer.config.settings import Source
from reducer.errors import InputError
from reducer.photos.hashing import PhotoError
from reducer.run.tasks.vector_files import COLUMN_BUFFER, LIST_BUFFER, VectorFiles, open_parquet
from reducer.storage.codecs import NO_VECTOR, PROBLEMS, VectorSpool, as_units, digest_of, packed
from reducer.storage.location import Location
from reducer.storage.schemas import GIVEN_SCHEMA

#: Bytes of vectors, as float32 numbers, that are read at a time; a few times that is in memory.
BATCH_BYTES = 2**23
#: Columns that are read at a time, where each dimension has one.
COLUMNS_TOGETHER = 64
#: States of a photo behind those of `PROBLEMS`: its list has another length, there is none for its id, or several.
WRONG_LENGTH, MISSING, SEVERAL = range(len(PROBLEMS), len(PROBLEMS) + 3)


class GivenVectors:
    """The vectors of the photos of partitions, from files that are read once.

    Parameters
    ----------
    files : VectorFiles
        The files.
    source : Source
        How URLs are opened; may hold secrets.
    partitions : mapping of int to pyarrow.Table
        Rows of each partition by its number, with the column ``id``. Vectors of other photos are passed over.

    Notes
    -----
    Memory holds about 30 bytes and the id per photo; the vectors lie in a file in the temporary folder. Ids are found
    by digests of 64 bits and then compared, so that no photo can get the vector of another one.
    """

    def __init__(self, files: VectorFiles, source: Source, partitions: Mapping[int, pa.Table]) -> None:
        self._files, self._source, self._partitions = files, source, partitions
        self._spool = VectorSpool()

    def read(self, progress: bool = False) -> None:
        """Read the files, a part of a row group at a time, and keep the vectors that partitions ask for.

        Parameters
        ----------
        progress : bool
            Whether to show a progress bar.

        Raises
        ------
        InputError
            If the files cannot be read, or the temporary folder is full.
        """
        self._list_photos()
        files = self._files
        rows = sum(count for _, _, count in files.groups)
        bar = tqdm(total=rows, unit=" vectors", unit_scale=True, disable=not progress, file=sys.stderr, leave=False)
        with bar:
            for number, groups in groupby(files.groups, key=lambda group: group[0]):
                location = Location(files.paths[number], self._source.options)
                buffer = LIST_BUFFER if len(files.columns) == 1 else COLUMN_BUFFER
                with open_parquet(f"{files.where}: {location.path}", location, buffer) as file:
                    for _, group, _ in groups:
                        for ids, vectors, wrong_length in _batches(file, files, group):
                            self._keep(ids, vectors, wrong_length)
                            bar.update(len(ids))
        del self._ids, self._digests

    def _list_photos(self) -> None:
        """Give each photo that is asked for a number, under however many labels it stands."""
        ids = [rows["id"].combine_chunks() for rows in self._partitions.values()]
        all_ids = pa.chunked_array(ids, pa.string()).combine_chunks()
        self._digests, first, photos = np.unique(_digests(all_ids), return_index=True, return_inverse=True)
        ends = np.cumsum([len(part) for part in ids], dtype=np.int64)
        self._photos_of = dict(zip(self._partitions, np.split(photos, ends[:-1]), strict=True))
        self._ids = all_ids.take(pa.array(first))
        self._state = np.full(len(first), MISSING, dtype=np.uint8)
        self._position = np.full(len(first), -1, dtype=np.int64)

    def _keep(self, ids: pa.Array, vectors: NDArray[np.floating[Any]], wrong_length: NDArray[np.bool_]) -> None:
        """Put those vectors of a batch into the spool that are asked for, and note what is wrong with the others."""
        rows, photos = self._find(ids)
        units, states = as_units(vectors[rows])
        states[wrong_length[rows]] = WRONG_LENGTH
        is_new = np.zeros(len(rows), dtype=bool)
        is_new[np.unique(photos, return_index=True)[1]] = True
        is_new &= self._state[photos] == MISSING
        self._state[photos[is_new]] = states[is_new]
        good = is_new & (states == 0)
        with _naming_temporary_folder():
            self._position[photos[good]] = self._spool.append(units[good])
        # A vector that stands twice is one vector, unless the two differ.
        again = np.flatnonzero(~is_new)
        differ = self._state[photos[again]] != states[again]
        stored = self._spool.packed(pa.array(self._position[photos[again]], mask=differ | (states[again] > 0)))
        differ |= pc.fill_null(pc.not_equal(stored, packed(units[again])), False).to_numpy(zero_copy_only=False)
        self._state[photos[again[differ]]] = SEVERAL

    def _find(self, ids: pa.Array) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the rows of a batch that are asked for, and the numbers of their photos."""
        digests = _digests(ids)
        photos = np.minimum(np.searchsorted(self._digests, digests), len(self._digests) - 1)
        rows = np.flatnonzero(self._digests[photos] == digests)
        same = pc.equal(ids.take(pa.array(rows)), self._ids.take(pa.array(photos[rows])))
        rows = rows[same.to_numpy(zero_copy_only=False)]
        return rows, photos[rows]

    def columns(self, number: int) -> pa.Table:
        """Return the vectors of a partition, or what is wrong with each, in the order of its rows.

        Parameters
        ----------
        number : int
            Number of the partition.

        Returns
        -------
        pyarrow.Table
            `GIVEN_SCHEMA`.
        """
        photos = self._photos_of[number]
        state = self._state[photos]
        vectors = self._spool.packed(pa.array(self._position[photos], mask=state > 0))
        errors = pa.array(self._errors(), pa.string()).take(pa.array(state))
        return pa.Table.from_arrays([vectors, errors], schema=GIVEN_SCHEMA)

    def _errors(self) -> list[str | None]:
        """Return the error of each state; None for the state of a good vector."""
        problems = [
            *PROBLEMS[1:],
            f"it has no list of {self._files.dimensions} numbers for its id",
            "it has none for its id",
            "it has several for its id",
        ]
        return [None, *(str(PhotoError(NO_VECTOR, f"{self._files.where}: {problem}")) for problem in problems)]


@contextmanager
def _naming_temporary_folder() -> Iterator[None]:
    """Say that the temporary folder is full, where the file of vectors would be blamed."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"vectors cannot be kept in the temporary folder {tempfile.gettempdir()}: {error.strerror or error}. It "
            "takes 2 bytes per number: name a folder with more room by the environment variable TMPDIR"
        ) from None


def _digests(ids: pa.Array) -> NDArray[np.uint64]:
    return np.fromiter(map(digest_of, ids.to_pylist()), np.uint64, len(ids))


def _batches(
    file: pq.ParquetFile, files: VectorFiles, group: int
) -> Iterator[tuple[pa.Array, NDArray[np.floating[Any]], NDArray[np.bool_]]]:
    """Yield ids and vectors of a row group, and which of them have no list of the right length, some at a time."""
    rows = max(1, BATCH_BYTES // (4 * files.dimensions))
    if len(files.columns) > 1:
        for ids, vectors in _from_columns(file, files, group, rows):
            yield ids, vectors, np.zeros(len(ids), dtype=bool)
        return
    for batch in file.iter_batches(rows, row_groups=[group], columns=[files.id_column, *files.columns]):
        yield _as_text(batch.column(files.id_column)), *_from_lists(batch.column(files.columns[0]), files.dimensions)


def _as_text(ids: pa.Array) -> pa.Array:
    ids = ids.dictionary_decode() if pa.types.is_dictionary(ids.type) else ids
    return pc.fill_null(ids.cast(pa.string()), "")


def _from_columns(
    file: pq.ParquetFile, files: VectorFiles, group: int, rows: int
) -> Iterator[tuple[pa.Array, NDArray[np.floating[Any]]]]:
    """Yield ids and vectors of a row group in which each dimension has a column.

    Each column that is being read takes a page or two of memory, so a few are read from end to end, then the next few,
    and the numbers wait on disk for the other columns.
    """
    total = file.metadata.row_group(group).num_rows
    shares = [files.columns[start : start + COLUMNS_TOGETHER] for start in range(0, files.dimensions, COLUMNS_TOGETHER)]
    kind = file.schema_arrow.field(files.columns[0]).type.to_pandas_dtype()
    size = np.dtype(kind).itemsize
    with tempfile.TemporaryFile() as waiting:
        for names in shares:
            for batch in file.iter_batches(rows, row_groups=[group], columns=names):
                columns = [batch.column(name).to_numpy(zero_copy_only=False) for name in names]
                with _naming_temporary_folder():
                    waiting.write(np.stack(columns, axis=1).astype(kind, copy=False).tobytes())
        done = 0
        for batch in file.iter_batches(rows, row_groups=[group], columns=[files.id_column]):
            parts, before = [], 0
            for names in shares:
                waiting.seek(size * (before * total + done * len(names)))
                content = waiting.read(size * batch.num_rows * len(names))
                parts.append(np.frombuffer(content, kind).reshape(batch.num_rows, len(names)))
                before += len(names)
            done += batch.num_rows
            yield _as_text(batch.column(files.id_column)), np.concatenate(parts, axis=1)


def _from_lists(lists: pa.Array, dimensions: int) -> tuple[NDArray[np.floating[Any]], NDArray[np.bool_]]:
    """Return vectors from lists, zeros where one is null or has another length, and which these are."""
    length = pc.fill_null(pc.list_value_length(lists), -1).to_numpy(zero_copy_only=False)
    good = length == dimensions
    flat = pc.list_flatten(lists.filter(pa.array(good)))
    values = flat.to_numpy(zero_copy_only=False).reshape(-1, dimensions)
    if good.all():
        return values, ~good
    vectors = np.zeros((len(lists), dimensions), dtype=values.dtype)
    vectors[good] = values
    return vectors, ~good
