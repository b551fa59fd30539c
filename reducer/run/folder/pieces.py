"""Hashes in a run folder that are not ranked yet: a part file per shard, or per piece of a giant label."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from reducer.run.folder.files import HASHES, READ_AT_A_TIME, RunFiles, note_of, part_name, part_number
from reducer.run.tasks.messages import PieceReport
from reducer.storage.codecs import VectorSpool, spooled
from reducer.storage.schemas import HASHES_SCHEMA, SPOOLED_SCHEMA


class PieceFiles:
    """The shards and pieces that are done, by number.

    Parameters
    ----------
    files : RunFiles
        The run folder.
    """

    def __init__(self, files: RunFiles) -> None:
        self._files = files

    def done(self) -> frozenset[int]:
        """Return the numbers of the shards or pieces that are done now; one listing."""
        return frozenset(map(part_number, self._files.part_names(HASHES)))

    def write(self, number: int, rows: pa.Table, report: PieceReport) -> None:
        """Write what was found in a shard or piece: from then on it is done.

        Parameters
        ----------
        number : int
            Number of the shard or piece.
        rows : pyarrow.Table
            `HASHES_SCHEMA`.
        report : PieceReport
            What came of it.
        """
        self._files.make_folder(HASHES)
        self._files.write(f"{HASHES}/{part_name(number)}", rows, note=report.as_dict())

    def read(self, number: int) -> tuple[pa.Table, PieceReport]:
        """Read the rows (`HASHES_SCHEMA`) and the report of a shard or piece that is done."""
        rows, note = self._files.read_table(f"{HASHES}/{part_name(number)}")
        return rows.cast(HASHES_SCHEMA), PieceReport.from_dict(note) if note else PieceReport()

    def reports(self) -> dict[int, PieceReport]:
        """Read the reports of all shards or pieces that are done, by number; reads no row."""
        numbers = sorted(self.done())
        with ThreadPoolExecutor(READ_AT_A_TIME) as pool:
            return dict(zip(numbers, pool.map(self._report, numbers), strict=True))

    def _report(self, number: int) -> PieceReport:
        note = note_of(self._files.read_footer(f"{HASHES}/{part_name(number)}").metadata)
        return PieceReport.from_dict(note) if note else PieceReport()

    def read_all(self, spool: VectorSpool) -> pa.Table:
        """Read what was found in all shards and pieces that are done, in the order of their numbers.

        Parameters
        ----------
        spool : VectorSpool
            Takes the vectors.

        Returns
        -------
        pyarrow.Table
            `SPOOLED_SCHEMA`.
        """
        numbers = sorted(self.done())
        tables = [SPOOLED_SCHEMA.empty_table()]
        with ThreadPoolExecutor(READ_AT_A_TIME) as pool:
            for start in range(0, len(numbers), READ_AT_A_TIME):  # memory holds the vectors of no more files than these
                for rows, _ in pool.map(self.read, numbers[start : start + READ_AT_A_TIME]):
                    tables.append(spooled(rows, spool))
        return pa.concat_tables(tables)

    def remove(self) -> None:
        """Remove the hashes of all shards and pieces."""
        self._files.remove(self._files.part_names(HASHES), HASHES)
