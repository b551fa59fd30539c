"""Ledgers made up for tests."""

from __future__ import annotations

import pyarrow as pa

from reducer.storage.schemas import LEDGER_SCHEMA


def ledger_of_rows(rows: list[dict[str, object]]) -> pa.Table:
    rows = [{"kept": False, **row} for row in rows]
    return pa.table([[row.get(f.name) for row in rows] for f in LEDGER_SCHEMA], schema=LEDGER_SCHEMA)
