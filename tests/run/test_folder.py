from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reducer import InputError, ReducerError
from reducer.run.folder import RunFolder
from reducer.run.tasks.messages import Tally
from reducer.storage.schemas import LEDGER_SCHEMA, REDUCED_COLUMNS, ListForm, from_ipc, to_ipc


def ledger(*rows: dict[str, object]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=LEDGER_SCHEMA)


def row(number: int, **values: object) -> dict[str, object]:
    return {"row": number, "id": f"p{number}", "label": "x", "path": f"/p{number}", "kept": True, **values}


def test_a_folder_that_is_not_a_run_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "images").mkdir()
    (tmp_path / "summary.json").write_text('{"format": "something else"}')
    for overwrite in (False, True):
        with pytest.raises(InputError, match="is no run folder"):
            RunFolder(str(tmp_path)).check_free(overwrite=overwrite)
    with pytest.raises(InputError, match="is a file"):
        RunFolder(str(tmp_path / "thesis.tex")).check_free(overwrite=True)
    with pytest.raises(InputError, match="cannot be made"):
        RunFolder(str(tmp_path / "thesis.tex" / "run")).check_free(overwrite=False)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_run_is_replaced_only_when_asked_and_nothing_else_in_its_folder(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "deep" / "run"))
    folder.check_free(overwrite=False)
    folder.start({"status": "running"})
    folder.parts.write(3, ledger(row(0)), Tally(), "bits")
    folder.lists.write_reduced(ListForm("id", "label"), "both", "bits")
    (tmp_path / "deep" / "run" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="--overwrite"):
        folder.check_free(overwrite=False)
    folder.check_free(overwrite=True)
    folder.start({"status": "running"})
    left = sorted(str(path.relative_to(folder.path)) for path in Path(folder.path).rglob("*"))
    assert left == ["images", "notes.txt", "summary.json"]


def test_reduced_lists_are_in_manifest_order_and_text_stays_text(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    folder.start({})
    folder.parts.write(1, ledger(row(3, id="NA", label="007"), row(0, id='a,"b', label="1e5")), Tally(), "bits")
    folder.parts.write(0, ledger(row(2, kept=False), row(1, id="#", label="x\ny", rank=2, bytes=7)), Tally(), "bits")
    folder.lists.write_reduced(ListForm("photo", "class"), "both", "bits")
    assert (tmp_path / "reduced.csv").read_bytes() == b'photo,class\n"a,""b",1e5\n#,"x\ny"\nNA,007\n'
    table = pq.read_table(tmp_path / "reduced.parquet")
    assert table.schema.equals(ListForm("photo", "class").schema, check_metadata=True)
    assert table.column_names == ["photo", "class", *REDUCED_COLUMNS]
    assert table["photo"].to_pylist() == ['a,"b', "#", "NA"]
    assert table["rank"].to_pylist() == [None, 2, None]
    assert folder.parts.ledger(["id"])["id"].to_pylist() == ['a,"b', "#", "p2", "NA"]


@pytest.mark.parametrize(("formats", "names"), [("csv", ["reduced.csv"]), ("parquet", ["reduced.parquet"])])
def test_only_the_formats_asked_for(tmp_path: Path, formats: str, names: list[str]) -> None:
    folder = RunFolder(str(tmp_path))
    folder.start({})
    folder.lists.write_reduced(ListForm("id", "label"), formats, "bits")
    assert [path.name for path in tmp_path.glob("reduced.*")] == names


def test_a_manifest_whose_id_is_called_path(tmp_path: Path) -> None:
    schema = ListForm("path", "hash").schema
    assert len(set(schema.names)) == len(schema.names) == 9
    assert schema.names[:2] == ["path", "hash"]
    assert {"photo_path", "photo_hash"} < set(schema.names)
    folder = RunFolder(str(tmp_path))
    folder.start({})
    folder.parts.write(0, ledger(row(0)), Tally(), "bits")
    folder.lists.write_reduced(ListForm("path", "hash"), "both", "bits")
    assert pq.read_table(tmp_path / "reduced.parquet").to_pylist()[0]["photo_path"] == "/p0"


def test_every_ledger_column_is_described_and_distances_have_a_unit() -> None:
    for field in LEDGER_SCHEMA:
        assert field.metadata[b"description"]
        if field.name.endswith("distance"):
            assert field.type == pa.float64()
            assert field.metadata[b"unit"] == b"bits"


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    folder.start({"status": "running"})
    before = (tmp_path / "summary.json").read_bytes()
    with pytest.raises(TypeError):
        folder.write_summary({"status": object()})
    assert (tmp_path / "summary.json").read_bytes() == before
    assert json.loads(before)["format"] == "reducer-run"
    (tmp_path / "images").rmdir()
    with pytest.raises(ReducerError, match=r"part-00000\.parquet cannot be written"):
        folder.parts.write(0, ledger(row(0)), Tally(), "bits")
    assert [path.name for path in tmp_path.rglob("*")] == ["summary.json"]


def test_tables_travel_whole() -> None:
    table = ledger(row(0, error="ü"), row(1, bytes=2**40))
    assert from_ipc(to_ipc(table)).equals(table, check_metadata=True)
    assert from_ipc(to_ipc(table.slice(0, 0))).num_rows == 0
