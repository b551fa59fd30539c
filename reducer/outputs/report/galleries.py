"""Which labels and photos of a run are shown, and how they stand to one another. Pure, over the ledger."""

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
#: Rows of one label in the order of their ranks; null comes last.
BY_RANK = [("rank", "ascending"), ("id", "ascending")]
#: Pixels of the longest side of a kept photo, of one that was dropped for it, and of one of a pair.
KEPT_SIDE, DROPPED_SIDE, PAIR_SIDE = 240, 120, 320
#: At most so many photos are shown under the one that they were dropped for, and so many failures of a label.
MOST_DROPPED, MOST_FAILED = 12, 12
#: Of a label's pictures, those of its pairs aside, such a share goes to kept photos, if there are that many.
KEPT_SHARE = 2 / 3
#: Of a label with more photos the first so many by rank are compared: all pairs of them take a second.
MOST_COMPARED = {"hash": 20_000, "vector": 4_000}
#: Pairs of near copies under different labels that are shown, if pictures are left: a tenth of all at most.
MOST_CROSS_LABEL = 12


@dataclass(frozen=True)
class Photo:
    """A photo that is shown.

    Attributes
    ----------
    row : dict
        Its row of the ledger.
    ref : str or ByteRange
        Where it lies.
    side : int
        Pixels of the longest side of its picture.
    """

    row: dict[str, Any]
    ref: PhotoRef
    side: int

    @property
    def is_drawn(self) -> bool:
        """Whether a picture of it is tried: not of one that has failed before."""
        return self.row["error"] is None

    @property
    def is_known(self) -> bool:
        """Whether it has been decoded: so it will not harm the process that does it again."""
        return self.row["hash"] is not None


@dataclass(frozen=True)
class Kept:
    """A kept photo.

    Attributes
    ----------
    photo : Photo
    dropped : list of Photo
        Photos that it was kept in place of, the nearest first.
    more : int
        How many more of them there are.
    """

    photo: Photo
    dropped: list[Photo]
    more: int


@dataclass(frozen=True)
class Pair:
    """Two photos side by side.

    Attributes
    ----------
    which : str
        ``closest``, ``farthest`` or ``like`` (of different labels).
    distance : float
        Between their hashes, in bits, or their vectors.
    first, second : Photo
    """

    which: str
    distance: float
    first: Photo
    second: Photo


@dataclass(frozen=True)
class Gallery:
    """The photos of a label.

    Attributes
    ----------
    label : str
    why : list of str
        Why it is shown.
    photos, ranked, kept : int
        Photos of the label, those with a rank, and the kept ones.
    reasons : dict of str to int
        What became of its photos.
    closest_kept : float or None
        The smallest distance of two kept photos; None where there are no two that can be compared.
    shown : list of Kept
        Kept photos by rank; the first of them.
    pairs : list of Pair
        The closest and the farthest two of all photos of the label that have a hash.
    failed : list of Photo
        Some of those that have failed.
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
        """All photos that have pictures, one that is shown twice given twice."""
        for pair in self.pairs:
            yield from (pair.first, pair.second)
        for one in self.shown:
            yield from (photo for photo in (one.photo, *one.dropped) if photo.is_drawn)


def labels_to_show(ledger: pa.Table, near_copy_bits: int, asked: Sequence[str] = ()) -> dict[str, list[str]]:
    """Choose labels that tell something.

    Parameters
    ----------
    ledger : pyarrow.Table
        With the `LABEL_COLUMNS`.
    near_copy_bits : int
        At most so far apart two photos are near copies.
    asked : sequence of str
        Labels that are shown whatever they tell, before the others.

    Returns
    -------
    dict of str to list of str
        Why each is shown. Of equal labels the first as text.

    Raises
    ------
    InputError
        If the ledger has no label that is asked for.
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
    found: dict[str, list[str]] = {label: ["asked for"] for label in asked}
    for why, sizes, worth in (
        ("the largest label", photos, photos > 0),
        ("the smallest label that was ranked", -photos, ranked),
        ("most near copies removed", copies, copies > 0),
        ("most failures", failures, failures > 0),
    ):
        if worth.any():
            places = np.flatnonzero(worth)
            found.setdefault(names[places[np.argmax(sizes[places])]], []).append(why)
    return found


def gallery(rows: pa.Table, why: list[str], pictures: int, bits: int) -> Gallery:
    """Arrange the photos of a label.

    Parameters
    ----------
    rows : pyarrow.Table
        All of its rows of the ledger.
    why : list of str
        Why it is shown.
    pictures : int
        So many at most.
    bits : int
        Bits of a hash.
    """
    pairs = extreme_pairs(rows, bits)[: pictures // 2]
    left = max(0, pictures - 2 * len(pairs))
    kept_rows = kept_by_rank(rows)
    closest = _closest(kept_rows, bits)
    rows = rows.drop_columns([name for name in ("vector",) if name in rows.column_names])
    kept, dropped = kept_by_rank(rows), _dropped(rows)
    # What dropped photos do not take, kept ones may.
    room = max(round(KEPT_SHARE * left), left - dropped.num_rows)
    first = kept.slice(0, min(left, room)).to_pylist()
    own = {row["id"]: number for number, row in enumerate(first)}
    under: list[list[Photo]] = [[] for _ in first]
    left -= len(first)
    places = [own.get(name) for name in dropped["nearest_kept"].to_pylist()]
    all_of = np.bincount([place for place in places if place is not None], minlength=len(first))
    mine = [number for number, place in enumerate(places) if place is not None]
    # One under each kept photo, then another one under each, while there are pictures.
    turn = position_in_group(np.array([places[number] for number in mine], dtype=np.int64))
    chosen = [mine[i] for i in np.argsort(turn, kind="stable")[:left].tolist() if turn[i] < MOST_DROPPED]
    for row in dropped.take(pa.array(sorted(chosen), pa.int64())).to_pylist():
        under[own[row["nearest_kept"]]].append(as_photo(row, DROPPED_SIDE))
    failed = rows.filter(pc.equal(rows["reason"], FAILED)).sort_by("id")
    return Gallery(
        label=rows["label"][0].as_py(),
        why=why,
        photos=rows.num_rows,
        ranked=rows.num_rows - rows["rank"].null_count,
        kept=kept.num_rows,
        reasons=counts(rows["reason"]),
        closest_kept=closest,
        shown=[
            Kept(as_photo(row, KEPT_SIDE), its, int(all_its) - len(its))
            for row, its, all_its in zip(first, under, all_of.tolist(), strict=True)
        ],
        pairs=pairs,
        failed=[as_photo(row, DROPPED_SIDE) for row in failed.slice(0, MOST_FAILED).to_pylist()],
    )


def kept_by_rank(rows: pa.Table) -> pa.Table:
    """The kept ones of a label's rows in the order of their ranks; those without a rank by id."""
    return rows.filter(rows["kept"]).sort_by(BY_RANK)


def compared(rows: pa.Table, bits: int) -> tuple[pa.Table, Points | None]:
    """Photos that can be compared: by their vectors where rows have such a column, else by their hashes.

    Parameters
    ----------
    rows : pyarrow.Table
        Rows of the ledger of one label.
    bits : int
        Bits of a hash.

    Returns
    -------
    pyarrow.Table
        At most `MOST_COMPARED` rows, the first of those that can be compared; without their vectors.
    Points or None
        What they are compared by; None without any.
    """
    by = "vector" if "vector" in rows.column_names else "hash"
    own = rows.filter(pc.is_valid(rows[by])).slice(0, MOST_COMPARED[by])
    without = own.drop_columns(["vector"]) if by == "vector" else own
    if not own.num_rows:
        return without, None
    return without, Cosine(units_of(own[by])) if by == "vector" else Hamming(all_from_hex(own[by], bits))


def _closest(rows: pa.Table, bits: int) -> float | None:
    """The smallest distance of two photos that can be compared."""
    own, points = compared(rows, bits)
    if points is None or own.num_rows < 2:
        return None
    return points.step * min(int(points.to(place)[place + 1 :].min()) for place in range(own.num_rows - 1))


def _dropped(rows: pa.Table) -> pa.Table:
    """Photos that others were kept in place of, those of one kept photo together, the nearest first."""
    own = pc.and_(pc.is_in(rows["reason"], value_set=pa.array(DROPPED)), pc.is_valid(rows["nearest_kept"]))
    keys = ("nearest_kept", "nearest_kept_distance", "id")
    return rows.filter(own).sort_by([(name, "ascending") for name in keys])


def extreme_pairs(rows: pa.Table, bits: int) -> list[Pair]:
    """The two photos of a label that are closest to each other, and the two that are farthest apart.

    Parameters
    ----------
    rows : pyarrow.Table
        Its rows of the ledger, as for `compared`, which takes the first by rank.
    bits : int
        Bits of a hash.

    Returns
    -------
    list of Pair
        Both, of equal ones those whose ids come first; none with fewer than two photos that can be compared.
    """
    hashed, points = compared(rows.sort_by(BY_RANK), bits)
    if points is None or hashed.num_rows < 2:
        return []
    by_id = pc.sort_indices(hashed["id"]).to_numpy()
    hashed, points = hashed.take(pa.array(by_id)), points.take(by_id.astype(np.int64))
    closest, farthest = (points.farthest + 1, 0, 0), (-1, 0, 0)
    for place in range(hashed.num_rows - 1):
        distance = points.to(place)[place + 1 :]
        low, high = int(distance.argmin()), int(distance.argmax())
        if distance[low] < closest[0]:
            closest = (int(distance[low]), place, place + 1 + low)
        if distance[high] > farthest[0]:
            farthest = (int(distance[high]), place, place + 1 + high)
    return [
        Pair(
            which, distance * points.step, *(as_photo(row, PAIR_SIDE) for row in hashed.take([one, other]).to_pylist())
        )
        for which, (distance, one, other) in (("closest", closest), ("farthest", farthest))
    ]


def cross_label_shown(pairs: pa.Table, rows: pa.Table) -> list[Pair]:
    """Near copies under different labels.

    Parameters
    ----------
    pairs : pyarrow.Table
        Rows of ``cross_label.parquet``.
    rows : pyarrow.Table
        Rows of the ledger, those of all their photos among them.
    """
    of = {(row["label"], row["id"]): as_photo(row, KEPT_SIDE) for row in rows.to_pylist()}
    return [
        Pair("like", pair["distance"], of[pair["label"], pair["id"]], of[pair["other_label"], pair["other_id"]])
        for pair in pairs.to_pylist()
    ]


def as_photo(row: dict[str, Any], side: int) -> Photo:
    """A photo by its row of the ledger, as for `reducer.storage.location.ref_of`."""
    return Photo(row, ref_of(row), side)
