"""Run a task on a Dask worker, with a worker's own troubles: memory, deaths, signs of progress."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from reducer.config.settings import PhotoSettings, Source
from reducer.errors import InputError, StoreError
from reducer.photos.process import PhotoResult, ProcessPhotos, process_photos
from reducer.photos.sandbox import (
    MEMORY_SHARE,
    CannotStart,
    may_be_innocent,
    memory_bound,
    memory_left,
    process_in_sandbox,
    process_one_in_sandbox,
)
from reducer.run.dask.code import code_digest, minor_version
from reducer.run.dask.messages import RunContext, WorkerRejected, WorkItem
from reducer.run.tasks.environment import environment
from reducer.run.tasks.hash_stage import InProcessProcessor, run_piece, run_shards
from reducer.run.tasks.messages import PartitionResult, PiecesResult, ShardTask
from reducer.run.tasks.rank_stage import run_partition
from reducer.storage.location import ByteRange, PhotoRef

if TYPE_CHECKING:
    from distributed import Scheduler, Worker

#: Dask's topic of signs of progress. One for all runs: the scheduler keeps each topic for ever.
TOPIC = "reducer"

#: Reads and hashes photos on a worker, where nothing goes wrong. It is the seam for runs without photos: a Dask preload
#: may put here something that knows the hashes (`scripts/benchmarks/stored.py`); all else stays as it is.
process_here: ProcessPhotos = process_photos


def run_item(
    item: WorkItem, shared: NDArray[np.uint8] | None = None
) -> PartitionResult | PiecesResult | WorkerRejected:
    """Run one partition, one piece or a few shards on the Dask worker that this is called on.

    Photos are processed in the worker's own process, under its memory limit. Where a worker has died with this very
    item before, they are processed in a process of their own (`reducer.photos.sandbox`): it may die, the worker does
    not.

    Parameters
    ----------
    item : WorkItem
        The partition, the piece or the shards.
    shared : ndarray of uint8, optional
        What all items of a run need: for partitions the hashes to avoid, for shards the keys that are wanted.

    Returns
    -------
    PartitionResult, PiecesResult or WorkerRejected
        The last if this worker would give other results than the others, or cannot read the photos.
    """
    from distributed import get_worker

    worker = get_worker()
    heartbeat = _Heartbeat(worker, item)
    task = item.task
    rejection = _rejection(worker.address, item.context, task.settings, task.source)
    if rejection is not None:
        return rejection
    processor = _GuardedProcessor(worker, item, heartbeat)
    try:
        if isinstance(task, ShardTask):
            with memory_bound(None if processor.in_sandbox else processor.bound):  # once, and not for each photo
                return run_shards(task, None if shared is None else shared.view(np.uint64).reshape(-1), processor)
        if task.is_piece:
            return run_piece(task, processor)
        return run_partition(task, shared, processor.at_all, heartbeat.steadily())
    except CannotStart as error:
        return WorkerRejected(worker.address, f"it cannot look at photos in a process of their own: {error}")


class _GuardedProcessor:
    """Processes photos under a worker's memory limit; where a worker has died with them, in a process of their own."""

    def __init__(self, worker: Worker, item: WorkItem, heartbeat: _Heartbeat) -> None:
        self.worker = worker
        self.in_sandbox = item.in_sandbox or _deaths(worker) > 0
        self.patience, self.alive = item.context.patience, heartbeat.alive
        self.bound = memory_for_photos(worker)

    def at_all(self, refs: Sequence[PhotoRef], settings: PhotoSettings, source: Source) -> Iterator[PhotoResult]:
        """Process photos in turn, wherever they lie."""
        if self.in_sandbox:
            memory = memory_beside(self.worker)
            for result in process_in_sandbox(
                refs, settings, source, memory=memory, patience=self.patience, beat=self.alive
            ):
                self.alive()
                yield result
            return
        with memory_bound(self.bound):
            for ref, result in zip(refs, process_here(refs, settings, source), strict=True):
                self.alive()
                yield self._alone(ref, settings, source) if _may_be_innocent(result) else result

    def at_content(self, ref: ByteRange, content: Callable[[], bytes], settings: PhotoSettings) -> PhotoResult | None:
        """Process a photo whose bytes are at hand; None if `at_all` is to do it."""
        if self.in_sandbox:
            return None
        with memory_bound(self.bound):
            result = InProcessProcessor().at_content(ref, content, settings)
        return None if result is None or _may_be_innocent(result) else result

    def _alone(self, ref: PhotoRef, settings: PhotoSettings, source: Source) -> PhotoResult:
        memory = memory_beside(self.worker)
        return process_one_in_sandbox(ref, settings, source, memory=memory, patience=self.patience, beat=self.alive)


def _may_be_innocent(result: PhotoResult) -> bool:
    """Return whether a photo may have failed only because others took the memory."""
    return result.error is not None and may_be_innocent(result)


class _Heartbeat:
    """Signs to the client that an item goes on, at most one per `RunContext.beat` seconds."""

    def __init__(self, worker: Worker, item: WorkItem) -> None:
        self.worker, self.seconds = worker, item.context.beat
        self.sign = {
            "run": item.context.run_token,
            "index": item.task.index,
            "attempt": item.attempt,
            "worker": worker.address,
        }
        self.last = float("-inf")
        self.alive()

    @contextmanager
    def steadily(self) -> Iterator[None]:
        """Tell so meanwhile, whatever this thread does: nothing that it waits for can hang."""
        over = threading.Event()

        def tell() -> None:
            while not over.wait(self.seconds):
                self.alive()

        thread = threading.Thread(target=tell, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def alive(self) -> None:
        """Give a sign, unless one was given just now."""
        now = time.monotonic()
        if now - self.last >= self.seconds:
            self.last = now
            self.worker.log_event(TOPIC, self.sign)


def _deaths(worker: Worker) -> int:
    """Return how many workers have died with this very task so far, as the scheduler counts them."""
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
    """Return how many bytes a worker's process may take; None for no limit."""
    from distributed.system import MEMORY_LIMIT

    return int(worker.memory_manager.memory_limit or MEMORY_LIMIT) or None


def memory_for_photos(worker: Worker) -> int | None:
    """Return how many bytes a worker's process may take while photos are processed; None for no limit."""
    limit = _memory_limit(worker)
    # A worker that is a thread of the client must not limit the client.
    own_process = worker.thread_id == threading.main_thread().ident
    return int(MEMORY_SHARE * limit) if limit is not None and own_process else None


def memory_beside(worker: Worker) -> int | None:
    """Return how many bytes a process beside a worker's may take that processes photos; None for no limit."""
    return memory_left(_memory_limit(worker))


def memory_here() -> tuple[int | None, int | None]:
    """Return how many bytes the process of this worker may take, and a process beside it; None for no limit."""
    from distributed import get_worker

    worker = get_worker()
    return memory_for_photos(worker), memory_beside(worker)


def call_on_host(host: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function on the host that a task was sent to."""
    return function(*arguments)


#: Of the last runs that this process took part in, by their tokens: on a cluster that stands there come many.
_rejections: dict[str, WorkerRejected | None] = {}
RUNS_REMEMBERED = 16


def _rejection(worker: str, context: RunContext, settings: PhotoSettings, source: Source) -> WorkerRejected | None:
    """Say why this worker process must not take part, or None; found out once per run."""
    if context.run_token not in _rejections:
        for token in list(_rejections)[: -RUNS_REMEMBERED + 1]:
            _rejections.pop(token, None)
        _rejections[context.run_token] = _check_worker(worker, context, settings, source)
    return _rejections[context.run_token]


def _check_worker(worker: str, context: RunContext, settings: PhotoSettings, source: Source) -> WorkerRejected | None:
    if minor_version() != context.python:
        return WorkerRejected(worker, f"it runs Python {minor_version()}, the client Python {context.python}")
    if code_digest() != context.code:
        return WorkerRejected(worker, "it has another version of reducer")
    try:
        here = environment(settings)
    except InputError as error:
        return WorkerRejected(worker, f"it cannot embed photos: {error}")
    if here.digest != context.environment:
        return WorkerRejected(worker, "it hashes differently from the first workers", here)
    photo = context.readable_photo
    failure = None if photo is None else read_failure(photo, settings, source)
    if failure is not None:
        return WorkerRejected(worker, f"it cannot read {photo} ({failure}), which others can")
    return None


def read_failure(ref: PhotoRef, settings: PhotoSettings, source: Source) -> str | None:
    """Say why a photo cannot be read from this process, or None."""
    from reducer.photos.hashing import PhotoError
    from reducer.photos.reader import read_all

    try:
        with closing(read_all([ref], source, max_pixels=settings.max_pixels)) as files:
            file = next(files)
    except StoreError as error:
        return str(error)
    return str(file) if isinstance(file, PhotoError) else None


def as_partition(
    item: WorkItem, shared: NDArray[np.uint8] | None
) -> list[PartitionResult | PiecesResult | WorkerRejected]:
    """Return the result of `run_item` as one partition of a Dask bag, which holds one element."""
    return [run_item(item, shared)]


def unpacked(content: bytes, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Return numbers as they were before they travelled."""
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)
