"""Workers that die, hang, run out of memory, come late or are of no use: real ones, on loopback."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import psutil
import pytest
from deployments import DaskProcesses
from jobs import reduced_files, run_on
from killerphotos import killer_env
from waiting import when_begun

from reducer import ClusterError, ClusterSpec, WorkerRules
from reducer.api.result import Result
from reducer.run.dask.dispatch import Attempt, Dispatch, Signs
from reducer.run.dask.messages import RunContext, WorkItem
from reducer.run.dask.pool import Pool, Sent
from reducer.run.dask.worker import TOPIC, _Heartbeat
from reducer.run.tasks.messages import ShardTask


@pytest.fixture
def dask(tmp_path: Path) -> Iterator[DaskProcesses]:
    """Schedulers and workers, which end with the test."""
    (tmp_path / "dask").mkdir()
    with DaskProcesses(tmp_path / "dask") as processes:
        yield processes
        for process in list(processes.logs):  # asked to end, a worker in the middle of a photo takes its time
            processes.kill(process)


def copy_of(collection: Path, folder: Path, **bad: bytes) -> tuple[Path, list[str]]:
    """A collection some photos of which are not photos; and their ids."""
    shutil.copytree(collection, folder)
    table = pd.read_csv(folder / "train.csv", dtype=str)
    largest = table["landmark_id"].value_counts().index[: len(bad)]
    ids = []
    for label, content in zip(largest, bad.values(), strict=True):
        ids.append(table[table["landmark_id"] == label]["id"].iloc[3])
        name = ids[-1]
        (folder / "train" / name[0] / name[1] / name[2] / f"{name}.jpg").write_bytes(content)
    return folder, ids


def errors_of(result: Result) -> dict[str, str]:
    failed = result.images[result.images["reason"] == "failed"]
    return dict(zip(failed["id"], failed["error"], strict=True))


@pytest.mark.parametrize("nanny", [True, False], ids=["nanny", "no nanny"])
def test_photos_that_kill_their_workers_alone_fail(
    collection: Path, tmp_path: Path, dask: DaskProcesses, nanny: bool
) -> None:
    bad, ids = copy_of(collection, tmp_path / "bad", first=b"KILLER exit", second=b"KILLER signal")
    reference = run_on(bad, tmp_path / "reference", partition_images=60)  # here it is just no image
    assert set(errors_of(reference)) == set(ids)
    address = dask.scheduler()
    dask.registered(*(dask.worker(address, nanny=nanny, env=killer_env(tmp_path)) for _ in range(3)))
    result = run_on(bad, tmp_path / "run", ClusterSpec(address=address), partition_images=60)
    errors = errors_of(result)
    assert errors == {
        ids[0]: "killed its worker: the process that looked at it ended with exit code 7",
        ids[1]: "killed its worker: the process that looked at it was ended by SIGKILL",
    }
    assert reduced_files(tmp_path / "run") == reduced_files(tmp_path / "reference")
    # Each: one worker, then a process beside a worker, then one for this photo alone.
    log = (tmp_path / "killer.log").read_text().split()
    assert 2 * 2 <= log.count("exit") * 2 <= 2 * 4
    assert len(set(log[::2])) == len(log) // 2


def huge_png(side: int) -> bytes:
    """A black picture of side x side pixels, one bit each in the file and one byte each in memory."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4) + name + data + zlib.crc32(name + data).to_bytes(4)

    packer = zlib.compressobj(1)
    row = bytes(1 + -(-side // 8))
    rows = b"".join(packer.compress(row * 1000) for _ in range(side // 1000)) + packer.flush()
    header = side.to_bytes(4) * 2 + bytes([1, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("nanny", "threads"), [(True, 1), (False, 2)], ids=["nanny", "no nanny, 2 threads"])
def test_a_photo_that_needs_more_memory_than_a_worker_has_alone_fails(
    collection: Path, tmp_path: Path, dask: DaskProcesses, nanny: bool, threads: int
) -> None:
    huge, (name,) = copy_of(collection, tmp_path / "huge", one=huge_png(40_000))
    broken, _ = copy_of(collection, tmp_path / "broken", one=b"no photo")
    run_on(broken, tmp_path / "reference")
    address = dask.scheduler()
    limit = ("--memory-limit", "700MiB")
    workers = [dask.worker(address, nanny=nanny, nthreads=threads, extra_args=limit) for _ in range(2)]
    dask.registered(*workers)
    spec = ClusterSpec(address=address)
    result = run_on(huge, tmp_path / "run", spec, partition_images=60, max_pixels=2 * 10**9)
    assert errors_of(result) == {name: "out of memory: decoding it takes more than there is"}
    rows = [pd.read_csv(tmp_path / run / "reduced.csv", dtype=str) for run in ("run", "reference")]
    assert rows[0].equals(rows[1])
    assert all(process.poll() is None for process in workers)
    assert not any("estarting" in dask.logs[process].read_text() for process in workers)


def test_a_worker_that_hangs_is_left_out_or_restarted(collection: Path, tmp_path: Path, dask: DaskProcesses) -> None:
    bad, (name,) = copy_of(collection, tmp_path / "bad", one=b"KILLER hang")
    run_on(bad, tmp_path / "reference")
    rules = WorkerRules(stall=5, wait=20)
    address = dask.scheduler()
    workers = [dask.worker(address, env=killer_env(tmp_path)) for _ in range(2)]
    dask.registered(*workers)
    result = run_on(bad, tmp_path / "run", ClusterSpec(address=address, rules=rules), partition_images=60)
    assert errors_of(result) == {name: "stalled: no end after 5 s"}
    assert reduced_files(tmp_path / "run") == reduced_files(tmp_path / "reference")
    assert all(process.poll() is None for process in workers)


def test_a_worker_of_ours_that_hangs_is_restarted(
    collection: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, (name,) = copy_of(collection, tmp_path / "bad", one=b"KILLER hang")
    run_on(bad, tmp_path / "reference")
    for variable, value in killer_env(tmp_path).items():
        monkeypatch.setenv(variable, value)
    spec = ClusterSpec(workers=1, rules=WorkerRules(stall=5, wait=20))
    result = run_on(bad, tmp_path / "run", spec, partition_images=60)
    assert errors_of(result) == {name: "stalled: no end after 5 s"}
    assert reduced_files(tmp_path / "run") == reduced_files(tmp_path / "reference")


def test_no_worker_left_ends_the_run(slow_collection: Path, tmp_path: Path, dask: DaskProcesses) -> None:
    address = dask.scheduler()
    workers = [dask.worker(address, nanny=False) for _ in range(2)]
    dask.registered(*workers)
    thread = when_begun(tmp_path / "run", lambda: [process.kill() for process in workers])
    spec = ClusterSpec(address=address, rules=WorkerRules(wait=3))
    with pytest.raises(ClusterError, match=r"no worker has been there for 3 s \(workers: wait\)") as caught:
        run_on(slow_collection, tmp_path / "run", spec, keep=1, partition_images=100)
    thread.join()
    assert f"To go on: reducer resume {tmp_path / 'run'}" in str(caught.value)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "stopped"


def test_a_scheduler_that_goes_ends_the_run(slow_collection: Path, tmp_path: Path, dask: DaskProcesses) -> None:
    address = dask.scheduler()
    (scheduler,) = dask.logs
    dask.registered(dask.worker(address, nanny=False))
    thread = when_begun(tmp_path / "run", scheduler.kill)
    spec = ClusterSpec(address=address, timeout=5)
    with pytest.raises(ClusterError, match=r"the scheduler is gone"):
        run_on(slow_collection, tmp_path / "run", spec, keep=1, partition_images=100)
    thread.join()


def test_a_worker_that_comes_late_gets_work(slow_collection: Path, tmp_path: Path, dask: DaskProcesses) -> None:
    run_on(slow_collection, tmp_path / "reference", keep=1)
    address = dask.scheduler()
    first = dask.worker(address, nanny=False)
    dask.registered(first)

    def replace() -> None:
        dask.registered(dask.worker(address, nanny=False))
        first.kill()

    thread = when_begun(tmp_path / "run", replace)
    run_on(slow_collection, tmp_path / "run", ClusterSpec(address=address), keep=1, partition_images=100)
    thread.join()
    assert first.wait() == -9
    assert reduced_files(tmp_path / "run") == reduced_files(tmp_path / "reference")


def test_only_a_worker_that_told_of_a_partition_can_stall_with_it() -> None:
    """Not one that is to do it after another one has died, nor one that is busy with other people's work."""
    recalled: list[object] = []
    now = time.monotonic()
    attempts = [Attempt(index) for index in range(4)]
    pending = SimpleNamespace(status="pending")
    client = SimpleNamespace(sync=lambda *_, **__: {"a": 1, "b": 1}, scheduler=SimpleNamespace(ncores=None))
    dispatch = object.__new__(Dispatch)
    dispatch.rules, dispatch.signs = WorkerRules(stall=100, wait=1000), Signs("run")
    dispatch.signs.of_attempt = {(0, 0): (now - 150, "gone"), (1, 0): (now - 150, "a"), (2, 0): (now - 50, "b")}
    dispatch.signs.last = now - 50
    pool = dispatch.pool = Pool(client, None, (), left_out={"gone": "why"}, watch=dispatch._look_for_stalls)
    pool.sent = {attempt.partition: Sent(attempt, pending, now - 200, None) for attempt in attempts}
    pool.recall = lambda key: recalled.append(key) or pool.sent[key]
    dispatch._give_to_others = lambda key, worker: recalled.append(("stalled", key, worker))
    pool.look_at_cluster()
    assert recalled == [("stalled", 1, "a")]
    assert pool.sent[0].since >= now
    assert dispatch.left_out == {}  # another worker may come at that address
    # All of ours are quiet: what nobody has begun with is sent again, at nobody's cost.
    dispatch.signs.last, pool.next_look = now - 150, 0.0
    recalled.clear()
    pool.look_at_cluster()
    assert recalled == [("stalled", 1, "a"), 3]
    assert list(pool.again) == [Attempt(3, 1)]


def test_an_adaptive_cluster_grows_and_shrinks(slow_collection: Path, tmp_path: Path) -> None:
    run_on(slow_collection, tmp_path / "reference", keep=1)
    spec = ClusterSpec(
        class_path="distributed.LocalCluster",
        kwargs={"threads_per_worker": 1, "dashboard_address": None},
        adapt=(1, 3),
    )
    seen: set[int] = set()
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.2):
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if "spawn_main" in " ".join(child.cmdline()):
                        seen.add(child.pid)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        run_on(slow_collection, tmp_path / "run", spec, keep=1, partition_images=100)
    finally:
        stop.set()
        thread.join()
    assert reduced_files(tmp_path / "run") == reduced_files(tmp_path / "reference")
    assert len(seen) > 1


def test_ranking_tells_that_it_goes_on() -> None:
    """Whatever the thread does that ranks: a large label takes minutes, and must not look like a stall."""
    told = []

    class Told:
        address = "a"

        def log_event(self, topic: str, sign: dict[str, object]) -> None:
            told.append((topic, sign["run"], sign["worker"]))

    context = RunContext("token", "", "", "", None, beat=0.02, patience=1)
    beat = _Heartbeat(Told(), WorkItem(ShardTask(3, (), None, None, None), context))  # type: ignore[arg-type]
    with beat.steadily():
        time.sleep(0.3)
    count = len(told)
    assert count > 5
    assert set(told) == {(TOPIC, "token", "a")}
    time.sleep(0.1)
    assert len(told) == count
