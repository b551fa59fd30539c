"""The whole job on real clusters: on each of them the reduced lists are those of a run in one process, to the byte."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, need, reduced_files, run_on, wait_for, when_begun
from deployments import DaskProcesses, Slurm, Sshd, foreign_tls_files, tls_files, tls_missing

from reducer import ClusterSpec, InputError

SCRIPT = ROOT / "scripts" / "run_cluster.py"


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
