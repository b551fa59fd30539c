"""Where a job runs: connect to a Dask cluster, or start one, and close what was started."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import logging
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import dask
from dask.system import CPU_COUNT

import reducer
from reducer.config import ClusterSpec
from reducer.errors import InputError

if TYPE_CHECKING:
    from distributed import Client

log = logging.getLogger("reducer")

LOCAL_CLUSTER = "distributed.LocalCluster"
#: How long a scheduler may take to answer, and its first worker to join, in seconds.
CONNECT_TIMEOUT = 30
#: How long closing a cluster may take before its workers are killed, in seconds.
CLOSE_TIMEOUT = 5

#: Ours for clusters that we start.
DASK_SETTINGS = {
    # A worker gets no task before it has a thread for it: the death of one is blamed on nothing that only waited.
    "distributed.scheduler.worker-saturation": 1.0,
    # Forked workers would inherit locks.
    "distributed.worker.multiprocessing-method": "spawn",
    # `dask_setup`, below.
    "distributed.worker.preload": ["reducer.cluster"],
    # How often Dask looks at itself. Its defaults (10 ms, 20 ms, 500 ms) took 5 % of the workers' time.
    "distributed.worker.profile.interval": "200ms",
    "distributed.admin.tick.interval": "500ms",
    "distributed.admin.system-monitor.interval": "2s",
    # Dask lowers the first of these to 64 KiB, which also ends glibc's own raising of the second: every decoded photo
    # would be mapped and unmapped anew (a sixth of the time of an exact decode). These are glibc's own upper limits.
    "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": 2**25,
    "distributed.nanny.pre-spawn-environ.MALLOC_MMAP_THRESHOLD_": 2**25,
}


def planned_threads(spec: ClusterSpec) -> int | None:
    """Worker threads that a spec asks for, or None where only the running cluster can tell."""
    if spec.serial:
        return 1
    if spec.address or spec.class_path:
        return None
    return (spec.workers or CPU_COUNT) * (spec.threads or 1)


@contextmanager
def connect(spec: ClusterSpec) -> Iterator[Client]:
    """A client of the cluster that ``spec`` describes.

    A cluster that is started here is closed at the end, whatever happens; one that was given by address is left
    as it is.

    Parameters
    ----------
    spec : ClusterSpec
        Not a serial one.

    Yields
    ------
    distributed.Client
        At least one worker has joined, and all have this version of the package.

    Raises
    ------
    InputError
        If there is no such cluster, it does not start, or its workers lack the package.
    """
    # Imported first: it adds its defaults to dask.config, and `set` takes out at its end whatever came meanwhile.
    from distributed import Client

    with dask.config.set(DASK_SETTINGS):
        if spec.address:
            client = _client_at(spec.address)
            with client:
                _check_workers(client)
                yield client
            return
        chatter = logging.getLogger("distributed")
        level = chatter.level
        cluster = None
        try:
            cluster = _start(spec)
            with Client(cluster, timeout=CONNECT_TIMEOUT, set_as_default=False) as client:
                _check_workers(client)
                yield client
        except BaseException:
            # What Dask says of workers that are stopped in the middle of a task would bury the reason.
            chatter.setLevel(logging.CRITICAL)
            raise
        finally:
            if cluster is not None:
                _close(cluster)
            chatter.setLevel(level)


def dask_setup(worker: object) -> None:
    """Dask's hook in each worker process of a cluster on this machine that we start (its ``preload``), before any task.

    Ctrl-C reaches the workers too: they leave it to the client, which closes them. And C libraries (libtiff) write
    about broken photos straight to stderr, through the progress bar: that goes nowhere, Python's own stderr stays.
    """
    if multiprocessing.parent_process() is None:  # a worker that is a thread of the client
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
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
    """Not so of a heartbeat that is cut off: the scheduler lives in the client's process, which is then stopping."""
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
    """Threads of all workers that are there now."""
    return int(sum(client.nthreads().values()))


def dashboard(client: Client) -> str | None:
    """Address of the dashboard, or None when there is none (it needs bokeh where the scheduler runs)."""
    if not client.run_on_scheduler(_has_bokeh):
        return None
    link: str = client.dashboard_link
    return link or None


def _has_bokeh() -> bool:
    return importlib.util.find_spec("bokeh") is not None


def _client_at(address: str) -> Client:
    from distributed import Client

    try:
        return Client(address, timeout=CONNECT_TIMEOUT, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        reason = _one_line(error)
    # A client that did not come up closes itself when it is collected. Where that happens while another one starts, in
    # its thread, each waits for the other's lock: so it is collected here and now, when no error refers to it any more.
    gc.collect()
    raise InputError(f"no Dask scheduler answers at {address}: {reason}")


def _start(spec: ClusterSpec) -> Any:
    path = spec.class_path or LOCAL_CLUSTER
    kwargs: dict[str, Any] = dict(spec.kwargs)
    if spec.class_path is None:
        kwargs |= {"n_workers": spec.workers or CPU_COUNT, "threads_per_worker": spec.threads or 1}
        kwargs["silence_logs"] = log.getEffectiveLevel()
    module_name, _, class_name = path.rpartition(".")
    try:
        make = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"cluster: class {path} cannot be imported: {_one_line(error)}") from None
    chatter = logging.getLogger("distributed")
    level = chatter.level
    with warnings.catch_warnings():
        # Another program on the dashboard's usual port is no reason for a warning: we print ours.
        warnings.filterwarnings("ignore", message="Port .* is already in use")
        if not log.isEnabledFor(logging.DEBUG):
            chatter.setLevel(logging.CRITICAL)  # one line says why it does not start
        try:
            return make(**kwargs)
        except Exception as error:
            log.debug("the cluster does not start", exc_info=error)
            cause = _one_line(_root_cause(error))
            # A worker that ends while it starts is what a script without the guard looks like from here.
            hint = ""
            if "failed to start" in cause:
                hint = (
                    "; if this is your own script, put the call under `if __name__ == '__main__':`, since the worker "
                    "processes import it"
                )
            raise InputError(f"the cluster {path} does not start: {cause}{hint}") from None
        finally:
            chatter.setLevel(level)


def _close(cluster: Any) -> None:
    try:
        cluster.close(timeout=CLOSE_TIMEOUT)
    except Exception as error:  # the results are in; workers die with this process at the latest
        log.warning("the cluster did not close in order: %s", _one_line(error))


def _check_workers(client: Client) -> None:
    try:
        client.wait_for_workers(1, timeout=CONNECT_TIMEOUT)
    except TimeoutError:
        raise InputError(
            f"no worker has joined the scheduler in {CONNECT_TIMEOUT} s: start some, for example with `dask worker "
            f"{client.scheduler_info()['address']}`"
        ) from None
    try:
        versions = client.run(_package_version)
        # The scheduler takes the tasks apart too.
        versions["(the scheduler)"] = client.run_on_scheduler(_package_version)
    except Exception as error:
        raise InputError(
            f"a worker or the scheduler cannot import reducer ({_one_line(error)}): install reducer "
            f"{reducer.__version__} where they run"
        ) from None
    for worker, version in sorted(versions.items()):
        if version != reducer.__version__:
            raise InputError(
                f"worker {worker} has reducer {version}, this process {reducer.__version__}: install the same version"
            )


def _package_version() -> str:
    # What the tasks need is imported now, so that a package which is missing there is found before the run.
    import reducer.pipeline

    return reducer.__version__


def _root_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
