"""Ranking by vectors, and by vectors and hashes together, against plain loops."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vectorcases import VECTORS, apart, units_of

from reducer.draw import RANDOM_ORDER, draw_order
from reducer.selection import distance
from reducer.selection.distance import COSINE_STEPS, Cosine, Hamming
from reducer.selection.facility_location import NearCopies
from reducer.selection.strategies import (
    STRATEGIES,
    Candidates,
    facility_location,
    farthest_first,
    nearest_kept,
    random,
    rank,
)
from reducer.storage.codecs import as_units

BY_VECTORS = ("facility-location", "farthest-first", "random")


def names(count: int) -> list[str]:
    return [f"p{i}" for i in range(count)]


def by_loops(
    strategy: str, units: np.ndarray, ids: list[str], hashes: list[int] | None = None, near: int = 0
) -> list[str]:
    """The rule as it is said: the best that is no near copy of those taken; when none is left, the best at all."""
    steps = {(a, b): apart(units[i], units[j]) for i, a in enumerate(ids) for j, b in enumerate(ids)}
    hash_of = dict(zip(ids, hashes or [0] * len(ids), strict=True))
    drawn = [ids[i] for i in draw_order(RANDOM_ORDER, 0, "", ids)]
    taken: list[str] = []

    def covered(also: str) -> int:
        return sum(min([2 * COSINE_STEPS] + [steps[i, t] for t in [*taken, also]]) for i in ids)

    while len(taken) < len(ids):
        left = [i for i in ids if i not in taken]
        if hashes is not None:
            distinct = [i for i in left if all((hash_of[i] ^ hash_of[t]).bit_count() > near for t in taken)]
            left = distinct or left
        if strategy == "random":
            best = min(left, key=drawn.index)
        elif strategy == "facility-location":
            best = min(left, key=lambda i: (covered(i), i))
        elif not taken:
            best = min(ids, key=lambda i: (sum(steps[i, j] for j in ids), i))
        else:
            best = min(left, key=lambda i: (-min(steps[i, t] for t in taken), i))
        taken.append(best)
    return taken


@settings(max_examples=60, deadline=None)
@given(VECTORS, st.sampled_from(BY_VECTORS), st.randoms())
def test_orders_are_the_rules_by_loops(vectors: list[list[int]], name: str, shuffler: object) -> None:
    units, ids = units_of(vectors), names(len(vectors))
    ranking = STRATEGIES[name](Candidates(Cosine(units), ids))
    assert [ids[i] for i in ranking.order] == by_loops(name, units, ids)
    assert np.isnan(ranking.insertion_distance[0])
    for place in range(1, len(ids)):
        earlier = [apart(units[ranking.order[place]], units[i]) for i in ranking.order[:place]]
        assert ranking.insertion_distance[place] == min(earlier) / COSINE_STEPS
    shuffled = list(range(len(ids)))
    shuffler.shuffle(shuffled)  # type: ignore[attr-defined]
    again = STRATEGIES[name](Candidates(Cosine(units[shuffled]), [ids[i] for i in shuffled]))
    assert [ids[shuffled[i]] for i in again.order] == [ids[i] for i in ranking.order]


@settings(max_examples=60, deadline=None)
@given(VECTORS, st.sampled_from(BY_VECTORS), st.integers(0, 2), st.data())
def test_near_copies_by_hash_come_last(vectors: list[list[int]], name: str, near: int, data: st.DataObject) -> None:
    units, ids = units_of(vectors), names(len(vectors))
    hashes = data.draw(st.lists(st.integers(0, 31), min_size=len(ids), max_size=len(ids)))
    copies = NearCopies(np.array(hashes, dtype=np.uint8).reshape(-1, 1), near)
    ranking = STRATEGIES[name](Candidates(Cosine(units), ids, copies=copies))
    order = [ids[i] for i in ranking.order]
    if len({*hashes}) == len(hashes) and near == 0:
        assert order == by_loops(name, units, ids)
    assert order == by_loops(name, units, ids, hashes, near)


def test_photos_that_are_always_kept_come_first_and_their_copies_last() -> None:
    generator = np.random.default_rng(0)
    units, ids = as_units(generator.normal(size=(40, 8)))[0], names(40)
    hashes = generator.integers(0, 256, (40, 8), dtype=np.uint8)
    hashes[10:15] = hashes[3]  # copies of one that is always kept
    always = np.zeros(40, dtype=bool)
    always[[3, 30]] = True
    for name in BY_VECTORS:
        candidates = Candidates(Cosine(units), ids, keep=5, label="a", copies=NearCopies(hashes, 6))
        order = rank(name, candidates, always).order.tolist()
        assert set(order[:2]) == {3, 30}
        assert set(order[-5:]) == {10, 11, 12, 13, 14}


def test_nearest_kept_by_vectors() -> None:
    units = units_of([[1, 0, 0], [0, 1, 0], [1, 1, 0], [2, 0, 0]])
    positions, steps = nearest_kept(Cosine(units), ["d", "b", "c", "a"], np.array([0, 1]))
    assert positions.tolist() == [0, 1, 1, 0]  # of equally near ones that with the smallest id
    assert steps.tolist() == [0, 0, apart(units[1], units[2]), 0]


@pytest.mark.parametrize("kind", ["vectors", "hashes"])
def test_distances_need_not_be_held(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Without room for all pairs the order is the same."""
    generator = np.random.default_rng(1)
    units = as_units(generator.normal(size=(300, 16)))[0]
    hashes = generator.integers(0, 4, (300, 8), dtype=np.uint8)
    points, ids = (Cosine(units) if kind == "vectors" else Hamming(hashes)), names(300)
    copies = NearCopies(hashes, 3) if kind == "vectors" else None
    expected = facility_location(Candidates(points, ids, keep=150, copies=copies))
    monkeypatch.setattr("reducer.selection.facility_location.MATRIX_BYTES", 0)
    monkeypatch.setattr("reducer.selection.facility_location.ASKED_TOGETHER", 7)
    monkeypatch.setattr(distance, "HELD_PHOTOS", 0)
    points = Cosine(units) if kind == "vectors" else Hamming(hashes)
    found = facility_location(Candidates(points, ids, keep=150, copies=copies))
    assert found.order.tolist() == expected.order.tolist()
    np.testing.assert_array_equal(found.insertion_distance, expected.insertion_distance)


def test_of_more_photos_than_it_takes_parts_choose_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """GreeDi, by hand: greedy in each drawn part, then greedy for all among those."""
    generator = np.random.default_rng(2)
    units, ids = as_units(generator.normal(size=(90, 6)))[0], names(90)
    monkeypatch.setattr("reducer.selection.facility_location.FACILITY_LOCATION_CANDIDATES", 40)
    monkeypatch.setattr("reducer.selection.strategies.FACILITY_LOCATION_RANKS", 8)
    order = [ids[i] for i in facility_location(Candidates(Cosine(units), ids, keep=8, label="x", seed=3)).order]
    by_id = sorted(ids)
    own = {name: units[ids.index(name)] for name in ids}

    def greedy(demand: list[str], candidates: list[str]) -> list[str]:
        taken: list[str] = []

        def covered(also: str) -> int:
            return sum(min(apart(own[i], own[t]) for t in [*taken, also]) for i in demand)

        while len(taken) < 8:
            taken.append(min((c for c in candidates if c not in taken), key=lambda i: (covered(i), i)))
        return taken

    drawn = [by_id[i] for i in draw_order(RANDOM_ORDER, 3, "x", by_id)]
    chosen = [name for part in range(3) for name in greedy(sorted(drawn[part::3]), sorted(drawn[part::3]))]
    assert order[:8] == greedy(by_id, sorted(chosen))
    assert sorted(order) == by_id


def test_parts_lose_little() -> None:
    generator = np.random.default_rng(3)
    centres = generator.normal(size=(30, 16))
    units = as_units(centres[generator.integers(0, 30, 1200)] + 0.3 * generator.normal(size=(1200, 16)))[0]
    points, ids = Cosine(units), names(1200)

    def worth(order: np.ndarray) -> float:
        return float(points.farthest * 1200 - nearest_kept(points, ids, order[:25])[1].sum())

    whole = worth(facility_location(Candidates(points, ids, keep=25)).order)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("reducer.selection.facility_location.FACILITY_LOCATION_CANDIDATES", 300)
        parts = worth(facility_location(Candidates(points, ids, keep=25)).order)
    drawn = worth(random(Candidates(points, ids)).order)
    assert whole >= parts > whole - 0.1 * (whole - drawn)


def test_a_large_label_by_vectors_stays_small() -> None:
    """20,000 candidates take under 1 GiB, as not all pairs are held: shown with a tenth, whose pairs take 16 MB."""
    count = 2_000
    generator = np.random.default_rng(4)
    units = as_units(generator.normal(size=(count, 64)).astype(np.float32))[0]
    ids = names(count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distance, "HELD_PHOTOS", 0)  # as with 20,000
        patch.setattr("reducer.selection.facility_location.MATRIX_BYTES", 0)
        patch.setattr("reducer.selection.strategies._farthest_behind", lambda points, picks, by_id, distinct: picks)
        tracemalloc.start()
        picks = facility_location(Candidates(Cosine(units), ids))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert len(set(picks.tolist())) == 100  # type: ignore[attr-defined]
    assert peak < 12 * 2**20


@pytest.mark.parametrize("dimensions", [32, 64])
def test_a_mixture_with_wrong_labels(dimensions: int) -> None:
    """Known modes with copies, a tenth of the photos from elsewhere: what each strategy keeps of 25."""
    modes, kept_modes, kept_wrong = 20, dict.fromkeys(BY_VECTORS, 0.0), dict.fromkeys(BY_VECTORS, 0.0)
    for seed in range(6):
        generator = np.random.default_rng(seed)
        centres = generator.normal(size=(modes, dimensions))
        mode = generator.choice(modes, 300, p=generator.dirichlet(np.ones(modes)))
        views = centres[mode] + generator.normal(size=(300, dimensions))
        copied = generator.integers(0, 300, 150)
        vectors = np.concatenate([views, views[copied] + 0.02 * generator.normal(size=(150, dimensions))])
        of_mode = np.concatenate([mode, mode[copied]])
        wrong = generator.random(450) < 0.1
        vectors[wrong] = generator.normal(size=(int(wrong.sum()), dimensions))
        points, ids = Cosine(as_units(vectors)[0]), names(450)
        for name in BY_VECTORS:
            order = STRATEGIES[name](Candidates(points, ids, keep=25, seed=seed)).order[:25]
            there = len(set(of_mode[~wrong].tolist()))
            kept_modes[name] += len(set(of_mode[order][~wrong[order]].tolist())) / there
            kept_wrong[name] += wrong[order].mean()
    assert kept_modes["facility-location"] > 1.2 * kept_modes["random"]
    assert kept_modes["facility-location"] > kept_modes["farthest-first"]
    assert 2 * kept_wrong["facility-location"] < kept_wrong["random"] < kept_wrong["farthest-first"] / 2


def test_farthest_first_by_vectors_is_within_a_factor_4_of_the_best() -> None:
    from itertools import combinations

    generator = np.random.default_rng(5)
    for _ in range(20):
        units = as_units(generator.normal(size=(9, 3)))[0]
        order = farthest_first(Candidates(Cosine(units), names(9))).order.tolist()[:4]
        steps = [[apart(a, b) for b in units] for a in units]

        def smallest(chosen: tuple[int, ...], steps: list[list[int]] = steps) -> int:
            return min(steps[a][b] for a, b in combinations(chosen, 2))

        best = max(map(smallest, combinations(range(9), 4)))
        assert 4 * smallest(tuple(order)) >= best * 0.999  # vectors are rounded
