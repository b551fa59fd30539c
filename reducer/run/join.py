"""Join the rows of a plan with the results of tasks."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from reducer.photos.hashing import PhotoError
from reducer.run.plan.plan import Plan, as_unread
from reducer.run.tasks.hash_stage import WRONG_MD5
from reducer.run.tasks.messages import PieceReport
from reducer.storage.location import MemberKeys
from reducer.storage.schemas import FAILED, KNOWN_SCHEMA, LEDGER_SCHEMA, SHARD_POSITION_SCHEMA, TASK_SCHEMA
from reducer.storage.tables import with_column

#: Kind of the failure of a photo that is in no shard.
MISSING = "missing"


def as_ledger(rows: pa.Table, results: pa.Table) -> pa.Table:
    """Return rows of the ledger: the columns of the results, or else those of the task's rows, or else nulls.

    Parameters
    ----------
    rows : pyarrow.Table
        `TASK_SCHEMA` rows of the partition; `SHARD_POSITION_SCHEMA` where they lie in shards.
    results : pyarrow.Table
        Results of the task, row by row.

    Returns
    -------
    pyarrow.Table
        `LEDGER_SCHEMA`.
    """
    columns = []
    for field in LEDGER_SCHEMA:
        source = next((table for table in (results, rows) if field.name in table.column_names), None)
        columns.append(pa.nulls(rows.num_rows, field.type) if source is None else source[field.name])
    return pa.Table.from_arrays(columns, schema=LEDGER_SCHEMA)


def join_plan(plan: Plan, hashes: pa.Table, keys: MemberKeys | None) -> pa.Table:
    """Find the hash of each row of a plan.

    Parameters
    ----------
    plan : Plan
        The plan, with its paths.
    hashes : pyarrow.Table
        `HASHES_SCHEMA` or `SPOOLED_SCHEMA`, in the order of the shards. Of rows with the same key the last counts, as
        if all shards had been unpacked in turn.
    keys : MemberKeys or None
        Kind of key that identifies photos in shards; None for single files.

    Returns
    -------
    pyarrow.Table
        Columns of `hashes`, a row for each row of the plan; null where nothing was found.
    """
    names = ("path", "label") if keys is MemberKeys.SAMPLE else ("path",)
    hashes_names = ("key", "label") if keys is MemberKeys.SAMPLE else ("key",)
    latest_first = hashes.take(pa.array(np.arange(hashes.num_rows)[::-1]))
    position = pc.index_in(_texts(plan.rows, names), value_set=_texts(latest_first, hashes_names))
    return latest_first.take(position).combine_chunks()


def _texts(table: pa.Table, names: tuple[str, ...]) -> pa.Array:
    """Return a text per row that identifies it by some columns."""
    # Large: all of them may be more than one Arrow array of text holds.
    large = pa.large_string()
    columns = [table[name].cast(large) for name in names]
    joined = pc.binary_join_element_wise(*columns, pa.scalar("\0", large)) if len(columns) > 1 else columns[0]
    return joined.combine_chunks() if isinstance(joined, pa.ChunkedArray) else joined


def with_results(plan: Plan, joined: pa.Table, missing: str) -> pa.Table:
    """Return the rows to read with what shards and pieces told of them.

    Parameters
    ----------
    plan : Plan
        The plan.
    joined : pyarrow.Table
        From `join_plan`.
    missing : str
        Error of photos that were not found.

    Returns
    -------
    pyarrow.Table
        `TASK_SCHEMA`, `KNOWN_SCHEMA` and `SHARD_POSITION_SCHEMA` columns, a row for each of ``plan.read``. Photos with
        neither a hash nor an error are to be read from their positions.
    """
    known = joined.filter(pa.array(plan.is_read))
    columns = {name: plan.read[name] for name in TASK_SCHEMA.names}
    columns["path"] = pc.coalesce(known["path"], columns["path"])
    columns["bytes"] = pc.coalesce(known["bytes"], columns["bytes"])
    for field in KNOWN_SCHEMA:
        columns[field.name] = known[field.name.removeprefix("known_")].cast(field.type)
    is_missing = pc.is_null(known["key"])
    columns["known_error"] = pc.if_else(is_missing, pa.scalar(missing, pa.string()), columns["known_error"])
    columns["known_reused"] = pc.fill_null(columns["known_reused"], False)
    for name in SHARD_POSITION_SCHEMA.names:
        columns[name] = known[name]
    return pa.table(columns)


def without_errors(rows: pa.Table) -> pa.Table:
    """Drop the errors in rows of `with_results` where a retry may read the photo."""
    is_refused = pc.starts_with(rows["known_error"], f"{WRONG_MD5}:")
    has_bytes = pc.fill_null(pc.greater(rows["bytes"], 0), False)
    is_retried = pc.and_not(pc.and_(has_bytes, pc.is_valid(rows["shard"])), pc.fill_null(is_refused, False))
    error = pc.if_else(is_retried, pa.scalar(None, pa.string()), rows["known_error"])
    return with_column(rows, "known_error", error)


def unread_rows(plan: Plan, joined: pa.Table, missing: str) -> pa.Table:
    """Return `LEDGER_SCHEMA` rows of the photos in shards that are not read: where they lie, or that they are missing.

    Parameters are those of `with_results`.
    """
    rows = as_unread(plan.unread)
    known = joined.filter(pa.array(~plan.is_read))
    error = pc.if_else(pc.is_null(known["key"]), pa.scalar(missing, pa.string()), known["error"])
    columns = {name: known[name] for name in (*SHARD_POSITION_SCHEMA.names, "bytes", "mtime", "etag")}
    columns |= {"path": pc.coalesce(known["path"], rows["path"])}
    return with_failures(as_ledger(rows, pa.table(columns)), error)


def with_failures(rows: pa.Table, error: pa.Array | pa.ChunkedArray) -> pa.Table:
    """Return rows of the ledger of photos that are not read, of which some have failed.

    Parameters
    ----------
    rows : pyarrow.Table
        `LEDGER_SCHEMA`.
    error : pyarrow.Array of string, shape (rows,)
        Failures; null for photos that are there.
    """
    failed = pc.is_valid(error)
    no_text = pa.scalar(None, pa.string())
    columns = {
        "kept": pc.and_(rows["kept"], pc.invert(failed)),
        "nearest_kept": pc.if_else(failed, no_text, rows["nearest_kept"]),
        "reason": pc.if_else(failed, FAILED, rows["reason"]),
        "error": error,
    }
    return as_ledger(rows, pa.table(columns))


def missing_error(reports: Mapping[int, PieceReport]) -> str:
    """Return the error of photos that no shard holds."""
    damaged = sum(report.damage is not None for report in reports.values())
    perhaps = f"; {damaged} of the shards {'is' if damaged == 1 else 'are'} damaged" if damaged else ""
    return str(PhotoError(MISSING, f"no shard holds it{perhaps}"))


def merge_attempts(before: pa.Table, now: pa.Table) -> pa.Table:
    """Merge what two attempts to read a shard have given.

    Parameters
    ----------
    before, now : pyarrow.Table
        `HASHES_SCHEMA` rows.

    Returns
    -------
    pyarrow.Table
        For each photo the row of the second attempt, or of the first where only that has a hash.
    """
    hashed = before.filter(pc.is_valid(before["hash"]))["key"].combine_chunks()
    no_better = pc.and_(pc.is_null(now["hash"]), pc.is_in(now["key"], value_set=hashed))
    now = now.filter(pc.invert(no_better))
    others = before.filter(pc.invert(pc.is_in(before["key"], value_set=now["key"].combine_chunks())))
    return pa.concat_tables([others, now])
