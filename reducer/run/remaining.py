"""What is left to do of a plan: shards and pieces to hash, then partitions to rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from reducer.config.job import member_keys, path_rule
from reducer.errors import InputError, ListingError
from reducer.run.folder import RunFolder
from reducer.run.folder.files import ROW_GROUP
from reducer.run.join import join_plan, missing_error, unread_rows, with_results, without_errors
from reducer.run.known import Reuse, as_known, join_known
from reducer.run.plan.manifest import samples
from reducer.run.plan.plan import Plan, as_unread, plan_of
from reducer.run.tasks.given_vectors import Routing
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
    """What is left to do of a plan.

    Attributes
    ----------
    plan : Plan
        The plan.
    folder : RunFolder
        What is done stands there.
    threads : int
        Worker threads in all.
    avoid : ndarray of uint8, shape (m, hash bytes), or None
        Hashes to avoid.
    reuse : Reuse or None
        The run whose hashes are taken.
    failed : tuple of int
        Partitions of which the photos that have failed are to be tried again.
    again : frozenset of int
        Shards that are to be read again; all labels are ranked anew then.
    is_begun : bool
        Whether what is in the folder is of this run; or of an earlier one that is still to be taken out.
    vectors : VectorFiles or None
        The vectors that are given.
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

    @cached_property
    def aside(self) -> VectorSpool:
        """Holds the vectors that are known."""
        return VectorSpool() if self.reuse is None else self.reuse.aside

    @property
    def keys(self) -> MemberKeys | None:
        """What photos in shards are told by; None for single files."""
        return None if self.plan.shards is None else member_keys(self.plan.job)

    @property
    def is_retry(self) -> bool:
        """Whether what has failed is tried again."""
        return bool(self.failed or self.again)

    @cached_property
    def reused(self) -> dict[int, tuple[pa.Table, PieceReport]]:
        """What an earlier run tells of shards, by their numbers."""
        if self.reuse is None or self.plan.shards is None or self.keys is None:
            return {}
        return self.reuse.pieces(self.plan.shards, self.keys)

    @cached_property
    def _known(self) -> pa.Table:
        """What an earlier run tells of the photos of the plan."""
        tables = [spooled(rows, self.aside) for rows, _ in self.reused.values()]
        return join_plan(self.plan, pa.concat_tables(tables), self.keys)

    @cached_property
    def spared(self) -> frozenset[int]:
        """Shards that need not be read, since an earlier run tells all of them."""
        if self.reuse is not None and self.keys is not None and self.plan.is_listed and self.reused:
            known = self._known
            if self.reuse.may_hold(self.plan.rows["path"].filter(pc.is_null(known["key"])), self.keys):
                return frozenset()
        return frozenset(self.reused)

    def first(self) -> PartitionTasks | ShardTasks:
        """What is to be done first."""
        return self.pieces() or self.partitions()

    def pieces(self) -> PartitionTasks | ShardTasks | None:
        """The shards and pieces that are left; None where there are none."""
        done = self.folder.pieces.done() if self.is_begun else frozenset()
        job = self.plan.job
        if self.plan.shards is None:
            if not self.plan.pieced:
                return None
            rows = self.plan.pieces(self._read_with_known).without(done)
            return PartitionTasks(job, rows, is_pieces=True, aside=self.aside) if rows else None
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

    def found(self) -> pa.Table:
        """All that was found in shards and pieces, and that an earlier run tells of shards that are spared."""
        done = self.folder.pieces.done() if self.is_begun else frozenset()
        tables = [self.folder.pieces.read_all(self.aside)] if done else [SPOOLED_SCHEMA.empty_table()]
        tables += [spooled(self.reused[number][0], self.aside) for number in self.spared - done]
        rows = pa.concat_tables(tables)
        if len(tables) == 1:
            return rows
        # In the order of the shards: of rows with one key the last holds.
        number = pc.index_in(rows["shard"], value_set=pa.array([shard.path for shard in self.plan.shards or ()]))
        return rows.take(pa.array(np.argsort(number.to_numpy(), kind="stable")))

    def listed(self) -> Plan:
        """The plan of photos that only the shards could tell.

        Raises
        ------
        ListingError
            If the options do not fit them.
        """
        try:
            return plan_of(self.plan.job, samples(self.found()), self.plan.shards).numbered(self.threads)
        except InputError as error:
            raise ListingError(str(error)) from None

    def partitions(self) -> PartitionTasks:
        """The partitions that are left, and of those with failures the labels that have them."""
        plan = self.plan
        names = self.folder.parts.done() if self.is_begun and not self.again else {}
        pieced = plan.pieced if plan.is_listed else frozenset()
        if plan.shards is not None:
            rows = with_results(plan, self._found_beside, self.missing) if plan.is_listed else None
            partitions = plan.partitions(without_errors(rows) if rows is not None and self.is_retry else rows)
        else:
            partitions = plan.partitions(self._read_with_known)
            if pieced:
                partitions |= self._hashed_in_pieces()
        left = partitions.without(names)
        retried = () if self.again else self.failed
        vector_parts = self.folder.vectors.names() if retried and plan.job.embed is not None else []
        for number in retried:
            ledger, _ = self.folder.parts.read(names[number])
            labels = pc.unique(ledger.filter(pc.equal(ledger["reason"], FAILED))["label"])
            own = partitions[number]
            own = own.filter(pc.is_in(own["label"], value_set=labels))
            if plan.job.embed is not None:
                vectors = self.folder.vectors.read(names[number], ledger.num_rows, vector_parts)
                ledger = ledger.append_column("vector", self.aside.put(vectors))
            before = join_known(own.select(TASK_SCHEMA.names), as_known(ledger), plan.job)
            own = own if plan.shards is not None else own.select(TASK_SCHEMA.names)
            left |= {number: _with_known(own, before, pc.is_valid(before["known_hash"]))}
        routing = None if self.vectors is None or not left else Routing.of(self.vectors, plan.job.source, left)
        trusted = pieced | frozenset(self.failed)
        return PartitionTasks(plan.job, left, trusted, avoid=self.avoid, aside=self.aside, routing=routing)

    @property
    def _read_with_known(self) -> pa.Table | None:
        """The single files to read with what an earlier run tells of them; None where there is none."""
        return None if self.reuse is None else join_known(self.plan.read, self.reuse.known, self.plan.job)

    def _hashed_in_pieces(self) -> Division:
        """The partitions of single files that were hashed in pieces, with what was found of them."""
        rows = self.plan.rows
        plan = replace(self.plan, rows=with_paths(path_rule(self.plan.job), rows.filter(pc.is_valid(rows["piece"]))))
        rows = with_results(plan, join_plan(plan, self.found(), self.keys), self.missing)
        return plan.partitions(rows.select([*TASK_SCHEMA.names, *KNOWN_SCHEMA.names]))

    @cached_property
    def _found_beside(self) -> pa.Table:
        """What was found in shards of each row of the plan; asked for only when all of them are done."""
        return join_plan(self.plan, self.found(), self.keys)

    @cached_property
    def missing(self) -> str:
        """The error of photos that no shard holds."""
        return missing_error(self.folder.pieces.reports() if self.is_begun else {})

    def unread(self) -> Iterator[pa.Table]:
        """`LEDGER_SCHEMA` rows of the photos that are not read, those of one part file at a time."""
        plan, in_shards = self.plan, self.plan.shards is not None
        rows = unread_rows(plan, self._found_beside, self.missing) if in_shards else plan.unread
        for start in range(0, rows.num_rows, ROW_GROUP):
            own = rows.slice(start, ROW_GROUP)
            yield own if in_shards else as_unread(with_paths(path_rule(plan.job), own))


def _with_known(rows: pa.Table, known: pa.Table, where: pa.ChunkedArray) -> pa.Table:
    """Rows with other `KNOWN_SCHEMA` columns in some places; null in the others where they have none."""
    for field in KNOWN_SCHEMA:
        if field.name in rows.column_names:
            rows = with_column(rows, field.name, pc.if_else(where, known[field.name], rows[field.name]))
        else:
            nothing = pa.scalar(None, field.type)
            rows = rows.append_column(field, pc.if_else(where, known[field.name], nothing))
    return rows
