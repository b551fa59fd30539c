"""Runs on tar shards that are killed, stopped, gone on with or made again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from commands import invoke
from jobs import SERIAL, reduced_files
from killing import killed_before
from s3server import S3Server
from shardjobs import SHARDS, assert_same_rows, csv_of, hashed, rows_of, run_of, summary_of
from tarfiles import md5, packed, shards_read, spoil, tar_of, write_tars

from reducer import ClusterSpec, resume
from reducer.config.settings import Source
from reducer.photos.reader import read_all
from reducer.run.folder.pieces import PieceFiles
from reducer.storage.location import ByteRange


def spoil_done(tars: Path, run: Path) -> int:
    """Make the shards that are done unreadable: who reads one again finds nothing."""
    done = [int(name[5:-8]) for name in hashed(run)]
    for number in done:
        spoil(tars / f"images_{number:03d}.tar")
    return len(done)


@pytest.mark.parametrize(
    ("name", "workers"),
    [("hashes/part-00003.parquet", 0), ("hashes/part-00002.parquet", 2), ("images/part-00000.parquet", 0)],
    ids=["among the shards", "among the shards, with workers", "between hashing and ranking"],
)
def test_a_client_that_is_killed_goes_on_by_the_shard(
    tars: Path, tiny: Path, whole: Path, tmp_path: Path, name: str, workers: int
) -> None:
    run = tmp_path / "run"
    arguments = [tars, "--manifest", tiny / "train.csv", "--output", run, "--keep", 8, "--partition-images", 60]
    assert killed_before(name, 1, "run", *arguments, "--workers", workers, "--quiet")
    done = spoil_done(tars, run)
    assert done == SHARDS if name.startswith("images") else 0 <= done < SHARDS
    code, out, _ = invoke("status", run)
    assert code == 0
    assert f"{done} of {SHARDS} shards read, 0 of " in out
    assert "ended without a word (killed?)" in out
    with shards_read() as read:
        code, _, err = invoke("resume", run, "--workers", 0, "--quiet")
    assert code == 0, err
    assert len(read) == SHARDS - done
    assert reduced_files(run) == reduced_files(whole)
    summary, undisturbed = summary_of(run), summary_of(whole)
    for what in ("status", "reasons", "quality", "photos_read", "photos_failed", "bytes_read"):
        assert summary[what] == undisturbed[what], what
    assert summary["shards"]["damaged"] == {}
    assert summary["shards"]["members"] == 240


#: Ends the process that looks at the n-th photo, the first time that any does so.
DIES_ONCE = """
import os, signal
from PIL import Image
left = int(os.environ["DIES_AFTER"])
def counting(*arguments, **options):
    global left
    left -= 1
    if left == 0:
        try:
            os.close(os.open(os.environ["DIED"], os.O_CREAT | os.O_EXCL))
            os.kill(os.getpid(), signal.SIGKILL)
        except FileExistsError:
            pass
    return open_photo(*arguments, **options)
open_photo, Image.open = Image.open, counting
"""


def test_a_worker_that_is_killed_in_the_middle_of_a_shard_costs_nothing(
    tars: Path, tiny: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "once").mkdir()
    (tmp_path / "once" / "sitecustomize.py").write_text(DIES_ONCE)
    for name, value in {"PYTHONPATH": tmp_path / "once", "DIES_AFTER": 40, "DIED": tmp_path / "died"}.items():
        monkeypatch.setenv(name, str(value))
    run_of(tars, tmp_path / "run", tiny / "train.csv", ClusterSpec(workers=2), max_failures=0.0)
    assert (tmp_path / "died").exists()
    assert reduced_files(tmp_path / "run") == reduced_files(whole)
    for name in ("photos_read", "photos_failed", "bytes_read", "quality"):
        assert summary_of(tmp_path / "run")[name] == summary_of(whole)[name], name


def stopping_at(monkeypatch: pytest.MonkeyPatch, pieces: int) -> None:
    """Ctrl-C when so many shards or pieces are done."""
    real = PieceFiles.write
    written: list[int] = []

    def write_piece(files: PieceFiles, number: int, *rest: Any) -> None:
        if len(written) == pieces:
            raise KeyboardInterrupt
        written.append(number)
        real(files, number, *rest)

    monkeypatch.setattr(PieceFiles, "write", write_piece)


def test_ctrl_c_among_the_shards(
    tars: Path, tiny: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopping_at(monkeypatch, 2)
    run = tmp_path / "run"
    arguments = [tars, "--manifest", tiny / "train.csv", "--output", run, "--keep", 8, "--workers", 0, "--quiet"]
    code, _, err = invoke("run", *arguments)
    assert code == 130
    done = sum(pd.read_parquet(run / "hashes" / name)["hash"].count() for name in hashed(run))
    assert f"The photos hashed so far ({done} of 216) are kept" in err
    monkeypatch.undo()
    out = invoke("status", run)[1]
    assert f"done:       {done} of 216 photos, 2 of 6 shards read, 0 of " in out
    assert spoil_done(tars, run) == 2
    assert invoke("resume", run, "--workers", 0, "--quiet") == (0, "", "")
    assert reduced_files(run) == reduced_files(whole)
    assert summary_of(run)["photos_read_this_time"] == 216 - done


def test_a_shard_that_changes_before_it_is_read_stops_a_resume(
    tars: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopping_at(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        run_of(tars, tmp_path / "run", tiny / "train.csv")
    monkeypatch.undo()
    for act in (lambda path: os.utime(path, ns=(1, 1)), Path.unlink):
        act(tars / "images_004.tar")
        code, _, err = invoke("resume", tmp_path / "run", "--workers", 2)
        assert code == 2
        assert f"1 of 6 shards gone, or not what they were when the run in {tmp_path / 'run'} began" in err
        assert str(tars / "images_004.tar") in err
    assert len(hashed(tmp_path / "run")) == 2


AGAIN = [{"keep": 4}, {"keep": 20}, {"strategy": "facility-location", "rank_all": True}, {"candidates": 12}]


@pytest.mark.parametrize("given", AGAIN, ids=str)
def test_another_run_reads_no_shard_again(tars: Path, tiny: Path, tmp_path: Path, given: dict[str, Any]) -> None:
    run_of(tars, tmp_path / "first", tiny / "train.csv", candidates=30)
    settings = {"candidates": 30, **given}
    run_of(tars, tmp_path / "fresh", tiny / "train.csv", **settings)
    with shards_read() as read:
        again = run_of(tars, tmp_path / "again", tiny / "train.csv", reuse=str(tmp_path / "first"), **settings)
    assert read == []
    assert reduced_files(tmp_path / "again") == reduced_files(tmp_path / "fresh")
    assert_same_rows(tmp_path / "again", tmp_path / "fresh")
    before, now = rows_of(tmp_path / "first"), rows_of(tmp_path / "fresh")
    new = (now["hash"].notna() & before["hash"].isna()).sum()
    assert (again.summary["photos_read"], again.summary["photos_failed"]) == (new, 0)
    assert again.summary["photos_reused"] == now["hash"].notna().sum() - new


def repack(tars: Path, name: str, photos: dict[str, bytes]) -> None:
    """Other bytes for some of a shard's photos, elsewhere in it."""
    members = packed(photos, SHARDS)[name]
    others = list(photos.values())
    changed = [(path, others[n] if n % 4 == 0 else content) for n, (path, content) in enumerate(members)]
    (tars / name).write_bytes(tar_of([("README.txt", b"new"), *changed[::-1]]))


def test_a_shard_that_has_changed_is_read_again_and_no_other(
    tars: Path, tiny: Path, photos: dict[str, bytes], tmp_path: Path
) -> None:
    run_of(tars, tmp_path / "first", tiny / "train.csv")
    repack(tars, "images_003.tar", photos)
    run_of(tars, tmp_path / "fresh", tiny / "train.csv", keep=6, strategy="pairs")
    assert csv_of(tmp_path / "fresh") != csv_of(tmp_path / "first")
    given: dict[str, Any] = {"keep": 6, "strategy": "pairs", "reuse": str(tmp_path / "first")}
    again = run_of(tars, tmp_path / "again", tiny / "train.csv", **given)
    assert reduced_files(tmp_path / "again") == reduced_files(tmp_path / "fresh")
    assert_same_rows(tmp_path / "again", tmp_path / "fresh")
    rows = rows_of(tmp_path / "again")
    small = rows_of(tmp_path / "first")["hash"].isna()
    own = rows["hash"].notna() & (rows["shard"].str.endswith("images_003.tar") | small)
    assert again.summary["photos_read"] == own.sum()
    # What was known is taken over, so that the run stands alone.
    assert hashed(tmp_path / "again") == hashed(tmp_path / "fresh")


def test_a_new_shard_alone_is_read(tars: Path, tiny: Path, single: Path, tmp_path: Path) -> None:
    late = (tars / "images_005.tar").rename(tmp_path / "late")
    run_of(tars, tmp_path / "first", tiny / "train.csv", max_failures=1.0)
    late.rename(tars / "images_005.tar")
    with shards_read() as read:
        run_of(tars, tmp_path / "again", tiny / "train.csv", reuse=str(tmp_path / "first"))
    assert csv_of(tmp_path / "again") == csv_of(single)
    assert read == ["images_005.tar"]


@pytest.mark.parametrize("kind", ["missing", "broken"])
def test_a_photo_that_failed_costs_another_run_no_shard(
    photos: dict[str, bytes], tiny: Path, single: Path, tmp_path: Path, kind: str
) -> None:
    """Shards that are as they were hold it no more than they did."""
    name = rows_of(single).query("rank == 0").index[0]
    others = {key: content for key, content in photos.items() if key != name}
    content = {} if kind == "missing" else {name: b"broken"}
    tars = write_tars(tmp_path / "tars", packed(others | content, SHARDS))
    run_of(tars, tmp_path / "first", tiny / "train.csv")
    run_of(tars, tmp_path / "fresh", tiny / "train.csv", keep=9)
    with shards_read() as read:
        run_of(tars, tmp_path / "again", tiny / "train.csv", keep=9, reuse=str(tmp_path / "first"))
    assert reduced_files(tmp_path / "again") == reduced_files(tmp_path / "fresh")
    assert rows_of(tmp_path / "again")["error"].equals(rows_of(tmp_path / "fresh")["error"])
    assert read == []


def test_what_a_run_had_hashed_before_it_was_stopped_is_taken(
    tars: Path, tiny: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopping_at(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        run_of(tars, tmp_path / "first", tiny / "train.csv")
    monkeypatch.undo()
    with shards_read() as read:
        run_of(tars, tmp_path / "again", tiny / "train.csv", reuse=str(tmp_path / "first"))
    assert reduced_files(tmp_path / "again") == reduced_files(whole)
    assert len(read) == SHARDS - 2


@pytest.mark.parametrize("workers", [0, 2])
def test_labels_that_were_kept_whole_are_read_by_range_later(
    tars: Path, tiny: Path, tmp_path: Path, workers: int
) -> None:
    run, every = tmp_path / "run", tmp_path / "every"
    run_of(tars, every, tiny / "train.csv", rank_all=True)
    run_of(tars, run, tiny / "train.csv")
    small = rows_of(run).query("reason == 'kept-small-label'")
    assert len(small) == 24
    assert small["hash"].isna().all()
    for path in sorted(tars.iterdir()):
        own = small[small["shard"] == str(path)]
        spoil(path, zip(own["offset"], own["bytes"], strict=True))
    with shards_read() as read:
        result = resume(run, ClusterSpec(workers=workers), rank_all=True, progress=False)
    assert read == []
    assert result.summary["photos_read_this_time"] == 24
    assert reduced_files(run) == reduced_files(every)
    assert_same_rows(run, every)
    for name in ("quality", "reasons", "photos_read", "photos_failed", "bytes_read"):
        assert result.summary[name] == summary_of(every)[name], name


# Shards that change, and what earlier runs tell of them


def test_a_shard_that_was_packed_anew_gives_no_photo_by_its_old_place(
    tars: Path, tiny: Path, photos: dict[str, bytes], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run_of(tars, run, tiny / "train.csv", keep=30)
    members = packed(photos, SHARDS)["images_002.tar"]
    (tars / "images_002.tar").write_bytes(tar_of(members[::-1]))  # of the same size
    code, _, err = invoke("resume", run, "--rank-all", "--workers", 0)
    assert code == 2
    assert f"1 of 6 shards gone, or not what they were when the run in {run} began: {tars}/images_002.tar" in err
    assert "--retry-failed reads them anew" in err
    resume(run, SERIAL, retry_failed=True, rank_all=True, progress=False)
    run_of(tars, tmp_path / "fresh", tiny / "train.csv", keep=30, rank_all=True)
    assert_same_rows(run, tmp_path / "fresh")


def test_a_photo_is_read_only_from_the_shard_that_it_was_found_in(
    tars: Path, s3: S3Server, photos: dict[str, bytes], tmp_path: Path
) -> None:
    path = tars / "images_000.tar"
    state = path.stat()
    s3.make_bucket("changing")
    answer = s3.client().put_object(Bucket="changing", Key="a.tar", Body=path.read_bytes())
    etag, url = answer["ETag"].strip('"'), "s3://changing/a.tar"
    good = [ByteRange(str(path), 512, 9, state.st_mtime_ns), ByteRange(url, 512, 9, None, etag)]
    late = [ByteRange(str(path), 512, 9, state.st_mtime_ns - 1), ByteRange(url, 512, 9, None, "another")]
    for reader in ("s3fs", "obstore"):
        source = Source(s3.options(), reader)
        contents = [file.content for file in read_all(good, source, max_pixels=10**6)]
        assert contents == [path.read_bytes()[512:521]] * 2
        for error in read_all(late, source, max_pixels=10**6):
            assert str(error).startswith("changed: ")


@pytest.mark.parametrize("how", ["a photo", "its sum"])
def test_a_sound_shard_that_is_mended_is_read_again(
    tars: Path, tiny: Path, photos: dict[str, bytes], tmp_path: Path, how: str
) -> None:
    """Whose photos had another content, or one of them none."""
    run, path = tmp_path / "run", tars / "images_001.tar"
    right, others = path.read_bytes(), packed(photos, SHARDS)["images_002.tar"]
    names = [name for name, _ in packed(photos, SHARDS)["images_001.tar"]]
    wrong = [(name, b"broken" if how == "a photo" and n == 3 else others[n][1]) for n, name in enumerate(names)]
    given: dict[str, Any] = {"rank_all": True}
    if how == "its sum":
        sums = "".join(f"{md5(shard.read_bytes())}  {shard.name}\n" for shard in sorted(tars.iterdir()))
        (tmp_path / "sums").write_text(sums)
        given |= {"md5": str(tmp_path / "sums"), "md5_warn": True}
    path.write_bytes(tar_of(wrong))
    run_of(tars, run, tiny / "train.csv", **given)
    path.write_bytes(right)
    with shards_read() as read:
        result = resume(run, SERIAL, retry_failed=True, progress=False)
    assert read == ["images_001.tar"]
    assert result.summary["shards"]["wrong_md5"] == []
    run_of(tars, tmp_path / "fresh", tiny / "train.csv", **given)
    assert reduced_files(run) == reduced_files(tmp_path / "fresh")
    assert_same_rows(run, tmp_path / "fresh")


def test_photos_that_were_taken_with_a_warning_are_not_taken_over(tars: Path, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "sums").write_text("".join(f"{'0' * 32}  {shard.name}\n" for shard in tars.iterdir()))
    given: dict[str, Any] = {"md5": str(tmp_path / "sums"), "max_failures": 1.0}
    run_of(tars, tmp_path / "first", tiny / "train.csv", md5_warn=True, **given)
    again = run_of(tars, tmp_path / "again", tiny / "train.csv", reuse=str(tmp_path / "first"), **given)
    assert again.summary["reasons"] == {"failed": 240}


def test_a_run_that_took_shards_over_stands_alone(tars: Path, tiny: Path, tmp_path: Path) -> None:
    run_of(tars, tmp_path / "first", tiny / "train.csv")
    given = {"keep": 30, "reuse": str(tmp_path / "first")}
    run_of(tars, tmp_path / "again", tiny / "train.csv", **given)
    (tmp_path / "first").rename(tmp_path / "elsewhere")
    for path in (tmp_path / "again" / "images").iterdir():
        path.unlink()
    with shards_read() as read:
        resume(tmp_path / "again", SERIAL, rank_all=True, progress=False)
    assert read == []
    run_of(tars, tmp_path / "fresh", tiny / "train.csv", keep=30, rank_all=True)
    assert_same_rows(tmp_path / "again", tmp_path / "fresh")
