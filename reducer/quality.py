"""What a selection is worth: how far apart its photos are, and how many near copies it still holds."""

from __future__ import annotations

import numpy as np

from reducer.ranking import Hashes, as_words, distances_to
from reducer.types import Spread

#: Photos of one label at most this many bits apart (of 64) count as near copies: resizing, recompression
#: and brightness stay within it, crops and flips do not.
NEAR_COPY_BITS = 6


def spread(hashes: Hashes) -> Spread:
    """How different the chosen photos of one label are.

    Parameters
    ----------
    hashes : ndarray of uint8, shape (k, hash bytes)
        Packed hashes of the chosen photos.

    Returns
    -------
    Spread
        All zero for fewer than two photos.
    """
    count = len(hashes)
    if count < 2:
        return Spread()
    words = as_words(hashes)
    # Counts of pairs by distance: enough for all the figures, and small whatever k is.
    histogram = np.zeros(8 * hashes.shape[1] + 1, dtype=np.int64)
    for i in range(count - 1):
        histogram += np.bincount(distances_to(words[:, i:], 0)[1:], minlength=len(histogram))
    distances = np.arange(len(histogram))
    return Spread(
        labels=1,
        pairs=int(histogram.sum()),
        near_copies=int(histogram[: NEAR_COPY_BITS + 1].sum()),
        distance_sum=int(histogram @ distances),
        smallest_sum=int(np.flatnonzero(histogram)[0]),
    )
