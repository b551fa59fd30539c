from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reducer import InputError, Job
from reducer.config.settings import Source
from reducer.run.tasks import given_vectors
from reducer.run.tasks.given_vectors import GivenVectors
from reducer.run.tasks.vector_files import find_vectors
from reducer.storage.codecs import VectorSpool, as_units

IDS = [f"{i:04}" for i in range(200)]
VECTORS = np.random.default_rng(0).normal(size=(200, 6)).astype(np.float32)


def lists(vectors: np.ndarray, kind: str) -> pa.Array:
    values = pa.array(vectors.ravel())
    if kind == "fixed":
        return pa.FixedSizeListArray.from_arrays(values, vectors.shape[1])
    offsets = np.arange(len(vectors) + 1) * vectors.shape[1]
    return {"list": pa.ListArray, "large": pa.LargeListArray}[kind].from_arrays(
        pa.array(offsets, "int64" if kind == "large" else "int32"), values
    )


def written(path: Path, vectors: Any = VECTORS, ids: Any = IDS, name: str = "id", **options: Any) -> Path:
    column = vectors if isinstance(vectors, pa.Array) else lists(np.asarray(vectors), "fixed")
    pq.write_table(pa.table({name: ids, "vector": column}), path, **options)
    return path


def job(path: Path | str, **options: Any) -> Job:
    return Job("photos", "run", manifest="train.csv", vectors=str(path), **options)


def all_of(path: Path, partitions: dict[int, list[str]], **options: Any) -> dict[int, list[bytes | str]]:
    """What each partition gets."""
    files = find_vectors(job(path, **options))
    assert files is not None
    given = GivenVectors(files, Source(), {number: pa.table({"id": ids}) for number, ids in partitions.items()})
    given.read()
    found = {}
    for number in partitions:
        vectors, errors = (column.to_pylist() for column in given.columns(number).columns)
        assert [vector is None for vector in vectors] == [error is not None for error in errors]
        found[number] = [error or vector for vector, error in zip(vectors, errors, strict=True)]
    return found


def units(vectors: np.ndarray) -> list[bytes]:
    return [unit.tobytes() for unit in as_units(vectors)[0]]


@pytest.mark.parametrize("kind", ["fixed", "list", "large"])
@pytest.mark.parametrize("numbers", [np.float16, np.float32, np.float64])
def test_lists_of_all_kinds(tmp_path: Path, kind: str, numbers: type) -> None:
    vectors = VECTORS.astype(numbers)
    path = written(tmp_path / "v.parquet", lists(vectors, kind), row_group_size=30)
    assert all_of(path, {0: IDS}) == {0: units(vectors)}


@pytest.mark.parametrize("numbers", [np.float16, np.float32])
def test_a_column_a_dimension(tmp_path: Path, numbers: type) -> None:
    vectors = VECTORS.astype(numbers)
    columns = {f"d{i}": vectors[:, i] for i in range(6)}
    pq.write_table(
        pa.table({"d_text": ["x"] * 200, **columns, "photo": IDS, "rank": range(200)}), tmp_path / "v.parquet"
    )
    assert all_of(tmp_path / "v.parquet", {0: IDS}, id_column="photo") == {0: units(vectors)}
    found = find_vectors(job(tmp_path / "v.parquet", id_column="photo"))
    assert found is not None
    assert found.dimensions == 6
    assert found.columns == tuple(columns)


@pytest.mark.parametrize("ids", [list(range(200)), pa.array(map(str, range(200))).dictionary_encode()])
def test_ids_are_text_whatever_they_are(tmp_path: Path, ids: Any) -> None:
    path = written(tmp_path / "v.parquet", ids=ids)
    assert all_of(path, {0: ["7", "199"]}) == {0: [units(VECTORS)[7], units(VECTORS)[199]]}


def test_any_division_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row groups, batches, partitions, files: nothing of it shows."""
    monkeypatch.setattr(given_vectors, "BATCH_BYTES", 4 * 6 * 7)
    shuffled = np.random.default_rng(1).permutation(200)
    (tmp_path / "files").mkdir()
    for number, own in enumerate(np.array_split(shuffled, 3)):
        written(tmp_path / "files" / f"{number}.parquet", VECTORS[own], [IDS[i] for i in own], row_group_size=11)
    (tmp_path / "files" / "_SUCCESS").touch()
    partitions = {5: IDS[:90], 9: IDS[80:120], 2: IDS[120:121], 3: IDS[150:]}  # some ids in two of them
    expected = {number: [units(VECTORS)[IDS.index(name)] for name in ids] for number, ids in partitions.items()}
    assert all_of(tmp_path / "files", partitions) == expected


def test_what_is_wrong_with_a_vector_is_told_of_its_photo(tmp_path: Path) -> None:
    vectors = VECTORS.tolist()
    vectors[0], vectors[1], vectors[2], vectors[3] = [float("nan")] * 6, [0.0] * 6, [1.0] * 5, None
    ids = [*IDS[:-3], IDS[10], None, IDS[-1]]  # one id twice, another not there
    path = written(tmp_path / "v.parquet", pa.array(vectors, pa.list_(pa.float32())), ids, row_group_size=50)
    found = all_of(path, {0: IDS})[0]
    where = f"no vector: --vectors {path}: it"
    assert found[:4] == [
        f"{where}s vector holds numbers that are not finite",
        f"{where}s vector is all zeros",
        *[f"{where} has no list of 6 numbers for its id"] * 2,
    ]
    assert found[10] == f"{where} has several for its id"
    assert found[-3:-1] == [f"{where} has none for its id"] * 2
    good = [4, 5, 9, 11, 196, 199]
    assert [found[i] for i in good] == [units(VECTORS)[i] for i in good]


def test_one_vector_that_stands_twice_is_one(tmp_path: Path) -> None:
    """As what `reducer embed` writes of a photo under two labels."""
    path = written(tmp_path / "v.parquet", VECTORS[[0, 1, 0]], ["a", "b", "a"])
    assert all_of(path, {0: ["a", "b"]}) == {0: units(VECTORS[:2])}


def test_vectors_that_stand_again_in_another_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same one, with the same fault or none, is one; another one is one too many, wherever it stands."""
    monkeypatch.setattr(given_vectors, "BATCH_BYTES", 4 * 6 * 2)  # two vectors
    zero, other = np.zeros(6, np.float32), -VECTORS[0]
    rows = {"a": [VECTORS[0]] * 3, "b": [VECTORS[1], other, VECTORS[1]], "c": [zero] * 2, "d": [VECTORS[3], zero]}
    rows["e"] = [zero, VECTORS[4]]
    ids, vectors = zip(*((name, own[i]) for i in range(3) for name, own in rows.items() if i < len(own)), strict=True)
    path = written(tmp_path / "v.parquet", np.stack(vectors), list(ids))
    problem = f"no vector: --vectors {path}: it"
    several = f"{problem} has several for its id"
    assert all_of(path, {0: list("abcde"), 1: ["a"]}) == {
        0: [units(VECTORS)[0], several, f"{problem}s vector is all zeros", several, several],
        1: [units(VECTORS)[0]],
    }


def test_a_full_temporary_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: VectorSpool, units: np.ndarray) -> np.ndarray:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = written(tmp_path / "v.parquet")
    monkeypatch.setattr(VectorSpool, "append", full)
    with pytest.raises(InputError, match=r"cannot be kept in the temporary folder \S+: No space left .* TMPDIR"):
        all_of(path, {0: IDS})


def test_columns_that_are_no_dimensions(tmp_path: Path) -> None:
    columns = {f"d{i}": VECTORS[:, i] for i in range(6)}
    pq.write_table(pa.table({"id": IDS, **columns, "landmark_id": np.arange(200.0)}), tmp_path / "v.parquet")
    assert all_of(tmp_path / "v.parquet", {0: IDS}) == {0: units(VECTORS)}
    pq.write_table(pa.table({"id": IDS, **columns, "score": np.arange(200.0)}), tmp_path / "w.parquet")
    with pytest.raises(InputError, match=r"columns of numbers are of several kinds \(double, float\)"):
        find_vectors(job(tmp_path / "w.parquet"))
    pq.write_table(pa.table({"id": IDS, **columns, "score": VECTORS[:, 0]}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match="columns 'score' are not named as the others, so they may be no dimensions"):
        find_vectors(job(tmp_path / "x.parquet"))
    named = dict(zip(["red", "green", "blue", "hue", "line", "dim6"], columns.values(), strict=True))
    pq.write_table(pa.table({"id": IDS, **named}), tmp_path / "y.parquet")
    assert all_of(tmp_path / "y.parquet", {0: IDS}) == {0: units(VECTORS)}


def test_a_vector_of_another_length_is_its_photos_matter(tmp_path: Path) -> None:
    for odd in ([], [1.0, 2.0]):
        path = written(tmp_path / "v.parquet", pa.array([odd, *VECTORS[1:].tolist()], pa.list_(pa.float32())))
        (found,) = all_of(path, {0: IDS}).values()
        assert found == [
            f"no vector: --vectors {path}: it has no list of 6 numbers for its id",
            *units(VECTORS[1:]),
        ]


def test_files_without_rows_are_passed_over(tmp_path: Path) -> None:
    for number, rows in enumerate([slice(0, 0), slice(0, 150), slice(150, 150), slice(150, 200)]):
        values = pa.array(VECTORS[rows].tolist(), pa.list_(pa.float32()))
        written(tmp_path / f"part-{number}.parquet", values, IDS[rows])
    assert all_of(tmp_path, {0: IDS}) == {0: units(VECTORS)}
    for number in (1, 3):
        (tmp_path / f"part-{number}.parquet").unlink()
    with pytest.raises(InputError, match=r"--vectors \S+ holds no vector: it has no rows"):
        find_vectors(job(tmp_path))


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    columns = [pa.array(IDS), pa.array(IDS), pa.array(VECTORS[:, 0]), pa.array(VECTORS[:, 1])]
    for names in (["id", "id", "x", "y"], ["id", "a", "x", "x"]):
        pq.write_table(pa.Table.from_arrays(columns, names), tmp_path / "v.parquet")
        with pytest.raises(InputError, match=f"several columns of one name .'{names[1] if names[1] == 'id' else 'x'}'"):
            find_vectors(job(tmp_path / "v.parquet"))


def test_very_many_columns_are_read_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(given_vectors, "COLUMNS_TOGETHER", 7)
    monkeypatch.setattr(given_vectors, "BATCH_BYTES", 4 * 30 * 13)
    vectors = np.random.default_rng(5).normal(size=(200, 30)).astype(np.float32)
    columns = {f"d{i}": vectors[:, i] for i in range(30)}
    pq.write_table(pa.table({**columns, "id": IDS}), tmp_path / "v.parquet", row_group_size=70)
    assert all_of(tmp_path / "v.parquet", {0: IDS}) == {0: units(vectors)}


def test_a_file_of_one_row_group_takes_little_memory(tmp_path: Path) -> None:
    """100,000 x 256 numbers, 102 MB in one row group: a few batches of them are in memory."""
    count, dimensions = 100_000, 256
    block = np.random.default_rng(0).normal(size=(1000, dimensions)).astype(np.float32)
    schema = pa.schema([("id", pa.string()), ("vector", pa.list_(pa.float32(), dimensions))])
    table = pa.Table.from_arrays(
        [pa.array([f"{i:08}" for i in range(count)]), lists(np.tile(block, (count // 1000, 1)), "fixed")], schema=schema
    )
    pq.write_table(table, tmp_path / "v.parquet", row_group_size=count, use_dictionary=False)
    del table
    files = find_vectors(job(tmp_path / "v.parquet"))
    assert files is not None
    assert len(files.groups) == 1
    wanted = [f"{i:08}" for i in range(0, count, 2)]
    given = GivenVectors(files, Source(), {0: pa.table({"id": wanted[:9]}), 1: pa.table({"id": wanted[9:]})})
    before = pa.total_allocated_bytes()
    pool = pa.default_memory_pool()
    given.read()
    assert pa.total_allocated_bytes() - before < 2**20
    assert (pool.max_memory() or 0) < 2**30
    assert given.columns(1)["given_vector"].null_count == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"id": IDS}, r"has no vectors: expected a column of lists of floating-point numbers, or a column of such a"),
        ({"id": IDS, "x": VECTORS[:, 0]}, r"has no vectors: .*'x \(float\)'"),
        ({"name": IDS, "v": lists(VECTORS, "fixed")}, r"has no column 'id' \(--id-column\); it has 'name', 'v'"),
        (
            {"id": IDS, "v": lists(VECTORS, "fixed"), "w": lists(VECTORS, "list")},
            r"several columns of lists .*'v', 'w'",
        ),
        ({"id": VECTORS[:, 0], "v": lists(VECTORS, "fixed")}, r"column 'id' is float; expected text or whole numbers"),
        ({"id": IDS, "v": pa.nulls(200, pa.list_(pa.float32()))}, r"column 'v' holds no vector"),
    ],
)
def test_a_file_without_what_is_needed_says_what(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    pq.write_table(pa.table(content), tmp_path / "v.parquet")
    with pytest.raises(InputError, match=f"--vectors .*v.parquet:? .*{message}"):
        find_vectors(job(tmp_path / "v.parquet"))


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--vectors .*none\.parquet.*(No such file|not exist|missing)"):
        find_vectors(job(tmp_path / "none.parquet"))
    (tmp_path / "text.parquet").write_text("id,v\n1,2\n")
    with pytest.raises(InputError, match=r"--vectors .*text\.parquet cannot be read as a Parquet file"):
        find_vectors(job(tmp_path / "text.parquet"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"is a folder without \.parquet files"):
        find_vectors(job(tmp_path / "folder"))
    written(tmp_path / "folder" / "a.parquet")
    written(tmp_path / "folder" / "b.parquet", VECTORS[:, :4])
    with pytest.raises(InputError, match=r"b\.parquet has 4 dimensions in vector, the files before it 6"):
        find_vectors(job(tmp_path / "folder"))


def test_the_digest_is_of_what_a_file_holds(tmp_path: Path) -> None:
    def digest(name: str, *arguments: Any) -> str:
        found = find_vectors(job(written(tmp_path / name, *arguments)))
        assert found is not None
        return found.digest

    assert digest("a.parquet") == digest("b.parquet")
    other = VECTORS.copy()
    other[3, 3] += 100
    assert len({digest("a.parquet"), digest("c.parquet", other), digest("d.parquet", VECTORS[:, ::-1].copy())}) == 3
