"""Carry a plan out: hash what is left, rank it, then write what follows from the whole ledger."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from reducer.errors import BudgetError, ListingError, LostLockError, ReducerError, TooManyFailuresError
from reducer.photos.seen import DECODE_POLICY
from reducer.run.apply_rules import apply_filters
from reducer.run.counters import Counters
from reducer.run.dask.dispatch import Dispatch
from reducer.run.dask.workers import Workers
from reducer.run.folder import RunFolder
from reducer.run.monitor import Monitor
from reducer.run.plan.plan import Plan
from reducer.run.presence import find_absent
from reducer.run.remaining import Remaining
from reducer.run.summary import outcome, plan_figures, shard_figures
from reducer.run.tasks.serial import InProcess
from reducer.run.tasks.tasks import PartitionTasks, ShardTasks
from reducer.run.write_results import write_partitions, write_pieces
from reducer.selection.cross_label import cross_label_table
from reducer.storage.schemas import FAILED, ListForm
from reducer.storage.tables import EXAMPLES

log = logging.getLogger("reducer")


@dataclass
class Run:
    """A run that has a plan, and what it is carried out with.

    Attributes
    ----------
    remaining : Remaining
        What is left to do, in a run folder that is locked by this process and holds the plan.
    counters : Counters
        Counts of the run.
    summary : dict
        Content of ``summary.json`` but for the counts.
    workers : Workers
        Make executors.
    terms : dict
        What goes with the plan.
    """

    remaining: Remaining
    counters: Counters
    summary: dict[str, Any]
    workers: Workers
    terms: dict[str, Any]

    @property
    def plan(self) -> Plan:
        """The whole plan."""
        return self.remaining.plan

    @property
    def folder(self) -> RunFolder:
        """The run folder."""
        return self.remaining.folder

    def execute(self, executor: InProcess | Dispatch, open_cluster: ExitStack) -> Collection[str]:
        """Do what is left to do, and write all that follows from the ledger, but for the report.

        Parameters
        ----------
        executor : InProcess or Dispatch
            Does the first tasks.
        open_cluster : ExitStack
            Closed when all photos are hashed, unless a report is to be drawn.

        Returns
        -------
        collection of str
            Addresses of workers that are to get no more work.
        """
        counters = self.counters
        counters.begun = time.perf_counter()
        counters.pieced = self.plan.pieced if self.plan.is_listed else None
        self._write_reused_shards()
        with counters.timing("hash"):
            executor = self._hash_and_rank(executor)
        left_out = executor.left_out if isinstance(executor, Dispatch) else ()
        with counters.timing("look"):
            absent = find_absent(self.plan, self.workers, left_out, progress=counters.progress)
        if not self.plan.job.report:  # the rest needs no workers
            with counters.timing("cluster_close"):
                open_cluster.close()
        with counters.timing("write"):
            figures = self._write_lists(absent)
        if self.plan.job.cross_label:
            with counters.timing("cross_label"):
                figures["cross_label_pairs"] = self._write_cross_label()
        if self.remaining.is_outdated:  # all that another policy has decoded was read again
            fingerprint = self.terms["fingerprint"] | {"decode_policy": DECODE_POLICY}
            self.folder.plan.write(self.plan.rows, self.terms | {"fingerprint": fingerprint})
            self.summary["decode_policy"] = DECODE_POLICY
        counters.timings["total_seconds"] = time.time() - counters.started
        self.folder.write_summary(
            self.summary
            | figures
            | counters.figures()
            | {"status": "done"}
            | {"photos_failed": figures["reasons"].get(FAILED, 0)}
        )
        return left_out

    def run_hash_stage(self, executor: InProcess | Dispatch) -> None:
        """Hash shards and pieces, and write what is found in each as it comes."""
        write_pieces(executor, self.remaining, self._monitor)

    @property
    def _monitor(self) -> Monitor:
        return Monitor(self.folder, self.counters, self.summary)

    def _write_reused_shards(self) -> None:
        """Write what an earlier run tells of shards that need not be read."""
        for number in sorted(self.remaining.spared - self.folder.pieces.done()):
            rows, report = self.remaining.reused[number]
            self.counters.hashed[number] = report.tally
            self.folder.pieces.write(number, rows, report)

    def _hash_and_rank(self, executor: InProcess | Dispatch) -> InProcess | Dispatch:
        """Do all tasks that are left; return the executor of the last of them."""
        is_hash_stage = isinstance(executor.tasks, ShardTasks) or executor.tasks.is_pieces
        if is_hash_stage:
            self.run_hash_stage(executor)
        if is_hash_stage or not self.plan.is_listed:
            executor = self._start_partitions(executor)
        write_partitions(executor, self.remaining, self._monitor)
        return executor

    def _start_partitions(self, before: InProcess | Dispatch) -> InProcess | Dispatch:
        """Make the executor that ranks, once all that is to be hashed in shards and pieces is hashed."""
        if not self.plan.is_listed:
            self.folder.parts.remove()  # ranked by an earlier list
            self.remaining = replace(self.remaining, plan=self.remaining.listed())
            terms = self.terms | {"is_listed": True, "manifest": dict(self.plan.manifest)}
            self.folder.plan.write(self.plan.rows, terms)
            self.summary |= plan_figures(self.plan)
        self.counters.pieced = self.plan.pieced
        tasks: PartitionTasks = self.remaining.partitions()
        return self.workers.take(tasks, before) if tasks.rows else InProcess(tasks)

    def _write_lists(self, absent: pa.Table) -> dict[str, Any]:
        """Complete the ledger, apply filters and budget, write the reduced list; return figures of all photos."""
        plan, folder, counters = self.plan, self.folder, self.counters
        job = plan.job
        folder.parts.write_unread(self.remaining.unread(absent), counters.unit)
        if job.has_filters:
            tallies, self.summary["effective_distance_reached"] = apply_filters(folder, plan)
            counters.done = {index: tallies[name] for index, name in folder.parts.done().items()}
        folder.lists.write_reduced(ListForm.of(self.summary), job.format, counters.unit)
        figures = outcome(plan, folder)
        if like := figures["labels_of_one_hash"]:
            log.warning(
                "in %d labels most photos have the same hash (%s): they are copies, or pictures that this hash "
                "does not tell apart, such as plain scans; among those the order of their ids decides",
                len(like),
                ", ".join(map(repr, like[:EXAMPLES])) + (", ..." if len(like) > EXAMPLES else ""),
            )
        if plan.shards is not None:
            figures["shards"] = shard_figures(plan, folder)
        return figures

    def _write_cross_label(self) -> int:
        """Write the near copies under different labels; return how many pairs there are."""
        ledger = self.folder.parts.ledger(["id", "label", "path", "hash"])
        pairs = cross_label_table(ledger, self.plan.job.hash_size**2)
        self.folder.lists.write_cross_label(pairs)
        count: int = pairs.num_rows
        return count


@contextmanager
def recording_stop(
    folder: RunFolder, summary: dict[str, Any], counters: Counters, go_on: str | None = None
) -> Iterator[None]:
    """Note in ``summary.json`` how far the run came, whatever stops it meanwhile, and say how to resume it.

    Parameters
    ----------
    folder : RunFolder
        The run folder.
    summary : dict
        Content of ``summary.json`` but for the counts.
    counters : Counters
        Counts of the run.
    go_on : str, optional
        How to resume it; default `reducer resume`.
    """
    try:
        yield
    except BaseException as stop:
        with suppress(ReducerError):  # a full disk has no room for it either, and is what is reported
            folder.write_summary(summary | counters.figures() | {"status": "stopped"})
        if isinstance(stop, KeyboardInterrupt) and not stop.args:  # a notebook shows this last
            again = go_on or f"the same call again, or reducer.resume({folder.path!r})"
            stop.args = (f"What was hashed so far is kept. To go on: {again}",)
        if isinstance(stop, BudgetError | ListingError):
            more = "more" if isinstance(stop, BudgetError) else "other options"
            advice = f"run again with {more}, another --output and --reuse {folder.path}"
            stop.args = (f"{stop}. All photos are hashed: to read none of them again, {advice}",)
        elif isinstance(stop, ReducerError) and not isinstance(stop, TooManyFailuresError | LostLockError):
            stop.args = (
                f"{stop}. What was hashed so far is kept. To go on: {go_on or f'reducer resume {folder.path}'}",
            )
        raise
