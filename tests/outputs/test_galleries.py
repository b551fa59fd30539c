"""Which labels and photos a report shows."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from ledgers import ledger_of_rows

from reducer import InputError
from reducer.outputs.report import galleries
from reducer.outputs.report.galleries import (
    MOST_DROPPED,
    MOST_FAILED,
    Photo,
    cross_label_shown,
    extreme_pairs,
    gallery,
    labels_to_show,
)
from reducer.run.folder import RunFolder
from reducer.storage.codecs import to_hex
from reducer.storage.location import ByteRange
from reducer.storage.schemas import CROSS_LABEL_SCHEMA
from reducer.storage.tables import in_nanoseconds


def rows_of(label: str, kept: int, dropped: int, failed: int = 0, near: int = 0) -> list[dict[str, object]]:
    """Rows of a label; of the dropped photos so many are near copies, and all are dropped for the first two kept."""
    rows: list[dict[str, object]] = []
    for i in range(kept + dropped):
        distance = 0.0 if i < kept else 3.0 if i < kept + near else 20.0 + i
        rows.append(
            {
                "label": label,
                "id": f"{label}{i:03}",
                "path": f"/in/{label}{i:03}.jpg",
                "hash": to_hex(int(i * 37).to_bytes(8), 64),
                "rank": i,
                "insertion_distance": None if i == 0 else 64.0 - i,
                "nearest_kept": f"{label}{i if i < kept else i % min(2, kept):03}",
                "nearest_kept_distance": distance,
                "kept": i < kept,
                "reason": "kept" if i < kept else "beyond-keep",
            }
        )
    rows += [
        {
            "label": label,
            "id": f"{label}x{i:03}",
            "path": f"/in/{label}x{i:03}.jpg",
            "kept": False,
            "reason": "failed",
            "error": "broken: as it is",
        }
        for i in range(failed)
    ]
    return rows


def shown(label: str, pictures: int, *numbers: int) -> galleries.Gallery:
    return gallery(in_nanoseconds(ledger_of_rows(rows_of(label, *numbers))), ["asked for"], pictures, 64)


def test_labels_are_shown_that_tell_something() -> None:
    rows = [
        *rows_of("small", 2, 0),
        *rows_of("copies", 2, 8, 0, 5),
        *rows_of("large", 2, 20),
        *rows_of("bad", 2, 1, 9),
        *[{"label": "whole", "kept": True, "reason": "kept-small-label"}] * 2,
    ]
    rows = [rows[place] for place in np.random.default_rng(0).permutation(len(rows))]
    expected = {
        "large": ["the largest label"],
        "small": ["the smallest label that was ranked"],
        "copies": ["most near copies removed"],
        "bad": ["most failures"],
    }
    assert labels_to_show(ledger_of_rows(rows), 6) == expected
    assert list(labels_to_show(ledger_of_rows(rows), 6)) == list(expected)
    asked = labels_to_show(ledger_of_rows(rows), 6, ["whole", "small"])
    assert list(asked) == ["whole", "small", "large", "copies", "bad"]
    assert asked["small"] == ["asked for", "the smallest label that was ranked"]
    with pytest.raises(InputError, match=r"--labels: no photo of the run has the label 'smal' \(did you mean 'small'"):
        labels_to_show(ledger_of_rows(rows), 6, ["smal"])


def test_of_equal_labels_the_first_is_shown() -> None:
    rows = [row for label in ("b", "c", "a") for row in rows_of(label, 2, 3)]
    assert labels_to_show(ledger_of_rows(rows), 6) == {"a": ["the largest label", "the smallest label that was ranked"]}


def test_a_label_that_was_kept_whole_is_shown_if_there_is_no_other() -> None:
    rows = [{"label": "whole", "id": "b", "path": "b.jpg", "kept": True, "reason": "kept-small-label"}]
    assert labels_to_show(ledger_of_rows(rows), 6) == {"whole": ["the largest label"]}
    found = gallery(in_nanoseconds(ledger_of_rows(rows)), [], 10, 64)
    assert (found.ranked, found.kept, found.pairs, found.closest_kept) == (0, 1, [], None)
    assert [one.photo.row["id"] for one in found.shown] == ["b"]


@pytest.mark.parametrize("pictures", [0, 1, 2, 3, 4, 5, 8, 20, 40, 200])
@pytest.mark.parametrize("numbers", [(1, 0), (3, 40), (30, 5), (2, 0, 20), (0, 0, 3)])
def test_a_gallery_keeps_to_its_pictures(pictures: int, numbers: tuple[int, ...]) -> None:
    found = shown("a", pictures, *numbers)
    drawn = list(found.drawn())
    assert len(drawn) <= pictures
    kept, dropped = numbers[:2]
    ids = [one.photo.row["id"] for one in found.shown]
    assert ids == [f"a{i:03}" for i in range(len(ids))]  # by rank, the first of them
    if pictures >= 5 and kept:
        assert ids
    if pictures == 200:
        assert len(ids) == kept
        assert [len(one.dropped) + one.more for one in found.shown[:2]] == [(dropped + 1) // 2, dropped // 2][:kept]
        assert all(len(one.dropped) == min(MOST_DROPPED, len(one.dropped) + one.more) for one in found.shown)
    for one in found.shown:
        distances = [photo.row["nearest_kept_distance"] for photo in one.dropped]
        assert distances == sorted(distances)
        assert all(photo.row["nearest_kept"] == one.photo.row["id"] for photo in one.dropped)
    assert len(found.failed) == min(MOST_FAILED, *numbers[2:3] or [0])
    assert not any(photo.is_drawn for photo in found.failed)


def test_under_each_kept_photo_one_is_shown_before_a_second() -> None:
    found = shown("a", 4 + 2 + 5, 2, 40)
    assert [len(one.dropped) for one in found.shown] == [3, 2]


@pytest.mark.parametrize("bits", [9, 64, 100])
def test_the_closest_and_the_farthest_pair(bits: int) -> None:
    generator = np.random.default_rng(bits)
    values = [int(value) for value in generator.integers(0, 2 ** min(bits, 60), 30)]
    rows = [
        {
            "label": "a",
            "id": f"{i:02}",
            "path": "-",
            "hash": to_hex((v << -bits % 8).to_bytes(-(-bits // 8)), bits),
            "rank": 30 - i,
        }
        for i, v in enumerate(values)
    ]
    rows += [{"label": "a", "id": "failed", "path": "-", "error": "broken: -"}]
    shuffled = [rows[place] for place in generator.permutation(len(rows))]
    closest, farthest = extreme_pairs(in_nanoseconds(ledger_of_rows(shuffled)), bits)
    pairs = [((a ^ b).bit_count(), i, j) for (i, a), (j, b) in combinations(enumerate(values), 2)]
    for pair, (distance, i, j) in ((closest, min(pairs)), (farthest, min(pairs, key=lambda p: (-p[0], *p[1:])))):
        assert pair.distance == distance
        assert (pair.first.row["id"], pair.second.row["id"]) == (f"{i:02}", f"{j:02}")
    assert (closest.which, farthest.which) == ("closest", "farthest")


def test_of_very_many_photos_the_first_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(galleries, "MOST_COMPARED", {"hash": 3})
    rows = [
        {"label": "a", "id": f"{i}", "path": "-", "hash": to_hex(bytes([255 >> (7 - i)]), 8), "rank": i}
        for i in range(8)
    ]
    closest, farthest = extreme_pairs(in_nanoseconds(ledger_of_rows(rows)), 8)
    assert (closest.distance, farthest.distance) == (1, 2)


def test_photos_of_shards_are_found_in_them(single: Path, whole: Path) -> None:
    for run, kind in ((single, str), (whole, ByteRange)):
        rows = in_nanoseconds(RunFolder(str(run)).parts.ledger())
        label = rows["label"][0].as_py()
        found = gallery(rows.filter(pc.equal(rows["label"], label)), [], 30, 64)
        drawn: list[Photo] = list(found.drawn())
        assert len(drawn) > 5
        assert {type(photo.ref) for photo in drawn} == {kind}
        for photo in drawn:
            if isinstance(photo.ref, ByteRange):
                content = Path(photo.ref.path).read_bytes()[photo.ref.offset :][: photo.ref.bytes]
                assert content[:2] == b"\xff\xd8"
                assert content[-2:] == b"\xff\xd9"


def test_near_copies_across_labels(single: Path) -> None:
    rows = in_nanoseconds(RunFolder(str(single)).parts.ledger())
    one, other = rows.slice(0, 1).to_pylist()[0], rows.slice(200, 1).to_pylist()[0]
    pairs = pa.Table.from_pylist(
        [
            {name: one[name] for name in ("id", "label", "path", "hash")}
            | {f"other_{name}": other[name] for name in ("id", "label", "path", "hash")}
            | {"distance": 1.0}
        ],
        schema=CROSS_LABEL_SCHEMA,
    )
    (pair,) = cross_label_shown(pairs, rows)
    assert (pair.first.row, pair.second.row, pair.distance) == (one, other, 1.0)
