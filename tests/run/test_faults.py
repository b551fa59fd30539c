"""What happens when something breaks in the middle of a run."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from pathlib import Path

import psutil
import pytest
from jobs import IN_PROCESS, reduced_files, run_on
from waiting import wait_for

import reducer.run.dask.worker
from reducer import ClusterError, ClusterSpec, ReducerError, resume
from reducer.run.folder import RunFolder
from reducer.run.tasks.messages import PartitionTask


def test_a_killed_worker_costs_time_and_nothing_else(slow_collection: Path, tmp_path: Path) -> None:
    # Hashes to avoid are on the workers too, and must come again.
    (tmp_path / "avoid").write_text("0123456789abcdef\n")
    options = {"keep": 1, "avoid": str(tmp_path / "avoid")}
    run_on(slow_collection, tmp_path / "reference", **options)
    killed: list[int] = []

    def kill_one() -> None:
        wait_for(lambda: len(list((tmp_path / "run" / "images").glob("part-*"))) > 2, "the first parts")
        for child in psutil.Process().children(recursive=True):
            if "spawn_main" in " ".join(child.cmdline()):
                child.kill()
                killed.append(child.pid)
                return

    killer = threading.Thread(target=kill_one)
    killer.start()
    result = run_on(slow_collection, tmp_path / "run", ClusterSpec(workers=2), partition_images=100, **options)
    killer.join()
    assert killed
    assert result.summary["photos_failed"] == 0
    assert reduced_files(tmp_path / "run") == reduced_files(tmp_path / "reference")


def test_a_partition_that_cannot_be_finished_ends_the_run_and_keeps_the_others(
    collection: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = reducer.run.dask.worker.run_partition

    def breaks(task: PartitionTask, *_: object):
        if task.index == 1:
            time.sleep(1)
            raise RuntimeError("a bug\nof ours")
        return real(task)

    monkeypatch.setattr(reducer.run.dask.worker, "run_partition", breaks)
    with pytest.raises(ClusterError, match=r"could not be finished: RuntimeError: a bug of ours\."):
        run_on(collection, tmp_path / "run", IN_PROCESS, partition_images=20)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "stopped"
    assert summary["photos_read"] == RunFolder(str(tmp_path / "run")).parts.ledger().num_rows > 0
    assert not (tmp_path / "run" / "reduced.csv").exists()


def test_a_stop_while_the_cluster_closes_tells_what_is_kept(
    collection: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(cluster: object) -> None:
        cluster.close()  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    monkeypatch.setattr("reducer.run.dask.connect._close", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_on(collection, tmp_path / "run", IN_PROCESS)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "stopped"
    assert (
        summary["photos_read"] == summary["photos_to_read"] == RunFolder(str(tmp_path / "run")).parts.ledger().num_rows
    )


def test_a_full_disk_is_reported_and_leaves_only_whole_files(
    collection: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync
    calls: list[int] = []

    def full(handle: int) -> None:
        calls.append(handle)
        # The lock's, then of each file and its folder: summary, plan, two pieces of the largest label, two parts.
        if len(calls) > 13:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    message = r"part-\d+\.parquet cannot be written: No space left on device.* To go on: reducer resume \S+/run$"
    with pytest.raises(ReducerError, match=message):
        run_on(collection, tmp_path / "run", partition_images=20)
    names = sorted(path.name for path in (tmp_path / "run").rglob("*") if path.is_file())
    parts = ["part-00000.parquet", "part-00001.parquet"]
    assert names == sorted([*parts, *parts, "plan.parquet", "summary.json"])
    assert RunFolder(str(tmp_path / "run")).parts.ledger().num_rows > 0
    monkeypatch.undo()
    resume(tmp_path / "run", ClusterSpec(workers=0), progress=False)
    run_on(collection, tmp_path / "whole", partition_images=20)
    assert reduced_files(tmp_path / "run") == reduced_files(tmp_path / "whole")
