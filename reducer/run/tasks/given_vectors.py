"""Vectors that are given: read once, by the row group, and brought to the partitions that rank them by worker disk."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from reducer.config.settings import Source
from reducer.photos.hashing import PhotoError
from reducer.run.tasks.vector_files import COLUMN_BUFFER, LIST_BUFFER, VectorFiles, _opened
from reducer.storage.codecs import NO_VECTOR, PROBLEMS, as_units, digest_of, packed
from reducer.storage.location import Location
from reducer.storage.sorting import is_new

#: Bytes of a file that one task reads, as they are stored, unless one row group has more; and bytes of vectors that are
#: in memory at a time.
TASK_BYTES, BATCH_BYTES = 2**26, 2**25
#: Where each dimension has a column, so many of these are read at a time.
COLUMNS_TOGETHER = 64
#: What the tasks give is taken apart into so many pieces in all, lest the scheduler drowns.
MOST_SLICES = 4096
#: What is kept of a vector on disk; a problem is a place in `PROBLEMS`, or one more for no list of the right length.
ROUTED = pa.schema([("id", pa.string()), ("problem", pa.uint8()), ("vector", pa.binary())])
ODD = len(PROBLEMS)
#: Digests of ids, in rising order, and the bucket of each; shape (ids, 2).
Routes = NDArray[np.uint64]


@dataclass(frozen=True)
class RouteTask:
    """Row groups to read, and what to do with their vectors; travels inside the Dask task.

    Attributes
    ----------
    number : int
        Of the task.
    files : VectorFiles
        What is read.
    groups : tuple of (int, int, int)
        Which of its row groups.
    source : Source
        How URLs are opened; may hold secrets.
    buckets : int
        Into so many parts they go.
    """

    number: int
    files: VectorFiles
    groups: tuple[tuple[int, int, int], ...]
    source: Source
    buckets: int

    def __repr__(self) -> str:
        return f"RouteTask(number={self.number}, groups={len(self.groups)})"


@dataclass(frozen=True)
class Routing:
    """How vectors come to partitions.

    Attributes
    ----------
    tasks : tuple of RouteTask
    routes : ndarray of uint64, shape (ids, 2)
        Digests of the ids that are wanted, in rising order, and their buckets.
    bucket_of : dict of int to int
        The bucket of each partition by its number.
    """

    tasks: tuple[RouteTask, ...]
    routes: Routes
    bucket_of: Mapping[int, int]

    @property
    def files(self) -> VectorFiles:
        """What is read."""
        return self.tasks[0].files

    @property
    def buckets(self) -> int:
        """How many parts each task's vectors go into."""
        return self.tasks[0].buckets

    @classmethod
    def of(cls, files: VectorFiles, source: Source, ids_of: Mapping[int, pa.Table]) -> Routing:
        """That of some partitions.

        Parameters
        ----------
        files : VectorFiles
            The vectors.
        source : Source
            How they are read.
        ids_of : mapping of int to pyarrow.Table
            Rows of each partition by its number, with the column ``id``.
        """
        groups: list[list[tuple[int, int, int]]] = []
        size = 0
        for group in files.groups:
            if not groups or size + group[2] > TASK_BYTES:
                groups.append([])
                size = 0
            groups[-1].append(group)
            size += group[2]
        groups = groups or [[]]
        buckets = max(1, min(len(ids_of), MOST_SLICES // len(groups)))
        bucket_of = {number: place % buckets for place, number in enumerate(ids_of)}
        parts = []
        for number, rows in ids_of.items():
            own = np.fromiter(map(digest_of, rows["id"].to_pylist()), np.uint64)
            parts.append(np.stack([own, np.full(len(own), bucket_of[number], dtype=np.uint64)], axis=1))
        routes = np.concatenate(parts) if parts else np.empty((0, 2), dtype=np.uint64)
        routes = routes[np.lexsort((routes[:, 1], routes[:, 0]))]
        routes = routes[is_new(*routes.T)]
        tasks = (RouteTask(number, files, tuple(own), source, buckets) for number, own in enumerate(groups))
        return cls(tuple(tasks), routes, bucket_of)


class Spill:
    """A file on this worker's disk, gone with the last who refers to it."""

    def __init__(self) -> None:
        handle, self.path = tempfile.mkstemp(prefix="reducer-vectors-", dir=_spill_folder())
        self.file = os.fdopen(handle, "w+b", buffering=2**20)
        weakref.finalize(self, _remove, self.path)


def _remove(path: str) -> None:
    if os.path.exists(path):
        os.remove(path)


def _spill_folder() -> str | None:
    """A worker's own folder, which is where its user has room for such; None for the system's."""
    from distributed import Status, Worker

    # Not `get_worker`, which knows only of tasks: slices land between them.
    running = (worker for worker in list(Worker._instances) if worker.status is Status.running)
    return next((str(worker.local_directory) for worker in running if os.path.isdir(worker.local_directory)), None)


class Slice:
    """Vectors for some partitions, on disk: where Dask brings them to another worker, they land on its disk.

    Parameters
    ----------
    spill : Spill
        The file.
    parts : list of (int, int)
        Where in it record batches of `ROUTED` begin, and their bytes.
    """

    __slots__ = ("__weakref__", "parts", "spill")

    def __init__(self, spill: Spill, parts: list[tuple[int, int]]) -> None:
        self.spill, self.parts = spill, parts

    def contents(self) -> Iterator[bytes]:
        """Its record batches, packed."""
        if not self.parts:
            return
        with open(self.spill.path, "rb") as file:
            for offset, size in self.parts:
                file.seek(offset)
                yield file.read(size)

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Its record batches."""
        for content in self.contents():
            yield pa.ipc.read_record_batch(pa.py_buffer(content), ROUTED)

    def __reduce__(self) -> tuple[Any, ...]:
        return landed, (list(self.contents()),)


def landed(contents: list[bytes]) -> Slice:
    """A slice that has come from another worker."""
    spill, parts = Spill(), []
    with spill.file as file:
        for content in contents:
            parts.append((file.tell(), len(content)))
            file.write(content)
    return Slice(spill, parts)


def route(task: RouteTask, routes: Routes) -> list[Slice]:
    """Read row groups once, and put the vectors that are wanted on this worker's disk.

    Parameters
    ----------
    task : RouteTask
        Which.
    routes : ndarray of uint64, shape (ids, 2)
        From `Routing`.

    Returns
    -------
    list of Slice
        One a bucket.

    Raises
    ------
    InputError
        If they cannot be read here.
    """
    spill = Spill()
    parts: list[list[tuple[int, int]]] = [[] for _ in range(task.buckets)]
    with spill.file as file:
        for number, group, _ in task.groups:
            for ids, problems, vectors in _vectors_in(task, number, group):
                rows, buckets = _wanted(ids, routes)
                units, wrong = as_units(vectors[rows])
                wrong[problems[rows] > 0] = ODD
                starts = np.flatnonzero(is_new(buckets)).tolist()
                for start, stop in pairwise([*starts, len(rows)]):
                    own = slice(start, stop)
                    columns = [ids.take(pa.array(rows[own])), pa.array(wrong[own]), packed(units[own])]
                    content = pa.RecordBatch.from_arrays(columns, schema=ROUTED).serialize()
                    parts[int(buckets[start])].append((file.tell(), len(content)))
                    file.write(content)
    return [Slice(spill, own) for own in parts]


def _wanted(ids: pa.Array, routes: Routes) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """Which of some ids go where, sorted by bucket; one id may go to several."""
    digests = np.fromiter(map(digest_of, ids.to_pylist()), np.uint64)
    first = np.searchsorted(routes[:, 0], digests, side="left")
    count = np.searchsorted(routes[:, 0], digests, side="right") - first
    rows = np.repeat(np.arange(len(ids)), count)
    places = np.arange(len(rows)) - np.repeat(np.cumsum(count) - count, count) + np.repeat(first, count)
    buckets = routes[places, 1]
    order = np.argsort(buckets, kind="stable")
    return rows[order], buckets[order]


def _vectors_in(
    task: RouteTask, number: int, group: int
) -> Iterator[tuple[pa.Array, NDArray[np.uint8], NDArray[np.floating[Any]]]]:
    """Ids, which of them have no list of the right length, and vectors of a row group, some at a time."""
    files = task.files
    place = Location(files.paths[number], task.source.options)
    rows = max(1, BATCH_BYTES // (4 * files.dimensions))
    buffer = LIST_BUFFER if len(files.columns) == 1 else COLUMN_BUFFER
    with _opened(f"{files.where}: {place.path}", place, buffer) as file:
        if len(files.columns) > 1:
            yield from _of_columns(file, files, group, rows)
            return
        for batch in file.iter_batches(rows, row_groups=[group], columns=[files.id_column, *files.columns]):
            vectors, odd = _of_lists(batch.column(files.columns[0]), files.dimensions)
            yield _as_text(batch.column(files.id_column)), odd, vectors


def _as_text(ids: pa.Array) -> pa.Array:
    ids = ids.dictionary_decode() if pa.types.is_dictionary(ids.type) else ids
    return pc.fill_null(ids.cast(pa.string()), "")


def _of_columns(
    file: pq.ParquetFile, files: VectorFiles, group: int, rows: int
) -> Iterator[tuple[pa.Array, NDArray[np.uint8], NDArray[np.floating[Any]]]]:
    """The same of a column a dimension.

    Each column that is being read takes a page or two of memory, so a few are read from end to end, then the next few,
    and what they hold waits on disk for the others.
    """
    total = file.metadata.row_group(group).num_rows
    names = [files.columns[start : start + COLUMNS_TOGETHER] for start in range(0, files.dimensions, COLUMNS_TOGETHER)]
    kind = file.schema_arrow.field(files.columns[0]).type.to_pandas_dtype()
    size = np.dtype(kind).itemsize
    with tempfile.TemporaryFile(dir=_spill_folder()) as spill:
        for own in names:
            for batch in file.iter_batches(rows, row_groups=[group], columns=own):
                columns = [batch.column(name).to_numpy(zero_copy_only=False) for name in own]
                spill.write(np.stack(columns, axis=1).astype(kind, copy=False).tobytes())
        done = 0
        for batch in file.iter_batches(rows, row_groups=[group], columns=[files.id_column]):
            parts, before = [], 0
            for own in names:
                spill.seek(size * (before * total + done * len(own)))
                content = spill.read(size * batch.num_rows * len(own))
                parts.append(np.frombuffer(content, kind).reshape(batch.num_rows, len(own)))
                before += len(own)
            done += batch.num_rows
            odd = np.zeros(batch.num_rows, dtype=np.uint8)
            yield _as_text(batch.column(files.id_column)), odd, np.concatenate(parts, axis=1)


def _of_lists(lists: pa.Array, dimensions: int) -> tuple[NDArray[np.floating[Any]], NDArray[np.uint8]]:
    """Vectors from lists, zeros where one is null or has another length, and which these are."""
    length = pc.fill_null(pc.list_value_length(lists), -1).to_numpy(zero_copy_only=False)
    good = length == dimensions
    flat = pc.list_flatten(lists.filter(pa.array(good)))
    values = flat.to_numpy(zero_copy_only=False).reshape(-1, dimensions)
    if good.all():
        return values, np.zeros(len(lists), dtype=np.uint8)
    vectors = np.zeros((len(lists), dimensions), dtype=values.dtype)
    vectors[good] = values
    return vectors, (~good).astype(np.uint8)


class Given:
    """The vectors of the photos of a partition.

    Parameters
    ----------
    files : VectorFiles
        Where they come from.
    slices : sequence of Slice
        Those of the partition's bucket, in the order of the tasks.
    """

    def __init__(self, files: VectorFiles, slices: Sequence[Slice]) -> None:
        self.files, self.slices = files, slices

    def __call__(self, ids: Sequence[str]) -> list[bytes | str]:
        """Vectors by ids, as bytes of float16 numbers, or what is wrong with each: ``kind: what was found``."""
        wanted = pa.array(sorted(set(ids)), pa.string())
        found: dict[str, bytes | str] = {}
        for piece in self.slices:
            for batch in piece.batches():
                own = batch.filter(pc.is_in(batch.column("id"), value_set=wanted))
                for name, problem, vector in zip(*(column.to_pylist() for column in own.columns), strict=True):
                    now = vector if problem == 0 else self._problem(self._what(problem))
                    if found.setdefault(name, now) != now:  # the same one twice is one
                        found[name] = self._problem("it has several for its id")
        none = self._problem("it has none for its id")
        return [found.get(name, none) for name in ids]

    def _what(self, problem: int) -> str:
        if problem == ODD:
            return f"it has no list of {self.files.dimensions} numbers for its id"
        return PROBLEMS[problem]

    def _problem(self, what: str) -> str:
        return str(PhotoError(NO_VECTOR, f"{self.files.where}: {what}"))
