"""Plan of an export: which photos it writes, and where each goes. Reads no photo, writes nothing."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from reducer.config.resolved import ResolvedJob
from reducer.outputs.export.layout import (
    SAME,
    TAR,
    ExportOptions,
    Layout,
    SideFiles,
    as_in_manifest,
    by_label,
    class_numbers,
    in_shard,
    into_shards,
    shard_name,
    side_files,
    size_in_shard,
)
from reducer.outputs.export.write import Batch, CopyRequest
from reducer.photos.reader import states_of
from reducer.storage.location import Location, absolute, ref_of
from reducer.storage.schemas import EXPORT_SCHEMA

#: Columns of the ledger that an export reads.
COLUMNS = [
    *("row", "id", "label", "path", "bytes", "mtime", "etag", "shard", "offset"),
    *("width", "height", "format", "hash", "kept"),
]
#: Columns of ``export.parquet`` that say which photo lies where.
IDENTITY = ["id", "label", "path", "shard", "source", "source_shard"]
#: Photos of a URL whose sizes are requested, at most about, to estimate whether there is room.
SIZE_REQUESTS = 1000


@dataclass(frozen=True, eq=False)
class ExportPlan:
    """Photos of an export, and where each goes.

    Attributes
    ----------
    rows : pyarrow.Table, n rows
        Rows of the ledger (`COLUMNS`), in the order in which the photos are read.
    layout : Layout
        Paths of the photos in TARGET.
    options : ExportOptions
        Options of the export.
    sizes : ndarray of int64, shape (n,)
        Bytes of the photos' files; negative where unknown.
    first : ndarray of int64, shape (n,)
        For each row the first row with the same path in TARGET: such rows stand for one file, written once.
    missing : dict of int to str
        Why rows cannot be written at all, by row.
    shards : ndarray of int64, shape (n,), or None
        Number of the shard that each photo goes to, not decreasing; None for single files.
    """

    rows: pa.Table
    layout: Layout
    options: ExportOptions
    sizes: NDArray[np.int64]
    first: NDArray[np.int64]
    missing: dict[int, str]
    shards: NDArray[np.int64] | None = None

    @cached_property
    def _ids(self) -> list[str]:
        ids: list[str] = self.rows["id"].to_pylist()
        return ids

    @cached_property
    def _labels(self) -> list[str]:
        labels: list[str] = self.rows["label"].to_pylist()
        return labels

    @cached_property
    def _numbers(self) -> list[int]:
        return class_numbers(self._labels, self.layout.classes)

    @cached_property
    def manifest_order(self) -> pa.Array:
        """Rows in the order of the manifest, as indices into ``rows``."""
        return pc.sort_indices(self.rows["row"])

    def in_shards(self) -> ExportPlan:
        """Return this plan with its photos distributed over shards."""
        assert isinstance(self.options.shard_bytes, int)
        sizes = self.sizes_in_shards(with_mean_for_unknown(self.sizes))
        return replace(self, shards=np.array(into_shards(sizes, self.options.shard_bytes), dtype=np.int64))

    def with_shards_of(self, before: pa.Table) -> ExportPlan:
        """Return this plan with the shards of an earlier one, whatever the sizes of the photos are now.

        Parameters
        ----------
        before : pyarrow.Table
            ``export.parquet`` of the earlier export; of other photos, or without shards, it changes nothing.
        """
        photos = [name for name in IDENTITY if name != "shard"]
        places = self.places().take(self.manifest_order)
        if self.shards is None or not before.select(photos).equals(places.select(photos)):
            return self
        names = {shard_name(number): number for number in range(before.num_rows)}
        numbers = np.array([names.get(name, -1) for name in before["shard"].to_pylist()], dtype=np.int64)
        shards = np.empty_like(numbers)
        shards[self.manifest_order.to_numpy()] = numbers
        if len(shards) and shards.min() >= 0 and (np.diff(shards) >= 0).all():
            return replace(self, shards=shards)
        return self

    def sizes_in_shards(self, sizes: NDArray[np.int64]) -> list[int]:
        """Return the bytes that photos take in shards with their side files, given the bytes of each photo."""
        return [
            size_in_shard(
                (path, size), *((in_shard(path, ending), len(part)) for ending, part in self._side_files(number))
            )
            for number, (path, size) in enumerate(zip(self.layout.paths, sizes.tolist(), strict=True))
        ]

    def _side_files(self, number: int) -> SideFiles:
        return side_files(self._ids[number], self._labels[number], self._numbers[number])

    def rows_of(self, shard: int) -> slice:
        """Return the rows whose photos go to a shard; they follow one another."""
        assert self.shards is not None
        return slice(*np.searchsorted(self.shards, [shard, shard + 1]).tolist())

    def places(self, rows: slice = slice(None)) -> pa.Table:
        """Return which photo lies where: the `IDENTITY` columns of some rows, in the order in which they are read."""
        table = self.rows[rows]
        shards = pa.nulls(table.num_rows, pa.string())
        if self.shards is not None:
            shards = pa.array(map(shard_name, self.shards[rows].tolist()), pa.string())
        paths = pa.array(self.layout.paths[rows], pa.string())
        columns = [table["id"], table["label"], paths, shards, table["path"], table["shard"]]
        return pa.table(columns, schema=pa.schema([EXPORT_SCHEMA.field(name) for name in IDENTITY]))

    def labels(self, there: NDArray[np.bool_]) -> pa.Table:
        """Return ``labels.csv``: each label's folder and number, as ImageFolder counts them, or as in ``KEY.cls``.

        Parameters
        ----------
        there : ndarray of bool, shape (n,)
            Photos that are in TARGET; labels without any are left out.
        """
        number_of = {self._labels[number]: self._numbers[number] for number in np.flatnonzero(there).tolist()}
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

    def batches(self, left: NDArray[np.int64], size: int) -> Generator[Batch]:
        """Yield photos to be written together.

        Parameters
        ----------
        left : ndarray of int64
            Rows whose photos are to be written, ascending.
        size : int
            Photos per batch at most; with shards a batch is a shard.
        """
        if self.shards is None:
            parts = [left[start : start + size] for start in range(0, len(left), size)]
        else:
            shards = self.shards[left]
            parts = [left[shards == shard] for shard in np.unique(shards)]
        for part in parts:
            rows = self.rows.take(pa.array(part)).to_pylist()
            numbers = tuple(part.tolist())
            yield Batch(
                numbers=numbers,
                copies=tuple(self._request(number, row) for number, row in zip(numbers, rows, strict=True)),
                shard=None if self.shards is None else shard_name(int(self.shards[numbers[0]])),
            )

    def _request(self, number: int, row: dict[str, Any]) -> CopyRequest:
        size = int(self.sizes[number])
        return CopyRequest(
            ref=ref_of(row),
            path=self.layout.paths[number],
            bytes=None if size < 0 else size,
            is_known=row["hash"] is not None,
            etag=row["etag"] if row["shard"] is None else None,
            side_files=() if self.shards is None else self._side_files(number),
        )


def make_plan(
    rows: pa.Table, ledger: pa.Table, job: ResolvedJob, options: ExportOptions, target: Location
) -> ExportPlan:
    """Plan an export.

    Parameters
    ----------
    rows : pyarrow.Table
        Rows of the ledger whose photos are exported, `COLUMNS`.
    ledger : pyarrow.Table
        The whole ledger.
    job : ResolvedJob
        ResolvedJob of the run.
    options : ExportOptions
        Options of the export.
    target : Location
        Folder to write to.
    """
    rows = rows.sort_by([("shard", "ascending"), ("offset", "ascending"), ("row", "ascending")])
    if options.layout == SAME:
        layout = as_in_manifest(rows, absolute(job.images))
    else:
        layout = by_label(rows, ledger, keys=options.layout == TAR)
    missing = {}
    if pc.any(pc.is_valid(ledger["shard"])).as_py():
        missing = dict.fromkeys(np.flatnonzero(pc.is_null(rows["shard"])).tolist(), "missing: it is in no shard")
    plan = ExportPlan(
        rows=rows,
        layout=layout,
        options=options,
        sizes=_sizes(rows, missing, job, options, target),
        first=np.arange(rows.num_rows) if options.layout == TAR else _first_of_each(layout.paths),
        missing=missing,
    )
    return plan.in_shards() if options.layout == TAR else plan


def _sizes(
    rows: pa.Table, missing: dict[int, str], job: ResolvedJob, options: ExportOptions, target: Location
) -> NDArray[np.int64]:
    """Return the bytes of the photos' files, negative where unknown."""
    sizes: NDArray[np.int64] = pc.fill_null(rows["bytes"], -1).to_numpy().copy()
    unknown = [number for number in np.flatnonzero(sizes < 0).tolist() if number not in missing]
    if options.layout != TAR and job.images_location.remote:
        # Each takes a request. Reading a photo tells its size; to see whether there is room, a sample is enough.
        unknown = [] if target.remote else unknown[:: -(-len(unknown) // SIZE_REQUESTS) or 1]
    paths = rows["path"].take(pa.array(unknown, pa.int64())).to_pylist()
    for number, state in zip(unknown, states_of(paths, job.source), strict=True):
        sizes[number] = -1 if state is None or state.bytes is None else state.bytes
    return sizes


def _first_of_each(paths: list[str]) -> NDArray[np.int64]:
    """Return for each path the first position at which it stands."""
    seen: dict[str, int] = {}
    return np.array([seen.setdefault(path, number) for number, path in enumerate(paths)], dtype=np.int64)


def with_mean_for_unknown(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return sizes in bytes, the mean of the known ones in place of unknown (negative) ones."""
    known = sizes[sizes >= 0]
    mean = int(known.mean()) if len(known) else 0
    return np.where(sizes >= 0, sizes, mean)


def same_photos(rows: pa.Table, others: pa.Table) -> bool:
    """Return whether all photos of one export lie in another one too, at the same place.

    Parameters
    ----------
    rows, others : pyarrow.Table
        The `IDENTITY` columns, and any others.
    """
    if not rows.num_rows:
        return True
    photos, other_photos = (_distinct_places(table) for table in (rows, others))
    return bool(photos.join(other_photos, IDENTITY, join_type="left anti").num_rows == 0)


def _distinct_places(rows: pa.Table) -> pa.Table:
    distinct = rows.select(IDENTITY).group_by(IDENTITY).aggregate([])
    # Null is equal to nothing in a join.
    return pa.table({name: pc.fill_null(distinct[name], "") for name in IDENTITY})
