"""What a manifest tells beside ids and labels travels along into the lists, as it was written."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import invoke
from jobs import SERIAL, run_on, shorten

from reducer import ClusterSpec, Job, cut, open_run, reduce_images, resume
from reducer.run.folder import manifest_columns

#: Cells that are hard to keep as they were written.
CELLS = ["0007", "1.50", "", "NA", "1e5", ' "quoted", with a comma', "two\nlines", "lone\rCR", "ß€", "true", " blanks "]


@pytest.fixture(scope="module")
def rows(collection: Path) -> list[dict[str, str]]:
    """Rows of a manifest in which ids and labels stand among others, one of them twice with other cells."""
    with open(collection / "train.csv", newline="") as file:
        listed = list(csv.DictReader(file))
    rows = [
        {
            "path": f"x/{number}",
            "fold": str(number % 5),
            "landmark_id": row["landmark_id"],
            "note": CELLS[number % len(CELLS)],
            "id": row["id"],
            "manifest_path": "mine",
        }
        for number, row in enumerate(listed)
    ]
    return [*rows, {**rows[3], "note": "the second", "fold": "9"}]


@pytest.fixture(scope="module")
def wide(rows: list[dict[str, str]], collection: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    (folder / "train").symlink_to(collection / "train")
    with open(folder / "train.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder


def cells(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("row_group", [100_000, 50])
def test_other_columns_stand_in_all_lists(
    rows: list[dict[str, str]],
    wide: Path,
    collection: Path,
    tmp_path: Path,
    row_group: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(manifest_columns, "ROW_GROUP", row_group)
    plain = run_on(collection, tmp_path / "plain", rank_all=True)
    run = tmp_path / "run"
    result = run_on(wide, run, rank_all=True)
    kept = set(plain.reduced["id"])
    expected = [row for row in rows[:-1] if row["id"] in kept]
    assert cells(run / "reduced.csv") == expected
    table = pq.read_table(run / "reduced.parquet")
    ours = plain.reduced.columns.to_list()
    assert table.column_names == [*ours, "manifest_path", "fold", "note", "manifest_manifest_path"]
    assert table.select(ours).to_pandas().drop(columns="path").equals(plain.reduced.drop(columns="path"))
    assert table["manifest_path"].to_pylist() == [row["path"] for row in expected]
    assert table["note"].to_pylist() == [row["note"] for row in expected]
    assert result.reduced.equals(table.to_pandas())
    assert pq.ParquetFile(run / "manifest.parquet").num_row_groups == -(-len(rows) // row_group)
    # The manifest may be gone later.
    ten = cut(run, tmp_path / "three.csv", keep=3)
    kept = set(cut(tmp_path / "plain", tmp_path / "plain.csv", keep=3).reduced["id"])
    assert cells(tmp_path / "three.csv") == [row for row in rows[:-1] if row["id"] in kept]
    cut(run, tmp_path / "three.parquet", keep=3)
    assert pq.read_table(tmp_path / "three.parquet").to_pandas().equals(ten.reduced)
    assert cut(run, tmp_path / "three.csv", keep=8).photos == len(expected)
    assert (tmp_path / "three.csv").read_bytes() == (run / "reduced.csv").read_bytes()


def test_they_are_the_same_after_a_resume_and_on_workers(wide: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "train").symlink_to((wide / "train").resolve())
    shutil.copyfile(wide / "train.csv", own / "train.csv")
    run = tmp_path / "run"
    run_on(own, run, ClusterSpec(workers=2), partition_images=40)
    lists = [(run / name).read_bytes() for name in ("reduced.csv", "reduced.parquet")]
    shorten(run, 2)
    (own / "train.csv").unlink()
    resume(run, SERIAL, progress=False)
    assert [(run / name).read_bytes() for name in ("reduced.csv", "reduced.parquet")] == lists
    shutil.copyfile(wide / "train.csv", own / "train.csv")
    run_on(own, tmp_path / "anew")
    assert [(tmp_path / "anew" / name).read_bytes() for name in ("reduced.csv", "reduced.parquet")] == lists


def test_two_columns_where_they_are_asked_for(wide: Path, collection: Path, tmp_path: Path) -> None:
    arguments = ["--keep", 8, "--workers", 0, "--no-extra-columns", "--output", tmp_path / "run"]
    assert invoke("run", wide / "train", "--manifest", wide / "train.csv", *arguments)[0] == 0
    lines = (tmp_path / "run" / "reduced.csv").read_text().splitlines()
    plain = run_on(collection, tmp_path / "plain")
    assert lines == (Path(plain.output) / "reduced.csv").read_text().splitlines()
    assert not (tmp_path / "run" / "manifest.parquet").exists()


def test_a_manifest_without_others_leaves_no_trace(collection: Path, tmp_path: Path) -> None:
    run_on(collection, tmp_path / "run")
    assert not (tmp_path / "run" / "manifest.parquet").exists()
    manifest = json.loads((tmp_path / "run" / "summary.json").read_text())["manifest"]
    assert not {"columns", "types"} & manifest.keys()


def test_types_of_a_parquet_manifest_come_back(tiny: Path, tmp_path: Path) -> None:
    names = sorted(path for path in (tiny / "train").rglob("*.jpg"))[:30]
    (tmp_path / "photos").mkdir()
    for number, name in enumerate(names):
        shutil.copyfile(name, tmp_path / "photos" / f"{number}.jpg")
    table = pa.table(
        {
            "landmark_id": pa.array([number % 3 for number in range(30)], pa.int32()),
            "id": pa.array(range(30), pa.uint64()),
            "box": [[number, 1.5] for number in range(30)],
            "score": [None if number % 4 == 0 else number / 3 for number in range(30)],
            "seen": pa.array([1_600_000_000 + number for number in range(30)], pa.timestamp("s")),
            "thumbnail": [b"\xff\xd8"] * 30,
        }
    )
    for name, manifest in (("all", table), ("two", table.select(["landmark_id", "id"]))):
        pq.write_table(manifest, tmp_path / f"{name}.parquet")
        job = Job(
            *(str(tmp_path / "photos"), str(tmp_path / name)),
            manifest=str(tmp_path / f"{name}.parquet"),
            path_template="{id}.jpg",
            keep=4,
            report=False,
        )
        result = reduce_images(job, SERIAL, progress=False)
        reduced = pq.read_table(tmp_path / name / "reduced.parquet")
        assert reduced.schema.field("id").type == pa.uint64()
        assert reduced.schema.field("landmark_id").type == pa.int32()
        assert result.reduced["id"].dtype == "uint64"
        assert open_run(tmp_path / name).reduced.equals(reduced.to_pandas())
        assert cut(tmp_path / name, keep=2).reduced["landmark_id"].dtype == "int32"
        cut(tmp_path / name, tmp_path / "cut.parquet", keep=2)
        assert pq.read_table(tmp_path / "cut.parquet").schema.field("id").type == pa.uint64()
        ids = reduced["id"].to_pylist()
        assert reduced["landmark_id"].to_pylist() == [photo % 3 for photo in ids]
    wide = pq.read_table(tmp_path / "all" / "reduced.parquet")
    assert wide.column_names[-3:] == ["box", "score", "seen"]
    assert wide["box"].to_pylist() == [[photo, 1.5] for photo in ids]
    first = pd.read_csv(tmp_path / "all" / "reduced.csv", dtype=str, keep_default_na=False)
    assert first.columns.to_list() == ["landmark_id", "id", "box", "score", "seen"]
    assert json.loads(first["box"][1]) == [ids[1], 1.5]
    assert first["score"][[photo % 4 == 0 for photo in ids]].eq("").all()
    scores = [float(score or "nan") for score in first["score"]]
    assert scores == pytest.approx([float("nan") if photo % 4 == 0 else photo / 3 for photo in ids], rel=0, nan_ok=True)
    # The list that it writes can be the next one's manifest.
    assert (
        invoke(
            "run",
            tmp_path / "photos",
            "--manifest",
            tmp_path / "all" / "reduced.csv",
            "--path-template",
            "{id}.jpg",
            "--output",
            tmp_path / "next",
            "--workers",
            0,
        )[0]
        == 0
    )


def test_names_that_stand_twice_and_cells_that_are_no_text(
    collection: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "train").symlink_to(collection / "train")
    header, *lines = (collection / "train.csv").read_bytes().splitlines()
    content = [header + b",a,b,a", *(line + b",1,caf\xe9,2" for line in lines)]
    (tmp_path / "train.csv").write_bytes(b"\n".join(content))
    run_on(tmp_path, tmp_path / "run")
    assert "columns of one name stay out of the reduced lists: 'a'" in caplog.text
    first = (tmp_path / "run" / "reduced.csv").read_text().splitlines()[:2]
    assert first[0] == header.decode() + ",b"
    assert first[1].endswith(",caf�")
