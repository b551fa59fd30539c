from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vectorcases import VECTORS, apart, units_of

from reducer.selection import distance
from reducer.selection.distance import Cosine, Hamming, Points
from reducer.storage.codecs import as_units


@given(VECTORS)
def test_cosine_distances_are_the_definition(vectors: list[list[int]]) -> None:
    units = units_of(vectors)
    points = Cosine(units)
    expected = [[apart(a, b) for b in units] for a in units]
    assert [points.to(i).tolist() for i in range(len(units))] == expected
    assert points.rows(np.arange(len(units))).tolist() == expected
    sums = [sum(row) for row in expected]
    assert points.medoid() == sums.index(min(sums))
    for i, own in enumerate(vectors):
        assert expected[i][i] == 0
        for j, other in enumerate(vectors):
            if own == other:
                assert expected[i][j] == 0


def test_no_order_no_block_and_no_other_photo_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    """So results are the same to the byte: whole, without the matrix of all pairs, and in blocks of a few vectors."""
    generator = np.random.default_rng(0)
    for dimensions in (2, 31, 512, 1500):
        units = as_units(generator.normal(size=(150, dimensions)).astype(np.float32))[0]
        whole = Cosine(units).rows(np.arange(150))
        backwards = Cosine(units[::-1].copy()).rows(np.arange(150))[::-1, ::-1]
        columns = Cosine(units[:, ::-1].copy()).rows(np.arange(150))
        assert (whole == backwards).all()
        assert (whole == columns).all()
        assert (whole == whole.T).all()
        assert (Cosine(units).take(np.arange(20, 50)).rows(np.arange(30)) == whole[20:50, 20:50]).all()
        with monkeypatch.context() as patch:
            patch.setattr(distance, "HELD_PHOTOS", 10)
            assert (np.stack([Cosine(units).to(i) for i in range(150)]) == whole).all()
            medoid = Cosine(units).medoid()
            patch.setattr(distance, "WIDENED_BYTES", 0)
            patch.setattr(distance, "BLOCK_BYTES", 8 * dimensions * 7)
            assert (Cosine(units).rows(np.arange(150)) == whole).all()
            assert Cosine(units).medoid() == medoid == Cosine(units).take(np.arange(150)).medoid()


@settings(max_examples=50)
@given(st.integers(1, 64), st.integers(0, 2**32))
def test_products_of_unit_vectors_have_no_rounding(dimensions: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    # Numbers of very different sizes, down to float16's smallest.
    vectors = generator.normal(size=(2, dimensions)) * 10.0 ** generator.integers(-8, 2, (2, dimensions))
    (one, other), problems = as_units(vectors)
    if problems.any():
        return
    wide = one.astype(np.float64), other.astype(np.float64)
    exact = sum(int(float(a) * 2**24) * int(float(b) * 2**24) for a, b in zip(*wide, strict=True))
    assert float(wide[0] @ wide[1]) * 2**48 == exact


def test_both_kinds_tell_what_they_count_in() -> None:
    hashes = np.array([[0, 1], [3, 255]], dtype=np.uint8)
    kinds: list[tuple[Points, str, float]] = [
        (Hamming(hashes), "bits", 9.0),
        (Cosine(units_of([[1, 0, 0], [0, 1, 0]])), "cosine", 1.0),
    ]
    for points, unit, expected in kinds:
        assert points.unit == unit
        assert points.to(0)[1] * points.step == expected
        assert points.to(0).max() <= points.farthest
