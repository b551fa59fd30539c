"""Jobs on tar shards: what they give is what single files give, whatever becomes of the shards or the run."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import reduced_files, run_on
from faultproxy import FaultProxy
from s3server import S3Server
from tarfiles import (
    BLOCK,
    link_to,
    md5,
    packed,
    photos_below,
    shards_read,
    spoil,
    tar_of,
    thumbnail,
    write_tars,
)
from test_cli import invoke
from test_deaths import killer_env
from test_s3 import flags, options

from reducer import ClusterSpec, Job, reduce_images, resume
from reducer.printing import as_size
from reducer.store import RunFolder

SERIAL = ClusterSpec(workers=0)
SHARDS = 6


def run_of(images: Path | str, output: Path, manifest: Path | str | None, spec: ClusterSpec = SERIAL, **others: Any):
    settings: dict[str, Any] = {"keep": 8, "manifest": None if manifest is None else str(manifest), **others}
    return reduce_images(Job(str(images), str(output), **settings), spec, progress=False)


def rows_of(run: Path) -> pd.DataFrame:
    """The ledger by id."""
    return RunFolder(str(run)).ledger().to_pandas().set_index("id")


def summary_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return found


def hashed(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "hashes").glob("part-*.parquet"))


def csv_of(run: Path) -> bytes:
    return (run / "reduced.csv").read_bytes()


def manifest_of(path: Path, rows: list[tuple[str, str]], *more: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["id,landmark_id", *(f"{name},{label}" for name, label in rows), *more]) + "\n")
    return path


@pytest.fixture(scope="session")
def tiny(collection: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The collection in thumbnails: train/, train.csv. Hashing them takes next to no time."""
    folder = tmp_path_factory.mktemp("tiny")
    for path in (collection / "train").rglob("*.jpg"):
        target = folder / path.relative_to(collection)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(thumbnail(path.read_bytes()))
    (folder / "train.csv").write_bytes((collection / "train.csv").read_bytes())
    return folder


@pytest.fixture(scope="session")
def photos(tiny: Path) -> dict[str, bytes]:
    return photos_below(tiny / "train")


@pytest.fixture(scope="session")
def labels(tiny: Path) -> dict[str, str]:
    """Labels by id."""
    table = pd.read_csv(tiny / "train.csv", dtype=str)
    return dict(zip(table["id"], table["landmark_id"], strict=True))


@pytest.fixture(scope="session")
def single(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the thumbnails as single files."""
    run = tmp_path_factory.mktemp("single") / "run"
    run_on(tiny, run)
    return run


@pytest.fixture
def tars(photos: dict[str, bytes], tmp_path: Path) -> Path:
    """The thumbnails in six tars, of this test's own."""
    return write_tars(tmp_path / "tars", packed(photos, SHARDS))


@pytest.fixture(scope="session")
def whole(photos: dict[str, bytes], tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on such tars that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    run_of(write_tars(folder / "tars", packed(photos, SHARDS)), folder / "run", tiny / "train.csv")
    return folder / "run"


@pytest.fixture
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test that starts one."""

    def connect(_: object) -> None:
        raise AssertionError("a cluster was started")

    monkeypatch.setattr("reducer.job.connect", connect)


# The same results as from single files


@pytest.fixture(scope="session")
def big(collection: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The collection, as it is, in three tars of some 9 MB: several requests each."""
    return write_tars(tmp_path_factory.mktemp("big"), packed(photos_below(collection / "train"), 3, 1))


@pytest.fixture(scope="session")
def big_run(big: Path, collection: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("big") / "run"
    run_of(big, run, collection / "train.csv")
    return run


@pytest.fixture(scope="session")
def of_files(collection: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("files") / "run"
    run_on(collection, run)
    return run


def but_for_the_place(run: Path) -> pd.DataFrame:
    rows = rows_of(run).drop(columns=["mtime", "etag"])
    return rows.assign(shard=rows["shard"].str.rpartition("/")[2])


@pytest.mark.parametrize(("form", "workers"), [("glob", 0), ("folder", 1), ("glob", 3)])
def test_tars_give_what_single_files_give(
    big: Path, big_run: Path, of_files: Path, collection: Path, tmp_path: Path, form: str, workers: int
) -> None:
    images = big if form == "folder" else f"{big}/*.tar"
    run_of(images, tmp_path / "run", collection / "train.csv", ClusterSpec(workers=workers))
    assert csv_of(tmp_path / "run") == csv_of(of_files)
    assert_same_rows(tmp_path / "run", big_run)
    summaries = [summary_of(run) for run in (tmp_path / "run", of_files)]
    for name in ("quality", "reasons", "photos_read", "bytes_read", "photos_kept", "manifest", "photos"):
        assert summaries[0][name] == summaries[1][name], name


def assert_same_rows(run: Path, other: Path) -> None:
    pd.testing.assert_frame_equal(but_for_the_place(run), but_for_the_place(other))


def test_the_ledger_says_where_each_photo_lies(big_run: Path, of_files: Path, collection: Path) -> None:
    rows, files = rows_of(big_run), rows_of(of_files)
    assert len(rows) == 240
    assert (rows["reason"] == "kept-small-label").any()  # kept unread
    contents = photos_below(collection / "train")
    for name, row in rows.iterrows():
        with open(row["shard"], "rb") as file:
            file.seek(row["offset"])
            assert file.read(row["bytes"]) == contents[name]
        assert row["path"] == f"{name[0]}/{name[1]}/{name[2]}/{name}.jpg"
        assert row["mtime"].value == os.stat(row["shard"]).st_mtime_ns
    for column in ("label", "hash", "rank", "kept", "reason", "nearest_kept", "insertion_distance", "width", "format"):
        assert rows[column].equals(files[column]), column


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(s3.endpoint) as started:
        yield started


@pytest.fixture(scope="session")
def big_bucket(s3: S3Server, big: Path) -> str:
    s3.make_bucket("bigtars")
    s3.upload_folder(big, "bigtars", "train/")
    return "bigtars"


@pytest.mark.parametrize("reader", ["s3fs", "obstore"])
def test_a_bucket_gives_what_a_folder_of_tars_gives(
    s3: S3Server, big_bucket: str, proxy: FaultProxy, big_run: Path, of_files: Path, tmp_path: Path, reader: str
) -> None:
    pytest.importorskip(reader)
    opened: dict[str, Any] = {"storage_options": options(s3, endpoint_url=proxy.endpoint), "reader": reader}
    images = f"s3://{big_bucket}/train/images_*.tar" if reader == "s3fs" else f"s3://{big_bucket}/train"
    manifest = {"manifest_storage_options": options(s3)}
    run_of(images, tmp_path / "run", "s3://trial/train.csv", **opened, **manifest)
    assert csv_of(tmp_path / "run") == csv_of(of_files)
    assert_same_rows(tmp_path / "run", big_run)
    # Once each, in large parts: 28 MB are seven requests of 4 MiB and three rests.
    paths = [path.partition("?")[0] for method, path, _ in proxy.log if method == "GET"]
    asked = Counter(path for path in paths if path.endswith(".tar"))
    assert len(asked) == 3
    assert set(asked.values()) == {3}
    rows, client = rows_of(tmp_path / "run"), s3.client()
    contents = photos_below_of(big_run)
    for name, row in rows.iloc[::12].iterrows():
        bucket, _, key = row["shard"].removeprefix("s3://").partition("/")
        part = f"bytes={row['offset']}-{row['offset'] + row['bytes'] - 1}"
        answer = client.get_object(Bucket=bucket, Key=key, Range=part)
        assert answer["Body"].read() == contents[name]
        assert row["etag"] == answer["ETag"].strip('"')


def photos_below_of(run: Path) -> dict[str, bytes]:
    """Photos by id, from where a local run says that they are."""
    shards = {shard: Path(shard).read_bytes() for shard in rows_of(run)["shard"].unique()}
    return {
        name: shards[row["shard"]][row["offset"] : row["offset"] + row["bytes"]]
        for name, row in rows_of(run).iterrows()
    }


def test_any_packing_gives_the_same(photos: dict[str, bytes], tiny: Path, single: Path, tmp_path: Path) -> None:
    layouts: list[Callable[[str], str]] = [lambda key: f"{key}.JPG", lambda key: f"./deep/{key}.jpeg", lambda key: key]
    for number, (shards, named) in enumerate(zip((1, 7, 40), layouts, strict=True)):
        folder = write_tars(tmp_path / str(number), packed(photos, shards, number, named))
        run_of(folder, tmp_path / f"run{number}", tiny / "train.csv", partition_images=50)
        assert csv_of(tmp_path / f"run{number}") == csv_of(single)
        assert summary_of(tmp_path / f"run{number}")["shards"]["shards_read"] == shards
        assert len(hashed(tmp_path / f"run{number}")) == shards


@pytest.mark.parametrize("given", [{"strategy": "pairs"}, {"total": 60, "keep": None}, {"candidates": 20, "keep": 5}])
def test_options_mean_the_same(tars: Path, tiny: Path, tmp_path: Path, given: dict[str, Any]) -> None:
    run_on(tiny, tmp_path / "files", **given)
    run_of(tars, tmp_path / "run", tiny / "train.csv", **given)
    assert csv_of(tmp_path / "run") == csv_of(tmp_path / "files")


# A replica of GLDv2's bucket


@pytest.fixture(scope="session")
def replica(s3: S3Server, photos: dict[str, bytes], labels: dict[str, str]) -> str:
    """Members that are not in train_clean.csv, too: every fifth photo."""
    bucket = "google-landmarks"
    s3.make_bucket(bucket)
    client = s3.client()
    for name, members in packed(photos, SHARDS).items():
        content = tar_of(members)
        stem = name.removesuffix(".tar")
        client.put_object(Bucket=bucket, Key=f"train/{name}", Body=content)
        line = f"{md5(content)}  {name}\n".encode()
        client.put_object(Bucket=bucket, Key=f"md5sum/train/md5.{stem}.txt", Body=line)
    rows = "\n".join(["id,url,landmark_id", *(f"{name},http://x/{name},{label}" for name, label in labels.items())])
    client.put_object(Bucket=bucket, Key="metadata/train.csv", Body=f"{rows}\n".encode())
    client.put_object(Bucket=bucket, Key="metadata/train_clean.csv", Body=clean_of(labels).encode())
    return bucket


def clean_of(labels: dict[str, str]) -> str:
    by_label: dict[str, list[str]] = {}
    for number, (name, label) in enumerate(labels.items()):
        if number % 5:
            by_label.setdefault(label, []).append(name)
    return "\n".join(["landmark_id,images", *(f"{label},{' '.join(ids)}" for label, ids in by_label.items())]) + "\n"


@pytest.fixture(scope="session")
def clean_run(tiny: Path, labels: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the single files of train_clean.csv."""
    folder = tmp_path_factory.mktemp("clean")
    (folder / "train_clean.csv").write_text(clean_of(labels))
    run_on(tiny, folder / "run", keep=25, manifest=str(folder / "train_clean.csv"))
    return folder / "run"


def one_liner(s3: S3Server, bucket: str, run: Path) -> list[object]:
    given: list[object] = [f"s3://{bucket}/train/images_*.tar", "--manifest"]
    given += [f"s3://{bucket}/metadata/train_clean.csv", *flags(options(s3))]
    return [*given, *flags(options(s3), "--manifest-storage-option"), "--output", run]


def test_the_one_liner(s3: S3Server, replica: str, clean_run: Path, tmp_path: Path) -> None:
    code, out, err = invoke("run", *one_liner(s3, replica, tmp_path / "run"))
    assert code == 0, err
    assert csv_of(tmp_path / "run") == csv_of(clean_run)
    assert "of 192 photos, 12 labels" in out
    shards = summary_of(tmp_path / "run")["shards"]
    assert (shards["shards"], shards["shards_read"], shards["members"]) == (SHARDS, SHARDS, 240)
    assert (shards["damaged"], shards["wrong_md5"], shards["skipped"]) == ({}, [], {})


def test_published_sums_are_checked(s3: S3Server, replica: str, clean_run: Path, tmp_path: Path) -> None:
    arguments = one_liner(s3, replica, tmp_path / "run")
    code, _, err = invoke("run", *arguments, "--workers", 0, "--md5", f"s3://{replica}/md5sum/train")
    assert (code, csv_of(tmp_path / "run")) == (0, csv_of(clean_run)), err
    assert summary_of(tmp_path / "run")["shards"]["wrong_md5"] == []


@pytest.fixture
def wrong_sum(s3: S3Server, replica: str) -> Iterator[Callable[[], None]]:
    """The sum of images_002.tar is wrong until it is mended, here or by the test."""
    client, where = s3.client(), {"Bucket": replica, "Key": "md5sum/train/md5.images_002.txt"}
    right = client.get_object(**where)["Body"].read()
    client.put_object(**where, Body=b"0" * 32 + right[32:])

    def mend() -> None:
        client.put_object(**where, Body=right)

    yield mend
    mend()


def test_photos_of_a_shard_with_another_sum_fail(
    s3: S3Server, replica: str, clean_run: Path, wrong_sum: Callable[[], None], tmp_path: Path
) -> None:
    run, shard = tmp_path / "run", f"s3://{replica}/train/images_002.tar"
    arguments = [*one_liner(s3, replica, run), "--workers", 0, "--quiet"]
    code, _, err = invoke("run", *arguments, "--md5", f"s3://{replica}/md5sum/train")
    assert code == 3
    assert "have failed, over --max-failures 0.1" in err
    assert shard in err
    rows, files = rows_of(run), rows_of(clean_run)
    failed = rows[rows["reason"] == "failed"]
    assert len(failed) > 20
    assert set(failed["shard"]) == {shard}
    assert (rows["shard"] == shard).sum() == len(failed)
    assert failed["error"].str.startswith(f"wrong md5: of its shard {shard}: it has ").all()
    assert not failed["kept"].any()
    good = rows.index[rows["reason"] != "failed"]
    assert rows.loc[good, "hash"].equals(files.loc[good, "hash"])
    assert summary_of(run)["shards"]["wrong_md5"] == [shard]
    assert summary_of(run)["failures"] == {"wrong md5": len(failed)}
    # The next place to look for it is the report that a person sees.
    code, out, _ = invoke("resume", run, *flags(options(s3)), *flags(options(s3), "--manifest-storage-option"))
    assert (code, f"MD5 sum than the published one: 1: {shard}\n" in out) == (3, True)
    wrong_sum()
    arguments = [*flags(options(s3)), *flags(options(s3), "--manifest-storage-option"), "--workers", 0, "--quiet"]
    code, _, err = invoke("resume", run, "--retry-failed", *arguments)
    assert code == 0, err
    assert csv_of(run) == csv_of(clean_run)
    assert summary_of(run)["shards"]["wrong_md5"] == []


def test_another_sum_may_be_a_warning(
    s3: S3Server,
    replica: str,
    clean_run: Path,
    wrong_sum: Callable[[], None],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    arguments = one_liner(s3, replica, tmp_path / "run")
    code, out, _ = invoke("run", *arguments, "--workers", 0, "--md5", f"s3://{replica}/md5sum/train", "--md5-warn")
    assert (code, csv_of(tmp_path / "run")) == (0, csv_of(clean_run))
    shard = f"s3://{replica}/train/images_002.tar"
    assert f"shard {shard} has the MD5 sum " in caplog.text
    assert "are taken all the same (--md5-warn)" in caplog.text
    assert f"1: {shard}\n" in out
    assert (rows_of(tmp_path / "run")["reason"] == "failed").sum() == 0


def test_sums_that_do_not_fit_are_told_before_the_start(
    tars: Path, tiny: Path, tmp_path: Path, no_cluster: None
) -> None:
    lines = [f"{md5(path.read_bytes())} *{path.name}" for path in sorted(tars.iterdir())]
    sums = tmp_path / "sums"
    (sums / "empty").mkdir(parents=True)
    (sums / "few.txt").write_text("\n".join(lines[1:]) + "\n")
    (sums / "odd.txt").write_text("\n".join([*lines, "not a sum"]) + "\n")
    for given, message in (
        ("nowhere", "No such file or directory"),
        ("few.txt", f"has no sum of 1 of 6 shards: {tars}/images_000.tar"),
        ("odd.txt", "holds 'not a sum': expected what md5sum writes"),
        ("empty", "holds no file that ends in .txt or .md5"),
    ):
        arguments = [tars, "--manifest", tiny / "train.csv", "--output", tmp_path / "run", "--md5", sums / given]
        code, out, err = invoke("run", *arguments)
        assert (code, out) == (2, "")
        assert f"--md5 {sums / given}" in err
        assert message in err
        assert not (tmp_path / "run").exists()


def test_sums_in_one_file_as_md5sum_writes_it(tars: Path, tiny: Path, whole: Path, tmp_path: Path) -> None:
    done = subprocess.run(["md5sum", *sorted(tars.iterdir())], capture_output=True, check=True)
    (tmp_path / "sums").write_bytes(done.stdout)
    run_of(tars, tmp_path / "run", tiny / "train.csv", md5=str(tmp_path / "sums"))
    assert reduced_files(tmp_path / "run") == reduced_files(whole)
    assert summary_of(tmp_path / "run")["shards"]["wrong_md5"] == []


# Runs that are killed, stopped or made again

#: Ends the process, as kill -9 would, before a file is put in its place for the n-th time.
KILLED_BEFORE = """
import os, pathlib, signal, sys
name, left = sys.argv.pop(1), int(sys.argv.pop(1))
real = pathlib.Path.replace
def replace(path, target):
    global left
    left -= str(target).endswith(name)
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(path, target)
pathlib.Path.replace = replace
from reducer.cli import main
main(sys.argv[1:])
"""


def killed_before(name: str, time: int, *arguments: object) -> None:
    given = [str(argument) for argument in (name, time, *arguments)]
    process = subprocess.run([sys.executable, "-c", KILLED_BEFORE, *given], check=False, capture_output=True)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()


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
    killed_before(name, 1, "run", *arguments, "--workers", workers, "--quiet")
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
def accept(prefix):
    global left
    left -= 1
    if left == 0:
        try:
            os.close(os.open(os.environ["DIED"], os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        os.kill(os.getpid(), signal.SIGKILL)
    return False
Image.register_open("DIES", lambda *_: None, accept)
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
    real = RunFolder.write_piece
    written: list[int] = []

    def write_piece(folder: RunFolder, number: int, *rest: Any) -> None:
        if len(written) == pieces:
            raise KeyboardInterrupt
        written.append(number)
        real(folder, number, *rest)

    monkeypatch.setattr(RunFolder, "write_piece", write_piece)


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


# Damaged shards

#: The shard that is damaged, and the member at which that happens: the 20th of its 40.
BAD, AT = "images_002.tar", 20


def cut_in_a_photo(shard: bytes, offset: int, size: int) -> bytes:
    return shard[: offset + size // 2]


def cut_at_a_member(shard: bytes, offset: int, size: int) -> bytes:
    return shard[: offset - BLOCK]


def header_garbage(shard: bytes, offset: int, size: int) -> bytes:
    return shard[: offset - BLOCK] + b"\x5a" * BLOCK + shard[offset:]


def empty(shard: bytes, offset: int, size: int) -> bytes:
    return b""


def not_a_tar(shard: bytes, offset: int, size: int) -> bytes:
    return b"id,landmark_id\n" * 10_000


def gzipped(shard: bytes, offset: int, size: int) -> bytes:
    return gzip.compress(shard)


def zeros_in_the_middle(shard: bytes, offset: int, size: int) -> bytes:
    return shard[: offset - BLOCK] + bytes(8 * BLOCK) + shard[offset + 7 * BLOCK :]


def bits_of_one_photo(shard: bytes, offset: int, size: int) -> bytes:
    return shard[:offset] + bytes(byte ^ 0xFF for byte in shard[offset : offset + size]) + shard[offset + size :]


def no_end_marker(shard: bytes, offset: int, size: int) -> bytes:
    return shard[: -(-len(shard.rstrip(b"\0")) // BLOCK) * BLOCK]


#: The damage; what is said; whether photos before it, the photo at it and those behind it are had; how these fail.
DAMAGE: dict[str, tuple[Callable[[bytes, int, int], bytes] | None, str, str, str]] = {
    "cut in a photo": (cut_in_a_photo, "it is cut off at byte ", "+--", "cut off"),
    "cut at a member": (cut_at_a_member, "without an end-of-archive marker (cut off?)", "+--", "missing"),
    "header garbage": (header_garbage, "the header at byte ", "+--", "missing"),
    "empty": (empty, "it is empty", "---", "missing"),
    "not a tar": (not_a_tar, "it is no tar: there is no sound header at byte 0", "---", "missing"),
    "gzip": (gzipped, "it is compressed (gzip): unpack it first", "---", "missing"),
    "zeros in the middle": (zeros_in_the_middle, "there are more data behind the end-of-archive", "+--", "missing"),
    "bits of one photo": (bits_of_one_photo, "", "+-+", "not an image"),
    "no end marker": (no_end_marker, "without an end-of-archive marker (cut off?)", "+++", ""),
    "gone": (None, "missing: no such file", "---", "missing"),
    "replaced": (None, "is not what it was when the run began", "---", "missing"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_shard_gives_what_it_holds_and_the_job_goes_on(
    tars: Path,
    tiny: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: str,
) -> None:
    run, path = tmp_path / "run", tars / BAD
    good = rows_of(whole)
    own = good[good["shard"].str.endswith(BAD)].sort_values("offset")
    shard, state = path.read_bytes(), path.stat()
    damage, said, had, how = DAMAGE[kind]
    if damage is not None:
        path.write_bytes(damage(shard, *own[["offset", "bytes"]].iloc[AT].tolist()))
    else:  # when it was listed, and before it is read
        real = RunFolder.write_plan

        def write_plan(*arguments: Any) -> None:
            real(*arguments)
            if kind == "gone":
                path.unlink()
            else:
                path.write_bytes(tar_of([("other.jpg", b"another tar")]))

        monkeypatch.setattr(RunFolder, "write_plan", write_plan)
    result = run_of(tars, run, tiny / "train.csv", max_failures=1.0)
    monkeypatch.undo()

    damaged = result.summary["shards"]["damaged"]
    if said:
        assert list(damaged) == [str(path)]
        assert said in damaged[str(path)]
        assert f"shard {path}: {damaged[str(path)]}" in caplog.text
    else:
        assert damaged == {}
    rows = rows_of(run)
    others = good.index[~good.index.isin(own.index)]
    for part, names in zip(had, (own.index[:AT], own.index[AT : AT + 1], own.index[AT + 1 :]), strict=True):
        if part == "+":
            others = others.append(names)
        else:
            # Also those of labels that are kept whole, but for what is wrong with a photo that nobody has read.
            lost = rows.loc[names][(kind != "bits of one photo") | good.loc[names, "hash"].notna()]
            assert (lost["reason"] == "failed").all()
            assert not lost["kept"].any()
            assert lost["error"].str.startswith(("missing: no shard holds it", f"{how}: ")).all()
    same = ["hash", "offset", "bytes"]
    pd.testing.assert_frame_equal(rows.loc[others, same], good.loc[others, same], check_dtype=False)
    failed = int((rows["reason"] == "failed").sum())
    assert failed == 240 - len(others)
    if damage is cut_in_a_photo:
        assert rows.loc[own.index[AT], "error"].startswith("cut off: the shard ends at byte ")
    # Whether that is too much is asked of all that was looked for, and of what was to be hashed.
    code, _, err = invoke("resume", run, "--workers", 0, "--max-failures", 0, "--quiet")
    assert code == (3 if failed else 0)
    hashless = int((rows["reason"] == "failed")[good["hash"].notna()].sum())
    told = f"{failed} of 240 " if failed / 240 > hashless / 216 else f"{hashless} of 216 "
    assert (told in err) == bool(failed)

    path.write_bytes(shard)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    result = resume(run, SERIAL, retry_failed=True, max_failures=0.0, progress=False)
    assert reduced_files(run) == reduced_files(whole)
    assert_same_rows(run, whole)
    assert result.summary["shards"]["damaged"] == {}
    assert result.summary["photos_failed"] == 0
    for name in ("reasons", "quality", "failures", "photos_kept", "bytes_kept"):
        assert result.summary[name] == summary_of(whole)[name], name


def test_damage_is_told_at_the_end_and_by_exit_codes(tars: Path, tiny: Path, tmp_path: Path) -> None:
    for name in ("images_001.tar", "images_004.tar"):
        content = (tars / name).read_bytes()
        (tars / name).write_bytes(content[: len(content) // 2])
    arguments = [tars, "--manifest", tiny / "train.csv", "--keep", 8, "--workers", 0, "--output"]
    code, out, err = invoke("run", *arguments, tmp_path / "run")
    assert code == 3
    assert f"Damaged shards, whose photos up to the damage are taken: 2: {tars}/images_001.tar: it is cut off" in out
    assert f"reducer resume {tmp_path / 'run'} --retry-failed" in out
    assert "over --max-failures 0.1" in err
    assert "2 of the shards are damaged" in rows_of(tmp_path / "run")["error"].dropna().iloc[-1]
    assert invoke("run", *arguments, tmp_path / "other", "--max-failures", 0.5, "--quiet")[0] == 0
    assert reduced_files(tmp_path / "other") == reduced_files(tmp_path / "run")


def test_a_job_goes_on_when_no_shard_is_sound(tiny: Path, tmp_path: Path) -> None:
    tars = write_tars(tmp_path / "tars", {f"{n}.tar": b"no tar" for n in range(3)})
    code, _, err = invoke("run", tars, "--manifest", tiny / "train.csv", "--output", tmp_path / "run", "--workers", 0)
    assert code == 3
    assert "missing: no shard holds it; 3 of the shards are damaged" in err
    assert (rows_of(tmp_path / "run")["reason"] == "failed").all()


# What is in a shard, and what is not


@pytest.fixture(scope="session")
def some(photos: dict[str, bytes], labels: dict[str, str]) -> list[bytes]:
    """Photos that differ."""
    largest = Counter(labels.values()).most_common(1)[0][0]
    return [photos[name] for name in sorted(photos) if labels[name] == largest]


def small_job(
    tmp_path: Path, shards: dict[str, list[tuple[str, Any]]], rows: list[tuple[str, str]], **given: Any
) -> pd.DataFrame:
    """The ledger of a job on a few photos; all failures allowed."""
    tars = write_tars(tmp_path / "tars", shards)
    manifest = manifest_of(tmp_path / "m.csv", rows)
    run_of(tars, tmp_path / "run", manifest, **{"keep": 2, "max_failures": 1.0, **given})
    frame: pd.DataFrame = RunFolder(str(tmp_path / "run")).ledger().to_pandas()
    return frame


def content_at(row: pd.Series) -> bytes:
    with open(row["shard"], "rb") as file:
        file.seek(int(row["offset"]))
        return file.read(int(row["bytes"]))


def test_a_photo_that_no_shard_holds_fails(some: list[bytes], tmp_path: Path) -> None:
    shard = [(f"{name}.jpg", some[number]) for number, name in enumerate("abcdw")]
    rows = [*((name, "ranked") for name in ("a", "b", "c", "d", "gone")), ("w", "whole"), ("away", "whole")]
    found = small_job(tmp_path, {"0.tar": shard}, rows).set_index("id")
    for name in ("gone", "away"):
        assert found.loc[name, "reason"] == "failed"
        assert found.loc[name, "error"] == "missing: no shard holds it"
        assert not found.loc[name, "kept"]
        assert pd.isna(found.loc[name, "nearest_kept"])
        assert pd.isna(found.loc[name, "shard"])
    assert found.loc["w", ["reason", "kept"]].tolist() == ["kept-small-label", True]
    summary = summary_of(tmp_path / "run")
    assert summary["failures"] == {"missing": 2}
    assert b"gone" not in csv_of(tmp_path / "run")
    assert b"away" not in csv_of(tmp_path / "run")
    # It comes, and is looked for again.
    (tmp_path / "tars" / "0.tar").write_bytes(tar_of([*shard, ("gone.jpg", some[7]), ("away.jpg", some[8])]))
    run_of(tmp_path / "tars", tmp_path / "again", tmp_path / "m.csv", keep=2, reuse=str(tmp_path / "run"))
    run_of(tmp_path / "tars", tmp_path / "fresh", tmp_path / "m.csv", keep=2)
    assert reduced_files(tmp_path / "again") == reduced_files(tmp_path / "fresh")
    assert (rows_of(tmp_path / "again")["reason"] == "failed").sum() == 0


@pytest.mark.parametrize("keep", [2, 20])
def test_of_a_photo_in_two_places_the_last_holds(some: list[bytes], tmp_path: Path, keep: int) -> None:
    shards = {
        "0.tar": [("x/a.jpg", some[0]), ("a.jpg", some[1]), ("b.jpg", some[2]), ("b.jpg", some[3]), ("c.jpg", some[4])],
        "1.tar": [("d.jpg", some[5]), ("y/a.jpg", some[6])],
        "10.tar": [("d.jpg", b"this one is broken")],
    }
    found = small_job(tmp_path, shards, [(name, "label") for name in "abcd"], keep=keep).set_index("id")
    assert content_at(found.loc["a"]) == some[6]
    assert content_at(found.loc["b"]) == some[3]
    assert content_at(found.loc["c"]) == some[4]
    # By their paths: 0.tar, 1.tar, 10.tar.
    assert content_at(found.loc["d"]) == b"this one is broken"
    assert (found["path"] == ["y/a.jpg", "b.jpg", "c.jpg", "d.jpg"]).all()
    if keep == 2:
        assert found.loc["d", "error"].startswith("not an image")
    assert len(found) == 4


def test_one_photo_under_two_labels(some: list[bytes], tmp_path: Path) -> None:
    shard = [(f"{name}.jpg", some[number]) for number, name in enumerate("abcdef")]
    rows = [*((name, "one") for name in "abcd"), *((name, "two") for name in "def"), ("d", "small"), ("a", "small")]
    found = small_job(tmp_path, {"0.tar": shard[:3], "1.tar": shard[3:]}, rows)
    assert len(found) == 9
    own = found[found["id"] == "d"]
    assert own["shard"].nunique() == own["offset"].nunique() == 1
    assert own.set_index("label")["hash"].isna().to_dict() == {"one": False, "small": True, "two": False}
    assert found["error"].isna().all()
    assert all(content_at(row) == some["abcdef".index(row["id"])] for _, row in found.iterrows())
    assert summary_of(tmp_path / "run")["manifest"]["ids_under_several_labels"] == 2


def test_links_and_sparse_files(some: list[bytes], tmp_path: Path) -> None:
    (tmp_path / "sparse.jpg").write_bytes(b"")
    with open(tmp_path / "sparse.jpg", "r+b") as file:
        file.truncate(1_000_000)
        file.write(some[9])
    tar = ["tar", "--sparse", "--format=gnu", "-cf", str(tmp_path / "s.tar"), "-C", str(tmp_path), "sparse.jpg"]
    subprocess.run(tar, check=True)
    sparse = (tmp_path / "s.tar").read_bytes()
    assert len(sparse) < 100_000
    members = [
        ("soft.jpg", link_to("deep/a.jpg")),
        ("deep/a.jpg", some[0]),
        ("b.jpg", some[1]),
        ("hard.jpg", link_to("b.jpg", b"1")),
        ("lost.jpg", link_to("nowhere.jpg")),
        ("out.jpg", link_to("../../etc/passwd")),
    ]
    rows = [(name, "label") for name in ("a", "b", "soft", "hard", "lost", "out", "sparse")]
    found = small_job(tmp_path, {"0.tar": members, "1.tar": sparse}, rows).set_index("id")
    for link, target in (("soft", "a"), ("hard", "b")):
        same = ["hash", "shard", "offset", "bytes", "width"]
        assert found.loc[link, same].tolist() == found.loc[target, same].tolist()
        assert found.loc[link, "path"] == f"{link}.jpg"
    for name, error in (("lost", "link: it leads to nowhere.jpg"), ("out", "link: "), ("sparse", "sparse: ")):
        assert found.loc[name, "reason"] == "failed"
        assert found.loc[name, "error"].startswith(error)
    assert summary_of(tmp_path / "run")["shards"]["damaged"] == {}


def test_links_and_sparse_files_of_labels_that_are_kept_whole(some: list[bytes], tmp_path: Path) -> None:
    members = [("a.jpg", some[0]), ("soft.jpg", link_to("a.jpg")), ("lost.jpg", link_to("nowhere.jpg"))]
    rows = [(name, "label") for name in ("a", "soft", "lost")]
    found = small_job(tmp_path, {"0.tar": members}, rows, keep=5).set_index("id")
    assert found["hash"].isna().all()
    assert content_at(found.loc["soft"]) == some[0]
    assert found["reason"].to_dict() == {"a": "kept-small-label", "soft": "kept-small-label", "lost": "failed"}


def test_other_files_with_a_photos_name_are_not_taken_for_it(some: list[bytes], tmp_path: Path) -> None:
    members = [
        ("a.json", b"{}"),
        ("a.JPG", some[0]),
        ("a.txt", b"text"),
        ("b.jpeg", some[1]),
        ("b.cls", b"3"),
        ("b.jpg.md5", b"0"),
        ("c.PNG", some[2]),
        ("d.csv", b"only this"),
        ("e.f.jpg", some[3]),
        (".jpg", some[4]),
        ("no extension", some[5]),
    ]
    rows = [(name, "label") for name in ("a", "b", "c", "d", "e.f", "no extension")]
    found = small_job(tmp_path, {"0.tar": members}, rows).set_index("id")
    assert found["path"].to_dict() == {
        "a": "a.JPG",
        "b": "b.jpeg",
        "c": "c.PNG",
        "d": "d",
        "e.f": "e.f.jpg",
        "no extension": "no extension",
    }
    assert found["error"].dropna().to_dict() == {"d": "missing: no shard holds it"}


def test_members_that_are_not_wanted_are_not_decoded(some: list[bytes], tmp_path: Path) -> None:
    bad = [(f"other{number}.jpg", b"this is broken") for number in range(300)]
    shard = [*bad, *((f"{name}.jpg", some[n]) for n, name in enumerate("abc")), *bad]
    found = small_job(tmp_path, {"0.tar": shard}, [(name, "label") for name in "abc"], max_failures=0.0)
    assert (found["reason"] == "failed").sum() == 0
    summary = summary_of(tmp_path / "run")
    assert (summary["photos_read"], summary["shards"]["members"]) == (3, 603)
    assert summary["bytes_read"] == sum(map(len, some[:3]))


@pytest.mark.parametrize("how", ["template", "column"])
def test_paths_may_tell_photos_and_lead_nowhere(some: list[bytes], tmp_path: Path, how: str) -> None:
    paths = ["../up.jpg", "a/../../b.jpg", "/etc/abs.jpg", "x/1.jpg", "y/1.jpg", "sp ace/é.jpg", "dots/./c.jpg"]
    members = [(path, some[number]) for number, path in enumerate(paths)]
    shards = {"0.tar": members[:3], "1.tar": members[3:]}
    tars = write_tars(tmp_path / "tars", shards)
    if how == "template":
        rows = ["id,landmark_id", *(f"{path},label" for path in paths)]
        given = {"path_template": "{id}"}
    else:
        rows = ["id,landmark_id,path", *(f"n{number},label,{path}" for number, path in enumerate(paths))]
        given = {"path_column": "path"}
    (tmp_path / "m.csv").write_text("\n".join(rows) + "\n")
    run_of(tars, tmp_path / "run", tmp_path / "m.csv", keep=3, max_failures=0.0, **given)
    found = RunFolder(str(tmp_path / "run")).ledger().to_pandas()
    assert found["path"].tolist() == paths
    assert found["hash"].notna().all()
    assert [content_at(row) for _, row in found.iterrows()] == some[: len(paths)]
    # The same where they are read by range, later, and from an earlier run.
    run_of(tars, tmp_path / "few", tmp_path / "m.csv", keep=20, **given)
    assert resume(tmp_path / "few", SERIAL, rank_all=True, progress=False).summary["photos_failed"] == 0
    with shards_read() as read:
        run_of(tars, tmp_path / "again", tmp_path / "m.csv", keep=3, reuse=str(tmp_path / "run"), **given)
    assert (read, csv_of(tmp_path / "again")) == ([], csv_of(tmp_path / "run"))
    assert {path.name for path in tmp_path.iterdir()} == {"few", "again", "m.csv", "run", "tars"}
    assert not list(tmp_path.rglob("*.jpg"))
    assert not (tmp_path.parent / "up.jpg").exists()


def test_a_template_with_folders_looks_for_paths(tars: Path, tiny: Path, single: Path, tmp_path: Path) -> None:
    template = "{id[0]}/{id[1]}/{id[2]}/{id}.jpg"
    run_of(tars, tmp_path / "run", tiny / "train.csv", path_template=template)
    assert csv_of(tmp_path / "run") == csv_of(single)


@pytest.mark.parametrize("flag", ["--quiet", "--log-level=warning"], ids=["quiet", "with progress"])
def test_a_template_that_matches_nothing_is_told_early(tars: Path, tiny: Path, tmp_path: Path, flag: str) -> None:
    # 216 photos are looked for: when 200 of them should have come, none has. They may yet come, so the run goes on.
    arguments = [tars, "--manifest", tiny / "train.csv", "--output", tmp_path / "run", "--keep", 8, flag]
    code, _, err = invoke("run", *arguments, "--path-template", "train/{id}.jpg", "--workers", 0)
    assert code == 3
    assert "240 of 240 photos read have failed" in err
    assert "missing: no shard holds it" in err
    if flag != "--quiet":
        assert "WARNING: the shards read so far hold no photo of the manifest. They hold '" in err
        assert ".jpg', and the first photo is looked for by 'train/" in err
        assert "--path-template" in err


# WebDataset


def samples_of(photos: dict[str, bytes], labels: dict[str, str], form: str, shards: int, seed: int = 0) -> Any:
    found = {}
    for name, members in packed(photos, shards, seed, lambda key: f"{key}.jpg").items():
        files = []
        for path, content in members:
            key = path.removesuffix(".jpg")
            beside = (f"{key}.cls", f"{labels[key]}\n".encode())
            if form == "json":
                beside = (f"{key}.json", json.dumps({"x": [1], "place": labels[key], "caption": "é"}).encode())
            files += [beside, (path, content)] if seed % 2 else [(path, content), beside]
        found[name] = files
    return found


def lines_of(run: Path) -> list[str]:
    return sorted(csv_of(run).decode().splitlines())


@pytest.mark.parametrize(("form", "shards", "workers"), [("cls", 6, 0), ("json", 1, 0), ("cls", 13, 2)])
def test_samples_tell_their_labels_however_packed(
    photos: dict[str, bytes],
    labels: dict[str, str],
    single: Path,
    tmp_path: Path,
    form: str,
    shards: int,
    workers: int,
) -> None:
    tars = write_tars(tmp_path / "tars", samples_of(photos, labels, form, shards, shards))
    field = {"label_field": "place"} if form == "json" else {}
    run_of(tars, tmp_path / "run", None, ClusterSpec(workers=workers), **field)
    # In the order of the keys, not of a manifest.
    assert lines_of(tmp_path / "run") == lines_of(single)
    rows, files = rows_of(tmp_path / "run"), rows_of(single)
    assert list(rows.index) == sorted(photos)
    read = files.index[files["hash"].notna()]
    assert rows.loc[read, "rank"].equals(files.loc[read, "rank"])
    assert summary_of(tmp_path / "run")["labels"] == 12
    assert summary_of(tmp_path / "run")["shards"]["skipped"] == {}


def test_samples_of_every_kind(some: list[bytes], tmp_path: Path) -> None:
    shards = {
        "0.tar": [
            ("a/b.jpg", some[0]),
            ("a/b.cls", b"cat"),
            ("c/b.cls", b" cat\n"),
            ("c/b.JPG", some[1]),
            ("two.left.jpg", some[2]),
            ("two.right.jpg", some[3]),
            ("two.cls", b"dog"),
            ("twice.jpg", some[4]),
            ("twice.png", some[5]),
            ("twice.cls", b"dog"),
            ("lonely.jpg", some[6]),
            ("lonely.txt", b"no label"),
            ("blank.jpg", some[7]),
            ("blank.cls", b"  \n"),
            ("odd.jpg", some[8]),
            ("odd.cls", b"\xff\xfe\xfa"),
            ("README.md", b"hello"),
        ],
        "1.tar": [
            ("v.1/x.y.jpg", some[9]),
            ("v.1/x.cls", b"dog"),
            ("bom.jpg", some[10]),
            ("bom.cls", b"\xef\xbb\xbfdog"),
        ],
    }
    tars = write_tars(tmp_path / "tars", shards)
    result = run_of(tars, tmp_path / "run", None, keep=1, max_failures=0.0)
    rows = rows_of(tmp_path / "run")
    found = {"a/b": "cat", "bom": "dog", "c/b": "cat", "twice": "dog", "two": "dog", "v.1/x": "dog"}
    del found["two"], found["v.1/x"]  # .left.jpg, .y.jpg are extensions of their own, as WebDataset has it
    assert rows["label"].to_dict() == found
    assert content_at(rows.loc["twice"]) == some[4]
    skipped = result.summary["shards"]["skipped"]
    assert skipped == {"further photo of a sample": 1, "photo without a .cls beside it": 3}
    code, out, _ = invoke("resume", tmp_path / "run")
    assert code == 0
    assert "Skipped in the shards: 3 x photo without a .cls beside it" in out
    assert "Skipped in the shards: 1 x further photo of a sample" in out


def test_labels_in_json(some: list[bytes], tmp_path: Path) -> None:
    texts = [
        b'{"l": "cat"}',
        b'{"l": 7}',
        b'{"m": 1}',
        b"[1]",
        b"not json",
        b'{"l": null}',
        b'{"l": true}',
        b"[" * 99_999,
    ]
    members: list[tuple[str, Any]] = []
    for number, text in enumerate(texts):
        members += [(f"{number}.jpg", some[number]), (f"{number}.json", text)]
    tars = write_tars(tmp_path / "tars", {"0.tar": members})
    result = run_of(tars, tmp_path / "run", None, keep=1, label_field="l")
    assert rows_of(tmp_path / "run")["label"].to_dict() == {"0": "cat", "1": "7"}
    (count,) = result.summary["shards"]["skipped"].values()
    assert count == 6


def test_one_key_in_two_shards(some: list[bytes], tmp_path: Path) -> None:
    shards = {
        "0.tar": [("k.jpg", some[0]), ("k.cls", b"one"), ("o.jpg", some[1]), ("o.cls", b"one")],
        "1.tar": [("k.jpg", some[2]), ("k.cls", b"one"), ("o.jpg", some[3]), ("o.cls", b"two"), ("p.jpg", some[4])],
        "2.tar": [("q.jpg", some[5]), ("q.cls", b"one"), ("r.jpg", some[6]), ("r.cls", b"two")],
    }
    run_of(write_tars(tmp_path / "tars", shards), tmp_path / "run", None, keep=1)
    rows = RunFolder(str(tmp_path / "run")).ledger().to_pandas()
    found = {(row["id"], row["label"]): content_at(row) for _, row in rows.iterrows()}
    assert found == {
        ("k", "one"): some[2],  # the later one's, as with a manifest
        ("o", "one"): some[1],
        ("o", "two"): some[3],
        ("q", "one"): some[5],
        ("r", "two"): some[6],
    }
    assert summary_of(tmp_path / "run")["manifest"]["duplicate_rows"] == 1


def test_shards_without_any_label_are_refused(tars: Path, tmp_path: Path) -> None:
    for given in ([], ["--label-field", "label"]):
        code, _, err = invoke("run", tars, "--output", tmp_path / "run", "--overwrite", "--workers", 0, *given)
        assert code == 2
        assert "the shards hold no photo with a label: expected WebDataset samples" in err


@pytest.mark.parametrize(("name", "time"), [("hashes/part-00002.parquet", 1), ("plan.parquet", 2)])
def test_samples_are_gone_on_with_before_all_labels_are_known(
    photos: dict[str, bytes], labels: dict[str, str], tmp_path: Path, name: str, time: int
) -> None:
    tars = write_tars(tmp_path / "tars", samples_of(photos, labels, "cls", 4))
    run_of(tars, tmp_path / "whole", None)
    run = tmp_path / "run"
    killed_before(name, time, "run", tars, "--output", run, "--keep", 8, "--workers", 0, "--quiet")
    code, out, _ = invoke("status", run)
    assert code == 0
    done = len(hashed(run))
    assert f"{done} of 4 shards read" in out
    assert done == (2 if name.startswith("hashes") else 4)
    for shard in sorted(tars.iterdir())[:done]:
        spoil(shard)
    assert invoke("resume", run, "--workers", 0, "--quiet") == (0, "", "")
    assert reduced_files(run) == reduced_files(tmp_path / "whole")
    assert_same_rows(run, tmp_path / "whole")


def test_hashes_of_samples_are_taken_again(photos: dict[str, bytes], labels: dict[str, str], tmp_path: Path) -> None:
    tars = write_tars(tmp_path / "tars", samples_of(photos, labels, "cls", 4))
    run_of(tars, tmp_path / "first", None)
    run_of(tars, tmp_path / "fresh", None, keep=4, strategy="pairs")
    with shards_read() as read:
        run_of(tars, tmp_path / "again", None, keep=4, strategy="pairs", reuse=str(tmp_path / "first"))
    assert read == []
    assert reduced_files(tmp_path / "again") == reduced_files(tmp_path / "fresh")
    changed = {key: photos[key] for key in sorted(photos)[::3]}
    write_tars(
        tars, {"images_002.tar": samples_of(changed, labels | {min(changed): "new"}, "cls", 1)["images_000.tar"]}
    )
    run_of(tars, tmp_path / "fresh2", None)
    with shards_read() as read:
        run_of(tars, tmp_path / "again2", None, reuse=str(tmp_path / "first"))
    assert read == ["images_002.tar"]
    assert reduced_files(tmp_path / "again2") == reduced_files(tmp_path / "fresh2")


# Labels of single files that are larger than a partition


@pytest.fixture(scope="session")
def giant(tiny: Path, labels: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("giant")
    (folder / "train").symlink_to(tiny / "train")
    manifest_of(folder / "train.csv", [(name, "rest" if n % 6 == 0 else "giant") for n, name in enumerate(labels)])
    return folder


@pytest.fixture(scope="session")
def in_one_piece(giant: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("one") / "run"
    run_on(giant, run, partition_images=2000)
    assert hashed(run) == []
    return run


@pytest.mark.parametrize("workers", [0, 2])
def test_a_giant_label_is_hashed_in_pieces(giant: Path, in_one_piece: Path, tmp_path: Path, workers: int) -> None:
    run_on(giant, tmp_path / "run", ClusterSpec(workers=workers), partition_images=60)
    assert hashed(tmp_path / "run") == [f"part-0000{number}.parquet" for number in range(4)]
    assert reduced_files(tmp_path / "run") == reduced_files(in_one_piece)
    pd.testing.assert_frame_equal(rows_of(tmp_path / "run"), rows_of(in_one_piece))
    for what in ("quality", "reasons", "photos_read", "bytes_read", "photos_failed"):
        assert summary_of(tmp_path / "run")[what] == summary_of(in_one_piece)[what], what


def test_a_giant_label_goes_on_by_the_piece(giant: Path, in_one_piece: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = [giant / "train", "--manifest", giant / "train.csv", "--output", run, "--keep", 8, "--workers", 0]
    killed_before("hashes/part-00002.parquet", 1, "run", *arguments, "--partition-images", 60, "--quiet")
    done = len(hashed(run))
    assert 0 < done < 4
    before = {part: (run / "hashes" / part).stat().st_mtime_ns for part in hashed(run)}
    code, out, _ = invoke("status", run)
    assert code == 0
    hashed_so_far = done * 50
    assert f"done:       {hashed_so_far} of 240 photos, " in out
    assert "shards" not in out
    result = resume(run, ClusterSpec(workers=0), progress=False)
    assert before.items() <= {part: (run / "hashes" / part).stat().st_mtime_ns for part in hashed(run)}.items()
    assert result.summary["photos_read_this_time"] == 240 - hashed_so_far
    assert reduced_files(run) == reduced_files(in_one_piece)
    pd.testing.assert_frame_equal(rows_of(run), rows_of(in_one_piece))


def test_a_giant_label_of_an_earlier_run(giant: Path, in_one_piece: Path, tmp_path: Path) -> None:
    run_on(giant, tmp_path / "fresh", keep=5, partition_images=60)
    for name, earlier in (("one", in_one_piece), ("pieces", tmp_path / "fresh")):
        run = tmp_path / name
        result = run_on(giant, run, keep=5, partition_images=60, reuse=str(earlier))
        assert (result.summary["photos_read"], result.summary["photos_reused"]) == (0, 240)
        assert reduced_files(run) == reduced_files(tmp_path / "fresh")


def test_failures_of_a_giant_label_are_tried_again(
    giant: Path, tiny: Path, in_one_piece: Path, photos: dict[str, bytes], tmp_path: Path
) -> None:
    folder = tmp_path / "torn"
    for path in (tiny / "train").rglob("*.jpg"):
        (folder / path.relative_to(tiny)).parent.mkdir(parents=True, exist_ok=True)
        (folder / path.relative_to(tiny)).symlink_to(path)
    (folder / "train.csv").write_bytes((giant / "train.csv").read_bytes())
    bad = sorted((folder / "train").rglob("*.jpg"))[::10]
    for path in bad:
        path.unlink()
        path.write_bytes(b"broken")
    run_on(folder, tmp_path / "run", partition_images=60, max_failures=1.0)
    assert summary_of(tmp_path / "run")["photos_failed"] == 24
    for path in bad:
        path.write_bytes(photos[path.stem])
    result = resume(tmp_path / "run", SERIAL, retry_failed=True, progress=False)
    assert result.summary["photos_read_this_time"] == 24
    assert result.summary["photos_failed"] == 0
    assert csv_of(tmp_path / "run") == csv_of(in_one_piece)
    for name in ("quality", "reasons", "photos_read"):
        assert result.summary[name] == summary_of(in_one_piece)[name], name


# A photo that ends whoever looks at it


def test_a_photo_in_a_shard_that_kills_its_worker_alone_fails(
    photos: dict[str, bytes], tiny: Path, labels: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = Counter(labels.values()).most_common(1)[0][0]
    ids = sorted(name for name in photos if labels[name] == largest)[3:5]
    bad = photos | {ids[0]: b"KILLER exit", ids[1]: b"KILLER signal"}
    tars = write_tars(tmp_path / "tars", packed(bad, SHARDS))
    run_of(tars, tmp_path / "reference", tiny / "train.csv")  # here it is just no image
    for variable, value in killer_env(tmp_path).items():
        monkeypatch.setenv(variable, value)
    run_of(tars, tmp_path / "run", tiny / "train.csv", ClusterSpec(workers=2))
    rows = rows_of(tmp_path / "run")
    assert rows["error"].dropna().to_dict() == {
        ids[0]: "killed its worker: the process that looked at it ended with exit code 7",
        ids[1]: "killed its worker: the process that looked at it was ended by SIGKILL",
    }
    assert reduced_files(tmp_path / "run") == reduced_files(tmp_path / "reference")
    assert summary_of(tmp_path / "run")["shards"]["damaged"] == {}


# What is wrong with the input


@pytest.mark.parametrize(
    ("images", "given", "message"),
    [
        ("nothing_*.tar", [], "matches nothing: give a folder, or a glob of .tar files"),
        ("*.txt", [], "is taken for a glob of tar shards"),
        ("*.tar*", [], "is compressed, so no part of it can be read alone: unpack it first"),
        ("zipped.tar.gz", [], "is compressed, so no part of it can be read alone: unpack it first"),
        ("gone.tar", [], "does not exist"),
        ("photos", ["--md5", "sums.txt"], "--md5 goes with tar shards, and IMAGES "),
        ("photos", ["--label-field", "x"], "--label-field "),
        ("images_*.tar", ["--label-field", "x"], "--label-field is for tar shards without a manifest"),
        ("images_*.tar", ["--md5-warn"], "--md5-warn says what becomes of photos"),
        ("images_*.tar", ["--id-column", "name"], "--id-column"),
    ],
)
def test_what_is_wrong_is_told_before_a_cluster_starts(
    tars: Path, tiny: Path, tmp_path: Path, no_cluster: None, images: str, given: list[str], message: str
) -> None:
    (tars / "zipped.tar.gz").write_bytes(gzip.compress(b"x"))
    (tars / "sums.txt").write_text("")
    (tars / "photos").symlink_to(tiny / "train")
    manifest = tiny / "train.csv"
    code, out, err = invoke("run", tars / images, "--manifest", manifest, "--output", tmp_path / "run", *given)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_folder_of_photos_and_a_tar_is_one_of_photos(tiny: Path, single: Path, tars: Path, tmp_path: Path) -> None:
    (tmp_path / "mixed").mkdir()
    for path in [*(tiny / "train").iterdir(), tars / "images_000.tar"]:
        (tmp_path / "mixed" / path.name).symlink_to(path)
    run_of(tmp_path / "mixed", tmp_path / "run", tiny / "train.csv")
    assert csv_of(tmp_path / "run") == csv_of(single)
    assert rows_of(tmp_path / "run")["shard"].isna().all()


# What other commands say


def test_a_dry_run_on_shards(tars: Path, tiny: Path, tmp_path: Path, no_cluster: None) -> None:
    arguments = [tars, "--manifest", tiny / "train.csv", "--output", tmp_path / "run", "--keep", 8, "--dry-run"]
    code, out, err = invoke("run", *arguments, "--workers", 2)
    assert (code, err) == (0, "")
    assert "labels:         12, of which 7 are ranked\n" in out
    assert "photos:         240, of which 24 are kept unread\n" in out
    assert "photos to read: 216\n" in out
    size = sum(path.stat().st_size for path in tars.iterdir())
    assert f"shards:         6, of which {as_size(size)} are to be read\n" in out
    assert "on 2 worker threads" in out
    assert not (tmp_path / "run").exists()
    code, out, _ = invoke("run", *arguments, "--no-sample")
    assert (code, "time:" in out) == (0, False)
    code, out, _ = invoke("run", tars, "--output", tmp_path / "run", "--dry-run")
    assert code == 0
    assert "not known before the shards are read" in out


def test_a_dry_run_tells_what_an_earlier_run_knows(tars: Path, tiny: Path, whole: Path, tmp_path: Path) -> None:
    run_of(tars, tmp_path / "first", tiny / "train.csv")
    arguments = [tars, "--manifest", tiny / "train.csv", "--output", tmp_path / "run", "--keep", 8, "--dry-run"]
    code, out, _ = invoke("run", *arguments, "--reuse", tmp_path / "first", "--workers", 0)
    assert code == 0
    assert "shards:         6, of which 0 bytes are to be read\n" in out
    assert "known already:  216 photos in shards that are unchanged (--reuse)\n" in out
    assert "sample:" not in out


def test_the_story_of_a_photo_in_a_shard(whole: Path) -> None:
    rows = rows_of(whole)
    for reason in ("kept", "beyond-keep", "kept-small-label"):
        name, row = next(iter(rows[rows["reason"] == reason].iterrows()))
        code, out, _ = invoke("explain", whole, name)
        assert code == 0
        assert f"photo:        {name} ({row['path']})\n" in out
        assert f"shard:        {row['shard']}, {row['bytes']:,} bytes from byte {row['offset']:,} on\n" in out
        assert f", {reason}: " in out


def test_a_cut_of_a_run_on_shards(tars: Path, tiny: Path, tmp_path: Path) -> None:
    run_on(tiny, tmp_path / "files", rank_all=True)
    run_of(tars, tmp_path / "tars_run", tiny / "train.csv")
    size = rows_of(tmp_path / "tars_run").query("kept")["bytes"].sum() // 2
    code, _, err = invoke("cut", tmp_path / "tars_run", "--output", tmp_path / "x.csv", "--keep", 3)
    assert (code, "--rank-all (it reads the 24 photos of labels that were kept whole" in err) == (2, True)
    resume(tmp_path / "tars_run", SERIAL, rank_all=True, progress=False)
    for given in (["--keep", 3], ["--max-bytes", size]):
        lists = []
        for run in ("files", "tars_run"):
            code, out, err = invoke("cut", tmp_path / run, "--output", tmp_path / f"{run}.csv", *given)
            assert code == 0, err
            assert "were not read" not in out
            lists.append((tmp_path / f"{run}.csv").read_bytes())
        assert lists[0] == lists[1]


def test_how_far_a_run_on_shards_is(tars: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reducer.session.NOTED_EVERY", 0.0)
    seen: list[str] = []
    real = RunFolder.write_piece

    def write_piece(folder: RunFolder, number: int, *rest: Any) -> None:
        real(folder, number, *rest)
        seen.append(invoke("status", tmp_path / "run")[1])

    monkeypatch.setattr(RunFolder, "write_piece", write_piece)
    run_of(tars, tmp_path / "run", tiny / "train.csv", partition_images=60)
    assert [text.startswith("state:      at work (host ") for text in seen] == [True] * SHARDS
    assert [f", {done} of 6 shards read, 0 of " in text for done, text in enumerate(seen, 1)] == [True] * SHARDS
    assert "at this rate" in seen[3]
    assert "left:       0 photos\nfailed:     0\n" in invoke("status", tmp_path / "run")[1]
    assert re.search(r"6 of 6 shards read, (\d) of \1 partitions\n", invoke("status", tmp_path / "run")[1])
