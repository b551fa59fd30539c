"""From distances to an order: the first K of a label are its K most different photos, for every K.

One function a strategy, one signature, that of `Strategy`. All are pure and deterministic; ties are broken by id, so
the order of the input does not matter. What photos are compared by is `reducer.selection.distance`'s business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from reducer.draw import RANDOM_ORDER, draw_order
from reducer.selection.distance import Points, Steps
from reducer.selection.facility_location import NearCopies, NearCopyFilter, facility_location_order
from reducer.storage.codecs import Positions

#: Facility location chooses so many photos of a label at least (or as many as are kept); the others follow by
#: farthest-first, since what it gains by one more photo comes to nothing by then.
FACILITY_LOCATION_RANKS = 100
#: Where distances are costly, those of so many photos are told at a time.
TOLD_TOGETHER = 64


@dataclass(frozen=True)
class Ranking:
    """A full order of the candidates of one label.

    Attributes
    ----------
    order : ndarray of int64, shape (n,)
        Positions of the candidates, best first.
    insertion_distance : ndarray of float64, shape (n,)
        For each place in ``order``, the distance to the nearest candidate before it, in bits or cosine; NaN at place 0.
    """

    order: Positions
    insertion_distance: NDArray[np.float64]


def _in_id_order(ids: Sequence[str], first: Positions | None) -> tuple[Positions, Positions]:
    """Positions in the order of the ids, and where in it those stand that come first."""
    by_id = np.array(sorted(range(len(ids)), key=ids.__getitem__), dtype=np.int64)
    place = np.empty(len(ids), dtype=np.int64)
    place[by_id] = np.arange(len(ids))
    return by_id, place[:0] if first is None else place[first]


def _insertion_distances(points: Points, order: Positions) -> NDArray[np.float64]:
    """Distance of each of some photos to the nearest of them before it."""
    nearest = np.full(len(order), points.farthest, dtype=points.dtype)
    together = TOLD_TOGETHER if points.is_costly else 1
    for start in range(0, len(order) - 1, together):
        own, later = order[start : start + together], order[start + 1 :]
        rows = points.between(own, later) if points.is_costly else points.to(int(own[0]))[later][None]
        for place, row in enumerate(rows):  # of one only those behind it
            np.minimum(nearest[start + place + 1 :], row[place:], out=nearest[start + place + 1 :])
    insertion = nearest * points.step
    insertion[:1] = np.nan
    return insertion


class Strategy(Protocol):
    """A way to rank the photos of one label."""

    def __call__(
        self,
        points: Points,
        ids: Sequence[str],
        *,
        first: Positions | None = None,
        keep: int = 1,
        label: str = "",
        seed: int = 0,
        copies: NearCopies | None = None,
    ) -> Ranking:
        """Rank them.

        Parameters
        ----------
        points : Points
            The photos, by what they are compared by.
        ids : sequence of str
            Their ids, unique; ties are broken by them.
        first : ndarray of int64, shape (m,), optional
            Positions of photos that are ranked already; the others come behind them.
        keep : int
            How many photos of a label are kept.
        label : str
            Part of the key of what is drawn.
        seed : int
            The job's seed, part of that key too.
        copies : NearCopies, optional
            Which photos are near copies: one of a photo with a smaller rank comes behind all that are none.
        """


def farthest_first(
    points: Points,
    ids: Sequence[str],
    *,
    first: Positions | None = None,
    keep: int = 1,
    label: str = "",
    seed: int = 0,
    copies: NearCopies | None = None,
) -> Ranking:
    """Start at the medoid, then always take the photo farthest from those taken.

    The first K are within a factor 2 of the best K, for the smallest pair distance and for the coverage
    radius (Gonzalez 1985, "Clustering to minimize the maximum intercluster distance"), where no photos come last as
    near copies; of cosine distances, which are half the squares of distances, within a factor 4.

    Parameters
    ----------
    points, ids, first, keep, label, seed, copies
        As for every `Strategy`; ``keep``, ``label`` and ``seed`` are not used.
    """
    by_id, picked = _in_id_order(ids, first)
    return _farthest_behind(points.take(by_id), picked, by_id, NearCopyFilter(copies, by_id))


class _EagerNearest:
    """Which photos are taken, and how near each of the others is to the nearest of them.

    Attributes
    ----------
    nearest : ndarray of int, shape (n,)
        In steps; -1 for those that are taken.
    """

    def __init__(self, points: Points) -> None:
        self.points = points
        self.nearest = np.full(len(points), points.farthest, dtype=points.dtype)

    def add(self, pick: int) -> None:
        np.minimum(self.nearest, self.points.to(pick), out=self.nearest)
        self.nearest[pick] = -1

    def farthest(self, distinct: NearCopyFilter) -> int:
        """The photo farthest from those taken, of equals the first, of those that may be taken now."""
        return int(np.argmax(distinct.only_ready(self.nearest)))


class _LazyNearest(_EagerNearest):
    """The same, where distances are told only for photos that come to the top: what is nearest never grows.

    The picks are the same. Each photo is compared with all picks since the last time at once, many photos together.
    """

    def __init__(self, points: Points) -> None:
        super().__init__(points)
        self.picks: list[int] = []
        #: With how many of the picks each photo has been compared.
        self.compared = np.zeros(len(points), dtype=np.int64)

    def add(self, pick: int) -> None:
        self.picks.append(pick)
        self.nearest[pick] = -1

    def farthest(self, distinct: NearCopyFilter) -> int:
        while True:
            worth = distinct.only_ready(self.nearest)
            pick = int(np.argmax(worth))
            if self.compared[pick] == len(self.picks):
                return pick
            top = np.argpartition(worth, -min(TOLD_TOGETHER, len(worth)))[-TOLD_TOGETHER:]
            top = top[(worth[top] >= 0) & (self.compared[top] < len(self.picks))]
            missing = np.array(self.picks[int(self.compared[top].min()) :], dtype=np.int64)
            self.nearest[top] = np.minimum(self.nearest[top], self.points.between(top, missing).min(axis=1))
            self.compared[top] = len(self.picks)


def _farthest_behind(points: Points, picked: Positions, by_id: Positions, distinct: NearCopyFilter) -> Ranking:
    """Farthest-first behind what is picked already; points and picks are in id order."""
    count = len(picked)
    order = np.empty(len(points), dtype=np.int64)
    order[:count] = picked
    insertion = np.zeros(len(points))
    insertion[:count] = _insertion_distances(points, picked)
    taken = (_LazyNearest if points.is_costly else _EagerNearest)(points)
    for pick in picked.tolist():
        taken.add(pick)
        distinct.take(pick)
    for place in range(count, len(points)):
        if place == 0:
            pick = points.medoid()
            insertion[0] = np.nan
        else:
            pick = taken.farthest(distinct)
            if taken.nearest[pick] == 0 and taken.nearest.max() == 0:
                # Only exact copies of earlier picks are left: any order of theirs is farthest-first.
                order[place:] = distinct.split(np.flatnonzero(taken.nearest == 0))
                break
            insertion[place] = taken.nearest[pick] * points.step
        order[place] = pick
        taken.add(pick)
        distinct.take(pick)
    return Ranking(by_id[order], insertion)


def facility_location(
    points: Points,
    ids: Sequence[str],
    *,
    first: Positions | None = None,
    keep: int = 1,
    label: str = "",
    seed: int = 0,
    copies: NearCopies | None = None,
) -> Ranking:
    """Always take the photo that brings the label's photos nearest to those taken, all in all.

    Greedy facility location (`reducer.selection.facility_location`): it adds the photo with the largest gain in the
    sum, over all photos of the label, of the similarity (the largest distance there can be, minus the distance) to the
    most similar photo taken; so it starts at the medoid. The first ``max(keep, 100)`` are chosen so, the others follow
    by farthest-first.

    Parameters
    ----------
    points, ids, first, keep, label, seed, copies
        As for every `Strategy`.
    """
    by_id, picked = _in_id_order(ids, first)
    points, distinct = points.take(by_id), NearCopyFilter(copies, by_id)
    most = max(keep, FACILITY_LOCATION_RANKS)
    picks = facility_location_order(
        points, picked, most, distinct, draw=lambda: _drawn(label, seed, [ids[i] for i in by_id.tolist()])
    )
    return _farthest_behind(points, picks, by_id, distinct.anew())


def pairs(
    points: Points,
    ids: Sequence[str],
    *,
    first: Positions | None = None,
    keep: int = 1,
    label: str = "",
    seed: int = 0,
    copies: NearCopies | None = None,
) -> Ranking:
    """The notebook's rule, its defects mended: the most distant pairs first, both ends of each in turn.

    Pairs stand by descending distance, equal ones by (smaller id, larger id); a photo gets its place when the
    first pair that it is in comes up.

    Parameters
    ----------
    points, ids, first, keep, label, seed, copies
        As for every `Strategy`; ``keep``, ``label`` and ``seed`` are not used.

    Notes
    -----
    The list of pairs is never made. The first pair that a photo is in is the one with its farthest
    photo, of equally far ones the one with the smallest id; so one row of distances a photo is enough.
    """
    by_id, picked = _in_id_order(ids, first)
    points = points.take(by_id)
    n = len(by_id)
    farthest = np.zeros(n, dtype=np.int64)
    partner = np.zeros(n, dtype=np.int64)
    for i in range(n if n > 1 else 0):
        distance = points.to(i)
        distance[i] = -1  # a photo makes no pair with itself, not even among exact copies
        partner[i] = np.argmax(distance)
        farthest[i] = distance[partner[i]]
    own = np.arange(n)
    order = np.lexsort((own, np.maximum(own, partner), np.minimum(own, partner), -farthest))
    order = _behind(picked, order, NearCopyFilter(copies, by_id))
    return Ranking(by_id[order], _insertion_distances(points, order))


def random(
    points: Points,
    ids: Sequence[str],
    *,
    first: Positions | None = None,
    keep: int = 1,
    label: str = "",
    seed: int = 0,
    copies: NearCopies | None = None,
) -> Ranking:
    """The baseline: the order of a keyed draw (`reducer.draw`), whatever the photos are.

    Parameters
    ----------
    points, ids, first, keep, label, seed, copies
        As for every `Strategy`; ``keep`` is not used.
    """
    picked = np.empty(0, dtype=np.int64) if first is None else first
    order = _behind(picked, _drawn(label, seed, ids), NearCopyFilter(copies, np.arange(len(ids))))
    return Ranking(order, _insertion_distances(points, order))


def _drawn(label: str, seed: int, ids: Sequence[str]) -> Positions:
    return np.array(draw_order(RANDOM_ORDER, seed, label, ids), dtype=np.int64)


def _behind(first: Positions, order: Positions, distinct: NearCopyFilter) -> Positions:
    """An order of all, but with some of them first, and near copies last."""
    for pick in first.tolist():
        distinct.take(pick)
    return np.concatenate([first, distinct.split(order[~np.isin(order, first)])])


STRATEGIES: dict[str, Strategy] = {
    "farthest-first": farthest_first,
    "facility-location": facility_location,
    "pairs": pairs,
    "random": random,
}


def rank(
    strategy: str,
    points: Points,
    ids: Sequence[str],
    *,
    always_keep: NDArray[np.bool_],
    keep: int,
    label: str,
    seed: int,
    copies: NearCopies | None = None,
) -> Ranking:
    """Rank the photos of one label, those that are always kept before all others.

    Parameters
    ----------
    strategy : str
        One of `STRATEGIES`; it also decides how the photos that are always kept stand among themselves.
    points, ids, keep, label, seed, copies
        As for every `Strategy`.
    always_keep : ndarray of bool, shape (n,)
        Whether a photo is always kept.
    """
    order = STRATEGIES[strategy]
    first = None
    if always_keep.any():
        chosen = np.flatnonzero(always_keep)
        names = [ids[i] for i in chosen.tolist()]
        own = None if copies is None else copies.among(chosen)
        alone = order(points.take(chosen), names, keep=keep, label=label, seed=seed, copies=own)
        first = chosen[alone.order]
    return order(points, ids, first=first, keep=keep, label=label, seed=seed, copies=copies)


def nearest_kept(points: Points, ids: Sequence[str], kept: Positions) -> tuple[Positions, Steps]:
    """For every photo the nearest of the kept ones, of equally near ones that with the smallest id.

    Parameters
    ----------
    points : Points
        The photos.
    ids : sequence of str
        Their ids.
    kept : ndarray of int64, shape (k,)
        Positions of the kept photos, k >= 1. A kept photo's nearest is itself.

    Returns
    -------
    positions : ndarray of int64, shape (n,)
    distances : ndarray of int, shape (n,)
        In steps.
    """
    best = np.full(len(points), points.farthest + 1, dtype=points.dtype)
    position = np.zeros(len(points), dtype=np.int64)
    for keeper in sorted(kept.tolist(), key=lambda i: ids[i]):
        distance = points.to(keeper)
        nearer = distance < best
        best[nearer] = distance[nearer]
        position[nearer] = keeper
    position[kept] = kept
    best[kept] = 0
    return position, best
