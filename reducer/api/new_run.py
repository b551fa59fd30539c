"""A new run, from its plan to its results."""

from __future__ import annotations

import logging
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.compute as pc

from reducer.api.result import Result
from reducer.config.cluster import ClusterSpec
from reducer.config.resolved import ResolvedJob
from reducer.errors import LostLockError, TooManyFailuresError
from reducer.run.counters import Counters
from reducer.run.execute import recording_stop
from reducer.run.folder import RunFolder
from reducer.run.prepare import Inputs, Prepared, read_inputs, start_workers
from reducer.run.presence import looks_elsewhere
from reducer.run.remaining import Remaining
from reducer.run.summary import check_storage_options
from reducer.storage.schemas import FAILED

if TYPE_CHECKING:
    from reducer.run.dask.connect import Client

log = logging.getLogger("reducer")


def begin(job: ResolvedJob, cluster: ClusterSpec, *, progress: bool) -> Result:
    """Begin a run and carry it out; parameters, results and errors as of `reducer.reduce_images`.

    Raises
    ------
    InputError
        Also if the run folder holds a run, unless ``job.overwrite``.
    """
    counters = Counters(job.hash_size**2, job.settings_without_model.unit, progress)
    folder = RunFolder(job.output_location)
    folder.check_free(overwrite=job.overwrite, break_lock=job.break_lock)
    with counters.timing("plan"):
        inputs = read_inputs(job)
    with ExitStack() as open_cluster:
        prepared = _prepare(inputs, folder, cluster, counters, open_cluster)
        _execute(prepared, job)
    return finish(folder, job, counters)


def _prepare(
    inputs: Inputs, folder: RunFolder, spec: ClusterSpec, counters: Counters, open_cluster: ExitStack
) -> Prepared:
    plan = inputs.plan
    needed = bool(plan.is_read.any()) or plan.shards is not None or looks_elsewhere(plan, spec)
    pool = start_workers(plan.job, spec, counters, open_cluster, needed=needed)
    remaining = Remaining(
        plan.numbered(pool.threads),
        folder,
        pool.threads,
        inputs.avoid,
        inputs.reuse,
        is_begun=False,
        vectors=inputs.vectors,
    )
    return Prepared.new(remaining, counters, pool, pool.workers.take(remaining.first()))


def _execute(prepared: Prepared, job: ResolvedJob) -> None:
    folder = prepared.folder
    folder.make()
    with folder.locked(break_lock=job.break_lock):
        folder.check_free(overwrite=job.overwrite, break_lock=True)  # another run may have come and gone meanwhile
        folder.start(prepared.summary)
        with recording_stop(folder, prepared.summary, prepared.counters):
            prepared.write_plan()
            left_out = prepared.execute()
        draw_report_of(folder, job, prepared.counters, prepared.pool.client, left_out)


def draw_report_of(
    folder: RunFolder, job: ResolvedJob, counters: Counters, client: Client | None = None, avoid: Collection[str] = ()
) -> None:
    """Draw the report of a run that is done, if the job asks for it; an error in it does not undo the run.

    Parameters
    ----------
    folder : RunFolder
        The run folder, locked by this process.
    job : ResolvedJob
        The job, with the storage options that open its photos.
    counters : Counters
        Tells whether to show a progress bar.
    client : distributed.Client, optional
        Client of the cluster on which photos are read; None for this process.
    avoid : collection of str
        Addresses of workers that read none.
    """
    if not job.report:
        return
    try:
        from reducer.outputs.report.page import draw_report  # which imports matplotlib

        check_storage_options(folder.summary(), job)
        draw_report(folder, job, client=client, avoid=avoid, progress=counters.progress)
    except LostLockError:
        raise
    except Exception as error:
        log.debug("the report", exc_info=True)
        log.warning("the report was not drawn: %s. To try again: reducer report %s", error, folder.path)


def finish(folder: RunFolder, job: ResolvedJob, counters: Counters) -> Result:
    """Return the results of a run that is done.

    Raises
    ------
    TooManyFailuresError
        If more than ``job.max_failures`` of the photos have failed.
    """
    total, summary = counters.total, folder.read_summary()
    failed, looked_for = summary["reasons"].get(FAILED, 0), summary.get("photos_looked_for", 0)
    # Photos that are kept without being read are tried too, and do not hide that those which are read fail.
    shares = [(total.failed, total.tried, "read")]
    if "shards" in summary and failed > total.failed:
        shares.append((failed, summary["photos"], "read"))
    elif looked_for:
        shares.append((failed, total.tried + looked_for, "read or looked for"))
    failed, tried, how = max(shares, key=lambda share: (share[0] / max(1, share[1]), share[0]))
    if failed > job.max_failures * tried:
        ledger = folder.parts.ledger(["path", "error", "reason"])
        first = ledger.filter(pc.equal(ledger["reason"], FAILED)).slice(0, 1).to_pylist()[0]
        hint = f". Perhaps {summary['path_hint']}" if summary.get("path_hint") else ""
        raise TooManyFailuresError(
            f"{failed} of {tried} photos {how} have failed, over --max-failures {job.max_failures:g}. "
            f"Everything is written to {job.output}; the column error of images/ says why. The first: "
            f"{first['path']}: {first['error']}{hint}"
        )
    return Result(job.output if job.output_location.remote else Path(job.output), summary, folder, job)
