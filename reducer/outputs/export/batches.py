"""Write batches of photos: in this process, or on the workers of a cluster."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import closing
from typing import TYPE_CHECKING

from reducer.errors import ClusterError, ReducerError, one_line
from reducer.outputs.export.write import Batch, CopyResult, CopySettings, write_batch
from reducer.photos.sandbox import memory_bound
from reducer.run.dask.pool import TaskLost, map_unordered
from reducer.run.dask.worker import memory_here

if TYPE_CHECKING:
    from reducer.run.dask.connect import Client

#: A batch that was lost with its worker this often is given up.
MOST_LOSSES = 5
KILLED = "not written: workers died with it, or with photos beside it"


def write_here(batches: Iterable[Batch], settings: CopySettings) -> Generator[tuple[tuple[int, ...], list[CopyResult]]]:
    """Write photos in this process.

    Yields
    ------
    tuple of int, list of CopyResult
        Numbers, and what became of those photos: a photo at a time where there are no shards.
    """
    for batch in batches:
        with closing(write_batch(batch, settings)) as results:
            if batch.shard is not None:
                yield batch.numbers, list(results)
                continue
            for number, result in zip(batch.numbers, results, strict=True):
                yield (number,), [result]


def write_on(
    client: Client, batches: Iterable[Batch], settings: CopySettings, *, wait: float
) -> Generator[tuple[tuple[int, ...], list[CopyResult]]]:
    """Write photos on a cluster. A batch that is lost with its worker is written once more: that does no harm.

    Parameters
    ----------
    client : distributed.Client
        Client of the cluster.
    batches : iterable of Batch
        The photos. Few are with the cluster at a time.
    settings : CopySettings
        How they are written.
    wait : float
        Seconds without any worker after which it is given up.

    Yields
    ------
    tuple of int, list of CopyResult
        Numbers, and what became of those photos. Photos with which workers die again and again have failed.

    Raises
    ------
    ReducerError
        If the target cannot be written.
    ClusterError
        If the cluster is gone.
    """
    outcomes = map_unordered(client, write_there, batches, settings, name="export", wait=wait, attempts=MOST_LOSSES)
    with closing(outcomes):
        for outcome in outcomes:
            numbers, results = outcome.item.numbers, outcome.result
            if outcome.killed_workers or isinstance(outcome.error, TaskLost):
                results = [CopyResult(error=KILLED)] * len(numbers)
            elif outcome.error is not None:
                raise ClusterError(f"a worker failed: {one_line(outcome.error)}")
            elif isinstance(results, str):
                raise ReducerError(results)
            yield numbers, results


def write_there(batch: Batch, settings: CopySettings) -> list[CopyResult] | str:
    """Write photos on the worker that this is called on; return why the target cannot be written, if it cannot."""
    memory, memory_beside = memory_here()
    try:
        with memory_bound(memory if settings.resize else None):
            return list(write_batch(batch, settings, memory_beside=memory_beside))
    except ReducerError as error:
        return str(error)
