"""Write and read what people take from a run folder: the reduced list, near copies across labels, the report."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from reducer.run.folder.files import CROSS_LABEL, CSV, PARQUET, REPORT, RunFiles, parquet_file
from reducer.run.folder.parts import LedgerParts
from reducer.storage.schemas import REDUCED_COLUMNS, reduced_schema, with_distance_unit
from reducer.storage.tables import csv_file


class ListFiles:
    """The files that a finished run writes from its ledger.

    Parameters
    ----------
    files : RunFiles
        The run folder.
    parts : LedgerParts
        The ledger.
    """

    def __init__(self, files: RunFiles, parts: LedgerParts) -> None:
        self._files, self._parts = files, parts

    def reduced(self, id_column: str, label_column: str) -> pa.Table:
        """Return the kept rows of the ledger, in manifest order, in the columns of `reduced_schema`."""
        ledger = self._parts.ledger(["id", "label", *REDUCED_COLUMNS, "kept"])
        return as_reduced(ledger.filter(ledger["kept"]), id_column, label_column)

    def write_reduced(self, id_column: str, label_column: str, formats: str, unit: str) -> None:
        """Write the reduced list from the ledger, in one pass.

        Parameters
        ----------
        id_column, label_column : str
            Names of these two columns in the manifest.
        formats : {"csv", "parquet", "both"}
            Which files.
        unit : {"bits", "cosine"}
            Unit of the distances.
        """
        reduced = with_distance_unit(self.reduced(id_column, label_column), unit)
        for kind, name in (("parquet", PARQUET), ("csv", CSV)):
            if formats in (kind, "both"):
                self._files.write(name, reduced_file(reduced, kind))

    def write_cross_label(self, pairs: pa.Table) -> None:
        """Write the near copies under different labels, the nearest first."""
        self._files.write(CROSS_LABEL, pairs)

    def read_cross_label(self) -> pa.Table | None:
        """Read the near copies under different labels; None where they were not looked for."""
        return self._files.read_table(CROSS_LABEL)[0] if self._files.has(CROSS_LABEL) else None

    def read_nearest_cross_label(self) -> pa.Table | None:
        """Read the first `ROW_GROUP` of them, the nearest; None where they were not looked for."""
        if not self._files.has(CROSS_LABEL):
            return None
        with self._files.open_table(CROSS_LABEL) as pairs:
            return pairs.read_row_group(0) if pairs.num_row_groups else pairs.schema_arrow.empty_table()

    def cross_label_of(self, photo: str) -> list[tuple[str, dict[str, Any]]]:
        """Find the near copies of a photo under other labels.

        Parameters
        ----------
        photo : str
            Id of the photo.

        Returns
        -------
        list of (str, dict)
            The label of the photo, and ``id``, ``label`` and ``distance`` of a near copy; the nearest first.
        """
        pairs = self.read_cross_label()
        if pairs is None:
            return []
        copies = []
        for this, other in (("", "other_"), ("other_", "")):
            for pair in pairs.filter(pc.equal(pairs[f"{this}id"], photo)).to_pylist():
                copy = {"id": pair[f"{other}id"], "label": pair[f"{other}label"], "distance": pair["distance"]}
                copies.append((pair[f"{this}label"], copy))
        return sorted(copies, key=lambda pair: (pair[1]["distance"], pair[1]["label"], pair[1]["id"]))

    def write_report(self, page: bytes) -> None:
        """Write the report."""
        self._files.write(REPORT, page)

    def remove_report(self) -> None:
        """Remove a report that does not hold any more."""
        if self._files.has(REPORT):
            self._files.remove([REPORT])


def as_reduced(rows: pa.Table, id_column: str, label_column: str) -> pa.Table:
    """Return ledger rows in the columns of `reducer.storage.schemas.reduced_schema`."""
    schema = reduced_schema(id_column, label_column)
    return rows.select(["id", "label", *REDUCED_COLUMNS]).rename_columns(schema.names).cast(schema)


def reduced_file(reduced: pa.Table, kind: str) -> bytes:
    """Return a reduced list as the bytes of a file.

    Parameters
    ----------
    reduced : pyarrow.Table
        From `as_reduced`.
    kind : {"csv", "parquet"}
        CSV has the manifest's own two columns only.
    """
    if kind == "parquet":
        return parquet_file(reduced)
    return csv_file(reduced.select(reduced.column_names[:2]))
