"""Plan first, then execute: which photos are read, and in which partitions. Pure but for reading the manifest."""

from __future__ import annotations

import csv
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from reducer.config import Job, nearest
from reducer.draw import CANDIDATES, TRIAL_LABELS, draw_order
from reducer.errors import InputError
from reducer.lists import find_always_keep
from reducer.manifest import Manifest, path_rule, read_manifest
from reducer.partition import assign, partition_count
from reducer.ranking import FACILITY_LOCATION_CANDIDATES
from reducer.types import KEPT_SMALL_LABEL, LEDGER_SCHEMA, NOT_SAMPLED, TASK_SCHEMA, PartitionTask, to_ipc


@dataclass(frozen=True)
class Plan:
    """What a run will do.

    Attributes
    ----------
    job : Job
        Whose plan it is.
    manifest : Manifest
        The photos, of the chosen labels only.
    label_names : tuple of str
        The chosen labels, sorted.
    label_sizes : ndarray of int64, shape (labels,)
        Photos a label.
    read : pyarrow.Table
        `TASK_SCHEMA` rows to read, sorted by (label, id).
    read_label : ndarray of int64, shape (rows to read,)
        The number of the label of each.
    unread : pyarrow.Table
        `LEDGER_SCHEMA` rows of the photos that are not read.
    """

    job: Job
    manifest: Manifest
    label_names: tuple[str, ...]
    label_sizes: NDArray[np.int64]
    read: pa.Table
    read_label: NDArray[np.int64]
    unread: pa.Table

    def partitions(self, threads: int) -> NDArray[np.int64]:
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
        numbers, label, photos = np.unique(self.read_label, return_inverse=True, return_counts=True)
        if not len(numbers):
            return label
        count = partition_count(len(self.read_label), threads, self.job.partition_images)
        return assign(photos, count)[label]

    def partition_rows(self, threads: int) -> list[pa.Table]:
        """The `TASK_SCHEMA` rows of each partition, in the order in which they are to be done."""
        partition = self.partitions(threads)
        order = np.argsort(partition, kind="stable")
        ordered = self.read.take(pa.array(order))
        sizes = np.bincount(partition)
        return [
            ordered.slice(stop - size, size)
            for size, stop in zip(sizes.tolist(), np.cumsum(sizes).tolist(), strict=True)
        ]

    def task(self, index: int, rows: pa.Table) -> PartitionTask:
        """What is to be done with the rows of a partition; made when it is sent, so that few are held at a time."""
        rule = path_rule(self.job)
        columns = ["id", "label"] if rule else ["id", "label", "path"]
        if pc.any(rows["always_keep"]).as_py():
            columns.append("always_keep")
        return PartitionTask(
            index=index,
            photos=rows.num_rows,
            rows=to_ipc(rows.select(columns)),
            settings=self.job.photo_settings,
            source=self.job.source,
            path_rule=rule,
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
    names, starts, label_of_row = _labels(table)
    chosen = _choose_labels(job, names)
    always_keep = find_always_keep(job, table["id"])
    if chosen is not None:
        own = np.isin(label_of_row, chosen)
        table, always_keep = table.filter(pa.array(own)), always_keep[own]
        names, starts, label_of_row = _labels(table)
    sizes = np.diff(starts)

    wanted = np.bincount(label_of_row, weights=always_keep, minlength=len(sizes))
    if wanted.max() > job.keep:
        raise InputError(
            f"--always-keep {job.always_keep}: {int(wanted.max())} ids are of the label "
            f"{names[int(wanted.argmax())]!r}, over --keep {job.keep}: raise --keep or take ids out"
        )
    ranked = np.ones(len(sizes), dtype=bool) if job.reads_all else sizes > job.keep
    read = ranked[label_of_row]
    if job.candidates is not None:
        for label in np.flatnonzero(ranked & (sizes > job.candidates)).tolist():
            start, stop = int(starts[label]), int(starts[label + 1])
            ids = table["id"].slice(start, stop - start).to_pylist()
            drawn = np.array(draw_order(CANDIDATES, job.seed, names[label], ids))
            always = always_keep[start + drawn]
            left_out = np.concatenate([drawn[always], drawn[~always]])[job.candidates :]
            read[start + left_out] = False
    _check_memory(job, names, np.bincount(label_of_row[read], minlength=len(sizes)))

    reasons = np.where(ranked[label_of_row[~read]], NOT_SAMPLED, KEPT_SMALL_LABEL)
    return Plan(
        job=job,
        manifest=manifest,
        label_names=tuple(names),
        label_sizes=sizes,
        read=table.append_column(TASK_SCHEMA.field("always_keep"), pa.array(always_keep)).filter(pa.array(read)),
        read_label=label_of_row[read],
        unread=_unread_rows(table.filter(pa.array(~read)), reasons),
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


def _labels(table: pa.Table) -> tuple[list[str], NDArray[np.int64], NDArray[np.int64]]:
    """Names of the labels, where each starts in the sorted table (and the end), and the label of each row."""
    ends = pc.run_end_encode(table["label"].combine_chunks(), run_end_type=pa.int64())
    starts = np.concatenate([[0], ends.run_ends.to_numpy()]).astype(np.int64)
    return ends.values.to_pylist(), starts, np.repeat(np.arange(len(starts) - 1), np.diff(starts))


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


def _unread_rows(rows: pa.Table, reasons: NDArray[np.str_]) -> pa.Table:
    kept = reasons == KEPT_SMALL_LABEL
    known = {name: rows[name] for name in rows.column_names}
    known["kept"] = pa.array(kept)
    known["reason"] = pa.array(reasons.tolist(), pa.string())
    known["nearest_kept"] = pc.if_else(pa.array(kept), rows["id"], pa.scalar(None, pa.string()))
    columns = [known.get(f.name, pa.nulls(rows.num_rows, f.type)) for f in LEDGER_SCHEMA]
    return pa.table(columns, schema=LEDGER_SCHEMA)
