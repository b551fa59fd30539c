"""A run from its plan to its results: begun, or gone on with from what it has written."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc

from reducer.api.result import Result
from reducer.config.cluster import ClusterSpec
from reducer.config.job import Job
from reducer.config.resolved import ResolvedJob, resolve
from reducer.errors import InputError, LostLockError, TooManyFailuresError
from reducer.run.counters import Counters
from reducer.run.dask.connect import refuse_import_of_main
from reducer.run.dask.workers import Workers
from reducer.run.execute import Run, recording_stop
from reducer.run.fingerprint import Fingerprint
from reducer.run.folder import REPORT, RunFolder
from reducer.run.known import Reuse, read_avoided
from reducer.run.plan.listing import check_images
from reducer.run.plan.plan import Plan, make_plan
from reducer.run.plan.shards import find_shards
from reducer.run.prepare import check_vectors, open_client, plan_terms, thread_count
from reducer.run.remaining import Remaining
from reducer.run.summary import check_storage_options, cluster_figures, job_figures, job_of, opening, plan_figures
from reducer.run.tasks.messages import PieceReport
from reducer.storage.location import Location
from reducer.storage.schemas import FAILED, PLAN_SCHEMA
from reducer.storage.tables import EXAMPLES

if TYPE_CHECKING:
    from reducer.run.dask.connect import Client

log = logging.getLogger("reducer")


def reduce_images(job: Job, cluster: ClusterSpec | None = None, *, progress: bool = True) -> Result:
    """Rank the photos of every label and keep the first K.

    Parameters
    ----------
    job : Job
        What to do.
    cluster : ClusterSpec, optional
        Where; default a LocalCluster with a worker for each CPU that this process may use.
    progress : bool
        Whether to show a progress bar.

    Returns
    -------
    Result
        The run folder ``job.output`` is complete.

    Raises
    ------
    InputError
        If anything is found wrong before the first photo is hashed.
    TooManyFailuresError
        If more than ``job.max_failures`` of the photos have failed (everything is written), or the first 200 have all
        failed (the run is given up).
    ClusterError
        If a partition cannot be finished. `resume` goes on.

    Examples
    --------
    >>> from reducer import Job, reduce_images
    >>> result = reduce_images(Job("photos/train", "run", manifest="photos/train.csv"))  # doctest: +SKIP
    >>> result.reduced  # doctest: +SKIP
    """
    refuse_import_of_main()
    spec = cluster or ClusterSpec()
    job = resolve(job)
    session = Counters(job.hash_size**2, job.settings_without_model.unit, progress)
    folder = RunFolder(job.output_location)
    folder.check_free(overwrite=job.overwrite, break_lock=job.break_lock)
    with session.timing("plan"):
        job = job.with_model()
        vectors = check_vectors(job)
        plan = make_plan(job)
        avoid = read_avoided(job)
        reuse = None if job.reuse is None else Reuse(job)
    with ExitStack() as open_cluster:
        needed = bool(plan.is_read.any()) or plan.shards is not None
        client = open_client(spec, session, open_cluster, job if needed else None)
        threads = thread_count(client, spec)
        plan = plan.numbered(threads)
        todo = Remaining(plan, folder, threads, avoid, reuse, is_begun=False, vectors=vectors)
        workers = Workers(client, spec)
        work = workers.take(todo.first())
        if reuse is not None:
            reuse.check_environment(work.environment)
        fingerprint = Fingerprint.of(job, avoid, work.environment)
        summary = opening(plan, spec, fingerprint, session.started)
        terms = plan_terms(summary, plan, fingerprint)
        folder.make()
        with folder.locked(break_lock=job.break_lock):
            folder.check_free(overwrite=job.overwrite, break_lock=True)  # another run may have come and gone meanwhile
            folder.start(summary)
            with recording_stop(folder, summary, session):
                if plan.shards is not None:
                    folder.plan.write_shards(plan.shards)
                folder.plan.write(plan.rows, terms, avoid)
                run = Run(replace(todo, is_begun=True), session, summary, workers, terms)
                left_out = run.execute(work, open_cluster)
            _draw_report(folder, job, session, client, left_out)
    return _result(folder, job, session)


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
    max_failures: float | None = None,
    report: bool | None = None,
    progress: bool = True,
) -> Result:
    """Go on with a run from what it has written.

    Parameters
    ----------
    run : path
        The run folder, a local path or a URL. What the job is, and its plan, stand there.
    cluster, progress
        As for `reduce_images`; the cluster may be another one.
    rank_all : bool
        Also read and rank the labels that were kept whole.
    retry_failed : bool
        Also read the photos that have failed again, and rank their labels anew.
    break_lock
        As for `Job`.
    reader, read_ahead, max_failures, report
        As for `Job`; None leaves what the run began with.
    storage_options, manifest_storage_options, output_storage_options
        As for `Job`: a run folder does not keep them.

    Returns
    -------
    Result
        The run folder is complete, and what an undisturbed run would have made.

    Raises
    ------
    InputError
        If it is no run folder, or what decides hashes and ranks is not what it was.
    TooManyFailuresError, ClusterError
        As for `reduce_images`.

    Examples
    --------
    >>> from reducer import resume
    >>> resume("run", rank_all=True)  # doctest: +SKIP
    """
    refuse_import_of_main()
    spec = cluster or ClusterSpec()
    folder = RunFolder(Location(str(run), output_storage_options or {}))
    changes: dict[str, Any] = {
        "output": str(run),
        "break_lock": break_lock,
        "storage_options": storage_options or {},
        "manifest_storage_options": manifest_storage_options or {},
        "output_storage_options": output_storage_options or {},
    }
    asked = {"reader": reader, "read_ahead": read_ahead, "max_failures": max_failures, "report": report}
    changes |= {name: value for name, value in asked.items() if value is not None}
    summary = folder.summary()
    if not _is_planned(folder, summary):
        # It was stopped before it had a plan, so before the first photo.
        job = job_of(summary, changes)
        job = replace(job, rank_all=job.rank_all or rank_all, overwrite=True)
        return reduce_images(job, cluster, progress=progress)
    with folder.locked(break_lock=break_lock), ExitStack() as open_cluster:
        summary = folder.summary()
        saved = folder.plan.read()
        if saved is None or saved[1]["run"] != summary["run"]:
            raise InputError(f"the run in {run} was begun anew meanwhile: look with reducer status {run}")
        rows, terms = saved
        avoid = folder.plan.read_avoid()
        job = resolve(replace(job_of(summary, changes), rank_all=terms["rank_all"]))
        fingerprint = Fingerprint.from_dict(terms["fingerprint"])
        fingerprint.check_settings(job, avoid)
        session = Counters(job.hash_size**2, job.settings_without_model.unit, progress)
        with session.timing("plan"):
            plan = Plan(job, rows, terms["manifest"], folder.plan.read_shards(), terms["is_listed"])
            if rank_all and not plan.is_listed:  # nothing is known yet that could be read later
                job = replace(job, rank_all=True)
                plan = replace(plan, job=job)
            names, footers, reports = folder.parts.done(), folder.parts.footers(), folder.pieces.reports()
            session.done = {index: footers[name][1] for index, name in names.items()}
            session.hashed = {number: report.tally for number, report in reports.items()}
            session.pieced = plan.pieced if plan.is_listed else None
            grows = rank_all and plan.small.any()
            failed = tuple(index for index, tally in session.done.items() if retry_failed and tally.failed)
            reuse = None
            missing = set(pc.unique(rows["partition"].drop_null()).to_pylist()) - set(names)
        needed = bool(missing or grows or failed or not plan.is_listed)
        whole = sum(count for count, _ in footers.values()) == plan.rows.num_rows
        again: frozenset[int] = frozenset()
        if plan.shards is not None and (needed or retry_failed):
            check_storage_options(summary, job)
            plan, again = _look_at_shards(plan, reports, retry=retry_failed, ranges=bool(grows))
            needed = needed or bool(again)
        if not needed and whole and summary["status"] == "done":
            if not folder.has(REPORT):  # it was stopped while that was drawn
                _draw_report(folder, job, session)
            return _result(folder, job, session)
        if needed:
            check_storage_options(summary, job)
            if plan.shards is None:
                check_images(job)
            job = job.with_model()
            plan = replace(plan, job=job)
            reuse = None if job.reuse is None else _reuse_again(job)
        vectors = check_vectors(job) if needed else None
        client = open_client(spec, session, open_cluster, job if needed else None)
        threads = thread_count(client, spec)
        if grows:
            plan = plan.with_all_ranked(threads)
            job = plan.job
        session.pieced = plan.pieced if plan.is_listed else None
        todo = Remaining(plan, folder, threads, avoid, reuse, failed, again, vectors=vectors)
        workers = Workers(client, spec)
        work = workers.take(todo.first())
        if needed:
            fingerprint.check_environment(job, work.environment)
        if reuse is not None:
            reuse.check_environment(work.environment)
        summary |= {
            "status": "running",
            "job": job_figures(job),
            "cluster": cluster_figures(spec),
            "resumed": summary["resumed"] + 1,
            **plan_figures(plan),
        }
        terms = plan_terms(summary, plan, fingerprint)
        with recording_stop(folder, summary, session):
            # Before anything that a finished run has is taken out or put in.
            folder.write_summary(summary | session.figures())
            if again and plan.shards is not None:
                folder.plan.write_shards(plan.shards)
                # All labels are ranked anew. Before a shard is read, lest that is forgotten if this run is killed.
                folder.parts.remove()
                session.done = {}
            if grows or not plan.is_listed:
                folder.plan.write(plan.rows, terms)
            folder.remove_leftovers()
            folder.parts.remove_unread()
            folder.lists.remove_report()
            left_out = Run(todo, session, summary, workers, terms).execute(work, open_cluster)
        _draw_report(folder, job, session, client, left_out)
    return _result(folder, job, session)


def _look_at_shards(
    plan: Plan, reports: Mapping[int, PieceReport], *, retry: bool, ranges: bool
) -> tuple[Plan, frozenset[int]]:
    """Compare the shards of a plan with those that are there now.

    Parameters
    ----------
    plan : Plan
        The plan.
    reports : dict of int to PieceReport
        Of the shards that have been read.
    retry : bool
        Whether those that were damaged, or have changed since, are to be read again.
    ranges : bool
        Whether single photos are to be read from those that have been read.

    Returns
    -------
    Plan
        With the shards that are to be read again as they are now; without photos where these shards tell them.
    frozenset of int
        Which they are.

    Raises
    ------
    InputError
        If shards are gone or not what they were that are to be read for the first time, or ranges of them.
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
    """Whether the plan in a run folder is that of the run which the summary tells of.

    Raises
    ------
    InputError
        If there is none, though photos have been hashed.
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
    """The run whose hashes are taken may be gone by now: then photos are read."""
    try:
        return Reuse(job)
    except InputError as error:
        log.warning("%s; its hashes are not taken any more, the photos that are left are read", error)
        return None


def _draw_report(
    folder: RunFolder, job: ResolvedJob, session: Counters, client: Client | None = None, left_out: Collection[str] = ()
) -> None:
    """The run is done: whatever goes wrong with its report does not undo it."""
    if not job.report:
        return
    try:
        from reducer.outputs.report.page import draw_report  # which imports matplotlib

        check_storage_options(folder.summary(), job)
        draw_report(folder, job, client=client, avoid=left_out, progress=session.progress)
    except LostLockError:
        raise
    except Exception as error:
        log.debug("the report", exc_info=True)
        log.warning("the report was not drawn: %s. To try again: reducer report %s", error, folder.path)


def _result(folder: RunFolder, job: ResolvedJob, session: Counters) -> Result:
    total, summary = session.total, folder.read_summary()
    failed = summary["reasons"].get(FAILED, 0)
    tried = total.tried
    if "shards" in summary and failed > total.failed:  # photos of labels that are kept whole were looked for too
        failed, tried = max(
            ((failed, summary["photos"]), (total.failed, tried)), key=lambda pair: pair[0] / max(1, pair[1])
        )
    if failed > job.max_failures * tried:
        ledger = folder.parts.ledger(["path", "error", "reason"])
        first = ledger.filter(pc.equal(ledger["reason"], FAILED)).slice(0, 1).to_pylist()[0]
        raise TooManyFailuresError(
            f"{failed} of {tried} photos read have failed, over --max-failures {job.max_failures:g}. "
            f"Everything is written to {job.output}; the column error of images/ says why. The first: "
            f"{first['path']}: {first['error']}"
        )
    return Result(job.output if job.output_location.remote else Path(job.output), summary, folder, job)
