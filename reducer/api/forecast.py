"""A dry run: counts of the work that a run would do, and a time estimated from a few photos."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from reducer.config.cluster import ClusterSpec
from reducer.config.job import Job, path_rule
from reducer.config.resolved import resolve
from reducer.config.settings import SAMPLE_PHOTOS, PhotoSettings
from reducer.draw import TIME_SAMPLE, draw_order
from reducer.photos.process import PhotoResult, embedded, process_photos
from reducer.run.dask.connect import planned_threads
from reducer.run.folder import RunFolder
from reducer.run.known import Reuse, join_known
from reducer.run.plan.plan import Plan
from reducer.run.prepare import read_inputs
from reducer.run.remaining import Remaining
from reducer.run.tasks.hash_stage import InProcessProcessor, run_shards
from reducer.run.tasks.tasks import ShardTasks
from reducer.storage.location import ByteRange
from reducer.storage.paths import with_paths

#: Files at the beginning of a shard that are read at most for a sample.
SAMPLE_MEMBERS = 5000


@dataclass(frozen=True)
class Forecast:
    """The work that a run would do.

    Attributes
    ----------
    labels, photos : int
        Labels and photos of the manifest, or of the chosen labels; 0 where only the shards can tell.
    shards : int
        Tar shards that hold them; 0 for single files.
    labels_to_rank, photos_to_read : int
        Labels that are not kept whole, and photos of them that are read.
    photos_kept_unread : int
        Photos of the labels that are kept whole.
    bytes_to_read : int or None
        Size in bytes of all photos to read, or of all shards; None where neither a listing nor the sample tells.
    bytes_estimated : bool
        Whether that is an estimate from the sample.
    photos_known : int
        Photos to read whose hashes ``reuse`` holds; they are not read if they are unchanged.
    partitions : int
        Partitions of the photos to read.
    largest_label : str
        Name of the label of most photos.
    largest_label_photos : int
        Photos of that label.
    threads : int or None
        Worker threads; None where only the running cluster can tell.
    sampled, sample_failed : int
        Photos of the sample, and failed photos among them.
    sample_failure : str or None
        Path and error of the first failed photo of the sample.
    thread_seconds : float or None
        Estimated work of the whole run, in seconds of one worker thread; None without a sample.
    """

    labels: int
    photos: int
    shards: int
    labels_to_rank: int
    photos_to_read: int
    photos_kept_unread: int
    bytes_to_read: int | None
    bytes_estimated: bool
    photos_known: int
    partitions: int
    largest_label: str
    largest_label_photos: int
    threads: int | None
    sampled: int
    sample_failed: int
    sample_failure: str | None
    thread_seconds: float | None


def forecast(job: Job, cluster: ClusterSpec | None = None, *, sample: int = SAMPLE_PHOTOS) -> Forecast:
    """Plan a run and measure a few of its photos.

    Parameters
    ----------
    job : Job
        The job that would be done.
    cluster : ClusterSpec, optional
        The place where it would be done; no cluster is started or asked.
    sample : int
        Photos to read for the time estimate, drawn at random; 0 reads none.

    Raises
    ------
    InputError
        As for `reducer.reduce_images`.
    """
    RunFolder(job.output_location).check_free(overwrite=job.overwrite, break_lock=job.break_lock)
    inputs = read_inputs(resolve(job))
    threads = planned_threads(cluster or ClusterSpec())
    if not job.hashes_photos:
        sample = 0
    if inputs.plan.shards is not None:
        return _of_shards(inputs.plan, inputs.reuse, threads, sample)
    return _of_files(inputs.plan, inputs.reuse, threads, sample)


def _of_files(plan: Plan, reuse: Reuse | None, threads: int | None, sample: int) -> Forecast:
    """Forecast a run over single files, from a few of them drawn at random."""
    job, rows = plan.job, plan.read.num_rows
    photos_known = 0
    if reuse is not None:
        photos_known = int(pc.sum(pc.is_valid(join_known(plan.read, reuse.known, job)["known_hash"])).as_py() or 0)
    ids = plan.read["id"].to_pylist() if sample else []
    drawn = plan.read.take(pa.array(draw_order(TIME_SAMPLE, job.seed, "", ids)[:sample], pa.int64()))
    paths = with_paths(path_rule(job), drawn)["path"].to_pylist()
    clock = time.perf_counter()
    results = list(embedded(process_photos(paths, job.photo_settings, job.source), job.photo_settings))
    seconds = time.perf_counter() - clock
    failures = [f"{path}: {result.error}" for path, result in zip(paths, results, strict=True) if result.error]
    sizes = [result.bytes for result in results if result.bytes is not None]

    size = plan.read["bytes"]
    is_known = size.null_count == 0 and job.hashes_photos
    if is_known:
        bytes_to_read: int | None = int(np.sum(size.to_numpy()))
    else:
        bytes_to_read = round(rows * sum(sizes) / len(sizes)) if sizes else None
    return _forecast(
        plan,
        threads,
        bytes_to_read=bytes_to_read,
        bytes_estimated=not is_known,
        photos_known=photos_known,
        sampled=len(results),
        sample_failed=len(failures),
        sample_failure=failures[0] if failures else None,
        thread_seconds=rows * seconds / len(results) if results else None,
    )


def _forecast(plan: Plan, threads: int | None, **others: Any) -> Forecast:
    """Return a forecast with the figures that a plan tells, and others."""
    labels = plan.labels
    largest = int(np.argmax(labels.sizes)) if len(labels.sizes) else None
    return Forecast(
        labels=len(labels.sizes),
        photos=plan.rows.num_rows,
        shards=len(plan.shards or ()),
        labels_to_rank=len(np.unique(plan.read_label)),
        photos_to_read=plan.read.num_rows,
        photos_kept_unread=int(plan.small.sum()),
        partitions=len(np.unique(plan.assigned(threads or 1))),
        largest_label="" if largest is None else labels.names[largest],
        largest_label_photos=0 if largest is None else int(labels.sizes[largest]),
        threads=threads,
        **others,
    )


class _Enough(Exception):
    """The sample is taken."""


class _Sampler(InProcessProcessor):
    """Processes the first wanted photos of a shard.

    Parameters
    ----------
    photos : int
        Photos after which it stops.
    """

    def __init__(self, photos: int) -> None:
        self.photos, self.members = photos, 0
        self.refs: list[ByteRange] = []
        self.results: list[PhotoResult] = []

    def at_content(self, ref: ByteRange, content: Callable[[], bytes], settings: PhotoSettings) -> PhotoResult | None:
        result = super().at_content(ref, content, settings)
        self.refs.append(ref)
        self.results.append(result or PhotoResult())
        return result

    def alive(self) -> None:
        self.members += 1
        if len(self.results) >= self.photos or self.members > SAMPLE_MEMBERS:
            raise _Enough


def _of_shards(plan: Plan, reuse: Reuse | None, threads: int | None, sample: int) -> Forecast:
    """Forecast a run over shards, from the beginning of the first shard that has to be read."""
    remaining = Remaining(plan, RunFolder(plan.job.output_location), threads or 1, reuse=reuse, is_begun=False)
    tasks = remaining.pieces()
    known = [rows["hash"] for rows, _ in remaining.reused.values()]
    size = tasks.bytes if isinstance(tasks, ShardTasks) else 0
    sampler = _Sampler(sample)
    seconds = None
    if isinstance(tasks, ShardTasks) and sample:
        task = tasks.task(tasks.numbers[0])
        clock = time.perf_counter()
        with suppress(_Enough):
            run_shards(replace(task, shards=task.shards[:1]), tasks.wanted, sampler)
        elapsed = time.perf_counter() - clock
        if sampler.refs:
            seconds = elapsed * size / (sampler.refs[-1].offset + sampler.refs[-1].bytes)
    failures = [
        f"{ref}: {result.error}"
        for ref, result in zip(sampler.refs, sampler.results, strict=True)
        if result.error is not None
    ]
    return _forecast(
        plan,
        threads,
        bytes_to_read=size,
        bytes_estimated=False,
        photos_known=sum(len(column) - column.null_count for column in known),
        sampled=len(sampler.results),
        sample_failed=len(failures),
        sample_failure=failures[0] if failures else None,
        thread_seconds=seconds,
    )
