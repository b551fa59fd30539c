"""What a run would do, without doing it: counts, and a time estimated from a few photos."""

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
from reducer.run.known import Reuse, join_known, read_avoided
from reducer.run.plan.plan import Plan, make_plan
from reducer.run.prepare import check_vectors
from reducer.run.remaining import Remaining
from reducer.run.tasks.hash_stage import InProcessProcessor, run_shards
from reducer.run.tasks.tasks import ShardTasks
from reducer.storage.location import ByteRange
from reducer.storage.paths import with_paths

#: Files at the beginning of a shard that are looked at at most for a sample.
SAMPLE_MEMBERS = 5000


@dataclass(frozen=True)
class Forecast:
    """What a run would do.

    Attributes
    ----------
    labels, photos : int
        In the manifest, or chosen of it; 0 where only the shards can tell.
    shards : int
        Tar shards that hold them; 0 for single files.
    labels_to_rank, photos_to_read : int
        Those that are not kept whole, unread.
    photos_kept_unread : int
        Photos of the labels that are kept whole.
    bytes_to_read : int or None
        Of all photos to read, or all shards; None where neither a listing nor the sample tells.
    bytes_estimated : bool
        Whether that is an estimate from the sample.
    photos_known : int
        Those of the photos to read whose hashes ``reuse`` knows; they are not read if they are unchanged.
    partitions : int
    largest_label : str
    largest_label_photos : int
    threads : int or None
        Worker threads; None where only the running cluster can tell.
    sampled, sample_failed : int
        Photos of the sample, and those of them that failed.
    sample_failure : str or None
        The first of the failures.
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
        What would be done.
    cluster : ClusterSpec, optional
        Where; no cluster is started or asked.
    sample : int
        Photos to read for the time estimate, drawn at random; 0 reads none.

    Raises
    ------
    InputError
        As for `reducer.reduce_images`.
    """
    RunFolder(job.output_location).check_free(overwrite=job.overwrite, break_lock=job.break_lock)
    job = resolve(job).with_model()
    check_vectors(job)
    if not job.hashes_photos:
        sample = 0
    plan = make_plan(job)
    read_avoided(job)  # what is wrong with it is found here too
    threads = planned_threads(cluster or ClusterSpec())
    reuse = None if job.reuse is None else Reuse(job)
    if plan.shards is not None:
        return _of_shards(plan, reuse, threads, sample)
    photos_known = 0
    if reuse is not None:
        photos_known = int(pc.sum(pc.is_valid(join_known(plan.read, reuse.known, job)["known_hash"])).as_py() or 0)
    rows = plan.read.num_rows
    ids = plan.read["id"].to_pylist() if sample else []
    drawn = plan.read.take(pa.array(draw_order(TIME_SAMPLE, job.seed, "", ids)[:sample], pa.int64()))
    paths = with_paths(path_rule(job), drawn)["path"].to_pylist()
    clock = time.perf_counter()
    looks = list(embedded(process_photos(paths, job.photo_settings, job.source), job.photo_settings))
    seconds = time.perf_counter() - clock
    failures = [f"{path}: {look.error}" for path, look in zip(paths, looks, strict=True) if look.error]
    sizes = [look.bytes for look in looks if look.bytes is not None]

    size = plan.read["bytes"]
    known = size.null_count == 0 and job.hashes_photos
    if known:
        bytes_to_read: int | None = int(np.sum(size.to_numpy()))
    else:
        bytes_to_read = round(rows * sum(sizes) / len(sizes)) if sizes else None
    return _forecast(
        plan,
        threads,
        bytes_to_read=bytes_to_read,
        bytes_estimated=not known,
        photos_known=photos_known,
        sampled=len(looks),
        sample_failed=len(failures),
        sample_failure=failures[0] if failures else None,
        thread_seconds=rows * seconds / len(looks) if looks else None,
    )


def _forecast(plan: Plan, threads: int | None, **others: Any) -> Forecast:
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
    """Looks at the first photos that are wanted."""

    def __init__(self, photos: int) -> None:
        self.photos, self.members = photos, 0
        self.refs: list[ByteRange] = []
        self.looks: list[PhotoResult] = []

    def at_content(self, ref: ByteRange, content: Callable[[], bytes], settings: PhotoSettings) -> PhotoResult | None:
        look = super().at_content(ref, content, settings)
        self.refs.append(ref)
        self.looks.append(look or PhotoResult())
        return look

    def alive(self) -> None:
        self.members += 1
        if len(self.looks) >= self.photos or self.members > SAMPLE_MEMBERS:
            raise _Enough


def _of_shards(plan: Plan, reuse: Reuse | None, threads: int | None, sample: int) -> Forecast:
    """A forecast from the beginning of the first shard that has to be read."""
    todo = Remaining(plan, RunFolder(plan.job.output_location), threads or 1, reuse=reuse, is_begun=False)
    errand = todo.pieces()
    known = [rows["hash"] for rows, _ in todo.reused.values()]
    size = errand.bytes if isinstance(errand, ShardTasks) else 0
    sampler = _Sampler(sample)
    seconds = None
    if isinstance(errand, ShardTasks) and sample:
        task = errand.task(errand.numbers[0])
        clock = time.perf_counter()
        with suppress(_Enough):
            run_shards(replace(task, shards=task.shards[:1]), errand.wanted, sampler)
        took = time.perf_counter() - clock
        if sampler.refs:
            seconds = took * size / (sampler.refs[-1].offset + sampler.refs[-1].bytes)
    failures = [
        f"{ref}: {look.error}" for ref, look in zip(sampler.refs, sampler.looks, strict=True) if look.error is not None
    ]
    return _forecast(
        plan,
        threads,
        bytes_to_read=size,
        bytes_estimated=False,
        photos_known=sum(len(column) - column.null_count for column in known),
        sampled=len(sampler.looks),
        sample_failed=len(failures),
        sample_failure=failures[0] if failures else None,
        thread_seconds=seconds,
    )
