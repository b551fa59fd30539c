"""Keep a window of tasks with the scheduler, hand results out as they come, tell what was lost: the one submit loop.

It takes the function that runs on the workers, and knows nothing of what the function does. `distributed.as_completed`
waits without end for the next task, and for a result whose worker is cut off; here both have a limit.
"""

from __future__ import annotations

import itertools
import logging
import math
import queue
import time
import uuid
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from reducer.errors import ClusterError

if TYPE_CHECKING:
    from distributed import Client, Future

Item = TypeVar("Item")
#: Submits a few items together, to the workers of these addresses or to all; gives the future of each.
Submit = Callable[[list[Item], "list[str] | None"], "Iterable[Future[Any]]"]

#: Tasks that are with the scheduler at a time, per worker thread.
WINDOW = 4
#: Seconds between two looks at the cluster, that the scheduler may take to answer, and a worker to hand over a result.
TICK, ANSWER, HAND_OVER = 1.0, 10.0, 30.0

#: Seconds without any worker after which that is said.
SIGN_OF_LIFE = 5.0

log = logging.getLogger("reducer")


class TaskLost(Exception):
    """The task or its result is gone with a worker or a scheduler."""


class WorkersGone(TaskLost):
    """The only workers that may run the task are gone."""


class NotHandedOver(TaskLost):
    """The worker that holds the result does not hand it over in time."""


class NothingCame(Exception):
    """No task has ended for longer than the caller wants to wait."""


@dataclass(frozen=True)
class Outcome(Generic[Item]):
    """The end of an item: its result, or why there is none.

    Attributes
    ----------
    item : Item
        The item.
    result : object
        What the function returned; None where there is an error.
    error : Exception or None
        What the function raised, `distributed.KilledWorker` if workers died with the task as often as the scheduler
        allows, or `TaskLost`.
    """

    item: Item
    result: Any = None
    error: BaseException | None = None

    @property
    def killed_workers(self) -> bool:
        """True if workers died with the task as often as the scheduler allows."""
        from distributed import KilledWorker

        return isinstance(self.error, KilledWorker)


@dataclass(eq=False)
class Sent(Generic[Item]):
    """An item that is with the scheduler.

    Attributes
    ----------
    item : Item
        The item.
    future : distributed.Future
        Future of the task.
    since : float
        When the task was sent, by `time.monotonic`; later, when there was last no worker to wait for.
    workers : frozenset of str, or None
        Addresses of the only workers that may run the task; None for all.
    """

    item: Item
    future: Future[Any]
    since: float
    workers: frozenset[str] | None


class Pool(Generic[Item]):
    """Items that are waiting, and those that are with the scheduler.

    Parameters
    ----------
    client : distributed.Client
        Client of the cluster.
    submit : callable
        Submits items.
    items : iterable
        What is to be done. Read as there is room for more.
    window : int
        Items that are with the scheduler at a time, per worker thread.
    left_out : mapping of str to str, optional
        Addresses of workers that get no items, and why.
    workers_of : callable, optional
        Gives the addresses of the only workers that may run an item.
    wait : float
        Seconds without any worker after which it is given up.
    patience : float
        Seconds without any outcome after which it is given up.
    watch : callable, optional
        Called each time that the cluster was looked at and has workers.
    """

    def __init__(
        self,
        client: Client,
        submit: Submit[Item],
        items: Iterable[Item],
        *,
        window: int = WINDOW,
        left_out: Mapping[str, str] | None = None,
        workers_of: Callable[[Item], Sequence[str]] | None = None,
        wait: float = math.inf,
        patience: float = math.inf,
        watch: Callable[[], None] | None = None,
    ) -> None:
        self.client, self.submit, self.window = client, submit, window
        self.workers_of, self.wait, self.patience, self.watch = workers_of, wait, patience, watch
        self.items = iter(items)
        #: Items that are to be sent once more: before others, and without waiting for a window.
        self.again: deque[Item] = deque()
        self.ahead: deque[Item] = deque()
        self.sent: dict[Any, Sent[Item]] = {}
        self.done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.left_out = dict(left_out or {})
        #: Threads of each worker that is there, by its address.
        self.threads: dict[str, int] = {}
        self.next_look = -math.inf
        self.alone_since: float | None = None
        self.told_since: float | None = None

    def outcomes(self) -> Generator[Outcome[Item]]:
        """Run all items.

        Yields
        ------
        Outcome
            One per item, as they come; one more for each item that was put into `again` meanwhile.

        Raises
        ------
        ClusterError
            If the scheduler is gone, or there is no worker for too long.
        NothingCame
            If no task ends for too long.
        """
        last = time.monotonic()
        try:
            while self._has_more() or self.sent:
                self.look_at_cluster()
                self._fill_up()
                for key in self._wait_for_tasks(last + self.patience):
                    if key in self.sent:
                        yield self._take(key)
                        last = time.monotonic()
                if time.monotonic() - last > self.patience:
                    raise NothingCame
        except OSError as error:
            raise ClusterError(f"the scheduler cannot be reached: {type(error).__name__}: {error}") from None
        finally:
            with suppress(Exception):  # the scheduler may be gone
                self.client.cancel([sent.future for sent in self.sent.values()], force=True)

    def recall(self, key: Any) -> Sent[Item]:
        """Take an item back from the scheduler."""
        sent = self.sent.pop(key)
        self.client.cancel([sent.future], force=True)
        return sent

    def usable_workers(self) -> list[str]:
        """Return the addresses of the workers that get items."""
        return [worker for worker in self.threads if worker not in self.left_out]

    def look_at_cluster(self) -> None:
        """Once per tick, see who is there, and whether all goes on."""
        if time.monotonic() < self.next_look:
            return
        try:
            self.threads = threads_of_workers(self.client)
        except Exception:
            self._check_scheduler()
            self.threads = {}  # it may come back
        else:
            # Another worker may come at the same address.
            self.left_out = {worker: reason for worker, reason in self.left_out.items() if worker in self.threads}
            for key, sent in self.sent.items():
                gone = sent.workers is not None and sent.workers.isdisjoint(self.threads)
                if gone or sent.future.status != "pending":
                    self.done.put(key)
        self.next_look = time.monotonic() + TICK
        if not self.usable_workers():
            self._wait_for_workers()
            return
        self.alone_since = None
        if self.watch is not None:
            self.watch()

    def _check_scheduler(self) -> None:
        if self.client.status != "running":
            raise ClusterError("the scheduler is gone")

    def _wait_for_workers(self) -> None:
        now = time.monotonic()
        self.alone_since = self.alone_since or now
        if now - self.alone_since > SIGN_OF_LIFE and self.told_since != self.alone_since:
            self.told_since = self.alone_since
            limit = "" if self.wait == math.inf else f", up to {self.wait:g} s (workers: wait)"
            from tqdm.contrib.logging import logging_redirect_tqdm  # which workers, that import this module, may lack

            with logging_redirect_tqdm([log]):
                log.warning("no worker is there: waiting for one%s", limit)
        for sent in self.sent.values():  # waiting for a worker is not stalling
            sent.since = now
        if now - self.alone_since > self.wait:
            reasons = "; ".join(f"{worker}: {reason}" for worker, reason in self.left_out.items())
            raise ClusterError(
                f"no worker has been there for {self.wait:g} s (workers: wait)"
                f"{f', but for those left out ({reasons})' if reasons else ''}"
            )

    def _has_more(self) -> bool:
        if not self.ahead:
            self.ahead.extend(itertools.islice(self.items, 1))
        return bool(self.again or self.ahead)

    def _fill_up(self) -> None:
        """Send a window of items, if there is room for one."""
        usable = self.usable_workers()
        most = self.window * sum(self.threads[worker] for worker in usable)
        room = most - len(self.sent)
        # Filled up by halves, so that workers never wait and a window is worth a graph.
        if room <= 0 or (room < most // 2 and not self.again):
            return
        batch: list[Item] = []
        for waiting in (self.again, self.ahead):
            batch += [waiting.popleft() for _ in range(min(room - len(batch), len(waiting)))]
        batch += itertools.islice(self.items, room - len(batch))
        if self.workers_of is not None:
            for item in batch:
                self._send([item], list(self.workers_of(item)))
        elif batch:
            self._send(batch, usable if self.left_out else None)

    def _send(self, batch: list[Item], workers: list[str] | None) -> None:
        now = time.monotonic()
        allowed = None if workers is None else frozenset(workers)
        for item, future in zip(batch, self.submit(batch, workers), strict=True):
            self.sent[future.key] = Sent(item, future, now, allowed)
            future.add_done_callback(lambda future: self.done.put(future.key))

    def _wait_for_tasks(self, stop: float) -> list[Any]:
        """Wait until something has finished, or it is time to look at the cluster again; return the keys."""
        keys: list[Any] = []
        with suppress(queue.Empty):
            keys.append(self.done.get(timeout=max(0.01, min(self.next_look, stop) - time.monotonic())))
            while True:
                keys.append(self.done.get_nowait())
        return keys

    def _take(self, key: Any) -> Outcome[Item]:
        from distributed.client import FutureCancelledError

        sent = self.sent.pop(key)
        future, item = sent.future, sent.item
        error: BaseException | None
        try:
            if future.status == "finished":
                outcome = Outcome(item, future.result(timeout=HAND_OVER))
                future.release()
                return outcome
            if future.status == "error":
                error = future.exception(timeout=HAND_OVER)
            elif future.status == "pending":
                error = WorkersGone("the workers that were to do it are gone")
            else:
                error = TaskLost(f"the scheduler has {future.status} it")
        except TimeoutError:  # the worker that holds it is out of reach
            error = NotHandedOver("the worker that holds the result does not hand it over")
        except FutureCancelledError as lost:
            error = TaskLost(str(lost))
        except Exception as failure:
            error = failure
        self._check_scheduler()
        self.client.cancel([future], force=True)
        return Outcome(item, error=error)


def threads_of_workers(client: Client) -> dict[str, int]:
    """Return the threads of each worker by its address, in time or not at all (`Client.nthreads` has no limit)."""
    scheduler: Any = client.scheduler
    return dict(client.sync(scheduler.ncores, callback_timeout=ANSWER))


def map_unordered(
    client: Client,
    function: Callable[..., Any],
    items: Iterable[Item],
    *arguments: Any,
    name: str,
    workers_of: Callable[[Item], Sequence[str]] | None = None,
    avoid: Collection[str] = (),
    wait: float = math.inf,
    patience: float = math.inf,
    attempts: int = 1,
) -> Generator[Outcome[Item]]:
    """Call a function with each of some items on the workers of a cluster.

    Parameters
    ----------
    client : distributed.Client
        Client of the cluster.
    function : callable
        Called with an item and ``arguments``.
    items : iterable
        Read as they are sent: `WINDOW` per worker thread are with the cluster at a time.
    *arguments
        Passed to all calls.
    name : str
        Begins the names of the tasks.
    workers_of, wait, patience
        Passed to `Pool`.
    avoid : collection of str
        Addresses of workers that get no items.
    attempts : int
        How often an item is sent that is lost with workers.

    Yields
    ------
    Outcome
        One per item, as they come.

    Raises
    ------
    ClusterError, NothingCame
        See `Pool.outcomes`.
    """
    keys = map(f"{name}-{uuid.uuid4().hex}-{{}}".format, itertools.count())

    def submit(batch: list[Item], workers: list[str] | None) -> Iterable[Future[Any]]:
        for item in batch:
            yield client.submit(function, item, *arguments, key=next(keys), workers=workers, pure=False)

    pool = Pool(client, submit, items, workers_of=workers_of, wait=wait, patience=patience)
    pool.left_out, lost = dict.fromkeys(avoid, ""), list[Item]()
    with closing(pool.outcomes()) as outcomes:
        for outcome in outcomes:
            if isinstance(outcome.error, TaskLost):
                lost.append(outcome.item)
                if lost.count(outcome.item) < attempts:
                    pool.again.append(outcome.item)
                    continue
            yield outcome
