from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reducer.partition import IMBALANCE, assign, largest_whole, partition_count, piece_size, pieces


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
        (1_000_000, 256, None, 2000, 2000),
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
