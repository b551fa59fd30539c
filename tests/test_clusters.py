"""The whole job on real clusters: on each of them the reduced lists are those of a run in one process, to the byte."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import dask as dask_package
import pytest
import yaml
from conftest import ROOT, need, reduced_files, run_on, wait_for, when_begun
from deployments import DaskProcesses, Hosts, Slurm, Sshd, foreign_tls_files, run, tls_files, tls_missing

from reducer import ClusterSpec, InputError

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
