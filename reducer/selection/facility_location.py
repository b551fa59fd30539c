"""Greedy facility location, and the filter that puts near copies last."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from reducer.selection.distance import Points, Steps, as_words, distances_to
from reducer.storage.codecs import Hashes, Positions

#: Candidates that the plain rule chooses from; larger labels are divided into parts first (`facility_location_order`).
FACILITY_LOCATION_CANDIDATES = 20_000
#: Bytes that the distances of all pairs may take; where they would take more they are computed when they are needed.
MATRIX_BYTES = 2**29
#: Photos whose distances are computed at a time then.
ASKED_TOGETHER = 64


@dataclass(frozen=True)
class NearCopies:
    """Hashes that tell near copies among the photos of a label.

    Attributes
    ----------
    hashes : ndarray of uint8, shape (n, hash bytes)
        Packed hashes.
    near : int
        Largest distance, in bits, at which two photos are near copies.
    """

    hashes: Hashes
    near: int

    def among(self, positions: Positions) -> NearCopies:
        """Return those of some of the photos."""
        return NearCopies(self.hashes[positions], self.near)


class NearCopyFilter:
    """A filter of the photos that may be taken now: near copies of those taken wait until no other is left.

    Parameters
    ----------
    copies : NearCopies or None
        None where no photo waits.
    order : ndarray of int64, shape (n,)
        Positions in ``copies`` of the photos, in the order in which this filter counts them.
    """

    def __init__(self, copies: NearCopies | None, order: Positions) -> None:
        self._copies = None if copies is None else copies.among(order)
        self._words = None if self._copies is None else as_words(self._copies.hashes)
        self._waits = np.zeros(len(order), dtype=bool)

    def restarted(self) -> NearCopyFilter:
        """Return a filter of the same photos where nothing is taken yet."""
        return NearCopyFilter(self._copies, np.arange(len(self._waits)))

    def of(self, positions: Positions) -> NearCopyFilter:
        """Return a filter of some of the photos where nothing is taken yet."""
        return NearCopyFilter(self._copies, positions) if self._copies is not None else NearCopyFilter(None, positions)

    def take(self, position: int) -> None:
        """Make the near copies of a photo that is taken wait."""
        if self._copies is not None and self._words is not None:
            self._waits |= distances_to(self._words, self._words[:, position]) <= self._copies.near

    def waits(self, position: int) -> bool:
        """Return whether a photo is a near copy of one that is taken."""
        return bool(self._waits[position])

    def only_ready(self, worth: Steps) -> Steps:
        """Return the worth of photos, but -1 for those that may not be taken now; taken ones have -1 already."""
        if self._copies is None:
            return worth
        ready = np.where(self._waits, -1, worth)
        return ready if (ready >= 0).any() else worth

    def split(self, order: Positions) -> Positions:
        """Return an order of photos that are not taken, near copies of those before them put last."""
        if self._copies is None:
            return order
        now, later = [], []
        for position in order.tolist():
            if self.waits(position):
                later.append(position)
            else:
                self.take(position)
                now.append(position)
        return np.array(now + later, dtype=np.int64)


def facility_location_order(
    points: Points, picked: Positions, count: int, distinct: NearCopyFilter, draw: Callable[[], Positions]
) -> Positions:
    """Choose the first photos of a label by greedy facility location.

    Up to `FACILITY_LOCATION_CANDIDATES` photos it is the plain rule, within a factor 1 - 1/e of the best sum
    (Nemhauser, Wolsey and Fisher 1978), computed lazily (Minoux 1978): no gain ever grows, so the old ones are upper
    bounds, and only those that come to the top are computed again. Of more photos the rule first chooses ``count`` of
    each of equal parts, drawn at random, and then from these only, for the good of all photos (GreeDi: Mirzasoleiman,
    Karbasi, Sarkar and Krause 2013, "Distributed submodular maximization").

    Parameters
    ----------
    points : Points
        The photos, in the order of their ids.
    picked : ndarray of int64, shape (m,)
        Positions of photos that are taken already.
    count : int
        Photos to take, those included.
    distinct : NearCopyFilter
        Filter of the same photos, where nothing is taken yet; it is used up.
    draw : callable
        Gives the photos in an order drawn at random.

    Returns
    -------
    ndarray of int64, shape (min(n, max(m, count)),)
        Positions, those already taken first.

    Notes
    -----
    Memory: the distances of all pairs where they take at most `MATRIX_BYTES`, else of a few photos to all.
    """
    everyone = np.arange(len(points))
    if len(points) <= FACILITY_LOCATION_CANDIDATES:
        return _greedy(points, everyone, picked, count, distinct)
    order, parts = draw(), -(-len(points) // FACILITY_LOCATION_CANDIDATES)
    chosen = []
    for number in range(parts):
        part = np.sort(order[number::parts])
        taken = np.flatnonzero(np.isin(part, picked))
        chosen.append(part[_greedy(points.take(part), np.arange(len(part)), taken, count, distinct.of(part))])
    return _greedy(points, np.union1d(np.concatenate(chosen), picked), picked, count, distinct)


class _Rows:
    """Distances of single photos to all, held where there is room for them."""

    def __init__(self, points: Points, candidates: Positions) -> None:
        self.points = points
        first = points.rows(candidates[:1])
        self.dtype = first.dtype
        self.held: Steps | None = None
        if len(candidates) * first.nbytes <= MATRIX_BYTES:
            self.held = points.rows(candidates)
            self.place = np.zeros(len(points), dtype=np.int64)
            self.place[candidates] = np.arange(len(candidates))
        #: Photos that are asked for at a time.
        self.together = 1 if self.held is not None else ASKED_TOGETHER

    def __getitem__(self, positions: list[int]) -> Steps:
        wanted = np.array(positions, dtype=np.int64)
        return self.points.rows(wanted) if self.held is None else self.held[self.place[wanted]]


def _greedy(
    points: Points, candidates: Positions, picked: Positions, count: int, distinct: NearCopyFilter
) -> Positions:
    """Return the picks of the greedy rule among some photos, for the good of all; positions are in id order."""
    picks: list[int] = picked.tolist()
    if len(candidates) == 0 or len(picks) >= count:
        return picked
    rows = _Rows(points, candidates)
    # Before the first pick every photo is as far as can be from what is taken: its similarity to nothing is 0.
    nearest = np.full(len(points), points.farthest, dtype=rows.dtype)

    def take(position: int) -> None:
        np.minimum(nearest, rows[[position]][0], out=nearest)
        distinct.take(position)

    def gains(positions: list[int], total: int) -> list[int]:
        moved = np.minimum(nearest, rows[positions]).sum(axis=1, dtype=np.uint64)
        return [total - after for after in moved.tolist()]

    for pick in picks:
        take(pick)
    total, taken = int(nearest.sum(dtype=np.uint64)), set(picks)
    left = [i for i in candidates.tolist() if i not in taken]
    # (minus the gain, position in id order, number of picks when it was computed)
    heap: list[tuple[int, int, int]] = []
    for start in range(0, len(left), ASKED_TOGETHER):
        block = left[start : start + ASKED_TOGETHER]
        heap += [(-gain, i, len(picks)) for i, gain in zip(block, gains(block, total), strict=True)]
    heapq.heapify(heap)
    waiting: list[tuple[int, int, int]] = []
    while len(picks) < count and (heap or waiting):
        if not heap:  # only near copies of those taken are left
            heap, waiting, distinct = waiting, [], NearCopyFilter(None, np.arange(len(points)))
            heapq.heapify(heap)
        stale: list[int] = []
        while heap and len(stale) < rows.together:
            if distinct.waits(heap[0][1]):
                waiting.append(heapq.heappop(heap))
            elif heap[0][2] < len(picks):
                stale.append(heapq.heappop(heap)[1])
            else:
                break
        if stale:
            for i, gain in zip(stale, gains(stale, total), strict=True):
                heapq.heappush(heap, (-gain, i, len(picks)))
        elif heap:
            _, pick, _ = heapq.heappop(heap)
            picks.append(pick)
            take(pick)
            total = int(nearest.sum(dtype=np.uint64))
    return np.array(picks, dtype=np.int64)
