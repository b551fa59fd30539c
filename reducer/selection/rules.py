"""Rules that decide which of the ranked photos are kept: filters and budgets over a ledger. Pure; reads no photo."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from reducer.config.cut_rules import CutRules
from reducer.errors import BudgetError, InputError
from reducer.storage.schemas import BEYOND_KEEP, BUDGET, KEPT, KEPT_SMALL_LABEL, MIN_DISTANCE
from reducer.storage.sorting import position_in_group, text_ranks

#: Columns of the ledger that decide.
DECIDING = ("label", "rank", "insertion_distance", "bytes", "reason")


@dataclass(frozen=True)
class Selection:
    """The photos of a ledger that rules keep.

    Attributes
    ----------
    kept : ndarray of bool, shape (rows,)
        Whether each photo is kept.
    reason : pyarrow.Array of string, shape (rows,)
        Why each photo is kept or not: the ledger's reason where the rules have not changed it.
    reached : float or None
        With a budget: the effective distance of the last photo that it had room for beyond those guaranteed, in bits;
        None where there is none.
    """

    kept: NDArray[np.bool_]
    reason: pa.Array
    reached: float | None


@dataclass(frozen=True)
class Unranked:
    """Photos of labels that were not read, whose ranks or sizes some rules need.

    Attributes
    ----------
    labels, photos : int
        Numbers of labels, and of their photos.
    unread : int
        Photos of all labels that were not read, also of those whose ranks are not needed.
    """

    labels: int
    photos: int
    unread: int


class NeedsRanksError(InputError):
    """Rules need ranks or sizes that are not known of labels that were not read.

    Attributes
    ----------
    unranked : Unranked
        Numbers of these labels and photos.
    """

    def __init__(self, unranked: Unranked) -> None:
        self.unranked = unranked
        super().__init__(
            f"{unranked.labels:,} labels ({unranked.photos:,} photos) were kept whole and not read: their photos have "
            "no rank"
        )


def select(ledger: pa.Table, rules: CutRules, always_keep: NDArray[np.bool_]) -> Selection:
    """Choose the photos of a ledger that rules keep.

    Parameters
    ----------
    ledger : pyarrow.Table
        Whole labels, in any order, with the columns `DECIDING`. Earlier choices do not matter.
    rules : CutRules
        The rules.
    always_keep : ndarray of bool, shape (rows,)
        Photos that are kept whatever the distance and the budget; only ``keep`` limits them.

    Returns
    -------
    Selection

    Raises
    ------
    NeedsRanksError
        If the rules need ranks or sizes of photos that were not read.
    BudgetError
        If a budget is under what is guaranteed.
    """
    reason = ledger["reason"].combine_chunks()
    small = pc.equal(reason, KEPT_SMALL_LABEL).to_numpy(zero_copy_only=False)
    rank = pc.fill_null(ledger["rank"], -1).to_numpy().astype(np.int64)
    label = text_ranks(ledger["label"])
    insertion = pc.fill_null(ledger["insertion_distance"], np.inf).to_numpy()
    size = pc.fill_null(ledger["bytes"], -1).to_numpy()
    _refuse_unranked(rules, label, small, rank >= 0, size)

    candidates = np.flatnonzero((rank >= 0) | small)
    candidates = candidates[np.lexsort((rank[candidates], label[candidates]))]
    code = np.full(len(rank), _KEPT, dtype=np.int8)

    if rules.min_distance is not None:
        far = (rank[candidates] <= 0) | (insertion[candidates] >= rules.min_distance) | always_keep[candidates]
        code[candidates[~far]] = _MIN_DISTANCE
        candidates = candidates[far]
    if rules.keep is not None:
        beyond = position_in_group(label[candidates]) >= rules.keep
        code[candidates[beyond]] = _BEYOND_KEEP
        candidates = candidates[~beyond]
    reached = None
    if rules.has_budget:
        costs = np.ones(len(candidates), dtype=np.int64) if rules.total is not None else size[candidates]
        fits, reached = _fit(
            rules, label[candidates], insertion[candidates], rank[candidates], costs, always_keep[candidates]
        )
        code[candidates[~fits]] = _BUDGET
        candidates = candidates[fits]

    kept = np.zeros(len(rank), dtype=bool)
    kept[candidates] = True
    changed = pa.array(["", MIN_DISTANCE, BEYOND_KEEP, BUDGET]).take(pa.array(code))
    chosen = pc.if_else(pa.array(small), KEPT_SMALL_LABEL, KEPT)
    reason = pc.if_else(pa.array(kept), chosen, pc.if_else(pa.array(code == _KEPT), reason, changed))
    return Selection(kept, reason, reached)


_KEPT, _MIN_DISTANCE, _BEYOND_KEEP, _BUDGET = range(4)


def _refuse_unranked(
    rules: CutRules,
    label: NDArray[np.int64],
    small: NDArray[np.bool_],
    ranked: NDArray[np.bool_],
    size: NDArray[np.int64],
) -> None:
    """Refuse rules that drop some photos of a label that was not read, or count bytes that are not known."""
    if rules.max_bytes is not None and (unknown := int((size[ranked] < 0).sum())):
        raise InputError(
            f"--max-bytes counts bytes, and the sizes of {unknown:,} photos are not known: they were ranked by their "
            "vectors and not read. Give --total, or run again with --max-bytes, which reads them"
        )
    if not small.any():
        return
    photos = np.bincount(label[small], minlength=int(label.max()) + 1)
    whole = np.full(len(photos), np.iinfo(np.int64).max)  # most photos with which a label stays whole
    if rules.min_distance is not None:
        whole = np.minimum(whole, 1)
    if rules.keep is not None:
        whole = np.minimum(whole, rules.keep)
    if rules.has_budget:
        whole = np.minimum(whole, rules.guaranteed)
    needed = photos > whole
    if rules.max_bytes is not None:
        needed |= np.bincount(label[small & (size < 0)], minlength=len(photos)) > 0
    if needed.any():
        raise NeedsRanksError(Unranked(int(needed.sum()), int(photos[needed].sum()), int(small.sum())))


def _fit(
    rules: CutRules,
    label: NDArray[np.int64],
    insertion: NDArray[np.float64],
    rank: NDArray[np.int64],
    cost: NDArray[np.int64],
    always_keep: NDArray[np.bool_],
) -> tuple[NDArray[np.bool_], float | None]:
    """Return which photos a budget has room for, and the distance reached; photos are sorted by (label, rank)."""
    budget = rules.total if rules.total is not None else rules.max_bytes
    assert isinstance(budget, int)
    fits = (position_in_group(label) < rules.guaranteed) | always_keep
    least = int(cost[fits].sum())
    if least > budget:
        flag = "--total" if rules.total is not None else "--max-bytes"
        labels = len(np.unique(label))
        always = f" and {int(always_keep.sum()):,} photos that are always kept" if always_keep.any() else ""
        raise BudgetError(
            f"{flag} {budget} is under what is guaranteed, {rules.guaranteed} of each of {labels:,} labels "
            f"(--min-per-label){always}: give at least {flag} {least}"
        )
    effective = _running_minimum(label, np.where(rank <= 0, np.inf, insertion))
    rest = np.flatnonzero(~fits)
    rest = rest[np.lexsort((label[rest], rank[rest], -effective[rest]))]
    over = np.cumsum(cost[rest]) > budget - least
    room = int(np.argmax(over)) if over.any() else len(rest)
    fits[rest[:room]] = True
    return fits, float(effective[rest[room - 1]]) if room else None


def _running_minimum(group: NDArray[np.int64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the smallest value so far in each group; equal groups stand together.

    By doubling steps, as in a parallel prefix sum: after step k each row holds the smallest of the 2 ** k rows up to
    it.
    """
    smallest = values.copy()
    place = position_in_group(group)
    step = 1
    while step <= (place.max() if len(place) else 0):
        later = np.flatnonzero(place >= step)
        smallest[later] = np.minimum(smallest[later], smallest[later - step])
        step *= 2
    return smallest
