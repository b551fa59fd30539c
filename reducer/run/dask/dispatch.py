"""The Dask bag: submit partitions, gather them as they finish, send again what was lost with a worker."""

from __future__ import annotations

import logging
import queue
import time
import uuid
import warnings
from collections import Counter, deque
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from reducer.config.cluster import ClusterSpec
from reducer.errors import ClusterError
from reducer.run.dask.check import check_photo_access, check_same_environment
from reducer.run.dask.code import code_digest
from reducer.run.dask.messages import RunContext, WorkerRejected, WorkItem
from reducer.run.dask.worker import as_partition, topic, unpacked
from reducer.run.tasks.environment import compare_with
from reducer.run.tasks.messages import PartitionResult, PiecesResult
from reducer.run.tasks.tasks import PartitionTasks, ShardTasks

if TYPE_CHECKING:
    from dask.bag import Bag
    from distributed import Client, Future

log = logging.getLogger("reducer")

#: At most so many partitions a worker thread are with the scheduler at a time, so that its graph stays small.
WINDOW = 16
#: Seconds between two signs of a partition that goes on, at most.
MOST_BEAT = 10.0
#: A partition that was lost so often, each time with several workers, is given up.
MOST_ATTEMPTS = 5
#: Seconds between two looks at the cluster, how long the scheduler may take to answer then, and how long a worker to
#: hand over a result.
TICK, ANSWER, HAND_OVER = 1.0, 10.0, 30.0


@dataclass
class _Sent:
    """A partition that is with the scheduler."""

    work: WorkItem
    future: Future[Any]
    #: When it was sent, as `time.monotonic` tells it; later, when it last had no worker to wait for.
    since: float
    #: The only workers that may do it; None for all.
    allowed: frozenset[str] | None


class Dispatch:
    """Runs partitions on a cluster, windows of them, each window a Dask bag.

    Parameters
    ----------
    client : distributed.Client
        Of the cluster.
    errand : PartitionTasks or ShardTasks
        The partitions, pieces or shards; there are some.
    spec : ClusterSpec
        Of the cluster. Workers that hang are restarted where it is ours.
    before : Dispatch, optional
        What this one goes on from: what that one knows of the workers is not asked again, for now there may be none, or
        some that hang.

    Attributes
    ----------
    environment : Environment
        What decides hashes on all workers.

    Raises
    ------
    InputError
        If workers differ in what decides hashes, or some of them cannot read the photos.
    """

    def __init__(
        self,
        client: Client,
        errand: PartitionTasks | ShardTasks,
        spec: ClusterSpec,
        before: Dispatch | None = None,
    ) -> None:
        self.client, self.errand, self.rules = client, errand, spec.rules
        self.may_restart = spec.address is None
        if before is None:
            self.environment = check_same_environment(client, errand.job.photo_settings)
            seen = check_photo_access(client, errand.job, errand.probes(), self.rules.wait)
        else:
            self.environment, seen = before.environment, before.terms.seen
        self.terms: RunContext = RunContext(
            run_token=uuid.uuid4().hex,
            code=code_digest(),
            environment=self.environment.digest,
            seen=seen,
            beat=min(MOST_BEAT, self.rules.stall / 4),
            patience=self.rules.stall,
        )
        self.waiting: deque[tuple[int, int, bool]] = deque((index, 0, False) for index in errand.numbers)
        self.sent: dict[Any, _Sent] = {}
        self.losses: Counter[int] = Counter()
        #: When which worker last told of each partition and attempt. Signs may come before `sent` knows of them.
        self.signs: dict[tuple[int, int], tuple[float, str]] = {}
        #: Workers that get nothing more from us, and why.
        self.left_out: dict[str, str] = {} if before is None else dict(before.left_out)
        self.threads: dict[str, int] = {}
        self.windows = 0
        self.wake: queue.SimpleQueue[object] = queue.SimpleQueue()
        self.next_look = float("-inf")
        self.alone_since: float | None = None
        self.last_sign = time.monotonic()
        # Sent once and held by the workers, not sent with each partition; a task, so that it comes again where one
        # dies.
        self.shared = None
        if (shared := errand.shared) is not None:
            from dask.delayed import delayed

            self.shared = self._persist(delayed(unpacked, pure=False)(shared.tobytes(), shared.shape))

    def results(self) -> Generator[PartitionResult | PiecesResult]:
        """Run all partitions, pieces or shards.

        Yields
        ------
        PartitionResult or PiecesResult
            One a task, as they arrive.

        Raises
        ------
        ClusterError
            If one cannot be finished, or there is no worker for too long.
        """
        self._listen()
        try:
            while self.waiting or self.sent:
                self._look_at_cluster()
                self._fill_up()
                self._wait()
                for key in [key for key, sent in self.sent.items() if sent.future.status != "pending"]:
                    result = self._take(key)
                    if result is not None:
                        yield result
        except OSError as error:
            raise ClusterError(f"the scheduler cannot be reached: {type(error).__name__}: {error}") from None
        finally:
            with suppress(OSError):  # the scheduler may be gone
                self.client.cancel([sent.future for sent in self.sent.values()], force=True)
                self.client.unsubscribe_topic(topic(self.terms.run_token))

    def _listen(self) -> None:
        self.client.subscribe_topic(topic(self.terms.run_token), self._on_sign)

    def _fill_up(self) -> None:
        """Send a window of partitions, if there is room for one."""
        usable = [worker for worker in self.threads if worker not in self.left_out]
        threads = sum(self.threads[worker] for worker in usable)
        room = WINDOW * max(1, threads) - len(self.sent)
        # Filled up by halves, so that workers never wait and a window is worth a graph.
        if not usable or not self.waiting or room < min(len(self.waiting), (room + len(self.sent)) // 2):
            return
        window = []
        for index, attempt, apart in [self.waiting.popleft() for _ in range(min(room, len(self.waiting)))]:
            window.append(WorkItem(self.errand.task(index), self.terms, attempt, apart))
        self._send(window, usable if self.left_out else None)

    def _send(self, window: list[WorkItem], workers: list[str] | None) -> None:
        from distributed.client import futures_of

        self.windows += 1
        bag = as_bag(f"work_off-{self.terms.run_token}-{self.windows}", window, self.shared)
        now = time.monotonic()
        allowed = None if workers is None else frozenset(workers)
        futures = {future.key: future for future in futures_of(self._persist(bag, workers))}
        for work, key in zip(window, bag.__dask_keys__(), strict=True):
            self.sent[key] = _Sent(work, futures[key], now, allowed)
            futures[key].add_done_callback(self.wake.put)

    def _persist(self, collection: Any, workers: list[str] | None = None) -> Any:
        with warnings.catch_warnings():
            # Rows and hashes travel in the tasks on purpose: data that is scattered dies with its worker.
            warnings.filterwarnings("ignore", message="Sending large graph")
            return self.client.persist(collection, workers=workers)

    def _wait(self) -> None:
        """Until something has finished, or it is time to look at the cluster again."""
        try:
            self.wake.get(timeout=max(0.01, self.next_look - time.monotonic()))
            while True:
                self.wake.get_nowait()
        except queue.Empty:
            pass

    def _on_sign(self, event: tuple[float, dict[str, Any]]) -> None:
        """A worker tells that it is at work on a partition. Called in the client's own thread."""
        sign = event[1]
        self.last_sign = time.monotonic()
        self.signs[sign["index"], sign["attempt"]] = (self.last_sign, sign["worker"])

    def _take(self, key: Any) -> PartitionResult | PiecesResult | None:
        """What has come of a partition; if nothing, it is sent again."""
        sent = self.sent[key]
        status = sent.future.status
        if status != "finished":
            error = sent.future.exception(timeout=HAND_OVER) if status == "error" else None
            self._again_or_give_up(key, error or RuntimeError(f"the scheduler has {status} it"))
            return None
        try:
            found: PartitionResult | PiecesResult | WorkerRejected = sent.future.result(timeout=HAND_OVER)[0]
        except TimeoutError:  # the worker that holds it is out of reach
            self._lost(key)
            return None
        except Exception as failure:
            self._again_or_give_up(key, failure)
            return None
        self.last_sign = time.monotonic()
        if isinstance(found, WorkerRejected):
            reason = found.reason
            if found.environment is not None:
                reason = compare_with(self.environment, found.environment, f"worker {found.worker}") or reason
            self._leave_out(found.worker, reason)
            self._send_again(key, apart=sent.work.apart)
            return None
        del self.sent[key]
        sent.future.release()
        return found

    def _again_or_give_up(self, key: Any, error: BaseException) -> None:
        from distributed import KilledWorker
        from distributed.client import FutureCancelledError

        if self.client.status != "running":
            raise ClusterError("the scheduler is gone")
        lost = self.sent[key].future.status in ("cancelled", "lost") or isinstance(error, FutureCancelledError)
        if not (lost or isinstance(error, KilledWorker | MemoryError)):
            raise ClusterError(
                f"a partition could not be finished: {type(error).__name__}: {' '.join(str(error).split())}"
            )
        self._lost(key)

    def _lost(self, key: Any) -> None:
        """A partition went with its workers."""
        index = self.sent[key].work.task.index
        self.losses[index] += 1
        if self.losses[index] >= MOST_ATTEMPTS:
            raise ClusterError(
                f"a partition was lost {MOST_ATTEMPTS} times, each time with its workers. Look into the workers' logs: "
                f"they may have too little memory"
            )
        self._send_again(key, apart=True)
        self._listen()  # a scheduler that was started anew knows nothing of us

    def _send_again(self, key: Any, apart: bool) -> None:
        sent = self.sent.pop(key)
        self.client.cancel([sent.future], force=True)
        self.waiting.appendleft((sent.work.task.index, sent.work.attempt + 1, apart))

    def _leave_out(self, worker: str, reason: str) -> None:
        if worker not in self.left_out:
            self.left_out[worker] = reason
            log.warning("worker %s gets no more work: %s", worker, reason)

    def _look_at_cluster(self) -> None:
        """Once a tick: who is there, and does everything go on?"""
        now = time.monotonic()
        if now < self.next_look:
            return
        try:
            scheduler: Any = self.client.scheduler
            self.threads = dict(self.client.sync(scheduler.ncores, callback_timeout=ANSWER))  # `nthreads`, in time
            # Another worker may come at the same address.
            self.left_out = {worker: why for worker, why in self.left_out.items() if worker in self.threads}
        except Exception:
            if self.client.status != "running":
                raise ClusterError("the scheduler is gone") from None
            self.threads = {}  # it may come back
        self.next_look = time.monotonic() + TICK
        if not set(self.threads) - set(self.left_out):
            self._alone()
            return
        self.alone_since = None
        for key, sent in list(self.sent.items()):
            if sent.allowed is not None and not sent.allowed & self.threads.keys():
                self._send_again(key, apart=sent.work.apart)  # those that might do it are gone
        begun: list[Any] = []
        waiting: list[Any] = []
        for key, sent in self.sent.items():
            name = (sent.work.task.index, sent.work.attempt)
            if self.signs.get(name, (0.0, ""))[1] not in {"", *self.threads}:  # Dask has it done elsewhere
                del self.signs[name]
                sent.since = now
            sign = self.signs.get(name)
            if sent.future.status == "pending" and now - (sign[0] if sign else sent.since) > self.rules.stall:
                (begun if sign else waiting).append(key)
        for key in begun:
            if key in self.sent:  # or it went with another one of its worker
                self._on_stall(key)
        # What has not begun waits for others, perhaps for other people's work. Only where nothing of ours goes on it is
        # sent again, lest it was forgotten; nobody is to blame.
        if waiting and now - self.last_sign > self.rules.stall:
            for key in waiting:
                if key in self.sent:
                    self._send_again(key, apart=self.sent[key].work.apart)
            self.last_sign = time.monotonic()

    def _alone(self) -> None:
        """There is no worker for us."""
        now = time.monotonic()
        self.alone_since = self.alone_since or now
        for sent in self.sent.values():  # waiting for a worker is not stalling
            sent.since = now
        if now - self.alone_since > self.rules.wait:
            reasons = "; ".join(f"{worker}: {reason}" for worker, reason in self.left_out.items())
            raise ClusterError(
                f"no worker has been there for {self.rules.wait:g} s (workers: wait)"
                f"{f', but for those left out ({reasons})' if reasons else ''}"
            )

    def _on_stall(self, key: Any) -> None:
        """A worker makes no progress with a partition: another one gets it."""
        work = self.sent[key].work
        worker = self.signs[work.task.index, work.attempt][1]
        assigned = set(self.client.processing().get(worker, ()))
        self._lost(key)  # first, or a worker that is restarted gets it again at once
        if not (self.may_restart and self._restart(worker)):
            self._leave_out(worker, f"a partition has made no progress in {self.rules.stall:g} s (workers: stall)")
            # What waits there would wait for ever.
            for other in assigned & self.sent.keys():
                self._send_again(other, apart=self.sent[other].work.apart)

    def _restart(self, worker: str) -> bool:
        """Restart a worker of ours, which hangs in a task that cannot be stopped; whether it is back."""
        try:
            self.client.restart_workers([worker], timeout=HAND_OVER)
        except Exception as error:  # it has no nanny, say
            log.debug("worker %s could not be restarted: %s", worker, error)
            return False
        log.warning("worker %s was restarted: it made no progress in %g s (workers: stall)", worker, self.rules.stall)
        return True


def as_bag(name: str, window: Sequence[WorkItem], shared: Any = None) -> Bag:
    """Partitions as a Dask bag, one element each, and one task each.

    ``from_sequence(window).map(work_off)`` would make two tasks of each: the second, for which nothing is left to do,
    would wait for a thread behind other partitions, and for ever where one hangs.

    Parameters
    ----------
    name : str
        Begins the names of the tasks; no other bag may have it.
    window : sequence of WorkItem
        The partitions.
    shared : dask.delayed.Delayed, optional
        What all of them need.
    """
    from dask.bag import Bag
    from dask.highlevelgraph import HighLevelGraph

    held, above = (None, []) if shared is None else (shared.key, [shared])
    graph: dict[Any, Any] = {(name, number): (as_partition, work, held) for number, work in enumerate(window)}
    return Bag(HighLevelGraph.from_collections(name, graph, dependencies=above), name, len(window))
