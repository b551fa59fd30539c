"""What a selection is worth: how far apart its photos are, how near all others are to them, how good it could be."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reducer.config import near_copy_bits
from reducer.ranking import Hashes, as_words, distances_to
from reducer.types import Certificate, Quality, Spread


def spread(hashes: Hashes, bits: int, nearest: NDArray[np.float64]) -> Spread:
    """How different the chosen photos of one label are, and how near its candidates are to them.

    Parameters
    ----------
    hashes : ndarray of uint8, shape (k, hash bytes)
        Packed hashes of the chosen photos.
    bits : int
        Bits of a hash.
    nearest : ndarray of float64, shape (n,)
        Distance of each candidate to the nearest chosen photo, in bits; n >= 1 where k >= 1.

    Returns
    -------
    Spread
        All zero if no photo is chosen; without pairs if only one is.
    """
    count = len(hashes)
    if count == 0:
        return Spread()
    covered = Spread(
        labels=1,
        candidates=len(nearest),
        nearest_sum=int(nearest.sum()),
        radius_sum=int(nearest.max()),
        radius_max=int(nearest.max()),
    )
    if count == 1:
        return covered
    words = as_words(hashes)
    # Counts of pairs by distance: enough for all the figures, and small whatever k is.
    histogram = np.zeros(bits + 1, dtype=np.int64)
    for i in range(count - 1):
        later = words[:, i:]
        histogram += np.bincount(distances_to(later, later[:, 0])[1:], minlength=len(histogram))
    distances = np.arange(len(histogram))
    return covered + Spread(
        labels_with_pairs=1,
        pairs=int(histogram.sum()),
        near_copies=int(histogram[: near_copy_bits(bits) + 1].sum()),
        distance_sum=int(histogram @ distances),
        smallest_sum=int(np.flatnonzero(histogram)[0]),
    )


def counting_bound(hashes: Hashes, bits: int, keep: int) -> int:
    """No so many photos of a label have a smallest pair distance above this.

    Parameters
    ----------
    hashes : ndarray of uint8, shape (n, hash bytes)
        Packed hashes of all candidates of the label.
    bits : int
        Bits of a hash.
    keep : int
        Photos to choose, 2 <= keep <= n.

    Returns
    -------
    int
        In bits.

    Notes
    -----
    Plotkin's argument (1960, "Binary codes with specified minimum distance"): a bit that k of the K chosen have set
    adds k (K - k) to the sum of all pair distances, and the smallest is at most their mean. What k can be is limited
    by how many of the candidates have the bit set, and unset.
    """
    ones = np.unpackbits(hashes, axis=1, count=bits).sum(axis=0, dtype=np.int64)
    zeros = len(hashes) - ones
    set_in = np.clip(keep // 2, np.maximum(0, keep - zeros), np.minimum(ones, keep))
    return int((set_in * (keep - set_in)).sum()) // (keep * (keep - 1) // 2)


def certificate(hashes: Hashes, bits: int, insertion_distance: NDArray[np.float64]) -> Certificate:
    """How near farthest-first has come to the best that there can be, for one label.

    Parameters
    ----------
    hashes : ndarray of uint8, shape (n, hash bytes)
        Packed hashes of all candidates of the label.
    bits : int
        Bits of a hash.
    insertion_distance : ndarray of float64, shape (k,)
        Of the chosen photos, in rank order, in bits. None of them may have been set beforehand.

    Returns
    -------
    Certificate
        The smallest pair distance r of the chosen over an upper bound for any choice of as many: 2 r (Gonzalez 1985) or
        `counting_bound`, whichever is smaller. Nothing for fewer than two photos, or where all candidates are chosen:
        there was no choice.
    """
    keep = len(insertion_distance)
    if keep < 2 or keep == len(hashes):
        return Certificate()
    smallest = int(insertion_distance[-1])
    bound = min(2 * smallest, counting_bound(hashes, bits, keep))
    # Where the bound is 0 every choice holds exact copies: none is better.
    share = Fraction(smallest, bound) if bound else Fraction(1)
    return Certificate(1, share, share)


def figures(quality: Quality, bits: int) -> dict[str, Any]:
    """What ``summary.json`` tells of it.

    Parameters
    ----------
    quality : Quality
        Of the whole run.
    bits : int
        Bits of a hash.
    """
    return {
        "bits": bits,
        "near_copy_bits": near_copy_bits(bits),
        "selection": _spread_figures(quality.selection),
        "random": _spread_figures(quality.random),
        "certificate": _certificate_figures(quality.certificate),
    }


def _spread_figures(spread: Spread) -> dict[str, Any]:
    return {
        "labels": spread.labels,
        "labels_with_pairs": spread.labels_with_pairs,
        "pairs": spread.pairs,
        "near_copy_pairs": spread.near_copies,
        "mean_pair_distance": _mean(spread.distance_sum, spread.pairs),
        "mean_smallest_pair_distance": _mean(spread.smallest_sum, spread.labels_with_pairs),
        "mean_nearest_kept_distance": _mean(spread.nearest_sum, spread.candidates),
        "mean_coverage_radius": _mean(spread.radius_sum, spread.labels),
        "worst_coverage_radius": spread.radius_max if spread.labels else None,
    }


def _certificate_figures(certificate: Certificate) -> dict[str, Any] | None:
    """Shares of the best that there can be, 0 to 1."""
    if not certificate.labels:
        return None
    return {
        "labels": certificate.labels,
        "mean": _down(certificate.share_sum / certificate.labels),
        "worst": _down(certificate.worst),
    }


def _down(share: Fraction) -> float:
    """To three digits, never more than it is: it is told as "at least"."""
    return math.floor(1000 * share) / 1000


def _mean(total: int, count: int) -> float | None:
    return round(total / count, 3) if count else None
