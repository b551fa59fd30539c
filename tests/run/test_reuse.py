"""Hashes of photos that have not changed are taken from an earlier run, and only of those."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from commands import invoke
from faultproxy import FaultProxy
from jobs import ledger_of, reduced_files, run_on, shorten
from s3server import S3Server

import reducer.run.tasks.rank_stage
from reducer import ClusterSpec, InputError, Job, reduce_images, resume
from reducer.run.tasks.environment import Environment

SERIAL = ClusterSpec(workers=0)


@pytest.fixture
def copy(collection: Path, tmp_path: Path) -> Path:
    """A copy of the collection, to change."""
    shutil.copytree(collection, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of the photos that are read in this process."""
    paths: list[str] = []
    real = reducer.photos.process.read_all

    def read_all(some: list[str], *rest: Any, **options: Any) -> Any:
        paths.extend(some)
        return real(some, *rest, **options)

    monkeypatch.setattr("reducer.photos.process.read_all", read_all)
    return paths


def same(run: Path, whole: Path) -> bool:
    return reduced_files(run) == reduced_files(whole) and ledger_of(run).equals(ledger_of(whole))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"keep": 3, "strategy": "facility-location"},
        {"total": 60, "keep": None, "cross_label": True},
        {"partition_images": 17, "seed": 4, "candidates": 20},
    ],
)
def test_nothing_is_read_twice(collection: Path, tmp_path: Path, read: list[str], options: dict[str, Any]) -> None:
    run_on(collection, tmp_path / "old", rank_all=True)
    read.clear()
    result = run_on(collection, tmp_path / "new", reuse=str(tmp_path / "old"), **options)
    assert read == []
    assert (result.summary["photos_read"], result.summary["bytes_read"]) == (0, 0)
    assert result.summary["photos_reused"] == result.summary["photos_to_read"] > 0
    run_on(collection, tmp_path / "whole", **options)
    assert same(tmp_path / "new", tmp_path / "whole")


@pytest.mark.parametrize("workers", [0, 2])
def test_what_has_changed_is_read(copy: Path, tmp_path: Path, read: list[str], workers: int) -> None:
    photos = sorted((copy / "train").rglob("*.jpg"))
    away, touched, grown, replaced, gone, moved, late = photos[::20][:7]
    away.rename(away.with_suffix(".away"))
    lines = (copy / "train.csv").read_text().splitlines()
    (copy / "train.csv").write_text("\n".join(line for line in lines if not line.startswith(late.stem)) + "\n")
    first = run_on(copy, tmp_path / "old", rank_all=True)
    assert first.summary["failures"] == {"missing": 1}

    (copy / "train.csv").write_text("\n".join(lines) + "\n")
    away.with_suffix(".away").rename(away)
    os.utime(touched, ns=(1, 1))
    grown.write_bytes(grown.read_bytes() + b"\0")
    state = replaced.stat()
    replaced.write_bytes(photos[5].read_bytes()[: state.st_size].ljust(state.st_size, b"\0"))
    os.utime(replaced, ns=(state.st_atime_ns, state.st_mtime_ns + 1))  # the smallest change that can be seen
    gone.unlink()
    moved.rename(moved.with_name("elsewhere.jpg"))
    moved.symlink_to(moved.with_name("elsewhere.jpg"))  # what lies at the end of the link counts: unchanged
    read.clear()
    result = run_on(copy, tmp_path / "new", ClusterSpec(workers=workers), reuse=str(tmp_path / "old"), rank_all=True)
    changed = {away, touched, grown, replaced, gone, late}
    if workers == 0:
        assert Counter(read) == Counter(map(str, changed))
    assert result.summary["photos_read"] == result.summary["photos_read_this_time"] == 6
    assert result.summary["photos_reused"] == 234
    assert result.summary["failures"] == {"missing": 1}
    run_on(copy, tmp_path / "whole", rank_all=True)
    assert same(tmp_path / "new", tmp_path / "whole")


def test_a_photo_under_another_path_or_id_is_another(copy: Path, collection: Path, tmp_path: Path) -> None:
    run_on(collection, tmp_path / "old", rank_all=True)
    result = run_on(copy, tmp_path / "elsewhere", reuse=str(tmp_path / "old"), rank_all=True)
    assert result.summary["photos_reused"] == 0
    given = {"keep": 8, "reuse": str(tmp_path / "old"), "rank_all": True, "report": False}
    job = Job(str(collection / "train"), str(tmp_path / "ids"), **given)
    assert reduce_images(job, SERIAL, progress=False).summary["photos_reused"] == 0


def test_flat_photos_are_known_only_where_it_was_asked(copy: Path, tmp_path: Path) -> None:
    from PIL import Image

    photo = sorted((copy / "train").rglob("*.jpg"))[7]
    Image.new("RGB", (640, 480), (200, 30, 30)).save(photo)
    (tmp_path / "ids").write_text(photo.stem)
    run_on(copy, tmp_path / "plain", rank_all=True)
    with pytest.raises(InputError, match="was run without --drop-flat: which photos are flat is not known"):
        run_on(copy, tmp_path / "new", reuse=str(tmp_path / "plain"), drop_flat=True)
    run_on(copy, tmp_path / "dropped", drop_flat=True)
    result = run_on(copy, tmp_path / "new", reuse=str(tmp_path / "dropped"), drop_flat=True)
    assert (result.summary["photos_read"], result.summary["reasons"]["flat"]) == (0, 1)
    # Of a photo that is always kept nobody looked whether it is flat.
    run_on(copy, tmp_path / "always", drop_flat=True, always_keep=str(tmp_path / "ids"))
    result = run_on(copy, tmp_path / "again", reuse=str(tmp_path / "always"), drop_flat=True)
    assert (result.summary["photos_read"], result.summary["reasons"]["flat"]) == (1, 1)
    assert same(tmp_path / "again", tmp_path / "new")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hash": "phash"}, r"has --hash dhash, this run phash: .* Give --hash dhash, or leave --reuse out"),
        ({"hash_size": 16}, "has --hash-size 8, this run 16"),
        ({"decode": "exact"}, "has --decode fast, this run exact"),
        ({"exif_orientation": True}, "has --exif-orientation False, this run True"),
        ({"max_pixels": 1000}, "has --max-pixels 200000000, this run 1000"),
        ({"reuse": "nowhere"}, "nowhere is no run folder"),
    ],
)
def test_hashes_that_are_not_alike_are_refused(
    collection: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    run_on(collection, tmp_path / "old", limit_labels=1, rank_all=True)
    with pytest.raises(InputError, match=message):
        run_on(collection, tmp_path / "new", **{"reuse": str(tmp_path / "old"), **options})
    assert not (tmp_path / "new").exists()


def test_hashes_of_another_pillow_are_refused(
    collection: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run_on(collection, tmp_path / "old", limit_labels=1, rank_all=True)
    other = Environment(found.summary["versions"] | {"pillow": "1.2.3"}, {})
    monkeypatch.setattr("reducer.run.tasks.serial.environment", lambda settings: other)
    with pytest.raises(InputError, match=r"--reuse \S+old has Pillow \d.*has Pillow 1\.2\.3.*or leave --reuse out"):
        run_on(collection, tmp_path / "new", reuse=str(tmp_path / "old"))
    assert not (tmp_path / "new").exists()


def test_a_dry_run_tells_what_is_known(collection: Path, tmp_path: Path) -> None:
    run_on(collection, tmp_path / "old", limit_labels=5, rank_all=True)
    arguments = ["run", collection / "train", "--manifest", collection / "train.csv", "--output", tmp_path / "new"]
    arguments += ["--rank-all", "--dry-run", "--no-sample", "--reuse"]
    known = len(ledger_of(tmp_path / "old"))
    code, out, _ = invoke(*arguments, tmp_path / "old")
    assert code == 0
    assert "photos to read: 240," in out
    assert f"known already:  {known} of them, not read where they are unchanged (--reuse)\n" in out
    assert invoke(*arguments, tmp_path / "nowhere")[0] == 2


def test_a_run_cannot_be_reused_for_itself(collection: Path, tmp_path: Path) -> None:
    run_on(collection, tmp_path / "run")
    before = reduced_files(tmp_path / "run")
    with pytest.raises(InputError, match="--reuse and --output are both"):
        run_on(collection, tmp_path / "run", reuse=str(tmp_path / "x" / ".." / "run"), overwrite=True)
    assert reduced_files(tmp_path / "run") == before


def test_a_run_that_is_not_finished_gives_what_it_has_and_one_that_is_gone_nothing(
    collection: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"rank_all": True, "partition_images": 30}
    run_on(collection, tmp_path / "old", **options)
    shorten(tmp_path / "old", 3)
    result = run_on(collection, tmp_path / "new", reuse=str(tmp_path / "old"), **options)
    assert "is not finished: what it has hashed so far is taken" in caplog.text
    assert 0 < result.summary["photos_reused"] < 240
    assert result.summary["photos_read"] == 240 - result.summary["photos_reused"]
    run_on(collection, tmp_path / "whole", **options)
    assert same(tmp_path / "new", tmp_path / "whole")
    # A run that takes hashes goes on taking them, while they are there.
    for there in (True, False):
        shorten(tmp_path / "new", 0)
        if not there:
            shutil.rmtree(tmp_path / "old")
        result = resume(tmp_path / "new", SERIAL, progress=False)
        assert (result.summary["photos_reused"] > 0) == there
        assert same(tmp_path / "new", tmp_path / "whole")
    assert "its hashes are not taken any more, the photos that are left are read" in caplog.text


@pytest.mark.parametrize("reader", ["s3fs", "obstore"])
def test_objects_are_asked_for_their_etag_only(s3: S3Server, collection: Path, tmp_path: Path, reader: str) -> None:
    bucket = f"reuse-{reader}"
    s3.make_bucket(bucket)
    keys = s3.upload_folder(collection / "train", bucket, "train/")

    def run(name: str, endpoint: str, **options: Any) -> dict[str, Any]:
        opened = s3.options(endpoint_url=endpoint)
        manifest = str(collection / "train.csv")
        job = Job(
            f"s3://{bucket}/train", str(tmp_path / name), manifest=manifest, keep=8, storage_options=opened,
            reader=reader, rank_all=True, report=False, **options,
        )  # fmt: skip
        return reduce_images(job, SERIAL, progress=False).summary

    run("old", s3.endpoint)
    contents = {key: (collection / key).read_bytes() for key in keys[:4]}
    gone, shorter, other, same_again = contents
    s3.client().delete_object(Bucket=bucket, Key=gone)
    s3.client().put_object(Bucket=bucket, Key=shorter, Body=contents[shorter][:-1])
    size = len(contents[other])
    s3.client().put_object(Bucket=bucket, Key=other, Body=contents[gone][:size].ljust(size, b"\0"))
    s3.client().put_object(Bucket=bucket, Key=same_again, Body=contents[same_again])  # later, but the same etag
    with FaultProxy(s3.endpoint) as proxy:
        summary = run("new", proxy.endpoint, reuse=str(tmp_path / "old"))
        asked = Counter(
            (method, unquote(path.partition("?")[0]).removeprefix(f"/{bucket}/")) for method, path, _ in proxy.log
        )
    assert summary["photos_reused"] == 237
    assert summary["failures"] == {"broken": 2, "missing": 1}
    photos = {(method, path): count for (method, path), count in asked.items() if path.endswith(".jpg")}
    assert {path for method, path in photos if method == "GET"} == {gone, shorter, other}
    assert sum(count for (method, _), count in photos.items() if method == "HEAD") == 240
    run("whole", s3.endpoint)
    ledgers = [ledger_of(tmp_path / name) for name in ("new", "whole")]
    assert ledgers[0].drop_columns(["mtime"]).equals(ledgers[1].drop_columns(["mtime"]))
    assert reduced_files(tmp_path / "new") == reduced_files(tmp_path / "whole")
