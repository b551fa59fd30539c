from __future__ import annotations

from fractions import Fraction
from itertools import combinations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from reducer.config.settings import near_copy_bits
from reducer.selection.distance import Hamming
from reducer.selection.quality import certificate, counting_bound, quality_summary, spread
from reducer.selection.quality_sums import Certificate, Quality, Spread
from reducer.selection.strategies import Candidates, farthest_first, nearest_kept

BITS = st.sampled_from([4, 8, 9, 16, 25, 64])


def packed(values: list[int], bits: int) -> np.ndarray:
    """As hashes are packed: zero bits behind the last."""
    width = -(-bits // 8)
    content = b"".join((value << -bits % 8).to_bytes(width) for value in values)
    return np.frombuffer(content, np.uint8).reshape(len(values), width)


def names(count: int) -> list[str]:
    return [f"p{i}" for i in range(count)]


def apart(one: int, other: int) -> int:
    return (one ^ other).bit_count()


@given(st.data(), BITS)
def test_spread_is_what_loops_count(data: st.DataObject, bits: int) -> None:
    values = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=12))
    keep = data.draw(st.integers(1, len(values)))
    hashes = packed(values, bits)
    points = Hamming(hashes)
    _, nearest = nearest_kept(points, names(len(values)), np.arange(keep))
    found = spread(points, np.arange(keep), nearest, near_copy_bits(bits))
    distances = [apart(a, b) for a, b in combinations(values[:keep], 2)]
    assert found.labels == 1
    assert found.labels_with_pairs == (keep > 1)
    assert found.pairs == len(distances)
    assert found.distance_sum == sum(distances)
    assert found.near_copies == sum(distance <= near_copy_bits(bits) for distance in distances)
    assert found.smallest_sum == min(distances, default=0)
    to_nearest = [min(apart(value, kept) for kept in values[:keep]) for value in values]
    assert found.candidates == len(values)
    assert found.nearest_sum == sum(to_nearest)
    assert found.radius_sum == found.radius_max == max(to_nearest)


def test_sums_add_and_the_worst_stays() -> None:
    one, other = (
        Quality(Spread(1, 9, 30, n, n, 1, 3, 1, 60, n), Spread(), Certificate(1, Fraction(n, 9), Fraction(n, 9)))
        for n in (4, 6)
    )
    both = one + other
    assert both == other + one == Quality() + one + other
    assert both.selection == Spread(2, 18, 60, 10, 6, 2, 6, 2, 120, 10)
    assert both.certificate == Certificate(2, Fraction(10, 9), Fraction(4, 9))
    told = quality_summary(both, 64)
    assert told["bits"] == 64
    assert told["near_copy_bits"] == 6
    assert told["selection"] == {
        "labels": 2,
        "labels_with_pairs": 2,
        "pairs": 6,
        "near_copy_pairs": 2,
        "mean_pair_distance": 20.0,
        "mean_smallest_pair_distance": 5.0,
        "mean_nearest_kept_distance": 3.333,
        "mean_coverage_radius": 5.0,
        "worst_coverage_radius": 6,
    }
    assert told["random"]["mean_pair_distance"] is None
    assert told["certificate"] == {"labels": 2, "mean": 0.555, "worst": 0.444}
    assert quality_summary(Quality(), 64)["certificate"] is None


def test_the_near_copy_threshold_grows_with_the_hash() -> None:
    assert [near_copy_bits(size**2) for size in (2, 4, 8, 16, 32)] == [0, 1, 6, 24, 96]


@settings(max_examples=300)
@given(st.data(), st.sampled_from([4, 6, 9, 16]))
def test_no_choice_beats_the_bounds(data: st.DataObject, bits: int) -> None:
    """Against all subsets: neither the counting bound nor twice what farthest-first reaches is ever beaten."""
    values = data.draw(st.lists(st.integers(0, 2**bits - 1) | st.integers(0, 3), min_size=2, max_size=9))
    keep = data.draw(st.integers(2, min(5, len(values))))
    hashes = packed(values, bits)
    ranking = farthest_first(Candidates(Hamming(hashes), names(len(values))))
    best = max(min(apart(a, b) for a, b in combinations(chosen, 2)) for chosen in combinations(values, keep))
    bound = counting_bound(hashes, bits, keep)
    assert best <= bound
    found = certificate(hashes, bits, ranking.insertion_distance[:keep])
    if keep == len(values):  # there is no choice to certify
        assert found == Certificate()
        return
    kept = [values[i] for i in ranking.order[:keep]]
    smallest = min(apart(a, b) for a, b in combinations(kept, 2))
    assert found.labels == 1
    assert found.share_sum == found.worst
    limit = min(2 * smallest, bound)
    assert found.worst == (Fraction(smallest, limit) if limit else 1)
    assert Fraction(1, 2) <= found.worst <= (Fraction(smallest, best) if best else 1) <= 1


def test_the_counting_bound_of_free_bits() -> None:
    """33 for 64 bits and 25 photos where every bit may be split as one likes (Plotkin)."""
    many = np.random.default_rng(0).integers(0, 256, (500, 8), dtype=np.uint8)
    assert counting_bound(many, 64, 25) == 33
    # One bit alone is ever set, in two photos: they add 2 x 23 of 300 pairs.
    few = np.zeros((500, 8), dtype=np.uint8)
    few[:2, 0] = 128
    assert counting_bound(few, 64, 2) == 1
    assert counting_bound(few, 64, 25) == 0


def test_fewer_than_two_photos_have_no_certificate() -> None:
    hashes = packed([1, 2, 3], 8)
    assert certificate(hashes, 8, np.array([np.nan])) == Certificate()
