"""Divide photos into partitions: whole labels, balanced by photos. Pure and deterministic."""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

from reducer.storage.sorting import is_new

#: A partition holds about this many photos: enough to drown the cost of a task, few enough that the work
#: spreads evenly and progress shows.
FEWEST_PHOTOS, MOST_PHOTOS = 500, 2000
#: Photos of a partition at least where a small job is spread over all worker threads.
SMALLEST_PARTITION = 50
PARTITIONS_PER_THREAD = 4
#: A label that is hashed whole has at most this fraction (one in 8) of a thread's photos, and at most this many photos;
#: unless other partitions are as large.
SHARE_OF_A_THREAD = 8
PIECES_FROM = 4 * MOST_PHOTOS
#: The largest partition holds at most this many times the mean, unless one label alone is larger.
IMBALANCE = 1.5


def partition_count(photos: int, threads: int, partition_images: int | None = None) -> int:
    """Return the number of partitions to aim at.

    Parameters
    ----------
    photos : int
        Photos to read.
    threads : int
        Worker threads in all.
    partition_images : int, optional
        Photos per partition that the user asked for; then threads do not matter.
    """
    if partition_images is not None:
        return max(1, round(photos / partition_images))
    spread_thin = min(PARTITIONS_PER_THREAD * threads, photos // SMALLEST_PARTITION)
    return max(1, -(-photos // target_size(photos, threads)), spread_thin)


def piece_size(photos: int, threads: int, partition_images: int | None = None) -> int:
    """Return the photos of a piece of a label at most; parameters as for `partition_count`."""
    if partition_images is not None:
        return max(SMALLEST_PARTITION, partition_images)
    return target_size(photos, threads)


def largest_whole(photos: int, threads: int, partition_images: int | None = None) -> int:
    """Return the photos of a label at most that is hashed whole, not in pieces; parameters as for `partition_count`.

    More than other partitions have: all pieces are hashed before the first label is ranked, and workers wait in
    between. A label that is a small share of a thread's work costs no time when it is hashed whole, since it comes
    first. A task that is lost with its worker is hashed again, so there is a limit.
    """
    size = piece_size(photos, threads, partition_images)
    if partition_images is not None:
        return size
    return max(size, min(PIECES_FROM, photos // (SHARE_OF_A_THREAD * threads)))


def target_size(photos: int, threads: int) -> int:
    """Return the photos per partition of a large job; parameters as for `partition_count`."""
    # 32 partitions per thread keep the end of the job short; more only cost overhead.
    return min(MOST_PHOTOS, max(FEWEST_PHOTOS, photos // (32 * threads)))


def assign(sizes: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Assign whole labels to partitions, the largest label first, always to the emptiest partition.

    This is Graham's LPT rule (1969, "Bounds on multiprocessing timing anomalies"). The number of partitions
    is lowered until the largest holds at most `IMBALANCE` times the mean, or is one label alone.

    Parameters
    ----------
    sizes : ndarray of int64, shape (labels,)
        Photos per label, in the order of the labels' names.
    count : int
        Number of partitions to aim at.

    Returns
    -------
    ndarray of int64, shape (labels,)
        Partition of each label; partitions are numbered by falling number of photos.
    """
    count = max(1, min(count, len(sizes)))
    while True:
        partition, photos, labels = _longest_first(sizes, count)
        largest = int(np.argmax(photos))
        if photos[largest] <= IMBALANCE * photos.mean() or labels[largest] == 1:
            break
        count = min(count - 1, int(count * 0.97))
    number = np.empty(count, dtype=np.int64)
    number[np.argsort(-photos, kind="stable")] = np.arange(count)
    return number[partition]


def _longest_first(
    sizes: NDArray[np.int64], count: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return the partition of each label, and photos and labels per partition."""
    partition = np.empty(len(sizes), dtype=np.int64)
    heap = [(0, number) for number in range(count)]
    for label in np.argsort(-sizes, kind="stable").tolist():
        load, number = heapq.heappop(heap)
        partition[label] = number
        heapq.heappush(heap, (load + int(sizes[label]), number))
    photos = np.bincount(partition, weights=sizes, minlength=count).astype(np.int64)
    return partition, photos, np.bincount(partition, minlength=count)


def pieces(label: NDArray[np.int32], whole: int, most: int) -> NDArray[np.int32]:
    """Divide labels that are too large for a partition into pieces of about equal size.

    Parameters
    ----------
    label : ndarray of int32, shape (photos,)
        Labels by number, equal ones together.
    whole : int
        Labels with no more photos are not divided.
    most : int
        Photos per piece at most.

    Returns
    -------
    ndarray of int32, shape (photos,)
        Piece of each photo; -1 for photos of labels that are not divided.
    """
    piece = np.full(len(label), -1, dtype=np.int32)
    starts = np.flatnonzero(is_new(label))
    sizes = np.diff(starts, append=len(label))
    first = 0
    for start, size in zip(starts[sizes > whole].tolist(), sizes[sizes > whole].tolist(), strict=True):
        count = -(-size // most)
        piece[start : start + size] = first + np.arange(size) * count // size
        first += count
    return piece
