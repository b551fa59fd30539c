"""Which photos are to be written where, which of them are there already, and what came of each."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from reducer.config.job import Job
from reducer.outputs.export.layout import (
    SAME,
    TAR,
    ExportOptions,
    Layout,
    SideFiles,
    as_in_manifest,
    by_label,
    in_shard,
    into_shards,
    numbers,
    shard_name,
    side_files,
    size_in_shard,
)
from reducer.outputs.export.target import IDENTITY, Exported, Listing, is_equal
from reducer.outputs.export.write import Batch, CopyRequest, CopyResult
from reducer.photos.reader import states_of
from reducer.photos.requests import FileState
from reducer.storage.location import ByteRange, Location, PhotoRef, absolute, ref_of
from reducer.storage.schemas import EXPORT_SCHEMA

#: Columns of the ledger that an export goes by.
COLUMNS = [
    *("row", "id", "label", "path", "bytes", "mtime", "etag", "shard", "offset"),
    *("width", "height", "format", "hash", "kept"),
]
#: Photos that are looked at together.
BATCH = 5000
#: Photos of a URL that are asked for their sizes to see whether there is room.
FEW = 1000
#: Bytes that a disk gives to a file at a time.
DISK_BLOCK = 4096


@dataclass(eq=False)
class Transfer:
    """The photos of an export.

    Attributes
    ----------
    rows : pyarrow.Table, n rows
        Of the ledger, in the order in which they are read.
    layout : Layout
        Where they go.
    options : ExportOptions
    sizes : ndarray of int64, shape (n,)
        Bytes of their files as they are; negative where that is not known.
    shards : ndarray of int64, shape (n,), or None
        Which shard each goes to.
    is_left : ndarray of bool, shape (n,)
        Which are to be written.
    written : int
        Photos that were written.
    bytes_done : int
        Bytes of the photos that were read for that.
    copied_not_linked : int
        Of them those that could not be linked.
    """

    rows: pa.Table
    layout: Layout
    options: ExportOptions
    sizes: NDArray[np.int64]
    shards: NDArray[np.int64] | None
    #: Where another row stands for the same file in the same place: which.
    first: NDArray[np.int64]
    #: Bytes in TARGET; negative where it is not known yet.
    sizes_there: NDArray[np.int64]
    is_left: NDArray[np.bool_]
    errors: dict[int, str] = field(default_factory=dict)
    written: int = 0
    bytes_done: int = 0
    copied_not_linked: int = 0

    @classmethod
    def of(cls, rows: pa.Table, every: pa.Table, job: Job, options: ExportOptions, target: Location) -> Transfer:
        """Plan an export.

        Parameters
        ----------
        rows : pyarrow.Table
            The photos, `COLUMNS` of the ledger.
        every : pyarrow.Table
            All of the ledger.
        job : Job
            Of the run.
        options : ExportOptions
            How they are exported.
        target : Location
            Where to.
        """
        rows = rows.sort_by([("shard", "ascending"), ("offset", "ascending"), ("row", "ascending")])
        if options.layout == SAME:
            layout = as_in_manifest(rows, absolute(job.images))
        else:
            layout = by_label(rows, every, keys=options.layout == TAR)
        errors = {}
        if pc.any(pc.is_valid(every["shard"])).as_py():
            errors = dict.fromkeys(np.flatnonzero(pc.is_null(rows["shard"])).tolist(), "missing: it is in no shard")
        sizes = pc.fill_null(rows["bytes"], -1).to_numpy().copy()
        unknown = [number for number in np.flatnonzero(sizes < 0).tolist() if number not in errors]
        if options.layout != TAR and job.images_location.remote:
            # Each takes a request. What is read tells its size; to see whether there is room a few will do.
            unknown = [] if target.remote else unknown[:: -(-len(unknown) // FEW) or 1]
        paths = rows["path"].take(pa.array(unknown, pa.int64())).to_pylist()
        for number, state in zip(unknown, states_of(paths, job.source), strict=True):
            sizes[number] = -1 if state is None or state.bytes is None else state.bytes
        found = cls(
            rows=rows,
            layout=layout,
            options=options,
            sizes=sizes,
            shards=None,
            first=_first_of_each(layout.paths),
            sizes_there=np.full(rows.num_rows, -1, dtype=np.int64),
            is_left=np.ones(rows.num_rows, dtype=bool),
            errors=errors,
        )
        found.is_left[list(errors)] = False
        if options.layout == TAR:
            found.shards = found._into_shards()
        else:
            found.is_left &= found.first == np.arange(rows.num_rows)
        return found

    def _into_shards(self) -> NDArray[np.int64]:
        assert isinstance(self.options.shard_bytes, int)
        sizes = self._sizes_in_shards(self._likely_sizes())
        return np.array(into_shards(sizes, self.options.shard_bytes), dtype=np.int64)

    def _sizes_in_shards(self, sizes: NDArray[np.int64]) -> list[int]:
        """Bytes that photos of such sizes take in shards, with what goes with them."""
        return [
            size_in_shard((path, size), *((in_shard(path, ending), len(part)) for ending, part in self._beside(number)))
            for number, (path, size) in enumerate(zip(self.layout.paths, sizes.tolist(), strict=True))
        ]

    def keep_shards(self, before: pa.Table) -> None:
        """Take from an earlier plan of the same photos which shard each goes to, whatever their sizes are now."""
        told = [name for name in IDENTITY if name != "shard"]
        if self.shards is None or not before.select(told).equals(self.plan.select(told)):
            return
        names = {shard_name(number): number for number in range(before.num_rows)}
        numbers = np.array([names.get(name, -1) for name in before["shard"].to_pylist()], dtype=np.int64)
        shards = np.empty_like(numbers)
        shards[pc.sort_indices(self.rows["row"]).to_numpy()] = numbers
        if len(shards) and shards.min() >= 0 and (np.diff(shards) >= 0).all():
            self.shards = shards

    def _likely_sizes(self) -> NDArray[np.int64]:
        """Bytes of the files as they are; of those that are not known the mean of the others."""
        known = self.sizes[self.sizes >= 0]
        mean = int(known.mean()) if len(known) else 0
        return np.where(self.sizes >= 0, self.sizes, mean)

    @cached_property
    def _alike(self) -> NDArray[np.int64]:
        """How many rows stand for the same file as each."""
        if self.shards is not None:
            return np.ones(len(self.first), dtype=np.int64)
        return np.bincount(self.first, minlength=len(self.first))

    @cached_property
    def _ids(self) -> list[str]:
        found: list[str] = self.rows["id"].to_pylist()
        return found

    @cached_property
    def _labels(self) -> list[str]:
        found: list[str] = self.rows["label"].to_pylist()
        return found

    @cached_property
    def _numbers(self) -> list[int]:
        return numbers(self._labels, self.layout.classes)

    def _beside(self, number: int) -> SideFiles:
        return side_files(self._ids[number], self._labels[number], self._numbers[number])

    @property
    def plan(self) -> pa.Table:
        """`EXPORT_SCHEMA` rows in the order of the manifest, as far as it is known what comes of the photos."""
        return self._planned().take(pc.sort_indices(self.rows["row"]))

    def _planned(self, own: slice = slice(None)) -> pa.Table:
        """The same of some rows, in the order in which they are read."""
        first = self.first[own] if self.shards is None else np.arange(len(self.first))[own]
        done = self.sizes_there[first]
        rows = self.rows.slice(own.start or 0, len(first))
        shards = pa.nulls(len(first), pa.string())
        if self.shards is not None:
            shards = pa.array(map(shard_name, self.shards[own].tolist()), pa.string())
        columns = [
            rows["id"],
            rows["label"],
            pa.array(self.layout.paths[own], pa.string()),
            shards,
            pa.array(done, mask=done < 0),
            rows["path"],
            rows["shard"],
            pa.array(map(self.errors.get, first.tolist()), pa.string()),
        ]
        return pa.table(columns, schema=EXPORT_SCHEMA)

    def labels(self) -> pa.Table:
        """Of each label that has photos there its folder, and its number: as ImageFolder counts, or ``KEY.cls``."""
        there = np.flatnonzero(self.sizes_there >= 0).tolist()
        number_of = {self._labels[number]: self._numbers[number] for number in there}
        folders = sorted((self.layout.folders[label], label) for label in number_of)
        if self.shards is None:
            number_of = {label: number for number, (_, label) in enumerate(folders)}
        return pa.table(
            {
                "label": pa.array([label for _, label in folders], pa.string()),
                "folder": pa.array([folder for folder, _ in folders], pa.string()),
                "class": pa.array([number_of[label] for _, label in folders], pa.int64()),
            }
        )

    @property
    def left(self) -> int:
        """Photos that are to be written."""
        return int(self.is_left.sum())

    @property
    def bytes_to_do(self) -> int:
        """Bytes of the files that they are made from."""
        return int(self._likely_sizes()[self.is_left].sum())

    @property
    def bytes_before(self) -> int:
        """Bytes of the files that the photos which are there were made from."""
        there = self.sizes_there >= 0
        return int(self.sizes[there][self.sizes[there] >= 0].sum())

    @property
    def bytes_there(self) -> int:
        """Bytes of the photos that are there."""
        return int(self.sizes_there[self.sizes_there >= 0].sum())

    def room_needed(self) -> int:
        """About how many bytes of a disk the photos take that are to be written."""
        sizes = self._likely_sizes()
        if self.options.resize is not None:
            longest = pc.max_element_wise(self.rows["width"], self.rows["height"])
            shrink = np.minimum(1.0, self.options.resize / pc.fill_null(longest.cast(pa.float64()), np.nan).to_numpy())
            known = shrink[~np.isnan(shrink)]
            # Bytes go by the area at least.
            shrink = np.where(np.isnan(shrink), known.mean() if len(known) else 1.0, shrink) ** 2
            sizes = (sizes * shrink).astype(np.int64)
        if self.shards is not None:
            return int(np.array(self._sizes_in_shards(sizes), dtype=np.int64)[self.is_left].sum())
        return int((-(-sizes[self.is_left] // DISK_BLOCK) * DISK_BLOCK).sum())

    def look(self, exported: Exported, before: pa.Table, job: Job) -> None:
        """Find out which photos are there already, and equal.

        Parameters
        ----------
        exported : Exported
            TARGET.
        before : pyarrow.Table
            Its ``export.parquet`` of an earlier export, all of whose photos are of this one too. What that has written
            stays where the photo it came from is gone, or is another one now.
        job : Job
            Of the run.
        """
        listing = exported.listing()
        if self.shards is not None:
            self._look_at_shards(exported, listing)
            return
        done = before.filter(pc.is_valid(before["bytes"]))
        written = dict(zip(done["path"].to_pylist(), done["bytes"].to_pylist(), strict=True))
        resized = self.options.resize is not None
        left = np.flatnonzero(self.is_left)
        with ThreadPoolExecutor() as pool:
            for start in range(0, len(left), BATCH):
                own = left[start : start + BATCH].tolist()
                there = {number: state for number in own if (state := listing(self.layout.paths[number])) is not None}
                if not there:
                    continue
                refs = [ref_of(row) for row in self.rows.take(pa.array(list(there))).to_pylist()]
                sources = _states(refs, job)
                equal = partial(is_equal, target=exported.place, resized=resized)
                for (number, state), source, same in zip(
                    there.items(), sources, pool.map(equal, there.values(), sources, refs), strict=True
                ):
                    gone = source is None or self.sizes[number] not in (-1, source.bytes)
                    if same or (gone and written.get(self.layout.paths[number]) == state.bytes):
                        self.is_left[number] = False
                        self.sizes_there[number] = state.bytes or 0
                        if same and source is not None and source.bytes is not None:
                            self.sizes[number] = source.bytes

    def _look_at_shards(self, exported: Exported, listing: Listing) -> None:
        assert self.shards is not None
        for shard in np.unique(self.shards).tolist():
            own = self._of_shard(shard)
            found = exported.read_index(shard_name(shard), listing)
            if found is None or found["error"].null_count < found.num_rows:
                continue
            if found.select(IDENTITY).equals(self._planned(own).select(IDENTITY)):
                self.is_left[own] = False
                self.sizes_there[own] = found["bytes"].to_numpy()

    def _of_shard(self, shard: int) -> slice:
        """The rows whose photos go to a shard; they follow one another."""
        assert self.shards is not None
        return slice(*np.searchsorted(self.shards, [shard, shard + 1]).tolist())

    def groups(self, size: int) -> Generator[Batch]:
        """The photos that are to be written, so many at a time, or a shard."""
        left = np.flatnonzero(self.is_left)
        if self.shards is None:
            parts: Sequence[NDArray[np.int64]] = [left[start : start + size] for start in range(0, len(left), size)]
        else:
            of = self.shards[left]
            parts = [left[of == shard] for shard in np.unique(of)]
        for part in parts:
            rows = self.rows.take(pa.array(part)).to_pylist()
            own = tuple(part.tolist())
            yield Batch(
                numbers=own,
                copies=tuple(self._copy(number, row) for number, row in zip(own, rows, strict=True)),
                shard=None if self.shards is None else shard_name(int(self.shards[own[0]])),
            )

    def _copy(self, number: int, row: dict[str, Any]) -> CopyRequest:
        size = int(self.sizes[number])
        return CopyRequest(
            ref=ref_of(row),
            path=self.layout.paths[number],
            bytes=None if size < 0 else size,
            is_known=row["hash"] is not None,
            etag=row["etag"] if row["shard"] is None else None,
            side_files=() if self.shards is None else self._beside(number),
        )

    def note(self, numbers: Sequence[int], found: Sequence[CopyResult], exported: Exported) -> None:
        """Note what came of photos; of a shard, that it is done."""
        for number, one in zip(numbers, found, strict=True):
            if one.error is not None:
                self.errors[number] = one.error
            else:
                self.sizes[number], self.sizes_there[number] = one.read, one.written
                self.written += int(self._alike[number])
            self.bytes_done += one.read
            self.copied_not_linked += one.copied_not_linked
        if self.shards is not None:
            shard = int(self.shards[numbers[0]])
            exported.write_index(shard_name(shard), self._planned(self._of_shard(shard)))


def _first_of_each(paths: list[str]) -> NDArray[np.int64]:
    """Of each path the first place at which it stands."""
    seen: dict[str, int] = {}
    return np.array([seen.setdefault(path, number) for number, path in enumerate(paths)], dtype=np.int64)


def _states(refs: Sequence[PhotoRef], job: Job) -> list[FileState | None]:
    """How the photos are where they come from; None where that cannot be told."""
    paths = [ref for ref in refs if isinstance(ref, str)]
    single = iter(states_of(paths, job.source))
    return [FileState(ref.bytes, ref.mtime_ns, None) if isinstance(ref, ByteRange) else next(single) for ref in refs]
