"""Near copies under different labels, most of them label errors: photos that are like a photo of another label.

Pure and deterministic. The search is `reducer.selection.near_pairs`; here the pairs are limited per photo and told of.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from reducer.config.settings import near_copy_bits
from reducer.selection.near_pairs import Words, pairs_at
from reducer.storage.codecs import Hashes, Positions, all_from_hex
from reducer.storage.schemas import CROSS_LABEL_SCHEMA
from reducer.storage.sorting import is_new, text_ranks

#: Largest distance, in bits of a hash of 64, at which two photos of different labels are told of; also of longer
#: hashes, and in proportion of shorter ones. It is less than within a label: between labels there are far more pairs
#: that could be alike by chance.
CROSS_LABEL_BITS = 2
#: Most pairs per photo. Of a thousand photos that are all alike, as placeholders are, the first few say it all.
MOST_PAIRS = 20

#: Pairs of hashes that are held until they are sorted. More come only of sets made for it.
HELD_PAIRS = 2**22
#: Pairs of groups that are tried between two looks at which groups can still be in a pair.
EDGES = 2**12
#: Rows of the table that are gathered at a time; as a whole their text may be more than one Arrow array holds.
GATHERED_ROWS = 2**20


def cross_label_pairs(
    hashes: Hashes, labels: NDArray[np.int64], bits: int, *, most: int = MOST_PAIRS
) -> tuple[Positions, Positions, NDArray[np.int64]]:
    """Return pairs of photos of different labels whose hashes are near each other.

    Parameters
    ----------
    hashes : ndarray of uint8, shape (n, hash bytes)
        Packed hashes, the photos in the order of their labels and, within a label, of their ids. Those with at most
        `near_copy_bits` ones, or as few zeros, are left out: a plain wall and a smooth gradient have them, whatever is
        to be seen.
    labels : ndarray of int64, shape (n,)
        Number of each photo's label, 0 or more, ascending.
    bits : int
        Bits of a hash. Pairs are at most `CROSS_LABEL_BITS` apart, of a hash under 64 bits in proportion.
    most : int
        Most pairs per photo, 1 to 255.

    Returns
    -------
    first, second : ndarray of int64, shape (pairs,)
        Positions of the two photos, first < second.
    distance : ndarray of int64, shape (pairs,)
        In bits. The pairs are sorted by (distance, first, second).

    Notes
    -----
    Where there are too many pairs, the nearest are taken: pairs come in the order of (distance, smaller hash, larger
    hash, position of the photo with the smaller hash, position of the other), and each is taken if both photos are in
    fewer than ``most`` pairs so far. So no pair can be added to those taken. (Over `HELD_PAIRS` pairs of hashes at one
    distance the order holds for each such share of them, which depends on nothing but the hashes either.)

    Time and memory grow as n, apart from the sorting, unless the hashes themselves crowd.
    """
    photos = np.flatnonzero(~_are_flat(hashes, bits))
    if len(photos) == 0:
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64)
    words = _as_numbers(hashes[photos])
    by_hash = np.lexsort(words[::-1])  # equal ones stay in the order of their positions
    photos, words = photos[by_hash], words[:, by_hash]
    starts = np.flatnonzero(is_new(*words))
    words = np.ascontiguousarray(words[:, starts])

    limit = _PairLimit(photos, labels[photos], starts, most)
    limit.take_within()
    counts = [len(limit.pairs)]
    for distance in range(1, min(CROSS_LABEL_BITS, CROSS_LABEL_BITS * bits // 64) + 1):
        for edges in _sorted_edges(words, limit.sole, distance):
            limit.take_between(edges)
        counts.append(len(limit.pairs))

    pairs = np.asarray(limit.pairs, dtype=np.int64)
    for share in np.split(pairs, counts[:-1]):
        share.sort()  # in place: views
    return pairs >> 32, pairs & 0xFFFFFFFF, np.repeat(np.arange(len(counts)), np.diff(counts, prepend=0))


def _sorted_edges(words: Words, sole: NDArray[np.int64], distance: int) -> Iterator[NDArray[np.int64]]:
    """Yield the pairs of groups that are a distance apart and can meet, as for `_PairLimit.take_between`."""
    # Groups that are full, or can meet their own label only, need not be looked for any more.
    groups = np.flatnonzero(sole != FULL)
    held: list[NDArray[np.int64]] = []
    count = 0
    for left, right in pairs_at(words[:, groups], sole[groups], distance):
        # Groups are numbered in the order of their hashes.
        held.append(groups[np.minimum(left, right)] << 32 | groups[np.maximum(left, right)])
        count += len(left)
        if count > HELD_PAIRS:
            yield np.sort(np.concatenate(held))
            held, count = [], 0
    if held:
        yield np.sort(np.concatenate(held))


def cross_label_table(ledger: pa.Table, bits: int) -> pa.Table:
    """Return the rows of ``cross_label.parquet``: `cross_label_pairs` of a ledger.

    Parameters
    ----------
    ledger : pyarrow.Table
        With the text columns ``id``, ``label``, ``path`` and ``hash`` (by `reducer.storage.codecs.to_hex`, null if
        not hashed), in any order. A file that stands under two labels is like itself, and told of, too.
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
        If a text is no hash of this number of bits.
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


def _are_flat(hashes: Hashes, bits: int) -> NDArray[np.bool_]:
    """Return for each hash whether it is nearly all zeros or ones and so says nothing of a picture, shape (n,)."""
    ones = np.zeros(len(hashes), dtype=np.int32)
    for column in hashes.T:
        ones += np.bitwise_count(column)
    few = near_copy_bits(bits)
    return (ones <= few) | (ones >= bits - few)


def _as_numbers(hashes: Hashes) -> Words:
    """Return packed hashes as words, shape (words, n), whose order as numbers is that of the hashes as bytes."""
    padded = np.pad(hashes, ((0, 0), (0, -hashes.shape[1] % 8)))
    return np.ascontiguousarray(padded.view(">u8").T.astype(np.uint64))


#: In `_PairLimit.sole`: no photo of the group can be in any more pairs.
FULL = -1


class _PairLimit:
    """The pairs taken so far, and the photos that can still be in more.

    The photos stand in groups of equal hashes, sorted by label within each. A full photo is passed over by a pointer to
    the next one that is not (union-find with path halving), and the rest of a photo's label by the end of its run, so
    all but a few steps per pair of groups take a pair.

    Parameters
    ----------
    photos : ndarray of int64, shape (n,)
        Position of the photo that stands at each place.
    labels : ndarray of int64, shape (n,)
        Label of each photo.
    starts : ndarray of int64, shape (groups,)
        Place of the first photo of each group.
    most : int
        Most pairs per photo.

    Attributes
    ----------
    pairs : array of int64
        Position of the first photo, and 32 bits below it that of the second, in the order in which they were taken.
    sole : ndarray of int64, shape (groups,)
        The label of all photos of the group that can still be in more pairs; a number that no other group has if they
        are of more than one label; `FULL` if there are none. Two groups of one number cannot meet.
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

    def take_within(self) -> None:
        """Take pairs of equal hashes."""
        for group in np.flatnonzero(self.sole >= self._mixed).tolist():
            self._meet(group, group)

    def take_between(self, edges: NDArray[np.int64]) -> None:
        """Take pairs of different hashes.

        Parameters
        ----------
        edges : ndarray of int64, shape (m,)
            Pairs of groups, in the order in which they are to be taken: the group with the smaller hash, and 32 bits
            below it the other.
        """
        for start in range(0, len(edges), EDGES):
            share = edges[start : start + EDGES]
            left, right = self.sole[share >> 32], self.sole[share & 0xFFFFFFFF]
            for edge in share[(left != right) & (left != FULL) & (right != FULL)].tolist():
                self._meet(edge >> 32, edge & 0xFFFFFFFF)

    def _meet(self, group: int, other_group: int) -> None:
        """Take pairs of a photo of one group and a photo of another, or of two photos of one group."""
        following, labels, used, most = self._next, self._labels, self._used, self._most
        photos, pairs = self._photos, self.pairs
        end, other_start, other_end = self._starts[group + 1], self._starts[other_group], self._starts[other_group + 1]
        any_full = False
        place = _free(following, self._starts[group])
        while place < end:
            # Within one group each photo meets those behind its label's: the others have met it.
            other = _free(following, self._run_end[place] if group == other_group else other_start)
            if other >= other_end:
                break
            label, photo = labels[place], photos[place]
            room = before = most - used[place]
            while room and other < other_end:
                if labels[other] == label:
                    other = _free(following, self._run_end[other])
                    continue
                mate = photos[other]
                pairs.append(photo << 32 | mate if photo < mate else mate << 32 | photo)
                room -= 1
                used[other] += 1
                if used[other] == most:
                    following[other] = other + 1
                    any_full = True
                other = _free(following, other + 1)
            if room == before:
                # All that is free in the other group is of this photo's label.
                place = _free(following, self._run_end[place])
                continue
            used[place] = most - room
            if not room:
                following[place] = place + 1
                any_full = True
            place = _free(following, place + 1)
        if any_full:
            self._update_sole(group)
            self._update_sole(other_group)

    def _update_sole(self, group: int) -> None:
        """Bring ``sole`` of a group up to date."""
        end = self._starts[group + 1]
        place = _free(self._next, self._starts[group])
        if place >= end:
            self._sole[group] = FULL
        elif _free(self._next, self._run_end[place]) >= end:
            self._sole[group] = self._labels[place]


def _free(following: memoryview, place: int) -> int:
    """Return the first place from a given one on whose photo is not full; the place behind the last if all are."""
    after = following[place]
    while after != place:
        following[place] = after = following[after]
        place, after = after, following[after]
    return place
