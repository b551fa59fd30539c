"""The ledger in a run folder: a part file per partition, and some for the photos that are not read."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset

from reducer.run.folder.files import IMAGES, READ_AT_A_TIME, RunFiles, note_of, part_name, part_number
from reducer.run.folder.vectors import VectorParts
from reducer.run.tasks.messages import Tally
from reducer.storage.schemas import FAILED, LEDGER_SCHEMA, with_distance_unit

#: Beginning of the names of the part files of photos that are not read; they are made anew from the plan.
UNREAD = "part-unread-"


class LedgerParts:
    """The part files of the ledger.

    Parameters
    ----------
    files : RunFiles
        The run folder.
    vectors : VectorParts
        The vectors beside the ledger.
    """

    def __init__(self, files: RunFiles, vectors: VectorParts) -> None:
        self._files, self._vectors = files, vectors

    def names(self) -> list[str]:
        """Return the names of the part files that are there now; one listing."""
        return self._files.part_names(IMAGES)

    def done(self) -> dict[int, str]:
        """Return the names of the part files of the partitions that are done now, by number; one listing."""
        return {part_number(name): name for name in self.names() if not name.startswith(UNREAD)}

    def write(
        self,
        index: int,
        ledger: pa.Table,
        tally: Tally,
        unit: str,
        vectors: pa.Array | pa.ChunkedArray | None = None,
    ) -> None:
        """Write the ledger rows of a partition: from then on it is done.

        Parameters
        ----------
        index : int
            Number of the partition.
        ledger : pyarrow.Table
            `LEDGER_SCHEMA` rows.
        tally : Tally
            What they add to the totals of the run.
        unit : {"bits", "cosine"}
            Unit of the distances.
        vectors : pyarrow.Array of binary, optional
            Their vectors, bytes of float16 numbers or null; None leaves those that are there.
        """
        self.replace(part_name(index), ledger, tally, unit, vectors)

    def write_unread(self, ledgers: Iterable[pa.Table], unit: str) -> None:
        """Write the ledger rows of the photos that are not read, each table to a part file of its own."""
        for number, ledger in enumerate(ledgers):
            failed = pc.sum(pc.equal(ledger["reason"], FAILED)).as_py()
            self.replace(f"{UNREAD}{number:05d}.parquet", ledger, Tally(failed=failed or 0), unit)

    def replace(
        self,
        name: str,
        ledger: pa.Table,
        tally: Tally,
        unit: str,
        vectors: pa.Array | pa.ChunkedArray | None = None,
    ) -> None:
        """Write a part file by its name; other parameters as for `write`."""
        if vectors is not None:  # first: the part file is what tells that they are there
            self._vectors.write(name, ledger, vectors)
        self._files.write(f"{IMAGES}/{name}", with_distance_unit(ledger, unit), note=tally.as_dict())

    def read(self, name: str) -> tuple[pa.Table, Tally]:
        """Read the rows of a part file, and what they add to the totals of the run."""
        rows, note = self._files.read_table(f"{IMAGES}/{name}")
        return rows, _tally(note)

    def footers(self) -> dict[str, tuple[int, Tally]]:
        """Read the number of rows of each part file, by its name, and what they add to the totals; reads no row."""
        names = self.names()
        with ThreadPoolExecutor(READ_AT_A_TIME) as pool:
            return dict(zip(names, pool.map(self._footer, names), strict=True))

    def _footer(self, name: str) -> tuple[int, Tally]:
        footer = self._files.read_footer(f"{IMAGES}/{name}")
        return footer.num_rows, _tally(note_of(footer.metadata))

    def ledger(self, columns: list[str] | None = None, where: pc.Expression | None = None) -> pa.Table:
        """Read the ledger, in manifest order.

        Parameters
        ----------
        columns : list of str, optional
            Only these columns.
        where : pyarrow.compute.Expression, optional
            Only rows for which it holds.
        """
        columns = columns or LEDGER_SCHEMA.names
        location = self._files.location
        system, root = location.open()
        paths = [f"{root}/{IMAGES}/{name}" for name in self.names()]
        if not paths:
            return LEDGER_SCHEMA.empty_table().select(columns)
        opened = {"filesystem": system} if location.remote else {}
        dataset = pa.dataset.dataset(paths, schema=LEDGER_SCHEMA, format="parquet", **opened)
        with self._files.explaining_damage(IMAGES):
            table = dataset.to_table(columns=list(dict.fromkeys([*columns, "row"])), filter=where)
        return table.sort_by("row").select(columns)

    def remove(self) -> None:
        """Remove the ledger, and the vectors beside it: then nothing is ranked."""
        self._files.remove(self.names(), IMAGES)
        self._vectors.remove()

    def remove_unread(self) -> None:
        """Remove what `write_unread` has written: it may not hold any more."""
        self._files.remove([name for name in self.names() if name.startswith(UNREAD)], IMAGES)


def _tally(note: dict[str, Any] | None) -> Tally:
    return Tally.from_dict(note) if note else Tally()
