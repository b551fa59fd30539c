"""The work of a run that has a plan: hash what is left, write each part as it comes, then what follows from all."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm.auto import tqdm

from reducer.crosslabel import cross_label_table
from reducer.cutting import apply_filters
from reducer.dispatch import Dispatch, InProcess
from reducer.errors import BudgetError, LostLockError, ReducerError, TooManyFailuresError
from reducer.pipeline import ledger_rows
from reducer.plan import Errand, Plan
from reducer.quality import figures, judge_again
from reducer.schemas import FAILED
from reducer.store import RunFolder
from reducer.summary import outcome
from reducer.types import PartitionResult, Tally

#: A job whose first so many photos all fail has a wrong path, not bad photos.
ALL_FAILED = 200
#: Seconds between two notes in ``summary.json`` of how far a run has come.
NOTED_EVERY = 10.0


@dataclass
class Session:
    """How far a run has come, and what this process has done of it.

    Attributes
    ----------
    bits : int
        Bits of a hash.
    progress : bool
        Whether to show a progress bar.
    done : dict of int to Tally
        What each partition that is done has come to, also in earlier sessions.
    own : Tally
        What this session has done.
    worker_seconds : float
        Wall time of its partitions on their workers.
    peak_memory : int
        Highest resident memory of one of its workers, in bytes.
    first_failure : str or None
        ``path: error`` of the first photo that failed in it.
    started : float
        Seconds since 1970.
    timings : dict of str to float
        Seconds that its steps have taken.
    """

    bits: int
    progress: bool
    done: dict[int, Tally] = field(default_factory=dict)
    own: Tally = field(default_factory=Tally)
    worker_seconds: float = 0.0
    peak_memory: int = 0
    first_failure: str | None = None
    started: float = field(default_factory=time.time)
    timings: dict[str, float] = field(default_factory=dict)

    def add(self, result: PartitionResult, tally: Tally) -> None:
        self.done[result.index] = tally
        self.own += result.tally
        self.worker_seconds += result.seconds
        self.peak_memory = max(self.peak_memory, result.peak_memory)
        self.first_failure = self.first_failure or result.first_failure

    @property
    def total(self) -> Tally:
        return sum(self.done.values(), Tally())

    @contextmanager
    def timing(self, what: str) -> Iterator[None]:
        clock = time.perf_counter()
        try:
            yield
        finally:
            self.timings[f"{what}_seconds"] = time.perf_counter() - clock

    def figures(self) -> dict[str, Any]:
        """What ``summary.json`` tells of it: counts of the whole run, times of this session."""
        total, hashing = self.total, self.timings.get("hash_seconds")
        return {
            "partitions": len(self.done),
            "photos_read": total.read,
            "photos_read_this_time": self.own.read,
            "photos_reused": total.reused,
            "photos_failed": total.failed,
            "bytes_read": total.bytes_read,
            "photos_per_second": round(self.own.read / hashing, 1) if hashing and self.own.read else None,
            "timings": {name: round(seconds, 3) for name, seconds in self.timings.items()}
            | {"worker_seconds": round(self.worker_seconds, 3)},
            "worker_peak_memory_bytes": self.peak_memory,
            "quality": figures(total.quality, self.bits),
        }


def carry_out(
    plan: Plan,
    errand: Errand,
    work: InProcess | Dispatch,
    folder: RunFolder,
    session: Session,
    summary: dict[str, Any],
    open_cluster: ExitStack,
) -> None:
    """Do what is left to do, and write all that follows from the ledger.

    Parameters
    ----------
    plan : Plan
        The whole plan.
    errand : Errand
        What is left of it.
    work : InProcess or Dispatch
        Does it.
    folder : RunFolder
        Locked by this process; holds the plan.
    session : Session
        Counts.
    summary : dict
        What ``summary.json`` told before.
    open_cluster : ExitStack
        Closed when all photos are hashed.
    """
    job = plan.job
    with session.timing("hash"):
        _work_off(plan, errand, work, folder, session, summary)
    open_cluster.close()  # the rest needs no workers
    with session.timing("write"):
        if job.has_filters:
            tallies, summary["effective_distance_reached"] = apply_filters(folder, plan)
            session.done = {index: tallies[name] for index, name in folder.done_partitions().items()}
        folder.write_unread(plan.unread)
        folder.write_reduced(job.id_column, job.label_column, job.format)
        found = outcome(plan, folder)
    if job.cross_label:
        with session.timing("cross_label"):
            pairs = cross_label_table(folder.ledger(["id", "label", "path", "hash"]), job.hash_size**2)
            folder.write_cross_label(pairs)
        found["cross_label_pairs"] = pairs.num_rows
    session.timings["total_seconds"] = time.time() - session.started
    folder.write_summary(summary | found | session.figures() | {"status": "done"})


@contextmanager
def noting_a_stop(folder: RunFolder, summary: dict[str, Any], session: Session) -> Iterator[None]:
    """Whatever stops the run meanwhile, ``summary.json`` tells how far it came, and the message how to go on."""
    try:
        yield
    except BaseException as stop:
        with suppress(ReducerError):  # a full disk has no room for it either, and is what is reported
            folder.write_summary(summary | session.figures() | {"status": "stopped"})
        if isinstance(stop, BudgetError):
            advice = f"run again with more, another --output and --reuse {folder.path}"
            stop.args = (f"{stop}. All photos are hashed: to read none of them again, {advice}",)
        elif isinstance(stop, ReducerError) and not isinstance(stop, TooManyFailuresError | LostLockError):
            stop.args = (f"{stop}. What was hashed so far is kept. To go on: reducer resume {folder.path}",)
        raise


def _work_off(
    plan: Plan,
    errand: Errand,
    work: InProcess | Dispatch,
    folder: RunFolder,
    session: Session,
    summary: dict[str, Any],
) -> None:
    """Write each part as it comes."""
    results = work.results()
    clock = noted = time.perf_counter()
    with (
        closing(results),  # what is still running is cancelled while there is a client to do it
        tqdm(total=errand.photos, unit=" photos", disable=not session.progress, smoothing=0.1, file=sys.stderr) as bar,
    ):
        for result in results:
            ledger, tally = ledger_rows(errand.rows[result.index], result), result.tally
            if result.index in errand.trusted:
                ledger, tally = _merged(plan, folder, result, ledger)
            folder.write_part(result.index, ledger, tally)
            session.add(result, tally)
            now = time.perf_counter()
            rate = session.own.bytes_read / 1e6 / max(now - clock, 1e-9)
            bar.set_postfix_str(f"{rate:.1f} MB/s, {session.own.failed} failed", refresh=False)
            bar.update(errand.rows[result.index].num_rows)
            own = session.own
            if own.read >= ALL_FAILED and own.failed == own.read and not own.reused and not errand.trusted:
                raise TooManyFailuresError(
                    f"the first {own.read} photos have all failed, so the run was given up. The first path tried: "
                    f"{session.first_failure}. Check IMAGES, --path-template or --path-column, and that the workers "
                    "see this path"
                )
            if now - noted > NOTED_EVERY:
                noted = now
                session.timings["hash_seconds"] = now - clock
                folder.write_summary(summary | session.figures())


def _merged(plan: Plan, folder: RunFolder, result: PartitionResult, renewed: pa.Table) -> tuple[pa.Table, Tally]:
    """A part of which some labels were ranked anew."""
    before, tally = folder.read_part(folder.done_partitions()[result.index])
    others = before.filter(pc.invert(pc.is_in(before["label"], value_set=pc.unique(renewed["label"]))))
    always = np.isin(others["row"].to_numpy(), plan.always_kept_rows)
    others, quality = judge_again(others, always, plan.job.photo_settings)
    ledger = pa.concat_tables([others, renewed]).sort_by([("label", "ascending"), ("id", "ascending")])
    return ledger, Tally(
        read=tally.read,
        failed=int(pc.sum(pc.equal(ledger["reason"], FAILED)).as_py()),
        reused=tally.reused,
        bytes_read=tally.bytes_read + result.tally.bytes_read,
        quality=quality + result.tally.quality,
    )
