"""Progress of an export: which photos are there, which are left, and what failed. Pure."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from reducer.outputs.export.plan import ExportPlan, with_mean_for_unknown
from reducer.outputs.export.write import Batch, CopyResult
from reducer.storage.schemas import EXPORT_SCHEMA

#: Bytes that a disk allots to a file at a time.
DISK_BLOCK = 4096


@dataclass(eq=False)
class Transfer:
    """Progress of an export.

    Attributes
    ----------
    plan : ExportPlan, n rows
        The photos, and where they go.
    sizes : ndarray of int64, shape (n,)
        Bytes of the photos' files; negative where unknown.
    target_sizes : ndarray of int64, shape (n,)
        Bytes of the photos in TARGET; negative where they are not there (yet).
    is_left : ndarray of bool, shape (n,)
        Rows whose photos are to be written.
    errors : dict of int to str
        Why photos are not there, by row.
    written : int
        Photos written by this export.
    bytes_read : int
        Bytes of the photos that were read for them.
    copied_not_linked : int
        Photos that were copied since they could not be linked.
    """

    plan: ExportPlan
    sizes: NDArray[np.int64] = field(init=False)
    target_sizes: NDArray[np.int64] = field(init=False)
    is_left: NDArray[np.bool_] = field(init=False)
    errors: dict[int, str] = field(init=False)
    written: int = 0
    bytes_read: int = 0
    copied_not_linked: int = 0

    def __post_init__(self) -> None:
        self.sizes = self.plan.sizes.copy()
        self.target_sizes = np.full(len(self.sizes), -1, dtype=np.int64)
        self.errors = dict(self.plan.missing)
        self.is_left = self.plan.first == np.arange(len(self.sizes))
        self.is_left[list(self.errors)] = False

    @cached_property
    def _rows_per_file(self) -> NDArray[np.int64]:
        return np.bincount(self.plan.first, minlength=len(self.plan.first))

    @property
    def left(self) -> int:
        """Number of photos to be written."""
        return int(self.is_left.sum())

    @property
    def bytes_left(self) -> int:
        """Bytes of the files that these are made from, estimated where unknown."""
        return int(with_mean_for_unknown(self.sizes)[self.is_left].sum())

    @property
    def bytes_before(self) -> int:
        """Bytes of the files that the photos in TARGET were made from."""
        return int(self.sizes[(self.target_sizes >= 0) & (self.sizes >= 0)].sum())

    @property
    def bytes_there(self) -> int:
        """Bytes of the photos in TARGET."""
        return int(self.target_sizes[self.target_sizes >= 0].sum())

    def room_needed(self) -> int:
        """Return about how many bytes of a disk the photos to be written take."""
        sizes = with_mean_for_unknown(self.sizes)
        resize = self.plan.options.resize
        if resize is not None:
            longest = pc.max_element_wise(self.plan.rows["width"], self.plan.rows["height"])
            shrink = np.minimum(1.0, resize / pc.fill_null(longest.cast(pa.float64()), np.nan).to_numpy())
            known = shrink[~np.isnan(shrink)]
            # Bytes shrink with the area at least.
            shrink = np.where(np.isnan(shrink), known.mean() if len(known) else 1.0, shrink) ** 2
            sizes = (sizes * shrink).astype(np.int64)
        if self.plan.shards is not None:
            return int(np.array(self.plan.sizes_in_shards(sizes), dtype=np.int64)[self.is_left].sum())
        return int((-(-sizes[self.is_left] // DISK_BLOCK) * DISK_BLOCK).sum())

    def batches(self, size: int) -> Generator[Batch]:
        """Yield the photos to be written, as `ExportPlan.batches` does."""
        return self.plan.batches(np.flatnonzero(self.is_left), size)

    def note(self, numbers: Sequence[int], results: Sequence[CopyResult]) -> None:
        """Record what came of photos.

        Parameters
        ----------
        numbers : sequence of int, n
            Their rows.
        results : sequence of CopyResult, n
            Their results.
        """
        for number, result in zip(numbers, results, strict=True):
            if result.error is not None:
                self.errors[number] = result.error
            else:
                self.sizes[number], self.target_sizes[number] = result.read, result.written
                self.written += int(self._rows_per_file[number])
            self.bytes_read += result.read
            self.copied_not_linked += result.copied_not_linked

    def table(self, rows: slice = slice(None)) -> pa.Table:
        """Return rows of ``export.parquet`` (`EXPORT_SCHEMA`), in the order in which photos are read."""
        first = self.plan.first[rows]
        sizes = self.target_sizes[first]
        places = self.plan.places(rows)
        outcome = {
            "bytes": pa.array(sizes, mask=sizes < 0),
            "error": pa.array(map(self.errors.get, first.tolist()), pa.string()),
        }
        columns = [outcome[name] if name in outcome else places[name] for name in EXPORT_SCHEMA.names]
        return pa.table(columns, schema=EXPORT_SCHEMA)

    def whole_table(self) -> pa.Table:
        """Return ``export.parquet``: `EXPORT_SCHEMA` rows in the order of the manifest."""
        return self.table().take(self.plan.manifest_order)
