"""What a run would do, without doing it: counts, and a time estimated from a few photos."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from reducer.cluster import planned_threads
from reducer.clusterspec import ClusterSpec
from reducer.config import SAMPLE_PHOTOS, Job
from reducer.draw import TIME_SAMPLE, draw_order
from reducer.lists import read_avoided
from reducer.pipeline import look_at_all
from reducer.plan import make_plan
from reducer.reuse import Reuse, beside
from reducer.schemas import KEPT_SMALL_LABEL
from reducer.store import RunFolder


@dataclass(frozen=True)
class Forecast:
    """What a run would do.

    Attributes
    ----------
    labels, photos : int
        In the manifest, or chosen of it.
    labels_to_rank, photos_to_read : int
        Those that are not kept whole, unread.
    photos_kept_unread : int
        Photos of the labels that are kept whole.
    bytes_to_read : int or None
        Of all photos to read; None where neither a listing nor the sample tells.
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
    RunFolder(job.output_place).check_free(overwrite=job.overwrite, break_lock=job.break_lock)
    plan = make_plan(job)
    read_avoided(job)  # what is wrong with it is found here too
    photos_known = 0
    if job.reuse is not None:
        photos_known = int(pc.sum(pc.is_valid(beside(plan.read, Reuse(job).known)["known_hash"])).as_py() or 0)
    threads = planned_threads(cluster or ClusterSpec())
    rows = plan.read.num_rows
    ids = plan.read["id"].to_pylist() if sample else []
    drawn = plan.read.take(pa.array(draw_order(TIME_SAMPLE, job.seed, "", ids)[:sample], pa.int64()))
    paths = drawn["path"].to_pylist()
    clock = time.perf_counter()
    looks = list(look_at_all(paths, job.photo_settings, job.source))
    seconds = time.perf_counter() - clock
    failures = [f"{path}: {look.error}" for path, look in zip(paths, looks, strict=True) if look.error]
    sizes = [look.bytes for look in looks if look.bytes is not None]

    size = plan.read["bytes"]
    known = size.null_count == 0
    if known:
        bytes_to_read: int | None = int(np.sum(size.to_numpy()))
    else:
        bytes_to_read = round(rows * sum(sizes) / len(sizes)) if sizes else None
    labels = plan.labels
    largest = int(np.argmax(labels.sizes))
    return Forecast(
        labels=len(labels.names),
        photos=plan.rows.num_rows,
        labels_to_rank=len(np.unique(plan.read_label)),
        photos_to_read=rows,
        photos_kept_unread=plan.rows["reason"].to_pylist().count(KEPT_SMALL_LABEL),
        bytes_to_read=bytes_to_read,
        bytes_estimated=not known,
        photos_known=photos_known,
        partitions=len(np.unique(plan.assigned(threads or 1))),
        largest_label=labels.names[largest],
        largest_label_photos=int(labels.sizes[largest]),
        threads=threads,
        sampled=len(looks),
        sample_failed=len(failures),
        sample_failure=failures[0] if failures else None,
        thread_seconds=rows * seconds / len(looks) if looks else None,
    )
