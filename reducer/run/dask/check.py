"""Check that all workers can do their part alike: their versions, access to photos, the model they need."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from typing import Any

from distributed import Client
from distributed.comm.addressing import get_address_host
from distributed.diagnostics.plugin import UploadFile

from reducer.config.job import Job
from reducer.config.resolved import ResolvedJob
from reducer.config.settings import PhotoSettings
from reducer.errors import ClusterError, InputError, one_line
from reducer.photos.model import PATHS
from reducer.run.dask.connect import log
from reducer.run.dask.pool import NothingCame, TaskLost, map_unordered
from reducer.run.dask.worker import call_on_host, read_failure
from reducer.run.tasks.environment import Environment, differences, environment
from reducer.storage.location import PhotoRef


def check_same_environment(client: Client, settings: PhotoSettings) -> Environment:
    """Find out what decides hashes on the workers, and refuse workers that differ in it.

    Parameters
    ----------
    client : distributed.Client
        Client of the cluster.
    settings : PhotoSettings
        How photos are hashed: the probes are hashed in the same way.

    Returns
    -------
    Environment
        Of one of them; all hash alike.

    Raises
    ------
    InputError
        If workers differ from each other in what decides a hash. Other differences are logged as warnings.
    """
    try:
        environments: dict[str, Environment] = client.run(environment, settings)
    except InputError as error:
        raise InputError(f"a worker cannot take part: {error}") from None
    except OSError as error:
        raise ClusterError(f"a worker went away before the run began: {one_line(error)}; run this again") from None
    if not environments:
        raise ClusterError("all workers went away before the run began; run this again")
    errors, cautions = differences({f"worker {worker}": process for worker, process in sorted(environments.items())})
    if errors:
        raise InputError("; ".join(errors))
    for line in cautions:
        log.warning("%s", line)
    return environments[min(environments)]


class ShipModel(UploadFile):
    """Brings a model to every worker, late ones too, since they may not see this computer's files."""

    def __init__(self, path: str, digest: str, client: str) -> None:
        super().__init__(path, load=False)
        # One per client: another run may have the same model there, and end before this one.
        self.digest, self.filename, self.name = digest, f"reducer-{digest}-{client}.onnx", f"reducer-{digest}-{client}"

    async def setup(self, worker: Any) -> None:
        """Run on each worker that is there, and on each that joins."""
        await super().setup(worker)  # type: ignore[no-untyped-call]
        PATHS.setdefault(self.digest, []).append(os.path.join(worker.local_directory, self.filename))

    def teardown(self, worker: Any) -> None:
        """Run when the worker closes, or the run is at its end."""
        with suppress(OSError):
            os.remove(os.path.join(worker.local_directory, self.filename))


@contextmanager
def model_everywhere(client: Client | None, job: ResolvedJob) -> Iterator[None]:
    """Bring the model of a job, if it has one, to where photos are embedded.

    Parameters
    ----------
    client : distributed.Client or None
        Client of the cluster; None for this process.
    job : ResolvedJob
        The job.

    Raises
    ------
    InputError
        If it cannot be sent.
    """
    if job.model is None or job.embed is None or client is None:
        yield
        return
    plugin = ShipModel(job.embed, job.model.model, client.id)
    try:
        client.register_plugin(plugin, name=plugin.name)
    except OSError as error:
        raise ClusterError(f"a worker went away before the run began: {one_line(error)}; run this again") from None
    try:
        yield
    finally:
        with suppress(Exception):  # the cluster may be gone
            client.unregister_worker_plugin(plugin.name)


def check_photo_access(client: Client, job: ResolvedJob, photos: Sequence[PhotoRef], wait: float) -> PhotoRef | None:
    """Let one worker of each host read a photo.

    Parameters
    ----------
    client : distributed.Client
        Client of the cluster.
    job : ResolvedJob
        The job.
    photos : sequence of str or ByteRange
        A few of its photos, or pieces of its shards. The first is read; the next one if nobody can read it, for that
        tells nothing.
    wait : float
        Seconds that the hosts have to answer.

    Returns
    -------
    str, ByteRange or None
        A photo that all can read; None if none of them can be read anywhere.

    Raises
    ------
    InputError
        If only some hosts can read a photo, or this process can and the workers cannot.
    ClusterError
        If a host does not answer.
    """
    workers_on: dict[str, list[str]] = {}
    for worker in sorted(client.nthreads()):
        workers_on.setdefault(get_address_host(worker), []).append(worker)
    stop = time.monotonic() + wait
    for photo in photos:
        failures = _on_hosts(client, workers_on, stop, read_failure, photo, job.photo_settings, job.source)
        blind = {host: failure for host, failure in sorted(failures.items()) if failure is not None}
        if not failures:  # all workers have gone meanwhile
            return None
        if not blind:
            return photo
        if len(blind) < len(failures) or read_failure(photo, job.photo_settings, job.source) is None:
            raise InputError(_blind(job, photo, blind))
        if time.monotonic() > stop:
            break
    return None


def _blind(job: Job, photo: PhotoRef, blind: Mapping[str, str]) -> str:
    what = f"worker host{'s' if len(blind) > 1 else ''} {', '.join(blind)}"
    reason = f"the photo {photo} is {next(iter(blind.values()))} there"
    if job.images_location.remote:
        return f"{what} cannot read {job.images} ({reason}): check that it reaches the storage, and may use it"
    return f"{what} cannot see {os.path.abspath(job.images)}: use a shared folder or S3 ({reason})"


def _on_hosts(
    client: Client, workers_on: Mapping[str, list[str]], stop: float, function: Callable[..., Any], *arguments: Any
) -> dict[str, Any]:
    """Call a function on a worker of each host, and leave out hosts whose workers go meanwhile.

    By tasks, which the scheduler and the workers never print: arguments of `Client.run` stand in their logs, secrets
    and all, where Dask logs at the level DEBUG.
    """
    silent, answers = set(workers_on), {}
    outcomes = map_unordered(
        client,
        call_on_host,
        workers_on,
        function,
        *arguments,
        name="check",
        workers_of=workers_on.__getitem__,
        patience=stop - time.monotonic(),
    )
    try:
        with closing(outcomes):
            for outcome in outcomes:
                silent.discard(outcome.item)
                if outcome.error is None:
                    answers[outcome.item] = outcome.result
                elif not isinstance(outcome.error, TaskLost):
                    raise ClusterError(f"a worker could not read a photo: {one_line(outcome.error)}; run this again")
    except NothingCame:
        raise ClusterError(
            f"the workers on {', '.join(sorted(silent))} do not answer in time (workers: wait): they hang, or "
            "are busy with other work"
        ) from None
    return answers
