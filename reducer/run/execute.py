"""The work of a run that has a plan: hash what is left, write each part as it comes, then what follows from all."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from reducer.config.job import path_rule
from reducer.errors import BudgetError, ListingError, LostLockError, ReducerError, TooManyFailuresError
from reducer.run.apply_rules import apply_filters
from reducer.run.counters import Counters
from reducer.run.dask.dispatch import Dispatch
from reducer.run.dask.workers import Workers
from reducer.run.folder import RunFolder
from reducer.run.join import as_ledger, merged
from reducer.run.plan.plan import Plan
from reducer.run.remaining import Remaining
from reducer.run.summary import outcome, plan_figures, shard_figures
from reducer.run.tasks.messages import PartitionResult, Piece, PiecesResult, Tally
from reducer.run.tasks.serial import InProcess
from reducer.run.tasks.tasks import PartitionTasks, ShardTasks
from reducer.selection.cross_label import cross_label_table
from reducer.selection.quality import reevaluate_ledger
from reducer.storage.codecs import NO_VECTOR
from reducer.storage.paths import with_paths
from reducer.storage.schemas import FAILED, from_ipc

if TYPE_CHECKING:
    pass

log = logging.getLogger("reducer")

#: A job whose first so many photos all fail has a wrong path, not bad photos.
ALL_FAILED = 200
#: Seconds between two notes in ``summary.json`` of how far a run has come.
NOTED_EVERY = 10.0


@dataclass
class Run:
    """A run that has a plan, and what it is carried out with.

    Attributes
    ----------
    todo : Remaining
        What is left to do, in a run folder that is locked by this process and holds the plan.
    session : Counters
        Counts.
    summary : dict
        What ``summary.json`` told before.
    workers : Workers
        Do it.
    terms : dict
        What goes with the plan.
    """

    todo: Remaining
    session: Counters
    summary: dict[str, Any]
    workers: Workers
    terms: dict[str, Any]

    @property
    def plan(self) -> Plan:
        """The whole plan."""
        return self.todo.plan

    @property
    def folder(self) -> RunFolder:
        """The run folder."""
        return self.todo.folder

    def execute(self, work: InProcess | Dispatch, open_cluster: ExitStack) -> Collection[str]:
        """Do what is left to do, and write all that follows from the ledger, but for the report.

        Parameters
        ----------
        work : InProcess or Dispatch
            Does what comes first.
        open_cluster : ExitStack
            Closed when all photos are hashed, unless a report is to be drawn.

        Returns
        -------
        collection of str
            Addresses of workers that are to get no more work.
        """
        session, folder = self.session, self.folder
        session.begun = time.perf_counter()
        session.pieced = self.plan.pieced if self.plan.is_listed else None
        for number in sorted(self.todo.spared - folder.pieces.done()):
            found, report = self.todo.reused[number]
            session.hashed[number] = report.tally
            folder.pieces.write(number, found, report)
        with session.timing("hash"):
            work = self._hash_and_rank(work)
        plan, job = self.plan, self.plan.job
        if not job.report:  # the rest needs no workers
            with session.timing("cluster_close"):
                open_cluster.close()
        with session.timing("write"):
            folder.parts.write_unread(self.todo.unread(), session.unit)
            if job.has_filters:
                tallies, self.summary["effective_distance_reached"] = apply_filters(folder, plan)
                session.done = {index: tallies[name] for index, name in folder.parts.done().items()}
            folder.lists.write_reduced(job.id_column, job.label_column, job.format, session.unit)
            found = outcome(plan, folder)
            if plan.shards is not None:
                found["shards"] = shard_figures(plan, folder)
        if job.cross_label:
            with session.timing("cross_label"):
                pairs = cross_label_table(folder.parts.ledger(["id", "label", "path", "hash"]), job.hash_size**2)
                folder.lists.write_cross_label(pairs)
            found["cross_label_pairs"] = pairs.num_rows
        session.timings["total_seconds"] = time.time() - session.started
        folder.write_summary(self.summary | found | session.figures() | {"status": "done"})
        return work.left_out if isinstance(work, Dispatch) else ()

    def _hash_and_rank(self, work: InProcess | Dispatch) -> InProcess | Dispatch:
        if isinstance(work.errand, ShardTasks) or work.errand.is_pieces:
            self.run_hash_stage(work)
            work = self._on_to_partitions(work)
        elif not self.plan.is_listed:
            work = self._on_to_partitions(work)
        errand = work.errand
        assert isinstance(errand, PartitionTasks)
        self._rank(errand, work)
        return work

    def _on_to_partitions(self, before: InProcess | Dispatch) -> InProcess | Dispatch:
        if not self.plan.is_listed:
            self.folder.parts.remove()  # ranked by an earlier list
            self.todo = replace(self.todo, plan=self.todo.listed())
            now = {"is_listed": True, "manifest": dict(self.plan.manifest)}
            self.folder.plan.write(self.plan.rows, self.terms | now)
            self.summary |= plan_figures(self.plan)
        self.session.pieced = self.plan.pieced
        errand = self.todo.partitions()
        return self.workers.take(errand, before) if errand.rows else InProcess(errand)

    def run_hash_stage(self, work: InProcess | Dispatch) -> None:
        """Write what is found in each shard or piece as it comes."""
        errand, folder, session = work.errand, self.folder, self.session
        in_shards, any_wrong = isinstance(errand, ShardTasks), False
        size = errand.bytes if isinstance(errand, ShardTasks) else errand.photos
        done, read = folder.pieces.done(), 0
        with self._working(work, size, "B" if in_shards else " photos") as (results, bar):
            for result in results:
                assert isinstance(result, PiecesResult)
                for piece in result.pieces:
                    found = from_ipc(piece.found)
                    if piece.report.wrong_md5:
                        pass  # what another look gave was of another shard
                    elif piece.number in done:
                        found = merged(folder.pieces.read(piece.number)[0], found)
                    elif piece.number in self.todo.reused:
                        found = merged(self.todo.reused[piece.number][0], found)
                    folder.pieces.write(piece.number, found, piece.report)
                    self._warn(piece)
                session.add_pieces(result)
                if isinstance(errand, ShardTasks):
                    own = sum(shard.bytes for shard in errand.groups[result.index])
                    self._warn_of_no_match(read / max(1, size), (read + own) / max(1, size), result)
                else:
                    own = errand.rows.size(result.index)
                read += own
                bar.update(own)
                any_wrong = any_wrong or any(piece.report.wrong_md5 for piece in result.pieces)
                self._noted(bar, give_up=not self.todo.again and not any_wrong)

    def _warn(self, piece: Piece) -> None:
        """Of a shard that is not as it should be, with progress bar and without."""
        report = piece.report
        path = next((shard.path for shard in self.plan.shards or () if shard.number == piece.number), "")
        with logging_redirect_tqdm([log]):
            if report.damage is not None:
                log.warning("shard %s: %s", path, report.damage)
            if report.wrong_md5:
                taken = "are taken all the same (--md5-warn)" if self.plan.job.md5_warn else "fail"
                log.warning(
                    "shard %s has the MD5 sum %s, not the published one: its photos %s", path, report.md5, taken
                )

    def _warn_of_no_match(self, before: float, now: float, result: PiecesResult) -> None:
        """Say so once where photos are looked for in shards, it seems, by other names than theirs.

        Parameters
        ----------
        before, now : float
            Shares of the shards that had been read before this result, and have been with it.
        result : PiecesResult
            The result.
        """
        wanted = self.plan.read.num_rows
        example = next((piece.report.example for piece in result.pieces if piece.report.example), None)
        # So many would have been there if they were spread evenly, which they need not be.
        if not before * wanted < ALL_FAILED <= now * wanted or example is None or self.session.total.read:
            return
        looked_for = self.plan.read["path"][0].as_py()
        with logging_redirect_tqdm([log]):
            log.warning(
                "the shards read so far hold no photo of the manifest. They hold %r, and the first photo is looked for "
                "by %r: check IMAGES, --manifest, --id-column, and --path-template or --path-column (without them a "
                "photo is told by its file's name without the extension)",
                example,
                looked_for,
            )

    def _rank(self, errand: PartitionTasks, work: InProcess | Dispatch) -> None:
        """Write each part as it comes."""
        folder, session = self.folder, self.session
        with self._working(work, errand.photos, " photos") as (results, bar):
            for result in results:
                assert isinstance(result, PartitionResult)
                rows = with_paths(path_rule(errand.job), errand.rows[result.index])
                found, tally = from_ipc(result.found), result.tally
                ledger = as_ledger(rows, found)
                vectors = found["vector"] if "vector" in found.column_names else None
                if result.index in self.todo.failed and not self.todo.again:
                    ledger, vectors, tally = self._merged(result, ledger, vectors)
                folder.parts.write(result.index, ledger, tally, session.unit, vectors)
                told = _told_before(rows) if result.index in (session.pieced or ()) else Tally()
                session.add(result, tally, told)
                bar.update(rows.num_rows)
                self._noted(bar, give_up=not self.todo.failed and self.plan.shards is None)

    @contextmanager
    def _working(self, work: InProcess | Dispatch, total: int, unit: str) -> Iterator[tuple[Iterator[Any], tqdm[Any]]]:
        results = work.results()
        with (
            closing(results),  # what is still running is cancelled while there is a client to do it
            tqdm(
                total=total,
                unit=unit,
                unit_scale=unit == "B",
                disable=not self.session.progress or not total,
                smoothing=0.1,
                file=sys.stderr,
            ) as bar,
        ):
            yield results, bar

    def _noted(self, bar: tqdm[Any], give_up: bool) -> None:
        """Show and note how far the run has come; give up where nothing comes of it."""
        session, own = self.session, self.session.own
        now = time.perf_counter()
        rate = own.bytes_read / 1e6 / max(now - session.begun, 1e-9)
        bar.set_postfix_str(f"{rate:.1f} MB/s, {own.failed} failed", refresh=False)
        if give_up and own.tried >= ALL_FAILED and own.failed == own.tried and not own.reused:
            if own.looked_up and not own.read:
                advice = "that the file of vectors is of these photos, and --id-column, which names its ids too"
            elif f": {NO_VECTOR}" in (session.first_failure or ""):
                advice = "the model, --embed-mean, --embed-std and --embed-output"
            else:
                advice = "IMAGES, --path-template or --path-column, and that the workers see this path"
            raise TooManyFailuresError(
                f"the first {own.tried} photos have all failed, so the run was given up. The first path tried: "
                f"{session.first_failure}. Check {advice}"
            )
        if now - session.noted > NOTED_EVERY:
            session.noted = now
            session.timings["hash_seconds"] = now - session.begun
            self.folder.write_summary(self.summary | session.figures())

    def _merged(
        self, result: PartitionResult, renewed: pa.Table, its_vectors: pa.ChunkedArray | None
    ) -> tuple[pa.Table, pa.ChunkedArray | None, Tally]:
        """A part of which some labels were ranked anew."""
        name = self.folder.parts.done()[result.index]
        before, tally = self.folder.parts.read(name)
        same = pc.invert(pc.is_in(before["label"], value_set=pc.unique(renewed["label"])))
        others, vectors = before.filter(same), None
        if its_vectors is not None:
            vectors = self.folder.vectors.read(name, before.num_rows, self.folder.vectors.names()).filter(
                same.combine_chunks()
            )
        always = np.isin(others["row"].to_numpy(), self.plan.always_kept_rows)
        others, quality, by_hash = reevaluate_ledger(others, vectors, always, self.plan.job.settings_without_model)
        ledger = pa.concat_tables([others, renewed])
        order = pc.sort_indices(ledger, [("label", "ascending"), ("id", "ascending")])
        if its_vectors is not None:
            its_vectors = pa.chunked_array([vectors, *its_vectors.chunks], pa.binary()).take(order)
        ledger = ledger.take(order)
        return (
            ledger,
            its_vectors,
            Tally(
                read=tally.read,
                failed=int(pc.sum(pc.equal(ledger["reason"], FAILED)).as_py()),
                reused=tally.reused,
                bytes_read=tally.bytes_read + result.tally.bytes_read,
                looked_up=tally.looked_up,
                quality=quality + result.tally.quality,
                by_hash=by_hash + result.tally.by_hash,
            ),
        )


def _told_before(rows: pa.Table) -> Tally:
    """What pieces or shards have told of the rows of a partition, and counted."""
    told = pc.or_(pc.is_valid(rows["known_hash"]), pc.is_valid(rows["known_error"]))
    told = pc.and_(told, pc.invert(rows["known_reused"]))
    if "shard" in rows.column_names:  # of what no shard holds none has told
        told = pc.and_(told, pc.is_valid(rows["shard"]))
    own = rows.filter(told)
    return Tally(
        read=own.num_rows,
        failed=own.num_rows - own["known_error"].null_count,
        bytes_read=pc.sum(own["known_bytes"]).as_py() or 0,
    )


@contextmanager
def recording_stop(
    folder: RunFolder, summary: dict[str, Any], session: Counters, go_on: str | None = None
) -> Iterator[None]:
    """Whatever stops the run meanwhile, ``summary.json`` tells how far it came, and the message how to go on.

    Parameters
    ----------
    folder : RunFolder
        The run folder.
    summary : dict
        What ``summary.json`` told before.
    session : Counters
        Counts.
    go_on : str, optional
        How; default `reducer resume`.
    """
    try:
        yield
    except BaseException as stop:
        with suppress(ReducerError):  # a full disk has no room for it either, and is what is reported
            folder.write_summary(summary | session.figures() | {"status": "stopped"})
        if isinstance(stop, BudgetError | ListingError):
            more = "more" if isinstance(stop, BudgetError) else "other options"
            advice = f"run again with {more}, another --output and --reuse {folder.path}"
            stop.args = (f"{stop}. All photos are hashed: to read none of them again, {advice}",)
        elif isinstance(stop, ReducerError) and not isinstance(stop, TooManyFailuresError | LostLockError):
            stop.args = (
                f"{stop}. What was hashed so far is kept. To go on: {go_on or f'reducer resume {folder.path}'}",
            )
        raise
