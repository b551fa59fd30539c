"""The command as a person types it: flags, messages, exit codes."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import psutil
import pytest
from click.testing import CliRunner
from commands import invoke, reduce
from jobs import reduced_files, run_on
from machine import ROOT
from waiting import wait_for

import reducer
from reducer.cli.main import main

FILE = str(ROOT / "cluster.yaml")


def test_a_run_says_what_it_did(collection: Path, tmp_path: Path) -> None:
    code, out, _ = reduce(collection, tmp_path / "run")
    assert code == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert f"Kept {summary['photos_kept']} of 240 photos, 12 labels" in out
    selection, random, certificate = (summary["quality"][name] for name in ("selection", "random", "certificate"))
    lines = [line.strip() for line in out.splitlines()]
    assert re.search(r"Distances in bits, of 64 +kept +random\n", out)
    for what, name, form in [
        ("smallest pair distance, mean over labels", "mean_smallest_pair_distance", ",.1f"),
        ("mean pair distance", "mean_pair_distance", ",.1f"),
        ("near-copy pairs (at most 6 bits)", "near_copy_pairs", ",d"),
        ("mean distance to the nearest kept photo", "mean_nearest_kept_distance", ",.1f"),
        ("the largest such distance, mean over labels", "mean_coverage_radius", ",.1f"),
        ("the largest such distance of all", "worst_coverage_radius", ",d"),
    ]:
        line = next(line for line in lines if line.startswith(what))
        assert line.split()[-2:] == [format(selection[name], form), format(random[name], form)]
    mean, worst = (int(1000 * certificate[name] + 0.5) // 10 for name in ("mean", "worst"))
    assert f"at least {mean} % of what any choice of the photos read could reach" in out
    assert f"(mean over {certificate['labels']} labels; the worst {worst} %)" in out
    assert re.search(r"Left out: \d+\.\d MB", out)
    assert "(reduced.csv and reduced.parquet, images/, summary.json)" in out
    expected = {"reduced.csv", "reduced.parquet", "images", "summary.json", "plan.parquet"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == expected


def test_a_run_says_what_it_left_out(collection: Path, tmp_path: Path) -> None:
    assert reduce(collection, tmp_path / "test", "--labels", f"{first_label(collection)}", "--rank-all")[0] == 0
    code, out, _ = reduce(collection, tmp_path / "run", "--avoid", tmp_path / "test", "--strategy", "random")
    assert code == 0
    reasons = json.loads((tmp_path / "run" / "summary.json").read_text())["reasons"]
    assert f"Not kept, near a photo to avoid: {reasons['avoided']} photos (reason 'avoided')" in out
    assert "Certificate" not in out
    # Candidates are drawn before any is left out: what is missing then is told.
    options = ["--keep", 5, "--candidates", 5, "--avoid", tmp_path / "test", "--avoid-distance", 20, "--quiet"]
    assert reduce(collection, tmp_path / "few", *options) == (0, "", "")
    summary = json.loads((tmp_path / "few" / "summary.json").read_text())
    assert first_label(collection) in summary["labels_short"]
    assert (
        reduce(collection, tmp_path / "few", *options[:-1], "--overwrite")[1].count("though some were not drawn") == 1
    )


def test_a_photo_to_keep_always_that_fails_is_told_of(collection: Path, tmp_path: Path) -> None:
    lines = (collection / "train.csv").read_text().splitlines()
    (tmp_path / "train.csv").write_text("\n".join([*lines, f"feedbeef,{first_label(collection)}"]) + "\n")
    (tmp_path / "ids").write_text(f"feedbeef\n{lines[1].split(',')[0]}")
    options = ["--manifest", tmp_path / "train.csv", "--always-keep", tmp_path / "ids"]
    code, out, _ = reduce(collection, tmp_path / "run", *options)
    assert code == 0
    assert "To be kept always, but failed: 1: feedbeef\n" in out
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["always_keep_failed"] == ["feedbeef"]


def first_label(collection: Path) -> str:
    return (collection / "train.csv").read_text().splitlines()[1].split(",")[1]


def test_quiet_is_silent(collection: Path, tmp_path: Path) -> None:
    assert reduce(collection, tmp_path / "run", "--quiet") == (0, "", "")


def test_every_option_reaches_the_job(collection: Path, tmp_path: Path) -> None:
    options = {
        "--candidates": ("all", "candidates", None),
        "--strategy": ("pairs", "strategy", "pairs"),
        "--decode": ("exact", "decode", "exact"),
        "--hash": ("phash", "hash", "phash"),
        "--hash-size": (4, "hash_size", 4),
        "--always-keep": (tmp_path / "ids", "always_keep", str(tmp_path / "ids")),
        "--avoid": (tmp_path / "hashes", "avoid", str(tmp_path / "hashes")),
        "--avoid-distance": (2, "avoid_distance", 2),
        "--seed": (5, "seed", 5),
        "--reader": ("obstore", "reader", "obstore"),
        "--read-ahead": (3, "read_ahead", 3),
        "--min-distance": (4.5, "min_distance", 4.5),
        "--max-bytes": ("15MB", "max_bytes", 15_000_000),
        "--min-per-label": (2, "min_per_label", 2),
        "--limit-labels": (3, "limit_labels", 3),
        "--partition-images": (50, "partition_images", 50),
        "--max-pixels": (1_000_000, "max_pixels", 1_000_000),
        "--max-failures": (0.5, "max_failures", 0.5),
        "--format": ("csv", "format", "csv"),
        "--id-column": ("photo", "id_column", "photo"),
        "--label-column": ("class", "label_column", "class"),
        "--path-template": ("{id[0]}/{id[1]}/{id[2]}/{id}.jpg", "path_template", "{id[0]}/{id[1]}/{id[2]}/{id}.jpg"),
    }
    content = (collection / "train.csv").read_text().replace("id,landmark_id", "photo,class", 1)
    (tmp_path / "other.csv").write_text(content)
    (tmp_path / "ids").write_text(content.splitlines()[1].split(",")[0])
    (tmp_path / "hashes").write_text("12ab")
    options["--manifest"] = (tmp_path / "other.csv", "manifest", str(tmp_path / "other.csv"))
    switches = ["--rank-all", "--exif-orientation", "--drop-flat", "--cross-label", "--break-lock"]
    flags = [part for flag, (value, _, _) in options.items() for part in (flag, value)]
    code, _, err = reduce(collection, tmp_path / "run", *flags, *switches, "--quiet", "--log-level", "error")
    assert code == 0, err
    job = json.loads((tmp_path / "run" / "summary.json").read_text())["job"]
    for _, name, expected in options.values():
        assert job[name] == expected
    assert job["rank_all"] is job["exif_orientation"] is job["drop_flat"] is job["cross_label"] is True
    assert (tmp_path / "run" / "cross_label.parquet").exists()
    assert job["keep"] == 8
    assert not (tmp_path / "run" / "reduced.parquet").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--address", "tcp://x:1", "--cluster", str(ROOT / "cluster.yaml")],
            "--address and --cluster exclude each other",
        ),
        (["--address", "tcp://x:1", "--workers", "2"], "--workers and --threads are for the LocalCluster"),
        (["--address", "tcp://x:1", "--threads", "2"], "--workers and --threads are for the LocalCluster"),
        (["--cluster", FILE, "--workers", "2"], "--cluster says where to run"),
        (["--cluster", "nowhere.yaml"], "nowhere.yaml: No such file"),
        (["--candidates", "0"], "'0' is neither a whole number of 1 or more nor 'all'"),
        (["--candidates", "most"], "'most' is neither"),
        (["--candidates", "3"], "--candidates 3 is less than --keep 8"),
        (["--strategy", "best"], "farthest-first"),
        (["--hash", "colorhash"], "dhash-vertical"),
        (["--hash-size", "1"], "--hash-size is 1: expected a whole number from 2 to 32"),
        (["--hash-size", "33"], "--hash-size is 33"),
        (["--hash", "whash", "--hash-size", "12"], "whash needs a power of two"),
        (["--avoid-distance", "3"], "give --avoid too"),
        (["--avoid", "x", "--avoid-distance", "65"], "expected a whole number of bits from 0 to 64"),
        (["--avoid", "x", "--avoid-distance", "-1"], "--avoid-distance is -1"),
        (["--avoid", "nowhere"], "--avoid nowhere: No such file"),
        (["--always-keep", "nowhere"], "--always-keep nowhere: No such file"),
        (["--avoid", "nowhere", "--dry-run", "--no-sample"], "--avoid nowhere: No such file"),
        (["--always-keep", ""], "--always-keep is empty: give a path"),
        (["--keep", "0"], "--keep is 0"),
        (["--total", "9", "--max-bytes", "1GB"], "--total and --max-bytes exclude each other"),
        (["--min-per-label", "2"], "give --total or --max-bytes too"),
        (["--max-bytes", "20 gigs"], "--max-bytes is '20 gigs': expected a number of bytes such as 20GB"),
        (["--min-distance", "-3"], "--min-distance is -3.0: expected a number of bits, 0 or more"),
        (["--reuse", "nowhere"], "nowhere is no run folder"),
        (["--labels", "no such label"], "--labels: no photo has the label 'no such label'"),
        (["--no-sample"], "--no-sample goes with --dry-run"),
        (["--no-such-option"], "No such option"),
        (["--id-column", "photo"], "no column 'photo'"),
        (["--output", "/proc/run"], "--output /proc/run cannot be"),
        (["--output", "x" * 300], "cannot be used: File name too long"),
        (["--address", ""], "the cluster's address is empty"),
        (["--path-template", ""], "--path-template is empty"),
    ],
)
def test_what_is_wrong_before_the_start_is_exit_2(
    collection: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    given = options if any(flag in options for flag in ("--address", "--cluster")) else ["--workers", "0", *options]
    paths = [collection / "train", "--manifest", collection / "train.csv", "--output", tmp_path / "run", "--keep", 8]
    code, out, err = invoke("run", *paths, *given)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_overwritten_by_accident(collection: Path, tmp_path: Path) -> None:
    assert reduce(collection, tmp_path / "run", "--quiet")[0] == 0
    before = reduced_files(tmp_path / "run")
    code, _, err = reduce(collection, tmp_path / "run", "--keep", 2)
    assert code == 2
    assert "--overwrite" in err
    assert reduced_files(tmp_path / "run") == before
    # A run that cannot start leaves the earlier one as it is, even when it may be replaced.
    code = invoke("run", collection / "train", "--output", tmp_path / "run", "--overwrite", "--labels", "x")[0]
    assert code == 2
    assert reduced_files(tmp_path / "run") == before
    assert reduce(collection, tmp_path / "run", "--keep", 2, "--overwrite", "--quiet")[0] == 0
    assert reduced_files(tmp_path / "run") != before


def test_trial_labels_on_the_command_line(collection: Path, tmp_path: Path) -> None:
    labels = sorted({line.split(",")[1] for line in (collection / "train.csv").read_text().splitlines()[1:]})
    code, out, _ = reduce(collection, tmp_path / "run", "--labels", f'{labels[0]},"{labels[5]}"')
    assert code == 0
    assert "2 labels" in out


def test_a_dry_run_measures_and_writes_nothing(collection: Path, tmp_path: Path) -> None:
    code, out, _ = reduce(collection, tmp_path / "run", "--dry-run")
    assert code == 0
    for line in (
        r"labels:         12, of which \d+ are ranked",
        r"photos:         240, of which \d+ are kept unread",
        r"photos to read: \d+, about \d+\.\d MB",
        r"partitions:     \d+",
        r"largest label:  \d+ with \d+ photos",
        r"time:           about \d+\.\d s on 1 worker thread\n",
    ):
        assert re.search(line, out), line
    code, out, _ = reduce(collection, tmp_path / "run", "--dry-run", "--no-sample")
    assert code == 0
    assert "of unknown size" in out
    assert "time:" not in out
    folder = invoke("run", collection / "train", "--output", tmp_path / "run", "--dry-run", "--no-sample", "--rank-all")
    size = sum(path.stat().st_size for path in (collection / "train").rglob("*.jpg"))
    assert f"photos to read: 240, {size / 1e6:.1f} MB" in folder[1]
    code, out, err = reduce(collection, tmp_path / "run", "--dry-run", "--path-template", "wrong/{id}")
    assert code == 3
    assert "missing: no such file" in out
    assert "all 64 photos of the sample have failed" in err
    assert not (tmp_path / "run").exists()


def test_too_many_failures_are_exit_3(collection: Path, tmp_path: Path) -> None:
    code, _, err = reduce(collection, tmp_path / "run", "--path-template", "wrong/{id}.jpg")
    assert code == 3
    assert "wrong/" in err
    assert "Check IMAGES, --path-template or --path-column" in err


def test_too_many_failures_still_say_what_there_is(collection: Path, tmp_path: Path) -> None:
    lines = (collection / "train.csv").read_text().splitlines()
    extra = [f"{i:016x},gone" for i in range(60)]
    (tmp_path / "train.csv").write_text("\n".join([*lines, *extra]) + "\n")
    code, out, err = reduce(collection, tmp_path / "run", "--manifest", tmp_path / "train.csv")
    assert code == 3
    assert "over --max-failures 0.1. Everything is written" in err
    assert "Failed: 60 missing" in out
    assert "Labels left with no photo: 1: gone" in out


def test_an_unexpected_error_is_exit_1(collection: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("reducer.run.prepare.make_plan", broken)
    done = CliRunner().invoke(main, ["run", str(collection / "train"), "--output", str(tmp_path / "run")])
    assert done.exit_code == 1


def test_version_and_help_tell_what_there_is() -> None:
    assert invoke("--version") == (0, f"reducer, version {reducer.__version__}\n", "")
    for name in [None, *main.commands]:
        code, out, _ = invoke(*([name] if name else []), "--help")
        assert code == 0
        assert "Example: reducer" in out, "every command ends in an example"
    for command in main.commands.values():
        assert command.help
        for option in command.params:
            if isinstance(option, click.Option):
                assert option.help, f"{command.name} --{option.name} is not documented"
            else:
                assert str(option.metavar or option.name.upper()) in command.help


def test_a_budget_of_the_command_line_wins_over_the_other_one_of_the_cluster_file(
    collection: Path, tmp_path: Path
) -> None:
    content = {"version": 1, "cluster": {"class": "distributed.LocalCluster"}, "job": {"total": 40, "keep": 8}}
    (tmp_path / "cluster.yaml").write_text(json.dumps(content))
    arguments = ["run", collection / "train", "--manifest", collection / "train.csv", "--cluster"]
    arguments += [tmp_path / "cluster.yaml", "--output", tmp_path / "run", "--dry-run", "--no-sample"]
    assert invoke(*arguments)[0] == invoke(*arguments, "--max-bytes", "9MB")[0] == 0
    # What a run begins with is no matter of those who go on with it: only how its places are opened is taken.
    run_on(collection, tmp_path / "done")
    code, out, _ = invoke("resume", tmp_path / "done", "--cluster", tmp_path / "cluster.yaml")
    assert (code, out.startswith("Nothing was left to do.\n")) == (0, True)


def test_help_imports_nothing_heavy() -> None:
    heavy = ("dask", "pyarrow", "pandas", "numpy", "PIL", "asyncio")
    code = f"import sys, reducer.cli.main; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


def test_python_m_and_dask_reducer_and_run_cluster(collection: Path, tmp_path: Path) -> None:
    run_on(collection, tmp_path / "reference")
    arguments = [
        collection / "train",
        "--manifest",
        collection / "train.csv",
        "--keep",
        "8",
        "--no-report",
        "--quiet",
        "--output",
    ]
    commands = {
        "module": [sys.executable, "-m", "reducer", "run"],
        "dask": [sys.executable, "-m", "dask", "reducer", "run"],
        "script": [sys.executable, ROOT / "scripts" / "run_cluster.py"],
    }
    for name, command in commands.items():
        done = subprocess.run([*command, *arguments, tmp_path / name], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), name
        assert reduced_files(tmp_path / name) == reduced_files(tmp_path / "reference")
    summary = json.loads((tmp_path / "script" / "summary.json").read_text())
    assert summary["cluster"]["class"] == "distributed.LocalCluster"
    text = subprocess.check_output([*commands["script"], "--help"], text=True)
    assert "run_cluster.py" in text
    for name in ("module", "dask"):
        resumed = [*commands[name][:-1], "resume", tmp_path / name, "--quiet"]
        subprocess.run(resumed, check=True)
    # The default file gives way to what is said.
    serial = [*commands["script"], *arguments, tmp_path / "serial", "--workers", "0"]
    subprocess.run(serial, check=True)
    assert json.loads((tmp_path / "serial" / "summary.json").read_text())["cluster"]["workers"] == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=["ctrl-c", "sigterm", "sighup"])
@pytest.mark.parametrize("to", ["group", "client"])
@pytest.mark.parametrize("program", ["reducer", "dask"])
def test_a_stopped_run_ends_soon_and_says_what_is_kept(
    collection: Path, tmp_path: Path, number: signal.Signals, to: str, program: str
) -> None:
    command = slow_run(collection, tmp_path, ["reducer"] if program == "reducer" else ["dask", "reducer"])
    log = tmp_path / "log"
    with open(log, "wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    wait_for(lambda: has_parts(tmp_path), "the first parts")
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    started = time.monotonic()
    os.kill(-process.pid if to == "group" else process.pid, number)
    code = process.wait(20)
    assert time.monotonic() - started < 10
    assert code == 128 + number
    wait_for(lambda: not any(alive(worker) for worker in workers), "the workers to be gone", 5)
    text = log.read_text()
    assert "Traceback" not in text
    assert re.search(
        r"Stopped\. The photos hashed so far \(\d+ of 14\d\d\d\) are kept in .*run; the reduced list is not "
        r"written yet\. To go on: reducer resume \S+/run\n",
        text,
    )
    assert not (tmp_path / "run" / "lock.json").exists()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "stopped"
    assert summary["photos_read"] > 0
    assert not (tmp_path / "run" / "reduced.csv").exists()


def test_a_terminal_that_is_closed_stops_a_run(collection: Path, tmp_path: Path) -> None:
    """A real one: nothing can be printed any more."""
    command = slow_run(collection, tmp_path, ["reducer"])
    child, terminal = pty.fork()
    if child == 0:
        os.execv(command[0], command)
    while not has_parts(tmp_path):
        if select.select([terminal], [], [], 0.1)[0]:
            os.read(terminal, 65536)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 129
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "stopped"
    assert not (tmp_path / "run" / "lock.json").exists()
    assert invoke("resume", tmp_path / "run", "--workers", 0, "--quiet", "--no-report") == (0, "", "")


def slow_run(collection: Path, folder: Path, module: list[str]) -> list[str]:
    """A command of half a minute: the same photos under many labels."""
    slow = folder / "slow.csv"
    header, *lines = (collection / "train.csv").read_text().splitlines()
    slow.write_text("\n".join([header, *(f"{line}-{i}" for i in range(60) for line in lines)]) + "\n")
    command = [sys.executable, "-m", *module, "run", str(collection / "train"), "--manifest", str(slow)]
    return [*command, *f"--output {folder}/run --keep 1 --workers 2 --partition-images 100".split()]


def has_parts(folder: Path) -> bool:
    return len(list((folder / "run" / "images").glob("part-*"))) > 1


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
