"""The whole job on real clusters: on each of them the reduced lists are those of a run in one process, to the byte."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import dask as dask_package
import PIL
import psutil
import pytest
import yaml
from click.testing import CliRunner
from deployments import DaskProcesses, Hosts, Slurm, Sshd, StartError, foreign_tls_files, run, tls_files, tls_missing
from distributed import Client, WorkerPlugin
from jobs import job_on, reduced_files, run_on
from machine import ROOT, need
from s3server import S3Server
from waiting import wait_for, when_begun

from reducer import ClusterError, ClusterSpec, InputError, Job, reduce_images
from reducer.cli.main import main
from reducer.config.job import path_rule
from reducer.config.resolved import resolve
from reducer.run.dask.ship_code import PLUGIN
from reducer.run.plan.plan import make_plan
from reducer.storage.paths import with_paths

SCRIPT = ROOT / "scripts" / "run_cluster.py"
#: How often the run on hosts is repeated; each prints its seconds: ``REDUCER_HOST_RUNS=20 pytest -s -k hosts``.
HOST_RUNS = int(os.environ.get("REDUCER_HOST_RUNS", "1"))


@pytest.fixture(scope="session")
def reference(collection: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The reduced lists of a run in this process."""
    run = tmp_path_factory.mktemp("reference") / "run"
    run_on(collection, run)
    return reduced_files(run)


@pytest.fixture(scope="session")
def slow_reference(slow_collection: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The same of `slow_collection`."""
    run = tmp_path_factory.mktemp("slow-reference") / "run"
    run_on(slow_collection, run)
    return reduced_files(run)


@pytest.fixture
def dask(tmp_path: Path) -> Iterator[DaskProcesses]:
    """Schedulers and workers, which end with the test."""
    with DaskProcesses(tmp_path / "dask") as processes:
        yield processes


def cluster_file(folder: Path, **content: object) -> Path:
    """A cluster.yaml."""
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump({"version": 1, **content}))
    return path


def spec_of(folder: Path, **content: object) -> ClusterSpec:
    """What a cluster.yaml says."""
    return ClusterSpec.from_yaml(cluster_file(folder, **content))


def at(folder: Path, address: str, **content: object) -> ClusterSpec:
    """What the cluster.yaml of a running scheduler says."""
    return spec_of(folder, cluster={"address": address}, **content)


def run_script(
    collection: Path,
    output: Path,
    *options: object,
    python: str = sys.executable,
    script: Path = SCRIPT,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """``scripts/run_cluster.py`` on the command line, in a folder of its own."""
    arguments = [collection / "train", "--manifest", collection / "train.csv", "--output", output, *options]
    cwd = output.parent / f"{output.name}-cwd"
    cwd.mkdir()
    return subprocess.run(
        [python, script, *map(str, arguments)], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )


# Every kind of cluster


def test_by_address_from_the_command_line(
    collection: Path, reference: dict[str, bytes], tmp_path: Path, dask: DaskProcesses
) -> None:
    address = dask.scheduler()
    dask.registered(*(dask.worker(address, nanny=i > 0) for i in range(3)))
    file = cluster_file(tmp_path, cluster={"address": address}, workers={"min": 3}, job={"keep": 8})
    done = run_script(collection, tmp_path / "run", "--cluster", file, "--partition-images", 40)
    assert done.returncode == 0, done.stderr
    assert "of 240 photos, 12 labels" in done.stdout
    assert reduced_files(tmp_path / "run") == reference
    # They are not ours to close.
    assert all(process.poll() is None for process in dask.logs)


def files_of(tls: Mapping[str, str]) -> dict[str, str]:
    """The ``security`` of a cluster.yaml."""
    return {"ca_file": tls["ca_file"], "client_cert": tls["cert"], "client_key": tls["key"]}


def test_by_address_with_tls(
    collection: Path, reference: dict[str, bytes], tmp_path: Path, dask: DaskProcesses
) -> None:
    need(tls_missing)
    ours, foreign = tls_files(tmp_path / "tls"), foreign_tls_files(tmp_path / "tls")
    address = dask.scheduler(tls=ours)
    dask.registered(*(dask.worker(address, tls=ours, nanny=False) for _ in range(2)))
    assert address.startswith("tls://")
    run_on(collection, tmp_path / "run", at(tmp_path, address, security=files_of(ours)), partition_images=40)
    assert reduced_files(tmp_path / "run") == reference

    quick = {"timeout": "5s"}
    with pytest.raises(InputError, match=r"no Dask scheduler answers at tls://.* tls:// needs security") as caught:
        run_on(collection, tmp_path / "refused", at(tmp_path, address, client=quick))
    assert caught.value.exit_code == 2
    strangers = at(tmp_path, address, client=quick, security=files_of(foreign))
    with pytest.raises(InputError, match=r"no Dask scheduler answers at tls://.* files under security belong to"):
        run_on(collection, tmp_path / "refused", strangers)
    with pytest.raises(InputError, match=r"no Dask scheduler answers at tcp://"):
        run_on(collection, tmp_path / "refused", at(tmp_path, address.replace("tls:", "tcp:"), client=quick))
    assert not (tmp_path / "refused").exists()


def test_a_local_cluster_with_tls(collection: Path, reference: dict[str, bytes], tmp_path: Path) -> None:
    need(tls_missing)
    spec = spec_of(
        tmp_path,
        cluster={
            "class": "distributed.LocalCluster",
            "kwargs": {"n_workers": 2, "threads_per_worker": 1, "protocol": "tls", "dashboard_address": None},
        },
        security=files_of(tls_files(tmp_path / "tls")),
    )
    run_on(collection, tmp_path / "run", spec, partition_images=40)
    assert reduced_files(tmp_path / "run") == reference


def test_ssh_cluster(collection: Path, reference: dict[str, bytes], tmp_path: Path) -> None:
    need(Sshd.missing)
    with Sshd(tmp_path / "ssh") as server:
        cluster = {"class": "distributed.SSHCluster", "kwargs": server.kwargs()}
        run_on(collection, tmp_path / "run", spec_of(tmp_path, cluster=cluster), partition_images=40)
        wait_for(lambda: len(server.alive()) == 1, "the end of what was started by SSH")
    assert reduced_files(tmp_path / "run") == reference


def test_slurm_cluster_that_loses_a_job(
    slow_collection: Path, slow_reference: dict[str, bytes], tmp_path: Path
) -> None:
    need(Slurm.missing)
    with Slurm(tmp_path / "slurm") as slurm:
        cluster = {"class": "dask_jobqueue.SLURMCluster", "kwargs": slurm.kwargs()}
        spec = spec_of(tmp_path, cluster=cluster, workers={"min": 2})
        cancelled = []
        thread = when_begun(tmp_path / "run", lambda: cancelled.append(slurm.cancel_one()))
        result = run_on(slow_collection, tmp_path / "run", spec, partition_images=100)
        thread.join()
        assert len(cancelled) == 1
        wait_for(lambda: not slurm.jobs(), "the end of all jobs")
    assert result.summary["status"] == "done"
    assert reduced_files(tmp_path / "run") == slow_reference


@pytest.mark.parametrize("number", range(HOST_RUNS))
def test_hosts_one_of_which_is_cut_off_while_another_dies(
    slow_collection: Path, slow_reference: dict[str, bytes], tmp_path: Path, number: int
) -> None:
    need(Hosts.missing)
    with Hosts(tmp_path / "hosts", 3) as hosts:
        address = hosts.scheduler()
        for i in range(3):
            hosts.worker(i)
        hosts.registered()

        def cut_and_kill() -> None:
            hosts.cut(number % 3)
            hosts.kill((number + 1) % 3)

        thread = when_begun(tmp_path / "run", cut_and_kill)
        spec = at(tmp_path, address, workers={"min": 3, "stall": "60s"})
        clock = time.monotonic()
        # The client is a host too.
        with dask_package.config.set({"distributed.comm.timeouts.tcp": Hosts.TIMEOUT}):
            run_on(slow_collection, tmp_path / "run", spec, partition_images=100)
        print(f"run {number} on hosts: {time.monotonic() - clock:.1f} s")
        thread.join()
    assert reduced_files(tmp_path / "run") == slow_reference


# Workers without our code, or with another version of it


def without_our_code() -> dict[str, str]:
    """The environment for processes that are not to find the repository."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH" and not name.startswith("DASK_")}


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python that has all that we need but not our package."""
    folder = tmp_path_factory.mktemp("bare")
    packages = folder / "packages"
    packages.mkdir()
    # Not the folder itself: the package may be installed in it.
    for place in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(place).iterdir():
            if not entry.name.startswith(("reducer", "__editable__")) and entry.suffix != ".pth":
                (packages / entry.name).symlink_to(entry)
    run(sys.executable, "-m", "venv", "--without-pip", str(folder / "venv"))
    (site,) = folder.glob("venv/lib/python*/site-packages")
    (site / "packages.pth").write_text(f"{packages}\n")
    python = str(folder / "venv" / "bin" / "python")

    def imports(*names: str) -> bool:
        code = f"import {', '.join(names)}"
        return (
            subprocess.run(
                [python, "-c", code], cwd=folder, env=without_our_code(), capture_output=True, check=False
            ).returncode
            == 0
        )

    assert imports("distributed", "PIL", "imagehash", "pyarrow")
    assert not imports("reducer")
    return python


@pytest.fixture
def bare_dask(tmp_path: Path) -> Iterator[DaskProcesses]:
    """The same as `dask`, where nobody finds the repository."""
    with DaskProcesses(tmp_path / "dask", without_our_code()) as processes:
        yield processes


def shipped(folder: Path) -> list[Path]:
    """The zip files of our code that workers got, which keep their files below ``folder``."""
    return sorted(folder.glob("**/worker-*/reducer-*.zip"))


def test_code_is_shipped_where_there_is_none(
    collection: Path, reference: dict[str, bytes], tmp_path: Path, bare_dask: DaskProcesses, bare_python: str
) -> None:
    address = bare_dask.scheduler(python=bare_python)
    bare_dask.registered(*(bare_dask.worker(address, python=bare_python, nanny=False) for _ in range(2)))
    with pytest.raises(InputError, match=r"worker tcp://127\.0\.0\.1:\d+ has no reducer: install reducer"):
        run_on(collection, tmp_path / "never", at(tmp_path, address, workers={"ship_code": "never"}))
    assert not (tmp_path / "never").exists()
    assert shipped(bare_dask.folder) == []
    run_on(collection, tmp_path / "run", at(tmp_path, address, workers={"min": 2}), partition_images=40)
    assert reduced_files(tmp_path / "run") == reference
    assert len(shipped(bare_dask.folder)) == 2


def test_late_workers_are_shipped_code_too(
    slow_collection: Path,
    slow_reference: dict[str, bytes],
    tmp_path: Path,
    bare_dask: DaskProcesses,
    bare_python: str,
) -> None:
    address = bare_dask.scheduler(python=bare_python)
    first = bare_dask.worker(address, python=bare_python, nanny=False)
    bare_dask.registered(first)

    def replace() -> None:
        bare_dask.registered(bare_dask.worker(address, python=bare_python, nanny=False))
        bare_dask.kill(first)

    thread = when_begun(tmp_path / "run", replace)
    run_on(slow_collection, tmp_path / "run", at(tmp_path, address), partition_images=100)
    thread.join()
    assert first.poll() is not None
    assert reduced_files(tmp_path / "run") == slow_reference


def test_another_version_of_our_code_gives_way(
    collection: Path, reference: dict[str, bytes], tmp_path: Path, bare_dask: DaskProcesses
) -> None:
    shutil.copytree(ROOT / "reducer", tmp_path / "other" / "reducer", ignore=shutil.ignore_patterns("__pycache__"))
    with open(tmp_path / "other" / "reducer" / "draw.py", "a") as file:
        file.write("# another version\n")
    address = bare_dask.scheduler(env={"PYTHONPATH": str(tmp_path / "other")})
    for name, code in (("same", ROOT), ("another", tmp_path / "other")):
        folder = ("--local-directory", str(tmp_path / name))
        worker = bare_dask.worker(address, env={"PYTHONPATH": str(code)}, nanny=False, extra_args=folder)
        bare_dask.registered(worker)
    never = at(tmp_path, address, workers={"ship_code": "never"})
    with pytest.raises(InputError, match=r"worker tcp://\S+ has another version of reducer than this one"):
        run_on(collection, tmp_path / "never", never)
    run_on(collection, tmp_path / "run", at(tmp_path, address, workers={"min": 2}), partition_images=20)
    assert reduced_files(tmp_path / "run") == reference
    assert len(shipped(tmp_path / "another")) == 1
    assert shipped(tmp_path / "same") == []


def test_two_versions_do_not_share_a_scheduler(collection: Path, tmp_path: Path, dask: DaskProcesses) -> None:
    address = dask.scheduler()
    dask.registered(dask.worker(address))
    with Client(address, set_as_default=False) as other:
        other.register_plugin(WorkerPlugin(), name=f"{PLUGIN}another-{other.id}")
        with pytest.raises(
            InputError, match=r"another version of reducer is at work on this scheduler \(client Client-"
        ):
            run_on(collection, tmp_path / "run", at(tmp_path, address))
    # What a client that has ended left behind is in nobody's way.
    run_on(collection, tmp_path / "run", at(tmp_path, address))
    with Client(address, set_as_default=False) as client:
        left = client.run_on_scheduler(lambda dask_scheduler: [str(name) for name in dask_scheduler.worker_plugins])
    assert [name for name in left if name.startswith(PLUGIN)] == [f"{PLUGIN}another-{other.id}"]


def test_run_cluster_from_a_checkout_that_is_not_installed(
    collection: Path, reference: dict[str, bytes], tmp_path: Path, bare_dask: DaskProcesses, bare_python: str
) -> None:
    checkout = tmp_path / "checkout"
    for name in ("reducer", "scripts"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "cluster.yaml", checkout)
    script = checkout / "scripts" / "run_cluster.py"

    def run_it(output: Path, *options: object) -> None:
        done = run_script(
            *(collection, output, "--keep", 8, "--partition-images", 40, *options),
            **{"python": bare_python, "script": script, "env": without_our_code()},  # type: ignore[arg-type]
        )
        assert done.returncode == 0, done.stderr
        assert reduced_files(output) == reference

    run_it(tmp_path / "local")
    address = bare_dask.scheduler(python=bare_python)
    bare_dask.registered(bare_dask.worker(address, python=bare_python))
    run_it(tmp_path / "address", "--cluster", cluster_file(tmp_path, cluster={"address": address}))


# Workers that hash differently, or cannot see the photos


@pytest.fixture(scope="session")
def other_pillow(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Another version of Pillow than ours, and the folder that it is in."""
    folder = tmp_path_factory.mktemp("pillow")
    version = "12.3.0" if PIL.__version__ != "12.3.0" else "13.0.0"
    try:
        run(sys.executable, "-m", "pip", "install", "-q", "--target", str(folder), "--no-deps", f"Pillow=={version}")
    except (StartError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"pip cannot get Pillow {version}: {error}")
    return version, str(folder)


def with_pillow(folder: str) -> dict[str, str]:
    """What a worker's environment needs for the Pillow in a folder."""
    return {"PYTHONPATH": os.pathsep.join((folder, str(ROOT)))}


def no_mounts() -> str | None:
    """Why no process can have an empty folder in a photo folder's place here, or None."""
    try:
        run("unshare", "-m", "mount", "-t", "tmpfs", "none", "/tmp")
    except (StartError, OSError) as error:
        return f"unshare -m does not work here: {error}"
    return None


def blind_for(folder: Path) -> tuple[str, ...]:
    """A prefix for commands that are to find this folder empty."""
    return ("unshare", "-m", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(folder))


def join_while_first_waits(
    dask: DaskProcesses, address: str, first: subprocess.Popen[bytes], caplog: pytest.LogCaptureFixture, **late: Any
) -> Callable[[], None]:
    """What makes a worker join, and keeps the first from ending the run before the late one was asked to do its part.

    Those who call it have started the first without a nanny.
    """

    def act() -> None:
        worker = psutil.Process(first.pid)
        worker.suspend()
        try:
            dask.registered(dask.worker(address, nanny=False, **late))
            wait_for(lambda: "gets no more work" in caplog.text, "the late worker to be left out")
        finally:
            worker.resume()

    return act


def test_two_versions_of_pillow_are_refused(
    collection: Path, tmp_path: Path, dask: DaskProcesses, other_pillow: tuple[str, str]
) -> None:
    version, folder = other_pillow
    address = dask.scheduler()
    ours, other = dask.worker(address, nanny=False), dask.worker(address, nanny=False, env=with_pillow(folder))
    dask.registered(ours, other)
    with pytest.raises(InputError, match=r"photos may not be hashed alike") as caught:
        run_on(collection, tmp_path / "run", at(tmp_path, address, workers={"min": 2}))
    found = dict(re.findall(r"worker (tcp://[0-9.:]+) has Pillow ([0-9.]+[0-9])", str(caught.value)))
    assert sorted(found.values()) == sorted([PIL.__version__, version])
    for process, expected in ((ours, PIL.__version__), (other, version)):
        (worker,) = (worker for worker, value in found.items() if value == expected)
        assert worker in dask.logs[process].read_text()
    assert not (tmp_path / "run").exists()


def test_a_late_worker_with_another_pillow_gets_no_work(
    slow_collection: Path,
    slow_reference: dict[str, bytes],
    tmp_path: Path,
    dask: DaskProcesses,
    other_pillow: tuple[str, str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, logger="reducer")
    version, folder = other_pillow
    address = dask.scheduler()
    first = dask.worker(address, nanny=False)
    dask.registered(first)
    act = join_while_first_waits(dask, address, first, caplog, env=with_pillow(folder))
    thread = when_begun(tmp_path / "run", act)
    run_on(slow_collection, tmp_path / "run", at(tmp_path, address), partition_images=100)
    thread.join()
    (line,) = (line for line in caplog.messages if "gets no more work" in line)
    assert f"the first worker of the run has Pillow {PIL.__version__}" in line
    assert re.search(rf"worker tcp://\S+ has Pillow {re.escape(version)}", line)
    assert reduced_files(tmp_path / "run") == slow_reference


def first_photo(job: Job, threads: int) -> dict[str, Any]:
    """The plan's row of the photo that is to be read first."""
    rows = make_plan(resolve(job)).numbered(threads).partitions()[0]
    found: dict[str, Any] = with_paths(path_rule(job), rows.slice(0, 1)).to_pylist()[0]
    return found


def test_a_host_that_cannot_see_the_photos_is_named(collection: Path, tmp_path: Path, dask: DaskProcesses) -> None:
    need(no_mounts)
    shutil.copytree(collection, tmp_path / "copy")
    photos = tmp_path / "copy" / "train"
    first = Path(first_photo(job_on(tmp_path / "copy", tmp_path / "none"), threads=2)["path"])
    first.rename(tmp_path / "first")  # nobody can read it, which tells nothing: the next one does
    address = dask.scheduler()
    seeing = dask.worker(address, nanny=False)
    dask.registered(seeing, dask.worker(address, nanny=False, host="127.0.0.2", prefix=blind_for(photos)))
    expected = re.escape(f"worker host 127.0.0.2 cannot see {photos}: use a shared folder or S3")
    with pytest.raises(InputError, match=expected):
        run_on(tmp_path / "copy", tmp_path / "run", at(tmp_path, address, workers={"min": 2}))
    # Nor is it any better where no worker sees what the client sees.
    (tmp_path / "first").rename(first)
    dask.kill(seeing)
    with Client(address, set_as_default=False) as client:
        wait_for(lambda: len(client.nthreads()) == 1, "the scheduler to miss the worker")
    with pytest.raises(InputError, match=expected):
        run_on(tmp_path / "copy", tmp_path / "run", at(tmp_path, address))
    assert not (tmp_path / "run").exists()


def test_a_photo_that_is_missing_everywhere_fails_alone(collection: Path, tmp_path: Path) -> None:
    first = first_photo(job_on(collection, tmp_path / "none", partition_images=40), threads=2)
    shutil.copytree(collection, tmp_path / "partial")
    (tmp_path / "partial" / "train" / Path(first["path"]).relative_to(collection / "train")).unlink()
    run_on(tmp_path / "partial", tmp_path / "serial")
    kwargs = {"n_workers": 1, "threads_per_worker": 2, "dashboard_address": None}
    spec = spec_of(tmp_path, cluster={"class": "distributed.LocalCluster", "kwargs": kwargs})
    result = run_on(tmp_path / "partial", tmp_path / "run", spec, partition_images=40)
    failed = result.images[result.images["reason"] == "failed"]
    assert list(zip(failed["id"], failed["error"], strict=True)) == [(first["id"], "missing: no such file")]
    assert reduced_files(tmp_path / "run") == reduced_files(tmp_path / "serial")


def test_a_late_worker_that_cannot_see_the_photos_gets_no_work(
    slow_collection: Path,
    slow_reference: dict[str, bytes],
    tmp_path: Path,
    dask: DaskProcesses,
    caplog: pytest.LogCaptureFixture,
) -> None:
    need(no_mounts)
    caplog.set_level(logging.WARNING, logger="reducer")
    address = dask.scheduler()
    first = dask.worker(address, nanny=False)
    dask.registered(first)
    photos = (slow_collection / "train").resolve()
    late = {"host": "127.0.0.2", "prefix": blind_for(photos)}
    thread = when_begun(tmp_path / "run", join_while_first_waits(dask, address, first, caplog, **late))
    run_on(slow_collection, tmp_path / "run", at(tmp_path, address), partition_images=100)
    thread.join()
    (line,) = (line for line in caplog.messages if "gets no more work" in line)
    assert re.match(r"worker tcp://127\.0\.0\.2:\d+ gets no more work: it cannot read ", line)
    assert reduced_files(tmp_path / "run") == slow_reference


# What is kept to ourselves

PLANTED = "a-planted-value"


def storage(s3: S3Server) -> dict[str, Any]:
    """Options for the server, with one more secret further in."""
    return s3.options(config_kwargs={"user_agent_extra": PLANTED})


def test_logs_and_keys_tell_no_secret_and_no_path(
    collection: Path, s3: S3Server, tmp_path: Path, dask: DaskProcesses
) -> None:
    debug = {"DASK_LOGGING__DISTRIBUTED": "debug"}
    address = dask.scheduler(env=debug)
    dask.registered(*(dask.worker(address, env=debug, nanny=False) for _ in range(2)))
    options = {name: storage(s3) for name in ("storage_options", "manifest_storage_options")}
    job = {"manifest": "s3://trial/train.csv", "keep": 3, "limit_labels": 5, "partition_images": 10, **options}
    spec = at(tmp_path, address, workers={"min": 2})
    for name, where in (("serial", ClusterSpec(workers=0)), ("run", spec)):
        reduce_images(Job("s3://trial/train", str(tmp_path / name), **job), where, progress=False)
    assert reduced_files(tmp_path / "run") == reduced_files(tmp_path / "serial")

    def breaks(*_: object) -> None:
        raise RuntimeError("a bug")

    def break_it() -> None:
        sys.modules["reducer.run.dask.worker"].run_partition = breaks  # type: ignore[attr-defined]

    with Client(address, set_as_default=False) as client:
        client.run(break_it)
        # A task that fails is shown in the worker's log.
        with pytest.raises(ClusterError, match="RuntimeError: a bug"):
            reduce_images(Job("s3://trial/train", str(tmp_path / "broken"), **job), spec, progress=False)
        # All that the scheduler has done, and what has been told of it, in both runs.
        history = client.run_on_scheduler(
            lambda dask_scheduler: [
                *map(str, dask_scheduler.transition_log),
                *map(str, dask_scheduler.get_events().values()),
            ]
        )
        stories = client.run(lambda dask_worker: [str(entry) for entry in dask_worker.state.log])
    scheduler, *workers = (path.read_text() for path in dask.logs.values())
    assert "DEBUG" in scheduler and all("DEBUG" in log for log in workers)
    assert any("a bug" in log for log in workers)
    told = {"scheduler": scheduler, "history": "\n".join(history)}
    told |= {f"worker {i}": log for i, log in enumerate(workers)}
    told |= {f"story of {worker}": "\n".join(entries) for worker, entries in stories.items()}
    assert "run_item" in told["history"] and all("run_item" in told[name] for name in told if "story" in name)
    ids = [line.partition(",")[0] for line in (collection / "train.csv").read_text().splitlines()[1:]]
    for name, text in told.items():
        for secret in (s3.secret, PLANTED, f"'key': '{s3.key}'", f"key={s3.key}", f"key='{s3.key}'"):
            assert secret not in text, name
        if not name.startswith("worker"):
            assert "trial/" not in text, name
            assert not [photo for photo in ids if photo in text], name


# What is said on the command line

#: A cluster that starts in no time: its worker is a thread.
IN_THIS_PROCESS = {
    "class": "distributed.LocalCluster",
    "kwargs": {"n_workers": 1, "threads_per_worker": 1, "processes": False, "dashboard_address": None},
}


def command(*arguments: object) -> tuple[int, str, str]:
    """``reducer run``: its exit code, and what it printed and complained of."""
    done = CliRunner().invoke(main, ["run", "--no-report", *map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


def test_flags_win_over_the_job_of_a_cluster_file(collection: Path, tmp_path: Path) -> None:
    file = cluster_file(tmp_path, cluster=IN_THIS_PROCESS, job={"keep": 3, "limit_labels": 4, "rank_all": True})
    photos = (collection / "train", "--manifest", collection / "train.csv", "--cluster", file)
    for keep, flags in ((3, ()), (5, ("--keep", 5))):
        code, _, err = command(*photos, "--output", tmp_path / f"{keep}", *flags)
        assert code == 0, err
        run_on(collection, tmp_path / f"serial-{keep}", keep=keep, limit_labels=4, rank_all=True)
        assert reduced_files(tmp_path / f"{keep}") == reduced_files(tmp_path / f"serial-{keep}")


def test_the_job_of_a_cluster_file_on_s3(collection: Path, s3: S3Server, tmp_path: Path) -> None:
    labels = (collection / "train.csv").read_text().split()[1::60]
    chosen = sorted({line.partition(",")[2] for line in labels})
    assert len(chosen) > 1
    job = {"keep": 3, "rank_all": True, "manifest": "s3://trial/train.csv", "report": False}
    job |= {name: storage(s3) for name in ("storage_options", "manifest_storage_options")}
    serial = Job("s3://trial/train", str(tmp_path / "serial"), labels=tuple(chosen), candidates=None, **job)
    reduce_images(serial, ClusterSpec(workers=0), progress=False)
    # A label that is a number in YAML is its text; a key without a value is as good as not there.
    more = {"labels": [int(label) for label in chosen], "candidates": "all", "format": None}
    file = cluster_file(tmp_path, cluster=IN_THIS_PROCESS, job={**job, **more})
    code, _, err = command("s3://trial/train", "--output", tmp_path / "run", "--cluster", file)
    assert code == 0, err
    assert reduced_files(tmp_path / "run") == reduced_files(tmp_path / "serial")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"cluster": {"class": "dask_cloudprovider.aws.FargateCluster"}},
            "class dask_cloudprovider.aws.FargateCluster cannot be imported: ModuleNotFoundError: "
            "No module named 'dask_cloudprovider'; install the package that has it, such as: "
            "pip install dask-cloudprovider",
        ),
        (
            {"cluster": {"class": "distributed.NoSuchCluster"}},
            "class distributed.NoSuchCluster cannot be imported: AttributeError",
        ),
        ({"cluster": {"class": "LocalCluster"}}, "class LocalCluster cannot be imported"),
        ({"cluster": IN_THIS_PROCESS, "job": {"keeps": 3}}, "job: unknown key 'keeps' (did you mean 'keep'?)"),
        ({"cluster": IN_THIS_PROCESS, "job": {"keep": "many"}}, "'many' is not a valid integer"),
        ({"cluster": IN_THIS_PROCESS, "job": {"hash": "colorhash"}}, "'colorhash' is not one of"),
        ({"cluster": IN_THIS_PROCESS, "job": {"labels": ["no such label"]}}, "no photo has the label 'no such label'"),
        (
            {"cluster": IN_THIS_PROCESS, "job": {"storage_options": {"secret": PLANTED}}},
            "--storage-option says how a URL is opened",
        ),
        (
            {"cluster": {**IN_THIS_PROCESS, "kwargs": {"n_worker": 1, "processes": False, "dashboard_address": None}}},
            "the cluster distributed.LocalCluster does not start: TypeError",
        ),
    ],
)
def test_what_cannot_be_done_is_told_before_anything_starts(
    collection: Path, tmp_path: Path, content: dict[str, Any], message: str
) -> None:
    file = cluster_file(tmp_path, **content)
    photos = (collection / "train", "--manifest", collection / "train.csv", "--output", tmp_path / "run")
    code, out, err = command(*photos, "--cluster", file)
    assert (code, out) == (2, "")
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    assert PLANTED not in err
    assert not (tmp_path / "run").exists()
