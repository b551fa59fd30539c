"""What travels between the client and the workers besides tasks and results."""

from __future__ import annotations

from dataclasses import dataclass

from reducer.run.tasks.environment import Environment
from reducer.run.tasks.messages import PartitionTask, ShardTask
from reducer.storage.location import PhotoRef


@dataclass(frozen=True)
class RunContext:
    """What all workers of a run must meet, and how they report; the same for all of its tasks.

    Attributes
    ----------
    run_token : str
        Names this run, in the Dask keys too: no result of an earlier run answers for this one.
    code : str
        Digest of our own code (`reducer.run.dask.code.code_digest`).
    environment : str
        Digest of what decides hashes (`reducer.run.tasks.environment.Environment.digest`).
    seen : str, ByteRange or None
        A photo, or a piece of a shard, that every worker must be able to read.
    beat : float
        Seconds between two signs of progress.
    patience : float
        Seconds that one photo may take where photos are looked at apart.
    """

    run_token: str
    code: str
    environment: str
    seen: PhotoRef | None
    beat: float
    patience: float


@dataclass(frozen=True)
class WorkItem:
    """One element of the Dask bag: a partition, sent to a worker.

    Attributes
    ----------
    task : PartitionTask or ShardTask
        The partition, or the shards.
    terms : RunContext
        Of the run.
    attempt : int
        How often it was sent before.
    apart : bool
        Whether its photos are to be looked at in a process of their own, since a worker died or stalled with them.
    """

    task: PartitionTask | ShardTask
    terms: RunContext
    attempt: int = 0
    apart: bool = False

    def __repr__(self) -> str:
        return f"Work({self.task!r}, attempt={self.attempt}, apart={self.apart})"


@dataclass(frozen=True)
class WorkerRejected:
    """A worker's answer when it cannot do its part as the others do.

    Attributes
    ----------
    worker : str
        Its address.
    reason : str
        One line.
    environment : Environment or None
        The worker's own, where that is why.
    """

    worker: str
    reason: str
    environment: Environment | None = None
