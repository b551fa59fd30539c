"""Real deployments of Dask on this machine: plain and TLS processes, SSH, SLURM, and hosts as network namespaces.

Each is a context manager on a folder, which gets the logs. It takes free ports, waits until what it started is ready,
and removes all of it at the end, also when the start failed: then it raises `StartError` with the tail of the log.
Each has a ``missing()`` that says what keeps it from running here, for a test to skip.
"""

from __future__ import annotations

import atexit
import functools
import getpass
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil

#: Environment variable by whose value the processes of one deployment are told from all others.
MARK = "REDUCER_TEST_DEPLOYMENT"
LOOPBACK = "127.0.0.1"
#: Where servers are installed, which is not on the PATH of every user.
SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")


class StartError(RuntimeError):
    """A deployment did not come up."""


def program(name: str) -> str | None:
    """The path of a program, or None if it is not installed."""
    return shutil.which(name, path=os.pathsep.join((os.environ.get("PATH", os.defpath), *SBIN)))


def not_installed(*names: str) -> str | None:
    """Which of these programs are not installed, in words, or None."""
    absent = [name for name in names if program(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


def run(*command: str, text: str | None = None, env: Mapping[str, str] | None = None) -> str:
    """Run a program that ends soon, with ``text`` as its input; gives what it printed.

    Raises
    ------
    StartError
        If it fails, with what it said.
    """
    path = program(command[0]) or command[0]
    done = subprocess.run(
        [path, *command[1:]], input=text, env=env, capture_output=True, text=True, timeout=60, check=False
    )
    if done.returncode:
        raise StartError(f"{' '.join(command)}: code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def free_port() -> int:
    """A port of loopback that is free: not one of those that connections take, nor of those of `S3Server`."""
    while True:
        port = random.randrange(23_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((LOOPBACK, port))
            return port


class Deployment:
    """Processes that are started into a folder and all ended, with whatever they started; a context manager.

    Parameters
    ----------
    folder : path
        Where logs and other files are kept. Made if it is not there.
    env : mapping, optional
        The environment of the processes; ours by default. Dask's own variables are taken out of it.

    Attributes
    ----------
    folder : Path
    env : dict
    logs : dict of Popen to Path
        The log of each process, in the order of their start.
    """

    def __init__(self, folder: str | os.PathLike[str], env: Mapping[str, str] | None = None) -> None:
        self.folder = Path(folder).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.mark = uuid.uuid4().hex
        kept = {name: value for name, value in (env or os.environ).items() if not name.startswith("DASK_")}
        self.env: dict[str, str] = kept | {MARK: self.mark}
        self.logs: dict[subprocess.Popen[bytes], Path] = {}
        #: Those that others need until their end: a worker whose scheduler is gone first may hang.
        self.needed: list[subprocess.Popen[bytes]] = []
        #: How to undo what was done so far.
        self.undo = ExitStack()

    @staticmethod
    def missing() -> str | None:
        """What keeps this deployment from running here, or None."""
        return None

    def __enter__(self) -> Any:
        atexit.register(self.stop)
        try:
            self.undo.callback(self.end_processes)
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start what runs from the beginning."""

    def stop(self) -> None:
        """End all of it; once is enough."""
        atexit.unregister(self.stop)
        self.undo.close()

    def spawn(
        self, name: str, *command: str, env: Mapping[str, str] | None = None, prefix: Sequence[str] = ()
    ) -> subprocess.Popen[bytes]:
        """Start a process in a session of its own, with its log in ``<name>.log``.

        Parameters
        ----------
        name : str
            Of the log.
        *command : str
            The program and its arguments.
        env : mapping, optional
            Added to the environment.
        prefix : sequence of str, optional
            A command that this one is an argument of.
        """
        path = self.folder / f"{name}.log"
        first, *rest = (*prefix, *command)
        with open(path, "wb") as log:
            process = subprocess.Popen(
                [program(first) or first, *rest],
                env={**self.env, **(env or {})},
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C is for us, who end it in order.
                start_new_session=True,
            )
        self.logs[process] = path
        return process

    def tail(self, process: subprocess.Popen[bytes], lines: int = 20) -> str:
        """The last lines of a process's log."""
        return "\n".join(self.logs[process].read_text(errors="replace").splitlines()[-lines:])

    def wait(
        self, process: subprocess.Popen[bytes], ready: Callable[[], object], what: str = "ready", seconds: float = 60
    ) -> None:
        """Wait until a process is ready, by a function that may raise OSError or ValueError before it is.

        Raises
        ------
        StartError
            If the process ends or takes longer than ``seconds``, with the tail of its log.
        """
        stop_at = time.monotonic() + seconds
        while True:
            ended = process.poll()
            with suppress(OSError, ValueError):
                if ended is None and ready():
                    return
            if ended is not None or time.monotonic() > stop_at:
                why = f"code {ended}" if ended is not None else f"not {what} in {seconds:g} s"
                raise StartError(f"{self.logs[process].name}: {why}\n{self.tail(process)}")
            time.sleep(0.05)

    def alive(self) -> set[psutil.Process]:
        """The processes of this deployment that run: those that were started and all that came of them.

        A server may take its sessions and jobs out of its own family: they are told by the mark in their environment.
        """
        found: set[psutil.Process] = set()
        pids = {process.pid for process in self.logs if process.poll() is None}
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.pid in pids or self.is_marked(process.environ()):
                    found |= {process, *process.children(recursive=True)}
        return {process for process in found if is_running(process)}

    def is_marked(self, environ: Mapping[str, str]) -> bool:
        """Whether a process with this environment is one of ours."""
        return environ.get(MARK) == self.mark

    def end_processes(self, seconds: float = 5) -> None:
        """Ask what was started to end, those that others need last; kill what is left after ``seconds``."""
        family = self.alive()
        stop_at = time.monotonic() + seconds
        for wave in ([process for process in self.logs if process not in self.needed], self.needed):
            for process in wave:
                process.terminate()
            for process in wave:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(0, stop_at - time.monotonic()))
        self._wait_for_end(family, stop_at - time.monotonic())
        for _ in range(100):
            family |= self.alive()
            for process in filter(is_running, family):
                with suppress(psutil.Error):
                    process.kill()
            if self._wait_for_end(family, 0.1):
                return
        raise RuntimeError(f"these processes cannot be killed: {sorted(map(str, family))}")

    def _wait_for_end(self, family: set[psutil.Process], seconds: float) -> bool:
        stop_at = time.monotonic() + seconds
        while any(map(is_running, family)) or self.alive():
            if time.monotonic() > stop_at:
                return False
            time.sleep(0.05)
        return True

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """``kill -9`` a process and all that it started, the process first: none of them can act on another's death."""
        with suppress(psutil.NoSuchProcess):
            root = psutil.Process(process.pid)
            for one in (root, *root.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    one.kill()
        process.wait()


def is_running(process: psutil.Process) -> bool:
    """Whether a process does anything still: one that only waits for its parent to ask for its code does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


# ---------------------------------------------------------------------------------------------------------------------
# TLS

OPENSSL_CONFIG = """
[req]
distinguished_name = name
prompt = no
[name]
CN = {name}
[ca]
basicConstraints = critical,CA:TRUE
keyUsage = critical,keyCertSign,cRLSign
subjectKeyIdentifier = hash
[host]
basicConstraints = critical,CA:FALSE
keyUsage = critical,digitalSignature
extendedKeyUsage = serverAuth,clientAuth
subjectAltName = IP:127.0.0.1
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
"""


def tls_missing() -> str | None:
    """What keeps `tls_files` from working here, or None."""
    return not_installed("openssl")


def tls_files(folder: str | os.PathLike[str]) -> dict[str, str]:
    """Make a certificate authority and a certificate for 127.0.0.1, that serves scheduler, worker and client alike.

    Parameters
    ----------
    folder : path
        Where the files go. Made if it is not there.

    Returns
    -------
    dict
        Paths: ``ca_file``, ``cert`` and ``key``.
    """
    root = Path(folder).absolute()
    root.mkdir(parents=True, exist_ok=True)

    def make(name: str, kind: str, *options: str) -> None:
        (root / f"{name}.cnf").write_text(OPENSSL_CONFIG.format(name=f"reducer test {name}"))
        run(
            *(
                "openssl",
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:P-256",
                "-nodes",
                "-days",
                "2",
            ),
            *("-config", f"{root / name}.cnf", "-extensions", kind, *options),
            *("-keyout", f"{root / name}.key", "-out", f"{root / name}.pem"),
        )

    make("ca", "ca")
    make("host", "host", "-CA", str(root / "ca.pem"), "-CAkey", str(root / "ca.key"))
    return {"ca_file": str(root / "ca.pem"), "cert": str(root / "host.pem"), "key": str(root / "host.key")}


def foreign_tls_files(folder: str | os.PathLike[str]) -> dict[str, str]:
    """The same of another authority with the same name, in ``folder/foreign``: nobody should trust it."""
    return tls_files(Path(folder) / "foreign")


# ---------------------------------------------------------------------------------------------------------------------
# Scheduler and workers as processes


class DaskProcesses(Deployment):
    """``dask scheduler`` and ``dask worker`` processes."""

    def scheduler(
        self,
        *,
        host: str = LOOPBACK,
        port: int = 0,
        tls: Mapping[str, str] | None = None,
        extra_args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        python: str = sys.executable,
        prefix: Sequence[str] = (),
    ) -> str:
        """Start a scheduler, and wait until it listens.

        Parameters
        ----------
        host, port : str, int
            Where it listens; on any free port by default.
        tls : mapping, optional
            Paths by `tls_files`: it then speaks TLS and nothing else.
        extra_args : sequence of str, optional
            Added to its command line.
        env : mapping, optional
            Added to its environment.
        python : str, optional
            What runs it.
        prefix : sequence of str, optional
            A command that its command is an argument of.

        Returns
        -------
        str
            Its address.
        """
        name = f"scheduler-{len(self.logs)}"
        file = self.folder / f"{name}.json"
        process = self.spawn(
            name,
            *(python, "-m", "dask", "scheduler", "--host", host, "--port", str(port)),
            *("--dashboard-address", f"{LOOPBACK}:0", "--scheduler-file", str(file)),
            *(("--protocol", "tls") if tls else ()),
            *_tls_flags(tls),
            *extra_args,
            env=env,
            prefix=prefix,
        )
        self.needed.append(process)
        # Dask writes the file in place: it is there before it is whole.
        self.wait(process, lambda: json.loads(file.read_text()), "listening")
        address: str = json.loads(file.read_text())["address"]
        return address

    def worker(
        self,
        address: str,
        nthreads: int = 1,
        nanny: bool = True,
        extra_args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        python: str = sys.executable,
        name: str | None = None,
        *,
        host: str = LOOPBACK,
        tls: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
    ) -> subprocess.Popen[bytes]:
        """Start a worker, and do not wait for it: `registered` does.

        Parameters
        ----------
        address : str
            The scheduler's.
        nthreads : int, optional
            Its threads.
        nanny : bool, optional
            Whether a nanny, which is the process returned, starts it and starts it again.
        extra_args, env, python, host, tls, prefix : optional
            As for `scheduler`.
        name : str, optional
            Its name in Dask.
        """
        return self.spawn(
            f"worker-{len(self.logs)}",
            *(python, "-m", "dask", "worker", address, "--host", host, "--nthreads", str(nthreads)),
            *("--dashboard-address", f"{LOOPBACK}:0", "--local-directory", str(self.folder)),
            *(() if nanny else ("--no-nanny",)),
            *(() if name is None else ("--name", name)),
            *_tls_flags(tls),
            *extra_args,
            env=env,
            prefix=prefix,
        )

    def registered(self, *workers: subprocess.Popen[bytes], seconds: float = 60) -> None:
        """Wait until the scheduler has taken these workers in, going by what they log.

        Raises
        ------
        StartError
            If one ends or takes longer than ``seconds``, with the tail of its log.
        """
        for process in workers:
            log = self.logs[process]
            self.wait(process, lambda log=log: b"Registered to:" in log.read_bytes(), "registered", seconds)  # type: ignore[misc]

    def kill_below_nanny(self, nanny: subprocess.Popen[bytes]) -> None:
        """``kill -9`` the worker of a nanny, which starts another."""
        for child in psutil.Process(nanny.pid).children():
            if any("spawn_main" in argument for argument in child.cmdline()):
                child.kill()


def _tls_flags(tls: Mapping[str, str] | None) -> list[str]:
    return ["--tls-ca-file", tls["ca_file"], "--tls-cert", tls["cert"], "--tls-key", tls["key"]] if tls else []


# ---------------------------------------------------------------------------------------------------------------------
# SSH


class Sshd(Deployment):
    """An SSH server on a free port of loopback, which lets in one throwaway key for the user who runs the tests.

    Attributes
    ----------
    port : int
    connect_options : dict
        For asyncssh and so for ``distributed.SSHCluster``; plain values.
    """

    port: int
    connect_options: dict[str, Any]

    @staticmethod
    def missing() -> str | None:
        return not_installed("sshd", "ssh-keygen")

    def start(self) -> None:
        if os.geteuid() == 0:
            # sshd of root insists on this empty folder, which the system's service makes.
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        for name in ("host_key", "client_key"):
            (self.folder / name).unlink(missing_ok=True)
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name))
        self.port = free_port()
        host_key = (self.folder / "host_key.pub").read_text()
        (self.folder / "known_hosts").write_text(f"[{LOOPBACK}]:{self.port} {host_key}")
        # It hands its environment to nobody. One line: of several, it takes the first.
        told = {name: self.env[name] for name in (MARK, "PYTHONPATH") if name in self.env}
        settings = {
            "Port": self.port,
            "ListenAddress": LOOPBACK,
            "HostKey": f'"{self.folder / "host_key"}"',
            "AuthorizedKeysFile": f'"{self.folder / "client_key.pub"}"',
            "PidFile": "none",
            "UsePAM": "no",
            "StrictModes": "no",
            "PasswordAuthentication": "no",
            "KbdInteractiveAuthentication": "no",
            "PermitRootLogin": "prohibit-password",
            "MaxStartups": 100,
            "SetEnv": " ".join(f'{name}="{value}"' for name, value in told.items()),
        }
        config = self.folder / "sshd_config"
        config.write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
        # It starts itself anew for each connection, and so wants to know its own path.
        process = self.spawn("sshd", program("sshd") or "sshd", "-D", "-e", "-f", str(config))
        self.wait(process, self._answers)
        self.connect_options = {
            "port": self.port,
            "username": getpass.getuser(),
            "client_keys": [str(self.folder / "client_key")],
            "known_hosts": str(self.folder / "known_hosts"),
        }

    def _answers(self) -> bool:
        with socket.create_connection((LOOPBACK, self.port), timeout=5) as connection:
            return connection.recv(4) == b"SSH-"

    def kwargs(self, workers: int = 2) -> dict[str, Any]:
        """What to call ``distributed.SSHCluster`` with, in values that YAML can hold."""
        return {
            "hosts": [LOOPBACK] * (1 + workers),
            "connect_options": dict(self.connect_options),
            "remote_python": sys.executable,
            "scheduler_options": {"host": LOOPBACK, "port": 0, "dashboard_address": f"{LOOPBACK}:0"},
            "worker_options": {"nthreads": 1, "memory_limit": "1GiB"},
        }


# ---------------------------------------------------------------------------------------------------------------------
# SLURM


class Slurm(Deployment):
    """SLURM with one node, this machine: munged, slurmctld and slurmd, all of its own.

    While it runs, ``SLURM_CONF`` is set in our environment: by it sbatch and the like find their SLURM. So there is
    one at a time.

    Parameters
    ----------
    folder : path
        Without a space in its path, for slurm.conf.
    cpus : int, optional
        What the node says it has: how many jobs of one core run at a time.

    Attributes
    ----------
    env : dict
        Has ``SLURM_CONF``.
    """

    def __init__(self, folder: str | os.PathLike[str], cpus: int = 4) -> None:
        super().__init__(folder)
        self.cpus = cpus
        self.config = self.folder / "slurm.conf"
        self.env["SLURM_CONF"] = str(self.config)

    @staticmethod
    def missing() -> str | None:
        if os.geteuid() != 0:
            return "slurmd needs root"
        return not_installed("munged", "slurmctld", "slurmd", "sbatch", "scancel", "squeue", "sinfo")

    def start(self) -> None:
        # A socket's path is short, and munged's is not in a folder that only its owner may enter.
        sockets = Path(tempfile.mkdtemp(prefix="munge-"))
        self.undo.callback(shutil.rmtree, sockets, ignore_errors=True)
        self.undo.callback(self.end_processes)
        sockets.chmod(0o755)
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        munged = self.spawn(
            *("munged", "munged", "--foreground", "--force", f"--socket={sockets / 'socket'}", f"--key-file={key}"),
            *(f"--{name}-file={self.folder / f'munged-{name}'}" for name in ("pid", "log", "seed")),
        )
        self.needed.append(munged)
        self.wait(munged, (sockets / "socket").exists)

        host = socket.gethostname().partition(".")[0]
        ports = free_port(), free_port()
        self.config.write_text(
            f"""ClusterName=reducer
SlurmctldHost={host}({LOOPBACK})
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={sockets / "socket"}
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
ReturnToService=2
KillWait=5
SlurmdParameters=config_overrides
StateSaveLocation={self.folder / "state"}
SlurmdSpoolDir={self.folder / "spool"}
SlurmctldPidFile={self.folder / "slurmctld.pid"}
SlurmdPidFile={self.folder / "slurmd.pid"}
NodeName={host} NodeAddr={LOOPBACK} CPUs={self.cpus} RealMemory=8000 State=UNKNOWN
PartitionName=ci Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
        )
        for name in ("state", "spool"):
            (self.folder / name).mkdir(exist_ok=True)
        slurmctld = self.spawn("slurmctld", "slurmctld", "-D", "-c", "-f", str(self.config))
        slurmd = self.spawn("slurmd", "slurmd", "-D", "-c", "-f", str(self.config), "-N", host)
        self.undo.callback(self._set_env, os.environ.get("SLURM_CONF"))
        self._set_env(str(self.config))
        for process in (slurmctld, slurmd):
            self.wait(process, self._has_idle_node, "an idle node")
        self.undo.callback(self._cancel_all)

    @staticmethod
    def _set_env(value: str | None) -> None:
        if value is None:
            os.environ.pop("SLURM_CONF", None)
        else:
            os.environ["SLURM_CONF"] = value

    def _has_idle_node(self) -> bool:
        try:
            return run("sinfo", "--noheader", "--format=%T", env=self.env).strip() == "idle"
        except StartError:
            return False

    def is_marked(self, environ: Mapping[str, str]) -> bool:
        # A job has the environment of whoever submitted it, which is also that of tests, and what slurmd adds to it.
        ours = environ.get("SLURM_CONF") == str(self.config) and "SLURM_JOB_ID" in environ
        return ours or super().is_marked(environ)

    def jobs(self) -> dict[str, str]:
        """The state of each job that waits, runs or ends, by its id: ``PENDING``, ``RUNNING``, ``COMPLETING``."""
        lines = run("squeue", "--noheader", "--sort=i", "--format=%i %T", env=self.env).splitlines()
        return dict(line.split() for line in lines)

    def cancel_one(self, seconds: float = 30) -> str:
        """Cancel one job that runs, once there is one; gives its id."""
        stop_at = time.monotonic() + seconds
        while time.monotonic() < stop_at:
            running = [job for job, state in self.jobs().items() if state == "RUNNING"]
            if running:
                run("scancel", running[0], env=self.env)
                return running[0]
            time.sleep(0.1)
        raise RuntimeError(f"no job runs: {self.jobs()}")

    def _cancel_all(self, seconds: float = 10) -> None:
        if not self.jobs():
            return
        run("scancel", "--full", f"--user={getpass.getuser()}", env=self.env)
        stop_at = time.monotonic() + seconds
        while self.jobs() and time.monotonic() < stop_at:
            time.sleep(0.1)

    def kwargs(self, workers: int = 2) -> dict[str, Any]:
        """What to call ``dask_jobqueue.SLURMCluster`` with, in values that YAML can hold."""
        return {
            "queue": "ci",
            "n_workers": workers,
            "cores": 1,
            "processes": 1,
            "memory": "1GiB",
            "interface": "lo",
            "python": sys.executable,
            "local_directory": str(self.folder),
            "log_directory": str(self.folder / "jobs"),
            "scheduler_options": {"host": LOOPBACK, "dashboard_address": f"{LOOPBACK}:0"},
            "job_extra_directives": ["--export=ALL"],
        }


# ---------------------------------------------------------------------------------------------------------------------
# Hosts as network namespaces


class Hosts(Deployment):
    """Hosts with an address each on a network of their own: a scheduler's, and some for a worker each.

    They are network namespaces on a bridge, which we have an address on too. Files they share.

    Parameters
    ----------
    folder : path
        Logs and other files.
    count : int
        Hosts for workers.
    env : mapping, optional
        The environment of the processes.

    Attributes
    ----------
    address : str
        The scheduler's, once it was started.
    network : str
        What all addresses begin with, such as ``198.18.7.``; ours is 254, the scheduler's 1, the workers' from 2.
    namespaces : list of str
        The scheduler's, then the workers'.
    links : list of str
        Our end of each host's cable, in the same order.
    bridge : str
    workers : dict of int to Popen
    """

    #: Time until a host that does not answer is given up. Dask's own 30 s are long for a test; it refuses 10 s.
    TIMEOUT = "12s"
    #: 198.18.0.0/15 is reserved for tests within a network.
    NETWORKS = 512

    def __init__(self, folder: str | os.PathLike[str], count: int, env: Mapping[str, str] | None = None) -> None:
        super().__init__(folder, env)
        self.count = count
        self.dask = DaskProcesses(self.folder, env)
        self.address = self.network = self.bridge = ""
        self.namespaces: list[str] = []
        self.links: list[str] = []
        self.workers: dict[int, subprocess.Popen[bytes]] = {}

    @staticmethod
    @functools.cache
    def missing() -> str | None:
        absent = not_installed("ip")
        if absent:
            return absent
        name = f"rp{os.getpid()}"
        try:
            run("ip", "netns", "add", name)
            try:
                run("ip", "link", "add", name, "type", "bridge")
                run("ip", "link", "del", name)
            finally:
                run("ip", "netns", "del", name)
        except StartError as error:
            return f"no network namespaces and bridges here: {error}"
        return None

    def start(self) -> None:
        number = self._take_network()
        self.network = f"198.{18 + number // 256}.{number % 256}."
        _ip(f"addr add {self.network}254/24 dev {self.bridge}", f"link set {self.bridge} up")
        for host in range(1 + self.count):
            namespace, link = f"rn{number}-{host}", f"rv{number}-{host}"
            self.undo.callback(_ip, f"netns del {namespace}", force=True)
            _ip(f"netns add {namespace}")
            self.namespaces.append(namespace)
            self.undo.callback(_ip, f"link del {link}", force=True)
            _ip(
                f"link add {link} type veth peer name eth0 netns {namespace}",
                f"link set {link} master {self.bridge} up",
            )
            self.links.append(link)
            _ip(
                "link set lo up",
                f"addr add {self.network}{1 + host}/24 dev eth0",
                "link set eth0 up",
                namespace=namespace,
            )
        self.undo.enter_context(self.dask)

    def _take_network(self) -> int:
        """Make the bridge: whoever makes the one of a number has that number's network."""
        for attempt in range(self.NETWORKS):
            number = (os.getpid() + attempt) % self.NETWORKS
            self.bridge = f"rb{number}"
            try:
                _ip(f"link add {self.bridge} type bridge")
            except StartError as error:
                if "exists" not in str(error):
                    raise
            else:
                self.undo.callback(_ip, f"link del {self.bridge}", force=True)
                return number
        raise StartError(f"all {self.NETWORKS} networks are taken")

    def alive(self) -> set[psutil.Process]:
        return super().alive() | self.dask.alive()

    def _place(self, host: int, extra_env: Mapping[str, str] | None) -> dict[str, Any]:
        return {
            "host": f"{self.network}{1 + host}",
            "prefix": ("ip", "netns", "exec", self.namespaces[host]),
            "env": {"DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP": self.TIMEOUT, **(extra_env or {})},
        }

    def scheduler(self, extra_args: Sequence[str] = (), extra_env: Mapping[str, str] | None = None) -> str:
        """Start the scheduler on its host; gives its address."""
        self.address = self.dask.scheduler(extra_args=extra_args, **self._place(0, extra_env))
        return self.address

    def worker(
        self,
        i: int,
        nanny: bool = True,
        threads: int = 1,
        extra_env: Mapping[str, str] | None = None,
        extra_args: Sequence[str] = (),
    ) -> subprocess.Popen[bytes]:
        """Start the worker of host ``i``, from 0, and do not wait for it: `registered` does."""
        place = self._place(1 + i, extra_env)
        process = self.dask.worker(self.address, threads, nanny, extra_args, name=f"host-{i}", **place)
        self.workers[i] = process
        return process

    def registered(self, seconds: float = 60) -> None:
        """Wait until the scheduler has taken in the workers, as `DaskProcesses.registered`."""
        self.dask.registered(*self.workers.values(), seconds=seconds)

    def cut(self, i: int) -> None:
        """Take host ``i`` off the network: it runs on, and nobody is told."""
        _ip(f"link set {self.links[1 + i]} nomaster")

    def mend(self, i: int) -> None:
        """Put host ``i`` on the network again."""
        _ip(f"link set {self.links[1 + i]} master {self.bridge}")

    def kill(self, i: int) -> None:  # type: ignore[override]
        """``kill -9`` the worker of host ``i`` with all that it started, its nanny too."""
        self.dask.kill(self.workers[i])


def _ip(*lines: str, namespace: str | None = None, force: bool = False) -> None:
    """Commands for ``ip``; ``force``: also where what they remove is gone."""
    options = (*(("-n", namespace) if namespace else ()), *(("-force",) if force else ()))
    try:
        run("ip", *options, "-batch", "-", text="\n".join(lines))
    except StartError:
        if not force:
            raise
