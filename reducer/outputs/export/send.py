"""Groups of photos sent to a cluster to be written there, or written in this process."""

from __future__ import annotations

import queue
import time
import uuid
from collections import Counter, deque
from collections.abc import Generator, Iterable
from concurrent.futures import CancelledError
from contextlib import closing, suppress
from itertools import count
from typing import TYPE_CHECKING, Any

from reducer.errors import ClusterError, ReducerError, one_line
from reducer.outputs.export.write import Batch, CopyResult, CopySettings, write_group
from reducer.photos.sandbox import memory_bound

if TYPE_CHECKING:
    from reducer.run.dask.connect import Client, Future

#: Groups that are with the scheduler at a time, for each worker thread.
WINDOW = 4
#: Seconds between two looks at the cluster, that its scheduler may take to answer, and a worker to hand over a result.
TICK, ANSWER = 5.0, 10.0
#: A group whose result was lost with its worker so often is given up.
MOST_LOSSES = 5
KILLED = "not written: workers died with it, or with photos beside it"


def write_here(groups: Iterable[Batch], way: CopySettings) -> Generator[tuple[tuple[int, ...], list[CopyResult]]]:
    """Write photos in this process; results as from `write_on`, but a photo at a time where there are no shards."""
    for group in groups:
        with closing(write_group(group, way)) as results:
            if group.shard is not None:
                yield group.numbers, list(results)
                continue
            for number, found in zip(group.numbers, results, strict=True):
                yield (number,), [found]


def write_on(
    client: Client, groups: Iterable[Batch], way: CopySettings, *, wait: float
) -> Generator[tuple[tuple[int, ...], list[CopyResult]]]:
    """Write photos on a cluster. A group that is lost with its worker is written once more: that does no harm.

    Parameters
    ----------
    client : distributed.Client
        Of the cluster.
    groups : iterable of Batch
        The photos. Few are with the cluster at a time.
    way : CopySettings
        How.
    wait : float
        Seconds without any worker after which it is given up.

    Yields
    ------
    tuple of int, list of CopyResult
        Numbers, and what came of those photos, as they are done. Photos with which workers die again and again have
        failed.

    Raises
    ------
    ReducerError
        If the target cannot be written.
    ClusterError
        If the cluster is gone.
    """
    done: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
    sent: dict[Any, tuple[Future[Any], Batch]] = {}
    waiting, again = iter(groups), deque[Batch]()
    losses = Counter[tuple[int, ...]]()
    keys = (f"export-{uuid.uuid4().hex}-{number}" for number in count())
    scheduler: Any = client.scheduler
    last_seen, next_look, threads = time.monotonic(), float("-inf"), 0
    try:
        while True:
            now = time.monotonic()
            if now >= next_look:
                next_look = now + TICK
                try:
                    threads = sum(client.sync(scheduler.ncores, callback_timeout=ANSWER).values())
                except Exception as error:
                    raise ClusterError(f"the scheduler is gone: {one_line(error)}") from None
                last_seen = now if threads else last_seen
                if now - last_seen > wait:
                    raise ClusterError(f"no worker has been there for {wait:g} s (workers: wait)")
            while len(sent) < WINDOW * max(1, threads):
                group = again.popleft() if again else next(waiting, None)
                if group is None:
                    break
                future = client.submit(_write_group_there, group, way, key=next(keys), pure=False)
                sent[future.key] = (future, group)
                future.add_done_callback(done.put)
            if not sent:
                return
            try:
                future, group = sent.pop(done.get(timeout=TICK).key)
            except queue.Empty:
                continue
            found = _outcome(future)
            if found is None:
                losses[group.numbers] += 1
                if losses[group.numbers] < MOST_LOSSES:
                    again.append(group)
                    continue
                found = KILLED
            yield group.numbers, [CopyResult(error=found)] * len(group.copies) if isinstance(found, str) else found
    finally:
        with suppress(Exception):
            client.cancel([future for future, _ in sent.values()], force=True)


def _outcome(future: Future[Any]) -> list[CopyResult] | str | None:
    """What came of photos, or why all of them have failed; None if that is lost.

    Raises
    ------
    ReducerError
        If the target cannot be written.
    ClusterError
        If a worker has failed in a way that nothing explains.
    """
    try:
        if future.status == "finished":
            found: list[CopyResult] | str = future.result(timeout=ANSWER)
            if isinstance(found, str):
                raise ReducerError(found)
            return found
        if future.status != "error":
            return None
        error = future.exception(timeout=ANSWER)
    except (TimeoutError, CancelledError):  # the worker has died with it, or the scheduler is gone
        return None
    finally:
        future.release()
    if type(error).__name__ == "KilledWorker":
        return KILLED
    raise ClusterError(f"a worker failed: {one_line(error)}")


def _write_group_there(group: Batch, way: CopySettings) -> list[CopyResult] | str:
    """What runs on a worker: what came of the photos, or why the target cannot be written."""
    from distributed import get_worker

    from reducer.run.dask.worker import memory_beside, memory_for_photos

    worker = get_worker()
    try:
        with memory_bound(memory_for_photos(worker) if way.resize else None):
            return list(write_group(group, way, memory_beside=memory_beside(worker)))
    except ReducerError as error:
        return str(error)
