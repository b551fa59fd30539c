"""Which of the ranked photos are kept: by a plain reading of the rules, and what holds for every budget."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Set
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reducer import InputError
from reducer.config.cut_rules import CutRules
from reducer.selection.rules import NeedsRanksError, select
from reducer.storage.schemas import LEDGER_SCHEMA

Row = dict[str, Any]


def ledger_of(rows: list[Row]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=LEDGER_SCHEMA)


@st.composite
def ledgers(draw: st.DrawFn, small_labels: bool = False) -> list[Row]:
    """Rows of a few labels, in any order; insertion distances fall or not, as with strategies that do not sort so."""
    rows: list[Row] = []
    for label in draw(st.lists(st.sampled_from(["10", "9", "a", "B", "é"]), min_size=1, max_size=4, unique=True)):
        small = small_labels and draw(st.booleans())
        falling = draw(st.booleans())
        distances = draw(st.lists(st.integers(0, 12), max_size=6))
        if falling:
            distances.sort(reverse=True)
        for rank, distance in enumerate([None, *distances]):
            rows.append(
                {
                    "id": f"{label}{rank}",
                    "label": label,
                    "rank": None if small else rank,
                    "insertion_distance": None if small else distance,
                    "bytes": None if small else draw(st.integers(1, 50)),
                    "reason": "kept-small-label" if small else draw(st.sampled_from(["kept", "beyond-keep", "budget"])),
                }
            )
        for i, reason in enumerate(
            draw(st.lists(st.sampled_from(["failed", "flat", "avoided", "not-sampled"]), max_size=2))
        ):
            rows.append({"id": f"{label}x{i}", "label": label, "rank": None, "reason": reason})
    order = draw(st.permutations(range(len(rows))))
    return [rows[i] for i in order]


rules_of = st.builds(
    CutRules,
    min_distance=st.none() | st.integers(0, 12),
    keep=st.none() | st.integers(1, 5),
)


def chosen(rows: list[Row], rules: CutRules, always: Set[str] = frozenset()) -> list[Row]:
    selection = select(ledger_of(rows), rules, np.array([row["id"] in always for row in rows]))
    kept = [row for row, is_kept in zip(rows, selection.kept.tolist(), strict=True) if is_kept]
    for row, is_kept, reason in zip(rows, selection.kept.tolist(), selection.reason.to_pylist(), strict=True):
        assert (reason in ("kept", "kept-small-label")) == is_kept
        if row["reason"] in ("failed", "flat", "avoided", "not-sampled"):
            assert reason == row["reason"]
        elif not is_kept:
            assert reason in ("min-distance", "beyond-keep", "budget")
    return kept


def filtered(rows: list[Row], rules: CutRules, always: Set[str] = frozenset()) -> dict[str, list[Row]]:
    """What distance and keep leave of each label, in rank order: a plain reading of the rules."""
    labels = defaultdict(list)
    for row in rows:
        if row["rank"] is not None:
            labels[row["label"]].append(row)
    left = {}
    for label, own in labels.items():
        least = -1 if rules.min_distance is None else rules.min_distance
        far = [
            row
            for row in sorted(own, key=lambda row: row["rank"])
            if row["rank"] == 0 or row["insertion_distance"] >= least or row["id"] in always
        ]
        left[label] = far[: rules.keep]
    return left


@given(ledgers(), rules_of, st.data())
def test_distance_then_keep(rows: list[Row], rules: CutRules, data: st.DataObject) -> None:
    always = set(
        data.draw(st.lists(st.sampled_from([row["id"] for row in rows if row["rank"] is not None]), max_size=2))
    )
    expected = {row["id"] for own in filtered(rows, rules, always).values() for row in own}
    assert {row["id"] for row in chosen(rows, rules, always)} == expected


def by_budget(rows: list[Row], rules: CutRules, cost: Any, budget: int, always: Set[str]) -> set[str] | None:
    """The photos that a budget has room for, one after the other; None if it has not for those guaranteed."""
    kept, rest, spent = set(), [], 0
    for label, own in filtered(rows, rules, always).items():
        effective = math.inf
        for place, row in enumerate(own):
            if row["rank"] > 0:
                effective = min(effective, row["insertion_distance"])
            if place < rules.guaranteed or row["id"] in always:
                kept.add(row["id"])
                spent += cost(row)
            else:
                rest.append((-effective, row["rank"], label, row["id"], cost(row)))
    if spent > budget:
        return None
    for *_, photo, price in sorted(rest):
        if spent + price > budget:
            break
        spent += price
        kept.add(photo)
    return kept


@settings(max_examples=300)
@given(ledgers(), rules_of, st.booleans(), st.integers(0, 3), st.data())
def test_budgets(rows: list[Row], rules: CutRules, in_bytes: bool, least: int, data: st.DataObject) -> None:
    ranked = [row for row in rows if row["rank"] is not None]
    always = set(data.draw(st.lists(st.sampled_from([row["id"] for row in ranked]), max_size=2)))

    def cost(row: Row) -> int:
        return int(row["bytes"]) if in_bytes else 1

    most = sum(map(cost, ranked))
    before: set[str] | None = None
    for budget in sorted(data.draw(st.lists(st.integers(1, most + 1), min_size=1, max_size=4))):
        name = "max_bytes" if in_bytes else "total"
        own_rules = CutRules(rules.min_distance, rules.keep, **{name: budget}, min_per_label=least)
        expected = by_budget(rows, own_rules, cost, budget, always)
        if expected is None:
            with pytest.raises(InputError, match="is under what is guaranteed") as refused:
                chosen(rows, own_rules, always)
            # What it says would do does, and one less does not.
            enough = int(str(refused.value).split()[-1])
            assert budget < enough
            chosen(rows, CutRules(rules.min_distance, rules.keep, **{name: enough}, min_per_label=least), always)
            with pytest.raises(InputError):
                chosen(
                    rows, CutRules(rules.min_distance, rules.keep, **{name: enough - 1}, min_per_label=least), always
                )
            continue
        kept = chosen(rows, own_rules, always)
        ids = {row["id"] for row in kept}
        assert ids == expected
        assert sum(map(cost, kept)) <= budget
        # Every label has what is guaranteed, and a prefix of what its filters leave (but for those always kept).
        for own in filtered(rows, own_rules, always).values():
            names = [row["id"] for row in own]
            assert set(names[: own_rules.guaranteed]) <= ids
            taken = [name for name in names if name in ids and name not in always]
            assert taken == [name for name in names if name not in always][: len(taken)]
        assert before is None or before <= ids
        before = ids


def test_ties_go_by_rank_then_label_then_stop() -> None:
    rows = [
        {"id": f"{label}{rank}", "label": label, "rank": rank, "insertion_distance": 5 if rank else None, "bytes": size}
        | {"reason": "kept"}
        for label, size in (("b", 10), ("a", 10), ("c", 1))
        for rank in range(3)
    ]

    def ids(**rules: int) -> str:
        return " ".join(sorted(row["id"] for row in chosen(rows, CutRules(**rules))))

    assert ids(total=4) == "a0 a1 b0 c0"
    assert ids(total=5) == "a0 a1 b0 b1 c0"
    assert ids(total=7) == "a0 a1 a2 b0 b1 c0 c1"
    # 21 bytes are guaranteed; a1 does not fit, and nothing comes after it, though c1 would fit.
    assert ids(max_bytes=30) == "a0 b0 c0"
    assert ids(max_bytes=31) == "a0 a1 b0 c0"
    # The effective distance is the smallest so far: what stands behind a small one comes late.
    rows[1]["insertion_distance"] = 1
    assert ids(total=6) == "a0 a1 a2 b0 c0 c1"


@given(ledgers(small_labels=True), rules_of, st.none() | st.integers(1, 20), st.integers(0, 3))
def test_unread_labels_are_needed_only_where_some_of_theirs_would_go(
    rows: list[Row], rules: CutRules, total: int | None, least: int
) -> None:
    given_rules = CutRules(rules.min_distance, rules.keep, total, min_per_label=least if total else None)
    sizes = Counter(row["label"] for row in rows if row["reason"] == "kept-small-label")
    bounds = [1 if rules.min_distance is not None else None, rules.keep, least if total else None]
    whole = min((bound for bound in bounds if bound is not None), default=math.inf)
    needed = {label: size for label, size in sizes.items() if size > whole}
    try:
        kept = chosen(rows, given_rules)
    except NeedsRanksError as error:
        assert needed
        found = error.unranked
        assert (found.labels, found.photos) == (len(needed), sum(needed.values()))
        assert found.unread == sum(sizes.values())
    except InputError:
        assert not needed
    else:
        assert not needed
        assert {row["id"] for row in rows if row["reason"] == "kept-small-label"} <= {row["id"] for row in kept}


def test_bytes_of_photos_that_were_not_read_are_not_known() -> None:
    rows = [{"id": "a", "label": "x", "reason": "kept-small-label"}]
    with pytest.raises(NeedsRanksError, match=r"1 labels \(1 photos\) were kept whole and not read"):
        chosen(rows, CutRules(max_bytes=10**9))
    assert len(chosen([rows[0] | {"bytes": 9}], CutRules(max_bytes=10))) == 1  # a listing told


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"total": 3, "max_bytes": 5}, "--total and --max-bytes exclude each other"),
        ({"min_per_label": 2}, "give --total or --max-bytes too"),
        ({"min_per_label": -1, "total": 9}, "--min-per-label is -1"),
        ({"total": 0}, "--total is 0: expected a whole number of 1 or more"),
        ({"keep": 0}, "--keep is 0"),
        ({"min_distance": -1}, "--min-distance is -1"),
        ({"min_distance": math.nan}, "--min-distance is nan"),
        ({"max_bytes": "many"}, "--max-bytes is 'many': expected a number of bytes such as 20GB"),
        ({"max_bytes": "inf"}, "--max-bytes is 'inf'"),
        ({"max_bytes": "0"}, "--max-bytes is 0"),
    ],
)
def test_rules_that_mean_nothing_are_refused(rules: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CutRules(**rules)


def test_sizes_are_decimal_unless_said() -> None:
    sizes = {"20GB": 20 * 10**9, "1.5 MB": 1_500_000, "2GiB": 2**31, "7": 7, "3kB": 3000}
    assert {text: CutRules(max_bytes=text).max_bytes for text in sizes} == sizes
