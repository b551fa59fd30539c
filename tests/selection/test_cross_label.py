from __future__ import annotations

from collections import Counter
from itertools import combinations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reducer.config.settings import LARGEST_HASH, SMALLEST_HASH, near_copy_bits
from reducer.selection import cross_label, near_pairs
from reducer.selection.cross_label import CROSS_LABEL_SCHEMA, MOST_PAIRS, cross_label_pairs, cross_label_table
from reducer.storage.codecs import all_from_hex, from_hex, to_hex

BITS = [9, 16, 64, 100, 256]
#: How near, by bits, as it is promised: 2 of 64, in proportion below, not more above.
LIMITS = {4: 0, 9: 0, 16: 0, 25: 0, 36: 1, 49: 1, 64: 2, 81: 2, 100: 2, 256: 2, 1024: 2}
Pair = tuple[int, int, int]


def packed(values: list[int], bits: int) -> np.ndarray:
    size = -(-bits // 8)
    rows = [list((value << -bits % 8).to_bytes(size)) for value in values]
    return np.array(rows, dtype=np.uint8).reshape(-1, size)


def apart(one: int, other: int) -> int:
    return (one ^ other).bit_count()


def is_flat(value: int, bits: int) -> bool:
    return min(value.bit_count(), bits - value.bit_count()) <= near_copy_bits(bits)


def near(values: list[int], labels: list[int], bits: int) -> list[Pair]:
    """All pairs there are, (distance, first, second), by loops; in the order in which they are to be taken."""
    found = []
    good = [i for i, value in enumerate(values) if not is_flat(value, bits)]
    for i, j in combinations(good, 2):
        distance = apart(values[i], values[j])
        if labels[i] != labels[j] and distance <= LIMITS[bits]:
            one, other = sorted((i, j), key=lambda k: (values[k], k))
            found.append((distance, values[one], values[other], one, other))
    return [(distance, *sorted((one, other))) for distance, _, _, one, other in sorted(found)]


def greedy(pairs: list[Pair], most: int) -> list[Pair]:
    used: Counter[int] = Counter()
    taken = []
    for distance, i, j in pairs:
        if used[i] < most and used[j] < most:
            used.update((i, j))
            taken.append((distance, i, j))
    return sorted(taken)


def pairs_of(values: list[int], labels: list[int], bits: int, most: int = MOST_PAIRS) -> list[Pair]:
    first, second, distance = cross_label_pairs(packed(values, bits), np.array(labels, np.int64), bits, most=most)
    assert first.dtype == second.dtype == distance.dtype == np.int64
    return list(zip(distance.tolist(), first.tolist(), second.tolist(), strict=True))


def around(bits: int, count: int) -> list[int]:
    """A few hashes that are not flat, the same every time."""
    generator = np.random.default_rng(bits)
    return [int.from_bytes(np.packbits(generator.integers(0, 2, bits))) >> -bits % 8 for _ in range(count)]


@st.composite
def photos(draw: st.DrawFn, bits: int, most_photos: int) -> tuple[list[int], list[int]]:
    """Hashes near a few others, plain and flat ones, and their labels in order."""
    flips = st.sets(st.integers(0, bits - 1), max_size=3).map(lambda places: sum(1 << place for place in places))
    bases = st.sampled_from([*around(bits, 3), 0, (1 << bits) - 1])
    value = st.builds(lambda base, flip: base ^ flip, bases, flips) | st.integers(0, (1 << bits) - 1)
    rows = sorted(draw(st.lists(st.tuples(st.integers(0, 4), value), max_size=most_photos)), key=lambda row: row[0])
    return [row[1] for row in rows], [row[0] for row in rows]


@pytest.mark.parametrize("bits", BITS)
@given(data=st.data())
@settings(max_examples=60)
def test_all_pairs_are_found(bits: int, data: st.DataObject) -> None:
    values, labels = data.draw(photos(bits, MOST_PAIRS + 1))  # so few that none can be in too many
    assert pairs_of(values, labels, bits) == sorted(near(values, labels, bits))


@pytest.mark.parametrize("bits", sorted(LIMITS))
def test_how_near_depends_on_the_bits(bits: int) -> None:
    generator = np.random.default_rng(0)
    base = (1 << bits // 2) - 1  # half of them ones: not flat
    values = [base, *(base ^ sum(1 << int(p) for p in generator.permutation(bits)[:n]) for n in (0, 1, 2, 3))]
    assert pairs_of(values, list(range(5)), bits) == sorted(near(values, list(range(5)), bits))
    assert max(distance for distance, one, _ in pairs_of(values, list(range(5)), bits) if one == 0) == LIMITS[bits]


@pytest.mark.parametrize("bits", [16, 64, 256])
@given(data=st.data(), most=st.integers(1, 4))
@settings(max_examples=60)
def test_under_the_cap_pairs_are_taken_in_order(bits: int, data: st.DataObject, most: int) -> None:
    values, labels = data.draw(photos(bits, 40))
    assert pairs_of(values, labels, bits, most) == greedy(near(values, labels, bits), most)


def crowd(bits: int, count: int, labels: int, strong: int) -> tuple[list[int], list[int]]:
    """Hashes that differ in a few strong bits, as many by one more as not; some of them equal."""
    generator = np.random.default_rng(count)
    base = around(bits, 1)[0]
    places = generator.permutation(bits)
    values = []
    for _ in range(count):
        value = base
        for place in places[:strong][generator.random(strong) < 0.5]:
            value ^= 1 << int(place)
        if generator.random() < 0.5:
            value ^= 1 << int(generator.choice(places[strong:]))
        values.append(value)
    return values, sorted(generator.integers(0, labels, count).tolist())


@pytest.mark.parametrize("bits", [49, 64, 256])
@pytest.mark.parametrize("most", [MOST_PAIRS, 3, 255])
def test_a_crowd_is_divided_again_and_again(bits: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values, labels = crowd(bits, 600, 50, 6)
    expected = greedy(near(values, labels, bits), most)
    assert pairs_of(values, labels, bits, most) == expected
    # Buckets in buckets; few pairs compared at a time; few tried at a time; bits dealt by a share of the hashes.
    monkeypatch.setattr(near_pairs, "DIRECT_PAIRS", 20)
    monkeypatch.setattr(near_pairs, "COMPARED_PAIRS", 50)
    monkeypatch.setattr(cross_label, "EDGES", 3)
    monkeypatch.setattr(near_pairs, "SAMPLED_HASHES", 100)
    assert pairs_of(values, labels, bits, most) == expected


def test_keys_that_are_equal_by_chance_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values, labels = crowd(256, 300, 20, 6)
    monkeypatch.setattr(near_pairs, "_key", lambda words, mask: (words[0] & mask[0]) % np.uint64(3))
    assert pairs_of(values, labels, 256) == greedy(near(values, labels, 256), MOST_PAIRS)


@pytest.mark.parametrize("held", [1, 100, 2**22])
def test_none_is_in_too_many_pairs_and_none_can_be_added(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values, labels = crowd(64, 1200, 40, 7)
    monkeypatch.setattr(cross_label, "HELD_PAIRS", held)
    taken = pairs_of(values, labels, 64, 5)
    assert len(set(taken)) == len(taken)
    possible = near(values, labels, 64)
    assert set(taken) <= set(possible)
    used: Counter[int] = Counter()
    for limit in range(3):  # the nearer ones come first: they are as many as can be even without the others
        used.update(i for distance, *both in taken for i in both if distance == limit)
        assert max(used.values()) <= 5
        left = {pair for pair in possible if pair[0] <= limit} - set(taken)
        assert all(used[i] == 5 or used[j] == 5 for _, i, j in left)
    assert {distance for distance, _, _ in taken} == {0, 1, 2}


def test_flat_hashes_are_left_out() -> None:
    for ones, taken in [(0, 0), (6, 0), (7, 1), (57, 1), (58, 0), (64, 0)]:
        assert len(pairs_of([(1 << ones) - 1] * 2, [0, 1], 64)) == taken
    for ones, taken in [(0, 0), (1, 1), (8, 1), (9, 0)]:
        assert len(pairs_of([(1 << ones) - 1] * 2, [0, 1], 9)) == taken


def test_photos_of_one_label_are_no_pair() -> None:
    one, other = around(64, 2)
    assert pairs_of([one] * 10 + [one ^ 1] * 10, [3] * 20, 64) == []
    assert pairs_of([one, one, one ^ 1, one, other], [0, 0, 0, 1, 1], 64) == [(0, 0, 3), (0, 1, 3), (1, 2, 3)]


def test_without_photos_there_is_no_pair() -> None:
    for values in ([], [0, 0], around(64, 1)):
        assert pairs_of(values, list(range(len(values))), 64) == []


def test_thousands_of_photos_of_one_hash() -> None:
    """Half of them of one label, the others one a label. By loops over all pairs it would not end."""
    base = around(64, 1)[0]
    count = 50_000
    hashes = np.repeat(packed([base], 64), count, axis=0)
    labels = np.maximum(np.arange(count) - count // 2, 0)
    first, second, _ = cross_label_pairs(hashes, labels, 64)
    used = np.bincount(np.concatenate([first, second]), minlength=count)
    assert (used == MOST_PAIRS).sum() >= count - 2 * MOST_PAIRS  # a few at the end find none that can be in more
    assert used.max() == MOST_PAIRS
    assert (labels[first] != labels[second]).all()


def test_thousands_of_photos_of_hashes_near_each_other() -> None:
    """All but a hundred of one label."""
    base = around(64, 1)[0]
    count = 50_000
    star = packed([base] + [base ^ 1 << place for place in range(64)], 64)
    hashes = np.tile(star, (count // 65 + 1, 1))[:count]
    labels = np.minimum(np.arange(count) // (count - 100), 1)
    first, second, distance = cross_label_pairs(hashes, labels, 64)
    used = np.bincount(np.concatenate([first, second]), minlength=count)
    assert (used[-100:] == MOST_PAIRS).all()  # all that the small label can have
    assert len(first) == 100 * MOST_PAIRS
    assert (np.diff(distance) >= 0).all()


#: Not in the order of their numbers, nor of UTF-16.
LABELS = ["10", "9", "", "a b", "\uffee", "\U0001f3db", "É"]


def ledger(rows: list[tuple[str, str, str, str | None]]) -> pa.Table:
    columns = list(zip(*rows, strict=True)) if rows else [()] * 4
    names = ("id", "label", "path", "hash")
    return pa.table({name: pa.array(column, pa.string()) for name, column in zip(names, columns, strict=True)})


def rows_of(values: list[int], labels: list[int], bits: int) -> list[tuple[str, str, str, str | None]]:
    texts = [to_hex(row.tobytes(), bits) for row in packed(values, bits)]
    texts_by_label = zip(texts, labels, strict=True)
    return [(f"p{i}", LABELS[label], f"/in/p{i}.jpg", text) for i, (text, label) in enumerate(texts_by_label)]


def by_loops(rows: list[tuple[str, str, str, str | None]], bits: int) -> list[tuple[str | float, ...]]:
    hashed = sorted((label, id_, path, text) for id_, label, path, text in rows if text is not None)
    values = [int(text, 16) for *_, text in hashed]
    found = []
    for distance, i, j in greedy(near(values, [LABELS.index(row[0]) for row in hashed], bits), MOST_PAIRS):
        sides = [(id_, label, path, text) for label, id_, path, text in (hashed[i], hashed[j])]
        found.append((*sides[0], *sides[1], float(distance)))
    return sorted(found, key=lambda row: (row[8], row[1], row[0], row[5], row[4]))


@pytest.mark.parametrize("bits", BITS)
@given(data=st.data())
@settings(max_examples=30)
def test_the_table_does_not_depend_on_the_order_of_the_ledger(bits: int, data: st.DataObject) -> None:
    values, labels = data.draw(photos(bits, 40))
    rows = rows_of(values, labels, bits)
    rows += [("unread", "10", "/in/unread.jpg", None)]
    expected = by_loops(rows, bits)
    shuffled = data.draw(st.permutations(rows))
    cut = data.draw(st.integers(0, len(rows)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_label, "GATHERED_ROWS", 7)
        patch.setattr("reducer.storage.codecs.PARSED_ROWS", 7)
        table = cross_label_table(pa.concat_tables([ledger(shuffled[:cut]), ledger(shuffled[cut:])]), bits)
    assert table.schema.equals(CROSS_LABEL_SCHEMA, check_metadata=True)
    assert [tuple(row.values()) for row in table.to_pylist()] == expected


def test_the_table_of_a_file_under_two_labels() -> None:
    text = to_hex(packed(around(64, 1), 64)[0].tobytes(), 64)
    row = ("p1", "9", "/in/p1.jpg", text)
    table = cross_label_table(ledger([row, ("p1", "10", "/in/p1.jpg", text)]), 64)
    assert [tuple(found.values()) for found in table.to_pylist()] == [("p1", "10", "/in/p1.jpg", text, *row, 0.0)]


@pytest.mark.parametrize("rows", [[], [("p1", "9", "/in/p1.jpg", None)]])
def test_the_table_of_no_hashes(rows: list[tuple[str, str, str, str | None]]) -> None:
    table = cross_label_table(ledger(rows), 64)
    assert table.num_rows == 0
    assert table.schema.equals(CROSS_LABEL_SCHEMA, check_metadata=True)


def test_columns_say_what_they_hold() -> None:
    assert all(field.metadata[b"description"] for field in CROSS_LABEL_SCHEMA)
    assert CROSS_LABEL_SCHEMA.field("distance").metadata[b"unit"] == b"bits"


@pytest.mark.parametrize("size", range(SMALLEST_HASH, LARGEST_HASH + 1))
def test_hashes_are_parsed_as_one_by_one(size: int) -> None:
    bits = size * size
    values = [*around(bits, 20), 0, (1 << bits) - 1]
    texts = [to_hex(row.tobytes(), bits) for row in packed(values, bits)]
    texts += [text.upper() for text in texts]
    parsed = all_from_hex(pa.chunked_array([texts[:5], texts[5:]]), bits)
    assert [row.tobytes() for row in parsed] == [from_hex(text, bits) for text in texts]


@pytest.mark.parametrize(
    ("text", "bits"),
    [("0" * 15, 64), ("0" * 17, 64), ("0" * 15 + "g", 64), ("0" * 14 + "é", 64), ("0" * 15 + " ", 64), ("200", 9)],
)
def test_what_is_no_hash_is_refused(text: str, bits: int) -> None:
    with pytest.raises(ValueError, match="is no hash"):
        from_hex(text, bits)
    with pytest.raises(ValueError, match="not all hashes"):
        cross_label_table(ledger([("p1", "9", "/in/p1.jpg", text)]), bits)
