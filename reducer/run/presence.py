"""Find the photos that are kept without being read and are not there."""

from __future__ import annotations

import sys
from collections.abc import Collection, Generator, Iterator
from contextlib import closing

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from tqdm.auto import tqdm

from reducer.config.cluster import ClusterSpec
from reducer.config.job import path_rule
from reducer.config.settings import Source
from reducer.errors import ClusterError, StoreError, one_line
from reducer.photos.presence import Batch, absent_in
from reducer.run.dask.pool import NothingCame, map_unordered
from reducer.run.dask.workers import Workers
from reducer.run.plan.plan import Plan
from reducer.storage.location import is_url
from reducer.storage.paths import with_paths

#: Photos that are looked for together.
BATCH = 10_000
#: How often photos are looked for that are lost with a worker.
MOST_ATTEMPTS = 5
#: What is found: ``row`` of the ledger, and the failure.
ABSENT_SCHEMA = pa.schema({"row": pa.int64(), "error": pa.string()})

#: What cannot be told, before why.
NOT_TOLD = "whether the photos that are kept unread are there is not known"


def is_looked_for(plan: Plan) -> NDArray[np.bool_]:
    """Tell which photos of a plan are looked for and not read, shape (rows,): those that are kept unread.

    Whether photos in shards are there is told by the shards, and a listing has seen files that have bytes.
    """
    if not plan.checks_unread or plan.shards is not None:
        return np.zeros(plan.rows.num_rows, dtype=bool)
    is_seen: NDArray[np.bool_] = pc.fill_null(pc.greater(plan.rows["bytes"], 0), False).to_numpy()
    return plan.small & ~is_seen


def looks_elsewhere(plan: Plan, spec: ClusterSpec) -> bool:
    """Tell whether photos are to be looked for that perhaps only the workers of the cluster see."""
    return (spec.address is not None or spec.class_path is not None) and bool(is_looked_for(plan).any())


def find_absent(plan: Plan, workers: Workers, left_out: Collection[str], *, progress: bool) -> pa.Table:
    """Look for all photos that are kept unread, on the workers or in this process.

    Parameters
    ----------
    plan : Plan
        The plan.
    workers : Workers
        Where.
    left_out : collection of str
        Addresses of workers that are asked nothing.
    progress : bool
        Whether to show a progress bar.

    Returns
    -------
    pyarrow.Table
        `ABSENT_SCHEMA`, in any order.

    Raises
    ------
    ClusterError
        If the workers do not tell.
    """
    rows = plan.rows.filter(pa.array(is_looked_for(plan)))
    if rows.num_rows and is_url(with_paths(path_rule(plan.job), rows.slice(0, 1))["path"][0].as_py()):
        rows = with_paths(path_rule(plan.job), rows).sort_by("path")  # a store lists in this order
    found = []
    outcomes = _outcomes(_batches(plan, rows), plan.job.source, workers, left_out)
    show = {"total": rows.num_rows, "unit": " photos", "delay": 1, "disable": not progress, "file": sys.stderr}
    with closing(outcomes), tqdm(desc="looking for photos that are not read", **show) as bar:
        for (start, paths), errors in outcomes:
            found += [(start + place, error) for place, error in errors.items()]
            bar.update(len(paths))
    places = np.array([place for place, _ in found], dtype=np.int64)
    return pa.table([rows["row"].take(places), [error for _, error in found]], schema=ABSENT_SCHEMA)


def _batches(plan: Plan, rows: pa.Table) -> Iterator[Batch]:
    for start in range(0, rows.num_rows, BATCH):
        yield start, with_paths(path_rule(plan.job), rows.slice(start, BATCH))["path"].to_pylist()


def _outcomes(
    batches: Iterator[Batch], source: Source, workers: Workers, left_out: Collection[str]
) -> Generator[tuple[Batch, dict[int, str]]]:
    """Yield each batch with the failures in it, by the places of the photos."""
    client, rules = workers.client, workers.spec.rules
    if client is None:
        for batch in batches:
            yield batch, absent_in(batch, source)
        return
    outcomes = map_unordered(
        *(client, absent_in, batches, source),
        name="look",
        avoid=left_out,
        wait=rules.wait,
        patience=rules.stall,
        attempts=MOST_ATTEMPTS,
    )
    try:
        with closing(outcomes):
            for outcome in outcomes:
                if isinstance(outcome.error, StoreError):
                    raise outcome.error
                if outcome.error is not None:
                    raise ClusterError(f"{NOT_TOLD}: a worker failed: {one_line(outcome.error)}")
                yield outcome.item, outcome.result
    except NothingCame:
        raise ClusterError(f"{NOT_TOLD}: no answer for {rules.stall:g} s (workers: stall)") from None
