"""Write what comes of the tasks of a run, as it comes: hashes of shards and pieces, then the ledger by partition."""

from __future__ import annotations

import logging
from collections.abc import Collection

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm.contrib.logging import logging_redirect_tqdm

from reducer.config.job import path_rule
from reducer.run.counters import Counters
from reducer.run.dask.dispatch import Dispatch
from reducer.run.folder.files import part_name
from reducer.run.join import as_ledger, merge_attempts
from reducer.run.monitor import ALL_FAILED, Monitor
from reducer.run.plan.plan import Plan
from reducer.run.remaining import Remaining
from reducer.run.tasks.messages import PartitionResult, Piece, PiecesResult, Tally
from reducer.run.tasks.serial import InProcess
from reducer.run.tasks.tasks import PartitionTasks, ShardTasks
from reducer.selection.quality import reevaluate_ledger
from reducer.storage.paths import with_paths
from reducer.storage.schemas import FAILED, from_ipc

log = logging.getLogger("reducer")


def write_pieces(executor: InProcess | Dispatch, remaining: Remaining, monitor: Monitor) -> None:
    """Write what is found in each shard or piece.

    Parameters
    ----------
    executor : InProcess or Dispatch
        Hashes them.
    remaining : Remaining
        What is left to do, in a run folder that is locked by this process and holds the plan.
    monitor : Monitor
        Watches the run.

    Raises
    ------
    TooManyFailuresError
        If all photos fail.
    """
    tasks = executor.tasks
    in_shards = isinstance(tasks, ShardTasks)
    size = tasks.bytes if isinstance(tasks, ShardTasks) else tasks.photos
    done = remaining.folder.pieces.done()
    before, any_wrong = 0, False
    with monitor.results(executor, size, "B" if in_shards else " photos") as (results, bar):
        for result in results:
            assert isinstance(result, PiecesResult)
            for piece in result.pieces:
                _write_piece(piece, remaining, is_done=piece.number in done)
                _warn_of_damage(piece, remaining.plan)
                any_wrong = any_wrong or piece.report.wrong_md5
            monitor.counters.add_pieces(result)
            now = before + _task_size(tasks, result.index)
            if in_shards:
                _warn_of_no_match(before / max(1, size), now / max(1, size), result, remaining.plan, monitor.counters)
            bar.update(now - before)
            before = now
            monitor.note(bar, give_up=not remaining.again and not any_wrong)


def _task_size(tasks: PartitionTasks | ShardTasks, index: int) -> int:
    """Return the bytes of the shards of a task, or the photos of a piece."""
    if isinstance(tasks, ShardTasks):
        return sum(shard.bytes for shard in tasks.groups[index])
    return tasks.rows.size(index)


def _write_piece(piece: Piece, remaining: Remaining, *, is_done: bool) -> None:
    """Write what was found in a shard or piece, with what only an earlier attempt has found."""
    rows = from_ipc(piece.rows)
    if piece.report.wrong_md5:
        pass  # an earlier attempt read another shard
    elif is_done:
        rows = merge_attempts(remaining.folder.pieces.read(piece.number)[0], rows)
    elif piece.number in remaining.reused:
        rows = merge_attempts(remaining.reused[piece.number][0], rows)
    remaining.folder.pieces.write(piece.number, rows, piece.report)


def _warn_of_damage(piece: Piece, plan: Plan) -> None:
    """Warn of a shard that is not as it should be, with progress bar and without."""
    report = piece.report
    path = next((shard.path for shard in plan.shards or () if shard.number == piece.number), "")
    with logging_redirect_tqdm([log]):
        if report.damage is not None:
            log.warning("shard %s: %s", path, report.damage)
        if report.wrong_md5:
            taken = "are taken all the same (--md5-warn)" if plan.job.md5_warn else "fail"
            log.warning("shard %s has the MD5 sum %s, not the published one: its photos %s", path, report.md5, taken)


def _warn_of_no_match(before: float, now: float, result: PiecesResult, plan: Plan, counters: Counters) -> None:
    """Warn once where no photo of the manifest was found: it seems that shards name their photos otherwise.

    Parameters
    ----------
    before, now : float
        Shares of the bytes of all shards that had been read before this result, and have been with it.
    result : PiecesResult
        The result.
    plan : Plan
        The plan.
    counters : Counters
        Counts of the run, with this result.
    """
    wanted = plan.read.num_rows
    example = next((piece.report.example for piece in result.pieces if piece.report.example), None)
    # ALL_FAILED photos would have been there if they were spread evenly, which they need not be.
    if not before * wanted < ALL_FAILED <= now * wanted or example is None or counters.total.read:
        return
    with logging_redirect_tqdm([log]):
        log.warning(
            "the shards read so far hold no photo of the manifest. They hold %r, and the first photo is looked for "
            "by %r: check IMAGES, --manifest, --id-column, and --path-template or --path-column (without them a "
            "photo is told by its file's name without the extension)",
            example,
            plan.read["path"][0].as_py(),
        )


def write_partitions(executor: InProcess | Dispatch, remaining: Remaining, monitor: Monitor) -> None:
    """Write the ledger rows of each partition; parameters and errors as for `write_pieces`."""
    tasks, folder, counters = executor.tasks, remaining.folder, monitor.counters
    assert isinstance(tasks, PartitionTasks)
    merges = bool(remaining.failed and not remaining.again)
    vector_parts = folder.vectors.names() if merges else []
    if tasks.given is not None:
        tasks.given.read(counters.progress)
    with monitor.results(executor, tasks.photos, " photos") as (results, bar):
        for result in results:
            assert isinstance(result, PartitionResult)
            rows = with_paths(path_rule(tasks.job), tasks.rows[result.index])
            results_table, tally = from_ipc(result.rows), result.tally
            ledger = as_ledger(rows, results_table)
            vectors = results_table["vector"] if "vector" in results_table.column_names else None
            if merges and result.index in remaining.failed:
                ledger, vectors, tally = _with_other_labels(result, ledger, vectors, remaining, vector_parts)
            folder.parts.write(result.index, ledger, tally, counters.unit, vectors)
            hashed_before = _hashed_before(rows) if result.index in (counters.pieced or ()) else Tally()
            counters.add(result, tally, hashed_before)
            bar.update(rows.num_rows)
            monitor.note(bar, give_up=not remaining.failed and remaining.plan.shards is None)


def _with_other_labels(
    result: PartitionResult,
    renewed: pa.Table,
    renewed_vectors: pa.ChunkedArray | None,
    remaining: Remaining,
    vector_parts: Collection[str],
) -> tuple[pa.Table, pa.ChunkedArray | None, Tally]:
    """Join labels that were ranked anew with the others of their partition, which stand in its part file.

    Returns
    -------
    pyarrow.Table, pyarrow.ChunkedArray or None, Tally
        Ledger rows, vectors and totals of the whole partition.
    """
    folder, name = remaining.folder, part_name(result.index)
    before, tally = folder.parts.read(name)
    is_other = pc.invert(pc.is_in(before["label"], value_set=pc.unique(renewed["label"])))
    others, vectors = before.filter(is_other), None
    if renewed_vectors is not None:
        vectors = folder.vectors.read(name, before.num_rows, vector_parts).filter(is_other.combine_chunks())
    always = np.isin(others["row"].to_numpy(), remaining.plan.always_kept_rows)
    others, quality, by_hash = reevaluate_ledger(others, vectors, always, remaining.plan.job.settings_without_model)
    ledger = pa.concat_tables([others, renewed])
    order = pc.sort_indices(ledger, [("label", "ascending"), ("id", "ascending")])
    if renewed_vectors is not None:
        renewed_vectors = pa.chunked_array([vectors, *renewed_vectors.chunks], pa.binary()).take(order)
    ledger = ledger.take(order)
    total = Tally(
        read=tally.read,
        failed=int(pc.sum(pc.equal(ledger["reason"], FAILED)).as_py()),
        reused=tally.reused,
        bytes_read=tally.bytes_read + result.tally.bytes_read,
        looked_up=tally.looked_up,
        quality=quality + result.tally.quality,
        by_hash=by_hash + result.tally.by_hash,
    )
    return ledger, renewed_vectors, total


def _hashed_before(rows: pa.Table) -> Tally:
    """Count the photos of a partition that pieces or shards have counted already."""
    is_known = pc.or_(pc.is_valid(rows["known_hash"]), pc.is_valid(rows["known_error"]))
    is_counted = pc.and_(is_known, pc.invert(rows["known_reused"]))
    if "shard" in rows.column_names:  # photos that no shard holds were not counted
        is_counted = pc.and_(is_counted, pc.is_valid(rows["shard"]))
    counted = rows.filter(is_counted)
    return Tally(
        read=counted.num_rows,
        failed=counted.num_rows - counted["known_error"].null_count,
        bytes_read=pc.sum(counted["known_bytes"]).as_py() or 0,
    )
