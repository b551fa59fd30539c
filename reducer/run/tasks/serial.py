"""The reference executor: partitions one after the other, in this process, without Dask."""

from __future__ import annotations

import sys
from collections.abc import Generator
from typing import Any

from tqdm.auto import tqdm

from reducer.run.tasks.environment import environment
from reducer.run.tasks.given_vectors import Given, Routing, route
from reducer.run.tasks.hash_stage import run_piece, run_shards
from reducer.run.tasks.messages import PartitionResult, PiecesResult
from reducer.run.tasks.rank_stage import run_partition
from reducer.run.tasks.tasks import PartitionTasks, ShardTasks


class InProcess:
    """Runs partitions in this process, one after the other, without Dask.

    Attributes
    ----------
    environment : Environment
        What decides hashes here.
    """

    def __init__(self, errand: PartitionTasks | ShardTasks, progress: bool = False) -> None:
        self.errand, self.progress = errand, progress
        self.environment = environment(errand.job.photo_settings)

    def results(self) -> Generator[PartitionResult | PiecesResult]:
        """Run all partitions, pieces or shards, in turn."""
        routing = None if isinstance(self.errand, ShardTasks) else self.errand.routing
        routed = []
        if routing is not None:
            with reading(routing, self.progress) as bar:
                for task in routing.tasks:
                    routed.append(route(task, routing.routes))
                    bar.update()
        for index in self.errand.numbers:
            given = None
            if routing is not None:
                given = Given(routing.files, [slices[routing.bucket_of[index]] for slices in routed])
            if isinstance(self.errand, ShardTasks):
                yield run_shards(self.errand.task(index), self.errand.wanted)
            elif self.errand.is_pieces:
                yield run_piece(self.errand.task(index))
            else:
                yield run_partition(self.errand.task(index), self.errand.avoid, vectors_of=given)


def reading(routing: Routing, progress: bool) -> tqdm[Any]:
    """A bar that shows how much of the files of vectors is read."""
    return tqdm(total=len(routing.tasks), unit=" parts of vectors", disable=not progress, file=sys.stderr, leave=False)
