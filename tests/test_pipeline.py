from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from reducer.config import PhotoSettings
from reducer.draw import RANDOM_ORDER, draw_order
from reducer.pipeline import run_partition
from reducer.quality import spread
from reducer.types import LEDGER_SCHEMA, MANIFEST_SCHEMA, PartitionTask, from_ipc, to_ipc


def result_of(rows: list[tuple[str, str, str]], **settings: object):
    """Run one partition of (label, id, path) rows."""
    rows = sorted(rows)
    table = pa.table(
        {
            "row": pa.array(range(len(rows)), pa.int64()),
            "id": [row[1] for row in rows],
            "label": [row[0] for row in rows],
            "path": [row[2] for row in rows],
            "bytes": pa.nulls(len(rows), pa.int64()),
        },
        schema=MANIFEST_SCHEMA,
    )
    options = {"keep": 3, "strategy": "farthest-first", "decode": "fast", "seed": 0, "max_pixels": 10**8, **settings}
    task = PartitionTask(0, len(rows), to_ipc(table), PhotoSettings(**options), "token")
    result = run_partition(task)
    ledger = from_ipc(result.ledger)
    assert ledger.schema.equals(LEDGER_SCHEMA, check_metadata=True)
    return result, ledger.to_pylist()


def photos_of(collection: Path) -> list[str]:
    return sorted(str(path) for path in (collection / "train").rglob("*.jpg"))


def test_a_ledger_row_tells_the_whole_story(collection: Path) -> None:
    paths = photos_of(collection)[:9]
    result, rows = result_of([("x" if i < 5 else "y", f"p{i}", path) for i, path in enumerate(paths)])
    assert (result.read, result.failed) == (9, 0)
    assert result.bytes_read == sum(os.path.getsize(path) for path in paths)
    for label, size in (("x", 5), ("y", 4)):
        ranked = sorted((row for row in rows if row["label"] == label), key=lambda row: row["rank"])
        assert [row["rank"] for row in ranked] == list(range(size))
        assert [row["kept"] for row in ranked] == [rank < 3 for rank in range(size)]
        assert [row["reason"] for row in ranked] == ["kept" if rank < 3 else "beyond-keep" for rank in range(size)]
        assert ranked[0]["insertion_distance"] is None
        kept = {row["id"]: row["hash"] for row in ranked[:3]}
        for row in ranked:
            distances = {photo: (int(row["hash"], 16) ^ int(other, 16)).bit_count() for photo, other in kept.items()}
            nearest = row["id"] if row["kept"] else min(distances, key=lambda photo: (distances[photo], photo))
            assert row["nearest_kept"] == nearest
            assert row["nearest_kept_distance"] == distances[nearest]
    for row, path in zip(rows, paths, strict=True):
        found = os.stat(path)
        assert (row["bytes"], row["format"]) == (found.st_size, "JPEG")
        assert row["mtime"].value == found.st_mtime_ns
        assert row["width"] * 3 == row["height"] * 4
        assert row["etag"] is row["shard"] is row["offset"] is row["error"] is None


def test_bad_photos_are_rows_and_the_rest_is_ranked(collection: Path, tmp_path: Path) -> None:
    good = photos_of(collection)[:2]
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "page.jpg").write_text("<html>not here</html>")
    (tmp_path / "cut.jpg").write_bytes(Path(good[0]).read_bytes()[:-20_000])
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    shutil.copy(good[1], tmp_path / "large.jpg")
    expected = {
        "absent.jpg": "missing: no such file",
        "cut.jpg": "broken: OSError: image file is truncated",
        "empty.jpg": "empty: the file has 0 bytes",
        "folder.jpg": "not a file: the path is a directory",
        "loop.jpg": "unreadable: Too many levels of symbolic links (ELOOP)",
        "page.jpg": "not an image: Pillow knows no format that begins like this file",
        "pipe.jpg": "not a file: the path is no regular file",
        "empty.jpg/below.jpg": "missing: no such file",
        "nul\0.jpg": "missing: no file can have this path",
        "x" * 300: "unreadable: File name too long (ENAMETOOLONG)",
    }
    rows = [("x", name, str(tmp_path / name)) for name in expected] + [("x", f"ok{i}", p) for i, p in enumerate(good)]
    result, found = result_of(rows)
    assert (result.read, result.failed) == (len(expected) + 2, len(expected))
    assert result.first_failure == f"{tmp_path / 'absent.jpg'}: missing: no such file"
    by_id = {row["id"]: row for row in found}
    for name, message in expected.items():
        row = by_id[name]
        assert row["error"].startswith(message)
        assert (row["kept"], row["reason"]) == (False, "failed")
        assert row["rank"] is row["hash"] is row["nearest_kept"] is row["insertion_distance"] is row["width"] is None
    assert {by_id["ok0"]["rank"], by_id["ok1"]["rank"]} == {0, 1}
    assert by_id["cut.jpg"]["bytes"] == os.path.getsize(tmp_path / "cut.jpg")


def test_a_label_that_only_fails(tmp_path: Path) -> None:
    result, rows = result_of([("x", "a", str(tmp_path / "a")), ("x", "b", str(tmp_path / "b"))])
    assert result.failed == result.read == 2
    assert [row["reason"] for row in rows] == ["failed", "failed"]


def test_a_file_larger_than_any_photo_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "huge.jpg", "wb") as file:
        file.truncate(2**30 + 1)
    result, rows = result_of([("x", "a", str(tmp_path / "huge.jpg"))], max_pixels=1_000_000)
    assert rows[0]["error"] == "too large: 1073741825 bytes, over what --max-pixels 1000000 can need"
    assert result.bytes_read == 0


@pytest.mark.parametrize("strategy", ["farthest-first", "pairs", "random"])
def test_quality_is_of_the_kept_and_of_a_random_choice(collection: Path, strategy: str) -> None:
    paths = photos_of(collection)[:12]
    result, rows = result_of([("x", f"p{i}", path) for i, path in enumerate(paths)], strategy=strategy, keep=4)
    hashes = {row["id"]: np.frombuffer(bytes.fromhex(row["hash"]), np.uint8) for row in rows}
    kept = [hashes[row["id"]] for row in rows if row["kept"]]
    ids = sorted(hashes)
    drawn = [hashes[ids[i]] for i in draw_order(RANDOM_ORDER, 0, "x", ids)[:4]]
    assert result.selection == spread(np.array(kept))
    assert result.random == spread(np.array(drawn))
    assert (result.selection == result.random) == (strategy == "random")
    assert result.selection.pairs == 6
