"""The numbers behind the report's plots, against loops that cannot be wrong, and against the run's own summary."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jobs import run_on
from ledgers import ledger_of_rows

from reducer.outputs.report import statistics
from reducer.outputs.report.statistics import SHARES, insertion_curve, label_counts, pair_distances
from reducer.run.folder import RunFolder
from reducer.selection.quality import pair_histogram
from reducer.storage.codecs import to_hex

labels_of_photos = st.lists(st.tuples(st.sampled_from(["b", "a", "ä", "10", "9"]), st.booleans()), max_size=40)


@given(labels_of_photos, st.integers(0, 4))
def test_photos_of_each_label_are_counted(photos: list[tuple[str, bool]], largest: int) -> None:
    found = label_counts(ledger_of_rows([{"label": label, "kept": kept} for label, kept in photos]))
    names = sorted({label for label, _ in photos})
    assert found.names == names
    assert found.photos.tolist() == [sum(label == name for label, _ in photos) for name in names]
    assert found.kept.tolist() == [sum(label == name and kept for label, kept in photos) for name in names]
    assert found.empty == [name for name in names if not any(label == name and kept for label, kept in photos)]
    by_size = sorted(names, key=lambda name: (-sum(label == name for label, _ in photos), name))
    assert found.without_largest(largest).names == sorted(by_size[largest:])


def test_the_insertion_curve_is_told_over_labels() -> None:
    rows = []
    for number, distances in enumerate([[None, 30.0, 20.0, 10.0], [None, 25.0], [None, 35.0, 5.0], [None]]):
        rows += [
            {"label": str(number), "rank": rank, "insertion_distance": distance}
            for rank, distance in enumerate(distances)
        ]
    rows += [{"label": "whole", "kept": True}] * 3  # kept whole, not read
    rows += [{"label": "whole"}]  # where that failed: no shard holds it
    rows += [{"label": "0"}] * 2  # failed, or not drawn: never to be kept
    rows = [rows[place] for place in np.random.default_rng(0).permutation(len(rows))]
    curve = insertion_curve(ledger_of_rows(rows))
    assert curve.labels.tolist() == [3, 2, 1]
    assert SHARES[1] == 0.5
    assert curve.distance[:, 0].tolist() == pytest.approx([26, 30, 34])
    assert curve.distance[:, 2].tolist() == [10, 10, 10]
    assert curve.photos.tolist() == [sum(min(photos, k) for photos in (4, 2, 3, 1, 3)) for k in (1, 2, 3)]


@given(st.lists(st.integers(0, 64), min_size=1, max_size=20))
def test_the_quantiles_are_numpys(distances: list[int]) -> None:
    rows = [
        {"label": str(label), "rank": rank, "insertion_distance": distance if rank else None}
        for label, distance in enumerate(distances)
        for rank in (0, 1)
    ]
    assert insertion_curve(ledger_of_rows(rows)).distance[:, 0] == pytest.approx(np.quantile(distances, SHARES))


@pytest.mark.parametrize("rows", [[], [{"label": "a"}], [{"label": "a", "rank": 0}]])
def test_without_a_second_rank_there_is_no_curve(rows: list[dict[str, object]]) -> None:
    curve = insertion_curve(ledger_of_rows(rows))
    assert (len(curve.labels), curve.distance.shape, len(curve.photos)) == (0, (3, 0), 0)


@given(st.sampled_from([9, 64, 100, 1024]), st.integers(0, 12), st.integers(1, 50), st.randoms())
def test_pairs_are_counted_by_distance(bits: int, count: int, at_a_time: int, random: object) -> None:
    values = [random.getrandbits(bits) for _ in range(count)]  # type: ignore[attr-defined]
    packed = b"".join((value << -bits % 8).to_bytes(-(-bits // 8)) for value in values)
    hashes = np.frombuffer(packed, np.uint8).reshape(count, -(-bits // 8))
    expected = np.bincount([(a ^ b).bit_count() for a, b in combinations(values, 2)], minlength=bits + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("reducer.selection.quality.COMPARED_PAIRS", at_a_time)
        assert pair_histogram(hashes, bits).tolist() == expected.tolist()


@pytest.mark.parametrize("options", [{}, {"strategy": "facility-location", "hash_size": 5, "rank_all": True}])
def test_the_pairs_are_those_that_the_quality_was_told_of(
    collection: Path, tmp_path: Path, options: dict[str, object]
) -> None:
    summary = run_on(collection, tmp_path / "run", **options).summary
    quality, bits = summary["quality"], summary["quality"]["bits"]
    table = RunFolder(str(tmp_path / "run")).parts.ledger()
    shuffled = table.take(np.random.default_rng(0).permutation(table.num_rows))
    for ledger in (table, shuffled):
        found = pair_distances(ledger, bits, 0)
        for pairs, told in ((found.kept, quality["selection"]), (found.random, quality["random"])):
            assert len(pairs) == bits + 1
            assert pairs.sum() == told["pairs"] > 0
            assert pairs[: quality["near_copy_bits"] + 1].sum() == told["near_copy_pairs"]
            mean = (pairs * np.arange(bits + 1)).sum() / pairs.sum()
            assert mean == pytest.approx(told["mean_pair_distance"], abs=0.001)


def test_of_a_label_with_very_many_kept_photos_some_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "PHOTOS_COMPARED", 5)
    rows = [
        {"label": "a", "id": str(i), "hash": to_hex(bytes([0, i]), 16), "rank": i, "kept": i < 8} for i in range(12)
    ]
    found = pair_distances(ledger_of_rows(rows), 16, 0)
    for pairs in (found.kept, found.random):
        assert pairs.sum() == 10
