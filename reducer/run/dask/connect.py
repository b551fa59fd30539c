"""Connect to a Dask cluster, or start one, and close what was started."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import logging
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any

import dask
from dask.system import CPU_COUNT as CPU_COUNT

from reducer.config.cluster import TLS, ClusterSpec
from reducer.errors import ClusterError, InputError, one_line
from reducer.formatting import format_bytes
from reducer.run.dask.code import minor_version
from reducer.run.dask.ship_code import same_code

if TYPE_CHECKING:
    from distributed import Client as Client  # rooms above name the type by this module

log = logging.getLogger("reducer")

LOCAL_CLUSTER = "distributed.LocalCluster"
#: How long closing a cluster may take before its workers are killed, in seconds.
CLOSE_TIMEOUT = 5

#: Dask's settings for clusters that we start.
DASK_SETTINGS: dict[str, Any] = {
    # A worker gets no task before it has a thread for it: the death of one is blamed on nothing that only waited.
    "distributed.scheduler.worker-saturation": 1.0,
    # Forked workers would inherit locks.
    "distributed.worker.multiprocessing-method": "spawn",
    # How often Dask looks at itself. Its defaults (10 ms, 20 ms, 500 ms) took 5 % of the workers' time.
    "distributed.worker.profile.interval": "200ms",
    "distributed.admin.tick.interval": "500ms",
    "distributed.admin.system-monitor.interval": "2s",
    # Dask lowers the first of these to 64 KiB, which also ends glibc's own raising of the second: every decoded photo
    # would be mapped and unmapped anew (a sixth of the time of an exact decode). These are glibc's own upper limits.
    "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": 2**25,
    "distributed.nanny.pre-spawn-environ.MALLOC_MMAP_THRESHOLD_": 2**25,
}

#: Dask's settings for clusters whose workers are processes on this machine: `dask_setup`, below.
LOCAL_SETTINGS = {"distributed.worker.preload": ["reducer.run.dask.connect"]}
#: Seconds after which is said what is waited for, and that Dask may take beyond its timeout.
SIGN_OF_LIFE, GRACE = 5.0, 2.0
#: Bytes of memory that a worker takes before its first photo.
LEAST_MEMORY = 200_000_000
#: What to install where a cluster class cannot be imported.
EXTRAS = {"asyncssh": "reducer[ssh]", "dask_jobqueue": "reducer[slurm]", "dask_kubernetes": "reducer[kubernetes]"}


def planned_threads(spec: ClusterSpec) -> int | None:
    """Return the worker threads that a spec asks for, or None if only the running cluster can tell."""
    if spec.serial:
        return 1
    if spec.address or spec.class_path:
        return None
    return (spec.workers or CPU_COUNT) * (spec.threads or 1)


def expected_threads(client: Client, spec: ClusterSpec) -> int:
    """Return the worker threads that there are, or will be when all workers that were asked for have joined."""
    workers = len(client.nthreads())
    asked = spec.scale or (spec.adapt[1] if spec.adapt else 0)
    threads = worker_threads(client)
    return max(1, threads, asked * threads // max(1, workers))


@contextmanager
def connect(spec: ClusterSpec) -> Iterator[Client]:
    """Connect to the cluster that ``spec`` describes, or start it.

    A cluster that is started here is closed at the end, whatever happens; a cluster that was given by address is left
    as it is.

    Parameters
    ----------
    spec : ClusterSpec
        Not a serial one.

    Yields
    ------
    distributed.Client
        As many workers as `WorkerRules.min` asks for have joined, and all run this code.

    Raises
    ------
    InputError
        If there is no such cluster, it does not start, or its workers cannot run our code.
    ClusterError
        If too few workers join in time.
    """
    # Imported first: it adds its defaults to dask.config, and `set` takes out at its end whatever came meanwhile.
    from distributed import Client, LocalCluster

    if spec.address:
        with _client_at(spec) as client:
            _wait_for_workers(client, spec)  # by a request that sends no function
            _check_memory(client)
            _check_python(client)
            with same_code(client, spec.rules.ship_code):
                yield client
        return
    make = _cluster_class(spec.class_path or LOCAL_CLUSTER)
    local = isinstance(make, type) and issubclass(make, LocalCluster)
    with dask.config.set(DASK_SETTINGS | (LOCAL_SETTINGS if local else {})):
        chatter = logging.getLogger("distributed")
        level = chatter.level
        cluster = None
        if local:
            _start_resource_tracker()
        try:
            cluster = _start(make, spec)
            with Client(cluster, timeout=spec.timeout, set_as_default=False) as client:
                _wait_for_workers(client, spec)
                _check_memory(client)
                if not local:
                    _check_python(client)
                # Processes that we start on this machine run our code: they import it from where we do.
                with nullcontext() if local else same_code(client, spec.rules.ship_code):
                    yield client
        except BaseException:
            # What Dask says of workers that are stopped in the middle of a task would bury the reason.
            chatter.setLevel(logging.CRITICAL)
            raise
        finally:
            if cluster is not None:
                _close(cluster)
            chatter.setLevel(level)


def _start_resource_tracker() -> None:
    """Start the process in which multiprocessing keeps count of what workers share, proof against SIGHUP.

    It ignores Ctrl-C and SIGTERM, but not the hangup of a terminal that is closed; the client ends it in any case.
    """
    hangup = getattr(signal, "SIGHUP", None)
    if hangup is None or threading.current_thread() is not threading.main_thread():
        return
    before = signal.signal(hangup, signal.SIG_IGN)  # the process inherits it
    try:
        resource_tracker.ensure_running()
    finally:
        signal.signal(hangup, before)


def dask_setup(worker: object) -> None:
    """Set up a worker process of a cluster on this machine that we start, before any task (Dask's ``preload`` hook).

    Ctrl-C and the hangup of a terminal reach the workers too: they leave them to the client, which closes them. And C
    libraries (libtiff) write about broken photos straight to stderr, through the progress bar: that goes nowhere,
    Python's own stderr stays.
    """
    if multiprocessing.parent_process() is None:  # a worker that is a thread of the client
        return
    for number in {signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGINT)}:  # Windows has no SIGHUP
        signal.signal(number, signal.SIG_IGN)
    logging.getLogger("distributed.worker.state_machine").setLevel(logging.ERROR)
    logging.getLogger("distributed.worker").addFilter(_worth_saying)
    stderr = os.fdopen(os.dup(2), "w", buffering=1)
    for handler in logging.getLogger("distributed").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(stderr)
    sys.stderr = stderr
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)


def _worth_saying(record: logging.LogRecord) -> bool:
    """Drop the record of a heartbeat that is cut off: the scheduler lives in the client, which is stopping."""
    return not str(record.msg).startswith("Failed to communicate with scheduler during heartbeat")


def refuse_import_of_main() -> None:
    """Stop a worker process that, while it starts, runs the script which starts the workers.

    Raises
    ------
    RuntimeError
        In a process that is being spawned.
    """
    # The mark that multiprocessing itself goes by when it refuses to start a process there.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RuntimeError(
            "a worker process is importing your script and came to reduce_images again. Put the call under\n\n"
            "    if __name__ == '__main__':\n        reduce_images(...)\n"
        )


def worker_threads(client: Client) -> int:
    """Return the threads of all workers that are there now."""
    return int(sum(client.nthreads().values()))


def dashboard(client: Client) -> str | None:
    """Return the address of the dashboard; None if there is none (it needs bokeh where the scheduler runs)."""
    if not client.run_on_scheduler(_has_bokeh):
        return None
    link: str = client.dashboard_link
    return link or None


def _has_bokeh() -> bool:
    return importlib.util.find_spec("bokeh") is not None


def _check_python(client: Client) -> None:
    """Refuse a scheduler or workers of another Python: functions travel as bytecode, of which it may die.

    By Dask's own request, which sends no function.

    Raises
    ------
    InputError
        Naming both versions.
    """
    found: Any = client.get_versions(packages=[])
    here = minor_version()
    others = {
        "the scheduler": found["scheduler"],
        **{f"the worker {name}": it for name, it in found["workers"].items()},
    }
    for name, versions in others.items():
        there = minor_version((versions or {}).get("host", {}).get("python", here))
        if there != here:
            raise InputError(
                f"{name} runs Python {there}, and this is Python {here}: functions travel between them, and have to be "
                f"of one version. Use Python {there} here, or a cluster with Python {here}"
            )


def _check_memory(client: Client) -> None:
    """Refuse workers (by the first of them) with too little memory to start in: Dask would restart them for ever.

    Raises
    ------
    InputError
        Naming one of them.
    """
    for name, worker in client.scheduler_info()["workers"].items():
        limit = worker.get("memory_limit")
        if limit and limit < LEAST_MEMORY:
            raise InputError(
                f"the worker {name} may take {format_bytes(limit)} of memory, and Python with its imports takes about "
                f"{format_bytes(LEAST_MEMORY)}: give each worker at least {format_bytes(2 * LEAST_MEMORY)}"
            )


def _client_at(spec: ClusterSpec) -> Client:
    from distributed import Client

    made: list[Client] = []
    errors: list[BaseException] = []

    def make() -> None:
        try:
            made.append(
                Client(spec.address, timeout=spec.timeout, set_as_default=False, security=_security(spec.security))
            )
        except BaseException as error:
            errors.append(error)

    # In a thread of its own: Dask waits without end for what takes a connection and is no scheduler.
    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    thread.join(SIGN_OF_LIFE)
    if thread.is_alive():
        log.warning("waiting for the scheduler at %s, up to %g s (client: timeout)", spec.address, spec.timeout)
        thread.join(max(0.0, spec.timeout + GRACE - SIGN_OF_LIFE))
    if made:
        return made[0]
    if not errors:
        reason = f"no answer in {spec.timeout:g} s; is it another program's port, such as the dashboard's?"
    elif isinstance(errors[0], OSError | ValueError | TypeError | LookupError):
        reason = one_line(errors[0])
        errors.clear()
    else:
        raise errors[0]
    # A client that did not come up closes itself when it is collected. Where that happens while another one starts, in
    # its thread, each waits for the other's lock: so it is collected here and now, when no error refers to it any more.
    gc.collect()
    raise InputError(f"no Dask scheduler answers at {spec.address}: {reason}{_tls_hint(spec)}")


def _tls_hint(spec: ClusterSpec) -> str:
    if spec.address and spec.address.startswith("tls://"):
        if spec.security is None:
            return ". An address of tls:// needs security: {ca_file, client_cert, client_key} in the cluster file"
        return ". Check that the files under security belong to this scheduler"
    return ""


def _security(files: TLS | None) -> Any:
    """Return Dask's own object: one pair serves client, scheduler and workers."""
    if files is None:
        return None
    from distributed import Security

    pair = {"cert": files.client_cert, "key": files.client_key}
    return Security(
        tls_ca_file=files.ca_file,
        require_encryption=True,
        **{f"tls_{role}_{what}": path for role in ("client", "scheduler", "worker") for what, path in pair.items()},
    )


def _start(make: Any, spec: ClusterSpec) -> Any:
    path = spec.class_path or LOCAL_CLUSTER
    kwargs: dict[str, Any] = dict(spec.kwargs)
    if spec.class_path is None:
        kwargs |= {"n_workers": spec.workers or CPU_COUNT, "threads_per_worker": spec.threads or 1}
        kwargs["silence_logs"] = log.getEffectiveLevel()
    if spec.security is not None:
        kwargs["security"] = _security(spec.security)
    chatter = logging.getLogger("distributed")
    level = chatter.level
    with warnings.catch_warnings():
        # Another program on the dashboard's usual port is no reason for a warning: we print ours.
        warnings.filterwarnings("ignore", message="Port .* is already in use")
        if not log.isEnabledFor(logging.DEBUG):
            chatter.setLevel(logging.CRITICAL)  # one line says why it does not start
        try:
            cluster = make(**kwargs)
        except Exception as error:
            log.debug("the cluster does not start", exc_info=error)
            cause = one_line(_root_cause(error))
            # A worker that ends while it starts is what a script without the guard looks like from here.
            hint = ""
            if "failed to start" in cause:
                hint = (
                    "; if this is your own script, put the call under `if __name__ == '__main__':`, since the worker "
                    "processes import it"
                )
            hint = hint or _limit_hint()
            raise InputError(f"the cluster {path} does not start: {cause}{hint}{_install_hint(error)}") from None
        finally:
            chatter.setLevel(level)
    _size(cluster, spec)
    return cluster


def _limit_hint() -> str:
    """Say that the memory of a process is limited, if it is."""
    with suppress(ImportError):  # Windows has no such module
        import resource

        most = resource.getrlimit(resource.RLIMIT_AS)[0]
        if most != resource.RLIM_INFINITY:
            return (
                f"; a process may take only {format_bytes(most)} here (ulimit -v), which is too little for Dask: raise "
                "it, or take --workers 0"
            )
    return ""


def _cluster_class(path: str) -> Any:
    module_name, _, class_name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"cluster: class {path} cannot be imported: {one_line(error)}{_install_hint(error)}") from None


def _install_hint(error: BaseException) -> str:
    """Say which package to install, if one is missing."""
    while error is not None and not isinstance(error, ImportError):
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    if error is None:
        return ""
    text = f"{error.name or ''} {error}"
    for module, extra in EXTRAS.items():
        if module in text:
            return f"; install it: pip install '{extra}'"
    if isinstance(error, ModuleNotFoundError) and error.name:
        return (
            f"; install the package that has it, such as: pip install {error.name.partition('.')[0].replace('_', '-')}"
        )
    return ""


def _size(cluster: Any, spec: ClusterSpec) -> None:
    """Ask a cluster that we have started for its workers."""
    try:
        if spec.scale is not None:
            cluster.scale(spec.scale)
        elif spec.adapt is not None:
            cluster.adapt(minimum=spec.adapt[0], maximum=spec.adapt[1])
    except Exception as error:
        _close(cluster)
        asked = "scale" if spec.adapt is None else "adapt"
        raise InputError(f"the cluster {spec.class_path} cannot be asked to {asked}: {one_line(error)}") from None


def _close(cluster: Any) -> None:
    try:
        cluster.close(timeout=CLOSE_TIMEOUT)
    except Exception as error:  # the results are in; workers die with this process at the latest
        log.warning("the cluster did not close in order: %s", one_line(error))


def _wait_for_workers(client: Client, spec: ClusterSpec) -> None:
    rules = spec.rules
    try:
        try:
            client.wait_for_workers(rules.min, timeout=min(SIGN_OF_LIFE, rules.wait))
        except TimeoutError:
            if rules.wait <= SIGN_OF_LIFE:
                raise
            there = len(client.nthreads())
            log.warning(
                "waiting for workers: %d of %d are there, up to %g s (workers: wait)", there, rules.min, rules.wait
            )
            client.wait_for_workers(rules.min, timeout=rules.wait - SIGN_OF_LIFE)
    except TimeoutError:
        joined = len(client.nthreads())
        who = {0: "no worker has", 1: "1 worker has"}.get(joined, f"{joined} workers have")
        if spec.address:
            advice = f"start some, for example with `dask worker {spec.address}`"
        else:
            advice = "look into the logs of the cluster's jobs and its queue"
        raise ClusterError(
            f"{who} joined in {rules.wait:g} s (workers: wait), and "
            f"the run begins with {rules.min} (workers: min): {advice}, then run this again"
        ) from None


def _root_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error
