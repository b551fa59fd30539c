"""Quality of a selection: distances between its photos, of all others to them, and how good any selection could be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
    """Measure how different the chosen photos of one label are, and how near its candidates are to them.

    Parameters
    ----------
    points : Points
        Photos of the label.
    chosen : ndarray of int64, shape (k,)
        Positions of the chosen photos.
    nearest : ndarray of int, shape (n,)
        Distance of each candidate to the nearest chosen photo, in steps; n >= 1 where k >= 1.
    near : int
        Largest distance, in steps, at which two photos are near copies; -1 where none are.

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
    """Count the pairs of photos at each distance: small whatever their number is, and enough for all figures.

    Parameters
    ----------
    hashes : ndarray of uint8, shape (k, hash bytes)
        Packed hashes.
    bits : int
        Bits of a hash.

    Returns
    -------
    ndarray of int64, shape (bits + 1,)
        Pairs that are 0, 1, ... bits apart; their sum is k (k - 1) / 2.
    """
    words = as_words(hashes)
    count = len(hashes)
    histogram = np.zeros(bits + 1, dtype=np.int64)
    rows = max(1, COMPARED_PAIRS // max(1, count))
    for start in range(0, count, rows):
        end = min(start + rows, count)
        block, rest = words[:, start:end], words[:, end:]
        within = _histogram(block, block, bits)
        within[0] -= end - start  # of each with itself
        histogram += within // 2 + _histogram(block, rest, bits)
    return histogram


def _histogram(left: NDArray[np.uint64], right: NDArray[np.uint64], bits: int) -> NDArray[np.int64]:
    """Count the distances of all hashes of one set to all of another, both as words."""
    distance = np.zeros((left.shape[1], right.shape[1]), dtype=np.int64)
    for left_word, right_word in zip(left, right, strict=True):
        distance += np.bitwise_count(left_word[:, None] ^ right_word[None, :])
    return np.bincount(distance.ravel(), minlength=bits + 1)


def counting_bound(hashes: Hashes, bits: int, keep: int) -> int:
    """Return an upper bound for the smallest pair distance of any choice of a label's photos.

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
    adds k (K - k) to the sum of all pair distances, and the smallest is at most their mean. The number of candidates
    that have the bit set, and unset, limits k.
    """
    ones = np.unpackbits(hashes, axis=1, count=bits).sum(axis=0, dtype=np.int64)
    zeros = len(hashes) - ones
    set_in = np.clip(keep // 2, np.maximum(0, keep - zeros), np.minimum(ones, keep))
    return int((set_in * (keep - set_in)).sum()) // (keep * (keep - 1) // 2)


def certificate(hashes: Hashes, bits: int, insertion_distance: NDArray[np.float64]) -> Certificate:
    """Compare the choice of farthest-first with an upper bound for any choice, for one label.

    Parameters
    ----------
    hashes : ndarray of uint8, shape (n, hash bytes)
        Packed hashes of all candidates of the label.
    bits : int
        Bits of a hash.
    insertion_distance : ndarray of float64, shape (k,)
        Insertion distance of the chosen photos, in rank order, in bits. None of them may have been set beforehand.

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
    """Distances of the photos of a label to the kept ones, and the quality of their choice.

    Attributes
    ----------
    nearest : ndarray of int64, shape (n,)
        Position of the kept photo nearest to each.
    distance : ndarray of float64, shape (n,)
        Distance to that photo, in bits or cosine.
    quality : Quality
        Quality of the choice, against a random choice of as many from the same candidates.
    by_hash : Quality
        Quality by hashes, where photos have some and are compared by vectors.
    """

    nearest: Positions
    distance: NDArray[np.float64]
    quality: Quality
    by_hash: Quality


def points_of(hashes: Hashes | None, units: Vectors | None) -> Points:
    """Return the photos compared by their vectors, where they have some, else by their hashes."""
    if units is not None:
        return Cosine(units)
    assert hashes is not None
    return Hamming(hashes)


@dataclass(frozen=True)
class LabelChoice:
    """The photos of one label that can be compared, n of them, and those that are chosen.

    Attributes
    ----------
    label : str
        The label.
    points : Points
        The photos, by what they are compared by.
    hashes : ndarray of uint8, shape (n, hash bytes), or None
        Packed hash of each photo; None where photos have none.
    ids : sequence of str
        Id of each photo.
    candidates : ndarray of int64, shape (c,)
        Positions of the photos that could be kept.
    chosen : ndarray of int64, shape (k,)
        Positions of the chosen photos, by rank.
    insertion_distance : ndarray of float64, shape (k,)
        Distance of each chosen photo to the nearest candidate of a smaller rank, in bits or cosine.
    some_always_kept : bool
        Whether any photo was ranked before the others because it is always kept.
    """

    label: str
    points: Points
    hashes: Hashes | None
    ids: Sequence[str]
    candidates: Positions
    chosen: Positions
    insertion_distance: NDArray[np.float64]
    some_always_kept: bool

    def only(self, kept: NDArray[np.bool_]) -> LabelChoice:
        """Return the choice of those chosen photos, shape (k,), that are kept."""
        return replace(self, chosen=self.chosen[kept], insertion_distance=self.insertion_distance[kept])


def evaluate(choice: LabelChoice, settings: PhotoSettings) -> Evaluation:
    """Measure how near the photos of a label are to the chosen ones, and the quality of their choice.

    Parameters
    ----------
    choice : LabelChoice
        The label; at least one photo is chosen.
    settings : PhotoSettings
        Strategy, hash, seed.
    """
    points, ids, chosen, candidates = choice.points, choice.ids, choice.chosen, choice.candidates
    order = draw_order(RANDOM_ORDER, settings.seed, choice.label, [ids[i] for i in candidates.tolist()])
    drawn = candidates[order[: len(chosen)]]
    nearest, steps = nearest_kept(points, ids, chosen)

    def quality_by(by: Points, to_chosen: Steps, near: int) -> Quality:
        to_drawn = nearest_kept(by, ids, drawn)[1]
        return Quality(spread(by, chosen, to_chosen[candidates], near), spread(by, drawn, to_drawn[candidates], near))

    near = near_copy_bits(settings.bits)
    quality = quality_by(points, steps, -1 if settings.by_vectors else near)
    by_hash = Quality()
    if settings.by_vectors and choice.hashes is not None:
        hamming = Hamming(choice.hashes)
        by_hash = quality_by(hamming, nearest_kept(hamming, ids, chosen)[1], near)
    elif choice.hashes is not None and settings.strategy == "farthest-first" and not choice.some_always_kept:
        # The promise of farthest-first holds for photos that it has chosen itself only.
        promised = certificate(choice.hashes[candidates], settings.bits, choice.insertion_distance)
        quality += Quality(certificate=promised)
    return Evaluation(nearest, steps * points.step, quality, by_hash)


def reevaluate_ledger(
    rows: pa.Table, vectors: pa.Array | pa.ChunkedArray | None, always_keep: NDArray[np.bool_], settings: PhotoSettings
) -> tuple[pa.Table, Quality, Quality]:
    """Evaluate rows of the ledger again, of which others are kept now.

    Parameters
    ----------
    rows : pyarrow.Table
        `LEDGER_SCHEMA` rows of whole labels that were ranked, rows of a label together; ``kept`` holds.
    vectors : pyarrow.Array of binary, or None
        Vectors of the rows as bytes of float16 numbers, null where they have none; None where photos are compared by
        hashes.
    always_keep : ndarray of bool, shape (rows,)
        Which rows were set beforehand.
    settings : PhotoSettings
        Strategy, hash, seed.

    Returns
    -------
    pyarrow.Table
        The rows, with new ``nearest_kept`` and ``nearest_kept_distance``.
    Quality
        Quality of all labels.
    Quality
        Quality by hashes, as in `Evaluation`.
    """
    columns = ("id", "hash", "rank", "insertion_distance", "kept")
    photos = list(zip(*(rows[name].to_pylist() for name in columns), always_keep.tolist(), strict=True))
    labels, kept = rows["label"].to_pylist(), rows["kept"].to_pylist()
    compared = pc.is_valid(rows["hash"] if vectors is None else vectors).to_pylist()
    ids: list[str | None] = [None] * len(photos)
    distances: list[float | None] = [None] * len(photos)
    quality, by_hash = Quality(), Quality()
    for label, group in groupby(range(len(photos)), key=labels.__getitem__):
        numbers = [row for row in group if compared[row]]
        if not any(kept[row] for row in numbers):
            continue
        units = None if vectors is None else units_of(vectors.take(pa.array(numbers)))
        choice = _choice_in_ledger(label, [photos[row] for row in numbers], units, settings)
        evaluation = evaluate(choice, settings)
        quality, by_hash = quality + evaluation.quality, by_hash + evaluation.by_hash
        nearest = [choice.ids[position] for position in evaluation.nearest.tolist()]
        for row, nearest_id, distance in zip(numbers, nearest, evaluation.distance.tolist(), strict=True):
            ids[row], distances[row] = nearest_id, distance
    for name, values in (("nearest_kept", ids), ("nearest_kept_distance", distances)):
        rows = with_column(rows, name, pa.array(values, LEDGER_SCHEMA.field(name).type))
    return rows, quality, by_hash


def _choice_in_ledger(
    label: str, photos: Sequence[tuple[Any, ...]], units: Vectors | None, settings: PhotoSettings
) -> LabelChoice:
    """Return the choice that the rows of one label hold: (id, hash, rank, insertion distance, kept, always kept)."""
    ids, texts, ranks, insertion, kept, always = zip(*photos, strict=True)
    chosen = sorted((position for position in range(len(ids)) if kept[position]), key=ranks.__getitem__)
    hashes = None
    if None not in texts:
        packed = b"".join(from_hex(text, settings.bits) for text in texts)
        hashes = np.frombuffer(packed, dtype=np.uint8).reshape(len(ids), -1)
    return LabelChoice(
        label,
        points_of(hashes, units),
        hashes,
        ids,
        candidates=np.array([position for position, rank in enumerate(ranks) if rank is not None]),
        chosen=np.array(chosen),
        insertion_distance=np.array([insertion[position] for position in chosen], dtype=np.float64),
        some_always_kept=any(always),
    )


def quality_summary(quality: Quality, bits: int, unit: str = "bits", by_hash: Quality | None = None) -> dict[str, Any]:
    """Return the figures of quality as ``summary.json`` has them.

    Parameters
    ----------
    quality : Quality
        Quality of the whole run.
    bits : int
        Bits of a hash.
    unit : {"bits", "cosine"}
        Unit of distances.
    by_hash : Quality, optional
        Quality by hashes, where photos are compared by vectors and have hashes.
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
    """Return means and worst cases of a spread in a unit."""
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
    """Return the shares of the best possible choice, 0 to 1; None where no label's is known."""
    if not certificate.labels:
        return None
    return {
        "labels": certificate.labels,
        "mean": _down(certificate.share_sum / certificate.labels),
        "worst": _down(certificate.worst),
    }


def _down(share: Fraction) -> float:
    """Round a share down to three digits, as reports say "at least"."""
    return math.floor(1000 * share) / 1000
