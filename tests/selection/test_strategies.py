from __future__ import annotations

import tracemalloc
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reducer.config.settings import STRATEGY_NAMES
from reducer.draw import CANDIDATES, RANDOM_ORDER, draw_keys, draw_order
from reducer.selection.distance import Cosine, Hamming, near_any
from reducer.selection.facility_location import FACILITY_LOCATION_CANDIDATES, MATRIX_BYTES
from reducer.selection.strategies import (
    COMPUTED_TOGETHER,
    FACILITY_LOCATION_RANKS,
    STRATEGIES,
    Candidates,
    facility_location,
    farthest_first,
    nearest_kept,
    pairs,
    random,
    rank,
)
from reducer.storage.codecs import as_units

# Few bits and few distinct ids make many ties and many exact copies.
HASHES = st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 7), min_size=1, max_size=24)


def packed(values: list[int]) -> np.ndarray:
    return np.array([list(value.to_bytes(8)) for value in values], dtype=np.uint8).reshape(-1, 8)


def points(values: list[int]) -> Hamming:
    return Hamming(packed(values))


def names(count: int) -> list[str]:
    """Ids whose order as text is not the order of their numbers."""
    return [f"p{i}" for i in range(count)]


def apart(one: int, other: int) -> int:
    return (one ^ other).bit_count()


def by_loops_farthest_first(values: list[int], ids: list[str]) -> list[str]:
    hash_of = dict(zip(ids, values, strict=True))
    picked = [min(ids, key=lambda i: (sum(apart(hash_of[i], h) for h in values), i))]
    while len(picked) < len(ids):
        left = [i for i in ids if i not in picked]
        picked.append(min(left, key=lambda i: (-min(apart(hash_of[i], hash_of[p]) for p in picked), i)))
    return picked


def by_loops_facility_location(values: list[int], ids: list[str], count: int) -> list[str]:
    """The plain greedy rule: the largest gain in the sum of similarities to the most similar pick, ties by id."""
    hash_of = dict(zip(ids, values, strict=True))
    picked: list[str] = []
    similar = {(i, c): 64 - apart(hash_of[i], hash_of[c]) for i in ids for c in ids}
    best = dict.fromkeys(ids, -(10**9))  # of nothing taken: any first one is better

    def worth(also: str) -> int:
        return sum(max(best[i], similar[i, also]) for i in ids)

    while len(picked) < min(count, len(ids)):
        left = [i for i in ids if i not in picked]
        picked.append(min(left, key=lambda i: (-worth(i), i)))
        best = {i: max(best[i], similar[i, picked[-1]]) for i in ids}
    return picked


def by_loops_notebook(values: list[int], ids: list[str], keep: int) -> list[str]:
    """The notebook's get_matches and f, loop for loop, its defects mended: descending, ties by ids, never over K."""
    img_hash = dict(zip(ids, values, strict=True))
    image_names = sorted(ids)
    match_pct = {}
    for i in range(len(image_names)):
        base_name = image_names[i]
        for j in range(i + 1, len(image_names)):
            curr_name = image_names[j]
            match_pct[(base_name, curr_name)] = apart(img_hash[base_name], img_hash[curr_name])
    match_list = sorted(match_pct.items(), key=lambda item: (-item[1], item[0]))
    filenames: list[str] = []
    for (id1, id2), _ in match_list:
        for name in (id1, id2):
            if name not in filenames and len(filenames) < keep:
                filenames.append(name)
        if len(filenames) >= keep:
            break
    return filenames


def test_the_strategies_are_those_of_the_command_line() -> None:
    assert tuple(STRATEGIES) == STRATEGY_NAMES


@given(HASHES)
def test_farthest_first_is_the_rule_by_loops(values: list[int]) -> None:
    ids = names(len(values))
    ranking = farthest_first(Candidates(points(values), ids))
    assert [ids[i] for i in ranking.order] == by_loops_farthest_first(values, ids)


@given(HASHES)
def test_facility_location_is_the_plain_greedy_rule(values: list[int]) -> None:
    ids = names(len(values))
    ranking = facility_location(Candidates(points(values), ids))
    assert [ids[i] for i in ranking.order] == by_loops_facility_location(values, ids, len(ids))


def test_facility_location_goes_on_by_farthest_first() -> None:
    generator = np.random.default_rng(5)
    views = generator.integers(0, 2**63, 30, dtype=np.uint64)
    flips = np.uint64(1) << generator.integers(0, 64, (140, 3), dtype=np.uint64)
    values = [int(v) for v in np.bitwise_xor.reduce(flips, axis=1) ^ views[generator.integers(0, 30, 140)]]
    ids = names(140)
    greedy = by_loops_facility_location(values, ids, 120)
    hash_of = dict(zip(ids, values, strict=True))
    for keep, count in [(1, FACILITY_LOCATION_RANKS), (120, 120)]:
        order = [ids[i] for i in facility_location(Candidates(points(values), ids, keep=keep)).order]
        assert order[:count] == greedy[:count]
        for place in range(count, 140):
            nearest = {i: min(apart(hash_of[i], hash_of[p]) for p in order[:place]) for i in order[place:]}
            best = max(nearest.values())
            assert nearest[order[place]] == best
            if best:
                assert order[place] == min(i for i in nearest if nearest[i] == best)


@given(HASHES, st.sampled_from(sorted(STRATEGIES)), st.data())
def test_photos_that_are_always_kept_come_first(values: list[int], name: str, data: st.DataObject) -> None:
    ids = names(len(values))
    always = np.array(data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))))
    options = {"keep": 3, "label": "label", "seed": 1}
    ranking = rank(name, Candidates(points(values), ids, **options), always)
    order = ranking.order.tolist()
    count = int(always.sum())
    assert sorted(order) == list(range(len(ids)))
    assert set(order[:count]) == set(np.flatnonzero(always).tolist())
    chosen = np.flatnonzero(always)
    alone = STRATEGIES[name](Candidates(points(values).take(chosen), [ids[i] for i in chosen], **options)).order
    assert order[:count] == chosen[alone].tolist()
    plain = STRATEGIES[name](Candidates(points(values), ids, **options)).order.tolist()
    if count == 0:
        assert order == plain
    elif name in ("pairs", "random"):
        assert order[count:] == [i for i in plain if not always[i]]
    elif name == "farthest-first":
        for place in range(count, len(order)):
            nearest = {i: min(apart(values[i], values[p]) for p in order[:place]) for i in order[place:]}
            assert nearest[order[place]] == max(nearest.values())
    else:
        picked = [ids[i] for i in order[:count]]
        hash_of = dict(zip(ids, values, strict=True))
        cost = {i: sum(min(apart(h, hash_of[c]) for c in [*picked, i]) for h in values) for i in ids if i not in picked}
        if cost:
            assert ids[order[count]] == min(cost, key=lambda i: (cost[i], i))


@given(HASHES, st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 7), max_size=5), st.integers(0, 64))
def test_near_any(values: list[int], others: list[int], distance: int) -> None:
    found = near_any(packed(values), packed(others), distance)
    assert found.tolist() == [any(apart(value, other) <= distance for other in others) for value in values]


@given(HASHES.filter(lambda values: len(values) > 1), st.integers(1, 30))
def test_pairs_is_the_notebook_s_rule_by_loops(values: list[int], keep: int) -> None:
    ids = names(len(values))
    ranking = pairs(Candidates(points(values), ids))
    assert [ids[i] for i in ranking.order[:keep]] == by_loops_notebook(values, ids, keep)


@given(HASHES, st.sampled_from(sorted(STRATEGIES)), st.randoms())
def test_every_order_is_whole_and_independent_of_the_input_s(values: list[int], name: str, shuffler: object) -> None:
    ids = names(len(values))
    ranking = STRATEGIES[name](Candidates(points(values), ids, label="label", seed=3))
    assert sorted(ranking.order.tolist()) == list(range(len(ids)))
    assert ranking.order.dtype == np.int64
    assert ranking.insertion_distance.dtype == np.float64
    shuffled = list(range(len(ids)))
    shuffler.shuffle(shuffled)  # type: ignore[attr-defined]
    again = STRATEGIES[name](
        Candidates(points([values[i] for i in shuffled]), [ids[i] for i in shuffled], label="label", seed=3)
    )
    assert [ids[i] for i in ranking.order] == [ids[shuffled[i]] for i in again.order]
    np.testing.assert_array_equal(ranking.insertion_distance, again.insertion_distance)


@given(HASHES, st.sampled_from(sorted(STRATEGIES)))
def test_insertion_distance_is_to_the_nearest_earlier_pick(values: list[int], name: str) -> None:
    ids = names(len(values))
    ranking = STRATEGIES[name](Candidates(points(values), ids, label="label", seed=0))
    order = ranking.order.tolist()
    assert np.isnan(ranking.insertion_distance[0])
    for place in range(1, len(order)):
        earlier = [apart(values[order[place]], values[i]) for i in order[:place]]
        assert ranking.insertion_distance[place] == min(earlier)
    if name == "farthest-first":
        assert (np.diff(ranking.insertion_distance[1:]) <= 0).all()


@settings(max_examples=60)
@given(st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 63), min_size=4, max_size=9), st.integers(2, 4))
def test_farthest_first_is_within_a_factor_2_of_the_best(values: list[int], keep: int) -> None:
    order = farthest_first(Candidates(points(values), names(len(values)))).order.tolist()[:keep]
    distance = [[apart(a, b) for b in values] for a in values]

    def smallest(chosen: tuple[int, ...]) -> int:
        return min(distance[a][b] for a, b in combinations(chosen, 2))

    def radius(chosen: tuple[int, ...]) -> int:
        return max(min(distance[i][c] for c in chosen) for i in range(len(values)))

    subsets = list(combinations(range(len(values)), keep))
    assert 2 * smallest(tuple(order)) >= max(map(smallest, subsets))
    assert radius(tuple(order)) <= 2 * min(map(radius, subsets))


def test_more_equal_vectors_than_are_computed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Placeholder pictures, hundreds of copies of each: as if the distances of all pairs were held."""
    generator = np.random.default_rng(0)
    copies = [np.repeat(generator.standard_normal((1, 16)), 2 * COMPUTED_TOGETHER + 5, axis=0) for _ in range(3)]
    units = as_units(np.concatenate([generator.standard_normal((200, 16)), *copies]))[0]
    expected = farthest_first(Candidates(Cosine(units), names(len(units))))
    monkeypatch.setattr("reducer.selection.distance.HELD_PHOTOS", 0)
    found = farthest_first(Candidates(Cosine(units), names(len(units))))
    assert found.order.tolist() == expected.order.tolist()
    np.testing.assert_array_equal(found.insertion_distance, expected.insertion_distance)


def test_every_smaller_k_is_a_prefix() -> None:
    generator = np.random.default_rng(0)
    hashes = generator.integers(0, 256, (200, 8), dtype=np.uint8)
    full = farthest_first(Candidates(Hamming(hashes), names(200))).order.tolist()
    for keep in (1, 7, 25):
        kept = full[:keep]
        assert by_loops_farthest_first([int.from_bytes(bytes(h)) for h in hashes], names(200))[:keep] == [
            f"p{i}" for i in kept
        ]


@given(HASHES)
def test_medoid_has_the_smallest_sum_of_distances(values: list[int]) -> None:
    sums = [sum(apart(a, b) for b in values) for a in values]
    assert points(values).medoid() == sums.index(min(sums))


@given(HASHES, st.data())
def test_nearest_kept(values: list[int], data: st.DataObject) -> None:
    ids = names(len(values))
    kept = data.draw(st.lists(st.integers(0, len(values) - 1), min_size=1, unique=True))
    positions, distances = nearest_kept(points(values), ids, np.array(kept))
    for i, value in enumerate(values):
        expected = i if i in kept else min(kept, key=lambda k: (apart(value, values[k]), ids[k]))
        assert positions[i] == expected
        assert distances[i] == apart(value, values[expected])


def test_longer_hashes_rank_too() -> None:
    generator = np.random.default_rng(1)
    for size in (1, 9, 32, 128):
        hashes = generator.integers(0, 256, (40, size), dtype=np.uint8)
        values = [int.from_bytes(bytes(h)) for h in hashes]
        order = farthest_first(Candidates(Hamming(hashes), names(40))).order
        assert [f"p{i}" for i in order] == by_loops_farthest_first(values, names(40))
        some = near_any(hashes, hashes[:3], 4 * size).tolist()
        assert some == [min(apart(value, other) for other in values[:3]) <= 4 * size for value in values]
        order = facility_location(Candidates(Hamming(hashes), names(40))).order
        assert [f"p{i}" for i in order] == by_loops_facility_location(values, names(40), 40)


@pytest.mark.parametrize("size", [8, 128])
def test_fifty_thousand_candidates_in_under_200_mib(size: int) -> None:
    hashes = np.random.default_rng(2).integers(0, 256, (50_000, size), dtype=np.uint8)
    # Few distinct hashes end the order early: the time goes down, the memory stays the same.
    hashes[:, 2:] = 0
    hashes[:, 1] &= 7
    ids = names(len(hashes))
    tracemalloc.start()
    ranking = farthest_first(Candidates(Hamming(hashes), ids))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(np.unique(ranking.order)) == 50_000
    assert peak < 200 * 2**20


def test_facility_location_takes_one_matrix_of_memory() -> None:
    n = 4_000
    hashes = np.random.default_rng(3).integers(0, 256, (n, 8), dtype=np.uint8)
    hashes[:, 1:] = 0
    tracemalloc.start()
    ranking = facility_location(Candidates(Hamming(hashes), names(n)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(np.unique(ranking.order)) == n
    assert n * n <= peak < 1.2 * n * n
    # So the most candidates that are chosen from at once stay under 1 GiB; more bits are not held.
    assert FACILITY_LOCATION_CANDIDATES**2 < MATRIX_BYTES < 2**30 / 1.2


def test_draw_is_nested_and_tells_labels_seeds_and_purposes_apart() -> None:
    ids = names(300)
    order = draw_order(CANDIDATES, 0, "a", ids)
    assert sorted(order) == list(range(300))
    backwards = draw_order(CANDIDATES, 0, "a", ids[::-1])
    assert [ids[i] for i in order] == [ids[::-1][i] for i in backwards]
    for other in [(CANDIDATES, 1, "a"), (CANDIDATES, 0, "b"), (RANDOM_ORDER, 0, "a")]:
        assert draw_order(*other, ids) != order
    assert draw_keys(CANDIDATES, 0, "a", ["bc"]) != draw_keys(CANDIDATES, 0, "ab", ["c"])
    assert draw_keys(CANDIDATES, 0, "1:x", ["y"]) != draw_keys(CANDIDATES, 0, "1", [":xy"])
    # The same on every machine and in every version: other people's reduced lists hang on it.
    assert draw_keys(CANDIDATES, 0, "label", ["id"])[0].hex() == "0e24db22e4f238f784280e7252aba926"


def test_random_is_another_draw_than_the_candidates() -> None:
    ids = names(50)
    hashes = np.zeros((50, 8), dtype=np.uint8)
    assert random(Candidates(Hamming(hashes), ids, label="a", seed=0)).order.tolist() == draw_order(
        RANDOM_ORDER, 0, "a", ids
    )
    assert random(Candidates(Hamming(hashes), ids, label="a", seed=0)).order.tolist() != draw_order(
        CANDIDATES, 0, "a", ids
    )
