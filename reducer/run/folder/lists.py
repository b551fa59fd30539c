"""Write and read what people take from a run folder: the reduced list, near copies across labels, the report."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from reducer.run.folder.files import CROSS_LABEL, CSV, PARQUET, REPORT, RunFiles, parquet_file
from reducer.run.folder.manifest_columns import ManifestColumns, as_texts, write_tables
from reducer.run.folder.parts import LedgerParts
from reducer.storage.atomic import write_file, writing
from reducer.storage.location import Location
from reducer.storage.schemas import REDUCED_COLUMNS, ListForm, with_distance_unit
from reducer.storage.tables import csv_file

#: Columns of the ledger that a list is made of.
LIST_COLUMNS = ("row", "id", "label", *REDUCED_COLUMNS)


class ListFiles:
    """The files that a finished run writes from its ledger.

    Parameters
    ----------
    files : RunFiles
        The run folder.
    parts : LedgerParts
        The ledger.
    columns : ManifestColumns
        The other columns of the manifest.
    """

    def __init__(self, files: RunFiles, parts: LedgerParts, columns: ManifestColumns) -> None:
        self._files, self._parts, self._columns = files, parts, columns

    def reduced(self, form: ListForm) -> pa.Table:
        """Return the kept rows of the ledger, in manifest order, in the columns of ``reduced.parquet``."""
        return self.in_columns(self._kept(), form)

    def in_columns(self, rows: pa.Table, form: ListForm) -> pa.Table:
        """Return rows of the ledger in the columns of ``reduced.parquet``.

        Parameters
        ----------
        rows : pyarrow.Table
            With `LIST_COLUMNS`, in manifest order.
        form : ListForm
            Form of the list.
        """
        if not form.others:
            return as_reduced(rows, form)
        return pa.concat_tables([_beside(part, others, form) for part, others in self._columns.of_rows(rows)])

    def _kept(self) -> pa.Table:
        ledger = self._parts.ledger([*LIST_COLUMNS, "kept"])
        return ledger.filter(ledger["kept"])

    def write_reduced(self, form: ListForm, formats: str, unit: str) -> None:
        """Write the reduced list from the ledger, in one pass.

        Parameters
        ----------
        form : ListForm
            Form of the list.
        formats : {"csv", "parquet", "both"}
            Which files.
        unit : {"bits", "cosine"}
            Unit of the distances.
        """
        rows = self._kept()
        for kind, name in (("parquet", PARQUET), ("csv", CSV)):
            if formats in (kind, "both"):
                self._files.check_ours()
                self.write_list(self._files.location.below(name), rows, form, kind, unit)

    def write_list(self, target: Location, rows: pa.Table, form: ListForm, kind: str, unit: str) -> None:
        """Write a list so that it is whole or absent.

        Parameters
        ----------
        target : Location
            Where.
        rows : pyarrow.Table
            Rows of the ledger as for `in_columns`.
        form : ListForm
            Form of the list.
        kind : {"csv", "parquet"}
            CSV has the manifest's own columns only.
        unit : {"bits", "cosine"}
            Unit of the distances.
        """
        if not form.others:
            reduced = with_distance_unit(as_reduced(rows, form), unit)
            own = reduced.select(reduced.column_names[:2])
            write_file(target, parquet_file(reduced) if kind == "parquet" else csv_file(own))
            return
        parts = self._columns.of_rows(rows)
        with writing(target) as file:
            if kind == "csv":
                for number, (part, others) in enumerate(parts):
                    file.write(csv_file(_as_in_the_manifest(part, others, form), header=number == 0))
            else:
                write_tables(file, (with_distance_unit(_beside(part, others, form), unit) for part, others in parts))

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


def as_reduced(rows: pa.Table, form: ListForm) -> pa.Table:
    """Return ledger rows in the columns of `ListForm.schema`."""
    schema = form.schema
    return rows.select(["id", "label", *REDUCED_COLUMNS]).rename_columns(schema.names).cast(schema)


def _beside(rows: pa.Table, others: pa.Table, form: ListForm) -> pa.Table:
    """Return rows of ``reduced.parquet`` with the other columns of the manifest behind them."""
    reduced = as_reduced(rows, form)
    for name, field, column in zip(form.names_of_others, others.schema, others.columns, strict=True):
        reduced = reduced.append_column(field.with_name(name), column)
    return reduced


def _as_in_the_manifest(rows: pa.Table, others: pa.Table, form: ListForm) -> pa.Table:
    """Return rows in the columns of the manifest, in its order."""
    known = dict(zip(form.others, as_texts(others).columns, strict=True))
    known |= {form.id_column: rows["id"], form.label_column: rows["label"]}
    return pa.table([known[name] for name in form.columns], names=list(form.columns))
