"""Submit partitions as Dask bags, gather them as they finish, send again what was lost with a worker."""

from __future__ import annotations

import logging
import time
import uuid
import warnings
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from reducer.config.cluster import ClusterSpec
from reducer.errors import ClusterError, StoreError
from reducer.run.dask.check import check_photo_access, check_same_environment
from reducer.run.dask.code import code_digest, minor_version
from reducer.run.dask.messages import RunContext, WorkerRejected, WorkItem
from reducer.run.dask.pool import HAND_OVER, Outcome, Pool, Sent, TaskLost, WorkersGone
from reducer.run.dask.worker import TOPIC, as_partition, unpacked
from reducer.run.tasks.environment import Environment, compare_with
from reducer.run.tasks.messages import PartitionResult, PiecesResult
from reducer.run.tasks.tasks import PartitionTasks, ShardTasks

if TYPE_CHECKING:
    from dask.bag import Bag
    from distributed import Client, Future

log = logging.getLogger("reducer")

#: Seconds between two signs of a partition that goes on, at most.
MOST_BEAT = 10.0
#: A partition that was lost this often, each time with several workers, is given up.
MOST_ATTEMPTS = 5


class Attempt(NamedTuple):
    """A partition that is to be sent, or was.

    Attributes
    ----------
    partition : int
        Its index.
    number : int
        How often it was sent before.
    in_sandbox : bool
        Whether its photos are processed in a process of their own, since a worker died or stalled with them.
    """

    partition: int
    number: int = 0
    in_sandbox: bool = False


class Signs:
    """Signs of progress that workers give, each of one partition and attempt.

    Attributes
    ----------
    last : float
        When there was last a sign or a result of any partition, by `time.monotonic`.
    """

    def __init__(self, run_token: str) -> None:
        self.run_token = run_token
        self.last = time.monotonic()
        #: Time and worker of the last sign, by partition and attempt. Signs may come before the pool knows of a task.
        self.of_attempt: dict[tuple[int, int], tuple[float, str]] = {}

    def note(self, event: tuple[float, dict[str, Any]]) -> None:
        """Note what a worker tells. Called in the client's own thread."""
        sign = event[1]
        if sign["run"] == self.run_token:
            self.last = time.monotonic()
            self.of_attempt[sign["index"], sign["attempt"]] = (self.last, sign["worker"])

    def silent(
        self, sent: dict[Any, Sent[Attempt]], workers: dict[str, int], limit: float
    ) -> tuple[list[tuple[Any, str]], list[Any]]:
        """Find tasks of which nothing was heard for too long.

        Parameters
        ----------
        sent : dict of Sent
            All tasks by their keys.
        workers : dict
            The workers that are there, by their addresses.
        limit : float
            Seconds.

        Returns
        -------
        stalled : list of (key, str)
            Tasks that a worker has begun with, and its address.
        waiting : list of key
            Tasks that no worker has begun with.
        """
        now = time.monotonic()
        stalled: list[tuple[Any, str]] = []
        waiting: list[Any] = []
        for key, task in sent.items():
            attempt = task.item[:2]
            sign = self.of_attempt.get(attempt)
            if sign is not None and sign[1] not in workers:  # Dask has it done elsewhere
                del self.of_attempt[attempt]
                task.since, sign = now, None
            if task.future.status == "pending" and now - (sign[0] if sign else task.since) > limit:
                if sign is None:
                    waiting.append(key)
                else:
                    stalled.append((key, sign[1]))
        return stalled, waiting


class Dispatch:
    """Executor that runs partitions on a cluster, in windows, each window a Dask bag.

    Parameters
    ----------
    client : distributed.Client
        Client of the cluster.
    tasks : PartitionTasks or ShardTasks
        The partitions, pieces or shards; there are some.
    spec : ClusterSpec
        The cluster. Workers that hang are restarted if this process has started them.
    before : Dispatch, optional
        The stage of the run before this one: what that one knows of the workers is not asked again, for now there may
        be none, or some that hang.

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
        tasks: PartitionTasks | ShardTasks,
        spec: ClusterSpec,
        before: Dispatch | None = None,
    ) -> None:
        self.client, self.tasks, self.rules = client, tasks, spec.rules
        self.may_restart = spec.address is None
        if before is None:
            self.environment: Environment = check_same_environment(client, tasks.job.photo_settings)
            readable = check_photo_access(client, tasks.job, tasks.probes(), self.rules.wait)
        else:
            self.environment, readable = before.environment, before.context.readable_photo
        self.context: RunContext = RunContext(
            run_token=uuid.uuid4().hex,
            code=code_digest(),
            python=minor_version(),
            environment=self.environment.digest,
            readable_photo=readable,
            beat=min(MOST_BEAT, self.rules.stall / 4),
            patience=self.rules.stall,
        )
        self.signs = Signs(self.context.run_token)
        self.losses: Counter[int] = Counter()
        self.windows = 0
        self.pool = Pool(
            client,
            self._submit,
            map(Attempt, tasks.numbers),
            window=tasks.window,
            left_out=None if before is None else before.left_out,
            wait=self.rules.wait,
            watch=self._look_for_stalls,
        )
        self.shared = None
        if (shared := tasks.shared) is not None:
            from dask.delayed import delayed

            # Sent once and held by the workers, not sent with each partition; a task, so that it comes again where one
            # dies.
            self.shared = self._persist(delayed(unpacked, pure=False)(shared.tobytes(), shared.shape))

    @property
    def left_out(self) -> dict[str, str]:
        """Workers that get no more partitions, and why."""
        return self.pool.left_out

    def results(self) -> Generator[PartitionResult | PiecesResult]:
        """Run all partitions, pieces or shards.

        Yields
        ------
        PartitionResult or PiecesResult
            One per task, as they arrive.

        Raises
        ------
        ClusterError
            If one cannot be finished, or there is no worker for too long.
        """
        try:
            self._listen()
            with closing(self.pool.outcomes()) as outcomes:
                for outcome in outcomes:
                    result = self._accept(outcome)
                    if result is not None:
                        yield result
        except OSError as error:
            raise ClusterError(f"the scheduler cannot be reached: {type(error).__name__}: {error}") from None
        finally:
            with suppress(OSError):  # the scheduler may be gone
                self.client.unsubscribe_topic(TOPIC)

    def _listen(self) -> None:
        self.client.subscribe_topic(TOPIC, self.signs.note)

    def _submit(self, batch: list[Attempt], workers: list[str] | None) -> list[Future[Any]]:
        from distributed.client import futures_of

        self.windows += 1
        window = [
            WorkItem(self.tasks.task(attempt.partition), self.context, attempt.number, attempt.in_sandbox)
            for attempt in batch
        ]
        bag = as_bag(f"run_item-{self.context.run_token}-{self.windows}", window, self.shared)
        futures = {future.key: future for future in futures_of(self._persist(bag, workers))}
        return [futures[key] for key in bag.__dask_keys__()]

    def _persist(self, collection: Any, workers: list[str] | None = None) -> Any:
        with warnings.catch_warnings():
            # Rows and hashes travel in the tasks on purpose: data that is scattered dies with its worker.
            warnings.filterwarnings("ignore", message="Sending large graph")
            return self.client.persist(collection, workers=workers)

    def _accept(self, outcome: Outcome[Attempt]) -> PartitionResult | PiecesResult | None:
        """Return the result of a partition; if there is none, the partition is sent again or the run is given up."""
        attempt, error = outcome.item, outcome.error
        if error is None:
            self.signs.last = time.monotonic()
            result: PartitionResult | PiecesResult | WorkerRejected = outcome.result[0]
            if not isinstance(result, WorkerRejected):
                return result
            reason = result.reason
            if result.environment is not None:
                reason = compare_with(self.environment, result.environment, f"worker {result.worker}") or reason
            self._leave_out(result.worker, reason)
            self._send_again(attempt)
        elif isinstance(error, StoreError):
            raise error
        elif isinstance(error, WorkersGone):
            self._send_again(attempt)
        elif isinstance(error, TaskLost | MemoryError) or outcome.killed_workers:
            self._count_loss(attempt)
        else:
            raise ClusterError(
                f"a partition could not be finished: {type(error).__name__}: {' '.join(str(error).split())}"
            )
        return None

    def _count_loss(self, attempt: Attempt) -> None:
        """Send a partition again that went with its workers, unless it did so too often."""
        self.losses[attempt.partition] += 1
        if self.losses[attempt.partition] >= MOST_ATTEMPTS:
            raise ClusterError(
                f"a partition was lost {MOST_ATTEMPTS} times, each time with its workers. Look into the workers' logs: "
                f"they may have too little memory"
            )
        self._send_again(attempt._replace(in_sandbox=True))
        self._listen()  # a scheduler that was started anew knows nothing of us

    def _send_again(self, attempt: Attempt) -> None:
        self.pool.again.append(attempt._replace(number=attempt.number + 1))

    def _leave_out(self, worker: str, reason: str) -> None:
        if worker not in self.left_out:
            self.left_out[worker] = reason
            log.warning("worker %s gets no more work: %s", worker, reason)

    def _look_for_stalls(self) -> None:
        """Send again what makes no progress."""
        stalled, waiting = self.signs.silent(self.pool.sent, self.pool.threads, self.rules.stall)
        for key, worker in stalled:
            if key in self.pool.sent:  # or it went with another task of its worker
                self._give_to_others(key, worker)
        # A task that has not begun waits for others, perhaps for other people's work. Only where nothing of ours goes
        # on it is sent again, in case it was forgotten; nobody is to blame.
        if waiting and time.monotonic() - self.signs.last > self.rules.stall:
            for key in waiting:
                if key in self.pool.sent:
                    self._send_again(self.pool.recall(key).item)
            self.signs.last = time.monotonic()

    def _give_to_others(self, key: Any, worker: str) -> None:
        """Take a partition from a worker that makes no progress with it."""
        assigned = set(self.client.processing().get(worker, ()))
        self._count_loss(self.pool.recall(key).item)  # first, or a worker that is restarted gets it again at once
        if self.may_restart and self._restart(worker):
            return
        self._leave_out(worker, f"a partition has made no progress in {self.rules.stall:g} s (workers: stall)")
        # Tasks that wait there would wait for ever.
        for other in assigned & self.pool.sent.keys():
            self._send_again(self.pool.recall(other).item)

    def _restart(self, worker: str) -> bool:
        """Restart a worker of ours, which hangs in a task that cannot be stopped; say whether it is back."""
        try:
            self.client.restart_workers([worker], timeout=HAND_OVER)
        except Exception as error:  # it has no nanny, say
            log.debug("worker %s could not be restarted: %s", worker, error)
            return False
        log.warning("worker %s was restarted: it made no progress in %g s (workers: stall)", worker, self.rules.stall)
        return True


def as_bag(name: str, window: Sequence[WorkItem], shared: Any = None) -> Bag:
    """Make a Dask bag of partitions, one element each, and one task each.

    ``from_sequence(window).map(run_item)`` would make two tasks of each: the second, for which nothing is left to do,
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
