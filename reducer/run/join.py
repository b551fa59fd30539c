"""The rows of a plan with what was found of them."""

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


def as_ledger(rows: pa.Table, found: pa.Table) -> pa.Table:
    """Put what a worker found beside what it was asked: its columns, or else those of the rows, or else nulls.

    Parameters
    ----------
    rows : pyarrow.Table
        `TASK_SCHEMA` rows of the partition; `SHARD_POSITION_SCHEMA` where they lie in shards.
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


#: Kind of the failure of a photo that is in no shard.
MISSING = "missing"


def join_plan(plan: Plan, found: pa.Table, keys: MemberKeys | None) -> pa.Table:
    """Find for each row of a plan what was found of its photo.

    Parameters
    ----------
    plan : Plan
        The plan, with its paths.
    found : pyarrow.Table
        `HASHES_SCHEMA` rows, in the order of the shards. Of rows with one key the last holds, as it would if all shards
        were unpacked in turn.
    keys : MemberKeys or None
        What the photos are told by in shards; None for single files.

    Returns
    -------
    pyarrow.Table
        `HASHES_SCHEMA`, a row for each of the plan's; nulls where nothing was found.
    """
    names = ("path", "label") if keys is MemberKeys.SAMPLE else ("path",)
    theirs = ("key", "label") if keys is MemberKeys.SAMPLE else ("key",)
    latest_first = found.take(pa.array(np.arange(found.num_rows)[::-1]))
    place = pc.index_in(_texts(plan.rows, names), value_set=_texts(latest_first, theirs))
    return latest_first.take(place).combine_chunks()


def _texts(table: pa.Table, names: tuple[str, ...]) -> pa.Array:
    # Large: all of them may be more than one Arrow array of text holds.
    large = pa.large_string()
    columns = [table[name].cast(large) for name in names]
    joined = pc.binary_join_element_wise(*columns, pa.scalar("\0", large)) if len(columns) > 1 else columns[0]
    return joined.combine_chunks() if isinstance(joined, pa.ChunkedArray) else joined


def with_results(plan: Plan, found: pa.Table, missing: str) -> pa.Table:
    """The rows to read with what was found of them.

    Parameters
    ----------
    plan : Plan
        The plan.
    found : pyarrow.Table
        From `join_plan`.
    missing : str
        The error of photos that were not found.

    Returns
    -------
    pyarrow.Table
        `TASK_SCHEMA`, `KNOWN_SCHEMA` and `SHARD_POSITION_SCHEMA` columns, a row for each of ``plan.read``. What has
        neither a hash nor an error is to be read from its place.
    """
    own = found.filter(pa.array(plan.is_read))
    columns = {name: plan.read[name] for name in TASK_SCHEMA.names}
    columns["path"] = pc.coalesce(own["path"], columns["path"])
    columns["bytes"] = pc.coalesce(own["bytes"], columns["bytes"])
    for field in KNOWN_SCHEMA:
        columns[field.name] = own[field.name.removeprefix("known_")].cast(field.type)
    nowhere = pc.is_null(own["key"])
    columns["known_error"] = pc.if_else(nowhere, pa.scalar(missing, pa.string()), columns["known_error"])
    columns["known_reused"] = pc.fill_null(columns["known_reused"], False)
    for name in SHARD_POSITION_SCHEMA.names:
        columns[name] = own[name]
    return pa.table(columns)


def without_errors(rows: pa.Table) -> pa.Table:
    """Rows of `with_results` that are tried again where there is something to read that may be taken."""
    refused = pc.starts_with(rows["known_error"], f"{WRONG_MD5}:")
    somewhere = pc.fill_null(pc.greater(rows["bytes"], 0), False)
    again = pc.and_not(pc.and_(somewhere, pc.is_valid(rows["shard"])), pc.fill_null(refused, False))
    error = pc.if_else(again, pa.scalar(None, pa.string()), rows["known_error"])
    return with_column(rows, "known_error", error)


def unread_rows(plan: Plan, found: pa.Table, missing: str) -> pa.Table:
    """`LEDGER_SCHEMA` rows of the photos in shards that are not read: where they lie, or that they are nowhere."""
    rows = as_unread(plan.unread)
    own = found.filter(pa.array(~plan.is_read))
    error = pc.if_else(pc.is_null(own["key"]), pa.scalar(missing, pa.string()), own["error"])
    failed = pc.is_valid(error)
    no_text = pa.scalar(None, pa.string())
    known = {name: own[name] for name in (*SHARD_POSITION_SCHEMA.names, "bytes", "mtime", "etag")}
    known |= {
        "path": pc.coalesce(own["path"], rows["path"]),
        "kept": pc.and_(rows["kept"], pc.invert(failed)),
        "nearest_kept": pc.if_else(failed, no_text, rows["nearest_kept"]),
        "reason": pc.if_else(failed, FAILED, rows["reason"]),
        "error": error,
    }
    return as_ledger(rows, pa.table(known))


def missing_error(reports: Mapping[int, PieceReport]) -> str:
    """What is said of a photo that no shard holds."""
    damaged = sum(report.damage is not None for report in reports.values())
    perhaps = f"; {damaged} of the shards {'is' if damaged == 1 else 'are'} damaged" if damaged else ""
    return str(PhotoError(MISSING, f"no shard holds it{perhaps}"))


def merged(before: pa.Table, now: pa.Table) -> pa.Table:
    """What two looks at a shard gave.

    Parameters
    ----------
    before, now : pyarrow.Table
        `HASHES_SCHEMA` rows.

    Returns
    -------
    pyarrow.Table
        Of each photo what the second look gave, but for those of which only the first gave a hash.
    """
    hashed = before.filter(pc.is_valid(before["hash"]))["key"].combine_chunks()
    no_better = pc.and_(pc.is_null(now["hash"]), pc.is_in(now["key"], value_set=hashed))
    now = now.filter(pc.invert(no_better))
    others = before.filter(pc.invert(pc.is_in(before["key"], value_set=now["key"].combine_chunks())))
    return pa.concat_tables([others, now])
