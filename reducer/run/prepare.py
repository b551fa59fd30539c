"""What a run needs before its first task: vectors, a client, the terms of its plan."""

from __future__ import annotations

import importlib.util
import logging
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from reducer.config.cluster import ClusterSpec
from reducer.config.resolved import ResolvedJob
from reducer.photos.model import PATHS, loaded
from reducer.run.counters import Counters
from reducer.run.dask.check import model_everywhere
from reducer.run.dask.connect import connect, dashboard, expected_threads
from reducer.run.fingerprint import Fingerprint
from reducer.run.plan.plan import Plan
from reducer.run.tasks.vector_files import VectorFiles, find_vectors

if TYPE_CHECKING:
    from reducer.run.dask.connect import Client

log = logging.getLogger("reducer")


def check_vectors(job: ResolvedJob) -> VectorFiles | None:
    """What a job ranks by, if that is vectors; whatever is wrong with it shows before a cluster starts.

    Raises
    ------
    InputError
        If the vectors or the model cannot be read, or are not what they should be.
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


def open_client(
    spec: ClusterSpec, session: Counters, open_cluster: ExitStack, job: ResolvedJob | None
) -> Client | None:
    """A client, whose workers have the model of the job; None where there is nothing to do, or no cluster."""
    with session.timing("cluster_start"):
        client = open_cluster.enter_context(connect(spec)) if job is not None and not spec.serial else None
        if job is not None:
            open_cluster.enter_context(model_everywhere(client, job))
    if client is not None and session.progress and (link := dashboard(client)):
        tqdm.write(f"Dask dashboard: {link}", file=sys.stderr)
    return client


def thread_count(client: Client | None, spec: ClusterSpec) -> int:
    """Worker threads that there are, or will be."""
    return 1 if client is None else expected_threads(client, spec)


def plan_terms(summary: dict[str, Any], plan: Plan, fingerprint: Fingerprint) -> dict[str, Any]:
    """What goes with the plan."""
    return {
        "run": summary["run"],
        "rank_all": plan.job.rank_all,
        "is_listed": plan.is_listed,
        "manifest": dict(plan.manifest),
        "fingerprint": fingerprint.as_dict(),
    }
