from __future__ import annotations

import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reducer.storage.codecs import (
    PROBLEMS,
    VectorSpool,
    as_lists,
    as_units,
    from_lists,
    packed,
    units_of,
    vectors_table,
)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_vectors_become_unit_vectors_in_their_own_direction(kind: type) -> None:
    generator = np.random.default_rng(0)
    vectors = (generator.normal(size=(5000, 48)) * generator.uniform(0.1, 100, (5000, 1))).astype(kind)
    units, problem = as_units(vectors)
    assert units.dtype == np.float16
    assert not problem.any()
    wide, given = units.astype(np.float64), vectors.astype(np.float64)
    assert np.abs(np.linalg.norm(wide, axis=1) - 1).max() < 2**-10
    cosine = (wide * given).sum(axis=1) / np.linalg.norm(wide, axis=1) / np.linalg.norm(given, axis=1)
    assert cosine.min() > 1 - 1e-6


def test_what_was_kept_can_be_given_again() -> None:
    units = as_units(np.random.default_rng(1).normal(size=(3000, 200)).astype(np.float32))[0]
    again, problem = as_units(units)
    assert again.tobytes() == units.tobytes()
    assert not problem.any()
    # The same numbers of another kind, and other vectors of float16, are scaled.
    assert np.abs(np.linalg.norm(as_units(units * np.float16(3))[0].astype(float), axis=1) - 1).max() < 2**-10


def test_vectors_without_a_direction_are_told_apart() -> None:
    vectors = np.array(
        [[1, 0], [0, 0], [np.nan, 1], [np.inf, 1], [-np.inf, np.inf], [3e38, 3e38], [1e-40, 0]], np.float32
    )
    units, problem = as_units(vectors)
    assert [PROBLEMS[p] for p in problem.tolist()] == [
        "",
        "its vector is all zeros",
        *["its vector holds numbers that are not finite"] * 3,
        "",
        "",
    ]
    np.testing.assert_allclose(units[[0, 5, 6]].astype(float), [[1, 0], [0.5**0.5, 0.5**0.5], [1, 0]], atol=1e-3)
    assert not units[1:5].any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        units, problem = as_units(np.array([[3e200, -4e200], [3e-310, 4e-310], [0, 0], [np.inf, 1e300]]))
    np.testing.assert_allclose(units[:2].astype(float), [[0.6, -0.8], [0.6, 0.8]], atol=1e-3)
    assert problem.tolist() == [0, 0, 2, 1]


def test_lists_and_bytes_are_the_same_vectors(tmp_path: object) -> None:
    units = as_units(np.random.default_rng(2).normal(size=(7, 5)))[0]
    column = pa.chunked_array(
        [packed(units[:3]), pa.nulls(2, pa.binary()), packed(units[3:]), pa.nulls(1, pa.binary())]
    )
    rows = pa.table({"id": list("abcdefghij"), "label": ["x"] * 10})
    table = vectors_table(rows, column)
    assert table is not None
    assert table.schema.field("vector").type == pa.list_(pa.float16(), 5)
    path = f"{tmp_path}/vectors.parquet"
    pq.write_table(table, path)
    assert from_lists(pq.read_table(path)["vector"]).to_pylist() == column.to_pylist()
    assert from_lists(pq.read_table(path).slice(2, 5)["vector"]).to_pylist() == column.to_pylist()[2:7]
    assert vectors_table(rows, pa.nulls(10, pa.binary())) is None
    assert as_lists(pa.nulls(2, pa.binary()), 4).to_pylist() == [[0.0] * 4] * 2
    assert units_of(packed(units)).tobytes() == units.tobytes()


def test_vectors_kept_aside_come_back_by_their_places() -> None:
    aside = VectorSpool()
    units = as_units(np.random.default_rng(3).normal(size=(6, 4)))[0]
    first = aside.put(pa.chunked_array([packed(units[:2]), pa.nulls(1, pa.binary())]))
    second = aside.put(packed(units[2:]))
    assert first.to_pylist() == [0, 1, None]
    assert second.to_pylist() == [2, 3, 4, 5]
    assert aside.put(pa.nulls(3, pa.binary())).null_count == 3
    wanted = [5, None, 0, 5]
    found = aside.packed(pa.chunked_array([pa.array(wanted[:2]), pa.array(wanted[2:])])).to_pylist()
    assert found == [None if place is None else units[place].tobytes() for place in wanted]
    assert aside.packed(pa.nulls(2, pa.int64())).to_pylist() == [None, None]
