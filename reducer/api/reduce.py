"""`reduce_images`: a new run, or the run that RUN holds already when the same is asked for again."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from reducer.api.new_run import begin
from reducer.api.result import Result
from reducer.api.resume import resume_run
from reducer.config.checks import flag
from reducer.config.cluster import ClusterSpec
from reducer.config.job import Job
from reducer.config.resolved import ResolvedJob, resolve
from reducer.config.settings import STORAGE_OPTIONS
from reducer.errors import InputError
from reducer.run.dask.connect import refuse_import_of_main
from reducer.run.fingerprint import avoid_digest, settings_of
from reducer.run.folder import RunFolder
from reducer.run.known import read_avoided
from reducer.run.plan.plan import Plan, make_plan
from reducer.storage.schemas import FAILED

log = logging.getLogger("reducer")

#: Settings by which `reducer cut` chooses anew from the ranks of a run.
CUT_SETTINGS = ("keep", "min_distance", "total", "max_bytes", "min_per_label")
#: Settings that decide neither hash nor rank, but which files a run writes.
FILE_SETTINGS = ("format", "extra_columns", "cross_label")
#: Fields of a job that may differ when it goes on, and hold from then on.
CHANGEABLE = ("reader", "read_ahead", "check", "max_failures", "report", "break_lock")


def reduce_images(job: Job, cluster: ClusterSpec | None = None, *, progress: bool = True) -> Result:
    """Rank the photos of every label and keep the first K.

    Where ``job.output`` holds this very run already, unfinished, it goes on, as `resume` does; finished, its results
    are returned. An unfinished run that has hashed nothing yet, and one of which all photos have failed, is replaced.

    Parameters
    ----------
    job : Job
        What to do.
    cluster : ClusterSpec, optional
        Where to do it; default a LocalCluster with one worker per CPU that this process may use.
    progress : bool
        Whether to show a progress bar.

    Returns
    -------
    Result
        The results; the run folder ``job.output`` is complete.

    Raises
    ------
    InputError
        If anything is found wrong before the first photo is hashed, or ``job.output`` holds another run.
    TooManyFailuresError
        If more than ``job.max_failures`` of the photos have failed (everything is written), or the first 200 have all
        failed (the run is given up).
    ClusterError
        If a partition cannot be finished. `resume` continues the run.

    Examples
    --------
    >>> from reducer import Job, reduce_images
    >>> result = reduce_images(Job("photos/train", "run", manifest="photos/train.csv"))  # doctest: +SKIP
    >>> result.reduced  # doctest: +SKIP
    """
    refuse_import_of_main()
    resolved, spec = resolve(job), cluster or ClusterSpec()
    folder = RunFolder(resolved.output_location)
    if not job.overwrite:
        folder.check_free(overwrite=True, break_lock=job.break_lock)
        if folder.is_run():
            summary = folder.summary()
            if _is_worth_keeping(folder, summary):
                return _go_on(resolved, folder, summary, spec, progress)
            resolved = replace(resolved, overwrite=True)
    return begin(resolved, spec, progress=progress)


def _is_worth_keeping(folder: RunFolder, summary: Mapping[str, Any]) -> bool:
    """Tell whether a run has hashed, ranked or kept any photo."""
    if summary["status"] == "done" and summary["reasons"].keys() - {FAILED}:
        return True
    tallies = [tally for _, tally in folder.parts.footers().values()]
    tallies += [report.tally for report in folder.pieces.reports().values()]
    return any(tally.tried > tally.failed for tally in tallies)


def _go_on(
    job: ResolvedJob,
    folder: RunFolder,
    summary: Mapping[str, Any],
    spec: ClusterSpec,
    progress: bool,
) -> Result:
    """Go on with a run, or return its results, where the job is the one that it was begun with.

    Raises
    ------
    InputError
        If the job is another one, or its photos are others by now.
    """
    changes = {name: getattr(job, name) for name in (*CHANGEABLE, *STORAGE_OPTIONS, "output")}
    saved = folder.plan.read()
    if saved is None:  # `resume` tells how that can be
        return resume_run(folder, spec, changes, progress=progress)
    rows, terms = saved
    _check_settings(job, summary, terms)
    before = Plan(job, rows, terms["manifest"], folder.plan.read_shards(), terms["is_listed"])
    _check_photos(job, before, make_plan(job))
    state = "finished: these are its results" if summary["status"] == "done" else "unfinished: it goes on"
    log.warning("%s holds this run already, %s (--overwrite begins anew)", job.output, state)
    return resume_run(folder, spec, changes, rank_all=job.rank_all, progress=progress)


class _Difference(NamedTuple):
    name: str
    before: object
    now: object

    def __str__(self) -> str:
        if self.name in ("vectors", "embed", "avoid") and None not in (self.before, self.now):  # digests
            return f"{flag(self.name)} has another content"
        return f"{'IMAGES' if self.name == 'images' else flag(self.name)} was {self.before} and is {self.now}"


def _check_settings(job: ResolvedJob, summary: Mapping[str, Any], terms: Mapping[str, Any]) -> None:
    """Refuse other settings than those of a run, but for defaults that have changed since: the run's own hold."""
    run = job.output
    before = terms["fingerprint"]["settings"] | {"avoid": terms["fingerprint"]["avoid"]}
    now = settings_of(job.with_model()) | {"avoid": avoid_digest(read_avoided(job))}
    for name in FILE_SETTINGS:
        before[name], now[name] = summary["job"].get(name, getattr(job, name)), getattr(job, name)
    differ = [
        _Difference(name, before.get(name), now.get(name))
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]
    own = [each for each in differ if each.name not in job.given and each.name not in summary.get("given", before)]
    if own:
        log.warning("%s keeps settings of its own, which are no defaults any more: %s", run, "; ".join(map(str, own)))
    others = [each for each in differ if each not in own]
    if not others:
        return
    if all(each.name in CUT_SETTINGS for each in others):
        rules = " ".join(f"{flag(name)} {value}" for name in CUT_SETTINGS if (value := getattr(job, name)) is not None)
        first = "" if summary["status"] == "done" else f"reducer resume {run}, then "
        raise InputError(
            f"--output {run} holds a run that differs in {', '.join(flag(each.name) for each in others)} alone, for "
            f"which no photo has to be read again: {first}reducer cut {run} {rules} --output FILE.csv. Or give another "
            "folder, or --overwrite to replace it"
        )
    raise InputError(
        f"--output {run} holds a run with other settings: {'; '.join(map(str, others))}. To go on with that one: "
        f"reducer resume {run}. For a new one give another folder, or --overwrite to replace it"
    )


def _check_photos(job: ResolvedJob, before: Plan, now: Plan) -> None:
    """Refuse photos or shards that are new, gone or changed since a run began."""
    counts = _shard_changes(before, now)
    if now.is_listed and before.is_listed:
        counts = [sum(pair) for pair in zip(counts, _row_changes(before.rows, now.rows), strict=True)]
    if any(counts):
        what = "photos" if now.shards is None else "photos or shards"
        changes = ", ".join(f"{count:,} {how}" for count, how in zip(counts, ("new", "gone", "changed"), strict=True))
        raise InputError(
            f"--output {job.output} holds a run of other {what}: {changes} since it began. Give another folder, with "
            f"--reuse {job.output}: then only those are read. To go on with that one: reducer resume {job.output}"
        )
    if now.is_listed and before.is_listed and not now.rows["always_keep"].equals(before.rows["always_keep"]):
        raise InputError(
            f"--output {job.output} holds a run with other photos in --always-keep: give another folder, with --reuse "
            f"{job.output}, or --overwrite to replace it"
        )


def _shard_changes(before: Plan, now: Plan) -> list[int]:
    """Count shards that are new, gone and changed."""
    states = [
        {shard.path: (shard.bytes, shard.mtime_ns, shard.etag) for shard in plan.shards or ()} for plan in (before, now)
    ]
    changed = sum(states[0][path] != states[1][path] for path in states[0].keys() & states[1])
    return [len(states[1].keys() - states[0]), len(states[0].keys() - states[1]), changed]


def _row_changes(before: pa.Table, now: pa.Table) -> list[int]:
    """Count photos that are new, gone and changed, by their ids and labels; changed are other paths or sizes."""
    names = ["id", "label", "path", "bytes"]
    if before.select(names).equals(now.select(names)):
        return [0, 0, 0]
    separator = pa.scalar("\0", pa.large_string())
    keys = [
        pc.binary_join_element_wise(*(rows[name].cast(pa.large_string()) for name in ("label", "id")), separator)
        for rows in (before, now)
    ]
    place = pc.index_in(keys[1], value_set=keys[0].combine_chunks())
    both, old = now.filter(pc.is_valid(place)), before.take(place.drop_null())
    is_same = pc.and_(
        pc.equal(pc.fill_null(both["path"], ""), pc.fill_null(old["path"], "")),
        pc.equal(pc.fill_null(both["bytes"], -1), pc.fill_null(old["bytes"], -1)),
    )
    return [place.null_count, before.num_rows - both.num_rows, both.num_rows - (pc.sum(is_same).as_py() or 0)]
