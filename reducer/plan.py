"""Plan first, then execute: which photos are read, and in which partitions. Pure but for reading the manifest."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from reducer.config import Job, nearest
from reducer.draw import CANDIDATES, TRIAL_LABELS, draw_order
from reducer.errors import BudgetError, InputError
from reducer.lists import find_always_keep
from reducer.manifest import path_rule, read_manifest
from reducer.partition import assign, partition_count
from reducer.ranking import FACILITY_LOCATION_CANDIDATES
from reducer.reuse import beside
from reducer.schemas import (
    KEPT_SMALL_LABEL,
    KNOWN_SCHEMA,
    LEDGER_SCHEMA,
    MANIFEST_SCHEMA,
    NOT_SAMPLED,
    PLAN_SCHEMA,
    TASK_SCHEMA,
    to_ipc,
)
from reducer.tables import with_column
from reducer.types import PartitionTask


@dataclass(frozen=True)
class Plan:
    """What a run does; ``RUN/plan.parquet`` keeps it.

    Attributes
    ----------
    job : Job
        Whose plan it is.
    rows : pyarrow.Table
        `PLAN_SCHEMA` rows of all photos, of the chosen labels only, sorted by (label, id). The partitions are null
        before `numbered`.
    manifest : mapping
        What ``summary.json`` tells of the manifest.
    """

    job: Job
    rows: pa.Table
    manifest: Mapping[str, Any]

    @cached_property
    def labels(self) -> Labels:
        """The labels of all rows."""
        return Labels.of(self.rows["label"])

    @cached_property
    def is_read(self) -> NDArray[np.bool_]:
        """Which rows are read."""
        found: NDArray[np.bool_] = pc.is_null(self.rows["reason"]).to_numpy()
        return found

    @property
    def small(self) -> NDArray[np.bool_]:
        """Which rows are of labels that are kept whole, unread."""
        found: NDArray[np.bool_] = pc.fill_null(pc.equal(self.rows["reason"], KEPT_SMALL_LABEL), False).to_numpy()
        return found

    @cached_property
    def read(self) -> pa.Table:
        """`TASK_SCHEMA` rows to read."""
        return self.rows.select(TASK_SCHEMA.names).filter(pa.array(self.is_read))

    @property
    def read_label(self) -> NDArray[np.int64]:
        """The number of the label of each row to read."""
        return self.labels.of_row[self.is_read]

    @property
    def unread(self) -> pa.Table:
        """`LEDGER_SCHEMA` rows of the photos that are not read."""
        rows = self.rows.filter(pa.array(~self.is_read))
        kept = pc.equal(rows["reason"], KEPT_SMALL_LABEL)
        known = {name: rows[name] for name in (*MANIFEST_SCHEMA.names, "reason")}
        known["kept"] = kept
        known["nearest_kept"] = pc.if_else(kept, rows["id"], pa.scalar(None, pa.string()))
        columns = [known.get(f.name, pa.nulls(rows.num_rows, f.type)) for f in LEDGER_SCHEMA]
        return pa.table(columns, schema=LEDGER_SCHEMA)

    @cached_property
    def always_kept_rows(self) -> NDArray[np.int64]:
        """``row`` of the photos that are always kept."""
        found: NDArray[np.int64] = self.rows.filter(self.rows["always_keep"])["row"].to_numpy()
        return found

    def assigned(self, threads: int) -> NDArray[np.int64]:
        """The partition of each row to read.

        Parameters
        ----------
        threads : int
            Worker threads in all; decides how many partitions there are, and nothing else.

        Returns
        -------
        ndarray of int64, shape (rows to read,)
            Partitions are numbered by falling number of photos, so that the end of the job is short.
        """
        return _assigned(self.job, self.read_label, threads)

    def numbered(self, threads: int) -> Plan:
        """The same plan with its partitions."""
        partition = pa.nulls(self.rows.num_rows, pa.int32())
        chosen = pa.array(self.is_read)
        partition = pc.replace_with_mask(partition, chosen, pa.array(self.assigned(threads), pa.int32()))
        return replace(self, rows=with_column(self.rows, "partition", partition))

    def with_all_ranked(self, threads: int) -> Plan:
        """The same plan, but that labels which were kept whole are read too, in partitions behind the others.

        Parameters
        ----------
        threads : int
            As for `assigned`.
        """
        small = self.small
        largest = pc.max(self.rows["partition"]).as_py()
        first = 0 if largest is None else largest + 1
        new = first + _assigned(self.job, self.labels.of_row[small], threads)
        chosen = pa.array(small)
        partition = pc.replace_with_mask(self.rows["partition"], chosen, pa.array(new, pa.int32()))
        reason = pc.replace_with_mask(self.rows["reason"], chosen, pa.nulls(int(small.sum()), pa.string()))
        rows = with_column(with_column(self.rows, "partition", partition), "reason", reason)
        return replace(self, job=replace(self.job, rank_all=True), rows=rows)

    def partitions(self, known: pa.Table | None = None) -> dict[int, pa.Table]:
        """The rows of each partition by its number, in the order in which they are to be done.

        Parameters
        ----------
        known : pyarrow.Table, optional
            What is known of photos (`reducer.reuse.as_known`).

        Returns
        -------
        dict of int to pyarrow.Table
            `TASK_SCHEMA`, and `KNOWN_SCHEMA` where ``known`` is given.
        """
        partition = self.rows["partition"].filter(pa.array(self.is_read)).to_numpy()
        order = np.argsort(partition, kind="stable")
        ordered = self.read.take(pa.array(order))
        if known is not None:
            ordered = beside(ordered, known)
        numbers, sizes = np.unique(partition, return_counts=True)
        return {
            number: ordered.slice(stop - size, size)
            for number, size, stop in zip(numbers.tolist(), sizes.tolist(), np.cumsum(sizes).tolist(), strict=True)
        }


@dataclass(frozen=True)
class Labels:
    """The labels of a sorted table.

    Attributes
    ----------
    names : list of str
        Sorted.
    starts : ndarray of int64, shape (labels + 1,)
        Where each begins, and the end.
    of_row : ndarray of int64, shape (rows,)
        The number of the label of each row.
    """

    names: list[str]
    starts: NDArray[np.int64]
    of_row: NDArray[np.int64]

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> Labels:
        """Those of a column in which equal labels stand together."""
        ends = pc.run_end_encode(column.combine_chunks(), run_end_type=pa.int64())
        starts = np.concatenate([[0], ends.run_ends.to_numpy()]).astype(np.int64)
        return cls(ends.values.to_pylist(), starts, np.repeat(np.arange(len(starts) - 1), np.diff(starts)))

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Rows a label."""
        return np.diff(self.starts)


@dataclass(frozen=True)
class Errand:
    """The partitions that are to be done, and how.

    Attributes
    ----------
    job : Job
        Whose they are.
    rows : dict of int to pyarrow.Table
        Rows of each by its number, in the order in which they are to be done: `TASK_SCHEMA`, and `KNOWN_SCHEMA` where
        anything is known.
    trusted : frozenset of int
        Partitions for which what is known holds without a look at the files.
    """

    job: Job
    rows: dict[int, pa.Table]
    trusted: frozenset[int] = frozenset()

    @property
    def photos(self) -> int:
        """How many there are in all."""
        return sum(rows.num_rows for rows in self.rows.values())

    @property
    def paths(self) -> pa.ChunkedArray:
        """Where all of them lie."""
        return pa.chunked_array([chunk for rows in self.rows.values() for chunk in rows["path"].chunks], pa.string())

    def task(self, index: int) -> PartitionTask:
        """What is to be done with a partition; made when it is sent, so that few are held at a time."""
        rows = self.rows[index]
        rule = path_rule(self.job)
        columns = ["id", "label"] if rule else ["id", "label", "path"]
        if pc.any(rows["always_keep"]).as_py():
            columns.append("always_keep")
        if KNOWN_SCHEMA.names[0] in rows.column_names and rows[KNOWN_SCHEMA.names[0]].null_count < rows.num_rows:
            columns += KNOWN_SCHEMA.names
        return PartitionTask(
            index=index,
            photos=rows.num_rows,
            rows=to_ipc(rows.select(columns)),
            settings=self.job.photo_settings,
            source=self.job.source,
            path_rule=rule,
            trusted=index in self.trusted,
        )


def make_plan(job: Job) -> Plan:
    """Read the manifest, choose the labels, draw the candidates.

    Parameters
    ----------
    job : Job
        What to do.

    Raises
    ------
    InputError
        If the manifest, the chosen labels or the ids to keep are wrong, or a label is too large for the strategy.
    """
    manifest = read_manifest(job)
    table = manifest.table
    labels = Labels.of(table["label"])
    chosen = _choose_labels(job, labels.names)
    always_keep = find_always_keep(job, table["id"])
    if chosen is not None:
        own = np.isin(labels.of_row, chosen)
        table, always_keep = table.filter(pa.array(own)), always_keep[own]
        labels = Labels.of(table["label"])
    names, starts, label_of_row, sizes = labels.names, labels.starts, labels.of_row, labels.sizes

    wanted = np.bincount(label_of_row, weights=always_keep, minlength=len(sizes))
    if job.keep is not None and wanted.max() > job.keep:
        raise InputError(
            f"--always-keep {job.always_keep}: {int(wanted.max())} ids are of the label "
            f"{names[int(wanted.argmax())]!r}, over --keep {job.keep}: raise --keep or take ids out"
        )
    ranked = np.ones(len(sizes), dtype=bool) if job.reads_all or job.keep is None else sizes > job.keep
    read = ranked[label_of_row]
    if job.candidates is not None:
        for label in np.flatnonzero(ranked & (sizes > job.candidates)).tolist():
            start, stop = int(starts[label]), int(starts[label + 1])
            ids = table["id"].slice(start, stop - start).to_pylist()
            drawn = np.array(draw_order(CANDIDATES, job.seed, names[label], ids))
            always = always_keep[start + drawn]
            left_out = np.concatenate([drawn[always], drawn[~always]])[job.candidates :]
            read[start + left_out] = False
    _check_total(job, label_of_row[read], always_keep[read])
    _check_memory(job, names, np.bincount(label_of_row[read], minlength=len(sizes)))

    reasons = np.where(ranked[label_of_row], NOT_SAMPLED, KEPT_SMALL_LABEL)
    columns = {
        **{name: table[name] for name in MANIFEST_SCHEMA.names},
        "always_keep": pa.array(always_keep),
        "partition": pa.nulls(table.num_rows, pa.int32()),
        "reason": pa.array(reasons, pa.string(), mask=read),
    }
    return Plan(
        job=job,
        rows=pa.table([columns[name] for name in PLAN_SCHEMA.names], schema=PLAN_SCHEMA),
        manifest={
            "rows": manifest.table.num_rows + manifest.duplicates,
            "duplicate_rows": manifest.duplicates,
            "ids_under_several_labels": manifest.shared_ids,
            "ids_under_several_labels_examples": list(manifest.shared_examples),
            "skipped_files": manifest.skipped_files,
        },
    )


def _check_total(job: Job, label: NDArray[np.int64], always_keep: NDArray[np.bool_]) -> None:
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


def _check_memory(job: Job, names: list[str], candidates: NDArray[np.int64]) -> None:
    """Refuse a label that is too large for its strategy."""
    largest = int(candidates.argmax())
    most = int(candidates[largest])
    if job.strategy == "facility-location" and most > FACILITY_LOCATION_CANDIDATES:
        width = 1 if job.hash_size**2 <= 255 else 2
        raise InputError(
            f"the label {names[largest]!r} has {most} candidates: --strategy facility-location holds the distances of "
            f"all pairs of a label, {most**2 * width / 1e9:.1f} GB for this one, and takes at most "
            f"{FACILITY_LOCATION_CANDIDATES} candidates. Give --candidates {FACILITY_LOCATION_CANDIDATES} or fewer, or "
            "another --strategy"
        )


def parse_labels(text: str) -> tuple[str, ...]:
    """Labels separated by commas; one that holds a comma stands in double quotes, as in CSV."""
    return tuple(label for row in csv.reader([text]) for label in row)


def _assigned(job: Job, label: NDArray[np.int64], threads: int) -> NDArray[np.int64]:
    """The partition of each row, by the numbers of their labels."""
    numbers, own, photos = np.unique(label, return_inverse=True, return_counts=True)
    if not len(numbers):
        return own
    return assign(photos, partition_count(len(label), threads, job.partition_images))[own]


def _choose_labels(job: Job, names: list[str]) -> NDArray[np.int64] | None:
    """Numbers of the labels of a trial run, or None for all."""
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
