"""From distances to an order: the first K of a label are its K most different photos, for every K.

One function per strategy, from `Candidates` to `Ranking`. All are pure and deterministic; ties are broken by id, so the
order of the input does not matter. Distances are the business of `reducer.selection.distance`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from reducer.draw import RANDOM_ORDER, draw_order
from reducer.selection.distance import Points, Steps
from reducer.selection.facility_location import NearCopies, NearCopyFilter, facility_location_order
from reducer.storage.codecs import Positions

#: Photos per label that facility location chooses at least (or as many as are kept); the others follow by
#: farthest-first, since one more photo gains next to nothing by then.
FACILITY_LOCATION_RANKS = 100
#: Photos whose distances are computed together where distances are costly.
COMPUTED_TOGETHER = 64


@dataclass(frozen=True)
class Candidates:
    """The candidates of one label, n of them, and all that a strategy may use to rank them.

    Attributes
    ----------
    points : Points
        The photos, by what they are compared by.
    ids : sequence of str
        Id of each photo, unique; ties are broken by id.
    first : ndarray of int64, shape (m,), optional
        Positions of photos that are ranked already; the others come behind them.
    keep : int
        Photos to keep per label.
    label : str
        The label, part of the key of random draws.
    seed : int
        The job's seed, part of that key too.
    copies : NearCopies, optional
        Hashes that tell near copies: a near copy of a photo with a smaller rank comes behind all photos that are none.
    """

    points: Points
    ids: Sequence[str]
    first: Positions | None = None
    keep: int = 1
    label: str = ""
    seed: int = 0
    copies: NearCopies | None = None

    def among(self, positions: Positions) -> Candidates:
        """Return some of the candidates, none of them ranked yet."""
        return replace(
            self,
            points=self.points.take(positions),
            ids=[self.ids[i] for i in positions.tolist()],
            first=None,
            copies=None if self.copies is None else self.copies.among(positions),
        )


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


Strategy = Callable[[Candidates], Ranking]


def farthest_first(candidates: Candidates) -> Ranking:
    """Start at the medoid, then always take the photo farthest from those taken.

    The first K are within a factor 2 of the best K, for the smallest pair distance and for the coverage radius
    (Gonzalez 1985, "Clustering to minimize the maximum intercluster distance"), where no photos come last as near
    copies; of cosine distances, which are half the squares of distances, within a factor 4.
    """
    by_id, picked = _in_id_order(candidates)
    return _farthest_behind(candidates.points.take(by_id), picked, by_id, NearCopyFilter(candidates.copies, by_id))


def facility_location(candidates: Candidates) -> Ranking:
    """Always take the photo that brings all photos of the label nearest to those taken.

    Greedy facility location (`reducer.selection.facility_location`): it adds the photo with the largest gain in the
    sum, over all photos of the label, of the similarity (the largest distance there can be, minus the distance) to the
    most similar photo taken; so it starts at the medoid. The first ``max(keep, 100)`` are chosen so, the others follow
    by farthest-first.
    """
    by_id, picked = _in_id_order(candidates)
    points, distinct = candidates.points.take(by_id), NearCopyFilter(candidates.copies, by_id)
    most = max(candidates.keep, FACILITY_LOCATION_RANKS)
    ids = [candidates.ids[i] for i in by_id.tolist()]
    picks = facility_location_order(points, picked, most, distinct, draw=lambda: _drawn(candidates, ids))
    return _farthest_behind(points, picks, by_id, distinct.restarted())


def pairs(candidates: Candidates) -> Ranking:
    """Take the most distant pairs first, both ends of each in turn: the notebook's rule, its defects mended.

    Pairs stand by descending distance, equal ones by (smaller id, larger id); a photo gets its place when the first
    pair that it is in comes up.

    Notes
    -----
    The list of pairs is never made. The first pair that a photo is in is the one with its farthest photo, of equally
    far ones the one with the smallest id; so one row of distances per photo is enough.
    """
    by_id, picked = _in_id_order(candidates)
    points = candidates.points.take(by_id)
    n = len(by_id)
    farthest = np.zeros(n, dtype=np.int64)
    partner = np.zeros(n, dtype=np.int64)
    for i in range(n if n > 1 else 0):
        distance = points.to(i)
        distance[i] = -1  # a photo makes no pair with itself, not even among exact copies
        partner[i] = np.argmax(distance)
        farthest[i] = distance[partner[i]]
    position = np.arange(n)
    order = np.lexsort((position, np.maximum(position, partner), np.minimum(position, partner), -farthest))
    order = _behind(picked, order, NearCopyFilter(candidates.copies, by_id))
    return Ranking(by_id[order], _insertion_distances(points, order))


def random(candidates: Candidates) -> Ranking:
    """Take photos in the order of a keyed draw (`reducer.draw`), whatever they show: the baseline."""
    picked = np.empty(0, dtype=np.int64) if candidates.first is None else candidates.first
    near_copies = NearCopyFilter(candidates.copies, np.arange(len(candidates.ids)))
    order = _behind(picked, _drawn(candidates, candidates.ids), near_copies)
    return Ranking(order, _insertion_distances(candidates.points, order))


STRATEGIES: dict[str, Strategy] = {
    "farthest-first": farthest_first,
    "facility-location": facility_location,
    "pairs": pairs,
    "random": random,
}


def rank(strategy: str, candidates: Candidates, always_keep: NDArray[np.bool_]) -> Ranking:
    """Rank the photos of one label, those that are always kept before all others.

    Parameters
    ----------
    strategy : str
        One of `STRATEGIES`; it also decides how the photos that are always kept stand among themselves.
    candidates : Candidates
        The photos; ``first`` is not used.
    always_keep : ndarray of bool, shape (n,)
        Whether a photo is always kept.
    """
    order = STRATEGIES[strategy]
    if not always_keep.any():
        return order(candidates)
    chosen = np.flatnonzero(always_keep)
    return order(replace(candidates, first=chosen[order(candidates.among(chosen)).order]))


def nearest_kept(points: Points, ids: Sequence[str], kept: Positions) -> tuple[Positions, Steps]:
    """Return for every photo the nearest of the kept ones, of equally near ones that with the smallest id.

    Parameters
    ----------
    points : Points
        The photos.
    ids : sequence of str
        Id of each photo.
    kept : ndarray of int64, shape (k,)
        Positions of the kept photos, k >= 1. The nearest to a kept photo is itself.

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


def _in_id_order(candidates: Candidates) -> tuple[Positions, Positions]:
    """Return the positions in the order of the ids, and the places in it of the photos that are ranked already."""
    ids = candidates.ids
    by_id = np.array(sorted(range(len(ids)), key=ids.__getitem__), dtype=np.int64)
    place = np.empty(len(ids), dtype=np.int64)
    place[by_id] = np.arange(len(ids))
    return by_id, place[:0] if candidates.first is None else place[candidates.first]


def _insertion_distances(points: Points, order: Positions) -> NDArray[np.float64]:
    """Return the distance of each photo in an order to the nearest before it, as `Ranking` has it."""
    nearest = np.full(len(order), points.farthest, dtype=points.dtype)
    together = COMPUTED_TOGETHER if points.is_costly else 1
    for start in range(0, len(order) - 1, together):
        block, later = order[start : start + together], order[start + 1 :]
        rows = points.between(block, later) if points.is_costly else points.to(int(block[0]))[later][None]
        for place, row in enumerate(rows):  # each photo counts only for those behind it
            np.minimum(nearest[start + place + 1 :], row[place:], out=nearest[start + place + 1 :])
    insertion = nearest * points.step
    insertion[:1] = np.nan
    return insertion


class _EagerNearest:
    """The photos taken, and the distance of each other photo to the nearest of them.

    Attributes
    ----------
    nearest : ndarray of int, shape (n,)
        In steps; -1 for photos that are taken.
    """

    def __init__(self, points: Points) -> None:
        self.points = points
        self.nearest = np.full(len(points), points.farthest, dtype=points.dtype)

    def add(self, pick: int) -> None:
        np.minimum(self.nearest, self.points.to(pick), out=self.nearest)
        self.nearest[pick] = -1

    def farthest(self, distinct: NearCopyFilter) -> int:
        """Return the photo farthest from those taken, of equals the first, of those that may be taken now."""
        return int(np.argmax(distinct.only_ready(self.nearest)))


class _LazyNearest(_EagerNearest):
    """Distances to the nearest taken photo, computed only for photos that come to the top: they never grow.

    The picks are those of `_EagerNearest`. Each photo is compared at once with all picks since the last time, many
    photos together.
    """

    def __init__(self, points: Points) -> None:
        super().__init__(points)
        self.picks: list[int] = []
        #: Number of picks that each photo has been compared with.
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
            top = np.argpartition(worth, -min(COMPUTED_TOGETHER, len(worth)))[-COMPUTED_TOGETHER:]
            top = np.union1d(top, pick)  # of more equal photos than these, the first may not be among them
            top = top[(worth[top] >= 0) & (self.compared[top] < len(self.picks))]
            missing = np.array(self.picks[int(self.compared[top].min()) :], dtype=np.int64)
            self.nearest[top] = np.minimum(self.nearest[top], self.points.between(top, missing).min(axis=1))
            self.compared[top] = len(self.picks)


def _farthest_behind(points: Points, picked: Positions, by_id: Positions, distinct: NearCopyFilter) -> Ranking:
    """Rank by farthest-first behind the photos that are picked already; points and picks are in id order."""
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


def _drawn(candidates: Candidates, ids: Sequence[str]) -> Positions:
    """Return the positions of the candidates' ids, in whatever order these stand, in an order drawn at random."""
    return np.array(draw_order(RANDOM_ORDER, candidates.seed, candidates.label, ids), dtype=np.int64)


def _behind(first: Positions, order: Positions, distinct: NearCopyFilter) -> Positions:
    """Return an order of all photos with some moved to its beginning, and near copies put last."""
    for pick in first.tolist():
        distinct.take(pick)
    return np.concatenate([first, distinct.split(order[~np.isin(order, first)])])
