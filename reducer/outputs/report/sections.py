"""Sections of the report, as text and plots for its template. Reads the run folder only, no photo."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup

from reducer.config.checks import flag
from reducer.config.resolved import ResolvedJob
from reducer.config.settings import STORAGE_OPTIONS, default_strategy, unit_of
from reducer.formatting import format_bytes, format_labels
from reducer.outputs.report.figures import LARGEST, as_svg, counts_plot, insertion_plot, pairs_plot
from reducer.outputs.report.rendering import format_count, format_number
from reducer.outputs.report.statistics import (
    InsertionCurve,
    LabelCounts,
    PairDistances,
    labels_to_compare,
    pair_distances,
)
from reducer.run.folder import RunFolder
from reducer.storage.schemas import FAILED

#: Failures shown of each kind.
FAILURE_EXAMPLES = 5
#: Numbers of photos for which the table to choose K by has rows.
KS = (1, 2, 3, 5, 8, 10, 12, 15, 20, 25, 30, 40, 50, 75, 100, 150, 200, 300, 500, 750, 1000, 2000, 5000)
#: The curve shows this many times the photos kept per label, and at least this many ranks.
TIMES_KEPT, LEAST_RANKS = 4, 60


@dataclass(frozen=True)
class Measure:
    """Unit and scale of the distances of a run.

    Attributes
    ----------
    unit : {"bits", "cosine"}
        Their unit.
    bits : int
        Bits of a hash.
    near : int
        Distance up to which two photos are near copies, in bits; -1 for vectors.
    """

    unit: str
    bits: int
    near: int

    @classmethod
    def of(cls, quality: Mapping[str, Any]) -> Measure:
        """Return the measure of a run, from ``quality`` in its summary."""
        return cls(quality["unit"], quality["bits"], quality["near_copy_bits"] if quality["unit"] == "bits" else -1)

    def distance(self, distance: float) -> str:
        """Return a distance as text, such as ``2 bits`` or ``0.1234``."""
        return format_count(distance, "bit") if self.unit == "bits" else f"{distance:.4f}"

    def number(self, distance: float) -> str:
        """Return a distance as text without its unit."""
        return format_number(distance) if self.unit == "bits" else f"{distance:.4f}"


def command_of(job: Mapping[str, Any]) -> list[str]:
    """Return the command that began a run, in parts, without its storage options.

    Parameters
    ----------
    job : mapping
        The job, as ``summary.json`` has it.
    """
    parts = [["reducer", "run", job["images"]], ["--output", job["output"]]]
    for field in fields(ResolvedJob):
        value, default = job.get(field.name, field.default), field.default
        if isinstance(default, tuple) and isinstance(value, list):  # from JSON
            value = tuple(value)
        if field.name == "strategy":
            default = default_strategy(unit_of(job) == "cosine")
        if field.name in ("images", "output", "overwrite", "break_lock", "report", *STORAGE_OPTIONS):
            continue
        if value == default:
            continue
        if value is True:
            parts.append([flag(field.name)])
        elif value is False:
            parts.append([flag(field.name).replace("--", "--no-", 1)])
        elif field.name == "exclude":
            parts += [[flag(field.name), pattern] for pattern in value]
        else:
            several = isinstance(value, list | tuple)
            shown = format_labels(value) if several else "all" if value is None else str(value)
            parts.append([flag(field.name), shown])
    return [shlex.join(part) for part in parts]


def total_bytes(ledger: pa.Table) -> dict[str, Any]:
    """Return the bytes of all photos and of the kept ones, as far as they are known, as text."""
    kept = ledger.filter(ledger["kept"])["bytes"]
    return {
        "before": format_bytes(pc.sum(ledger["bytes"]).as_py() or 0),
        "after": format_bytes(pc.sum(kept).as_py() or 0),
        "unknown_before": ledger["bytes"].null_count,
        "unknown_after": kept.null_count,
    }


def with_vectors(folder: RunFolder, rows: pa.Table, job: ResolvedJob) -> pa.Table:
    """Return rows with their vectors (bytes of float16 numbers) as ``vector`` where the run ranks by vectors.

    Parameters
    ----------
    folder : RunFolder
        Folder of the run.
    rows : pyarrow.Table
        Rows of its ledger, with ``id`` and ``label``.
    job : ResolvedJob
        Its job; one that ranks by hashes gets the rows unchanged.
    """
    if not job.by_vectors:
        return rows
    vectors = folder.vectors.read_labels(pc.unique(rows["label"]).to_pylist())
    columns = (column.to_pylist() for column in vectors.columns)
    vector_of = {(name, label): vector for name, label, vector in zip(*columns, strict=True)}
    keys = zip(rows["id"].to_pylist(), rows["label"].to_pylist(), strict=True)
    return rows.append_column("vector", pa.array([vector_of.get(key) for key in keys], pa.binary()))


def figures_of(
    folder: RunFolder, job: ResolvedJob, measure: Measure, ledger: pa.Table, counts: LabelCounts, curve: InsertionCurve
) -> dict[str, Markup]:
    """Draw the plots, as elements of the page.

    Parameters
    ----------
    folder : RunFolder
        Folder of the run, for vectors.
    job : ResolvedJob
        Its job.
    measure : Measure
        What its distances are.
    ledger : pyarrow.Table
        Its ledger, with the columns of `reducer.outputs.report.statistics.pair_distances`.
    counts : LabelCounts
        Photos per label.
    curve : InsertionCurve
        Distances by rank.

    Returns
    -------
    dict of str to Markup
        ``counts``, and where there is enough to draw ``counts_rest``, ``pairs`` and ``insertion``.
    """
    plots = {
        "counts": as_svg(
            counts_plot(counts),
            "counts",
            f"Histogram: how many of {len(counts.names):,} labels have how many images, before and after. Before at "
            f"most {counts.photos.max(initial=0):,}, after at most {counts.kept.max(initial=0):,}.",
        )
    }
    if len(counts.names) > LARGEST:
        plots["counts_rest"] = as_svg(
            counts_plot(counts, largest=False),
            "counts-rest",
            f"The same histogram without the {LARGEST} largest labels.",
        )
    pairs = _pairs(folder, job, measure, ledger)
    if pairs.kept.sum():
        plots["pairs"] = as_svg(
            pairs_plot(pairs, measure.near),
            "pairs",
            f"Distances of two photos of a label. {_near_shares(pairs, measure.near)}",
        )
    if len(curve.labels):
        most = max(TIMES_KEPT * (job.keep or 0), LEAST_RANKS)
        plots["insertion"] = as_svg(
            insertion_plot(curve, measure.near, job.keep, most, measure.unit),
            "insertion",
            "Curve: how far the next photo of a label is from those before it, by the number of those; its "
            "median over labels, and between what 80 % of them lie. The table has figures of it.",
        )
    return {name: Markup(svg) for name, svg in plots.items()}


def _pairs(folder: RunFolder, job: ResolvedJob, measure: Measure, ledger: pa.Table) -> PairDistances:
    if job.by_vectors:
        labels = pa.array(labels_to_compare(ledger, job.seed), pa.string())
        rows = ledger.filter(pc.is_in(ledger["label"], value_set=labels))
        ledger = with_vectors(folder, rows.filter(pc.is_valid(rows["rank"])), job)
    return pair_distances(ledger, measure.bits, job.seed)


def _near_shares(pairs: PairDistances, near: int) -> str:
    if pairs.unit != "bits":
        means = [(pairs.edges[:-1] + pairs.edges[1:]) / 2 @ side / side.sum() for side in (pairs.kept, pairs.random)]
        return f"On average {means[0]:.4f} of the kept ones, and {means[1]:.4f} of a random choice."
    shares = [f"{100 * side[: near + 1].sum() / side.sum():.3g}" for side in (pairs.kept, pairs.random)]
    return (
        f"At most {near} bits apart are {shares[0]} % of the pairs of kept photos and {shares[1]} % of those of a "
        "random choice."
    )


def choice_of_k(curve: InsertionCurve, counts: LabelCounts, keep: int | None, near: int) -> dict[str, Any]:
    """Return what helps to choose K, in words and as a table.

    Parameters
    ----------
    curve : InsertionCurve
        Distances by rank.
    counts : LabelCounts
        Photos per label.
    keep : int or None
        Photos kept per label; None with a budget.
    near : int
        Distance up to which two photos are near copies, in bits; -1 where there are none.

    Returns
    -------
    dict
        ``rows`` of the table, the row ``at`` the K that was kept, and ``copies_after``: the first K after which the
        next photo is a near copy in half of the labels. Both None where there is none.
    """
    ranks = len(curve.labels)
    if not ranks:
        return {"rows": [], "at": None, "copies_after": None}
    # With a budget labels keep different numbers of photos: half of them no more than this.
    kept = min(ranks, keep or max(1, int(np.median(counts.kept))))
    low, median, high = curve.distance
    rows = [
        {
            "k": k,
            "next": median[k - 1],
            "low": low[k - 1],
            "high": high[k - 1],
            "labels": int(curve.labels[k - 1]),
            "photos": int(curve.photos[k - 1]),
        }
        for k in sorted({*KS, kept})
        if k <= ranks
    ]
    copies = np.flatnonzero(median <= near)
    return {
        "rows": rows,
        "at": next(row for row in rows if row["k"] == kept),
        "copies_after": int(copies[0]) + 1 if len(copies) else None,
    }


def failures_of(folder: RunFolder, kinds: Mapping[str, int]) -> list[dict[str, Any]]:
    """Return the photos that failed by kind, the most frequent kind first, with examples.

    Parameters
    ----------
    folder : RunFolder
        Folder of the run.
    kinds : mapping of str to int
        Number of failures of each kind, from the summary.
    """
    if not kinds:
        return []
    failed = folder.parts.ledger(["id", "label", "path", "error"], where=pc.field("reason") == FAILED)
    return [
        {
            "kind": kind,
            "count": count,
            "examples": failed.filter(pc.starts_with(failed["error"], f"{kind}:"))
            .slice(0, FAILURE_EXAMPLES)
            .to_pylist(),
        }
        for kind, count in sorted(kinds.items(), key=lambda pair: (-pair[1], pair[0]))
    ]
