"""Work of a run as tasks for workers: partitions, pieces or shards. Each is made when it is sent: few are held."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from reducer.config.job import member_keys, path_rule
from reducer.config.resolved import ResolvedJob
from reducer.run.tasks.given_vectors import GivenVectors
from reducer.run.tasks.hash_stage import run_piece, run_shards
from reducer.run.tasks.messages import PartitionResult, PartitionTask, PiecesResult, ShardTask, WantedKeys
from reducer.run.tasks.rank_stage import run_partition
from reducer.storage.codecs import Hashes, VectorSpool
from reducer.storage.location import ByteRange, PhotoRef, Shard
from reducer.storage.paths import with_paths
from reducer.storage.schemas import GIVEN_SCHEMA, KNOWN_SCHEMA, SHARD_POSITION_SCHEMA, to_ipc

#: Photos that are tried to see whether workers can read them.
FEW = 20
#: Most bytes of the small shards that one task reads, so that a worker need not wait between them.
GROUP_BYTES = 256 * 2**20
#: Groups of shards per worker thread at least.
GROUPS_PER_THREAD = 4
#: Tasks per worker thread that are with the scheduler at a time: no thread waits, and the graph stays small. Those that
#: carry vectors have megabytes each, of which the client and the scheduler hold several copies at times.
WINDOW, WINDOW_OF_VECTORS = 16, 4


@dataclass(frozen=True)
class PartitionTasks:
    """Tasks for partitions, or for pieces of labels too large for one.

    Attributes
    ----------
    job : ResolvedJob
        The job.
    rows : Division
        Rows of each task by its number, in the order in which they are to be done: `TASK_SCHEMA`, `KNOWN_SCHEMA` where
        anything is known, and `SHARD_POSITION_SCHEMA` where photos lie in shards.
    trusted : frozenset of int
        Numbers of the tasks whose known results hold without checking that the files are unchanged.
    is_pieces : bool
        Whether the tasks are pieces.
    avoid : ndarray of uint8, shape (m, hash bytes), optional
        Hashes to avoid.
    spool : VectorSpool, optional
        Holds the vectors that are known.
    given : GivenVectors, optional
        The vectors of `--vectors` files; to be read before the first task is made.
    """

    job: ResolvedJob
    rows: Division
    trusted: frozenset[int] = frozenset()
    is_pieces: bool = False
    avoid: Hashes | None = None
    spool: VectorSpool | None = None
    given: GivenVectors | None = None

    @property
    def numbers(self) -> list[int]:
        """Numbers of the partitions or pieces, in the order in which they are to be done."""
        return list(self.rows)

    @property
    def window(self) -> int:
        """Tasks per worker thread that may be with the scheduler at a time."""
        return WINDOW if self.given is None and self.job.embed is None else WINDOW_OF_VECTORS

    @property
    def shared(self) -> NDArray[np.uint8] | None:
        """Hashes to avoid, which all tasks need."""
        return self.avoid

    @property
    def photos(self) -> int:
        """Number of photos in all."""
        return self.rows.photos

    unit = " photos"
    total = photos

    def size(self, index: int) -> int:
        """Return the number of photos of a partition or piece."""
        return self.rows.size(index)

    def run(self, index: int) -> PartitionResult | PiecesResult:
        """Hash the photos of a piece, or hash and rank those of a partition, in this process."""
        if self.is_pieces:
            return run_piece(self.task(index))
        return run_partition(self.task(index), self.avoid)

    def probes(self) -> list[PhotoRef]:
        """Return a few photos from all over, the first among them; none where nothing needs to be read."""
        if not self.job.hashes_photos:
            return []
        few = self.rows.without(self.trusted).few(FEW)
        return [with_paths(path_rule(self.job), row)["path"][0].as_py() for row in few]

    def task(self, index: int) -> PartitionTask:
        """Return the task of a partition or piece."""
        rows = self.rows[index]
        in_shards = SHARD_POSITION_SCHEMA.names[0] in rows.column_names
        rule = None if in_shards else path_rule(self.job)
        columns = ["id", "label"] if rule else ["id", "label", "path"]
        if pc.any(rows["always_keep"]).as_py():
            columns.append("always_keep")
        if in_shards:
            columns += [*KNOWN_SCHEMA.names, *SHARD_POSITION_SCHEMA.names, "bytes"]
        elif KNOWN_SCHEMA.names[0] in rows.column_names and _any_value(rows, "known_hash", "known_error"):
            columns += KNOWN_SCHEMA.names
        if self.spool is not None and "known_vector" in columns:
            place = rows.schema.get_field_index("known_vector")
            rows = rows.set_column(place, "known_vector", self.spool.packed(rows["known_vector"]))
        rows = rows.select(columns)
        if self.given is not None:
            for name, column in zip(GIVEN_SCHEMA.names, self.given.columns(index).columns, strict=True):
                rows = rows.append_column(name, column)
        return PartitionTask(
            index=index,
            photos=rows.num_rows,
            rows=to_ipc(rows),
            settings=self.job.photo_settings,
            source=self.job.source,
            path_rule=rule,
            trusted=index in self.trusted,
            is_piece=self.is_pieces,
        )


def _any_value(rows: pa.Table, *names: str) -> bool:
    """Return whether any of some columns has a value."""
    return any(rows[name].null_count < rows.num_rows for name in names)


@dataclass(frozen=True)
class ShardTasks:
    """Tasks for shards that are to be read.

    Attributes
    ----------
    job : ResolvedJob
        The job.
    groups : dict of int to tuple of Shard
        Shards that one task reads, by the number of the first.
    wanted : ndarray of uint64 or None
        From `reducer.run.tasks.messages.wanted_keys`; None for every photo.
    """

    job: ResolvedJob
    groups: dict[int, tuple[Shard, ...]]
    wanted: WantedKeys | None = None

    @classmethod
    def of(cls, job: ResolvedJob, shards: Sequence[Shard], wanted: WantedKeys | None, threads: int) -> ShardTasks:
        """Divide shards into groups for a number of worker threads in all."""
        most = min(GROUP_BYTES, sum(shard.bytes for shard in shards) // (GROUPS_PER_THREAD * threads))
        groups: list[list[Shard]] = []
        size = 0
        for shard in shards:
            if not groups or size + shard.bytes > most:
                groups.append([])
                size = 0
            groups[-1].append(shard)
            size += shard.bytes
        return cls(job, {group[0].number: tuple(group) for group in groups}, wanted)

    @property
    def numbers(self) -> list[int]:
        """Numbers of the groups."""
        return list(self.groups)

    @property
    def window(self) -> int:
        """Tasks per worker thread that may be with the scheduler at a time."""
        return WINDOW

    @property
    def shared(self) -> NDArray[np.uint8] | None:
        """Wanted keys as bytes, which all tasks need."""
        return None if self.wanted is None else self.wanted.view(np.uint8).reshape(-1, 8)

    @property
    def bytes(self) -> int:
        """Bytes of all shards."""
        return sum(map(self.size, self.groups))

    unit = "B"
    total = bytes
    is_pieces = True

    def size(self, index: int) -> int:
        """Return the bytes of a group's shards."""
        return sum(shard.bytes for shard in self.groups[index])

    def run(self, index: int) -> PiecesResult:
        """Read the shards of a group and hash their photos in this process."""
        return run_shards(self.task(index), self.wanted)

    def probes(self) -> list[PhotoRef]:
        """Return the first bytes of a few shards."""
        shards = [shard for group in self.groups.values() for shard in group if shard.bytes]
        return [ByteRange(shard.path, 0, 1) for shard in shards[:: -(-len(shards) // FEW) or 1]]

    def task(self, index: int) -> ShardTask:
        """Return the task of a group."""
        return ShardTask(
            index=index,
            shards=self.groups[index],
            settings=self.job.photo_settings,
            source=self.job.source,
            keys=member_keys(self.job),
            label_field=self.job.label_field,
            md5_fails=not self.job.md5_warn,
        )


#: Tasks of either kind. Both have ``job``, ``numbers``, ``shared``, ``is_pieces``, ``unit`` and ``total`` (for progress
#: bars: photos or bytes), ``size``, ``probes``, ``task`` and ``run``.
Tasks = PartitionTasks | ShardTasks


class Division(Mapping[int, pa.Table]):
    """Rows of partitions or pieces by their numbers, each copied only when it is asked for: few are held.

    Parameters
    ----------
    rows : pyarrow.Table
        All rows, in one chunk: from several, taking some is slow.
    parts : mapping of int to ndarray of int64 or pyarrow.Table
        Positions of each part's rows, or the rows themselves, in the order in which the parts are to be done.
    """

    def __init__(self, rows: pa.Table, parts: Mapping[int, NDArray[np.int64] | pa.Table]) -> None:
        self._rows, self._parts = rows, parts

    @classmethod
    def by(cls, number: NDArray[np.int32], rows: pa.Table) -> Division:
        """Divide rows by their numbers; rows of negative numbers are left out."""
        order = np.argsort(number, kind="stable")
        ends = np.cumsum(np.bincount(number + 1, minlength=1)).tolist()  # the first group is left out
        parts = {n: order[start:stop] for n, (start, stop) in enumerate(pairwise(ends)) if start < stop}
        return cls(rows.combine_chunks(), parts)

    def __getitem__(self, number: int) -> pa.Table:
        part = self._parts[number]
        return part if isinstance(part, pa.Table) else self._rows.take(pa.array(part))

    def __iter__(self) -> Iterator[int]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def __or__(self, others: Mapping[int, pa.Table]) -> Division:
        """Return a division with other rows of some parts, or with further parts behind."""
        return Division(self._rows, {**self._parts, **others})

    def without(self, numbers: Collection[int]) -> Division:
        """Return a division of all but some parts."""
        return Division(self._rows, {n: part for n, part in self._parts.items() if n not in numbers})

    def size(self, number: int) -> int:
        """Return the number of rows of a part."""
        return len(self._parts[number])

    @property
    def photos(self) -> int:
        """Number of rows in all."""
        return sum(map(len, self._parts.values()))

    def few(self, most: int) -> list[pa.Table]:
        """Return a few single rows from all over, the first among them."""
        sizes = np.array([*map(len, self._parts.values())], dtype=np.int64)
        ends, numbers = np.cumsum(sizes), list(self)
        positions = range(0, self.photos, -(-self.photos // most) or 1)
        parts = np.searchsorted(ends, positions, side="right").tolist()
        return [
            self[numbers[part]].slice(position - int(ends[part] - sizes[part]), 1)
            for position, part in zip(positions, parts, strict=True)
        ]
