"""Photos that are kept without being read are known to be there."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path
from urllib.parse import unquote

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from commands import invoke
from faultproxy import FaultProxy
from jobs import READERS, SERIAL, ledger, reduced_files, run_on
from s3server import S3Server

import reducer.photos.presence
from reducer import ClusterSpec, Job, reduce_images, resume
from reducer.config.settings import Source
from reducer.photos.hashing import PhotoError
from reducer.photos.presence import absences
from reducer.photos.requests import ObjectPage
from reducer.run import presence

ERRORS = {
    "gone": "missing: no such file",
    "dangling": "missing: no such file",
    "empty": "empty: the file has 0 bytes",
    "pipe": "not a file: the path is no regular file",
    "folder": "not a file: the path is a directory",
}


@pytest.fixture
def faulty(photos: dict[str, bytes], tmp_path: Path) -> Path:
    """Two labels of 9 photos and one of 3; of the third nothing but one photo is there. ``list.csv`` names them all."""
    folder, contents = tmp_path / "photos", list(photos.values())
    rows = [f"{label}{number}.jpg,{label}" for label in "ab" for number in range(9)]
    rows += ["c0.jpg,c", *(f"{name}.jpg,c" for name in ERRORS)]
    folder.mkdir()
    for number, row in enumerate(rows[:19]):
        (folder / row.partition(",")[0]).write_bytes(contents[number])
    (folder / "dangling.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (folder / "empty.jpg").touch()
    os.mkfifo(folder / "pipe.jpg")
    (folder / "folder.jpg").mkdir()
    (tmp_path / "list.csv").write_text("id,landmark_id\n" + "\n".join(rows) + "\n")
    return tmp_path


def run_faulty(faulty: Path, output: str, spec: ClusterSpec = SERIAL, **options: object) -> Path:
    given: dict[str, object] = {"path_template": "{id}", "report": False, "max_failures": 1.0, **options}
    job = Job(str(faulty / "photos"), str(faulty / output), manifest=str(faulty / "list.csv"), **given)  # type: ignore[arg-type]
    reduce_images(job, spec, progress=False)
    return faulty / output


def errors_of(run: Path) -> dict[str, str]:
    rows = ledger(run)
    failed = rows.filter(pa.compute.equal(rows["reason"], "failed"))
    assert not any(failed["kept"].to_pylist())
    assert failed["nearest_kept"].null_count == failed.num_rows
    return dict(zip(map(Path, failed["id"].to_pylist()), failed["error"].to_pylist(), strict=True))


EXPECTED = {Path(f"{name}.jpg"): error for name, error in ERRORS.items()}


@pytest.mark.parametrize("keep", [8, 25], ids=["others are read", "nothing is read"])
def test_what_is_not_there_fails_wherever_it_is_looked_for(
    faulty: Path, keep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_faulty(faulty, "run", keep=keep)
    assert errors_of(run) == EXPECTED
    listed = (run / "reduced.csv").read_text().split()
    assert len(listed) == 1 + 2 * min(keep, 9) + 1
    summary = resume(run, SERIAL, progress=False).summary
    assert summary["failures"] == {"missing": 2, "empty": 1, "not a file": 2}
    assert summary["photos_failed"] == 5
    assert summary["photos_looked_for"] == (6 if keep == 8 else 24)
    monkeypatch.setattr(presence, "BATCH", 3)
    local = ClusterSpec(class_path="distributed.LocalCluster", kwargs={"n_workers": 2, "dashboard_address": None})
    for name, spec in {"elsewhere": local, "here": ClusterSpec(workers=2)}.items():
        other = run_faulty(faulty, name, spec, keep=keep)
        assert reduced_files(other) == reduced_files(run)
        assert ledger(other).equals(ledger(run))


def test_they_count_in_max_failures(faulty: Path) -> None:
    arguments = ["run", faulty / "photos", "--manifest", faulty / "list.csv", "--path-template", "{id}", "--quiet"]
    code, _, err = invoke(*arguments, "--output", faulty / "run", "--keep", 8, "--workers", 0, "--no-report")
    assert code == 3
    assert "5 of 24 photos read or looked for have failed, over --max-failures 0.1" in err
    arguments += ["--keep", 8, "--workers", 0, "--no-report", "--max-failures", 0.25]
    assert invoke(*arguments, "--output", faulty / "fewer")[0] == 0


def test_no_check_keeps_them_and_says_so(faulty: Path) -> None:
    arguments = ["run", faulty / "photos", "--manifest", faulty / "list.csv", "--path-template", "{id}", "--no-check"]
    code, out, _ = invoke(*arguments, "--output", faulty / "run", "--keep", 8, "--workers", 0, "--report")
    assert code == 0
    assert "Kept unread, and not looked for (--no-check): 6 photos\n" in out
    assert "--no-check" in (faulty / "run" / "report.html").read_text()
    assert errors_of(faulty / "run") == {}


def test_given_vectors_look_for_no_photo_and_say_so(faulty: Path) -> None:
    lines = (faulty / "list.csv").read_text().split()[1:]
    ids = [line.partition(",")[0] for line in lines]
    vectors = np.random.default_rng(0).standard_normal((len(ids), 4)).astype(np.float32)
    table = pa.table({"id": ids, "vector": list(vectors)})
    pa.parquet.write_table(table, faulty / "vectors.parquet")
    arguments = ["run", faulty / "photos", "--manifest", faulty / "list.csv", "--path-template", "{id}", "--no-report"]
    arguments += ["--vectors", faulty / "vectors.parquet", "--output", faulty / "run", "--keep", 8, "--workers", 0]
    code, out, _ = invoke(*arguments)
    assert code == 0
    assert "Kept unread, and not looked for (ranked by vectors, no photo is read): 6 photos\n" in out


def test_photos_that_come_later_are_kept_by_a_retry(faulty: Path) -> None:
    run = run_faulty(faulty, "run", keep=25)
    before = reduced_files(run)
    photos = faulty / "photos"
    shutil.copyfile(photos / "a0.jpg", photos / "gone.jpg")
    (photos / "empty.jpg").write_bytes((photos / "a1.jpg").read_bytes())
    resume(run, SERIAL, progress=False)
    assert reduced_files(run) == before  # nobody has asked for it
    resume(run, SERIAL, retry_failed=True, progress=False)
    left = {path: error for path, error in EXPECTED.items() if path.stem not in ("gone", "empty")}
    assert errors_of(run) == left
    assert reduced_files(run) == reduced_files(run_faulty(faulty, "anew", keep=25))


def test_a_folder_is_looked_at_where_its_listing_does_not_tell(faulty: Path) -> None:
    (faulty / "by-label").mkdir()
    (faulty / "photos").rename(faulty / "by-label" / "c")
    job = Job(str(faulty / "by-label"), str(faulty / "run"), keep=40, max_failures=1, report=False)
    reduce_images(job, SERIAL, progress=False)
    there = {Path("c") / path: error for path, error in EXPECTED.items() if path.stem not in ("gone", "folder")}
    assert errors_of(faulty / "run") == there


@pytest.fixture
def proxy(s3: S3Server) -> FaultProxy:  # type: ignore[misc]
    with FaultProxy(s3.endpoint) as proxy:
        yield proxy


def requests_of(proxy: FaultProxy) -> Counter[str]:
    """HEADs and pages of listings that were asked for, from an object on."""
    return Counter(
        "HEAD" if method == "HEAD" else "page"
        for method, path, _ in proxy.log
        if (method == "HEAD" and path.endswith(".jpg")) or "start-after=" in unquote(path)
    )


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("may_list", [True, False], ids=["listed", "asked one by one"])
def test_objects_are_listed_where_that_is_allowed(
    collection: Path,
    s3: S3Server,
    proxy: FaultProxy,
    tmp_path: Path,
    reader: str,
    may_list: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not may_list:

        async def refused(path: str, source: Source) -> None:
            raise PhotoError("unreadable", "access is refused")

        monkeypatch.setattr(reducer.photos.presence, "page_from", refused)
    system, _ = fsspec.url_to_fs("s3://trial", **s3.options(skip_instance_cache=True))
    header, *lines = (collection / "train.csv").read_text().splitlines()
    ids = ["0123-gone", "feed-empty", "zzzz-gone"]
    system.pipe("s3://trial/train/f/e/e/feed-empty.jpg", b"")
    (tmp_path / "train.csv").write_text("\n".join([header, *lines, *(f"{name},few" for name in ids)]) + "\n")
    given = {"manifest": str(tmp_path / "train.csv"), "storage_options": s3.options(endpoint_url=proxy.endpoint)}
    job = Job("s3://trial/train", str(tmp_path / "run"), keep=1000, reader=reader, report=False, **given)  # type: ignore[arg-type]
    try:
        result = reduce_images(job, SERIAL, progress=False)
    finally:
        system.rm("s3://trial/train/f/e/e/feed-empty.jpg")
    failed = result.images[result.images["reason"] == "failed"].set_index("id")["error"].to_dict()
    assert failed == {
        "0123-gone": "missing: no such object",
        "feed-empty": "empty: the file has 0 bytes",
        "zzzz-gone": "missing: no such object",
    }
    assert requests_of(proxy) == ({"page": 1} if may_list else {"HEAD": len(lines) + len(ids)})


def test_urls_of_other_stores_and_local_paths_are_asked_one_by_one(photos: dict[str, bytes], tmp_path: Path) -> None:
    system = fsspec.filesystem("memory")
    system.pipe("/presence/there.jpg", next(iter(photos.values())))
    system.pipe("/presence/empty.jpg", b"")
    (tmp_path / "here.jpg").write_bytes(b"x")
    paths = [
        *("memory://presence/there.jpg", "memory://presence/empty.jpg", "memory://presence/gone.jpg"),
        *(str(tmp_path / "here.jpg"), str(tmp_path / "gone.jpg"), "memory://presence"),
    ]
    assert absences(paths, Source()) == [
        *(None, "empty: the file has 0 bytes", "missing: no such object"),
        *(None, "missing: no such file", "not a file: the path is a directory"),
    ]


def test_a_listing_of_a_full_bucket_goes_on_from_page_to_page(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = {f"s3://full/{number:05d}.jpg": number % 7 for number in range(5000) if number % 11}
    asked: list[str] = []

    async def page_from(path: str, source: Source) -> ObjectPage:
        asked.append(path)
        sizes = {name: size for name, size in sorted(stored.items()) if name > path[:-1]}
        more = len(sizes) > 1000
        sizes = dict(list(sizes.items())[:1000])
        return ObjectPage("s3://full/", sizes, max(sizes) if more else None)

    async def size_of(path: str, source: Source) -> int | None:
        raise AssertionError(path)

    monkeypatch.setattr(reducer.photos.presence, "page_from", page_from)
    monkeypatch.setattr(reducer.photos.presence, "size_of", size_of)
    paths = [f"s3://full/{number:05d}.jpg" for number in range(5000)]
    np.random.default_rng(0).shuffle(paths)
    found = absences(paths, Source())
    for path, error in zip(paths, found, strict=True):
        expected = "missing: no such object" if path not in stored else None
        assert error == ("empty: the file has 0 bytes" if stored.get(path) == 0 else expected)
    assert len(asked) == 5


def test_a_run_on_a_collection_finds_nothing_missing(collection: Path, tmp_path: Path) -> None:
    summary = run_on(collection, tmp_path / "run", keep=1000).summary
    assert summary["photos_failed"] == 0
    assert summary["photos_looked_for"] == summary["photos"] == 240


def test_few_objects_of_many_are_asked_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    async def page_from(path: str, source: Source) -> ObjectPage:
        asked.append("page")
        number = int(Path(path).stem)
        sizes = {f"s3://full/{number + place:07d}.jpg": 1 for place in range(1000)}
        return ObjectPage("s3://full/", sizes, max(sizes))

    async def size_of(path: str, source: Source) -> int | None:
        asked.append("HEAD")
        return 1

    monkeypatch.setattr(reducer.photos.presence, "page_from", page_from)
    monkeypatch.setattr(reducer.photos.presence, "size_of", size_of)
    assert absences([f"s3://full/{200 * number:07d}.jpg" for number in range(5000)], Source()) == [None] * 5000
    assert asked.count("page") == 5
    assert asked.count("HEAD") == 5000 - 5 * 5
