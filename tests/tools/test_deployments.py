"""The deployments that other tests use: each runs plain Dask, keeps strangers out, and leaves nothing behind."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from deployments import (
    DaskProcesses,
    Deployment,
    Hosts,
    Slurm,
    Sshd,
    StartError,
    foreign_tls_files,
    run,
    tls_files,
    tls_missing,
)
from distributed import Client, Security, SSHCluster
from machine import need
from waiting import wait_for

RESULT = [abs(number) for number in range(10)]


def compute(client: Client) -> list[int]:
    results: list[int] = client.gather(client.map(abs, range(10)))
    return results


@contextmanager
def leaves_no_process(deployment: Deployment) -> Iterator[None]:
    """To put around its ``with``: behind that nothing of it runs."""
    yield
    assert deployment.alive() == set()
    assert all(process.returncode is not None for process in deployment.logs)


def security(tls: dict[str, str], cert: dict[str, str]) -> Security:
    """A client's, that trusts the authority of ``tls`` and shows the certificate of ``cert``."""
    return Security(
        tls_ca_file=tls["ca_file"], tls_client_cert=cert["cert"], tls_client_key=cert["key"], require_encryption=True
    )


def test_processes(tmp_path: Path) -> None:
    dask = DaskProcesses(tmp_path, {**os.environ, "DASK_DISTRIBUTED__COMM__COMPRESSION": "no such thing"})
    with leaves_no_process(dask), dask:
        address = dask.scheduler()
        nanny, bare = dask.worker(address), dask.worker(address, nthreads=2, nanny=False, name="bare")
        dask.registered(nanny, bare)
        with Client(address, set_as_default=False) as client:
            assert compute(client) == RESULT
            assert sorted(client.nthreads().values()) == [1, 2]
            dask.kill(bare)
            wait_for(lambda: len(client.nthreads()) == 1, "the scheduler to miss the worker")
            before = set(client.nthreads())
            dask.kill_below_nanny(nanny)
            wait_for(lambda: set(client.nthreads()) - before, "another worker")


def test_failed_start_tells_why_and_leaves_nothing(tmp_path: Path) -> None:
    dask = DaskProcesses(tmp_path)
    why = pytest.raises(StartError, match=r"(?s)scheduler-0\.log: code 2.*No such option:? '?--no-such")
    with leaves_no_process(dask), dask, why:
        dask.scheduler(extra_args=["--no-such"])

    class Failing(Deployment):
        def start(self) -> None:
            # One that was started by another, left its family, and does not end when it is asked to.
            script = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up'); time.sleep(99)"
            parent = "import os, sys; os.fork() or (os.setsid(), os.execv(sys.executable, ['python', *sys.argv[1:]]))"
            stray = self.spawn("stray", sys.executable, "-c", parent, "-uc", script)
            stray.wait()
            wait_for(lambda: b"up" in self.logs[stray].read_bytes(), "the stray")
            assert len(self.alive()) == 1
            self.end_processes = lambda: Deployment.end_processes(self, seconds=0.2)  # type: ignore[method-assign]
            self.undo.callback(self.end_processes)
            raise StartError("on purpose")

    failing = Failing(tmp_path / "failing")
    with leaves_no_process(failing), pytest.raises(StartError, match="on purpose"), failing:
        pass


def handshake(address: str, context: ssl.SSLContext) -> None:
    """Connect, and wait for what the server makes of our certificate: it says so behind the handshake."""
    url = urlsplit(address)
    assert url.hostname is not None and url.port is not None
    with (
        socket.create_connection((url.hostname, url.port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname=url.hostname) as connection,
    ):
        assert connection.recv(1)


def test_tls(tmp_path: Path) -> None:
    need(tls_missing)
    ours, foreign = tls_files(tmp_path / "tls"), foreign_tls_files(tmp_path / "tls")
    dask = DaskProcesses(tmp_path)
    with leaves_no_process(dask), dask:
        address = dask.scheduler(tls=ours)
        assert address.startswith("tls://127.0.0.1:")
        dask.registered(dask.worker(address, tls=ours))
        with Client(address, security=security(ours, ours), set_as_default=False) as client:
            assert compute(client) == RESULT

        trusting = ssl.create_default_context(cafile=ours["ca_file"])
        with pytest.raises(ssl.SSLError, match="certificate required"):
            handshake(address, trusting)
        trusting.load_cert_chain(foreign["cert"], foreign["key"])
        with pytest.raises(ssl.SSLError, match="unknown ca"):
            handshake(address, trusting)
        trusting.load_cert_chain(ours["cert"], ours["key"])
        handshake(address, trusting)
        with pytest.raises(ssl.SSLError, match="certificate verify failed"):
            handshake(address, ssl.create_default_context(cafile=foreign["ca_file"]))

        for refused, where in (
            (security(ours, foreign), address),
            (security(foreign, foreign), address),
            (None, address.replace("tls:", "tcp:")),
        ):
            with pytest.raises(OSError):
                Client(where, security=refused, timeout="1s", set_as_default=False)


def test_ssh(tmp_path: Path) -> None:
    need(Sshd.missing)
    server = Sshd(tmp_path)
    with leaves_no_process(server), server:
        with SSHCluster(**server.kwargs(workers=1)) as cluster, Client(cluster, set_as_default=False) as client:
            assert compute(client) == RESULT
            assert len(server.alive()) > 3
        # Another key is not let in.
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "other"))
        options = {**server.connect_options, "client_keys": [str(tmp_path / "other")]}
        with pytest.raises(RuntimeError, match="Permission denied"):
            SSHCluster(**{**server.kwargs(), "connect_options": options})


def test_slurm(tmp_path: Path) -> None:
    need(Slurm.missing)
    from dask_jobqueue import SLURMCluster

    before = os.environ.get("SLURM_CONF")
    slurm = Slurm(tmp_path)
    with leaves_no_process(slurm), slurm:
        assert os.environ["SLURM_CONF"] == slurm.env["SLURM_CONF"]
        with SLURMCluster(**slurm.kwargs(workers=1)) as cluster, Client(cluster, set_as_default=False) as client:
            assert compute(client) == RESULT
            (job,) = slurm.jobs()
            assert slurm.cancel_one() == job
            wait_for(lambda: slurm.jobs().get(job) != "RUNNING", "the end of the job")
            # One that is left for the end.
            run("sbatch", "--wrap=exec sleep 600", f"--output={tmp_path / 'sleep.log'}")
            wait_for(lambda: "RUNNING" in slurm.jobs().values(), "the job")
    assert os.environ.get("SLURM_CONF") == before


def test_hosts(tmp_path: Path) -> None:
    need(Hosts.missing)
    hosts = Hosts(tmp_path, 2)
    with leaves_no_process(hosts), hosts:
        address = hosts.scheduler()
        for i in range(2):
            hosts.worker(i, nanny=i == 0)
        hosts.registered()
        with Client(address, set_as_default=False) as client:
            assert compute(client) == RESULT
            places = {urlsplit(worker).hostname for worker in client.nthreads()}
            assert places == {f"{hosts.network}2", f"{hosts.network}3"}
            hosts.kill(0)
            wait_for(lambda: len(client.nthreads()) == 1, "the scheduler to miss the worker")

            hosts.cut(1)
            inside = ["ip", "netns", "exec", hosts.namespaces[2]]
            reach = [*inside, sys.executable, "-c", f"import socket; socket.create_connection({_pair(address)}, 1)"]
            assert subprocess.run(reach, capture_output=True, check=False).returncode != 0
            hosts.mend(1)
            wait_for(lambda: subprocess.run(reach, capture_output=True, check=False).returncode == 0, "the network")
    assert hosts.namespaces and not set(hosts.namespaces) & set(run("ip", "netns", "list").split())
    assert not {hosts.bridge, *hosts.links} & set(psutil.net_if_addrs())


def test_hosts_that_fail_to_start_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need(Hosts.missing)
    hosts = Hosts(tmp_path, 1)
    monkeypatch.setattr(hosts.dask, "start", lambda: 1 / 0)
    with leaves_no_process(hosts), pytest.raises(ZeroDivisionError), hosts:
        pass
    assert hosts.namespaces and not set(hosts.namespaces) & set(run("ip", "netns", "list").split())
    assert not {hosts.bridge, *hosts.links} & set(psutil.net_if_addrs())


def _pair(address: str) -> tuple[str | None, int | None]:
    url = urlsplit(address)
    return url.hostname, url.port
