from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reducer.run.plan.partitions import IMBALANCE, assign, largest_whole, partition_count, piece_size, pieces
from reducer.run.tasks.tasks import Division


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=300), st.integers(1, 400))
def test_partitions_are_balanced_whole_and_largest_first(sizes: list[int], count: int) -> None:
    partition = assign(np.array(sizes), count)
    photos = np.bincount(partition, weights=sizes)
    assert len(partition) == len(sizes)
    assert photos.min() > 0
    assert len(photos) <= count
    assert (np.diff(photos) <= 0).all()
    labels_in_largest = np.count_nonzero(partition == np.argmax(photos))
    assert photos.max() <= IMBALANCE * photos.mean() or labels_in_largest == 1


def test_the_same_labels_give_the_same_partitions() -> None:
    sizes = np.array([5, 5, 5, 5, 9, 1, 1])
    assert assign(sizes, 3).tolist() == assign(sizes, 3).tolist() == [1, 2, 1, 2, 0, 0, 0]


@pytest.mark.parametrize(
    ("photos", "threads", "asked", "expected"),
    [
        (1_000_000, 2, None, 500),  # 2,000 a partition
        (30_000, 2, None, 60),  # 500 a partition
        (100_000, 2, None, 65),  # in between: 32 a thread
        (2_000, 2, None, 8),  # 4 a thread
        (2_000, 64, None, 40),  # not so many that partitions are tiny
        (10, 2, None, 1),
        (30_000, 2, 1_000, 30),
        (30_000, 64, 20_000, 2),
        (10, 2, 1_000, 1),
    ],
)
def test_partition_count(photos: int, threads: int, asked: int | None, expected: int) -> None:
    assert partition_count(photos, threads, asked) == expected


def test_enough_photos_give_every_thread_four_partitions_of_some_size() -> None:
    for threads in (1, 2, 4, 32):
        for photos in (4 * 50 * threads, 2_000 * threads, 100_000, 5_000_000):
            count = partition_count(photos, threads)
            assert count >= min(4 * threads, photos // 50)
            assert photos / count <= 2_000


@pytest.mark.parametrize(
    ("photos", "threads", "asked", "whole", "piece"),
    [
        (1_000_000, 2, None, 8000, 2000),  # an eighth of a thread's photos would be more
        (30_000, 2, None, 1875, 500),
        (30_000, 64, None, 500, 500),  # as large as any partition
        (1_000_000, 64, None, 1953, 500),
        (10_000_000, 256, None, 4882, 1220),
        (30_000, 2, 60, 60, 60),
        (30_000, 2, 5, 50, 50),
    ],
)
def test_a_label_is_divided_where_the_others_would_wait_for_it(
    photos: int, threads: int, asked: int | None, whole: int, piece: int
) -> None:
    assert largest_whole(photos, threads, asked) == whole
    assert piece_size(photos, threads, asked) == piece


def test_pieces_are_about_equal() -> None:
    label = np.repeat(np.arange(4), [100, 7, 101, 250])
    found = pieces(label, 100, 60)
    assert set(found[:107].tolist()) == {-1}
    assert np.bincount(found[107:]).tolist() == [51, 50, 50, 50, 50, 50, 50]


def test_labels_that_are_too_large_are_divided_evenly() -> None:
    label = np.repeat(np.array([3, 4, 7, 9], np.int32), [2, 5, 3, 7])
    assert pieces(label, 3, 3).tolist() == [-1] * 2 + [0, 0, 0, 1, 1] + [-1] * 3 + [2, 2, 2, 3, 3, 4, 4]
    assert pieces(label[:0], 3, 3).tolist() == []


def test_a_division_knows_its_rows_and_holds_those_of_others() -> None:
    rows = pa.table({"row": pa.chunked_array([range(4), range(4, 9)])})
    number = np.array([1, 0, -1, 1, 0, 2, -1, 2, 1], np.int32)
    division = Division.by(number, rows)
    assert {n: own["row"].to_pylist() for n, own in division.items()} == {0: [1, 4], 1: [0, 3, 8], 2: [5, 7]}
    assert (len(division), division.photos) == (3, 7)
    left = division.without([1]) | {2: pa.table({"row": [9], "other": ["x"]}), 1: pa.table({"row": [0]})}
    assert [(n, own["row"].to_pylist()) for n, own in left.items()] == [(0, [1, 4]), (2, [9]), (1, [0])]
    assert (left.photos, [left.size(n) for n in left]) == (4, [2, 1, 1])
    for most, expected in [(1, [0]), (2, [0, 4]), (3, [0, 3, 6]), (7, list(range(7))), (20, list(range(7)))]:
        in_turn = [1, 4, 0, 3, 8, 5, 7]
        assert [row["row"].to_pylist() for row in division.few(most)] == [[in_turn[place]] for place in expected]
    nothing = Division.by(number[:0], rows.slice(0, 0))
    assert (dict(nothing), nothing.photos, nothing.few(3)) == ({}, 0, [])
