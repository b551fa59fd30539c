from __future__ import annotations

import os
import shutil
from pathlib import Path

import imagehash
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from reducer import Job
from reducer.config.resolved import resolve
from reducer.config.settings import STRATEGY_NAMES, Source
from reducer.draw import RANDOM_ORDER, draw_order
from reducer.run.join import as_ledger
from reducer.run.tasks.messages import PartitionTask
from reducer.run.tasks.rank_stage import run_partition
from reducer.selection.distance import Hamming
from reducer.selection.quality import spread
from reducer.storage.schemas import LEDGER_SCHEMA, TASK_SCHEMA, from_ipc, to_ipc


def result_of(rows: list[tuple[str, str, str]], always_keep: tuple[str, ...] = (), avoid=None, **options: object):
    """Run one partition of (label, id, path) rows."""
    rows = sorted(rows)
    table = pa.table(
        {
            "row": pa.array(range(len(rows)), pa.int64()),
            "id": [row[1] for row in rows],
            "label": [row[0] for row in rows],
            "path": [row[2] for row in rows],
            "bytes": pa.nulls(len(rows), pa.int64()),
            "always_keep": [row[1] in always_keep for row in rows],
        },
        schema=TASK_SCHEMA,
    )
    named = None if avoid is None else "given below"
    settings = resolve(Job("-", "-", avoid=named, **{"keep": 3, "max_pixels": 10**8, **options})).photo_settings
    task = PartitionTask(0, len(rows), to_ipc(table), settings, Source())
    result = run_partition(task, avoid)
    ledger = as_ledger(table, from_ipc(result.rows))
    assert ledger.schema.equals(LEDGER_SCHEMA, check_metadata=True)
    return result, ledger.to_pylist()


def photos_of(collection: Path) -> list[str]:
    return sorted(str(path) for path in (collection / "train").rglob("*.jpg"))


def test_a_ledger_row_tells_the_whole_story(collection: Path) -> None:
    paths = photos_of(collection)[:9]
    result, rows = result_of([("x" if i < 5 else "y", f"p{i}", path) for i, path in enumerate(paths)])
    assert (result.tally.read, result.tally.failed) == (9, 0)
    assert result.tally.bytes_read == sum(os.path.getsize(path) for path in paths)
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
        "page.jpg": "not an image: no format of photos that Pillow reads begins like this file",
        "pipe.jpg": "not a file: the path is no regular file",
        "empty.jpg/below.jpg": "missing: no such file",
        "nul\0.jpg": "missing: no file can have this path",
        "x" * 300: "unreadable: File name too long (ENAMETOOLONG)",
    }
    rows = [("x", name, str(tmp_path / name)) for name in expected] + [("x", f"ok{i}", p) for i, p in enumerate(good)]
    result, found = result_of(rows)
    assert (result.tally.read, result.tally.failed) == (len(expected) + 2, len(expected))
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
    assert result.tally.failed == result.tally.read == 2
    assert [row["reason"] for row in rows] == ["failed", "failed"]


def test_a_file_larger_than_any_photo_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "huge.jpg", "wb") as file:
        file.truncate(2**30 + 1)
    result, rows = result_of([("x", "a", str(tmp_path / "huge.jpg"))], max_pixels=1_000_000)
    assert rows[0]["error"] == "too large: 1073741825 bytes, over what --max-pixels 1000000 can need"
    assert result.tally.bytes_read == 0


def hashes_of(rows: list[dict]) -> dict[str, np.ndarray]:
    return {row["id"]: np.frombuffer(bytes.fromhex(row["hash"]), np.uint8) for row in rows if row["hash"]}


def nearest_of(chosen: list[np.ndarray], among: list[np.ndarray]) -> np.ndarray:
    return np.array([min(float(np.bitwise_count(one ^ other).sum()) for one in chosen) for other in among])


@pytest.mark.parametrize("strategy", STRATEGY_NAMES)
def test_quality_is_of_the_kept_and_of_a_random_choice(collection: Path, strategy: str) -> None:
    paths = photos_of(collection)[:12]
    result, rows = result_of([("x", f"p{i}", path) for i, path in enumerate(paths)], strategy=strategy, keep=4)
    hashes = hashes_of(rows)
    everyone = list(hashes.values())
    kept = [hashes[row["id"]] for row in rows if row["kept"]]
    ids = sorted(hashes)
    drawn = [hashes[ids[i]] for i in draw_order(RANDOM_ORDER, 0, "x", ids)[:4]]
    for side, chosen in ((result.tally.quality.selection, kept), (result.tally.quality.random, drawn)):
        assert side == spread(Hamming(np.array(chosen)), np.arange(4), nearest_of(chosen, everyone), 6)
    assert (result.tally.quality.selection == result.tally.quality.random) == (strategy == "random")
    assert result.tally.quality.selection.pairs == 6
    assert result.tally.quality.certificate.labels == (strategy == "farthest-first")


@pytest.mark.parametrize("strategy", STRATEGY_NAMES)
def test_photos_that_are_always_kept_are_ranked_first(collection: Path, strategy: str) -> None:
    paths = photos_of(collection)[:13]
    partition = [("x" if i < 9 else "y", f"p{i}", path) for i, path in enumerate(paths)]
    _, plain = result_of(partition, strategy=strategy)
    last = sorted((row for row in plain if row["label"] == "x"), key=lambda row: row["rank"])[-2:]
    chosen = tuple(row["id"] for row in last)
    result, rows = result_of(partition, always_keep=chosen, strategy=strategy)
    by_rank = sorted((row for row in rows if row["label"] == "x"), key=lambda row: row["rank"])
    assert {row["id"] for row in by_rank[:2]} == set(chosen)
    assert [row["rank"] for row in by_rank] == list(range(9))
    assert [row["kept"] for row in by_rank] == [True] * 3 + [False] * 6
    hashes = hashes_of(rows)
    for place, row in enumerate(by_rank[1:], start=1):
        earlier = [hashes[other["id"]] for other in by_rank[:place]]
        assert row["insertion_distance"] == nearest_of(earlier, [hashes[row["id"]]])[0]
    if strategy == "farthest-first":
        assert by_rank[2]["insertion_distance"] == max(
            nearest_of([hashes[i] for i in chosen], [hashes[row["id"]] for row in by_rank[2:]])
        )
    # The other label (of four photos) is ranked as before, and it alone can be certified.
    assert [row for row in rows if row["label"] == "y"] == [row for row in plain if row["label"] == "y"]
    assert result.tally.quality.certificate.labels == (strategy == "farthest-first")


def test_photos_near_those_to_avoid_are_not_kept(collection: Path) -> None:
    paths = photos_of(collection)[:12]
    partition = [("x", f"p{i:02}", path) for i, path in enumerate(paths)]
    _, plain = result_of(partition, keep=12)
    hashes = hashes_of(plain)
    avoid = np.array([hashes["p03"] ^ np.array([7] + [0] * 7, np.uint8), hashes["p08"]])
    near = {i for i, found in hashes.items() if nearest_of(list(avoid), [found])[0] <= 3}
    assert {"p03", "p08"} <= near < set(hashes)
    for distance, left_out in [(3, near), (0, {"p08"}), (64, set(hashes))]:
        result, rows = result_of(partition, avoid=avoid, keep=12, avoid_distance=distance)
        by_id = {row["id"]: row for row in rows}
        assert {i for i, row in by_id.items() if row["reason"] == "avoided"} == left_out
        for i in left_out:
            row = by_id[i]
            assert (row["kept"], row["rank"], row["insertion_distance"], row["error"]) == (False, None, None, None)
            assert row["hash"] == hashes[i].tobytes().hex()
            others = [hashes[j] for j in hashes if j not in left_out]
            assert row["nearest_kept_distance"] == (nearest_of(others, [hashes[i]])[0] if others else None)
        assert result.tally.quality.selection.candidates == 12 - len(left_out)
    # An id that is always kept is kept though it is near one to avoid.
    _, rows = result_of(partition, always_keep=("p08",), avoid=avoid, avoid_distance=3, keep=12)
    assert {row["id"] for row in rows if row["reason"] == "avoided"} == near - {"p08"}
    assert next(row for row in rows if row["id"] == "p08")["rank"] == 0


def test_flat_photos_are_not_kept_when_asked(collection: Path, tmp_path: Path) -> None:
    paths = photos_of(collection)[:4]
    Image.new("RGB", (640, 480), (200, 30, 30)).save(tmp_path / "red.jpg")
    Image.new("L", (640, 480), 0).save(tmp_path / "black.png")
    partition = [("x", f"p{i}", path) for i, path in enumerate([*paths, tmp_path / "red.jpg", tmp_path / "black.png"])]
    partition = [(label, photo, str(path)) for label, photo, path in partition]
    _, rows = result_of(partition, keep=6)
    assert [row["reason"] for row in rows] == ["kept"] * 6
    result, rows = result_of(partition, keep=6, drop_flat=True)
    assert [row["reason"] for row in rows] == ["kept"] * 4 + ["flat"] * 2
    assert result.tally.failed == 0
    assert [row["rank"] for row in rows[4:]] == [None, None]
    assert [row["hash"] for row in rows[4:]] == ["0" * 16] * 2
    # A label of nothing else; and one that is always kept all the same.
    _, rows = result_of(partition[4:], drop_flat=True)
    assert [(row["reason"], row["nearest_kept"]) for row in rows] == [("flat", None)] * 2
    _, rows = result_of(partition, always_keep=("p5",), keep=6, drop_flat=True)
    assert [row["reason"] for row in rows] == ["kept"] * 4 + ["flat", "kept"]


@pytest.mark.parametrize(("name", "size"), [("phash", 8), ("dhash", 3), ("whash", 16), ("ahash", 32)])
def test_the_ledger_has_imagehash_s_own_text(collection: Path, name: str, size: int) -> None:
    paths = photos_of(collection)[:6]
    partition = [("x", f"p{i}", path) for i, path in enumerate(paths)]
    _, rows = result_of(partition, hash=name, hash_size=size, decode="exact")
    functions = {"phash": imagehash.phash, "dhash": imagehash.dhash, "whash": imagehash.whash}
    function = functions.get(name, imagehash.average_hash)
    for row, path in zip(rows, paths, strict=True):
        assert row["hash"] == str(function(Image.open(path), size))
    kept = [row for row in rows if row["kept"]]
    for row in rows:
        apart = [(int(row["hash"], 16) ^ int(other["hash"], 16)).bit_count() for other in kept]
        assert row["nearest_kept_distance"] == min(apart)
