"""What runs on a Dask worker: one partition, with a worker's own troubles (memory, deaths, signs of progress)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np

from reducer.config import PhotoSettings
from reducer.environment import environment
from reducer.isolation import (
    MEMORY_SHARE,
    CannotStart,
    look_alone,
    look_apart,
    may_be_innocent,
    memory_bound,
    memory_left,
)
from reducer.pipeline import Look, look_at_all, run_partition
from reducer.places import Source
from reducer.ranking import Hashes
from reducer.shipping import code_digest
from reducer.types import PartitionResult, Terms, Unfit, Work

if TYPE_CHECKING:
    from distributed import Scheduler, Worker


def work_off(work: Work, avoid: Hashes | None = None) -> PartitionResult | Unfit:
    """Run one partition on the Dask worker that this is called on.

    Photos are looked at in the worker's own process, under its memory limit. Where a worker has died with this very
    partition before, a process of their own looks at them (`reducer.isolation`): it may die, the worker does not.

    Parameters
    ----------
    work : Work
        The partition.
    avoid : ndarray of uint8, shape (m, hash bytes), optional
        As for `reducer.pipeline.run_partition`.

    Returns
    -------
    PartitionResult or Unfit
        The latter if this worker would give other results than the others, or cannot see the photos.
    """
    from distributed import get_worker

    worker = get_worker()
    beat = _Beat(worker, work)
    task = work.task
    unfit = _unfit(worker.address, work.terms, task.settings, task.source)
    if unfit is not None:
        return unfit
    limit = _memory_limit(worker)
    apart = work.apart or _deaths(worker) > 0

    def look(paths: Sequence[str], settings: PhotoSettings, source: Source) -> Iterator[Look]:
        patience = work.terms.patience
        if apart:
            left = memory_left(limit)
            for seen in look_apart(paths, settings, source, memory=left, patience=patience, beat=beat.alive):
                beat.alive()
                yield seen
            return
        # A worker that is a thread of the client must not limit the client.
        own_process = worker.thread_id == threading.main_thread().ident
        with memory_bound(int(MEMORY_SHARE * limit) if limit is not None and own_process else None):
            for path, seen in zip(paths, look_at_all(paths, settings, source), strict=True):
                beat.alive()
                # What failed while others took the memory is no fault of its own.
                if seen.error is not None and may_be_innocent(seen):
                    left = memory_left(limit)
                    yield look_alone(path, settings, source, memory=left, patience=patience, beat=beat.alive)
                else:
                    yield seen

    try:
        return run_partition(task, avoid, look)
    except CannotStart as error:
        return Unfit(worker.address, f"it cannot look at photos in a process of their own: {error}")


class _Beat:
    """Tells the client that a partition goes on, at most every so many seconds."""

    def __init__(self, worker: Worker, work: Work) -> None:
        self.worker, self.terms = worker, work.terms
        self.sign = {"index": work.task.index, "attempt": work.attempt, "worker": worker.address}
        self.last = float("-inf")
        self.alive()

    def alive(self) -> None:
        now = time.monotonic()
        if now - self.last >= self.terms.beat:
            self.last = now
            self.worker.log_event(topic(self.terms.run_token), self.sign)


def topic(run_token: str) -> str:
    """Under which name workers tell of their progress."""
    return f"reducer-{run_token}"


def _deaths(worker: Worker) -> int:
    """Workers that have died with this very task so far, as the scheduler counts them."""
    from distributed.protocol.pickle import dumps
    from distributed.utils import sync

    key = worker.get_current_task()
    ask: Callable[..., Any] = worker.scheduler.run_function
    answer = sync(worker.loop, ask, function=dumps(_suspicious), args=dumps((key,)), kwargs=dumps({}))
    return int(answer["result"]) if answer["status"] == "OK" else 0


def _suspicious(key: Any, dask_scheduler: Scheduler | None = None) -> int:
    assert dask_scheduler is not None
    task = dask_scheduler.tasks.get(key)
    return 0 if task is None else int(task.suspicious)


def _memory_limit(worker: Worker) -> int | None:
    """Bytes that a worker's process may take."""
    from distributed.system import MEMORY_LIMIT

    return int(worker.memory_manager.memory_limit or MEMORY_LIMIT) or None


_fitness: dict[str, Unfit | None] = {}


def _unfit(worker: str, terms: Terms, settings: PhotoSettings, source: Source) -> Unfit | None:
    """Why this worker process must not take part, or None; looked into once a run."""
    if terms.run_token in _fitness:
        return _fitness[terms.run_token]
    found = _look_into_fitness(worker, terms, settings, source)
    _fitness[terms.run_token] = found
    return found


def _look_into_fitness(worker: str, terms: Terms, settings: PhotoSettings, source: Source) -> Unfit | None:
    if code_digest() != terms.code:
        return Unfit(worker, "it has another version of reducer")
    own = environment(settings)
    if own.digest != terms.environment:
        return Unfit(worker, "it hashes differently from the first workers", own)
    failure = None if terms.seen is None else sees(terms.seen, settings, source)
    if failure is not None:
        return Unfit(worker, f"it cannot read {terms.seen} ({failure}), which others can")
    return None


def sees(path: str, settings: PhotoSettings, source: Source) -> str | None:
    """Why a photo cannot be read from this process, or None."""
    from reducer.hashing import PhotoError
    from reducer.sources import read_all

    with closing(read_all([path], source, max_pixels=settings.max_pixels)) as files:
        found = next(files)
    return str(found) if isinstance(found, PhotoError) else None


def as_partition(work: Work, avoid: Hashes | None) -> list[PartitionResult | Unfit]:
    """`work_off` as one partition of a Dask bag, which holds one element."""
    return [work_off(work, avoid)]


def unpacked(content: bytes, shape: tuple[int, ...]) -> Hashes:
    """Hashes as they were before they travelled."""
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)
