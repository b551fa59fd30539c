"""From packed hashes to an order: the first K of a label are its K most different photos, for every K.

One function a strategy, one signature: ``(hashes, ids, label, seed) -> Ranking``. All are pure and
deterministic; ties are broken by id, so the order of the input does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reducer.draw import RANDOM_ORDER, draw_order

Hashes = NDArray[np.uint8]


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

    order: NDArray[np.int64]
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


def distances_to(words: NDArray[np.uint64], position: int) -> NDArray[np.int32]:
    """Hamming distances of all hashes to the one at ``position``.

    Parameters
    ----------
    words : ndarray of uint64, shape (words, n)
        From `as_words`.
    position : int
        Which one.

    Returns
    -------
    ndarray of int32, shape (n,)
        In bits.
    """
    distance: NDArray[np.int32] = np.bitwise_count(words[0] ^ words[0, position]).astype(np.int32)
    for word in words[1:]:
        distance += np.bitwise_count(word ^ word[position])
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
    bits = np.unpackbits(hashes, axis=1)
    ones = bits.sum(axis=0, dtype=np.int64)
    # With bit b set the photo differs from (n - ones) others, unset from (ones): sums are ones + b (n - 2 ones).
    sums = bits @ (len(hashes) - 2 * ones)
    return int(np.argmin(sums))


def _by_id(ids: Sequence[str]) -> NDArray[np.int64]:
    return np.array(sorted(range(len(ids)), key=ids.__getitem__), dtype=np.int64)


def _insertion_distances(hashes: Hashes) -> NDArray[np.float64]:
    """Distance of each hash to the nearest before it, for hashes that are already in order."""
    words = as_words(hashes)
    nearest = np.full(len(hashes), np.iinfo(np.int32).max, dtype=np.int32)
    for place in range(len(hashes) - 1):
        later = words[:, place:]
        np.minimum(nearest[place + 1 :], distances_to(later, 0)[1:], out=nearest[place + 1 :])
    insertion = nearest.astype(np.float64)
    insertion[:1] = np.nan
    return insertion


def farthest_first(hashes: Hashes, ids: Sequence[str], label: str = "", seed: int = 0) -> Ranking:
    """Start at the medoid, then always take the photo farthest from those taken.

    The first K are within a factor 2 of the best K, for the smallest pair distance and for the coverage
    radius (Gonzalez 1985, "Clustering to minimize the maximum intercluster distance").

    Parameters
    ----------
    hashes : ndarray of uint8, shape (n, hash bytes)
        Packed hashes.
    ids : sequence of str
        Their ids, unique; ties are broken by them.
    label, seed
        Not used here.
    """
    by_id = _by_id(ids)
    if len(by_id) == 0:
        return Ranking(by_id, np.empty(0))
    hashes = hashes[by_id]
    words = as_words(hashes)
    order = np.empty(len(by_id), dtype=np.int64)
    insertion = np.zeros(len(by_id))
    insertion[0] = np.nan
    order[0] = pick = medoid(hashes)
    nearest = distances_to(words, pick)
    nearest[pick] = -1
    for place in range(1, len(by_id)):
        pick = int(np.argmax(nearest))  # the first of equals, and they stand in id order
        if nearest[pick] == 0:
            # Only exact copies of earlier picks are left: any order of theirs is farthest-first.
            order[place:] = np.flatnonzero(nearest == 0)
            break
        order[place] = pick
        insertion[place] = nearest[pick]
        np.minimum(nearest, distances_to(words, pick), out=nearest)
        nearest[pick] = -1
    return Ranking(by_id[order], insertion)


def pairs(hashes: Hashes, ids: Sequence[str], label: str = "", seed: int = 0) -> Ranking:
    """The notebook's rule, its defects mended: the most distant pairs first, both ends of each in turn.

    Pairs stand by descending distance, equal ones by (smaller id, larger id); a photo gets its place when the
    first pair that it is in comes up.

    Parameters
    ----------
    hashes, ids, label, seed
        As for `farthest_first`.

    Notes
    -----
    The list of pairs is never made. The first pair that a photo is in is the one with its farthest
    photo, of equally far ones the one with the smallest id; so one row of distances a photo is enough.
    """
    by_id = _by_id(ids)
    hashes = hashes[by_id]
    words = as_words(hashes)
    n = len(by_id)
    farthest = np.zeros(n, dtype=np.int64)
    partner = np.zeros(n, dtype=np.int64)
    for i in range(n if n > 1 else 0):
        distance = distances_to(words, i)
        distance[i] = -1  # a photo makes no pair with itself, not even among exact copies
        partner[i] = np.argmax(distance)
        farthest[i] = distance[partner[i]]
    own = np.arange(n)
    order = np.lexsort((own, np.maximum(own, partner), np.minimum(own, partner), -farthest))
    return Ranking(by_id[order], _insertion_distances(hashes[order]))


def random(hashes: Hashes, ids: Sequence[str], label: str = "", seed: int = 0) -> Ranking:
    """The baseline: the order of a keyed draw (`reducer.draw`), whatever the hashes are.

    Parameters
    ----------
    hashes, ids
        As for `farthest_first`.
    label : str
        The photos' label, part of the key.
    seed : int
        The job's seed, part of the key.
    """
    order = np.array(draw_order(RANDOM_ORDER, seed, label, ids), dtype=np.int64)
    return Ranking(order, _insertion_distances(hashes[order]))


Strategy = Callable[[Hashes, Sequence[str], str, int], Ranking]

STRATEGIES: dict[str, Strategy] = {"farthest-first": farthest_first, "pairs": pairs, "random": random}


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
        distance = distances_to(words, keeper)
        nearer = distance < best
        best[nearer] = distance[nearer]
        position[nearer] = keeper
    position[kept] = kept
    best[kept] = 0
    return position, best.astype(np.float64)
