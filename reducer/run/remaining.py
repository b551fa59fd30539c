"""Work out what is left to do of a plan: shards and pieces to hash, then partitions to rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from reducer.config.job import member_keys, path_rule
from reducer.errors import InputError, ListingError
from reducer.run.fingerprint import hashed_otherwise
from reducer.run.folder import RunFolder
from reducer.run.folder.files import ROW_GROUP
from reducer.run.join import join_plan, missing_error, unread_rows, with_failures, with_results, without_errors
from reducer.run.known import Reuse, as_known, join_known, without_outdated
from reducer.run.plan.manifest import samples
from reducer.run.plan.plan import Plan, as_unread, plan_of
from reducer.run.tasks.given_vectors import GivenVectors
from reducer.run.tasks.messages import PieceReport, wanted_keys
from reducer.run.tasks.tasks import Division, PartitionTasks, ShardTasks
from reducer.run.tasks.vector_files import VectorFiles
from reducer.storage.codecs import Hashes, VectorSpool, spooled
from reducer.storage.location import MemberKeys
from reducer.storage.paths import with_paths
from reducer.storage.schemas import FAILED, KNOWN_SCHEMA, SPOOLED_SCHEMA, TASK_SCHEMA
from reducer.storage.tables import with_column


@dataclass(frozen=True)
class Remaining:
    """The tasks of a plan that are left to do.

    Attributes
    ----------
    plan : Plan
        The plan.
    folder : RunFolder
        Run folder, which holds what is done.
    threads : int
        Worker threads in all.
    avoid : ndarray of uint8, shape (m, hash bytes), or None
        Packed hashes to avoid.
    reuse : Reuse or None
        Earlier run whose hashes are reused.
    failed : tuple of int
        Partitions whose failed photos are to be retried.
    again : frozenset of int
        Shards that are to be read again; all labels are ranked anew then.
    is_begun : bool
        Whether the content of the folder is of this run, or of an earlier one that is still to be removed.
    vectors : VectorFiles or None
        The given vectors.
    is_outdated : bool
        Whether what is in the folder was decoded by another policy: photos of which that may matter are read again.
    """

    plan: Plan
    folder: RunFolder
    threads: int
    avoid: Hashes | None = None
    reuse: Reuse | None = None
    failed: tuple[int, ...] = ()
    again: frozenset[int] = frozenset()
    is_begun: bool = True
    vectors: VectorFiles | None = None
    is_outdated: bool = False

    @cached_property
    def spool(self) -> VectorSpool:
        """Spool of the vectors that are known."""
        return VectorSpool() if self.reuse is None else self.reuse.spool

    @property
    def keys(self) -> MemberKeys | None:
        """Kind of key that identifies photos in shards; None for single files."""
        return None if self.plan.shards is None else member_keys(self.plan.job)

    @property
    def is_retry(self) -> bool:
        """True where photos or shards that have failed are retried."""
        return bool(self.failed or self.again)

    @cached_property
    def reused(self) -> dict[int, tuple[pa.Table, PieceReport]]:
        """Rows (`HASHES_SCHEMA`) and reports of shards that an earlier run has read, by their numbers."""
        if self.reuse is None or self.plan.shards is None or self.keys is None:
            return {}
        return self.reuse.pieces(self.plan.shards, self.keys)

    @cached_property
    def _known(self) -> pa.Table:
        """Reused rows of shards (`SPOOLED_SCHEMA`), one for each row of the plan."""
        tables = [spooled(rows, self.spool) for rows, _ in self.reused.values()]
        return join_plan(self.plan, pa.concat_tables(tables), self.keys)

    @cached_property
    def spared(self) -> frozenset[int]:
        """Shards that need not be read, since all their rows are reused."""
        if self.reuse is not None and self.keys is not None and self.plan.is_listed and self.reused:
            known = self._known
            if self.reuse.may_hold(self.plan.rows["path"].filter(pc.is_null(known["key"])), self.keys):
                return frozenset()
        return frozenset(self.reused)

    def first(self) -> PartitionTasks | ShardTasks:
        """Return the tasks of the first stage that is not done."""
        return self.pieces() or self.partitions()

    def pieces(self) -> PartitionTasks | ShardTasks | None:
        """Return the tasks of the shards and pieces that are left; None where there are none."""
        done = self.folder.pieces.done() if self.is_begun else frozenset()
        job = self.plan.job
        if self.plan.shards is None:
            if not self.plan.pieced:
                return None
            rows = self.plan.pieces(self._read_with_known).without(done)
            return PartitionTasks(job, rows, is_pieces=True, spool=self.spool) if rows else None
        left = [shard for shard in self.plan.shards if shard.number not in done and shard.number not in self.spared]
        left += [shard for shard in self.plan.shards if shard.number in self.again & done]
        if not left:
            return None
        wanted = None
        if self.keys is not MemberKeys.SAMPLE:
            hashed = self.plan.is_read & job.hashes_photos
            if self.reused:
                hashed = hashed & pc.is_null(self._known["hash"]).to_numpy()
            wanted = wanted_keys(self.plan.rows["path"].to_pylist(), hashed)
        return ShardTasks.of(job, left, wanted, self.threads)

    def hashes(self) -> pa.Table:
        """Read the rows (`SPOOLED_SCHEMA`) of all shards and pieces, of this run and reused, in their order."""
        done = self.folder.pieces.done() if self.is_begun else frozenset()
        tables = [self.folder.pieces.read_all(self.spool)] if done else [SPOOLED_SCHEMA.empty_table()]
        if self.is_outdated:
            tables = list(map(without_outdated, tables))
        tables += [spooled(self.reused[number][0], self.spool) for number in self.spared - done]
        rows = pa.concat_tables(tables)
        if len(tables) == 1:
            return rows
        # In the order of the shards: of rows with the same key the last counts.
        number = pc.index_in(rows["shard"], value_set=pa.array([shard.path for shard in self.plan.shards or ()]))
        return rows.take(pa.array(np.argsort(number.to_numpy(), kind="stable")))

    def listed(self) -> Plan:
        """Make the plan of photos that are known only once their shards are read.

        Raises
        ------
        ListingError
            If the options do not fit them.
        """
        try:
            return plan_of(self.plan.job, samples(self.hashes()), self.plan.shards).numbered(self.threads)
        except InputError as error:
            raise ListingError(str(error)) from None

    def partitions(self) -> PartitionTasks:
        """Return the tasks of the partitions that are left, and of those to retry the labels with failures."""
        plan = self.plan
        names = self.folder.parts.done() if self.is_begun and not self.again else {}
        pieced = plan.pieced if plan.is_listed else frozenset()
        if plan.shards is not None:
            rows = with_results(plan, self._joined, self.missing) if plan.is_listed else None
            partitions = plan.partitions(without_errors(rows) if rows is not None and self.is_retry else rows)
        else:
            partitions = plan.partitions(self._read_with_known)
            if pieced:
                partitions |= self._hashed_in_pieces()
        left = partitions.without(names)
        left |= self._retried(partitions, names)
        given = None if self.vectors is None or not left else GivenVectors(self.vectors, plan.job.source, left)
        trusted = pieced | frozenset(self.failed)
        return PartitionTasks(plan.job, left, trusted, avoid=self.avoid, spool=self.spool, given=given)

    def _retried(self, partitions: Division, names: Mapping[int, str]) -> dict[int, pa.Table]:
        """Return the rows of labels with failures in the partitions to retry, with what is known of their photos.

        Parameters
        ----------
        partitions : Division
            Rows of all partitions.
        names : mapping of int to str
            Part files of the partitions that are done.
        """
        plan, retried = self.plan, {}
        numbers = () if self.again else self.failed
        vector_parts = self.folder.vectors.names() if numbers and plan.job.embed is not None else []
        for number in numbers:
            ledger, _ = self.folder.parts.read(names[number])
            again = pc.equal(ledger["reason"], FAILED)
            if self.is_outdated:
                again = pc.or_(again, hashed_otherwise(ledger))
            labels = pc.unique(ledger.filter(again)["label"])
            rows = partitions[number]
            rows = rows.filter(pc.is_in(rows["label"], value_set=labels))
            if plan.job.embed is not None:
                vectors = self.folder.vectors.read(names[number], ledger.num_rows, vector_parts)
                ledger = ledger.append_column("vector", self.spool.put(vectors))
            ledger = ledger.filter(pc.invert(again))
            known = join_known(rows.select(TASK_SCHEMA.names), as_known(ledger), plan.job)
            rows = rows if plan.shards is not None else rows.select(TASK_SCHEMA.names)
            retried[number] = _with_known(rows, known, pc.is_valid(known["known_hash"]))
        return retried

    @property
    def _read_with_known(self) -> pa.Table | None:
        """Single files to read, with what an earlier run knows of them; None without an earlier run."""
        return None if self.reuse is None else join_known(self.plan.read, self.reuse.known, self.plan.job)

    def _hashed_in_pieces(self) -> Division:
        """Return the partitions of single files that were hashed in pieces, with their hashes."""
        rows = self.plan.rows
        plan = replace(self.plan, rows=with_paths(path_rule(self.plan.job), rows.filter(pc.is_valid(rows["piece"]))))
        rows = with_results(plan, join_plan(plan, self.hashes(), self.keys), self.missing)
        return plan.partitions(rows.select([*TASK_SCHEMA.names, *KNOWN_SCHEMA.names]))

    @cached_property
    def _joined(self) -> pa.Table:
        """Rows of the shards, one for each row of the plan; asked for only when all shards are done."""
        return join_plan(self.plan, self.hashes(), self.keys)

    @cached_property
    def missing(self) -> str:
        """Error of photos that no shard holds."""
        return missing_error(self.folder.pieces.reports() if self.is_begun else {})

    def unread(self, absent: pa.Table) -> Iterator[pa.Table]:
        """Yield `LEDGER_SCHEMA` rows of the photos that are not read, those of one part file at a time.

        Parameters
        ----------
        absent : pyarrow.Table
            ``row`` and ``error`` of single files that are not there.
        """
        plan, in_shards = self.plan, self.plan.shards is not None
        rows = unread_rows(plan, self._joined, self.missing) if in_shards else plan.unread
        for start in range(0, rows.num_rows, ROW_GROUP):
            part = rows.slice(start, ROW_GROUP)
            if not in_shards:
                part = as_unread(with_paths(path_rule(plan.job), part))
                if absent.num_rows:
                    error = absent["error"].take(pc.index_in(part["row"], value_set=absent["row"].combine_chunks()))
                    part = with_failures(part, error)
            yield part


def _with_known(rows: pa.Table, known: pa.Table, where: pa.ChunkedArray) -> pa.Table:
    """Replace the `KNOWN_SCHEMA` columns of some rows; those that other rows lack are null there.

    Parameters
    ----------
    rows : pyarrow.Table
        Rows of a partition.
    known : pyarrow.Table
        The columns, row by row.
    where : pyarrow.ChunkedArray of bool
        Which rows to replace.
    """
    for field in KNOWN_SCHEMA:
        if field.name in rows.column_names:
            rows = with_column(rows, field.name, pc.if_else(where, known[field.name], rows[field.name]))
        else:
            nothing = pa.scalar(None, field.type)
            rows = rows.append_column(field, pc.if_else(where, known[field.name], nothing))
    return rows
