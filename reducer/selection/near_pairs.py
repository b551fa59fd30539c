"""All pairs of hashes a given number of bits apart, without comparing each with each (multi-index hashing).

Hashes d bits apart agree on all but d blocks of their bits, so it is enough to sort them by the other blocks, for each
choice of d blocks, and to compare those with equal keys. Sources: Norouzi, Punjani and Fleet 2012, "Fast search in
Hamming space with multi-index hashing"; with keys of several blocks as by Manku, Jain and Das Sarma 2007, "Detecting
near-duplicates for web crawling".
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from reducer.storage.codecs import Positions
from reducer.storage.sorting import is_new

Words = NDArray[np.uint64]

#: Blocks that the bits are cut into, beyond the number of bits that two hashes can differ in. One more makes longer
#: keys, so that fewer pairs are compared, but more tables; 2 was fastest for pairs 2 bits apart among 1.6 million.
SPARE_BLOCKS = 2
#: Hashes by which the bits are dealt to the blocks.
SAMPLED_HASHES = 2**14
#: Pairs that are compared at a time.
COMPARED_PAIRS = 2**19
#: Pairs of hashes with equal keys that are compared directly; where there are more, the other bits of these hashes are
#: cut into blocks in their turn.
DIRECT_PAIRS = 2**18


def pairs_at(words: Words, numbers: NDArray[np.int64], distance: int) -> Iterator[tuple[Positions, Positions]]:
    """Yield all pairs of hashes that are a given distance apart and have different numbers, each pair once.

    Parameters
    ----------
    words : ndarray of uint64, shape (words, n)
        The hashes, no two equal.
    numbers : ndarray of int64, shape (n,)
        Number of each hash. Pairs of equal numbers cost nothing, however many there are.
    distance : int
        In bits, 1 or more.

    Yields
    ------
    left, right : ndarray of int64, shape (m,)
        Positions of the two hashes of each pair.
    """
    if len(numbers) < 2:
        return
    # Sorting by key keeps this order, so that equal numbers stand together within a key.
    by_number = np.argsort(numbers, kind="stable")
    words, numbers = words[:, by_number], numbers[by_number]
    masks = _masks(words, distance)
    for table, mask in enumerate(masks):
        key = _key(words, mask)
        order = np.argsort(key, kind="stable")
        for here, there in _pairs_of_equal_key(key[order], words[:, order], numbers[order], distance):
            left, right = order[here], order[there]
            difference = words[:, left] ^ words[:, right]
            # Each pair by the first table only whose mask it agrees on; two keys can be equal by chance, too.
            in_no_earlier = np.all([_touches(difference, earlier) for earlier in masks[:table]], axis=0)
            new = ~_touches(difference, mask) & in_no_earlier
            yield by_number[left[new]], by_number[right[new]]


def _touches(difference: Words, mask: Words) -> NDArray[np.bool_]:
    """Return for each pair whether its hashes differ in a bit of a mask, shape (pairs,)."""
    touches: NDArray[np.bool_] = np.any(difference & mask[:, np.newaxis], axis=0)
    return touches


def _masks(words: Words, distance: int) -> Words:
    """Return the bits that each table's key is made of, shape (tables, words).

    Two hashes ``distance`` bits apart agree on all bits of at least one of the masks, whatever bits the blocks are made
    of. So the bits that hardly any hashes differ in are spread over all blocks, as are those that many do: otherwise
    many keys would be equal.
    """
    sample = np.ascontiguousarray(words[:, :: -(-words.shape[1] // SAMPLED_HASHES)])
    ones = np.unpackbits(sample.view(np.uint8).reshape(*sample.shape, 8), axis=2).sum(axis=1, dtype=np.int64)
    rarer = np.minimum(ones, sample.shape[1] - ones).ravel()
    blocks = distance + SPARE_BLOCKS
    block = np.empty(len(rarer), dtype=np.int64)
    block[np.argsort(-rarer, kind="stable")] = np.arange(len(rarer)) % blocks
    block[rarer == 0] = -1
    kept = combinations(range(blocks), SPARE_BLOCKS)
    return np.array([np.packbits(np.isin(block, choice)).view(np.uint64) for choice in kept])


def _key(words: Words, mask: Words) -> Words:
    """Return one number per hash for its bits in a mask; with several words, different bits seldom have equal keys."""
    key: Words = words[0] & mask[0]
    for word, mask_word in zip(words[1:], mask[1:], strict=True):
        key *= np.uint64(0x9E3779B97F4A7C15)  # odd, and its bits look random (2**64 over the golden ratio)
        key ^= key >> np.uint64(32)
        key += word & mask_word
    return key


def _pairs_of_equal_key(
    key: Words, words: Words, numbers: NDArray[np.int64], distance: int
) -> Iterator[tuple[Positions, Positions]]:
    """Yield the pairs of `pairs_at` whose keys are equal; hashes are sorted by (key, number)."""
    count = len(key)
    key_starts, run_starts = np.flatnonzero(is_new(key)), np.flatnonzero(is_new(key, numbers))
    if len(key_starts) == len(run_starts):
        return  # wherever keys are equal, so are the numbers
    key_ends, run_ends = np.append(key_starts[1:], count), np.append(run_starts[1:], count)
    # Each hash is compared with those of its key that stand behind those of its number.
    begin = np.repeat(run_ends, np.diff(run_starts, append=count))
    others = np.repeat(key_ends, key_ends - key_starts) - begin
    pairs = np.add.reduceat(others, key_starts)
    # A group of all hashes is not divided again: that would not end.
    for group in np.flatnonzero((pairs > DIRECT_PAIRS) & (key_ends - key_starts < count)):
        start, end = key_starts[group], key_ends[group]
        others[start:end] = 0
        for left, right in pairs_at(words[:, start:end], numbers[start:end], distance):
            yield start + left, start + right
    compared = np.flatnonzero(others)
    begin, others = begin[compared], others[compared]
    until = np.cumsum(others)
    done = 0
    while done < len(compared):
        before = until[done] - others[done]
        stop = max(done + 1, int(np.searchsorted(until, before + COMPARED_PAIRS, side="right")))
        times = others[done:stop]
        left = np.repeat(compared[done:stop], times)
        first_pair = until[done:stop] - times - before
        right = np.arange(len(left)) + np.repeat(begin[done:stop] - first_pair, times)
        apart = np.zeros(len(left), dtype=np.uint16)
        for word in words:
            apart += np.bitwise_count(word[left] ^ word[right])
        near = apart == distance
        if near.any():
            yield left[near], right[near]
        done = stop
