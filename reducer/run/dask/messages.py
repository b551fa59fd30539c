"""Messages between the client and the workers, besides tasks and results."""

from __future__ import annotations

from dataclasses import dataclass

from reducer.run.tasks.environment import Environment
from reducer.run.tasks.messages import PartitionTask, ShardTask
from reducer.storage.location import PhotoRef


@dataclass(frozen=True)
class RunContext:
    """The part of a work item that is equal in all of a run: what workers must meet, and how they report.

    Attributes
    ----------
    run_token : str
        Names this run, in the Dask keys too: no result of an earlier run answers for this one.
    code : str
        Digest of our own code (`reducer.run.dask.code.code_digest`).
    python : str
        Minor version of Python on the client.
    environment : str
        Digest of what decides hashes (`reducer.run.tasks.environment.Environment.digest`).
    readable_photo : str, ByteRange or None
        A photo, or a piece of a shard, that every worker must be able to read.
    beat : float
        Seconds between two signs of progress.
    patience : float
        Seconds that one photo may take in a process of its own.
    """

    run_token: str
    code: str
    python: str
    environment: str
    readable_photo: PhotoRef | None
    beat: float
    patience: float


@dataclass(frozen=True)
class WorkItem:
    """One element of the Dask bag: a partition, sent to a worker.

    Attributes
    ----------
    task : PartitionTask or ShardTask
        The partition, or the shards.
    context : RunContext
        Of the run.
    attempt : int
        How often it was sent before.
    in_sandbox : bool
        Whether its photos are processed in a process of their own, since a worker died or stalled with them.
    """

    task: PartitionTask | ShardTask
    context: RunContext
    attempt: int = 0
    in_sandbox: bool = False

    def __repr__(self) -> str:
        return f"WorkItem({self.task!r}, attempt={self.attempt}, in_sandbox={self.in_sandbox})"


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
        Of the worker, where that is the reason.
    """

    worker: str
    reason: str
    environment: Environment | None = None
