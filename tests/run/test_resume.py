"""A run that was killed goes on from what it has written, and ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from commands import invoke
from jobs import job_on, ledger_of, parts, reduced_files, run_on, shorten
from killing import killed_before
from machine import small_disk
from s3server import S3Server
from waiting import wait_for

import reducer.run.monitor
import reducer.run.tasks.environment
from reducer import ClusterSpec, InputError, TooManyFailuresError, reduce_images, resume
from reducer.config.job import path_rule
from reducer.config.resolved import resolve
from reducer.errors import LostLockError
from reducer.run.folder import RunFolder
from reducer.run.folder.files import RunFiles
from reducer.run.folder.parts import LedgerParts
from reducer.run.tasks.environment import Environment
from reducer.storage.location import Location
from reducer.storage.paths import with_paths

SERIAL = ClusterSpec(workers=0)
#: How often the client is killed at a random moment: more where one has the time.
KILLS = int(os.environ.get("REDUCER_KILLS", "3"))
OPTIONS = {"keep": 1, "rank_all": True, "partition_images": 100}
FLAGS = ["--keep", "1", "--rank-all", "--partition-images", "100"]


def assert_same(run: Path, whole: Path) -> None:
    assert reduced_files(run) == reduced_files(whole)
    assert ledger_of(run).equals(ledger_of(whole), check_metadata=True)
    ours, theirs = (json.loads((folder / "summary.json").read_text()) for folder in (run, whole))
    for name in ("status", "reasons", "quality", "photos_read", "photos_failed", "bytes_read", "failures", "digest"):
        assert ours[name] == theirs[name], name
    left = {path.name for path in run.iterdir()} - {path.name for path in whole.iterdir()}
    assert not left
    assert not [path for path in run.rglob("*") if path.name.endswith(".tmp")]


def command(collection: Path, run: Path | str, *options: str, workers: int = 2) -> list[str]:
    paths = [str(collection / "train"), "--manifest", str(collection / "train.csv"), "--output", str(run)]
    return [sys.executable, "-m", "reducer", "run", *paths, "--workers", str(workers), "--no-report", *FLAGS, *options]


def start(*arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def kill(process: subprocess.Popen[bytes], workers: bool = False) -> None:
    """``kill -9`` the client, or it and all its workers at once."""
    children = psutil.Process(process.pid).children(recursive=True) if workers else []
    process.kill()
    for child in children:
        child.kill()
    process.wait()


@pytest.fixture(scope="module")
def whole(slow_collection: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    run_on(slow_collection, run, **OPTIONS)
    return run


def test_a_client_that_is_killed_at_random_moments(slow_collection: Path, whole: Path, tmp_path: Path) -> None:
    for name in ("warm", "undisturbed"):  # the first may be slow
        started = time.monotonic()
        subprocess.run(command(slow_collection, tmp_path / name), capture_output=True, check=True)
        takes = time.monotonic() - started
        assert_same(tmp_path / name, whole)
    moments = random.Random(os.environ.get("REDUCER_SEED", "0"))
    found: Counter[str] = Counter()
    for number in range(KILLS):
        run = tmp_path / f"run{number}"
        process = start(*command(slow_collection, run))
        time.sleep(moments.uniform(0.2, 1) * takes)
        ended = process.poll() is not None
        kill(process)
        status = json.loads((run / "summary.json").read_text())["status"] if (run / "summary.json").exists() else "none"
        hashed = len(parts(run))
        workers = moments.choice(["0", "1", "2", "3"])
        code, _, err = invoke("resume", run, "--workers", workers, "--quiet")
        if status == "none":
            # Killed before it came to its first photo: there is nothing to go on from, and it says so.
            assert (code, "is no run folder" in err) == (2, True)
            subprocess.run(command(slow_collection, run), capture_output=True, check=True)
            found["before the run folder"] += 1
        else:
            assert code == 0, err
            found["after the end" if ended or status == "done" else "with parts" if hashed else "without parts"] += 1
        assert_same(run, whole)
        shutil.rmtree(run)
    print(f"\nkilled after {takes:.1f} s x 0.2 to 1: {dict(found)}")
    assert sum(found.values()) == KILLS


@pytest.mark.parametrize("options", [[], ["--total", "60", "--cross-label"]], ids=["plain", "budget"])
def test_a_client_that_is_killed_at_every_file_that_it_writes(
    collection: Path, tmp_path: Path, options: list[str]
) -> None:
    arguments = [str(collection / "train"), "--manifest", str(collection / "train.csv"), "--workers", "0", "--quiet"]
    arguments += ["--partition-images", "80", *(options or ["--keep", "8"])]
    assert invoke("run", *arguments, "--no-report", "--output", tmp_path / "whole")[0] == 0
    killed = 0
    for number in range(1, 30):
        run = tmp_path / str(number)
        if not killed_before("", number, "run", *arguments, "--output", run):
            break
        killed += 1
        assert (run / "lock.json").exists()
        code, _, err = invoke("resume", run, "--workers", "0", "--quiet")
        if number == 1:  # not even the first summary is there
            assert (code, "is no run folder" in err) == (2, True)
            assert invoke("run", *arguments, "--no-report", "--output", run)[0] == 0
        else:
            assert code == 0, err
        assert_same(run, tmp_path / "whole")
        if options:
            assert (run / "cross_label.parquet").read_bytes() == (tmp_path / "whole/cross_label.parquet").read_bytes()
    # The summary, the plan, two pieces of the largest label, three parts (again with a budget, or else those unread),
    # two lists, (pairs,) the summary.
    assert killed == (14 if options else 11)


def test_client_and_workers_that_are_killed_together(
    slow_collection: Path, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    process = start(*command(slow_collection, run, workers=3))
    wait_for(lambda: len(parts(run)) > 3, "the first parts")
    kill(process, workers=True)
    before = {name: (run / "images" / name).stat().st_mtime_ns for name in parts(run)}
    assert 3 < len(before) < 29
    state = invoke("status", run)[1]
    assert "state:      ended without a word (killed?); go on with: reducer resume" in state
    assert f"done:       {sum(rows_of(run)):,} of 2,880 photos, {len(before)} of " in state
    assert invoke("resume", run, "--workers", "1")[0] == 0
    expected = f"host {os.uname().nodename}, pid {process.pid}) was taken over"
    assert f"{run}: the lock of a run that ended without giving it back ({expected}" in caplog.text
    assert_same(run, whole)
    # Only what was missing was read, by the plan that was there, whatever the number of workers.
    assert before.items() <= {name: (run / "images" / name).stat().st_mtime_ns for name in parts(run)}.items()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["resumed"] == 1
    assert 0 < summary["photos_read_this_time"] < 2880


def rows_of(run: Path) -> Iterator[int]:
    folder = RunFolder(str(run))
    return (tally.read for _, tally in folder.parts.footers().values())


def test_a_run_that_was_stopped_goes_on_and_is_then_done(slow_collection: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(*command(slow_collection, run))
    wait_for(lambda: len(parts(run)) > 2, "the first parts")
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert invoke("status", run)[1].startswith(f"state:      stopped; go on with: reducer resume {run}\n")
    code, out, _ = invoke("resume", run, "--workers", 0)
    assert code == 0
    assert ", of them now" not in out
    assert " of them now, in " in out
    assert_same(run, whole)
    before = (run / "summary.json").read_bytes()
    code, out, _ = invoke("resume", run, "--address", "tcp://127.0.0.1:1")  # no cluster is needed
    assert code == 0
    assert out.startswith("Nothing was left to do.\n")
    assert (run / "summary.json").read_bytes() == before
    assert "state:      done\ndone:       2,880 of 2,880 photos" in invoke("status", run)[1]


def test_two_runs_on_one_folder(slow_collection: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(*command(slow_collection, run))
    wait_for(lambda: len(parts(run)) > 1, "the first parts")
    state = invoke("status", run)[1]
    assert f"state:      at work (host {os.uname().nodename}, process {process.pid}, since " in state
    for arguments in (command(slow_collection, run, "--overwrite")[3:], ["resume", str(run)]):
        code, _, err = invoke(*arguments)
        assert code == 2
        assert f"Error: {run} is locked by another run: host {os.uname().nodename}, process {process.pid}" in err
        assert "--break-lock" in err
    assert process.wait(60) == 0
    assert_same(run, whole)


@pytest.fixture
def half(collection: Path, tmp_path: Path) -> Path:
    """A run of which half is done."""
    run_on(collection, tmp_path / "half", partition_images=30)
    shorten(tmp_path / "half", 2)
    return tmp_path / "half"


def test_a_plan_that_holds_paths_is_gone_on_with(half: Path, collection: Path, tmp_path: Path) -> None:
    """As plans did before rules told them."""
    folder = RunFolder(str(half))
    rows, terms = folder.plan.read()
    assert rows["path"].null_count == rows.num_rows
    job = job_on(collection, half)
    folder.plan.write(with_paths(path_rule(job), rows), terms)
    assert folder.plan.read()[0]["path"].null_count == 0
    resume(half, SERIAL, progress=False)
    run_on(collection, tmp_path / "whole", partition_images=30)
    assert_same(half, tmp_path / "whole")


def change(run: Path, **values: Any) -> None:
    summary = json.loads((run / "summary.json").read_text())
    summary["job"] |= values
    (run / "summary.json").write_text(json.dumps(summary))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("hash", "phash", r"--hash was 'dhash' and is 'phash'"),
        ("hash_size", 16, r"--hash-size was 8 and is 16"),
        ("decode", "exact", r"--decode was 'fast' and is 'exact'"),
        ("exif_orientation", True, r"--exif-orientation was False and is True"),
        ("seed", 5, r"--seed was 0 and is 5"),
        ("candidates", 30, r"--candidates was 1000 and is 30"),
        ("strategy", "pairs", r"--strategy was 'farthest-first' and is 'pairs'"),
        ("keep", 5, r"--keep was 8 and is 5"),
        ("images", "/elsewhere", r"IMAGES was '/.*train' and is '/elsewhere'"),
    ],
)
def test_a_run_that_was_begun_otherwise_is_refused(half: Path, name: str, value: object, message: str) -> None:
    before = parts(half)
    change(half, **{name: value})
    with pytest.raises(InputError, match=rf"was begun otherwise: {message}\. To begin again: .*--overwrite.*--reuse"):
        resume(half, SERIAL, progress=False)
    assert parts(half) == before
    assert not (half / "lock.json").exists()


def test_a_manifest_that_has_changed_is_refused_and_one_that_is_gone_is_not_needed(
    collection: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(collection, tmp_path / "copy")
    run_on(tmp_path / "copy", tmp_path / "run", partition_images=30)
    whole = reduced_files(tmp_path / "run")
    shorten(tmp_path / "run", 2)
    manifest = tmp_path / "copy" / "train.csv"
    content = manifest.read_text()
    manifest.write_text(content.replace("\n", "\nfeedbeef,1\n", 1))
    with pytest.raises(InputError, match=r"--manifest \S+train.csv has another content"):
        resume(tmp_path / "run", SERIAL, progress=False)
    manifest.unlink()
    resume(tmp_path / "run", SERIAL, progress=False)
    assert "whether it has changed cannot be told; the plan in" in caplog.text
    assert reduced_files(tmp_path / "run") == whole


@pytest.mark.parametrize("package", ["pillow", "imagehash", "numpy", "reducer", "probes"])
def test_other_versions_are_refused_by_name(half: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    now = reducer.run.tasks.environment.environment(resolve(job_on(half, half)).photo_settings)
    probes = now.probes | ({"transparent.png": "0" * 16} if package == "probes" else {})
    other = Environment(now.versions | ({} if package == "probes" else {package: "1.2.3"}), probes)
    monkeypatch.setattr("reducer.run.tasks.serial.environment", lambda settings: other)
    title = {"pillow": "has Pillow 1.2.3", "imagehash": "imagehash 1.2.3", "numpy": "numpy 1.2.3"}.get(package)
    title = (
        title or {"reducer": "this is 1.2.3: install that version", "probes": "hash the probe transparent.png"}[package]
    )
    with pytest.raises(InputError, match=title):
        resume(half, SERIAL, progress=False)
    assert len(parts(half)) == 2
    monkeypatch.undo()
    resume(half, SERIAL, progress=False)


def test_the_working_directory_does_not_matter(
    collection: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(collection)
    code = invoke("run", "train", "--manifest", "train.csv", "--output", tmp_path / "run", "--workers", 0, "--quiet")[0]
    assert code == 0
    whole = reduced_files(tmp_path / "run")
    shorten(tmp_path / "run", 1)
    monkeypatch.chdir(tmp_path)
    assert invoke("resume", "run", "--workers", 0, "--quiet")[0] == 0
    assert reduced_files(tmp_path / "run") == whole


def test_labels_that_were_kept_whole_are_read_later(
    collection: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    options = {"partition_images": 10, "candidates": 30}
    run_on(collection, whole, rank_all=True, **options)
    first = run_on(collection, run, **options)
    small = first.summary["reasons"]["kept-small-label"]
    # It is cut off in the middle, and goes on without being told again what it was at.
    real = LedgerParts.write
    written: list[int] = []

    def stops(files: LedgerParts, index: int, *rest: Any) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(index)
        real(files, index, *rest)

    monkeypatch.setattr(LedgerParts, "write", stops)
    with pytest.raises(KeyboardInterrupt):
        resume(run, SERIAL, rank_all=True, progress=False)
    monkeypatch.undo()
    read = json.loads((run / "summary.json").read_text())["photos_read_this_time"]
    assert 0 < read < small
    result = resume(run, SERIAL, progress=False)
    assert read + result.summary["photos_read_this_time"] == small
    assert reduced_files(run) == reduced_files(whole)
    assert ledger_of(run).equals(ledger_of(whole))
    assert result.summary["job"]["rank_all"] is True
    assert result.summary["quality"] == json.loads((whole / "summary.json").read_text())["quality"]
    assert resume(run, SERIAL, rank_all=True, progress=False).summary["resumed"] == 2  # nothing was left to do


@pytest.fixture
def torn(collection: Path, tmp_path: Path) -> tuple[Path, Callable[[], None]]:
    """A copy of the collection some of whose photos are away, and what brings them back."""
    folder = tmp_path / "torn"
    shutil.copytree(collection, folder)
    photos = sorted((folder / "train").rglob("*.jpg"))[::20]
    for photo in photos:
        photo.rename(photo.with_suffix(".away"))

    def mend() -> None:
        for photo in photos:
            if photo.with_suffix(".away").exists():
                photo.with_suffix(".away").rename(photo)

    return folder, mend


@pytest.mark.parametrize(
    "options", [{}, {"total": 60, "keep": None}, {"strategy": "facility-location", "drop_flat": True}]
)
@pytest.mark.parametrize("workers", [0, 2])
def test_photos_that_failed_are_tried_again(
    torn: tuple[Path, Callable[[], None]], tmp_path: Path, options: dict[str, Any], workers: int
) -> None:
    collection, mend = torn
    run = tmp_path / "run"
    settings = {"partition_images": 60, "rank_all": True, **options}
    failed = run_on(collection, run, max_failures=1.0, **settings).images.query("reason == 'failed'")
    assert len(failed) == 12
    lists = reduced_files(run)
    # Not back yet: nothing changes.
    result = resume(run, SERIAL, retry_failed=True, progress=False)
    assert result.summary["photos_read_this_time"] == 12
    assert reduced_files(run) == lists
    mend()
    result = resume(run, ClusterSpec(workers=workers), retry_failed=True, progress=False)
    assert result.summary["photos_read_this_time"] == 12
    whole = tmp_path / "whole"
    run_on(collection, whole, max_failures=1.0, **settings)
    assert reduced_files(run) == reduced_files(whole)
    ledgers = [ledger_of(folder).drop_columns(["mtime"]) for folder in (run, whole)]
    assert ledgers[0].equals(ledgers[1])
    ours, theirs = (json.loads((folder / "summary.json").read_text()) for folder in (run, whole))
    for name in ("quality", "reasons", "photos_failed", "bytes_read", "photos_read"):
        assert ours[name] == theirs[name], name


def test_only_failed_photos_are_read_and_only_their_labels_ranked(
    torn: tuple[Path, Callable[[], None]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import reducer.run.tasks.rank_stage

    collection, mend = torn
    failed = run_on(collection, tmp_path / "run", rank_all=True, max_failures=1.0).images.query("reason == 'failed'")
    mend()
    ranked, read = [], []
    real_rank, real_read = reducer.run.tasks.rank_stage.rank_label, reducer.photos.process.read_all

    def rank_label(label: str, *rest: Any) -> Any:
        ranked.append(label)
        return real_rank(label, *rest)

    def read_all(paths: list[str], *rest: Any, **options: Any) -> Any:
        read.extend(paths)
        return real_read(paths, *rest, **options)

    monkeypatch.setattr(reducer.run.tasks.rank_stage, "rank_label", rank_label)
    monkeypatch.setattr("reducer.photos.process.read_all", read_all)
    resume(tmp_path / "run", SERIAL, retry_failed=True, progress=False)
    assert sorted(read) == sorted(failed["path"])
    assert sorted(ranked) == sorted(set(failed["label"]))


def test_too_many_failures_stay_so_until_they_are_mended(torn: tuple[Path, Callable[[], None]], tmp_path: Path) -> None:
    collection, mend = torn
    with pytest.raises(TooManyFailuresError, match="12 of 240 photos read have failed"):
        run_on(collection, tmp_path / "run", rank_all=True, max_failures=0.01)
    code, _, err = invoke("resume", tmp_path / "run", "--workers", 0)
    assert (code, "12 of 240 photos read have failed, over --max-failures 0.01" in err) == (3, True)
    assert invoke("resume", tmp_path / "run", "--workers", 0, "--max-failures", 0.5)[0] == 0
    mend()
    assert invoke("resume", tmp_path / "run", "--workers", 0, "--retry-failed", "--quiet") == (0, "", "")


def test_hashes_to_avoid_are_those_of_the_beginning(collection: Path, tmp_path: Path) -> None:
    hashes = run_on(collection, tmp_path / "first", rank_all=True).images["hash"]
    avoid = tmp_path / "avoid"
    avoid.write_text("\n".join(hashes[::9]) + "\n")
    options = {"avoid": str(avoid), "avoid_distance": 3, "partition_images": 30}
    run_on(collection, tmp_path / "whole", **options)
    run_on(collection, tmp_path / "run", **options)
    shorten(tmp_path / "run", 3)
    avoid.unlink()
    resume(tmp_path / "run", SERIAL, progress=False)
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_what_cannot_be_gone_on_with(half: Path, tmp_path: Path) -> None:
    for run in (tmp_path, tmp_path / "nowhere"):
        code, _, err = invoke("resume", run)
        assert (code, "is no run folder" in err) == (2, True)
    (half / "images" / "part-00001.parquet").write_bytes(b"PAR1 and no more")
    code, _, err = invoke("resume", half, "--workers", 0)
    assert code == 2
    assert "part-00001.parquet cannot be read" in err
    assert "If it is damaged: take it out, then reducer resume" in err
    (half / "images" / "part-00001.parquet").unlink()
    (half / "plan.parquet").write_bytes(b"PAR1 and no more")
    code, _, err = invoke("resume", half, "--workers", 0)
    assert (code, "plan.parquet cannot be read" in err) == (2, True)
    shutil.copy(half / "images" / "part-00000.parquet", half / "plan.parquet")
    for command in (["resume", half], ["status", half]):
        code, _, err = invoke(*command)
        assert (code, "plan.parquet is no plan of ours" in err) == (2, True)
    (half / "plan.parquet").unlink()
    summary = json.loads((half / "summary.json").read_text())
    (half / "summary.json").write_text(json.dumps(summary | {"status": "done"}))
    code, _, err = invoke("resume", half)
    assert (code, "the plan of the run in" in err) == (2, True)
    assert parts(half) == ["part-00000.parquet"]
    (half / "summary.json").write_text(json.dumps(summary | {"format_version": 1}))
    for command in (["resume", half], ["status", half], ["explain", half, "x"], ["cut", half, "--output", "x.csv"]):
        code, _, err = invoke(*command)
        assert (code, "was written by another version of Reducer (format 1" in err) == (2, True)


def test_a_disk_that_is_full(collection: Path, tmp_path: Path) -> None:
    """A real one: a file system in memory of so many bytes."""
    disk = tmp_path / "disk"
    with small_disk(disk, "96k") as enlarge:
        options = {"rank_all": True, "partition_images": 20}
        code, _, err = invoke(
            *["run", collection / "train", "--manifest", collection / "train.csv", "--output", disk / "run"],
            *["--rank-all", "--keep", 8, "--partition-images", 20, "--workers", 0, "--quiet"],
        )
        assert code == 1
        assert "cannot be written: No space left on device. What was hashed so far is kept. To go on: reducer" in err
        assert 0 < len(parts(disk / "run")) < 12
        assert invoke("resume", disk / "run", "--workers", 0, "--quiet")[0] == 1  # it is full still
        enlarge("10m")
        assert invoke("resume", disk / "run", "--workers", 0, "--quiet") == (0, "", "")
        run_on(collection, tmp_path / "whole", **options)
        assert_same(disk / "run", tmp_path / "whole")


def storage(s3: S3Server, flag: str = "--output-storage-option") -> list[str]:
    pairs = s3.options()
    return [part for name, value in pairs.items() for part in (flag, f"{name}={value}")]


def test_a_run_on_s3_goes_on(
    s3: S3Server, slow_collection: Path, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    s3.make_bucket("resume")
    url, opened = "s3://resume/run", storage(s3)
    process = start(*command(slow_collection, url, *opened))
    wait_for(lambda: len(s3.list_keys("resume", "run/images/")) > 3, "the first parts")
    kill(process, workers=True)
    code, _, err = invoke("resume", url, *opened, "--workers", "0")
    assert code == 2
    assert f"process {process.pid}" in err
    assert "--break-lock" in err
    before = s3.list_keys("resume", "run/images/")
    assert f"(killed?); go on with: reducer resume {url} --break-lock\n" in invoke("status", url, *opened)[1]
    code, _, err = invoke("resume", url, *opened, "--workers", "0", "--break-lock")
    assert code == 0, err
    assert "was broken (--break-lock)" in caplog.text
    place = Location(url, s3.options())
    for name, content in reduced_files(whole).items():
        assert s3.client().get_object(Bucket="resume", Key=f"run/{name}")["Body"].read() == content
    assert RunFolder(place).parts.ledger().equals(RunFolder(str(whole)).parts.ledger())
    assert "run/lock.json" not in s3.list_keys("resume", "run/")
    assert set(before) < set(s3.list_keys("resume", "run/images/"))
    assert invoke("status", url, *opened)[1].startswith("state:      done\n")
    code, _, err = invoke("cut", url, "--output", tmp_path / "cut.csv", "--keep", 1, *opened, "--quiet")
    assert (code, (tmp_path / "cut.csv").read_bytes()) == (0, reduced_files(whole)["reduced.csv"])


def test_photos_on_s3_need_their_options_again(s3: S3Server, tmp_path: Path) -> None:
    opened = s3.options()
    job = {"keep": 8, "manifest": "s3://trial/train.csv", "partition_images": 30, "manifest_storage_options": opened}
    from reducer import Job

    reduce_images(
        Job("s3://trial/train", str(tmp_path / "run"), storage_options=opened, report=False, **job),
        SERIAL,
        progress=False,
    )
    whole = reduced_files(tmp_path / "run")
    shorten(tmp_path / "run", 2)
    code, _, err = invoke("resume", tmp_path / "run", "--workers", 0)
    assert code == 2
    assert "was opened with --storage-option endpoint_url, key, secret, which a run folder does not keep" in err
    flags = [*storage(s3, "--storage-option"), *storage(s3, "--manifest-storage-option")]
    code, _, err = invoke("resume", tmp_path / "run", "--workers", 0, "--quiet", "--reader", "obstore", *flags)
    assert (code, err) == (0, "")
    assert reduced_files(tmp_path / "run") == whole


def test_how_far_a_run_is_can_be_seen_meanwhile(
    slow_collection: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reducer.run.monitor, "NOTED_EVERY", 0.0)
    seen: list[str] = []
    real = LedgerParts.write

    def written(files: LedgerParts, index: int, *rest: Any) -> None:
        real(files, index, *rest)
        if index in (3, 9):
            seen.append(invoke("status", tmp_path / "run")[1])

    monkeypatch.setattr(LedgerParts, "write", written)
    run_on(slow_collection, tmp_path / "run", **OPTIONS)
    assert all(text.startswith("state:      at work (host ") for text in seen)
    assert "done:       4" in seen[0].replace(",", "")
    assert ", about " in seen[1]
    assert "rate:       " in seen[1]
    assert "photos/s" in seen[1]


def test_lists_beside_the_run_are_named_as_one_likes(
    collection: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The content of --always-keep and --avoid is in the plan; their paths do not matter any more."""
    hashes = run_on(collection, tmp_path / "first", rank_all=True).images["hash"]
    (tmp_path / "avoid").write_text("\n".join(hashes[::9]) + "\n")
    (tmp_path / "ids").write_text((collection / "train.csv").read_text().splitlines()[5].split(",")[0])
    monkeypatch.chdir(tmp_path)
    options = {"avoid": "avoid", "avoid_distance": 3, "always_keep": "ids", "partition_images": 30}
    run_on(collection, tmp_path / "whole", **options)
    run_on(collection, tmp_path / "run", **options)
    for folder in (tmp_path, collection):
        monkeypatch.chdir(folder)
        shorten(tmp_path / "run", 2)
        resume(tmp_path / "run", SERIAL, progress=False)
        assert_same(tmp_path / "run", tmp_path / "whole")
    shorten(tmp_path / "run", 2)
    (tmp_path / "run" / "avoid.parquet").unlink()
    with pytest.raises(InputError, match=r"the hashes to avoid \(avoid\.parquet\) are not what they were"):
        resume(tmp_path / "run", SERIAL, progress=False)


def test_parts_that_went_away_are_missed(collection: Path, tmp_path: Path) -> None:
    run_on(collection, tmp_path / "whole", partition_images=30)
    for number, name in enumerate(["part-00001.parquet", "part-unread-00000.parquet"]):
        run = tmp_path / str(number)
        run_on(collection, run, partition_images=30)
        (run / "images" / name).unlink()
        code, _, err = invoke("cut", run, "--output", tmp_path / "x.csv")
        assert code == 2
        assert "of 240 photos: part files are missing. First: reducer resume" in err
        assert invoke("resume", run, "--workers", 0, "--quiet")[0] == 0
        assert reduced_files(run) == reduced_files(tmp_path / "whole")
        assert ledger_of(run).equals(ledger_of(tmp_path / "whole"))
        os.truncate(run / "images" / name, 3000)
        for command in (["cut", run, "--output", tmp_path / "x.csv"], ["explain", run, "x"], ["status", run]):
            code, out, err = invoke(*command)
            assert (code, out) == (2, "")
            assert "cannot be read" in err
            assert "take it out, then reducer resume" in err


def test_a_finished_run_is_told_to_be_at_work_before_anything_of_it_is_taken_out(
    torn: tuple[Path, Callable[[], None]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection, mend = torn
    run = tmp_path / "run"
    run_on(collection, run, max_failures=1.0)
    mend()
    real = RunFiles.remove

    def killed(files: RunFiles, names: list[str], *rest: str) -> None:
        real(files, names, *rest)
        if names:
            state = json.loads((run / "summary.json").read_text())["status"]
            monkeypatch.setattr(RunFiles, "write", lambda *_: None)  # as dead as can be
            raise KeyboardInterrupt(state)

    monkeypatch.setattr(RunFiles, "remove", killed)
    with pytest.raises(KeyboardInterrupt, match="running"):
        resume(run, SERIAL, retry_failed=True, progress=False)
    monkeypatch.undo()
    assert not list((run / "images").glob("part-unread-*"))
    assert invoke("cut", run, "--output", tmp_path / "x.csv")[0] == 2
    resume(run, SERIAL, retry_failed=True, progress=False)
    run_on(collection, tmp_path / "whole")
    assert reduced_files(run) == reduced_files(tmp_path / "whole")


def test_a_notebook_that_is_interrupted_says_how_to_go_on(
    collection: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("reducer.run.execute.write_partitions", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"What was hashed so far is kept\. To go on: the same call again, or"):
        run_on(collection, tmp_path / "run")


def test_photos_that_are_out_of_sight_are_no_failures(collection: Path, tmp_path: Path) -> None:
    shutil.copytree(collection, tmp_path / "copy")
    run_on(tmp_path / "copy", tmp_path / "run", partition_images=30)
    whole = reduced_files(tmp_path / "run")
    shorten(tmp_path / "run", 2)
    (tmp_path / "copy").rename(tmp_path / "away")
    code, _, err = invoke("resume", tmp_path / "run", "--workers", 0)
    assert code == 2
    assert "IMAGES" in err
    assert "does not exist: give the folder that holds the photos" in err
    (tmp_path / "away").rename(tmp_path / "copy")
    resume(tmp_path / "run", SERIAL, progress=False)
    assert reduced_files(tmp_path / "run") == whole


def test_a_run_whose_lock_is_taken_writes_nothing_more(
    collection: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was at work still, whatever the other one thought: no file of the other's may be replaced."""
    run = tmp_path / "run"
    real = LedgerParts.write
    written: list[int] = []

    def overtaken(files: LedgerParts, index: int, *rest: Any) -> None:
        if written == [0]:
            monkeypatch.setattr(LedgerParts, "write", real)
            run_on(collection, run, overwrite=True, break_lock=True, partition_images=30)
        written.append(index)
        real(files, index, *rest)

    monkeypatch.setattr(LedgerParts, "write", overtaken)
    with pytest.raises(LostLockError, match=r"was taken by another run: this one ends, and writes nothing more$"):
        run_on(collection, run, hash="phash", partition_images=30)
    monkeypatch.undo()
    run_on(collection, tmp_path / "whole", partition_images=30)
    assert_same(run, tmp_path / "whole")


def test_a_budget_in_bytes_that_is_too_small_is_no_dead_end(collection: Path, tmp_path: Path) -> None:
    arguments = ["run", collection / "train", "--manifest", collection / "train.csv", "--workers", 0, "--quiet"]
    code, _, err = invoke(*arguments, "--output", tmp_path / "small", "--max-bytes", "9kB")
    assert code == 2
    enough = err.split("give at least --max-bytes ")[1].split(".")[0]
    advice = f"to read none of them again, run again with more, another --output and --reuse {tmp_path / 'small'}\n"
    assert err.endswith(advice)
    arguments += ["--output", tmp_path / "enough", "--reuse", tmp_path / "small"]
    code, _, err = invoke(*arguments, "--max-bytes", enough)
    assert code == 0
    summary = json.loads((tmp_path / "enough" / "summary.json").read_text())
    assert (summary["photos_read"], summary["photos_reused"], summary["photos_kept"]) == (0, 240, 12)
    assert summary["bytes_kept"] == int(enough)


def test_a_run_that_was_begun_anew_is_not_nothing(collection: Path, tmp_path: Path) -> None:
    run_on(collection, tmp_path / "run")
    (tmp_path / "run" / "plan.parquet").unlink()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for name in ("partitions", "photos_read"):
        del summary[name]
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary | {"status": "running"}))
    code, out, _ = invoke("resume", tmp_path / "run", "--workers", 0)
    assert (code, "Nothing was left to do" in out) == (0, False)
    assert "Kept " in out


def test_no_failure_at_all_may_be_asked_for(torn: tuple[Path, Callable[[], None]], tmp_path: Path) -> None:
    run_on(torn[0], tmp_path / "run", rank_all=True)
    assert invoke("resume", tmp_path / "run", "--max-failures", 0)[0] == 3
    assert invoke("resume", tmp_path / "run", "--read-ahead", 0)[0] == 2
