"""Near copies under different labels, most of them label errors: which photo is like which of another label.

Pure and deterministic; of a million photos no two are compared without a reason (multi-index hashing).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import combinations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from reducer.config.settings import near_copy_bits
from reducer.storage.codecs import Hashes, Positions, all_from_hex
from reducer.storage.schemas import CROSS_LABEL_SCHEMA
from reducer.storage.sorting import is_new, text_ranks

Words = NDArray[np.uint64]

#: At how many bits apart, of 64, two photos of different labels are told of; also of longer hashes, and of shorter ones
#: as many in proportion. It is less than within a label: between labels there are far more pairs that could be alike by
#: chance.
CROSS_LABEL_BITS = 2
#: Pairs that one photo is in. Of a thousand photos that are all alike, as placeholders are, the first few say it all.
MOST_PAIRS = 20

#: Bits are cut into so many blocks more than two hashes can differ in. One more makes longer keys, so that fewer pairs
#: are compared, but more tables of them; with 1.6 million hashes 2 was the fastest for pairs 2 bits apart.
SPARE_BLOCKS = 2
#: Hashes by which the bits are dealt to the blocks.
SAMPLED_HASHES = 2**14
#: Pairs that are compared at a time.
COMPARED_PAIRS = 2**19
#: Of hashes with equal keys so many pairs are compared; with more, their other bits are cut into blocks in their turn.
DIRECT_PAIRS = 2**18
#: Pairs of hashes that are held until they are sorted. More come only of sets made for it.
HELD_PAIRS = 2**22
#: So many of them are tried before those are passed over, all at once, that can come to nothing any more.
EDGES = 2**12
#: Rows of the table that are gathered at a time; as a whole their text may be more than one Arrow array holds.
GATHERED_ROWS = 2**20


def cross_label_pairs(
    hashes: Hashes, labels: NDArray[np.int64], bits: int, *, most: int = MOST_PAIRS
) -> tuple[Positions, Positions, NDArray[np.int64]]:
    """Pairs of photos of different labels whose hashes are near each other.

    Parameters
    ----------
    hashes : ndarray of uint8, shape (n, hash bytes)
        Packed hashes, the photos in the order of their labels and, within a label, of their ids. Those with at most
        `near_copy_bits` ones, or so many zeros, are left out: a plain wall and a smooth gradient have
        them, whatever is to be seen.
    labels : ndarray of int64, shape (n,)
        Numbers of their labels, 0 or more, none less than the one before it.
    bits : int
        Bits of a hash. Pairs are at most `CROSS_LABEL_BITS` apart, of a hash under 64 bits as many in proportion.
    most : int
        Pairs that one photo is in, 1 to 255.

    Returns
    -------
    first, second : ndarray of int64, shape (pairs,)
        Positions of the two, first < second.
    distance : ndarray of int64, shape (pairs,)
        In bits. The pairs are sorted by (distance, first, second).

    Notes
    -----
    Where there are too many, the nearest are taken: pairs come in the order of (distance, smaller hash, larger hash,
    position of the photo with the smaller hash, position of the other), and each is taken if both photos are in less
    than ``most`` so far. So none can be added to those taken. (Over `HELD_PAIRS` pairs of hashes at one distance the
    order holds for each such share of them, which depends on nothing but the hashes either.)

    The search is multi-index hashing (Norouzi, Punjani and Fleet 2012, "Fast search in Hamming space with multi-index
    hashing"; with keys of several blocks as by Manku, Jain and Das Sarma 2007, "Detecting near-duplicates for web
    crawling"): hashes d bits apart agree on all but d blocks of their bits, so it is enough to sort them by the other
    blocks, for each choice of d, and to compare those with equal keys. Time and memory grow as n, apart from the
    sorting, unless the hashes themselves crowd.
    """
    photos = np.flatnonzero(~_flat(hashes, bits))
    if len(photos) == 0:
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64)
    words = _as_numbers(hashes[photos])
    by_hash = np.lexsort(words[::-1])  # equal ones stay in the order of their positions
    photos, words = photos[by_hash], words[:, by_hash]
    starts = np.flatnonzero(is_new(*words))
    words = np.ascontiguousarray(words[:, starts])

    taken = _PairLimit(photos, labels[photos], starts, most)
    taken.within()
    found = [len(taken.pairs)]
    for distance in range(1, min(CROSS_LABEL_BITS, CROSS_LABEL_BITS * bits // 64) + 1):
        # What has become full, or can meet its own label only, need not be looked for any more.
        groups = np.flatnonzero(taken.sole != FULL)
        held: list[NDArray[np.int64]] = []
        count = 0
        for one, other in _pairs_at(words[:, groups], taken.sole[groups], distance):
            # In the order of the groups, as in that of their hashes.
            held.append(groups[np.minimum(one, other)] << 32 | groups[np.maximum(one, other)])
            count += len(one)
            if count > HELD_PAIRS:
                taken.between(np.sort(np.concatenate(held)))
                held, count = [], 0
        if held:
            taken.between(np.sort(np.concatenate(held)))
        found.append(len(taken.pairs))

    pairs = np.asarray(taken.pairs, dtype=np.int64)
    for share in np.split(pairs, found[:-1]):
        share.sort()  # in place: views
    return pairs >> 32, pairs & 0xFFFFFFFF, np.repeat(np.arange(len(found)), np.diff(found, prepend=0))


def cross_label_table(ledger: pa.Table, bits: int) -> pa.Table:
    """The rows of ``cross_label.parquet``: `cross_label_pairs` of a ledger.

    Parameters
    ----------
    ledger : pyarrow.Table
        With the text columns ``id``, ``label``, ``path`` and ``hash`` (by `reducer.storage.codecs.to_hex`, null if
        not hashed), in any order. A file that stands under two labels is like itself, and told of too.
    bits : int
        Bits of a hash.

    Returns
    -------
    pyarrow.Table
        Of `CROSS_LABEL_SCHEMA`, sorted by (distance, label, id, other_label, other_id); ``label`` comes before
        ``other_label``.

    Raises
    ------
    ValueError
        If a hash is none of so many bits.
    """
    names = ["id", "label", "path", "hash"]
    photos = ledger.select(names)
    photos = photos.filter(pc.is_valid(photos["hash"])).combine_chunks()
    labels = text_ranks(photos["label"])
    # Path and hash decide only if a photo stands twice under a label.
    order = pc.sort_indices(
        photos.append_column("number", pa.array(labels)),
        sort_keys=[(name, "ascending") for name in ("number", "id", "path", "hash")],
    ).to_numpy()
    hashes = all_from_hex(photos["hash"], bits)[order]
    first, second, distance = cross_label_pairs(hashes, labels[order], bits)
    parts = []
    for start in range(0, len(first), GATHERED_ROWS):
        share = slice(start, start + GATHERED_ROWS)
        sides = [photos.take(order[side[share]]) for side in (first, second)]
        columns = [side[name] for side in sides for name in names]
        parts.append(pa.table([*columns, pa.array(distance[share].astype(np.float64))], schema=CROSS_LABEL_SCHEMA))
    return pa.concat_tables(parts) if parts else CROSS_LABEL_SCHEMA.empty_table()


def _flat(hashes: Hashes, bits: int) -> NDArray[np.bool_]:
    """Which hashes say nothing of a picture."""
    ones = np.zeros(len(hashes), dtype=np.int32)
    for column in hashes.T:
        ones += np.bitwise_count(column)
    few = near_copy_bits(bits)
    return (ones <= few) | (ones >= bits - few)


def _as_numbers(hashes: Hashes) -> Words:
    """Packed hashes as 64-bit words, shape (words, n), whose order as numbers is that of the hashes as bytes."""
    padded = np.pad(hashes, ((0, 0), (0, -hashes.shape[1] % 8)))
    return np.ascontiguousarray(padded.view(">u8").T.astype(np.uint64))


#: In `_PairLimit.sole`: no photo of the group can be in any more pairs.
FULL = -1


class _PairLimit:
    """The pairs taken so far, and which photos can still be in more.

    The photos stand in groups of equal hashes, sorted by label within each. A full photo is passed over by a pointer to
    the next one that is not (union-find with path halving), and what is left of one's own label by the end of its run,
    so every step but a few a pair of groups takes a pair.

    Parameters
    ----------
    photos : ndarray of int64, shape (n,)
        Position of the photo that stands at each place.
    labels : ndarray of int64, shape (n,)
        Its label.
    starts : ndarray of int64, shape (groups,)
        Place of the first of each group.
    most : int
        Pairs that a photo can be in.

    Attributes
    ----------
    pairs : array of int64
        Position of the first photo, and 32 bits below it that of the second, in the order in which they were taken.
    sole : ndarray of int64, shape (groups,)
        The label of all photos of the group that can still be in more pairs; a number of its own if they are of more
        than one; `FULL` if there are none. Two groups of one number cannot meet.
    """

    def __init__(self, photos: Positions, labels: NDArray[np.int64], starts: Positions, most: int) -> None:
        count = len(photos)
        self.pairs = array("q")
        self._most = most
        # Viewed as memory they are read twice as fast one at a time as numpy's, and in a fifth of a list's room.
        self._photos = photos.data
        self._labels = labels.data
        self._starts = np.append(starts, count).data
        self._next = np.arange(count + 1, dtype=np.int32).data
        self._used = bytearray(count)
        run = is_new(labels)
        run[starts] = True
        run_starts = np.append(np.flatnonzero(run), count).astype(np.int32)
        self._run_end = np.repeat(run_starts[1:], np.diff(run_starts)).data
        self._mixed = int(labels.max()) + 1  # numbers from here on stand for no label
        last = labels[np.append(starts[1:], count) - 1]
        self.sole = np.where(labels[starts] == last, last, self._mixed + np.arange(len(starts)))
        self._sole = self.sole.data

    def within(self) -> None:
        """Take pairs of equal hashes."""
        pairs, most, photos, following, used = self.pairs, self._most, self._photos, self._next, self._used
        for group in np.flatnonzero(self.sole >= self._mixed).tolist():
            end = self._starts[group + 1]
            one = self._starts[group]  # all are free
            while one < end:
                other = _free(following, self._run_end[one])
                if other >= end:
                    break  # only one label is left
                high = photos[one] << 32
                room = most - used[one]
                while room and other < end:
                    pairs.append(high | photos[other])
                    room -= 1
                    used[other] += 1
                    if used[other] == most:
                        following[other] = other + 1
                    other = _free(following, other + 1)
                used[one] = most - room
                if not room:
                    following[one] = one + 1
                one = _free(following, one + 1)
            self._settle(group)

    def between(self, edges: NDArray[np.int64]) -> None:
        """Take pairs of different hashes.

        Parameters
        ----------
        edges : ndarray of int64, shape (m,)
            Pairs of groups, in the order in which they are to be taken: the group with the smaller hash, and 32 bits
            below it the other.
        """
        for start in range(0, len(edges), EDGES):
            share = edges[start : start + EDGES]
            one, other = self.sole[share >> 32], self.sole[share & 0xFFFFFFFF]
            for edge in share[(one != other) & (one != FULL) & (other != FULL)].tolist():
                self._meet(edge >> 32, edge & 0xFFFFFFFF)

    def _meet(self, group: int, its: int) -> None:
        """Take pairs of a photo of one group and a photo of another."""
        following, labels, used, most = self._next, self._labels, self._used, self._most
        end, its_start, its_end = self._starts[group + 1], self._starts[its], self._starts[its + 1]
        filled = False
        one = _free(following, self._starts[group])
        while one < end:
            other = _free(following, its_start)
            if other >= its_end:
                break
            label, high = labels[one], self._photos[one]
            room = before = most - used[one]
            while room and other < its_end:
                if labels[other] == label:
                    other = _free(following, self._run_end[other])
                    continue
                low = self._photos[other]
                self.pairs.append(high << 32 | low if high < low else low << 32 | high)
                room -= 1
                used[other] += 1
                if used[other] == most:
                    following[other] = other + 1
                    filled = True
                other = _free(following, other + 1)
            if room == before:
                # All that is free there is of this photo's label.
                one = _free(following, self._run_end[one])
                continue
            used[one] = most - room
            if not room:
                following[one] = one + 1
                filled = True
            one = _free(following, one + 1)
        if filled:
            self._settle(group)
            self._settle(its)

    def _settle(self, group: int) -> None:
        """Bring ``sole`` up to date."""
        end = self._starts[group + 1]
        one = _free(self._next, self._starts[group])
        if one >= end:
            self._sole[group] = FULL
        elif _free(self._next, self._run_end[one]) >= end:
            self._sole[group] = self._labels[one]


def _free(following: memoryview, place: int) -> int:
    """The first place from one on whose photo is not full; that behind the last if there is none."""
    after = following[place]
    while after != place:
        following[place] = after = following[after]
        place, after = after, following[after]
    return place


def _pairs_at(words: Words, numbers: NDArray[np.int64], distance: int) -> Iterator[tuple[Positions, Positions]]:
    """All pairs of hashes that are so far apart and have different numbers, each once.

    Parameters
    ----------
    words : ndarray of uint64, shape (words, n)
        The hashes, no two equal.
    numbers : ndarray of int64, shape (n,)
        Their numbers. Equal ones cost nothing, however many there are.
    distance : int
        In bits, 1 or more.

    Yields
    ------
    one, other : ndarray of int64, shape (m,)
        Positions of the two.
    """
    if len(numbers) < 2:
        return
    # Sorting by key keeps this order, so that those of one number stand together among those of one key.
    by_number = np.argsort(numbers, kind="stable")
    words, numbers = words[:, by_number], numbers[by_number]
    masks = _masks(words, distance)
    for table, mask in enumerate(masks):
        key = _key(words, mask)
        order = np.argsort(key, kind="stable")
        for one, other in _pairs_of_equal_key(key[order], words[:, order], numbers[order], distance):
            here, there = order[one], order[other]
            apart = words[:, here] ^ words[:, there]
            # Each pair by the first table only that it agrees on; two keys can be equal by chance, too.
            earlier = [_differ(apart, its) for its in masks[:table]]
            new = ~_differ(apart, mask) & np.all(earlier, axis=0)
            yield by_number[here[new]], by_number[there[new]]


def _differ(apart: Words, mask: Words) -> NDArray[np.bool_]:
    """Which pairs differ in a bit of a mask."""
    differ: NDArray[np.bool_] = np.any(apart & mask[:, np.newaxis], axis=0)
    return differ


def _masks(words: Words, distance: int) -> Words:
    """The bits that each table's key is made of, shape (tables, words).

    Two hashes so far apart agree on all bits of one of the masks at least, whatever bits the blocks are made of. So
    those that hardly any hashes differ in are spread over all blocks, as are those that many do: otherwise many keys
    would be equal.
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
    """One number for the bits of a mask; different bits have the same seldom, if there is more than one word."""
    key: Words = words[0] & mask[0]
    for word, its in zip(words[1:], mask[1:], strict=True):
        key *= np.uint64(0x9E3779B97F4A7C15)  # odd, and its bits look random (2**64 over the golden ratio)
        key ^= key >> np.uint64(32)
        key += word & its
    return key


def _pairs_of_equal_key(
    key: Words, words: Words, numbers: NDArray[np.int64], distance: int
) -> Iterator[tuple[Positions, Positions]]:
    """`_pairs_at`, of those with equal keys only; all are sorted by (key, number)."""
    count = len(key)
    key_starts, run_starts = np.flatnonzero(is_new(key)), np.flatnonzero(is_new(key, numbers))
    if len(key_starts) == len(run_starts):
        return  # wherever keys are equal, so are the numbers
    key_ends, run_ends = np.append(key_starts[1:], count), np.append(run_starts[1:], count)
    # Each is compared with those of its key that stand behind those of its number.
    begin = np.repeat(run_ends, np.diff(run_starts, append=count))
    others = np.repeat(key_ends, key_ends - key_starts) - begin
    pairs = np.add.reduceat(others, key_starts)
    # All at once they are not divided again: that would not end.
    for group in np.flatnonzero((pairs > DIRECT_PAIRS) & (key_ends - key_starts < count)):
        start, end = key_starts[group], key_ends[group]
        others[start:end] = 0
        for one, other in _pairs_at(words[:, start:end], numbers[start:end], distance):
            yield start + one, start + other
    compared = np.flatnonzero(others)
    begin, others = begin[compared], others[compared]
    until = np.cumsum(others)
    done = 0
    while done < len(compared):
        before = until[done] - others[done]
        stop = max(done + 1, int(np.searchsorted(until, before + COMPARED_PAIRS, side="right")))
        times = others[done:stop]
        one = np.repeat(compared[done:stop], times)
        first_pair = until[done:stop] - times - before
        other = np.arange(len(one)) + np.repeat(begin[done:stop] - first_pair, times)
        apart = np.zeros(len(one), dtype=np.uint16)
        for word in words:
            apart += np.bitwise_count(word[one] ^ word[other])
        near = apart == distance
        if near.any():
            yield one[near], other[near]
        done = stop
