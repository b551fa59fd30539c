"""From packed hashes to an order: the first K of a label are its K most different photos, for every K.

One function a strategy, one signature, that of `Strategy`. All are pure and deterministic; ties are broken by id, so
the order of the input does not matter.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from reducer.draw import RANDOM_ORDER, draw_order

Hashes = NDArray[np.uint8]
Positions = NDArray[np.int64]

MEDOID_BLOCK = 1000
#: Facility location chooses so many photos of a label at least (or as many as are kept); the others follow by
#: farthest-first, since what it gains by one more photo comes to nothing by then.
FACILITY_LOCATION_RANKS = 100
#: It holds the distances of all pairs of a label: so many candidates take 400 MB a thread, 800 MB with hashes over 255
#: bits.
FACILITY_LOCATION_CANDIDATES = 20_000


@dataclass(frozen=True)
class Ranking:
    """A full order of the candidates of one label.

    Attributes
    ----------
    order : ndarray of int64, shape (n,)
        Positions of the candidates, best first.
    insertion_distance : ndarray of float64, shape (n,)
        For each place in ``order``, the distance to the nearest candidate before it, in bits; NaN at place 0.
    """

    order: Positions
    insertion_distance: NDArray[np.float64]


def as_words(hashes: Hashes) -> NDArray[np.uint64]:
    """View packed hashes as 64-bit words, which `numpy.bitwise_count` counts fastest.

    Parameters
    ----------
    hashes : ndarray of uint8, shape (n, hash bytes)
        Packed hashes; padded with zero bytes up to whole words.

    Returns
    -------
    ndarray of uint64, shape (words, n)
        Word by word, so that each is contiguous.
    """
    missing = -hashes.shape[1] % 8
    padded = np.pad(hashes, ((0, 0), (0, missing))) if missing else np.ascontiguousarray(hashes)
    return np.ascontiguousarray(padded.view(np.uint64).T)


def distances_to(words: NDArray[np.uint64], one: NDArray[np.uint64]) -> NDArray[np.int32]:
    """Hamming distances of all hashes to one.

    Parameters
    ----------
    words : ndarray of uint64, shape (words, n)
        From `as_words`.
    one : ndarray of uint64, shape (words,)
        A column of it, or of another's.

    Returns
    -------
    ndarray of int32, shape (n,)
        In bits.
    """
    distance: NDArray[np.int32] = np.bitwise_count(words[0] ^ one[0]).astype(np.int32)
    for word, its in zip(words[1:], one[1:], strict=True):
        distance += np.bitwise_count(word ^ its)
    return distance


def medoid(hashes: Hashes) -> int:
    """Position of the hash with the smallest sum of distances to all others, the first of equals.

    Parameters
    ----------
    hashes : ndarray of uint8, shape (n, hash bytes)
        Packed hashes, n >= 1.

    Notes
    -----
    A hash differs in a bit from as many others as do not have that bit's value, so the sums follow from one
    count a bit: no n x n matrix.
    """
    # A block at a time: as numbers, bits take up to 64 times their room.
    blocks = [hashes[start : start + MEDOID_BLOCK] for start in range(0, len(hashes), MEDOID_BLOCK)]
    ones = sum(np.unpackbits(block, axis=1).sum(axis=0, dtype=np.int64) for block in blocks)
    # With bit b set the photo differs from (n - ones) others, unset from (ones): sums are ones + b (n - 2 ones).
    sums = np.concatenate([np.unpackbits(block, axis=1) @ (len(hashes) - 2 * ones) for block in blocks])
    return int(np.argmin(sums))


def _in_id_order(ids: Sequence[str], first: Positions | None) -> tuple[Positions, Positions]:
    """Positions in the order of the ids, and where in it those stand that come first."""
    by_id = np.array(sorted(range(len(ids)), key=ids.__getitem__), dtype=np.int64)
    place = np.empty(len(ids), dtype=np.int64)
    place[by_id] = np.arange(len(ids))
    return by_id, place[:0] if first is None else place[first]


def _insertion_distances(hashes: Hashes) -> NDArray[np.float64]:
    """Distance of each hash to the nearest before it, for hashes that are already in order."""
    words = as_words(hashes)
    nearest = np.full(len(hashes), np.iinfo(np.int32).max, dtype=np.int32)
    for place in range(len(hashes) - 1):
        later = words[:, place:]
        np.minimum(nearest[place + 1 :], distances_to(later, later[:, 0])[1:], out=nearest[place + 1 :])
    insertion = nearest.astype(np.float64)
    insertion[:1] = np.nan
    return insertion


class Strategy(Protocol):
    """A way to rank the photos of one label."""

    def __call__(
        self,
        hashes: Hashes,
        ids: Sequence[str],
        *,
        first: Positions | None = None,
        keep: int = 1,
        label: str = "",
        seed: int = 0,
    ) -> Ranking:
        """Rank them.

        Parameters
        ----------
        hashes : ndarray of uint8, shape (n, hash bytes)
            Packed hashes.
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
        """


def farthest_first(
    hashes: Hashes,
    ids: Sequence[str],
    *,
    first: Positions | None = None,
    keep: int = 1,
    label: str = "",
    seed: int = 0,
) -> Ranking:
    """Start at the medoid, then always take the photo farthest from those taken.

    The first K are within a factor 2 of the best K, for the smallest pair distance and for the coverage
    radius (Gonzalez 1985, "Clustering to minimize the maximum intercluster distance").

    Parameters
    ----------
    hashes, ids, first, keep, label, seed
        As for every `Strategy`; the last three are not used.
    """
    by_id, picked = _in_id_order(ids, first)
    return _farthest_behind(hashes[by_id], picked, by_id)


def _farthest_behind(hashes: Hashes, picked: Positions, by_id: Positions) -> Ranking:
    """Farthest-first behind what is picked already; hashes and picks are in id order."""
    count = len(picked)
    order = np.empty(len(hashes), dtype=np.int64)
    order[:count] = picked
    insertion = np.zeros(len(hashes))
    insertion[:count] = _insertion_distances(hashes[picked])
    words = as_words(hashes)
    nearest = np.full(len(hashes), np.iinfo(np.int32).max, dtype=np.int32)
    for pick in picked.tolist():
        np.minimum(nearest, distances_to(words, words[:, pick]), out=nearest)
    nearest[picked] = -1
    for place in range(count, len(hashes)):
        if place == 0:
            pick = medoid(hashes)
            insertion[0] = np.nan
        else:
            pick = int(np.argmax(nearest))  # the first of equals, and they stand in id order
            if nearest[pick] == 0:
                # Only exact copies of earlier picks are left: any order of theirs is farthest-first.
                order[place:] = np.flatnonzero(nearest == 0)
                break
            insertion[place] = nearest[pick]
        order[place] = pick
        np.minimum(nearest, distances_to(words, words[:, pick]), out=nearest)
        nearest[pick] = -1
    return Ranking(by_id[order], insertion)


def facility_location(
    hashes: Hashes,
    ids: Sequence[str],
    *,
    first: Positions | None = None,
    keep: int = 1,
    label: str = "",
    seed: int = 0,
) -> Ranking:
    """Always take the photo that brings the label's photos nearest to those taken, all in all.

    Greedy facility location: it adds the photo with the largest gain in the sum, over all photos of the label, of the
    similarity (bits minus distance) to the most similar photo taken; so it starts at the medoid, and is within a factor
    1 - 1/e of the best sum (Nemhauser, Wolsey and Fisher 1978). The first ``max(keep, 100)`` are chosen so, the
    others follow by farthest-first.

    Parameters
    ----------
    hashes, ids, first, keep, label, seed
        As for every `Strategy`; the last two are not used. At most `FACILITY_LOCATION_CANDIDATES` photos.

    Notes
    -----
    Lazy (Minoux 1978): no gain ever grows, so the old ones are upper bounds, and only those that come to the top are
    computed again. The picks are those of the plain rule. Memory: n x n distances of 1 byte, or of 2 for more than
    255 bits.
    """
    by_id, picked = _in_id_order(ids, first)
    hashes = hashes[by_id]
    return _farthest_behind(hashes, _cover(hashes, picked, max(keep, FACILITY_LOCATION_RANKS)), by_id)


def _cover(hashes: Hashes, picked: Positions, count: int) -> Positions:
    """Picks of the greedy rule, ``count`` with those there are already; hashes and picks are in id order."""
    words = as_words(hashes)
    bits = 8 * hashes.shape[1]
    n = len(hashes)
    distance = np.zeros((n, n), dtype=np.uint8 if bits <= np.iinfo(np.uint8).max else np.uint16)
    for i, row in enumerate(distance):
        for word in words:
            np.add(row, np.bitwise_count(word ^ word[i]), out=row)
    # Before the first pick every photo is as far as can be from what is taken: its similarity to nothing is 0.
    nearest = np.full(n, bits, dtype=distance.dtype)
    for pick in picked.tolist():
        np.minimum(nearest, distance[pick], out=nearest)
    moved = np.empty_like(nearest)

    def gain(i: int, total: int) -> int:
        return total - int(np.minimum(nearest, distance[i], out=moved).sum(dtype=np.uint32))

    picks: list[int] = picked.tolist()
    taken = set(picks)
    total = int(nearest.sum(dtype=np.uint32))
    # (minus the gain, position in id order, number of picks when it was computed)
    heap = [(-gain(i, total), i, len(picks)) for i in range(n) if i not in taken]
    heapq.heapify(heap)
    while heap and len(picks) < count:
        _, i, when = heap[0]
        if when < len(picks):
            heapq.heapreplace(heap, (-gain(i, total), i, len(picks)))
            continue
        heapq.heappop(heap)
        picks.append(i)
        np.minimum(nearest, distance[i], out=nearest)
        total = int(nearest.sum(dtype=np.uint32))
    return np.array(picks, dtype=np.int64)


def pairs(
    hashes: Hashes,
    ids: Sequence[str],
    *,
    first: Positions | None = None,
    keep: int = 1,
    label: str = "",
    seed: int = 0,
) -> Ranking:
    """The notebook's rule, its defects mended: the most distant pairs first, both ends of each in turn.

    Pairs stand by descending distance, equal ones by (smaller id, larger id); a photo gets its place when the
    first pair that it is in comes up.

    Parameters
    ----------
    hashes, ids, first, keep, label, seed
        As for every `Strategy`; the last three are not used.

    Notes
    -----
    The list of pairs is never made. The first pair that a photo is in is the one with its farthest
    photo, of equally far ones the one with the smallest id; so one row of distances a photo is enough.
    """
    by_id, picked = _in_id_order(ids, first)
    hashes = hashes[by_id]
    words = as_words(hashes)
    n = len(by_id)
    farthest = np.zeros(n, dtype=np.int64)
    partner = np.zeros(n, dtype=np.int64)
    for i in range(n if n > 1 else 0):
        distance = distances_to(words, words[:, i])
        distance[i] = -1  # a photo makes no pair with itself, not even among exact copies
        partner[i] = np.argmax(distance)
        farthest[i] = distance[partner[i]]
    own = np.arange(n)
    order = _behind(picked, np.lexsort((own, np.maximum(own, partner), np.minimum(own, partner), -farthest)))
    return Ranking(by_id[order], _insertion_distances(hashes[order]))


def random(
    hashes: Hashes,
    ids: Sequence[str],
    *,
    first: Positions | None = None,
    keep: int = 1,
    label: str = "",
    seed: int = 0,
) -> Ranking:
    """The baseline: the order of a keyed draw (`reducer.draw`), whatever the hashes are.

    Parameters
    ----------
    hashes, ids, first, keep, label, seed
        As for every `Strategy`; ``keep`` is not used.
    """
    drawn = np.array(draw_order(RANDOM_ORDER, seed, label, ids), dtype=np.int64)
    order = drawn if first is None else _behind(first, drawn)
    return Ranking(order, _insertion_distances(hashes[order]))


def _behind(first: Positions, order: Positions) -> Positions:
    """An order of all, but with some of them first."""
    return np.concatenate([first, order[~np.isin(order, first)]])


STRATEGIES: dict[str, Strategy] = {
    "farthest-first": farthest_first,
    "facility-location": facility_location,
    "pairs": pairs,
    "random": random,
}


def rank(
    strategy: str,
    hashes: Hashes,
    ids: Sequence[str],
    *,
    always_keep: NDArray[np.bool_],
    keep: int,
    label: str,
    seed: int,
) -> Ranking:
    """Rank the photos of one label, those that are always kept before all others.

    Parameters
    ----------
    strategy : str
        One of `STRATEGIES`; it also decides how the photos that are always kept stand among themselves.
    hashes, ids, keep, label, seed
        As for every `Strategy`.
    always_keep : ndarray of bool, shape (n,)
        Whether a photo is always kept.
    """
    order = STRATEGIES[strategy]
    first = None
    if always_keep.any():
        chosen = np.flatnonzero(always_keep)
        names = [ids[i] for i in chosen.tolist()]
        first = chosen[order(hashes[chosen], names, keep=keep, label=label, seed=seed).order]
    return order(hashes, ids, first=first, keep=keep, label=label, seed=seed)


def nearest_kept(
    hashes: Hashes, ids: Sequence[str], kept: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """For every photo the nearest of the kept ones, of equally near ones that with the smallest id.

    Parameters
    ----------
    hashes : ndarray of uint8, shape (n, hash bytes)
        Packed hashes.
    ids : sequence of str
        Their ids.
    kept : ndarray of int64, shape (k,)
        Positions of the kept photos, k >= 1. A kept photo's nearest is itself.

    Returns
    -------
    positions : ndarray of int64, shape (n,)
    distances : ndarray of float64, shape (n,)
        In bits.
    """
    words = as_words(hashes)
    best = np.full(len(hashes), np.iinfo(np.int32).max, dtype=np.int32)
    position = np.zeros(len(hashes), dtype=np.int64)
    for keeper in sorted(kept.tolist(), key=lambda i: ids[i]):
        distance = distances_to(words, words[:, keeper])
        nearer = distance < best
        best[nearer] = distance[nearer]
        position[nearer] = keeper
    position[kept] = kept
    best[kept] = 0
    return position, best.astype(np.float64)


def near_any(hashes: Hashes, others: Hashes, distance: int) -> NDArray[np.bool_]:
    """Which hashes are near one of others.

    Parameters
    ----------
    hashes : ndarray of uint8, shape (n, hash bytes)
        Packed hashes.
    others : ndarray of uint8, shape (m, hash bytes)
        Those to be near to.
    distance : int
        How near, in bits: at most so far apart.

    Returns
    -------
    ndarray of bool, shape (n,)
    """
    if len(others) == 0:
        return np.zeros(len(hashes), dtype=bool)
    words = as_words(others)
    return np.array([distances_to(words, one).min() <= distance for one in as_words(hashes).T], dtype=bool)
