"""The other columns of a manifest, which travel along into the reduced lists: ``RUN/manifest.parquet``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from reducer.run.folder.files import MANIFEST, ROW_GROUP, RunFiles


class ManifestColumns:
    """The columns of a manifest but for ids and labels, row by row in its order.

    Parameters
    ----------
    files : RunFiles
        The run folder.
    """

    def __init__(self, files: RunFiles) -> None:
        self._files = files

    def write(self, tables: Iterator[pa.Table]) -> None:
        """Write them, some rows at a time."""
        with self._files.writing(MANIFEST) as file:
            write_tables(file, tables)

    def of_rows(self, reduced: pa.Table) -> Iterator[tuple[pa.Table, pa.Table]]:
        """Join rows of a list with these columns, some rows at a time.

        Parameters
        ----------
        reduced : pyarrow.Table
            With ``row``, ascending.

        Yields
        ------
        pyarrow.Table, pyarrow.Table
            Some of the rows, and the other columns of the same photos.
        """
        rows = reduced["row"].to_numpy()
        with self._files.open_table(MANIFEST) as file:
            start = 0
            for group in range(file.num_row_groups):
                stop = start + file.metadata.row_group(group).num_rows
                first, last = np.searchsorted(rows, (start, stop))
                if first < last or stop == file.metadata.num_rows:
                    table = file.read_row_group(group)
                    yield reduced.slice(first, last - first), table.take(pa.array(rows[first:last] - start))
                start = stop


def write_tables(file: IO[bytes], tables: Iterator[pa.Table]) -> None:
    """Write tables of one schema, at least one, as a Parquet file whose bytes depend on their rows only."""
    held = next(tables)
    with pq.ParquetWriter(file, held.schema, compression="zstd") as writer:
        for table in tables:
            held = pa.concat_tables([held, table])
            while held.num_rows >= ROW_GROUP:
                writer.write_table(held.slice(0, ROW_GROUP), row_group_size=ROW_GROUP)
                held = held.slice(ROW_GROUP)
        writer.write_table(held, row_group_size=ROW_GROUP)


def as_texts(table: pa.Table) -> pa.Table:
    """Return a table of texts, as a CSV file shows the cells; lists and structs in JSON."""
    return pa.table({str(place): _as_text(column) for place, column in enumerate(table.columns)})


def _as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    try:
        return column.cast(pa.string())
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        texts = [
            None if cell is None else json.dumps(cell, ensure_ascii=False, default=str) for cell in column.to_pylist()
        ]
        return pa.chunked_array([pa.array(texts, pa.string())])
