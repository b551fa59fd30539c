from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jobs import reduced_files
from pyarrow import feather, orc

from reducer import InputError, Job
from reducer.config.job import path_rule
from reducer.run.plan import listing
from reducer.run.plan.manifest import Manifest, read_manifest
from reducer.run.plan.shards import find_shards
from reducer.storage.paths import with_paths
from reducer.storage.schemas import MANIFEST_SCHEMA
from reducer.storage.sorting import text_order


def manifest_of(folder: Path, content: str | bytes, name: str = "train.csv", **options: object) -> Manifest:
    """The manifest with all its paths."""
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    (folder / "train").mkdir(exist_ok=True)
    settings: dict[str, object] = {"path_template": "{id}.jpg", **options}
    if "path_column" in options:
        del settings["path_template"]
    job = Job(str(folder / "train"), str(folder / "run"), manifest=str(path), **settings)
    found = read_manifest(job)
    assert found.table["path"].null_count == (0 if "path_column" in options else found.table.num_rows)
    return replace(found, table=with_paths(path_rule(job), found.table))


def rows(manifest) -> list[tuple[int, str, str]]:
    return list(zip(*(manifest.table[name].to_pylist() for name in ("row", "id", "label")), strict=True))


def test_ids_and_labels_stay_as_they_are_written(tmp_path: Path) -> None:
    ids = [
        "0007",
        "17660ef415d37059",
        "1234567890123e45",
        "NA",
        "None",
        "null",
        "nan",
        "1e5",
        "true",
        "1.0",
        " x",
        '"q"',
    ]
    lines = [
        "id,landmark_id",
        *(f'"""q""",{i:03}' if name == '"q"' else f"{name},{i:03}" for i, name in enumerate(ids)),
    ]
    found = manifest_of(tmp_path, "\n".join(lines) + "\n")
    assert [row[1] for row in sorted(rows(found))] == ids
    assert [row[2] for row in sorted(rows(found))] == [f"{i:03}" for i in range(len(ids))]
    assert found.table.schema == MANIFEST_SCHEMA


def test_rows_are_sorted_by_label_and_id_and_know_their_place(tmp_path: Path) -> None:
    found = manifest_of(tmp_path, "url,landmark_id,id\nu,2,b\nu,10,c\nu,2,a\nu,10,é\nu,10,z\n")
    assert rows(found) == [(1, "c", "10"), (4, "z", "10"), (3, "é", "10"), (2, "a", "2"), (0, "b", "2")]
    assert found.table["path"].to_pylist()[0] == str(tmp_path / "train" / "c.jpg")


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.int64(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_manifests(tmp_path: Path, kind: pa.DataType) -> None:
    labels = pa.array([7, 7, 12]).cast(pa.string()) if not pa.types.is_integer(kind) else pa.array([7, 7, 12])
    table = pa.table({"id": pa.array(["a", "b", "NA"]), "landmark_id": labels.cast(kind)})
    pq.write_table(table, tmp_path / "source")
    found = manifest_of(tmp_path, (tmp_path / "source").read_bytes(), "any.name")
    assert rows(found) == [(2, "NA", "12"), (0, "a", "7"), (1, "b", "7")]


def test_parquet_labels_that_are_no_names_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["a"], "landmark_id": [1.5]}), tmp_path / "source")
    with pytest.raises(InputError, match=r"column 'landmark_id' is double; expected text or whole numbers"):
        manifest_of(tmp_path, (tmp_path / "source").read_bytes())


def test_byte_order_mark_and_gzip_and_windows_lines(tmp_path: Path) -> None:
    plain = "id,landmark_id\r\na,1\r\nb,1\r\n"
    expected = [(0, "a", "1"), (1, "b", "1")]
    assert rows(manifest_of(tmp_path, b"\xef\xbb\xbf" + plain.encode())) == expected
    for name in ("train.csv.gz", "train.csv"):
        assert rows(manifest_of(tmp_path, gzip.compress(plain.encode()), name)) == expected


def test_lists_of_ids_as_in_train_clean(tmp_path: Path) -> None:
    """GLDv2's train_clean.csv: one row a landmark, its ids separated by spaces."""
    content = "landmark_id,images\n7,b a\n1,0007\n12, d   NA c \n"
    expected = [(2, "0007", "1"), (5, "c", "12"), (3, "d", "12"), (4, "NA", "12"), (1, "a", "7"), (0, "b", "7")]
    found = manifest_of(tmp_path, content)
    assert sorted(rows(found)) == sorted(expected)
    assert found.table["path"].to_pylist()[0] == str(tmp_path / "train" / "0007.jpg")
    assert sorted(rows(manifest_of(tmp_path, gzip.compress(content.encode()), "train_clean.csv.gz"))) == sorted(
        expected
    )
    pq.write_table(pa.table({"landmark_id": [7, 1, 12], "images": ["b a", "0007", "d NA c"]}), tmp_path / "source")
    assert sorted(rows(manifest_of(tmp_path, (tmp_path / "source").read_bytes()))) == sorted(expected)
    # With a column of ids, "images" is a column like any other.
    assert rows(manifest_of(tmp_path, "id,landmark_id,images\nx,1,a b\n")) == [(0, "x", "1")]
    # Twice in a list, and under two labels.
    found = manifest_of(tmp_path, "landmark_id,images\n1,a a b\n2,a\n")
    assert (found.duplicates, found.shared_ids, found.table.num_rows) == (1, 1, 3)


def test_a_label_s_list_of_ids_may_be_very_long(tmp_path: Path) -> None:
    """Longer than the blocks that Arrow reads CSV by of its own."""
    ids = [f"{i:016x}" for i in range(100_000)]
    found = manifest_of(tmp_path, f"landmark_id,images\n1,a\n2,{' '.join(ids)}\n3,b\n")
    assert found.table.num_rows == 100_002
    assert found.table["id"].to_pylist()[1:-1] == ids


def test_the_full_manifest_has_urls(tmp_path: Path) -> None:
    content = 'id,url,landmark_id\na,"http://x/File:A,_B.jpg",1\nb,http://y/"q".jpg,2\n'
    assert rows(manifest_of(tmp_path, content)) == [(0, "a", "1"), (1, "b", "2")]


def test_a_line_break_in_quotes_is_part_of_the_value(tmp_path: Path) -> None:
    found = manifest_of(tmp_path, 'id,caption,landmark_id\na,"two\nlines, one cell",1\nb,c,2\n')
    assert rows(found) == [(0, "a", "1"), (1, "b", "2")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"train\.csv is empty"),
        ("id,landmark_id\n", r"has no rows"),
        ("id,landmark_id", r"has no rows: expected one row a photo"),
        ("id,landmark\na,1\n", r"no column 'landmark_id' \(did you mean 'landmark'\?\); it has 'id', 'landmark'"),
        ("id,landmark_id,id\na,1,b\n", r"2 columns called 'id'"),
        ("id,landmark_id\na,1\n,2\nb,3\n,4\n", r"column 'id' is empty in row 2, 4 \("),
        ('id,landmark_id\na,1\nb,""\n', r"column 'landmark_id' is empty in row 2 \("),
        ("id,landmark_id\n" + "x,\n" * 9, r"empty in row 1, 2, 3, 4, 5 and 4 more"),
        ("id,landmark_id\na,1\nb,2,3\n", r"Expected 2 columns, got 3"),
        (b"id,landmark_id\n\xff\xfe,1\n", r"cannot be read: it is not UTF-8 text"),
        (b"PAR1 but no more", r"cannot be read"),
        (gzip.compress(b"id,landmark_id\na,1\n" * 99, mtime=0)[:-9], r"cannot be read: Compressed file ended"),
        (b"\x1f\x8b and no gzip", r"train\.csv.*"),
        ("landmark_id,images\n1,a b\n2,\n", r"column 'images' is empty in row 2 \("),
        ("landmark_id,images\n1,a b\n2,  \n", r"column 'images' is empty in row 2 \("),
        ("landmark,images\n1,a b\n", r"no column 'landmark_id' \(did you mean 'landmark'\?\)"),
        ("landmark_id,images\n", r"has no rows: expected one row a label"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        manifest_of(tmp_path, content)
    assert "train.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_manifest_that_is_not_there(tmp_path: Path) -> None:
    for name in ("no.csv", "."):
        with pytest.raises(InputError, match="--manifest"):
            read_manifest(Job(str(tmp_path), "run", manifest=str(tmp_path / name)))
    with pytest.raises(InputError, match=r"IMAGES .*nowhere does not exist"):
        read_manifest(Job(str(tmp_path / "nowhere"), "run"))


def test_a_path_column_does_not_go_with_lists_of_ids(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="one row a label, its ids in the column 'images': no --path-column"):
        manifest_of(tmp_path, "landmark_id,images,file\n1,a b,x\n", path_column="file")


def test_duplicates_leave_one_row_whatever_the_order(tmp_path: Path) -> None:
    lines = ["a,1,m.jpg", "a,1,m.jpg", "b,1,b.jpg", "a,1,m.jpg", "c,2,c.jpg", "c,2,c.jpg"]
    for order in (lines, lines[::-1]):
        found = manifest_of(tmp_path, "id,landmark_id,file\n" + "\n".join(order) + "\n", path_column="file")
        assert found.duplicates == 3
        kept = sorted(zip(found.table["id"].to_pylist(), found.table["path"].to_pylist(), strict=True))
        assert [(photo, Path(path).name) for photo, path in kept] == [("a", "m.jpg"), ("b", "b.jpg"), ("c", "c.jpg")]
        assert found.table["row"].to_pylist()[0] == order.index("a,1,m.jpg")


def test_an_id_with_several_paths_is_no_duplicate(tmp_path: Path) -> None:
    """Frame numbers that begin anew in every video."""
    lines = [f"{frame:03},church,{video}/{frame:03}.jpg" for video in "abc" for frame in range(6)]
    content = "id,landmark_id,file\n" + "\n".join([*lines, lines[3], "000,bridge,d.jpg"]) + "\n"
    with pytest.raises(InputError) as refused:
        manifest_of(tmp_path, content, path_column="file")
    message = str(refused.value)
    assert "12 rows have the id and the label of another row, but another path, such as 000 (" in message
    assert "b/000.jpg), 001 (" in message
    assert message.endswith("or the paths as ids: --id-column file")
    found = manifest_of(tmp_path, content, path_column="file", id_column="file")
    assert (found.table.num_rows, found.duplicates) == (19, 1)


@given(st.lists(st.lists(st.text() | st.text("a\0", max_size=40)), min_size=1))
def test_texts_are_sorted_by_code_point(chunks: list[list[str]]) -> None:
    texts = [text for chunk in chunks for text in chunk]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("reducer.storage.sorting.COMPARED_ROWS", 3)
        order, new = text_order(pa.chunked_array(chunks, pa.string()))
    assert order.tolist() == sorted(range(len(texts)), key=lambda place: texts[place].encode())
    ordered = [texts[place] for place in order.tolist()]
    assert new.tolist() == [place == 0 or ordered[place] != ordered[place - 1] for place in range(len(ordered))]


def test_an_id_under_two_labels_is_kept_under_both_and_reported(tmp_path: Path) -> None:
    found = manifest_of(tmp_path, "id,landmark_id\nx,1\ny,1\nx,2\nz,3\nz,1\nz,2\n")
    assert found.table.num_rows == 6
    assert found.shared_ids == 2
    assert found.shared_examples == ("x", "z")
    assert found.duplicates == 0


def test_paths_by_template_and_by_column(tmp_path: Path) -> None:
    root = str(tmp_path / "train")
    content = "id,landmark_id,file\nabcd,L1,sub/a.png\nbcde,L2,/abs/b.png\n"
    for template, expected in [
        (None, ["a/b/c/abcd.jpg", "b/c/d/bcde.jpg"]),
        ("{label}/{id}", ["L1/abcd", "L2/bcde"]),
        ("{{{id}}}-{label[1]}.{id[3]}", ["{abcd}-1.d", "{bcde}-2.e"]),
    ]:
        found = manifest_of(tmp_path, content, path_template=template)
        assert found.table["path"].to_pylist() == [f"{root}/{name}" for name in expected]
    found = manifest_of(tmp_path, content, path_column="file")
    assert found.table["path"].to_pylist() == [f"{root}/sub/a.png", "/abs/b.png"]
    hint = r"\(no photo is read here: --path-template '\{id\}' will do\)"
    with pytest.raises(InputError, match=f"'xy' of photo 1 .* is too short for .*; give the layout .* {hint}"):
        manifest_of(tmp_path, "id,landmark_id\nxy,1\n", vectors="v.parquet", path_template="{id[2]}/{id}")
    with pytest.raises(InputError, match=r"train.csv: id 'xy' of photo 2 \(label '1'\) is too short for"):
        manifest_of(tmp_path, "id,landmark_id\nabc,1\nxy,1\n", path_template="{id[2]}/{id}")


@pytest.mark.parametrize(
    ("path", "reader", "message"),
    [
        ("s3://bucket/a//b.jpg", "obstore", r"2 photos, such as 's3://bucket/a//b.jpg', have keys .* --reader s3fs"),
        ("s3://bucket/a/../b.jpg", "obstore", "cannot name"),
        ("s3://bucket/./b.jpg", "obstore", "cannot name"),
        ("s3://bucket/a\x01b.jpg", "obstore", "cannot name"),
        ("s3://bucket/a.jpg?versionId=1", "s3fs", r"name a version of an object \(\?versionId=\)"),
        ("s3://bucket/a..b/.c/d::e?f.jpg", "obstore", None),
        ("s3://bucket/a//b.jpg", "s3fs", None),
    ],
)
def test_keys_that_a_reader_cannot_name_are_refused(
    path: str, reader: str, message: str | None, tmp_path: Path
) -> None:
    lines = ["id,landmark_id,file", f"1,x,{path}", f"2,x,{path}", "3,x,s3://bucket/c.jpg"]
    given = {"path_column": "file", "reader": reader, "storage_options": {"anon": True}}
    if message is None:
        manifest_of(tmp_path, "\n".join(lines) + "\n", **given)
        return
    with pytest.raises(InputError, match=message):
        manifest_of(tmp_path, "\n".join(lines) + "\n", **given)


LIST = "id,landmark_id\n0007,x\n08,y;z\n09,NA\n"
ROWS = [("0007", "x"), ("08", "y;z"), ("09", "NA")]
TABLE = pa.table({"id": [row[0] for row in ROWS], "landmark_id": [row[1] for row in ROWS]})


def zipped(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, LIST)
    return file.getvalue()


def written(write: Callable[[io.BytesIO], object]) -> bytes:
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def tarred() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        member = tarfile.TarInfo("train.csv")
        member.size = len(LIST)
        archive.addfile(member, io.BytesIO(LIST.encode()))
    return file.getvalue()


def separated(separator: str) -> str:
    return "".join(separator.join(f'"{cell}"' for cell in line.split(",")) + "\n" for line in LIST.splitlines())


KINDS_OF_MANIFEST = {
    "gzip": gzip.compress(LIST.encode()),
    "bz2": bz2.compress(LIST.encode()),
    "xz": lzma.compress(LIST.encode()),
    "zip": zipped("train.csv"),
    "zip of a Mac": zipped("a/train.csv", "__MACOSX/._train.csv"),
    "semicolon": separated(";").encode(),
    "tab": separated("\t").encode(),
    "bar": separated("|").encode(),
    "UTF-16": b"\xff\xfe" + LIST.encode("utf-16-le"),
    "UTF-16 of Excel": b"\xff\xfe" + separated("\t").replace("\n", "\r\n").encode("utf-16-le"),
    "UTF-16, big-endian": b"\xfe\xff" + LIST.encode("utf-16-be"),
    "JSON lines": "".join(json.dumps({"landmark_id": row[1], "id": row[0]}) + "\n" for row in ROWS).encode(),
    "JSON lines, gzip": gzip.compress(
        b"".join(json.dumps({"id": a, "landmark_id": b}).encode() + b"\n" for a, b in ROWS)
    ),
    "JSON lines, marked as UTF-8, after an empty line": b"\xef\xbb\xbf\n"
    + b"".join(json.dumps({"id": a, "landmark_id": b}).encode() + b"\n" for a, b in ROWS),
    "Feather": written(lambda file: feather.write_feather(TABLE, file)),
    "Parquet": written(lambda file: pq.write_table(TABLE, file)),
}


@pytest.mark.parametrize("kind", KINDS_OF_MANIFEST)
def test_manifests_of_many_kinds_are_read_whatever_their_name(kind: str, tmp_path: Path) -> None:
    found = manifest_of(tmp_path, KINDS_OF_MANIFEST[kind], path_template="{id}.jpg")
    assert [row[1:] for row in rows(found)] == [(photo, label) for photo, label in sorted(ROWS, key=lambda row: row[1])]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (zipped("a.csv", "b.csv"), r"is a zip archive of 2 files \(a.csv, b.csv\): unpack it and give the one"),
        (zipped("[Content_Types].xml", "xl/workbook.xml"), "is an Excel workbook: give CSV, JSON lines, Parquet"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "is an Excel workbook"),
        (b"<!DOCTYPE html><html>Sign in", "is HTML or XML"),
        (b"SQLite format 3\0", "is an SQLite database"),
        (b"[{}]", "is a JSON array"),
        (b"FEA1", "is Feather of version 1"),
        (b"\x80\x04\x95", "is a Python pickle"),
        (b'{\n  "id": 1\n}\n', "line 1 is no JSON object .*: expected JSON lines"),
        (b'{"id": 1, "landmark_id": 2}\n[]\n', "line 2 is no JSON object"),
        (b'{"id": 1, "landmark_id": 2}\n{"id": "b", "landmark_id": 2}\n', "cannot be read|several types"),
        (b'{"id": 1, "landmark_id": 2}\n{"id": 2}\n', "column 'landmark_id' is empty in row 2"),
        (b"\xef\xbb\xbf[\n{}]", "is a JSON array"),
        (b"\n  <!doctype html>", "is HTML or XML"),
        (bytes(pa.compress(LIST.encode(), "zstd", asbytes=True)), "is compressed by zstd"),
        (bytes(pa.compress(LIST.encode(), "lz4", asbytes=True)), "is compressed by lz4"),
        (tarred(), "is a tar archive"),
        (gzip.compress(tarred()), "is a tar archive"),
        (written(lambda file: orc.write_table(TABLE, file)), "is an ORC file"),
        (written(lambda file: pa.ipc.new_stream(file, TABLE.schema).write_table(TABLE)), "is a stream of Arrow"),
        (b"Obj\x01\x04\x16avro.schema\0", "is an Avro file"),
        (LIST.encode("utf-16-le"), "is neither text in UTF-8 nor"),
        (LIST.encode("utf-32"), "is neither text in UTF-8 nor"),
        (zipped(), "is an empty zip archive"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a pointer of Git LFS"),
        (LIST.replace("x", "\u00e9").encode("latin-1"), "it is not UTF-8 text; save it as UTF-8"),
        (b"PK\x03\x04 no archive", "cannot be read: File is not a zip file"),
        (b"BZh9 no bz2", "."),
    ],
)
def test_what_is_no_table_is_named_in_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as caught:
        manifest_of(tmp_path, content)
    assert "\n" not in str(caught.value)


def test_a_header_may_begin_as_another_kind_of_file_does(tmp_path: Path) -> None:
    found = manifest_of(tmp_path, "ORCID,landmark_id\na,x\n", id_column="ORCID", path_template="{id}.jpg")
    assert [row[1:] for row in rows(found)] == [("a", "x")]


def test_a_folder_of_parquet_parts_is_a_manifest(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    for number in range(3):
        pq.write_table(TABLE.slice(number, 1), folder / f"part.{number}.parquet")
    (folder / "_SUCCESS").touch()
    (tmp_path / "train").mkdir()
    found = read_manifest(Job(str(tmp_path / "train"), "run", manifest=str(folder), path_template="{id}"))
    assert sorted(row[1:] for row in rows(found)) == ROWS
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="none is a folder without Parquet files: give CSV"):
        read_manifest(Job(str(tmp_path / "train"), "run", manifest=str(tmp_path / "none")))


def test_a_pipe_is_read_once(collection: Path, tmp_path: Path) -> None:
    command = f"cat {collection}/train.csv"
    run = f"{sys.executable} -m reducer run {collection}/train --workers 0 --keep 8 --no-report --quiet"
    script = f"{run} --manifest <({command}) --output {tmp_path}/piped && {run} --manifest {collection}/train.csv"
    subprocess.run(["bash", "-euc", f"{script} --output {tmp_path}/plain"], check=True, timeout=120)
    assert reduced_files(tmp_path / "piped") == reduced_files(tmp_path / "plain")


def test_a_folder_is_its_own_manifest(tmp_path: Path) -> None:
    for name in [
        "b/2.JPG",
        "b/1.webp",
        "a/x/deep.png",
        "top.jpeg",
        "a/notes.txt",
        "a/.hidden.jpg",
        ".git/x.png",
        "b/raw",
    ]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"12345")
    (tmp_path / "linked").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    (tmp_path / "b" / "dangling.jpg").symlink_to(tmp_path / "gone")
    (tmp_path / "a" / "itself.jpg").symlink_to(tmp_path / "a" / "itself.jpg")
    found = read_manifest(Job(str(tmp_path), "run"))
    expected = [
        ("top.jpeg", "."),
        ("a/itself.jpg", "a"),
        ("a/x/deep.png", "a/x"),
        ("b/1.webp", "b"),
        ("b/2.JPG", "b"),
        ("b/dangling.jpg", "b"),
        ("linked/1.webp", "linked"),
        ("linked/2.JPG", "linked"),
        ("linked/dangling.jpg", "linked"),
    ]
    assert [row[1:] for row in rows(found)] == expected
    assert [row[1] for row in sorted(rows(found))] == sorted(photo for photo, _ in expected)
    assert found.table["path"].to_pylist()[2] == str(tmp_path / "a/x/deep.png")
    assert found.table["bytes"].to_pylist()[:6] == [5, None, 5, 5, 5, None]
    assert found.skipped_files == {
        "hidden folder": 1,
        "hidden file": 1,
        "file ending in .txt": 1,
        "file without an extension": 2,  # one of them seen through the link as well
        "folder link that leads back": 2,
    }


def test_what_systems_leave_among_photos_is_no_label(tmp_path: Path) -> None:
    names = ["church/1.jpg", "church/@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg", "#recycle/2.jpg", "$RECYCLE.BIN/S-1/3.jpg"]
    names += ["__MACOSX/church/._1.jpg", "church/._1.jpg", "lost+found/4.jpg", "System Volume Information/5.png"]
    names += ["church/Thumbs.db", "Desktop.ini", "@recycle bin/6.jpg"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"12345")
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path), "/system", recursive=True)
    for images in (str(tmp_path), "memory://system"):
        found = read_manifest(Job(images, "run"))
        assert found.table["id"].to_pylist() == ["@recycle bin/6.jpg", "church/1.jpg"]
        # A folder is not looked into; a store lists what is in it.
        assert found.skipped_files == {"folder of a system": 6, "hidden file": 1, "file of a system": 2}


def test_files_are_skipped_by_extension_with_what_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "is_photo", lambda name: name.endswith(".jpg"))
    for name in ("a/1.jpg", "a/2.HEIC", "a/3.heic", "a/4.cr2", "a/5.mp4", "a/LICENSE"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"12345")
    assert read_manifest(Job(str(tmp_path), "run")).skipped_files == {
        "file ending in .heic (pip install pillow-heif reads it)": 2,
        "file ending in .cr2 (a camera's raw file: export it as JPEG)": 1,
        "file ending in .mp4": 1,
        "file without an extension": 1,
    }


@pytest.mark.parametrize(
    ("patterns", "left"),
    [
        (["drafts/"], ["a/1.jpg", "a/old/2.jpg", "b/3.png"]),
        (["/a/"], ["b/3.png", "b/drafts/4.jpg"]),
        (["*.jpg", "!a/1.jpg"], ["a/1.jpg", "b/3.png"]),
        (["a/**/2.*", "drafts"], ["a/1.jpg", "b/3.png"]),
    ],
    ids=str,
)
def test_patterns_leave_files_and_folders_out(tmp_path: Path, patterns: list[str], left: list[str]) -> None:
    for name in ("a/1.jpg", "a/old/2.jpg", "b/3.png", "b/drafts/4.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"12345")
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path), f"/{tmp_path.name}", recursive=True)
    for images in (str(tmp_path), f"memory://{tmp_path.name}"):
        found = read_manifest(Job(images, "run", exclude=tuple(patterns)))
        assert found.table["id"].to_pylist() == left
        assert found.skipped_files.keys() == {"left out by --exclude"}


def test_labels_that_look_alike_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    labels = ["Notre Dame", "notre dame ", "Caf\u00e9", "Cafe\u0301", "1", "10", "other"]
    rows = [f"{number},{label}" for number, label in enumerate(labels)]
    manifest_of(tmp_path, "id,landmark_id\n" + "\n".join(rows) + "\n")
    assert "2 labels differ by blanks, case or Unicode form alone: " in caplog.text
    assert "'Notre Dame' and 'notre dame '" in caplog.text
    caplog.clear()
    manifest_of(tmp_path, "id,landmark_id\n1,1\n2,10\n3,01\n")
    assert not caplog.records


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train/a/1.jpg", "val/a/2.jpg"], "the labels begin with train, val; to take one: {}/train"),
        (["a/1.jpg", "2.jpg", "3.jpg"], "2 photos lie in no folder and have the label '.'"),
        (["train/a/1.jpg", "museum/b/2.jpg"], None),
        (["Train/a/1.jpg", "Train/b/2.jpg"], "the labels begin with Train; to take one: {}/Train"),
        (["train/1.jpg", "test/2.jpg"], None),
        (["1.jpg", "2.jpg"], None),
    ],
)
def test_folders_that_seem_to_be_no_labels_are_told(
    names: list[str], message: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"12345")
    read_manifest(Job(str(tmp_path), "run"))
    if message is None:
        assert not caplog.records
    else:
        assert message.format(tmp_path) in caplog.text


def test_the_option_that_leaves_photos_in_no_folder_out_leaves_the_labels_as_they_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("St. Paul/1.jpg", "v1.0/inner.d/2.jpg", "plain/3.jpg", "4.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"12345")
    read_manifest(Job(str(tmp_path), "run"))
    patterns = tuple(re.findall("--exclude '(.+?)'", caplog.text))
    caplog.clear()
    found = read_manifest(Job(str(tmp_path), "run", exclude=patterns))
    assert sorted(found.table["id"].to_pylist()) == ["St. Paul/1.jpg", "plain/3.jpg", "v1.0/inner.d/2.jpg"]
    assert found.skipped_files == {"left out by --exclude": 1}
    assert not caplog.records


def test_a_folder_that_is_left_out_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/1.jpg", "private/2.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"12345")
    scan = os.scandir

    def refusing(path: str) -> object:  # as for anybody but root
        if path.endswith("private"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(
        InputError, match="private cannot be listed: Permission denied; to leave it out: --exclude '/priv"
    ):
        read_manifest(Job(str(tmp_path), "run"))
    assert read_manifest(Job(str(tmp_path), "run", exclude=("/private/",))).table["id"].to_pylist() == ["a/1.jpg"]


def test_patterns_that_leave_nothing_out_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"x" * 1024)
    for options, message in [
        (
            {"manifest": "list.csv", "exclude": ("a",)},
            "--exclude leaves out what a listing finds, and a manifest names",
        ),
        ({"exclude": ("",)}, "--exclude is empty"),
        ({"exclude": "a"}, "exclude: give a list of patterns, not one text"),
    ]:
        with pytest.raises(InputError, match=message):
            Job("photos", "run", **options)
    with pytest.raises(InputError, match="--exclude ! is no pattern"):
        read_manifest(Job(str(tmp_path), "run", exclude=("!",)))
    with pytest.raises(InputError, match=r"--exclude goes with single files, and IMAGES .* is tar shards"):
        find_shards(Job(str(tmp_path), "run", exclude=("a",)))


def test_a_folder_without_photos_or_with_names_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(InputError, match=r"holds no photo; found 1 x file ending in \.txt"):
        read_manifest(Job(str(tmp_path), "run"))
    with pytest.raises(InputError, match="File name too long"):
        read_manifest(Job(str(tmp_path / ("x" * 300)), "run"))
    Path(os.fsdecode(os.fsencode(str(tmp_path)) + b"/\xff.jpg")).write_bytes(b"x")
    with pytest.raises(InputError, match=r"1 file names are not UTF-8 text, the first is b'\\xff.jpg'"):
        read_manifest(Job(str(tmp_path), "run"))


def test_many_rows_are_checked_as_few_are(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    ids = [f"{number:016x}" for number in generator.integers(0, 2**63, 50_000)]
    labels = generator.integers(0, 3_000, 50_000)
    content = "id,landmark_id\n" + "".join(f"{photo},{label}\n" for photo, label in zip(ids, labels, strict=True))
    found = manifest_of(tmp_path, content)
    expected = sorted(zip(map(str, labels), ids, range(50_000), strict=True))
    assert rows(found) == [(row, photo, label) for label, photo, row in expected]
