"""The rows of a plan with what was found of them."""

from __future__ import annotations

import pyarrow as pa

from reducer.storage.schemas import LEDGER_SCHEMA


def as_ledger(rows: pa.Table, found: pa.Table) -> pa.Table:
    """Put what a worker found beside what it was asked: its columns, or else those of the rows, or else nulls.

    Parameters
    ----------
    rows : pyarrow.Table
        `TASK_SCHEMA` rows of the partition; `PLACE_SCHEMA` where they lie in shards.
    found : pyarrow.Table
        What came of them, row by row.

    Returns
    -------
    pyarrow.Table
        `LEDGER_SCHEMA`.
    """
    columns = []
    for field in LEDGER_SCHEMA:
        own = next((table for table in (found, rows) if field.name in table.column_names), None)
        columns.append(pa.nulls(rows.num_rows, field.type) if own is None else own[field.name])
    return pa.Table.from_arrays(columns, schema=LEDGER_SCHEMA)
