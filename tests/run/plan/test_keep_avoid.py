from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jobs import job_on, run_on

from reducer import InputError, Job
from reducer.config.resolved import resolve
from reducer.run.known import read_avoided
from reducer.run.plan.keep_avoid import find_always_keep
from reducer.storage.codecs import Hashes

IDS = pa.chunked_array([["a", "b"], ["0007", "c", "a"]])


def parquet_of(**columns: list[str]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


def kept(folder: Path, content: str | bytes, **options: object) -> list[bool]:
    (folder / "ids").write_bytes(content.encode() if isinstance(content, str) else content)
    return find_always_keep(Job("-", "-", always_keep=str(folder / "ids"), **options), IDS).tolist()


def avoided(path: Path, content: str | bytes | None = None, **options: object) -> Hashes:
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    found = read_avoided(Job("-", "-", avoid=str(path), **options))
    assert found is not None
    return found


def test_ids_as_lines_or_as_a_column(tmp_path: Path) -> None:
    assert find_always_keep(Job("-", "-"), IDS).tolist() == [False] * 5
    expected = [True, False, True, False, True]
    for content in (
        "0007\na\n",
        b"\xef\xbb\xbf0007\r\n\r\n  a  \r\na",
        "id\n0007\na\n",
        "id,landmark_id\na,1\n0007,x\n",
        gzip.compress(b"a\n0007\n"),
    ):
        assert kept(tmp_path, content) == expected
    assert kept(tmp_path, "photo,x\na,1\n0007,2\n", id_column="photo") == expected
    pq.write_table(pa.table({"id": ["a", "0007"], "label": [1, 2]}), tmp_path / "ids.parquet")
    assert kept(tmp_path, (tmp_path / "ids.parquet").read_bytes()) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("a\nx\ny\n", r"2 of 3 ids are not in the manifest: 'x', 'y'\. \("),
        ("\n".join("uvwxyz") + "\n", r"6 of 6 ids .*: 'u', 'v', 'w', 'x', 'y' \.\.\.\. \(It has no column 'id', so"),
        (
            "photo,label\na,1\n",
            r"2 of 2 ids .*: 'photo,label', 'a,1'\. \(It has no column 'id', so each line was taken",
        ),
        ("id,label\nx,1\n", r"1 of 1 ids are not in the manifest: 'x'$"),
        ("id\n", "holds no id"),
        (parquet_of(photo=["a"]), r"no column 'id'; it has 'photo'\. Give that column, or a text file"),
        (b"a\n\xff\n", "cannot be read: it is not UTF-8"),
    ],
)
def test_ids_that_cannot_be_kept(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        kept(tmp_path, content)
    assert str(caught.value).startswith(f"--always-keep {tmp_path / 'ids'}")


def test_hashes_as_lines_or_as_a_column(tmp_path: Path) -> None:
    assert read_avoided(Job("-", "-")) is None
    one, other = "00000000000000ff", "8000000000000000"
    expected = [[0] * 7 + [255], [128] + [0] * 7]
    for content in (f"{other}\n{one}\n{one}\n", f"{one}\n{other.upper()}", f"id,hash\na,{other}\nb,{one}\n"):
        assert avoided(tmp_path / "hashes", content).tolist() == expected
    pq.write_table(pa.table({"hash": [one, other]}), tmp_path / "hashes.parquet")
    assert avoided(tmp_path / "hashes.parquet").tolist() == expected
    assert avoided(tmp_path / "nine-bits", "1ff\n001\n", hash_size=3).tolist() == [[0, 128], [255, 128]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("hash\n", "holds no hash"),
        ("00000000000000ff\n0f\n", r"hash 2: '0f' is no hash of 64 bits: expected 16 .* as --hash dhash --hash-size 8"),
        ("id,hash\na,00000000000000ff\nb,zz\n", r"hash 2: 'zz' is no hash"),
        (
            "id,label\na,1\n",
            r"hash 1: 'id,label' is no hash .*\. \(It has no column 'hash', so each line was taken",
        ),
        ("id,hash\na,\n", r"column 'hash' is empty in row 1"),
    ],
)
def test_hashes_that_are_none(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        avoided(tmp_path / "hashes", content)
    assert str(caught.value).startswith(f"--avoid {tmp_path / 'hashes'}")


def test_hashes_of_another_run(collection: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = tmp_path / "other"
    ledger = run_on(collection, other, rank_all=True, keep=100).images
    caplog.clear()
    for path in (other, other / "images"):
        found = avoided(path)
        assert {row.tobytes().hex() for row in found} == set(ledger["hash"])
        assert len(found) == ledger["hash"].nunique()
        assert found.dtype == np.uint8
    assert not caplog.records
    avoided(other, decode="exact")
    assert "was hashed with --decode fast" in caplog.text
    for options, message in [
        ({"hash": "phash"}, "that run's --hash is dhash, this one's phash"),
        ({"hash_size": 16}, "that run's --hash-size is 8, this one's 16"),
        ({"exif_orientation": True}, "that run's --exif-orientation is False, this one's True"),
    ]:
        # Its files too, which say by their folder of what kind their hashes are.
        for path in (other, other / "images", other / "reduced.parquet", other / "images" / "part-00000.parquet"):
            with pytest.raises(InputError, match=message):
                avoided(path, **options)
    assert len(avoided(other / "reduced.parquet")) == len(found)
    with pytest.raises(InputError, match="is no run folder"):
        avoided(tmp_path)
    with pytest.raises(InputError, match="No such file"):
        avoided(tmp_path / "nothing")
    summary = other / "summary.json"
    summary.write_text(summary.read_text().replace('"status": "done"', '"status": "stopped"'))
    with pytest.raises(InputError, match="is not finished"):
        avoided(other)
    summary.write_text(summary.read_text().replace('"stopped"', '"done"').replace('"hash": "dhash",', ""))
    with pytest.raises(InputError, match="that run's --hash is None"):  # one of before there was a choice
        avoided(other)


def test_photos_that_another_run_has_not_read_are_told_of(
    collection: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = run_on(collection, tmp_path / "other").images
    unread = int(ledger["hash"].isna().sum())
    assert unread
    avoided(tmp_path / "other")
    assert f"{unread} of its 240 photos have no hash" in caplog.text


def test_a_run_that_avoids_another_keeps_none_of_its_photos(collection: Path, tmp_path: Path) -> None:
    """The test set's photos, found again in the training set under other ids."""
    test = tmp_path / "test.csv"
    lines = (collection / "train.csv").read_text().splitlines()
    test.write_text("\n".join([lines[0], *lines[1:40:3]]) + "\n")
    run_on(collection, tmp_path / "held-out", manifest=str(test), rank_all=True)
    held_out = {line.split(",")[0] for line in lines[1:40:3]}
    job = job_on(collection, tmp_path / "run", avoid=str(tmp_path / "held-out"))
    assert resolve(job).photo_settings.avoid_distance == 6
    result = run_on(collection, tmp_path / "run", avoid=str(tmp_path / "held-out"))
    by_id = result.images.set_index("id")
    assert (by_id.loc[sorted(held_out), "reason"] == "avoided").all()
    assert not held_out & set(result.reduced["id"])
    assert result.summary["reasons"]["avoided"] >= len(held_out)
    # Labels with few photos are read as well: they could hold the test set's.
    assert by_id["hash"].notna().all()
