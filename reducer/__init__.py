"""Reduce a labelled photo collection to the K most different photos of every label."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from reducer.clusterspec import TLS, ClusterSpec, WorkerRules
from reducer.config import Job
from reducer.errors import ClusterError, InputError, ReducerError, TooManyFailuresError

if TYPE_CHECKING:
    from reducer.job import Result, reduce_images

__version__ = "0.1.0"

__all__ = [
    "TLS",
    "ClusterError",
    "ClusterSpec",
    "InputError",
    "Job",
    "ReducerError",
    "Result",
    "TooManyFailuresError",
    "WorkerRules",
    "__version__",
    "reduce_images",
]


def __getattr__(name: str) -> Any:
    # Dask, Arrow and Pillow take a second to import; `reducer --help` does without them.
    if name in ("reduce_images", "Result"):
        from reducer import job

        return getattr(job, name)
    raise AttributeError(f"module 'reducer' has no attribute {name!r}")
