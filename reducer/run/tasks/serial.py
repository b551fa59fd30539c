"""The reference executor: partitions one after the other, in this process, without Dask."""

from __future__ import annotations

from collections.abc import Generator

from reducer.run.tasks.environment import environment
from reducer.run.tasks.messages import PartitionResult, PiecesResult
from reducer.run.tasks.tasks import Tasks


class InProcess:
    """Run partitions, pieces or shards in this process, one after the other, without Dask.

    Parameters
    ----------
    tasks : Tasks
        The work.

    Attributes
    ----------
    environment : Environment
        Versions and libraries of this process that decide hashes.
    """

    def __init__(self, tasks: Tasks) -> None:
        self.tasks = tasks
        self.environment = environment(tasks.job.photo_settings)

    def results(self) -> Generator[PartitionResult | PiecesResult]:
        """Yield the result of each partition, piece or group of shards, in turn."""
        for number in self.tasks.numbers:
            yield self.tasks.run(number)
