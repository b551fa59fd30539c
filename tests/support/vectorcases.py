"""Vectors of small whole numbers, and their distance by its definition."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import strategies as st

from reducer.selection.distance import COSINE_STEPS
from reducer.storage.codecs import as_units

#: Few directions make many ties and exact copies.
VECTORS = st.lists(st.lists(st.integers(-2, 2), min_size=3, max_size=3).filter(any), min_size=1, max_size=16)


def units_of(vectors: list[list[int]]) -> np.ndarray:
    return as_units(np.array(vectors, dtype=np.float32).reshape(len(vectors), -1))[0]


def apart(one: np.ndarray, other: np.ndarray) -> int:
    """The definition, with products that are summed exactly."""

    def product(a: np.ndarray, b: np.ndarray) -> float:
        return math.fsum(float(x) * float(y) for x, y in zip(a, b, strict=True))

    cosine = product(one, other) / math.sqrt(product(one, one) * product(other, other))
    return min(2 * COSINE_STEPS, max(0, round((1 - cosine) * COSINE_STEPS)))
