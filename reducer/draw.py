"""Every random choice: a keyed digest of (seed, label, id), never the state of a generator.

So a choice depends neither on the order of the manifest nor on partitions, workers or time, and a larger
draw contains the smaller one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

CANDIDATES = b"candidates"
RANDOM_ORDER = b"random-order"
TRIAL_LABELS = b"trial-labels"
TIME_SAMPLE = b"time-sample"
REPORT_LABELS = b"report-labels"


def draw_keys(purpose: bytes, seed: int, label: str, ids: Iterable[str]) -> list[bytes]:
    """BLAKE2b (RFC 7693) digests to sort photos by.

    Parameters
    ----------
    purpose : bytes
        What the draw is for, at most 16 bytes: two purposes draw independently (BLAKE2b's ``person``).
    seed : int
        The job's seed.
    label : str
        The label whose photos are drawn.
    ids : iterable of str
        Ids of the photos.

    Returns
    -------
    list of bytes
        One digest of 16 bytes an id.
    """
    name = label.encode()
    # The label's length goes in too, so that ("a", "bc") and ("ab", "c") differ.
    start = hashlib.blake2b(b"%d:%d:%b:" % (seed, len(name), name), digest_size=16, person=purpose)
    keys = []
    for photo in ids:
        digest = start.copy()
        digest.update(photo.encode())
        keys.append(digest.digest())
    return keys


def draw_order(purpose: bytes, seed: int, label: str, ids: Sequence[str]) -> list[int]:
    """Positions of ``ids`` in drawing order: by `draw_keys`, equal keys by id."""
    keys = draw_keys(purpose, seed, label, ids)
    return sorted(range(len(ids)), key=lambda i: (keys[i], ids[i]))
