"""A run that was stopped, continued from what it has written."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from reducer.api.new_run import begin, draw_report_of, finish
from reducer.api.result import Result
from reducer.config.cluster import ClusterSpec
from reducer.config.resolved import ResolvedJob, resolve
from reducer.errors import InputError
from reducer.run.counters import Counters
from reducer.run.dask.connect import refuse_import_of_main
from reducer.run.execute import recording_stop
from reducer.run.fingerprint import Fingerprint, hashed_otherwise
from reducer.run.folder import REPORT, RunFolder
from reducer.run.folder.parts import UNREAD
from reducer.run.known import Reuse, without_outdated
from reducer.run.plan.listing import check_images
from reducer.run.plan.plan import Plan
from reducer.run.plan.shards import find_shards
from reducer.run.prepare import Prepared, check_vectors, plan_terms, start_workers
from reducer.run.presence import is_looked_for, looks_elsewhere
from reducer.run.remaining import Remaining
from reducer.run.summary import check_storage_options, cluster_figures, job_figures, job_of, plan_figures
from reducer.run.tasks.messages import PieceReport
from reducer.storage.codecs import Hashes
from reducer.storage.location import Location
from reducer.storage.schemas import PLAN_SCHEMA
from reducer.storage.tables import EXAMPLES

log = logging.getLogger("reducer")


def resume(
    run: Path | str,
    cluster: ClusterSpec | None = None,
    *,
    rank_all: bool = False,
    retry_failed: bool = False,
    break_lock: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    manifest_storage_options: Mapping[str, Any] | None = None,
    output_storage_options: Mapping[str, Any] | None = None,
    reader: str | None = None,
    read_ahead: int | None = None,
    check: bool | None = None,
    max_failures: float | None = None,
    report: bool | None = None,
    progress: bool = True,
) -> Result:
    """Continue a run from what it has written.

    Parameters
    ----------
    run : path
        The run folder, a local path or a URL; it holds the job and its plan.
    cluster, progress
        As for `reduce_images`; the cluster may be another one.
    rank_all, retry_failed : bool
        Also read and rank the labels that were kept whole; also read the photos again that have failed, and rank their
        labels anew.
    break_lock
        As for `Job`.
    reader, read_ahead, check, max_failures, report
        As for `Job`; None leaves the value that the run began with.
    storage_options, manifest_storage_options, output_storage_options
        As for `Job`: a run folder does not keep them.

    Returns
    -------
    Result
        The results, those of an undisturbed run; the run folder is complete.

    Raises
    ------
    InputError
        If it is no run folder, or what decides hashes and ranks has changed.
    TooManyFailuresError, ClusterError
        As for `reduce_images`.

    Examples
    --------
    >>> from reducer import resume
    >>> resume("run", rank_all=True)  # doctest: +SKIP
    """
    refuse_import_of_main()
    options: dict[str, Any] = {
        "storage_options": storage_options,
        "manifest_storage_options": manifest_storage_options,
        "output_storage_options": output_storage_options,
        "reader": reader,
        "read_ahead": read_ahead,
        "check": check,
        "max_failures": max_failures,
        "report": report,
    }
    changes = {name: value for name, value in options.items() if value is not None}
    changes |= {"output": str(run), "break_lock": break_lock}
    folder = RunFolder(Location(str(run), output_storage_options or {}))
    return resume_run(
        *(folder, cluster or ClusterSpec(), changes), rank_all=rank_all, retry_failed=retry_failed, progress=progress
    )


def resume_run(
    folder: RunFolder,
    cluster: ClusterSpec,
    changes: Mapping[str, Any],
    *,
    rank_all: bool = False,
    retry_failed: bool = False,
    progress: bool = True,
) -> Result:
    """Continue a run as `resume` does, with some fields of its job changed."""
    summary = folder.summary()
    if _is_planned(folder, summary):
        return _resume(folder, cluster, changes, rank_all, retry_failed, progress)
    # It was stopped before it had a plan, so before the first photo.
    job = job_of(summary, changes)
    job = replace(job, rank_all=job.rank_all or rank_all, overwrite=True)
    return begin(resolve(job), cluster, progress=progress)


def _resume(
    folder: RunFolder,
    spec: ClusterSpec,
    changes: Mapping[str, Any],
    rank_all: bool,
    retry_failed: bool,
    progress: bool,
) -> Result:
    with folder.locked(break_lock=changes.get("break_lock", False)), ExitStack() as open_cluster:
        stopped = _read(folder, changes, rank_all, retry_failed, progress)
        job, counters = stopped.plan.job, stopped.counters
        if stopped.is_done:
            if not folder.has(REPORT):  # it was stopped while the report was drawn
                draw_report_of(folder, job, counters)
        else:
            prepared = _prepare(stopped, spec, open_cluster)
            with recording_stop(folder, prepared.summary, counters):
                _reopen(prepared, is_replanned=stopped.grows or not stopped.plan.is_listed)
                left_out = prepared.execute()
            draw_report_of(folder, job, counters, prepared.pool.client, left_out)
    return finish(folder, job, counters)


@dataclass(frozen=True)
class _StoppedRun:
    """A run as its folder holds it, and what is left of it.

    Attributes
    ----------
    folder : RunFolder
        The run folder.
    summary : dict
        Content of ``summary.json``.
    plan : Plan
        The plan, with the shards that are to be read again as they are now.
    fingerprint : Fingerprint
        What decided the results when the run began.
    avoid : ndarray of uint8, shape (m, hash bytes), or None
        Hashes to avoid.
    counters : Counters
        Counts so far.
    grows : bool
        Whether labels that were kept whole are to be ranked.
    failed : tuple of int
        Partitions whose failed photos are to be read again, and those that another policy has decoded.
    again : frozenset of int
        Shards that are to be read again.
    needed : bool
        Whether anything is left to read or to rank.
    is_done : bool
        Whether nothing at all is left to do but for the report.
    """

    folder: RunFolder
    summary: dict[str, Any]
    plan: Plan
    fingerprint: Fingerprint
    avoid: Hashes | None
    counters: Counters
    grows: bool
    failed: tuple[int, ...]
    again: frozenset[int]
    needed: bool
    is_done: bool


def _read(
    folder: RunFolder, changes: Mapping[str, Any], rank_all: bool, retry_failed: bool, progress: bool
) -> _StoppedRun:
    """Read what a run folder holds, and compare it with the files that there are now.

    Raises
    ------
    InputError
        If what decides hashes and ranks has changed, or the run was begun anew meanwhile.
    """
    summary, saved, avoid = folder.summary(), folder.plan.read(), folder.plan.read_avoid()
    if saved is None or saved[1]["run"] != summary["run"]:
        run = changes["output"]
        raise InputError(f"the run in {run} was begun anew meanwhile: look with reducer status {run}")
    rows, terms = saved
    job = resolve(replace(job_of(summary, changes), rank_all=terms["rank_all"]))
    fingerprint = Fingerprint.from_dict(terms["fingerprint"])
    fingerprint.check_settings(job, avoid)
    counters = Counters(job.hash_size**2, job.settings_without_model.unit, progress)
    with counters.timing("plan"):
        plan = Plan(job, rows, terms["manifest"], folder.plan.read_shards(), terms["is_listed"])
        if rank_all and not plan.is_listed:  # nothing is known yet that could be read later
            plan = replace(plan, job=replace(job, rank_all=True))
        names, footers, reports = folder.parts.done(), folder.parts.footers(), folder.pieces.reports()
        counters.done = {index: footers[name][1] for index, name in names.items()}
        counters.hashed = {number: report.tally for number, report in reports.items()}
        counters.pieced = plan.pieced if plan.is_listed else None
        grows = rank_all and bool(plan.small.any())
        failed = tuple(index for index, tally in counters.done.items() if retry_failed and tally.failed)
        if fingerprint.is_outdated:
            outdated = (index for index, name in names.items() if _holds_outdated(folder.parts.read(name)[0]))
            failed = tuple(sorted({*failed, *outdated}))
        missing = set(pc.unique(rows["partition"].drop_null()).to_pylist()) - set(names)
    needed = bool(missing or grows or failed or not plan.is_listed)
    again: frozenset[int] = frozenset()
    is_whole = sum(count for count, _ in footers.values()) == plan.rows.num_rows
    if plan.shards is not None and (needed or retry_failed):
        check_storage_options(summary, job)
        plan, again = _compare_shards(plan, reports, retry=retry_failed, ranges=grows)
    needed = needed or bool(again)
    looks_again = (
        retry_failed
        and plan.shards is None
        and any(tally.failed for name, (_, tally) in footers.items() if name.startswith(UNREAD))
    )
    is_done = not needed and not looks_again and is_whole and summary["status"] == "done"
    return _StoppedRun(
        folder, summary, plan, fingerprint, avoid, counters, grows, failed, again, needed=needed, is_done=is_done
    )


def _prepare(stopped: _StoppedRun, spec: ClusterSpec, open_cluster: ExitStack) -> Prepared:
    """Read the other inputs, as far as they are needed, and start the workers."""
    plan, counters, summary = stopped.plan, stopped.counters, stopped.summary
    vectors = reuse = None
    if stopped.needed:
        check_storage_options(summary, plan.job)
        if plan.shards is None:
            check_images(plan.job)
    elif is_looked_for(plan).any():
        check_storage_options(summary, plan.job)
    plan = replace(plan, job=plan.job.with_model())
    if stopped.needed:
        reuse = None if plan.job.reuse is None else _reuse_again(plan.job)
        vectors = check_vectors(plan.job)
    pool = start_workers(plan.job, spec, counters, open_cluster, needed=stopped.needed or looks_elsewhere(plan, spec))
    if stopped.grows:
        plan = plan.with_all_ranked(pool.threads)
    counters.pieced = plan.pieced if plan.is_listed else None
    remaining = Remaining(
        *(plan, stopped.folder, pool.threads, stopped.avoid, reuse, stopped.failed, stopped.again),
        vectors=vectors,
        is_outdated=stopped.fingerprint.is_outdated,
    )
    executor = pool.workers.take(remaining.first())
    if stopped.needed:
        stopped.fingerprint.check_environment(plan.job, executor.environment)
    if reuse is not None:
        reuse.check_environment(executor.environment)
    summary |= {
        "status": "running",
        "job": job_figures(plan.job),
        "cluster": cluster_figures(spec),
        "resumed": summary["resumed"] + 1,
        **plan_figures(plan),
    }
    return Prepared(remaining, counters, pool, executor, summary, plan_terms(summary, plan, stopped.fingerprint))


def _reopen(prepared: Prepared, *, is_replanned: bool) -> None:
    """Take what a finished run has out of the folder; the summary tells first that the run is not finished."""
    folder, plan, again = prepared.folder, prepared.remaining.plan, prepared.remaining.again
    folder.write_summary(prepared.summary | prepared.counters.figures())
    if again and plan.shards is not None:
        folder.plan.write_shards(plan.shards)
        # All labels are ranked anew. Before a shard is read, so that this is not forgotten if this run is killed.
        folder.parts.remove()
        prepared.counters.done = {}
    if is_replanned:
        folder.plan.write(plan.rows, prepared.terms)
    if prepared.remaining.is_outdated:
        for number in folder.pieces.done():
            rows, report = folder.pieces.read(number)
            if _holds_outdated(rows):
                folder.pieces.write(number, without_outdated(rows), report)
    folder.remove_leftovers()
    folder.parts.remove_unread()
    folder.lists.remove_report()


def _holds_outdated(rows: pa.Table) -> bool:
    """Tell whether rows of an earlier decode policy hold any hash that may be another one now."""
    return bool(pc.any(hashed_otherwise(rows)).as_py())


def _compare_shards(
    plan: Plan, reports: Mapping[int, PieceReport], *, retry: bool, ranges: bool
) -> tuple[Plan, frozenset[int]]:
    """Compare the shards of a plan with those that are there now.

    Parameters
    ----------
    plan : Plan
        The plan.
    reports : dict of int to PieceReport
        Reports on the shards that have been read.
    retry : bool
        Whether shards that were damaged, or have changed since, are to be read again.
    ranges : bool
        Whether single photos are to be read from shards that have been read.

    Returns
    -------
    Plan
        The plan, with the shards that are to be read again as they are now; without photos where the shards tell them.
    frozenset of int
        Numbers of the shards that are to be read again.

    Raises
    ------
    InputError
        If shards that are to be read for the first time, or ranges of them, are gone or have changed.
    """
    job, before = plan.job, plan.shards or ()
    now = {shard.path: shard for shard in find_shards(job) or ()}
    same = {shard.number for shard in before if replace(now.get(shard.path, shard), number=shard.number) == shard}
    there = {shard.number for shard in before if shard.path in now}
    again = frozenset(
        number for number, report in reports.items() if retry and (report.damage or number in there - same)
    )
    wanted = {shard.number for shard in before if ranges or shard.number not in reports}
    changed = [shard.path for shard in before if shard.number in wanted - (same & there) - again]
    if changed:
        advice = "" if retry else f"; reducer resume {job.output} --retry-failed reads them anew"
        raise InputError(
            f"{len(changed)} of {len(before)} shards gone, or not what they were when the run in {job.output} began: "
            f"{', '.join(changed[:EXAMPLES])}. To begin again: reducer run with --overwrite{advice}"
        )
    shards = tuple(
        replace(now.get(shard.path, shard), number=shard.number) if shard.number in again else shard for shard in before
    )
    if again and not job.manifest:
        return Plan(job, PLAN_SCHEMA.empty_table(), {}, shards, is_listed=False), again
    return replace(plan, shards=shards), again


def _is_planned(folder: RunFolder, summary: dict[str, Any]) -> bool:
    """Tell whether a run folder holds the plan of the run that its summary is of.

    Raises
    ------
    InputError
        If there is no plan, though photos have been hashed.
    """
    terms = folder.plan.read_terms()
    if terms is not None and terms["run"] == summary["run"]:
        return True
    if summary["status"] == "done" or ("partitions" in summary and folder.parts.names()):
        raise InputError(
            f"the plan of the run in {folder.path} (plan.parquet) is gone: it cannot be resumed. Begin again: reducer "
            "run with --overwrite"
        )
    return False


def _reuse_again(job: ResolvedJob) -> Reuse | None:
    """Open the run whose hashes are reused; None with a warning where it is gone by now, so that photos are read."""
    try:
        return Reuse(job)
    except InputError as error:
        log.warning("%s; its hashes are not taken any more, the photos that are left are read", error)
        return None
