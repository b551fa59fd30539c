"""Plan a run before it is executed: which photos are read, and in which partitions. Pure but for the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from reducer.config.job import Job, member_keys
from reducer.config.resolved import ResolvedJob
from reducer.draw import CANDIDATES, TRIAL_LABELS, draw_order
from reducer.errors import BudgetError, InputError, nearest
from reducer.run.plan.keep_avoid import find_always_keep
from reducer.run.plan.manifest import Manifest, read_manifest
from reducer.run.plan.partitions import assign, largest_whole, partition_count, piece_size, pieces
from reducer.run.plan.shards import find_shards
from reducer.run.tasks.tasks import Division
from reducer.storage.location import MemberKeys, Shard
from reducer.storage.schemas import (
    KEPT_SMALL_LABEL,
    LEDGER_SCHEMA,
    MANIFEST_SCHEMA,
    NOT_SAMPLED,
    PLAN_SCHEMA,
    TASK_SCHEMA,
)
from reducer.storage.tables import release_unused, with_column


@dataclass(frozen=True)
class Plan:
    """All photos of a run, and which of them are read where; ``RUN/plan.parquet`` keeps it.

    Attributes
    ----------
    job : ResolvedJob
        Job that is planned.
    rows : pyarrow.Table
        `PLAN_SCHEMA` rows of all photos, of the chosen labels only, sorted by (label, id). The partitions are null
        before `numbered`, and the paths where `reducer.storage.paths.with_paths` makes them.
    manifest : mapping
        Figures of the manifest for ``summary.json``.
    shards : tuple of Shard, optional
        Shards that the photos lie in. The paths of the rows are then keys of the photos (`member_keys`).
    is_listed : bool
        Whether the photos are known; without a manifest, shards have to be read first.
    """

    job: ResolvedJob
    rows: pa.Table
    manifest: Mapping[str, Any]
    shards: tuple[Shard, ...] | None = None
    is_listed: bool = True

    @cached_property
    def labels(self) -> Labels:
        """Labels of all rows."""
        return Labels.of(self.rows["label"])

    @cached_property
    def is_read(self) -> NDArray[np.bool_]:
        """True for rows that are read, shape (rows,)."""
        mask: NDArray[np.bool_] = pc.is_null(self.rows["reason"]).to_numpy()
        return mask

    @property
    def small(self) -> NDArray[np.bool_]:
        """True for rows of labels that are kept whole, unread, shape (rows,)."""
        mask: NDArray[np.bool_] = pc.fill_null(pc.equal(self.rows["reason"], KEPT_SMALL_LABEL), False).to_numpy()
        return mask

    @property
    def checks_unread(self) -> bool:
        """True if it is looked whether photos that are kept unread are there; shards tell it in any case."""
        return self.shards is not None or (self.job.check and self.job.hashes_photos)

    @cached_property
    def read(self) -> pa.Table:
        """`TASK_SCHEMA` rows to read."""
        return self.rows.select(TASK_SCHEMA.names).filter(pa.array(self.is_read))

    @property
    def read_label(self) -> NDArray[np.int32]:
        """Number of the label of each row to read."""
        return self.labels.of_row[self.is_read]

    @property
    def unread(self) -> pa.Table:
        """`PLAN_SCHEMA` rows of the photos that are not read."""
        return self.rows.filter(pa.array(~self.is_read))

    @cached_property
    def always_kept_rows(self) -> NDArray[np.int64]:
        """``row`` of the photos that are always kept."""
        rows: NDArray[np.int64] = self.rows.filter(self.rows["always_keep"])["row"].to_numpy()
        return rows

    def assigned(self, threads: int) -> NDArray[np.int32]:
        """Assign each row to read to a partition.

        Parameters
        ----------
        threads : int
            Worker threads in all; decides the number of partitions, and nothing else.

        Returns
        -------
        ndarray of int32, shape (rows to read,)
            Partitions are numbered by falling number of photos, so that the end of the job is short.
        """
        if self.shards is None:
            return _assigned(self.job, self.read_label, threads, largest_whole(*self._size(threads)))
        return _assigned(self.job, self.read_label, threads)

    def numbered(self, threads: int) -> Plan:
        """Return this plan with its partitions, and for single files the pieces of labels too large for one task."""
        chosen = pa.array(self.is_read)
        nulls = pa.nulls(self.rows.num_rows, pa.int32())
        partition = pc.replace_with_mask(nulls, chosen, pa.array(self.assigned(threads)))
        rows = with_column(self.rows, "partition", partition)
        if self.shards is None and self.job.hashes_photos:
            size = self._size(threads)
            number = pieces(self.read_label, largest_whole(*size), piece_size(*size))
            piece = pc.replace_with_mask(nulls, chosen, pa.array(number, mask=number < 0))
            rows = with_column(rows, "piece", piece)
        return replace(self, rows=rows)

    def _size(self, threads: int) -> tuple[int, int, int | None]:
        return int(self.is_read.sum()), threads, self.job.partition_images

    @property
    def pieced(self) -> frozenset[int]:
        """Partitions whose photos are hashed in pieces, or by the shard, before they are ranked."""
        return pieced_partitions(self.rows, self.shards is not None)

    def pieces(self, rows: pa.Table | None = None) -> Division:
        """Divide the rows into pieces by number; parameters as for `partitions`."""
        return self._divided("piece", rows)

    def with_all_ranked(self, threads: int) -> Plan:
        """Return this plan with labels that were kept whole read too, in partitions after the others.

        Parameters
        ----------
        threads : int
            Worker threads in all.
        """
        small = self.small
        largest = pc.max(self.rows["partition"]).as_py()
        first = 0 if largest is None else largest + 1
        new = first + _assigned(self.job, self.labels.of_row[small], threads)
        chosen = pa.array(small)
        partition = pc.replace_with_mask(self.rows["partition"], chosen, pa.array(new))
        reason = pc.replace_with_mask(self.rows["reason"], chosen, pa.nulls(int(small.sum()), pa.string()))
        rows = with_column(with_column(self.rows, "partition", partition), "reason", reason)
        return replace(self, job=replace(self.job, rank_all=True), rows=rows)

    def partitions(self, rows: pa.Table | None = None) -> Division:
        """Divide the rows into partitions by number, in the order in which they are to be done.

        Parameters
        ----------
        rows : pyarrow.Table, optional
            The rows to read (`read`), in their order, with further columns; default all rows of the plan.
        """
        return self._divided("partition", rows)

    def _divided(self, by: str, rows: pa.Table | None) -> Division:
        """Divide rows by their number in a column of the plan; rows without one, such as unread ones, are left out."""
        number = pc.fill_null(self.rows[by], -1).to_numpy()
        if rows is None:
            return Division.by(number, self.rows.select(TASK_SCHEMA.names))
        return Division.by(number[self.is_read], rows)


def as_unread(rows: pa.Table) -> pa.Table:
    """Return `LEDGER_SCHEMA` rows of photos that are not read, from those of `Plan.unread`."""
    kept = pc.equal(rows["reason"], KEPT_SMALL_LABEL)
    known = {name: rows[name] for name in (*MANIFEST_SCHEMA.names, "reason")}
    known["kept"] = kept
    known["nearest_kept"] = pc.if_else(kept, rows["id"], pa.scalar(None, pa.string()))
    columns = [known.get(f.name, pa.nulls(rows.num_rows, f.type)) for f in LEDGER_SCHEMA]
    return pa.table(columns, schema=LEDGER_SCHEMA)


def pieced_partitions(rows: pa.Table, in_shards: bool) -> frozenset[int]:
    """Return `Plan.pieced`, from the rows of a plan and whether its photos lie in shards."""
    partition = rows["partition"].drop_null() if in_shards else rows["partition"].filter(pc.is_valid(rows["piece"]))
    return frozenset(pc.unique(partition).to_pylist())


@dataclass(frozen=True)
class Labels:
    """The labels of a sorted table.

    Attributes
    ----------
    names : list of str
        Names, sorted.
    starts : ndarray of int64, shape (labels + 1,)
        First row of each label, and the end.
    of_row : ndarray of int32, shape (rows,)
        Number of the label of each row.
    """

    names: list[str]
    starts: NDArray[np.int64]
    of_row: NDArray[np.int32]

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> Labels:
        """Return the labels of a column in which equal labels stand together."""
        ends = pc.run_end_encode(column.combine_chunks(), run_end_type=pa.int64())
        starts = np.concatenate([[0], ends.run_ends.to_numpy()]).astype(np.int64)
        numbers = np.arange(len(starts) - 1, dtype=np.int32)
        return cls(ends.values.to_pylist(), starts, np.repeat(numbers, np.diff(starts)))

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Rows per label."""
        return np.diff(self.starts)


def make_plan(job: ResolvedJob) -> Plan:
    """Find the photos, choose the labels, draw the candidates.

    Parameters
    ----------
    job : ResolvedJob
        ResolvedJob to plan.

    Raises
    ------
    InputError
        If IMAGES, the manifest, the chosen labels or the ids to keep are wrong.
    """
    listed = find_shards(job)
    shards = None if listed is None else tuple(listed)
    keys = None if listed is None else member_keys(job)
    if keys is MemberKeys.SAMPLE:
        return Plan(job, PLAN_SCHEMA.empty_table(), {}, shards, is_listed=False)
    manifest = read_manifest(job, keys)
    release_unused()
    return plan_of(job, manifest, shards)


def plan_of(job: ResolvedJob, manifest: Manifest, shards: tuple[Shard, ...] | None = None) -> Plan:
    """Choose the labels, draw the candidates.

    Parameters
    ----------
    job : ResolvedJob
        ResolvedJob to plan.
    manifest : Manifest
        The photos.
    shards : tuple of Shard, optional
        Shards that they lie in.

    Raises
    ------
    InputError
        If the chosen labels or the ids to keep are wrong.
    """
    table = manifest.table
    labels = Labels.of(table["label"])
    chosen = _choose_labels(job, labels.names)
    always_keep = find_always_keep(job, table["id"])
    if chosen is not None:
        is_chosen = np.isin(labels.of_row, chosen)
        table, always_keep = table.filter(pa.array(is_chosen)), always_keep[is_chosen]
        labels = Labels.of(table["label"])
    _check_always_keep(job, labels, always_keep)
    sizes = labels.sizes
    ranked = np.ones(len(sizes), dtype=bool) if job.reads_all or job.keep is None else sizes > job.keep
    read = ranked[labels.of_row]
    if job.candidates is not None:
        crowded = np.flatnonzero(ranked & (sizes > job.candidates))
        read[_not_drawn(table["id"], labels, crowded, always_keep, job.candidates, job.seed)] = False
    _check_total(job, labels.of_row[read], always_keep[read])

    reasons = pa.array([KEPT_SMALL_LABEL, NOT_SAMPLED])
    columns = {
        **{name: table[name] for name in MANIFEST_SCHEMA.names},
        "always_keep": pa.array(always_keep),
        "partition": pa.nulls(table.num_rows, pa.int32()),
        "piece": pa.nulls(table.num_rows, pa.int32()),
        "reason": reasons.take(pa.array(ranked[labels.of_row].astype(np.int8), mask=read)),
    }
    return Plan(
        job=job,
        rows=pa.table([columns[name] for name in PLAN_SCHEMA.names], schema=PLAN_SCHEMA),
        manifest=manifest.figures(),
        shards=shards,
    )


def _not_drawn(
    ids: pa.ChunkedArray,
    labels: Labels,
    crowded: NDArray[np.int64],
    always_keep: NDArray[np.bool_],
    candidates: int,
    seed: int,
) -> NDArray[np.int64]:
    """Draw the candidates of labels with more photos than that; photos that are always kept come first.

    Parameters
    ----------
    ids : pyarrow.ChunkedArray of string, shape (rows,)
        Ids of all rows.
    labels : Labels
        Labels of all rows.
    crowded : ndarray of int64
        Numbers of the labels to draw from.
    always_keep : ndarray of bool, shape (rows,)
        True for photos that are always kept.
    candidates : int
        Photos to draw per label.
    seed : int
        Seed of the draw.

    Returns
    -------
    ndarray of int64
        Rows that are not drawn.
    """
    rows = [np.empty(0, dtype=np.int64)]
    for label in crowded.tolist():
        start, stop = int(labels.starts[label]), int(labels.starts[label + 1])
        label_ids = ids.slice(start, stop - start).to_pylist()
        drawn = start + np.array(draw_order(CANDIDATES, seed, labels.names[label], label_ids))
        always = always_keep[drawn]
        rows.append(np.concatenate([drawn[always], drawn[~always]])[candidates:])
    return np.concatenate(rows)


def _check_always_keep(job: ResolvedJob, labels: Labels, always_keep: NDArray[np.bool_]) -> None:
    """Refuse more photos of a label that are always kept than a label may keep."""
    wanted = np.bincount(labels.of_row, weights=always_keep, minlength=len(labels.names))
    if job.keep is not None and wanted.max() > job.keep:
        raise InputError(
            f"--always-keep {job.always_keep}: {int(wanted.max())} ids are of the label "
            f"{labels.names[int(wanted.argmax())]!r}, over --keep {job.keep}: raise --keep or take ids out"
        )


def _check_total(job: ResolvedJob, label: NDArray[np.int32], always_keep: NDArray[np.bool_]) -> None:
    """Refuse a budget of fewer photos than are guaranteed, before any is read."""
    rules = job.cut_rules
    if rules.total is None:
        return
    photos, always = np.bincount(label), np.bincount(label, weights=always_keep)
    if rules.keep is not None:
        photos = np.minimum(photos, rules.keep)
    least = int(np.maximum(np.minimum(photos, rules.guaranteed), always).sum())
    if least > rules.total:
        labels, kept = np.count_nonzero(photos), " and --always-keep" if always.any() else ""
        raise BudgetError(
            f"--total {rules.total} is under what is guaranteed, {rules.guaranteed} of each of {labels:,} labels "
            f"(--min-per-label){kept}: give at least --total {least}"
        )


def _assigned(job: Job, label: NDArray[np.int32], threads: int, most: int | None = None) -> NDArray[np.int32]:
    """Assign rows to partitions by the numbers of their labels; labels of more than `most` rows have one each."""
    photos = np.bincount(label)
    has_any = photos > 0
    compact, photos = np.cumsum(has_any) - 1, photos[has_any]  # without the labels that have no rows
    partition = np.zeros(len(photos), dtype=np.int32)
    large = photos > (len(label) if most is None else most)
    if not large.all():
        left = int(photos[~large].sum())
        partition[~large] = assign(photos[~large], partition_count(left, threads, job.partition_images))
    first = 0 if large.all() else int(partition[~large].max()) + 1
    partition[large] = np.arange(first, first + np.count_nonzero(large))
    of_row: NDArray[np.int32] = partition[compact][label]
    return of_row


def _choose_labels(job: Job, names: list[str]) -> NDArray[np.int64] | None:
    """Choose the labels of a trial run; return their numbers, sorted, or None for all."""
    if job.labels is None and job.limit_labels is None:
        return None
    number = {name: i for i, name in enumerate(names)}
    chosen = list(dict.fromkeys(names if job.labels is None else job.labels))
    for name in chosen:
        if name not in number:
            raise InputError(f"--labels: no photo has the label {name!r}{nearest(name, names)}")
    if not chosen:
        raise InputError("--labels names no label")
    if job.limit_labels is not None:
        drawn = draw_order(TRIAL_LABELS, job.seed, "", chosen)[: job.limit_labels]
        chosen = [chosen[i] for i in drawn]
    return np.array(sorted(number[name] for name in chosen))
