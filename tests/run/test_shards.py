"""Jobs on tar shards: what they give is what single files give."""

from __future__ import annotations

import gzip
import os
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import flags, invoke
from faultproxy import FaultProxy
from jobs import SERIAL, reduced_files, run_on
from s3server import S3Server
from shardjobs import SHARDS, assert_same_rows, csv_of, hashed, rows_of, run_of, summary_of
from tarfiles import md5, packed, photos_below, tar_of, write_tars

from reducer import ClusterSpec, Job, resume
from reducer.errors import InputError
from reducer.formatting import format_bytes
from reducer.run.folder.pieces import PieceFiles
from reducer.run.plan.shards import find_shards

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
    opened: dict[str, Any] = {"storage_options": s3.options(endpoint_url=proxy.endpoint), "reader": reader}
    images = f"s3://{big_bucket}/train/images_*.tar" if reader == "s3fs" else f"s3://{big_bucket}/train"
    manifest = {"manifest_storage_options": s3.options()}
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
    given += [f"s3://{bucket}/metadata/train_clean.csv", *flags(s3.options())]
    return [*given, *flags(s3.options(), "--manifest-storage-option"), "--output", run]


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
    code, out, _ = invoke("resume", run, *flags(s3.options()), *flags(s3.options(), "--manifest-storage-option"))
    assert (code, f"MD5 sum than the published one: 1: {shard}\n" in out) == (3, True)
    wrong_sum()
    arguments = [*flags(s3.options()), *flags(s3.options(), "--manifest-storage-option"), "--workers", 0, "--quiet"]
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
    (sums / "latin").mkdir()
    (sums / "latin" / "md5.images_000.txt").write_bytes(b"caf\xe9")
    (sums / "few.txt").write_text("\n".join(lines[1:]) + "\n")
    (sums / "odd.txt").write_text("\n".join([*lines, "not a sum"]) + "\n")
    for given, message in (
        ("nowhere", "No such file or directory"),
        ("few.txt", f"has no sum of 1 of 6 shards: {tars}/images_000.tar"),
        ("odd.txt", "holds 'not a sum': expected what md5sum writes"),
        ("empty", "holds no file that ends in .txt or .md5"),
        ("latin", "md5.images_000.txt is not UTF-8 text"),
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


@pytest.fixture
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test that starts one."""

    def connect(_: object) -> None:
        raise AssertionError("a cluster was started")

    monkeypatch.setattr("reducer.run.prepare.connect", connect)


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
    assert f"shards:         6, of which {format_bytes(size)} are to be read\n" in out
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
    assert (code, "--rank-all (it ranks the 24 photos of labels that were kept whole" in err) == (2, True)
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
    monkeypatch.setattr("reducer.run.monitor.NOTED_EVERY", 0.0)
    seen: list[str] = []
    real = PieceFiles.write

    def write_piece(files: PieceFiles, number: int, *rest: Any) -> None:
        real(files, number, *rest)
        seen.append(invoke("status", tmp_path / "run")[1])

    monkeypatch.setattr(PieceFiles, "write", write_piece)
    run_of(tars, tmp_path / "run", tiny / "train.csv", partition_images=60)
    assert [text.startswith("state:      at work (host ") for text in seen] == [True] * SHARDS
    assert [f", {done} of 6 shards read, 0 of " in text for done, text in enumerate(seen, 1)] == [True] * SHARDS
    assert "at this rate" in seen[3]
    assert "left:       0 photos\nfailed:     0\n" in invoke("status", tmp_path / "run")[1]
    assert re.search(r"6 of 6 shards read, (\d) of \1 partitions\n", invoke("status", tmp_path / "run")[1])


# Which files are shards


def test_hidden_files_and_folders_are_no_shards(tars: Path, s3: S3Server, tmp_path: Path) -> None:
    (tars / "._images_000.tar").write_bytes(b"left by a Mac")
    s3.make_bucket("hidden")
    s3.upload_folder(tars, "hidden", "p/")
    places = [(str(tars), {}), (f"{tars}/*.tar", {})]
    places += [(f"s3://hidden/p{end}", s3.options()) for end in ("", "/", "/*.tar", "/images_*.tar")]
    (tars / "folder.tar").mkdir()
    for images, opened in places[1:]:
        found = find_shards(Job(images, str(tmp_path / "run"), storage_options=opened))
        assert found is not None
        assert [shard.path.rpartition("/")[2] for shard in found] == [f"images_{n:03}.tar" for n in range(SHARDS)]
        assert [shard.number for shard in found] == list(range(SHARDS))


def test_a_folder_of_single_files_may_be_called_like_a_glob(tiny: Path, s3: S3Server, tmp_path: Path) -> None:
    (tmp_path / "p[1]").symlink_to(tiny / "train")
    s3.make_bucket("brackets")
    s3.upload_folder(next(path for path in (tiny / "train").iterdir()), "brackets", "p[1]/")
    for images, opened in ((str(tmp_path / "p[1]"), {}), ("s3://brackets/p[1]", s3.options())):
        assert find_shards(Job(images, str(tmp_path / "run"), storage_options=opened)) is None


def test_tars_beside_folders_are_told_of(
    tars: Path, tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tars / "md5sum").mkdir()
    assert find_shards(Job(str(tars), str(tmp_path / "run"))) is None
    assert "holds 6 tar files, images_000.tar say, beside photos or folders" in caplog.text
    assert f"give a glob of them, such as '{tars}/*.tar'" in caplog.text
    (tars / "md5sum").rmdir()
    (tars / "late.tar.gz").write_bytes(b"")
    with pytest.raises(InputError, match=r"late\.tar\.gz is compressed, so no part of it can be read alone"):
        find_shards(Job(str(tars), str(tmp_path / "run")))


def test_two_sums_for_one_name_are_refused(tars: Path, tmp_path: Path) -> None:
    lines = [f"{digit * 32}  {folder}/images_000.tar" for digit, folder in (("0", "p"), ("1", "q"))]
    lines += [f"{'2' * 32}  {shard.name}" for shard in tars.iterdir() if shard.name != "images_000.tar"]
    (tmp_path / "sums").write_text("\n".join(lines))
    job = Job(str(tars), str(tmp_path / "run"), md5=str(tmp_path / "sums"))
    with pytest.raises(InputError, match="more than one is called images_000"):
        find_shards(job)
