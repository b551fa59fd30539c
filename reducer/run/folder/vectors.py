"""Vectors in a run folder: a part file beside each part file of the ledger whose photos have some."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import pyarrow as pa
import pyarrow.compute as pc

from reducer.run.folder.files import VECTORS, RunFiles
from reducer.storage.codecs import VectorSpool, from_lists, vectors_table
from reducer.storage.schemas import VECTORS_SCHEMA


class VectorParts:
    """The vectors of the rows of the ledger.

    Parameters
    ----------
    files : RunFiles
        The run folder.
    """

    def __init__(self, files: RunFiles) -> None:
        self._files = files

    def names(self) -> list[str]:
        """Return the names of the part files that are there now; one listing."""
        return self._files.part_names(VECTORS)

    def write(self, name: str, ledger: pa.Table, vectors: pa.Array | pa.ChunkedArray) -> None:
        """Write the vectors of a part file of the ledger, or nothing where all of them are null.

        Parameters
        ----------
        name : str
            Name of the part file.
        ledger : pyarrow.Table
            `LEDGER_SCHEMA` rows of the part file.
        vectors : pyarrow.Array of binary
            Their vectors, bytes of float16 numbers or null.
        """
        table = vectors_table(ledger, vectors)
        if table is not None:
            self._files.make_folder(VECTORS)
            self._files.write(f"{VECTORS}/{name}", table)

    def read(self, name: str, rows: int, names: Collection[str]) -> pa.Array:
        """Read the vectors of a part file of the ledger.

        Parameters
        ----------
        name : str
            Name of the part file.
        rows : int
            Rows of the part file.
        names : collection of str
            From `names`: listed once for all parts, not for each.

        Returns
        -------
        pyarrow.Array of binary, shape (rows,)
            Bytes of float16 numbers; all null where none had a vector.
        """
        if name not in names:
            return pa.nulls(rows, pa.binary())
        return from_lists(self._read(name)["vector"])

    def read_all(self, spool: VectorSpool) -> pa.Table:
        """Read all vectors into a spool; return ``id``, ``label`` and, as ``vector``, the position of each there."""
        schema = pa.schema([*VECTORS_SCHEMA, pa.field("vector", pa.int64())])
        tables = [schema.empty_table()]
        for name in self.names():
            rows = self._read(name)
            columns = [rows["id"], rows["label"], spool.put(from_lists(rows["vector"]))]
            tables.append(pa.Table.from_arrays(columns, schema=schema))
        return pa.concat_tables(tables)

    def read_labels(self, labels: Iterable[str]) -> pa.Table:
        """Read ``id``, ``label`` and ``vector`` of some labels, vectors as bytes of float16 numbers or null."""
        wanted = pa.array(list(labels), pa.string())
        schema = pa.schema([*VECTORS_SCHEMA, pa.field("vector", pa.binary())])
        tables = [schema.empty_table()]
        for name in self.names():
            rows = self._read(name)
            rows = rows.filter(pc.is_in(rows["label"], value_set=wanted))
            columns = {column: rows[column] for column in VECTORS_SCHEMA.names}
            tables.append(pa.table({**columns, "vector": from_lists(rows["vector"])}).cast(schema))
        return pa.concat_tables(tables)

    def _read(self, name: str) -> pa.Table:
        return self._files.read_table(f"{VECTORS}/{name}")[0]

    def remove(self) -> None:
        """Remove all vectors."""
        self._files.remove(self.names(), VECTORS)
