"""Choice of the labels and photos that a report shows, and their arrangement. Pure, over the ledger."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from reducer.errors import InputError, nearest
from reducer.selection.distance import Cosine, Hamming, Points
from reducer.storage.codecs import all_from_hex, units_of
from reducer.storage.location import PhotoRef, ref_of
from reducer.storage.schemas import BEYOND_KEEP, BUDGET, FAILED, MIN_DISTANCE
from reducer.storage.sorting import numbered, position_in_group
from reducer.storage.tables import counts

#: Columns of the ledger that decide which labels are shown.
LABEL_COLUMNS = ("label", "rank", "reason", "nearest_kept_distance")
#: Reasons of photos that others of their label were kept in place of.
DROPPED = (BEYOND_KEEP, MIN_DISTANCE, BUDGET)
#: Order of a label's rows by rank; null comes last.
BY_RANK = [("rank", "ascending"), ("id", "ascending")]
#: Pixels of the longest side of a kept photo, of one dropped for it, and of one of a pair.
KEPT_SIDE, DROPPED_SIDE, PAIR_SIDE = 240, 120, 320
#: Photos shown under the photo that they were dropped for, and failures shown per label, at most.
MOST_DROPPED, MOST_FAILED = 12, 12
#: Share of a label's pictures, apart from its pairs, that goes to kept photos.
KEPT_SHARE = 2 / 3
#: Photos of a label that are compared, the first by rank: all their pairs take a second.
MOST_COMPARED = {"hash": 20_000, "vector": 4_000}
#: Pairs of near copies under different labels that are shown, at most; they take a tenth of all pictures at most.
MOST_CROSS_LABEL = 12


@dataclass(frozen=True)
class Photo:
    """Photo that is shown.

    Attributes
    ----------
    row : dict
        Its row of the ledger.
    ref : str or ByteRange
        Where the photo lies.
    side : int
        Pixels of the longest side of its picture.
    """

    row: dict[str, Any]
    ref: PhotoRef
    side: int

    @property
    def is_drawn(self) -> bool:
        """True unless the photo has failed before: then no picture is tried."""
        return self.row["error"] is None

    @property
    def is_known(self) -> bool:
        """True if the photo was decoded before: then it does no harm to a process that decodes it again."""
        return self.row["hash"] is not None


@dataclass(frozen=True)
class Kept:
    """Kept photo, with photos that it was kept in place of.

    Attributes
    ----------
    photo : Photo
        The kept photo.
    dropped : list of Photo
        Photos that were dropped for it and are shown, the nearest first.
    more : int
        Number of further photos dropped for it.
    """

    photo: Photo
    dropped: list[Photo]
    more: int


@dataclass(frozen=True)
class Pair:
    """Pair of photos, shown side by side.

    Attributes
    ----------
    which : str
        ``closest``, ``farthest`` or ``like`` (of different labels).
    distance : float
        Distance of their hashes, in bits, or of their vectors.
    first, second : Photo
        The photos.
    """

    which: str
    distance: float
    first: Photo
    second: Photo

    def drawn(self) -> Iterator[Photo]:
        """Yield the photos that have pictures."""
        yield from (self.first, self.second)


@dataclass(frozen=True)
class Gallery:
    """Photos of a label, arranged.

    Attributes
    ----------
    label : str
        The label.
    why : list of str
        Why it is shown.
    photos, ranked, kept : int
        Numbers of its photos, of those with a rank, and of the kept ones.
    reasons : dict of str to int
        Number of photos per reason of the ledger.
    closest_kept : float or None
        Smallest distance of two kept photos; None without two that can be compared.
    shown : list of Kept
        The first kept photos by rank.
    pairs : list of Pair
        The closest and the farthest two of its photos that can be compared.
    failed : list of Photo
        Some of its photos that failed.
    """

    label: str
    why: list[str]
    photos: int
    ranked: int
    kept: int
    reasons: dict[str, int]
    closest_kept: float | None
    shown: list[Kept]
    pairs: list[Pair]
    failed: list[Photo]

    def drawn(self) -> Iterator[Photo]:
        """Yield the photos that have pictures; one that is shown twice is given twice."""
        for pair in self.pairs:
            yield from pair.drawn()
        for kept in self.shown:
            yield from (photo for photo in (kept.photo, *kept.dropped) if photo.is_drawn)


def labels_to_show(ledger: pa.Table, near_copy_bits: int, asked: Sequence[str] = ()) -> dict[str, list[str]]:
    """Choose labels that tell something.

    Parameters
    ----------
    ledger : pyarrow.Table
        The `LABEL_COLUMNS`.
    near_copy_bits : int
        Bits up to which two photos are near copies; -1 for vectors.
    asked : sequence of str
        Labels that are shown in any case, before the others.

    Returns
    -------
    dict of str to list of str
        Labels, and why each is shown. Of equal labels the first as text is chosen.

    Raises
    ------
    InputError
        If a label that is asked for is not in the ledger.
    """
    number, names = numbered(ledger["label"])
    known = set(names)
    for label in asked:
        if label not in known:
            raise InputError(f"--labels: no photo of the run has the label {label!r}{nearest(label, names)}")
    photos = np.bincount(number, minlength=len(names))
    ranked = np.bincount(number[pc.is_valid(ledger["rank"]).to_numpy()], minlength=len(names)) > 0
    near = pc.fill_null(pc.less_equal(ledger["nearest_kept_distance"], near_copy_bits), False)
    dropped = pc.is_in(ledger["reason"], value_set=pa.array(DROPPED))
    copies = np.bincount(number[pc.and_(near, dropped).to_numpy()], minlength=len(names))
    failures = np.bincount(number[pc.equal(ledger["reason"], FAILED).to_numpy()], minlength=len(names))
    chosen: dict[str, list[str]] = {label: ["asked for"] for label in asked}
    for why, sizes, worth in (
        ("the largest label", photos, photos > 0),
        ("the smallest label that was ranked", -photos, ranked),
        ("most near copies removed", copies, copies > 0),
        ("most failures", failures, failures > 0),
    ):
        if worth.any():
            numbers = np.flatnonzero(worth)
            chosen.setdefault(names[numbers[np.argmax(sizes[numbers])]], []).append(why)
    return chosen


def gallery(rows: pa.Table, why: list[str], pictures: int, bits: int) -> Gallery:
    """Arrange the photos of a label.

    Parameters
    ----------
    rows : pyarrow.Table
        All rows of the label in the ledger.
    why : list of str
        Why it is shown.
    pictures : int
        Pictures at most.
    bits : int
        Bits of a hash.
    """
    pairs = extreme_pairs(rows, bits)[: pictures // 2]
    left = max(0, pictures - 2 * len(pairs))
    closest = _closest(kept_by_rank(rows), bits)
    rows = rows.drop_columns([name for name in ("vector",) if name in rows.column_names])
    kept, dropped = kept_by_rank(rows), _dropped(rows)
    # Kept photos may take the pictures that dropped ones leave.
    room = max(round(KEPT_SHARE * left), left - dropped.num_rows)
    first = kept.slice(0, min(left, room)).to_pylist()
    failed = rows.filter(pc.equal(rows["reason"], FAILED)).sort_by("id")
    return Gallery(
        label=rows["label"][0].as_py(),
        why=why,
        photos=rows.num_rows,
        ranked=rows.num_rows - rows["rank"].null_count,
        kept=kept.num_rows,
        reasons=counts(rows["reason"]),
        closest_kept=closest,
        shown=_with_dropped(first, dropped, left - len(first)),
        pairs=pairs,
        failed=[as_photo(row, DROPPED_SIDE) for row in failed.slice(0, MOST_FAILED).to_pylist()],
    )


def _with_dropped(kept: list[dict[str, Any]], dropped: pa.Table, pictures: int) -> list[Kept]:
    """Return kept photos, with a number of pictures of the photos dropped for them, shared out one by one."""
    number_of = {row["id"]: number for number, row in enumerate(kept)}
    numbers = [number_of.get(name) for name in dropped["nearest_kept"].to_pylist()]
    rows = [row for row, number in enumerate(numbers) if number is not None]
    shown_under = np.array([numbers[row] for row in rows], dtype=np.int64)
    counts_under = np.bincount(shown_under, minlength=len(kept)).tolist()
    # One under each kept photo, then another one under each, while there are pictures.
    turn = position_in_group(shown_under)
    chosen = [rows[i] for i in np.argsort(turn, kind="stable")[:pictures].tolist() if turn[i] < MOST_DROPPED]
    photos: list[list[Photo]] = [[] for _ in kept]
    for row in dropped.take(pa.array(sorted(chosen), pa.int64())).to_pylist():
        photos[number_of[row["nearest_kept"]]].append(as_photo(row, DROPPED_SIDE))
    return [
        Kept(as_photo(row, KEPT_SIDE), shown, count - len(shown))
        for row, shown, count in zip(kept, photos, counts_under, strict=True)
    ]


def kept_by_rank(rows: pa.Table) -> pa.Table:
    """Return the rows of kept photos of a label in the order of their ranks; those without a rank by id."""
    return rows.filter(rows["kept"]).sort_by(BY_RANK)


def compared(rows: pa.Table, bits: int) -> tuple[pa.Table, Points | None]:
    """Return photos that can be compared, by their vectors where rows have such a column, else by their hashes.

    Parameters
    ----------
    rows : pyarrow.Table
        Rows of the ledger of one label.
    bits : int
        Bits of a hash.

    Returns
    -------
    pyarrow.Table
        The first `MOST_COMPARED` rows that can be compared, without their vectors.
    Points or None
        Their hashes or vectors; None without any.
    """
    by = "vector" if "vector" in rows.column_names else "hash"
    rows = rows.filter(pc.is_valid(rows[by])).slice(0, MOST_COMPARED[by])
    without = rows.drop_columns(["vector"]) if by == "vector" else rows
    if not rows.num_rows:
        return without, None
    return without, Cosine(units_of(rows[by])) if by == "vector" else Hamming(all_from_hex(rows[by], bits))


def _closest(rows: pa.Table, bits: int) -> float | None:
    """Return the smallest distance of two photos that can be compared; None without any."""
    rows, points = compared(rows, bits)
    if points is None or rows.num_rows < 2:
        return None
    return points.step * min(int(points.to(number)[number + 1 :].min()) for number in range(rows.num_rows - 1))


def _dropped(rows: pa.Table) -> pa.Table:
    """Return photos that others were kept in place of, together for each kept photo, the nearest first."""
    is_dropped = pc.and_(pc.is_in(rows["reason"], value_set=pa.array(DROPPED)), pc.is_valid(rows["nearest_kept"]))
    keys = ("nearest_kept", "nearest_kept_distance", "id")
    return rows.filter(is_dropped).sort_by([(name, "ascending") for name in keys])


def extreme_pairs(rows: pa.Table, bits: int) -> list[Pair]:
    """Return the two photos of a label that are closest to each other, and the two that are farthest apart.

    Parameters
    ----------
    rows : pyarrow.Table
        Rows of the label in the ledger; the first `MOST_COMPARED` by rank are compared.
    bits : int
        Bits of a hash.

    Returns
    -------
    list of Pair
        Both pairs, of equal ones those whose ids come first; none with fewer than two photos that can be compared.
    """
    hashed, points = compared(rows.sort_by(BY_RANK), bits)
    if points is None or hashed.num_rows < 2:
        return []
    by_id = pc.sort_indices(hashed["id"]).to_numpy()
    hashed, points = hashed.take(pa.array(by_id)), points.take(by_id.astype(np.int64))
    closest, farthest = (points.farthest + 1, 0, 0), (-1, 0, 0)
    for first in range(hashed.num_rows - 1):
        distance = points.to(first)[first + 1 :]
        low, high = int(distance.argmin()), int(distance.argmax())
        if distance[low] < closest[0]:
            closest = (int(distance[low]), first, first + 1 + low)
        if distance[high] > farthest[0]:
            farthest = (int(distance[high]), first, first + 1 + high)
    return [
        Pair(which, distance * points.step, *(as_photo(row, PAIR_SIDE) for row in hashed.take(pair).to_pylist()))
        for which, (distance, *pair) in (("closest", closest), ("farthest", farthest))
    ]


def cross_label_shown(pairs: pa.Table, rows: pa.Table) -> list[Pair]:
    """Return near copies under different labels, as pairs to show.

    Parameters
    ----------
    pairs : pyarrow.Table
        Rows of ``cross_label.parquet``.
    rows : pyarrow.Table
        Rows of the ledger, with all their photos among them.
    """
    photo_of = {(row["label"], row["id"]): as_photo(row, KEPT_SIDE) for row in rows.to_pylist()}
    return [
        Pair(
            "like",
            pair["distance"],
            photo_of[pair["label"], pair["id"]],
            photo_of[pair["other_label"], pair["other_id"]],
        )
        for pair in pairs.to_pylist()
    ]


def as_photo(row: dict[str, Any], side: int) -> Photo:
    """Return a photo to show, by its row of the ledger with times in nanoseconds.

    Parameters
    ----------
    row : dict
        Row of the ledger, as `reducer.storage.location.ref_of` takes it.
    side : int
        Pixels of the longest side of its picture.
    """
    return Photo(row, ref_of(row), side)
