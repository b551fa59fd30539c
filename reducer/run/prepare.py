"""A run up to its first task: its inputs, its workers, its summary and its plan in the run folder."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from reducer.config.checks import flag
from reducer.config.cluster import ClusterSpec
from reducer.config.job import INPUT_FILES
from reducer.config.resolved import ResolvedJob
from reducer.errors import InputError
from reducer.photos.model import PATHS, loaded
from reducer.run.counters import Counters
from reducer.run.dask.check import model_everywhere
from reducer.run.dask.connect import connect, dashboard, expected_threads
from reducer.run.dask.dispatch import Dispatch
from reducer.run.dask.workers import Workers
from reducer.run.execute import Run
from reducer.run.fingerprint import Fingerprint
from reducer.run.folder import RunFolder
from reducer.run.known import Reuse, read_avoided
from reducer.run.plan.plan import Plan, make_plan
from reducer.run.remaining import Remaining
from reducer.run.summary import opening
from reducer.run.tasks.serial import InProcess
from reducer.run.tasks.vector_files import VectorFiles, find_vectors
from reducer.storage.codecs import Hashes
from reducer.storage.schemas import ListForm
from reducer.storage.tables import read_others

if TYPE_CHECKING:
    from reducer.run.dask.connect import Client

log = logging.getLogger("reducer")


@dataclass(frozen=True)
class Inputs:
    """Inputs of a run, read before a cluster starts.

    Attributes
    ----------
    plan : Plan
        The plan, without partitions; its job has its model.
    vectors : VectorFiles or None
        The given vectors.
    avoid : ndarray of uint8, shape (m, hash bytes), or None
        Hashes to avoid.
    reuse : Reuse or None
        The earlier run whose hashes are reused.
    """

    plan: Plan
    vectors: VectorFiles | None
    avoid: Hashes | None
    reuse: Reuse | None


def read_inputs(job: ResolvedJob) -> Inputs:
    """Read all that a new run needs.

    Raises
    ------
    InputError
        If any of it cannot be read, is not what it should be, or is a file that the run would write or remove.
    """
    _check_kept(job)
    job = job.with_model()
    vectors = check_vectors(job)
    plan = make_plan(job)
    return Inputs(plan, vectors, read_avoided(job), None if job.reuse is None else Reuse(job))


def _check_kept(job: ResolvedJob) -> None:
    """Refuse an input that the run would write anew or remove, since it lies among the files of RUN."""
    folder = RunFolder(job.output_location)
    for name in INPUT_FILES:
        path = getattr(job, name)
        if path is not None and folder.holds(path):
            raise InputError(
                f"{flag(name)} {path} lies in --output {folder.path}, whose files this run writes anew: it would be "
                "lost; give another --output"
            )


def check_vectors(job: ResolvedJob) -> VectorFiles | None:
    """Check the vectors or the model that a job ranks by, and return the files of given vectors.

    Raises
    ------
    InputError
        If the vectors or the model cannot be used.
    """
    if job.model is not None and job.embed is not None:
        PATHS.setdefault(job.model.model, []).append(job.embed)
        if importlib.util.find_spec("onnxruntime") is not None:  # only the workers need it
            loaded(job.model)
    if job.by_vectors and job.strategy == "farthest-first":
        log.warning(
            "--strategy farthest-first on vectors seeks out what is odd: wrong labels and other mistakes come first "
            "(17 points less accurate with a tenth of the labels wrong). facility-location, the default with vectors, "
            "keeps few of them"
        )
    return find_vectors(job)


@dataclass(frozen=True)
class WorkerPool:
    """Workers of a run.

    Attributes
    ----------
    client : distributed.Client or None
        Client of their cluster; None for this process.
    threads : int
        Worker threads that there are, or will be.
    workers : Workers
        Executors of tasks.
    open_cluster : ExitStack
        Closes the cluster.
    """

    client: Client | None
    threads: int
    workers: Workers
    open_cluster: ExitStack


def start_workers(
    job: ResolvedJob, spec: ClusterSpec, counters: Counters, open_cluster: ExitStack, *, needed: bool = True
) -> WorkerPool:
    """Connect to the cluster, and give its workers the model of the job.

    Parameters
    ----------
    job : ResolvedJob
        The job, with its model.
    spec : ClusterSpec
        Where it runs.
    counters : Counters
        Notes the time that the start takes, in seconds.
    open_cluster : ExitStack
        Entered for the cluster; closing it closes the cluster.
    needed : bool
        Whether there is anything to do; no cluster is started otherwise.
    """
    client = None
    with counters.timing("cluster_start"):
        if needed:
            client = None if spec.serial else open_cluster.enter_context(connect(spec))
            open_cluster.enter_context(model_everywhere(client, job))
    if client is not None and counters.progress and (link := dashboard(client)):
        tqdm.write(f"Dask dashboard: {link}", file=sys.stderr)
    threads = 1 if client is None else expected_threads(client, spec)
    return WorkerPool(client, threads, Workers(client, spec), open_cluster)


@dataclass
class Prepared:
    """A run that is ready for its first task.

    Attributes
    ----------
    remaining : Remaining
        What is left to do of the plan.
    counters : Counters
        Counts and times.
    pool : WorkerPool
        The workers.
    executor : InProcess or Dispatch, optional
        Executor of the first tasks; None where none are left.
    summary : dict
        Content of ``summary.json`` but for the counts.
    terms : dict
        What is stored with the plan.
    """

    remaining: Remaining
    counters: Counters
    pool: WorkerPool
    executor: InProcess | Dispatch | None
    summary: dict[str, Any]
    terms: dict[str, Any]

    @classmethod
    def new(
        cls, remaining: Remaining, counters: Counters, pool: WorkerPool, executor: InProcess | Dispatch
    ) -> Prepared:
        """Return a run that begins now, with its summary and what is stored with its plan.

        Raises
        ------
        InputError
            If the workers would hash or embed otherwise than those of the run whose hashes are reused.
        """
        if remaining.reuse is not None:
            remaining.reuse.check_environment(executor.environment)
        plan = remaining.plan
        fingerprint = Fingerprint.of(plan.job, remaining.avoid, executor.environment)
        summary = opening(plan, pool.workers.spec, fingerprint, counters.started)
        return cls(remaining, counters, pool, executor, summary, plan_terms(summary, plan, fingerprint))

    @property
    def folder(self) -> RunFolder:
        """The run folder."""
        return self.remaining.folder

    def write_plan(self) -> None:
        """Write the plan of a run that begins now."""
        plan = self.remaining.plan
        if plan.shards is not None:
            self.folder.plan.write_shards(plan.shards)
        if others := ListForm.of(self.summary).others:
            self.folder.manifest.write(
                read_others(f"--manifest {plan.job.manifest}", plan.job.manifest_location, others)
            )
        self.folder.plan.write(plan.rows, self.terms, self.remaining.avoid)
        self.remaining = replace(self.remaining, is_begun=True)

    @property
    def run(self) -> Run:
        """The run, to be executed."""
        return Run(self.remaining, self.counters, self.summary, self.pool.workers, self.terms)

    def execute(self) -> Collection[str]:
        """Do what is left to do, and return the addresses of workers that are to get no more work."""
        assert self.executor is not None
        return self.run.execute(self.executor, self.pool.open_cluster)


def plan_terms(summary: dict[str, Any], plan: Plan, fingerprint: Fingerprint) -> dict[str, Any]:
    """Return what is stored with a plan."""
    return {
        "run": summary["run"],
        "rank_all": plan.job.rank_all,
        "is_listed": plan.is_listed,
        "manifest": dict(plan.manifest),
        "fingerprint": fingerprint.as_dict(),
    }
