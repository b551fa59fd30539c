"""The reference executor: partitions one after the other, in this process, without Dask."""

from __future__ import annotations

from collections.abc import Generator

from reducer.run.tasks.environment import environment
from reducer.run.tasks.hash_stage import run_piece, run_shards
from reducer.run.tasks.messages import PartitionResult, PiecesResult
from reducer.run.tasks.rank_stage import run_partition
from reducer.run.tasks.tasks import PartitionTasks, ShardTasks


class InProcess:
    """Run partitions, pieces or shards in this process, one after the other, without Dask.

    Parameters
    ----------
    errand : PartitionTasks or ShardTasks
        The work.

    Attributes
    ----------
    environment : Environment
        Versions and libraries of this process that decide hashes.
    """

    def __init__(self, errand: PartitionTasks | ShardTasks) -> None:
        self.errand = errand
        self.environment = environment(errand.job.photo_settings)

    def results(self) -> Generator[PartitionResult | PiecesResult]:
        """Yield the result of each partition, piece or group of shards, in turn."""
        tasks = self.errand
        for number in tasks.numbers:
            if isinstance(tasks, ShardTasks):
                yield run_shards(tasks.task(number), tasks.wanted)
            elif tasks.is_pieces:
                yield run_piece(tasks.task(number))
            else:
                yield run_partition(tasks.task(number), tasks.avoid)
