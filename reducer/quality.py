"""What a selection is worth: how far apart its photos are, how near all others are to them, how good it could be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from reducer.config import PhotoSettings, near_copy_bits
from reducer.draw import RANDOM_ORDER, draw_order
from reducer.hashing import from_hex
from reducer.ranking import Hashes, Positions, as_words, nearest_kept
from reducer.schemas import LEDGER_SCHEMA
from reducer.tables import with_column
from reducer.types import Certificate, Quality, Spread

#: Pairs of photos that are compared at a time.
COMPARED_PAIRS = 2**18


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
    histogram = pair_histogram(hashes, bits)
    distances = np.arange(len(histogram))
    return covered + Spread(
        labels_with_pairs=1,
        pairs=int(histogram.sum()),
        near_copies=int(histogram[: near_copy_bits(bits) + 1].sum()),
        distance_sum=int(histogram @ distances),
        smallest_sum=int(np.flatnonzero(histogram)[0]),
    )


def pair_histogram(hashes: Hashes, bits: int) -> NDArray[np.int64]:
    """How many pairs of photos are how far apart: small whatever their number is, and enough for all figures.

    Parameters
    ----------
    hashes : ndarray of uint8, shape (k, hash bytes)
        Packed hashes.
    bits : int
        Bits of a hash.

    Returns
    -------
    ndarray of int64, shape (bits + 1,)
        Pairs that are 0, 1, ... bits apart; they sum up to k (k - 1) / 2.
    """
    words = as_words(hashes)
    count = len(hashes)
    histogram = np.zeros(bits + 1, dtype=np.int64)
    rows = max(1, COMPARED_PAIRS // max(1, count))
    for start in range(0, count, rows):
        end = min(start + rows, count)
        block, rest = words[:, start:end], words[:, end:]
        own = _histogram(block, block, bits)
        own[0] -= end - start  # of each with itself
        histogram += own // 2 + _histogram(block, rest, bits)
    return histogram


def _histogram(one: NDArray[np.uint64], other: NDArray[np.uint64], bits: int) -> NDArray[np.int64]:
    """Distances of all of one to all of another, counted."""
    distance = np.zeros((one.shape[1], other.shape[1]), dtype=np.int64)
    for its, others in zip(one, other, strict=True):
        distance += np.bitwise_count(its[:, None] ^ others[None, :])
    return np.bincount(distance.ravel(), minlength=bits + 1)


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


def judge(
    label: str,
    hashes: Hashes,
    ids: Sequence[str],
    candidates: Positions,
    kept: Positions,
    insertion_distance: NDArray[np.float64],
    some_always_kept: bool,
    settings: PhotoSettings,
) -> tuple[Positions, NDArray[np.float64], Quality]:
    """How near every photo of a label is to the kept ones, and what their choice is worth.

    Parameters
    ----------
    label : str
        The label.
    hashes : ndarray of uint8, shape (n, hash bytes)
        Packed hashes of all its photos that have one.
    ids : sequence of str
        Their ids.
    candidates : ndarray of int64, shape (c,)
        Positions of those that could be kept.
    kept : ndarray of int64, shape (k,)
        Positions of the kept ones, by rank; k >= 1.
    insertion_distance : ndarray of float64, shape (k,)
        Theirs, in bits.
    some_always_kept : bool
        Whether any of the label was set beforehand.
    settings : PhotoSettings
        Strategy, hash, seed.

    Returns
    -------
    nearest : ndarray of int64, shape (n,)
        Position of the kept photo nearest to each.
    distance : ndarray of float64, shape (n,)
        How far it is, in bits.
    Quality
        Against a random choice of as many from the same candidates.
    """
    nearest, distance = nearest_kept(hashes, ids, kept)
    own_hashes, own_ids = hashes[candidates], [ids[i] for i in candidates.tolist()]
    drawn = np.array(draw_order(RANDOM_ORDER, settings.seed, label, own_ids)[: len(kept)])
    quality = Quality(
        selection=spread(hashes[kept], settings.bits, distance[candidates]),
        random=spread(own_hashes[drawn], settings.bits, nearest_kept(own_hashes, own_ids, drawn)[1]),
        # Farthest-first promises something of its own choice only.
        certificate=(
            certificate(own_hashes, settings.bits, insertion_distance)
            if settings.strategy == "farthest-first" and not some_always_kept
            else Certificate()
        ),
    )
    return nearest, distance, quality


def judge_again(rows: pa.Table, always_keep: NDArray[np.bool_], settings: PhotoSettings) -> tuple[pa.Table, Quality]:
    """Tell anew of rows of the ledger, of which others are kept now, how near they are to the kept ones.

    Parameters
    ----------
    rows : pyarrow.Table
        `LEDGER_SCHEMA` rows of whole labels that were ranked, rows of a label together; ``kept`` holds.
    always_keep : ndarray of bool, shape (rows,)
        Which of them were set beforehand.
    settings : PhotoSettings
        Strategy, hash, seed.

    Returns
    -------
    pyarrow.Table
        The rows, ``nearest_kept`` and ``nearest_kept_distance`` set anew.
    Quality
        Of all labels.
    """
    columns = ("label", "id", "hash", "rank", "insertion_distance", "kept")
    photos = list(zip(*(rows[name].to_pylist() for name in columns), always_keep.tolist(), strict=True))
    ids: list[str | None] = [None] * len(photos)
    distances: list[float | None] = [None] * len(photos)
    quality = Quality()
    for label, group in groupby(range(len(photos)), key=lambda row: photos[row][0]):
        hashed = [row for row in group if photos[row][2] is not None]
        _, names, texts, ranks, insertion, kept, always = (
            zip(*(photos[row] for row in hashed), strict=True) if hashed else ((),) * 7
        )
        chosen = sorted((position for position in range(len(hashed)) if kept[position]), key=ranks.__getitem__)
        if not chosen:
            continue
        packed = b"".join(from_hex(text, settings.bits) for text in texts)
        nearest, distance, worth = judge(
            label,
            np.frombuffer(packed, dtype=np.uint8).reshape(len(hashed), -1),
            names,
            np.array([position for position, rank in enumerate(ranks) if rank is not None]),
            np.array(chosen),
            np.array([insertion[position] for position in chosen], dtype=np.float64),
            any(always),
            settings,
        )
        quality += worth
        for row, position, bits_apart in zip(hashed, nearest.tolist(), distance.tolist(), strict=True):
            ids[row], distances[row] = names[position], bits_apart
    for name, values in (("nearest_kept", ids), ("nearest_kept_distance", distances)):
        rows = with_column(rows, name, pa.array(values, LEDGER_SCHEMA.field(name).type))
    return rows, quality


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
