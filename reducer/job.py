"""The Dask bag: submit partitions, gather them as they finish, write what they found."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from tqdm.auto import tqdm

from reducer.cluster import connect, dashboard, refuse_import_of_main
from reducer.clusterspec import ClusterSpec
from reducer.config import STORAGE_OPTIONS, Job
from reducer.dispatch import Dispatch, InProcess
from reducer.errors import ReducerError, TooManyFailuresError
from reducer.lists import read_avoided
from reducer.pipeline import ledger_rows
from reducer.plan import Plan, make_plan
from reducer.quality import figures
from reducer.store import RunFolder
from reducer.types import FAILED, KEPT, KEPT_SMALL_LABEL, NOT_SAMPLED, PartitionResult, Quality

#: A job whose first so many photos all fail has a wrong path, not bad photos.
ALL_FAILED = 200
#: Rows of the ledger's part files that hold the photos which were not read.
UNREAD_PART = 100_000


@dataclass(frozen=True)
class Result:
    """What a run has made.

    Attributes
    ----------
    output : Path or str
        The run folder; text where it is a URL.
    summary : dict
        ``summary.json``.
    """

    output: Path | str
    summary: dict[str, Any] = field(repr=False)
    _folder: RunFolder = field(repr=False)

    @property
    def reduced(self) -> pd.DataFrame:
        """The reduced list: the rows and columns of ``reduced.parquet``."""
        job = self.summary["job"]
        frame: pd.DataFrame = self._folder.reduced(job["id_column"], job["label_column"]).to_pandas()
        return frame

    @property
    def images(self) -> pd.DataFrame:
        """The ledger: one row a photo of the manifest, in its order."""
        frame: pd.DataFrame = self._folder.ledger().to_pandas()
        return frame


@dataclass
class _Totals:
    """Sums over the partitions that are done."""

    bits: int
    partitions: int = 0
    read: int = 0
    failed: int = 0
    bytes_read: int = 0
    worker_seconds: float = 0.0
    peak_memory: int = 0
    quality: Quality = field(default_factory=Quality)
    first_failure: str | None = None

    def add(self, result: PartitionResult) -> None:
        self.partitions += 1
        self.read += result.read
        self.failed += result.failed
        self.bytes_read += result.bytes_read
        self.worker_seconds += result.seconds
        self.peak_memory = max(self.peak_memory, result.peak_memory)
        self.quality += result.quality
        self.first_failure = self.first_failure or result.first_failure


def reduce_images(job: Job, cluster: ClusterSpec | None = None, *, progress: bool = True) -> Result:
    """Rank the photos of every label and keep the first K.

    Parameters
    ----------
    job : Job
        What to do.
    cluster : ClusterSpec, optional
        Where; default a LocalCluster with a worker for each CPU that this process may use.
    progress : bool
        Whether to show a progress bar.

    Returns
    -------
    Result
        The run folder ``job.output`` is complete.

    Raises
    ------
    InputError
        If anything is found wrong before the first photo is hashed.
    TooManyFailuresError
        If more than ``job.max_failures`` of the photos read have failed (everything is written), or the first
        200 have all failed (the run is given up).
    ClusterError
        If a partition cannot be finished.

    Examples
    --------
    >>> from reducer import Job, reduce_images
    >>> result = reduce_images(Job("photos/train", "run", manifest="photos/train.csv"))  # doctest: +SKIP
    >>> result.reduced  # doctest: +SKIP
    """
    refuse_import_of_main()
    spec = cluster or ClusterSpec()
    started = time.time()
    clock = time.perf_counter()
    folder = RunFolder(job.output_place)
    folder.check_free(overwrite=job.overwrite)
    plan = make_plan(job)
    avoid = read_avoided(job)
    timings = {"plan_seconds": time.perf_counter() - clock}

    totals = _Totals(job.hash_size**2)
    summary = _opening(plan, spec, started)
    clock = time.perf_counter()
    with ExitStack() as open_cluster:
        # A job with nothing to read needs no cluster.
        serial = spec.serial or plan.read.num_rows == 0
        client = None if serial else open_cluster.enter_context(connect(spec))
        timings["cluster_start_seconds"] = time.perf_counter() - clock
        work = InProcess(plan, avoid) if client is None else Dispatch(client, plan, spec, avoid)
        summary |= {"versions": work.environment.versions, "environment": work.environment.digest}
        if client is not None and progress and (link := dashboard(client)):
            tqdm.write(f"Dask dashboard: {link}", file=sys.stderr)
        folder.start(summary)
        with _noting_a_stop(folder, summary, totals, timings):
            clock = time.perf_counter()
            _work_off(work, folder, totals, progress)
            timings["hash_seconds"] = time.perf_counter() - clock
            open_cluster.close()  # the rest needs no workers
            clock = time.perf_counter()
            for number, start in enumerate(range(0, plan.unread.num_rows, UNREAD_PART), start=len(work.partitions)):
                folder.write_part(number, plan.unread.slice(start, UNREAD_PART))
            folder.write_reduced(job.id_column, job.label_column, job.format)
            outcome = _outcome(plan, folder)
            timings["write_seconds"] = time.perf_counter() - clock
            timings["total_seconds"] = time.time() - started
            folder.write_summary(summary | outcome | _figures(totals, timings) | {"status": "done"})

    if totals.read and totals.failed > job.max_failures * totals.read:
        raise TooManyFailuresError(
            f"{totals.failed} of {totals.read} photos read have failed, over --max-failures {job.max_failures:g}. "
            f"Everything is written to {job.output}; the column error of images/ says why. The first: "
            f"{totals.first_failure}"
        )
    output = job.output if job.output_place.remote else Path(job.output)
    return Result(output, folder.read_summary(), folder)


@contextmanager
def _noting_a_stop(
    folder: RunFolder, summary: dict[str, Any], totals: _Totals, timings: dict[str, float]
) -> Iterator[None]:
    """Whatever stops the run meanwhile, ``summary.json`` tells how far it came."""
    try:
        yield
    except BaseException:
        with suppress(ReducerError):  # a full disk has no room for it either, and is what is reported
            folder.write_summary(summary | _figures(totals, timings) | {"status": "stopped"})
        raise


def _work_off(work: InProcess | Dispatch, folder: RunFolder, totals: _Totals, progress: bool) -> None:
    """Write each part as it comes."""
    total = sum(rows.num_rows for rows in work.partitions)
    results = work.results()
    clock = time.perf_counter()
    with (
        closing(results),  # what is still running is cancelled while there is a client to do it
        tqdm(total=total, unit=" photos", disable=not progress, smoothing=0.1, file=sys.stderr) as bar,
    ):
        for result in results:
            folder.write_part(result.index, ledger_rows(work.partitions[result.index], result))
            totals.add(result)
            rate = totals.bytes_read / 1e6 / max(time.perf_counter() - clock, 1e-9)
            bar.set_postfix_str(f"{rate:.1f} MB/s, {totals.failed} failed", refresh=False)
            bar.update(result.read)
            if totals.read >= ALL_FAILED and totals.failed == totals.read:
                raise TooManyFailuresError(
                    f"the first {totals.read} photos have all failed, so the run was given up. The first path tried: "
                    f"{totals.first_failure}. Check IMAGES, --path-template or --path-column, and that the workers "
                    "see this path"
                )


def _opening(plan: Plan, spec: ClusterSpec, started: float) -> dict[str, Any]:
    """What is known of a run before it begins."""
    sizes, manifest = plan.label_sizes, plan.manifest
    return {
        "status": "running",
        "job": asdict(plan.job)
        | {name: sorted(getattr(plan.job, name)) for name in STORAGE_OPTIONS},  # names only: values may be secrets
        "cluster": {
            "workers": spec.workers,
            "threads": spec.threads,
            "address": spec.address,
            "class": spec.class_path,
            # Values may be secrets: only the names of the arguments are kept.
            "kwargs": sorted(spec.kwargs),
        },
        "started": pd.Timestamp(started, unit="s", tz="UTC").isoformat(timespec="seconds"),
        "manifest": {
            "rows": manifest.table.num_rows + manifest.duplicates,
            "duplicate_rows": manifest.duplicates,
            "ids_under_several_labels": manifest.shared_ids,
            "ids_under_several_labels_examples": list(manifest.shared_examples),
            "skipped_files": manifest.skipped_files,
        },
        "labels": len(sizes),
        "photos": int(sizes.sum()),
        "photos_to_read": plan.read.num_rows,
    }


def _figures(totals: _Totals, timings: dict[str, float]) -> dict[str, Any]:
    """What the partitions that are done add up to."""
    hashing = timings.get("hash_seconds")
    return {
        "partitions": totals.partitions,
        "photos_read": totals.read,
        "photos_failed": totals.failed,
        "bytes_read": totals.bytes_read,
        "photos_per_second": round(totals.read / hashing, 1) if hashing and totals.read else None,
        "timings": {name: round(seconds, 3) for name, seconds in timings.items()}
        | {"worker_seconds": round(totals.worker_seconds, 3)},
        "worker_peak_memory_bytes": totals.peak_memory,
        "quality": figures(totals.quality, totals.bits),
    }


def _outcome(plan: Plan, folder: RunFolder) -> dict[str, Any]:
    """What the finished ledger says."""
    ledger = folder.ledger(["row", "id", "label", "kept", "bytes", "reason", "error"])
    with_photo = set(pc.unique(ledger.filter(ledger["kept"])["label"]).to_pylist())
    left_out = ledger.filter(pc.invert(ledger["kept"]))["bytes"]
    reasons = _counts(ledger["reason"])
    return {
        "photos_kept": reasons.get(KEPT, 0) + reasons.get(KEPT_SMALL_LABEL, 0),
        "labels_ranked": len(np.unique(plan.read_label)),
        "labels_without_photos": [name for name in plan.label_names if name not in with_photo],
        "labels_short": _labels_short(plan.job.keep, ledger),
        "always_keep_failed": _always_keep_failed(plan, ledger),
        "reasons": reasons,
        "failures": _counts(pc.list_element(pc.split_pattern(ledger["error"].drop_null(), ":", max_splits=1), 0)),
        # Of photos that were not read only a folder's listing knows the size.
        "bytes_left_out": pc.sum(left_out).as_py() or 0,
        "photos_left_out_of_unknown_size": left_out.null_count,
    }


def _labels_short(keep: int, ledger: pa.Table) -> list[str]:
    """Labels that keep fewer photos than they should although some of theirs were not drawn."""
    rows = pa.table(
        {
            "label": ledger["label"],
            "kept": ledger["kept"].cast(pa.int64()),
            "not_drawn": pc.equal(ledger["reason"], NOT_SAMPLED).cast(pa.int64()),
        }
    )
    labels = rows.group_by("label").aggregate([("kept", "sum"), ("not_drawn", "sum")])
    short = pc.and_(pc.less(labels["kept_sum"], keep), pc.greater(labels["not_drawn_sum"], 0))
    return sorted(labels.filter(short)["label"].to_pylist())


def _always_keep_failed(plan: Plan, ledger: pa.Table) -> list[str]:
    """Ids of photos that were to be kept whatever else, and could not be read."""
    wanted = plan.read.filter(plan.read["always_keep"])["row"]
    failed = ledger.filter(pc.equal(ledger["reason"], FAILED))
    return sorted(failed.filter(pc.is_in(failed["row"], value_set=wanted.combine_chunks()))["id"].to_pylist())


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    """How often each text stands in a column, sorted by text."""
    return dict(sorted((pair["values"], pair["counts"]) for pair in pc.value_counts(column).to_pylist()))
