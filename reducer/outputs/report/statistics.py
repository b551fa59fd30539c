"""Statistics of a ledger, in as few numbers as a plot needs. Pure; reads no photo."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from reducer.draw import RANDOM_ORDER, REPORT_LABELS, draw_order
from reducer.selection.distance import Cosine
from reducer.selection.quality import pair_histogram
from reducer.storage.codecs import all_from_hex, units_of
from reducer.storage.sorting import numbered

Counts = NDArray[np.int64]

#: Kept photos of a label that are compared, at most: all pairs of a million photos would take too long.
PHOTOS_COMPARED = 2000
#: Labels whose vectors are read for a report, and bins of cosine distances, 0 to 2.
LABELS_COMPARED, COSINE_BINS = 200, 2000
#: Quantiles over labels: 80 % of them lie between the first and the last.
SHARES = (0.1, 0.5, 0.9)


@dataclass(frozen=True)
class LabelCounts:
    """Photos per label, before and after.

    Attributes
    ----------
    names : list of str
        The labels, sorted as text.
    photos, kept : ndarray of int64, shape (labels,)
        Photos of each label, and those that were kept.
    """

    names: list[str]
    photos: Counts
    kept: Counts

    @property
    def empty(self) -> list[str]:
        """Labels without any kept photo."""
        return [self.names[number] for number in np.flatnonzero(self.kept == 0).tolist()]

    def without_largest(self, count: int) -> LabelCounts:
        """Return the counts without the labels that have the most photos; of equal ones the first as text go."""
        left = np.sort(np.argsort(-self.photos, kind="stable")[count:])
        return LabelCounts([self.names[number] for number in left.tolist()], self.photos[left], self.kept[left])


@dataclass(frozen=True)
class InsertionCurve:
    """Distance of each next photo from all before it, over labels.

    Attributes
    ----------
    labels : ndarray of int64, shape (ranks,)
        Labels that have a photo of rank 1, 2, ...
    distance : ndarray of float64, shape (3, ranks)
        Its insertion distance, at the quantiles `SHARES` over these labels (as `numpy.quantile` interpolates).
    photos : ndarray of int64, shape (ranks,)
        Photos that are left in all if each label keeps at most 1, 2, ...; labels that were not ranked count with the
        photos that were kept.
    """

    labels: Counts
    distance: NDArray[np.float64]
    photos: Counts


def label_counts(ledger: pa.Table) -> LabelCounts:
    """Count the photos of each label.

    Parameters
    ----------
    ledger : pyarrow.Table
        The columns ``label`` and ``kept``.
    """
    number, names = numbered(ledger["label"])
    kept = ledger["kept"].to_numpy()
    return LabelCounts(names, _count_each(number, len(names)), _count_each(number[kept], len(names)))


def _count_each(numbers: Counts, count: int) -> Counts:
    return np.bincount(numbers, minlength=count)


def insertion_curve(ledger: pa.Table) -> InsertionCurve:
    """Return the distances of the photos of each rank from those before them.

    Parameters
    ----------
    ledger : pyarrow.Table
        The columns ``label``, ``rank``, ``insertion_distance`` and ``kept``.
    """
    ranked = ledger.filter(pc.is_valid(ledger["insertion_distance"]))
    rank = ranked["rank"].to_numpy().astype(np.int64)
    distance = ranked["insertion_distance"].to_numpy()
    order = np.lexsort((distance, rank))
    distance = distance[order]
    labels = np.bincount(rank, minlength=1)[1:]
    starts = np.cumsum(labels) - labels
    quantiles = []
    for share in SHARES:
        position = (labels - 1) * share
        low, high = (starts + side(position).astype(np.int64) for side in (np.floor, np.ceil))
        quantiles.append(distance[low] + (position % 1) * (distance[high] - distance[low]))
    number, names = numbered(ledger["label"])
    # In a label that was ranked, photos with a rank can be kept; in others, those that are kept already.
    of_ranked, of_kept = (
        _count_each(number[rows.to_numpy()], len(names)) for rows in (pc.is_valid(ledger["rank"]), ledger["kept"])
    )
    available = np.where(of_ranked > 0, of_ranked, of_kept)
    at_least = _count_each(available, len(labels) + 1)[::-1].cumsum()[::-1]  # labels with 0, 1, ... photos or more
    photos = at_least[1 : len(labels) + 1].cumsum()
    return InsertionCurve(labels, np.stack(quantiles), photos)


@dataclass(frozen=True)
class PairDistances:
    """Distances of pairs of photos of one label.

    Attributes
    ----------
    kept, random : ndarray of int64, shape (bins,)
        Pairs in each bin, of the kept photos and of a random choice of as many.
    edges : ndarray of float64, shape (bins + 1,)
        Edges of the bins.
    unit : {"bits", "cosine"}
        Unit of the edges.
    """

    kept: Counts
    random: Counts
    edges: NDArray[np.floating[Any]]
    unit: str


def labels_to_compare(ledger: pa.Table, seed: int) -> list[str]:
    """Return labels with at least two kept photos that have a rank, at most `LABELS_COMPARED`, drawn at random.

    Parameters
    ----------
    ledger : pyarrow.Table
        The columns ``label``, ``rank`` and ``kept``.
    seed : int
        Seed of the job.
    """
    kept = ledger.filter(pc.and_(ledger["kept"], pc.is_valid(ledger["rank"])))
    counted = kept.group_by("label").aggregate([([], "count_all")])
    names = sorted(counted.filter(pc.greater(counted["count_all"], 1))["label"].to_pylist())
    return [names[number] for number in draw_order(REPORT_LABELS, seed, "", names)[:LABELS_COMPARED]]


def pair_distances(ledger: pa.Table, bits: int, seed: int) -> PairDistances:
    """Return the distances of pairs of photos within labels, for the kept photos and a random choice of as many.

    Parameters
    ----------
    ledger : pyarrow.Table
        The columns ``label``, ``id``, ``hash``, ``rank`` and ``kept``; with ``vector`` (bytes of float16 numbers)
        distances are those of vectors.
    bits : int
        Bits of a hash.
    seed : int
        Seed of the job: the random choice is the one that its quality was compared with. From a label with more than
        `PHOTOS_COMPARED` kept photos, this number of photos is drawn.
    """
    by_vectors = "vector" in ledger.column_names
    ranked = ledger.select(["label", "id", "vector" if by_vectors else "hash", "rank", "kept"])
    ranked = ranked.filter(pc.is_valid(ranked["rank"])).combine_chunks()
    edges = np.arange(COSINE_BINS + 1) * (2 / COSINE_BINS) if by_vectors else np.arange(bits + 2) - 0.5
    hashes = None if by_vectors else all_from_hex(ranked["hash"], bits)
    kept = ranked["kept"].to_numpy()
    ids = ranked["id"].to_pylist()
    of_kept, of_random = (np.zeros(len(edges) - 1, dtype=np.int64) for _ in range(2))

    def histogram(rows: NDArray[np.int64]) -> Counts:
        if hashes is not None:
            return pair_histogram(hashes[rows], bits)
        points = Cosine(units_of(ranked["vector"].take(pa.array(rows))))
        steps = [points.to(number)[number + 1 :] for number in range(len(rows) - 1)]
        return np.histogram(np.concatenate(steps) * points.step, edges)[0]

    number, names = numbered(ranked["label"])
    ends = _count_each(number, len(names)).cumsum()
    for label, rows in zip(names, np.split(np.argsort(number, kind="stable"), ends[:-1]), strict=False):
        chosen = rows[kept[rows]]
        if len(chosen) < 2:
            continue
        drawn = rows[draw_order(RANDOM_ORDER, seed, label, [ids[row] for row in rows.tolist()])]
        if len(chosen) > PHOTOS_COMPARED:
            chosen = drawn[kept[drawn]][:PHOTOS_COMPARED]
        of_kept += histogram(chosen)
        of_random += histogram(drawn[: len(chosen)])
    return PairDistances(of_kept, of_random, edges, "cosine" if by_vectors else "bits")
