"""Reduce a labelled photo collection to the K most different photos of every label."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from reducer._version import __version__
from reducer.config.cluster import TLS, ClusterSpec, WorkerRules
from reducer.config.job import Job
from reducer.errors import ClusterError, InputError, ReducerError, TooManyFailuresError

if TYPE_CHECKING:
    from reducer.api.cut import CutResult, cut
    from reducer.api.embed import EmbedResult, embed
    from reducer.api.explain import Story, explain
    from reducer.api.reduce import reduce_images
    from reducer.api.result import Result, open_run
    from reducer.api.resume import resume
    from reducer.api.status import Status, status
    from reducer.outputs.export.export import ExportResult, export
    from reducer.outputs.report.page import write_report

#: Where the names are that are imported when they are first used: Dask, Arrow and Pillow take a second to import, and
#: ``reducer --help`` does without them. No module may have the name of a function: importing it would hide that one.
_LATER = {
    "CutResult": "api.cut",
    "EmbedResult": "api.embed",
    "ExportResult": "outputs.export.export",
    "Result": "api.result",
    "Status": "api.status",
    "Story": "api.explain",
    "cut": "api.cut",
    "embed": "api.embed",
    "explain": "api.explain",
    "export": "outputs.export.export",
    "open_run": "api.result",
    "reduce_images": "api.reduce",
    "resume": "api.resume",
    "status": "api.status",
    "write_report": "outputs.report.page",
}

__all__ = [
    "TLS",
    "ClusterError",
    "ClusterSpec",
    "CutResult",
    "EmbedResult",
    "ExportResult",
    "InputError",
    "Job",
    "ReducerError",
    "Result",
    "Status",
    "Story",
    "TooManyFailuresError",
    "WorkerRules",
    "__version__",
    "cut",
    "embed",
    "explain",
    "export",
    "open_run",
    "reduce_images",
    "resume",
    "status",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name in _LATER:
        from importlib import import_module

        return getattr(import_module(f"reducer.{_LATER[name]}"), name)
    raise AttributeError(f"module 'reducer' has no attribute {name!r}")
