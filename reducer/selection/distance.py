"""Distances between the photos of a label, by hashes or by vectors: whole numbers, so that no order matters.

Both kinds give distances as whole numbers of steps: a step is a bit, or 2**-30 of a cosine distance. Sums of steps are
exact whatever the order, the blocks or the number of threads, and so are the vectors' products: two float16 numbers
have a product of at most 22 significant bits, a multiple of 2**-48, and all sums of those of two unit vectors stay
under 2, so they fit the 53 bits of a float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from reducer.storage.codecs import Hashes, Positions, Vectors

#: Whole numbers of steps.
Steps = NDArray[Any]

#: Photos whose hashes are unpacked at a time.
MEDOID_BLOCK = 1000
#: Steps of a cosine distance of 1.
COSINE_STEPS = 2**30
#: Most photos of which the distances of all pairs are held, 4 bytes each: 256 MiB.
HELD_PHOTOS = 8192
#: Bytes that float64 copies of vectors may take, and that one block of distances may.
WIDENED_BYTES, BLOCK_BYTES = 2**28, 2**25


class Points(Protocol):
    """The photos of a label, by what they are compared by."""

    #: Unit of distances: ``bits`` or ``cosine``.
    unit: str
    #: One step, in the unit.
    step: float
    #: Largest distance that two photos can have, in steps.
    farthest: int
    #: Type of arrays of steps.
    dtype: type[np.signedinteger[Any]]

    def __len__(self) -> int:
        """Return the number of photos."""

    def take(self, positions: Positions) -> Points:
        """Return some of the photos, in the order of their positions given here."""

    def to(self, position: int) -> Steps:
        """Return the distances of all photos to one, shape (n,), in steps."""

    def rows(self, positions: Positions) -> Steps:
        """Return the distances of some photos to all, shape (positions, n), in steps, of the smallest type."""

    def between(self, some: Positions, others: Positions) -> Steps:
        """Return the distances of some photos to others, shape (some, others), in steps."""

    @property
    def is_costly(self) -> bool:
        """True where distances of one photo to all take so long that many photos are better computed together."""

    def medoid(self) -> int:
        """Return the position of the photo with the smallest sum of distances to all, the first of equals; n >= 1."""


class Hamming:
    """Photos compared by their hashes; distances in bits.

    Parameters
    ----------
    hashes : ndarray of uint8, shape (n, hash bytes)
        Packed hashes.
    """

    unit = "bits"
    step = 1.0
    dtype = np.int32

    def __init__(self, hashes: Hashes) -> None:
        self.hashes = hashes
        self.farthest = 8 * hashes.shape[1]
        self.words = as_words(hashes)
        self._small: type[np.unsignedinteger[Any]] = np.uint8 if self.farthest <= 255 else np.uint16

    def __len__(self) -> int:
        return len(self.hashes)

    def take(self, positions: Positions) -> Hamming:
        """Return some of the photos, in this order."""
        return self if _are_all(positions, len(self)) else Hamming(self.hashes[positions])

    def to(self, position: int) -> Steps:
        """Return the distances of all photos to one, shape (n,), in bits."""
        return distances_to(self.words, self.words[:, position])

    def rows(self, positions: Positions) -> Steps:
        """Return the distances of some photos to all, shape (positions, n), in bits, of one byte or two each."""
        distances = np.zeros((len(positions), len(self)), dtype=self._small)
        for row, position in zip(distances, positions.tolist(), strict=True):
            for word in self.words:
                np.add(row, np.bitwise_count(word ^ word[position]), out=row)
        return distances

    def between(self, some: Positions, others: Positions) -> Steps:
        """Return the distances of some photos to others, shape (some, others), in bits."""
        return np.stack([self.to(position)[others] for position in some.tolist()])

    is_costly = False

    def medoid(self) -> int:
        """Return the position of the photo with the smallest sum of distances, the first of equals."""
        # A hash differs in a bit from as many others as do not have that bit's value, so the sums follow from one count
        # per bit. A block at a time: as numbers, bits take up to 64 times their room.
        hashes = self.hashes
        blocks = [hashes[start : start + MEDOID_BLOCK] for start in range(0, len(hashes), MEDOID_BLOCK)]
        ones = sum(np.unpackbits(block, axis=1).sum(axis=0, dtype=np.int64) for block in blocks)
        # With bit b set the photo differs from (n - ones) others, unset from (ones): sums are ones + b (n - 2 ones).
        sums = np.concatenate([np.unpackbits(block, axis=1) @ (len(hashes) - 2 * ones) for block in blocks])
        return int(np.argmin(sums))


class Cosine:
    """Photos compared by their vectors; distances are one minus the cosine of the angle between two, 0 to 2.

    Parameters
    ----------
    units : ndarray of float16, shape (n, dimensions)
        Unit vectors, as `reducer.storage.codecs.as_units` makes them.

    Notes
    -----
    The cosine is the product of two vectors over the root of the product of their squares, for float16 keeps their
    length to three digits only: so photos with the same vector are 0 apart. Each distance is rounded to a step.
    """

    unit = "cosine"
    step = 1.0 / COSINE_STEPS
    farthest = 2 * COSINE_STEPS
    dtype = np.int64

    def __init__(self, units: Vectors) -> None:
        self.units = units
        self._held: NDArray[np.uint32] | None = None
        fits = units.size * 8 <= WIDENED_BYTES
        self._widened: NDArray[np.float64] | None = units.astype(np.float64) if fits else None
        self._squares = np.concatenate(
            [np.einsum("ij,ij->i", block, block) for _, block in self._blocks()] or [np.empty(0)]
        )

    def __len__(self) -> int:
        return len(self.units)

    def take(self, positions: Positions) -> Cosine:
        """Return some of the photos, in this order."""
        # The distances held of all pairs stay in use: the photos of a label come in the order of their ids.
        return self if _are_all(positions, len(self)) else Cosine(self.units[positions])

    def to(self, position: int) -> Steps:
        """Return the distances of all photos to one, shape (n,), in steps."""
        row = self._all()[position] if len(self) <= HELD_PHOTOS else self._computed(np.array([position]))[0]
        steps: Steps = row.astype(np.int64)
        return steps

    def rows(self, positions: Positions) -> Steps:
        """Return the distances of some photos to all, shape (positions, n), in steps."""
        if len(self) > HELD_PHOTOS:
            return self._computed(positions)
        return self._all() if _are_all(positions, len(self)) else self._all()[positions]

    def between(self, some: Positions, others: Positions) -> Steps:
        """Return the distances of some photos to others, shape (some, others), in steps."""
        wide = self.units[others].astype(np.float64)
        return self._steps(some, wide, self._squares[others]).astype(np.int64)

    @property
    def is_costly(self) -> bool:
        """True where not all pairs are held, so that each distance is computed when it is asked for."""
        return len(self) > HELD_PHOTOS

    def medoid(self) -> int:
        """Return the position of the photo with the smallest sum of distances, the first of equals."""
        size = max(1, BLOCK_BYTES // (8 * len(self)))
        starts = range(0, len(self), size)
        blocks = (np.arange(start, min(start + size, len(self))) for start in starts)
        sums = np.concatenate([self.rows(block).sum(axis=1, dtype=np.int64) for block in blocks])
        return int(np.argmin(sums))

    def _all(self) -> NDArray[np.uint32]:
        if self._held is None:
            self._held = self._computed(np.arange(len(self)))
        return self._held

    def _computed(self, positions: Positions) -> NDArray[np.uint32]:
        distances = np.empty((len(positions), len(self)), dtype=np.uint32)
        for start, block in self._blocks():
            stop = start + len(block)
            size = max(1, BLOCK_BYTES // (8 * len(block)))
            for first in range(0, len(positions), size):
                rows = slice(first, first + size)
                distances[rows, start:stop] = self._steps(positions[rows], block, self._squares[start:stop])
        return distances

    def _steps(
        self, positions: Positions, others: NDArray[np.float64], squares: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Return distances in steps, not yet as integers; ``others`` are vectors and ``squares`` their squares."""
        cosine: NDArray[np.float64] = self.units[positions].astype(np.float64) @ others.T
        cosine /= np.sqrt(self._squares[positions][:, None] * squares)
        np.subtract(1.0, cosine, out=cosine)
        cosine *= COSINE_STEPS
        np.rint(cosine, out=cosine)
        return np.clip(cosine, 0, self.farthest, out=cosine)

    def _blocks(self) -> Iterator[tuple[int, NDArray[np.float64]]]:
        """Yield the vectors as float64 in blocks, each with the position of its first."""
        if self._widened is not None:
            yield 0, self._widened
            return
        size = max(1, BLOCK_BYTES // (8 * self.units.shape[1]))
        for start in range(0, len(self), size):
            yield start, self.units[start : start + size].astype(np.float64)


def _are_all(positions: Positions, count: int) -> bool:
    """Return whether positions are those of all photos, in order."""
    return len(positions) == count and bool((positions == np.arange(count)).all())


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


def distances_to(words: NDArray[np.uint64], target: NDArray[np.uint64]) -> NDArray[np.int32]:
    """Return the Hamming distances of all hashes to one.

    Parameters
    ----------
    words : ndarray of uint64, shape (words, n)
        From `as_words`.
    target : ndarray of uint64, shape (words,)
        The one hash: a column of ``words``, or of other hashes as words.

    Returns
    -------
    ndarray of int32, shape (n,)
        In bits.
    """
    distance: NDArray[np.int32] = np.bitwise_count(words[0] ^ target[0]).astype(np.int32)
    for word, target_word in zip(words[1:], target[1:], strict=True):
        distance += np.bitwise_count(word ^ target_word)
    return distance


def near_any(hashes: Hashes, others: Hashes, distance: int) -> NDArray[np.bool_]:
    """Return for each hash whether it is near any of some other hashes.

    Parameters
    ----------
    hashes : ndarray of uint8, shape (n, hash bytes)
        Packed hashes.
    others : ndarray of uint8, shape (m, hash bytes)
        Packed hashes to be near to.
    distance : int
        Largest distance at which two hashes are near, in bits.

    Returns
    -------
    ndarray of bool, shape (n,)
    """
    if len(others) == 0:
        return np.zeros(len(hashes), dtype=bool)
    words = as_words(others)
    return np.array([distances_to(words, target).min() <= distance for target in as_words(hashes).T], dtype=bool)
