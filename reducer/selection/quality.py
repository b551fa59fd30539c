"""What a selection is worth: how far apart its photos are, how near all others are to them, how good it could be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from reducer.config.settings import PhotoSettings, near_copy_bits
from reducer.draw import RANDOM_ORDER, draw_order
from reducer.selection.distance import COSINE_STEPS, Cosine, Hamming, Points, Steps, as_words
from reducer.selection.quality_sums import Certificate, Quality, Spread
from reducer.selection.strategies import nearest_kept
from reducer.storage.codecs import Hashes, Positions, Vectors, from_hex, units_of
from reducer.storage.schemas import LEDGER_SCHEMA
from reducer.storage.tables import with_column

#: Pairs of photos that are compared at a time.
COMPARED_PAIRS = 2**18


def spread(points: Points, chosen: Positions, nearest: Steps, near: int) -> Spread:
    """How different the chosen photos of one label are, and how near its candidates are to them.

    Parameters
    ----------
    points : Points
        Photos of the label.
    chosen : ndarray of int64, shape (k,)
        Positions of the chosen ones.
    nearest : ndarray of int, shape (n,)
        Distance of each candidate to the nearest chosen photo, in steps; n >= 1 where k >= 1.
    near : int
        At most so many steps apart two photos are near copies; -1 where none are.

    Returns
    -------
    Spread
        All zero if no photo is chosen; without pairs if only one is.
    """
    count = len(chosen)
    if count == 0:
        return Spread()
    covered = Spread(
        labels=1,
        candidates=len(nearest),
        nearest_sum=int(nearest.sum(dtype=np.int64)),
        radius_sum=int(nearest.max()),
        radius_max=int(nearest.max()),
    )
    if count == 1:
        return covered
    near_copies, total, smallest = 0, 0, points.farthest
    for place, position in enumerate(chosen[:-1].tolist()):
        apart = points.to(position)[chosen[place + 1 :]]
        near_copies += int(np.count_nonzero(apart <= near))
        total += int(apart.sum(dtype=np.int64))
        smallest = min(smallest, int(apart.min()))
    return covered + Spread(
        labels_with_pairs=1,
        pairs=count * (count - 1) // 2,
        near_copies=near_copies,
        distance_sum=total,
        smallest_sum=smallest,
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


@dataclass(frozen=True)
class Evaluation:
    """How near the photos of a label are to the kept ones, and what their choice is worth.

    Attributes
    ----------
    nearest : ndarray of int64, shape (n,)
        Position of the kept photo nearest to each.
    distance : ndarray of float64, shape (n,)
        How far it is, in bits or cosine.
    quality : Quality
        Against a random choice of as many from the same candidates.
    by_hash : Quality
        The same by hashes, where photos have some and are compared by vectors.
    """

    nearest: Positions
    distance: NDArray[np.float64]
    quality: Quality
    by_hash: Quality


def points_of(hashes: Hashes | None, units: Vectors | None) -> Points:
    """Photos by their vectors, where they have some, else by their hashes."""
    if units is not None:
        return Cosine(units)
    assert hashes is not None
    return Hamming(hashes)


def evaluate(
    label: str,
    points: Points,
    hashes: Hashes | None,
    ids: Sequence[str],
    candidates: Positions,
    kept: Positions,
    insertion_distance: NDArray[np.float64],
    some_always_kept: bool,
    settings: PhotoSettings,
) -> Evaluation:
    """How near every photo of a label is to the kept ones, and what their choice is worth.

    Parameters
    ----------
    label : str
        The label.
    points : Points
        All its photos that were hashed or have a vector, n of them.
    hashes : ndarray of uint8, shape (n, hash bytes), or None
        Their packed hashes; None where they have none.
    ids : sequence of str
        Their ids.
    candidates : ndarray of int64, shape (c,)
        Positions of those that could be kept.
    kept : ndarray of int64, shape (k,)
        Positions of the kept ones, by rank; k >= 1.
    insertion_distance : ndarray of float64, shape (k,)
        Theirs.
    some_always_kept : bool
        Whether any of the label was set beforehand.
    settings : PhotoSettings
        Strategy, hash, seed.
    """
    order = draw_order(RANDOM_ORDER, settings.seed, label, [ids[i] for i in candidates.tolist()])
    drawn = candidates[order[: len(kept)]]
    nearest, steps = nearest_kept(points, ids, kept)

    def worth(by: Points, to_kept: Steps, near: int) -> Quality:
        to_drawn = nearest_kept(by, ids, drawn)[1]
        return Quality(spread(by, kept, to_kept[candidates], near), spread(by, drawn, to_drawn[candidates], near))

    near = near_copy_bits(settings.bits)
    quality = worth(points, steps, -1 if settings.by_vectors else near)
    by_hash = Quality()
    if settings.by_vectors and hashes is not None:
        by = Hamming(hashes)
        by_hash = worth(by, nearest_kept(by, ids, kept)[1], near)
    elif hashes is not None and settings.strategy == "farthest-first" and not some_always_kept:
        # Farthest-first promises something of its own choice only.
        promised = certificate(hashes[candidates], settings.bits, insertion_distance)
        quality += Quality(certificate=promised)
    return Evaluation(nearest, steps * points.step, quality, by_hash)


def reevaluate_ledger(
    rows: pa.Table, vectors: pa.Array | pa.ChunkedArray | None, always_keep: NDArray[np.bool_], settings: PhotoSettings
) -> tuple[pa.Table, Quality, Quality]:
    """Tell anew of rows of the ledger, of which others are kept now, how near they are to the kept ones.

    Parameters
    ----------
    rows : pyarrow.Table
        `LEDGER_SCHEMA` rows of whole labels that were ranked, rows of a label together; ``kept`` holds.
    vectors : pyarrow.Array of binary, or None
        Their vectors as bytes of float16 numbers, null where they have none; None where photos are compared by hashes.
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
    Quality
        The same by hashes, as for `Evaluation`.
    """
    columns = ("label", "id", "hash", "rank", "insertion_distance", "kept")
    photos = list(zip(*(rows[name].to_pylist() for name in columns), always_keep.tolist(), strict=True))
    compared = pc.is_valid(rows["hash"] if vectors is None else vectors).to_pylist()
    ids: list[str | None] = [None] * len(photos)
    distances: list[float | None] = [None] * len(photos)
    quality, by_hash = Quality(), Quality()
    for label, group in groupby(range(len(photos)), key=lambda row: photos[row][0]):
        own = [row for row in group if compared[row]]
        _, names, texts, ranks, insertion, kept, always = (
            zip(*(photos[row] for row in own), strict=True) if own else ((),) * 7
        )
        chosen = sorted((position for position in range(len(own)) if kept[position]), key=ranks.__getitem__)
        if not chosen:
            continue
        hashes = None
        if None not in texts:
            packed = b"".join(from_hex(text, settings.bits) for text in texts)
            hashes = np.frombuffer(packed, dtype=np.uint8).reshape(len(own), -1)
        units = None if vectors is None else units_of(vectors.take(pa.array(own)))
        found = evaluate(
            label,
            points_of(hashes, units),
            hashes,
            names,
            np.array([position for position, rank in enumerate(ranks) if rank is not None]),
            np.array(chosen),
            np.array([insertion[position] for position in chosen], dtype=np.float64),
            any(always),
            settings,
        )
        quality, by_hash = quality + found.quality, by_hash + found.by_hash
        for row, position, apart in zip(own, found.nearest.tolist(), found.distance.tolist(), strict=True):
            ids[row], distances[row] = names[position], apart
    for name, values in (("nearest_kept", ids), ("nearest_kept_distance", distances)):
        rows = with_column(rows, name, pa.array(values, LEDGER_SCHEMA.field(name).type))
    return rows, quality, by_hash


def quality_summary(quality: Quality, bits: int, unit: str = "bits", by_hash: Quality | None = None) -> dict[str, Any]:
    """What ``summary.json`` tells of it.

    Parameters
    ----------
    quality : Quality
        Of the whole run.
    bits : int
        Bits of a hash.
    unit : {"bits", "cosine"}
        What its distances are told in.
    by_hash : Quality, optional
        The same by hashes, where photos are compared by vectors and have some.
    """
    return {
        "unit": unit,
        "bits": bits,
        "near_copy_bits": near_copy_bits(bits),
        "selection": _spread_figures(quality.selection, unit),
        "random": _spread_figures(quality.random, unit),
        "certificate": _certificate_figures(quality.certificate),
        "by_hash": None if by_hash is None or not by_hash.selection.labels else quality_summary(by_hash, bits),
    }


def _spread_figures(spread: Spread, unit: str) -> dict[str, Any]:
    steps, digits = (1, 3) if unit == "bits" else (COSINE_STEPS, 6)

    def mean(total: int, count: int) -> float | None:
        return round(total / (count * steps), digits) if count else None

    worst = spread.radius_max if unit == "bits" else round(spread.radius_max / steps, digits)
    return {
        "labels": spread.labels,
        "labels_with_pairs": spread.labels_with_pairs,
        "pairs": spread.pairs,
        "near_copy_pairs": spread.near_copies if unit == "bits" else None,
        "mean_pair_distance": mean(spread.distance_sum, spread.pairs),
        "mean_smallest_pair_distance": mean(spread.smallest_sum, spread.labels_with_pairs),
        "mean_nearest_kept_distance": mean(spread.nearest_sum, spread.candidates),
        "mean_coverage_radius": mean(spread.radius_sum, spread.labels),
        "worst_coverage_radius": worst if spread.labels else None,
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
