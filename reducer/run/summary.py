"""Collect the figures of ``summary.json``."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from reducer.config.cluster import ClusterSpec
from reducer.config.job import PATH_FIELDS, Job
from reducer.config.resolved import ResolvedJob
from reducer.config.settings import STORAGE_OPTIONS
from reducer.errors import InputError
from reducer.run.fingerprint import Fingerprint
from reducer.run.folder import RunFolder
from reducer.run.join import MISSING
from reducer.run.path_hints import TRIED, path_hint
from reducer.run.plan.plan import Plan
from reducer.selection.facility_location import FACILITY_LOCATION_CANDIDATES
from reducer.storage.location import absolute
from reducer.storage.schemas import FAILED, KEPT, KEPT_SMALL_LABEL, NOT_SAMPLED
from reducer.storage.tables import counts

#: So many photos of a label with one hash are worth a word, where they are most of the label.
LIKE_PHOTOS = 3


def opening(plan: Plan, spec: ClusterSpec, fingerprint: Fingerprint, started: float) -> dict[str, Any]:
    """Return the figures that are known of a run before it begins.

    Parameters
    ----------
    plan : Plan
        Plan of the run.
    spec : ClusterSpec
        Cluster that it runs on.
    fingerprint : Fingerprint
        All that decides its results.
    started : float
        Start of the run, seconds since 1970.
    """
    return {
        "status": "running",
        "run": uuid.uuid4().hex,
        "resumed": 0,
        "job": job_figures(plan.job),
        "given": sorted(plan.job.given),
        "cluster": cluster_figures(spec),
        "started": pd.Timestamp(started, unit="s", tz="UTC").isoformat(timespec="seconds"),
        "versions": fingerprint.environment.versions,
        "environment": fingerprint.environment.digest,
        "digest": fingerprint.digest,
        "decode_policy": fingerprint.decode_policy,
        **plan_figures(plan),
    }


def plan_figures(plan: Plan) -> dict[str, Any]:
    """Return the figures of a plan; None where shards have to be read first."""
    listed = plan.is_listed
    return {
        "manifest": dict(plan.manifest),
        "labels": len(plan.labels.names) if listed else None,
        "photos": plan.rows.num_rows if listed else None,
        "photos_to_read": int(plan.is_read.sum()) if listed else None,
    }


def shard_figures(plan: Plan, folder: RunFolder) -> dict[str, Any]:
    """Return the figures of the shards that have been read."""
    path_of = {shard.number: shard.path for shard in plan.shards or ()}
    reports = {path_of[number]: report for number, report in sorted(folder.pieces.reports().items())}
    skipped: Counter[str] = Counter()
    for report in reports.values():
        skipped.update(report.skipped)
    return {
        "shards": len(path_of),
        "shards_read": len(reports),
        "bytes": sum(shard.bytes for shard in plan.shards or ()),
        "members": sum(report.members for report in reports.values()),
        "skipped": dict(skipped),
        "damaged": {path: report.damage for path, report in reports.items() if report.damage is not None},
        "wrong_md5": [path for path, report in reports.items() if report.wrong_md5],
    }


def job_figures(job: ResolvedJob) -> dict[str, Any]:
    """Return a job, as it is in force, that means the same from every working directory, without its secrets."""
    figures = job.as_asked()
    for name in PATH_FIELDS:
        if name != "output" and figures[name] is not None:
            figures[name] = absolute(figures[name])
    # Names only: values may be secrets.
    return figures | {name: sorted(figures[name]) for name in STORAGE_OPTIONS}


def job_of(summary: Mapping[str, Any], changes: Mapping[str, Any]) -> Job:
    """Return the job of a run, from its summary.

    Parameters
    ----------
    summary : mapping
        ``summary.json``.
    changes : mapping
        Fields that differ from the summary; storage options, which it does not hold, among them.

    Raises
    ------
    InputError
        If another version of Reducer has written it.
    """
    options: dict[str, Any] = {name: {} for name in STORAGE_OPTIONS}
    try:
        return Job(**summary["job"] | options | changes)
    except TypeError as error:
        raise InputError(f"summary.json is of another version of Reducer: {error}") from None


def check_storage_options(summary: Mapping[str, Any], job: Job) -> None:
    """Refuse to read photos without their storage options, which a run folder does not keep.

    Raises
    ------
    InputError
        If the run had some, and the job has none.
    """
    names = summary["job"]["storage_options"]
    if names and not job.storage_options:
        raise InputError(
            f"IMAGES {job.images} was opened with --storage-option {', '.join(names)}, which a run folder does not "
            "keep: give them again"
        )


def cluster_figures(spec: ClusterSpec) -> dict[str, Any]:
    """Return the figures of a cluster, without its secrets."""
    return {
        "workers": spec.workers,
        "threads": spec.threads,
        "address": spec.address,
        "class": spec.class_path,
        # Values may be secrets: only the names of the arguments are kept.
        "kwargs": sorted(spec.kwargs),
    }


def outcome(plan: Plan, folder: RunFolder) -> dict[str, Any]:
    """Return the figures of the finished ledger."""
    ledger = folder.parts.ledger(["row", "id", "label", "rank", "kept", "bytes", "reason", "error", "hash"])
    with_photo = set(pc.unique(ledger.filter(ledger["kept"])["label"]).to_pylist())
    left_out = ledger.filter(pc.invert(ledger["kept"]))["bytes"]
    reasons = counts(ledger["reason"])
    return {
        "photos_kept": reasons.get(KEPT, 0) + reasons.get(KEPT_SMALL_LABEL, 0),
        "photos_looked_for": int(plan.small.sum()) if plan.checks_unread else 0,
        "labels_ranked": len(np.unique(plan.read_label)),
        "labels_without_photos": [name for name in plan.labels.names if name not in with_photo],
        "labels_short": _labels_short(plan.job, ledger),
        "labels_of_one_hash": _labels_of_one_hash(ledger),
        "labels_partitioned": _labels_partitioned(plan.job, ledger),
        "always_keep_failed": _always_keep_failed(plan, ledger),
        "reasons": reasons,
        "failures": failure_kinds(ledger["error"]),
        "path_hint": _path_hint(folder, ledger["error"]),
        # Of photos that were not read only a folder's listing knows the size.
        "bytes_kept": pc.sum(ledger.filter(ledger["kept"])["bytes"]).as_py() or 0,
        "bytes_left_out": pc.sum(left_out).as_py() or 0,
        "photos_left_out_of_unknown_size": left_out.null_count,
    }


def _path_hint(folder: RunFolder, error: pa.ChunkedArray) -> str | None:
    """Say by which change of their paths missing photos would be found, if by any."""
    if not pc.any(pc.starts_with(error, f"{MISSING}:")).as_py():
        return None
    is_missing = pc.starts_with(pc.field("error"), f"{MISSING}:")
    return path_hint(folder.parts.ledger(["path"], is_missing)["path"].slice(0, TRIED).to_pylist())


def _labels_short(job: ResolvedJob, ledger: pa.Table) -> list[str]:
    """Find labels that keep fewer photos than they should although some of their photos were not drawn."""
    if job.keep is None or job.has_filters:  # fewer are intended
        return []
    rows = pa.table(
        {
            "label": ledger["label"],
            "kept": ledger["kept"].cast(pa.int64()),
            "not_drawn": pc.equal(ledger["reason"], NOT_SAMPLED).cast(pa.int64()),
        }
    )
    labels = rows.group_by("label").aggregate([("kept", "sum"), ("not_drawn", "sum")])
    short = pc.and_(pc.less(labels["kept_sum"], job.keep), pc.greater(labels["not_drawn_sum"], 0))
    return sorted(labels.filter(short)["label"].to_pylist())


def _labels_of_one_hash(ledger: pa.Table) -> list[str]:
    """Find labels of which most photos that were hashed, and at least `LIKE_PHOTOS`, have the same hash."""
    hashed = ledger.select(["label", "hash"]).filter(pc.is_valid(ledger["hash"]))
    of_hash = pc.value_counts(hashed["hash"])
    common = of_hash.field("values").filter(pc.greater_equal(of_hash.field("counts"), LIKE_PHOTOS))
    like = hashed.filter(pc.is_in(hashed["hash"], value_set=common))
    most: dict[str, int] = {}
    # Not by `Table.group_by`: by two columns of text it took gigabytes of memory for a few rows (pyarrow 18).
    for both, count in counts(pc.binary_join_element_wise(like["hash"], like["label"], " ")).items():
        label = both.partition(" ")[2]
        most[label] = max(count, most.get(label, 0))
    sizes = counts(hashed["label"].filter(pc.is_in(hashed["label"], value_set=pa.array(most, pa.string()))))
    return sorted(label for label, count in most.items() if count >= LIKE_PHOTOS and 2 * count > sizes[label])


def _labels_partitioned(job: ResolvedJob, ledger: pa.Table) -> list[str]:
    """Find labels with more candidates than facility location compares at once: it chose from parts first (GreeDi)."""
    if job.strategy != "facility-location":
        return []
    labels = pc.value_counts(ledger.filter(pc.is_valid(ledger["rank"]))["label"])
    counted = zip(labels.field("values").to_pylist(), labels.field("counts").to_pylist(), strict=True)
    return sorted(label for label, count in counted if count > FACILITY_LOCATION_CANDIDATES)


def _always_keep_failed(plan: Plan, ledger: pa.Table) -> list[str]:
    """Find the ids of photos that should always be kept and could not be read."""
    wanted = plan.rows["row"].filter(pc.and_(plan.rows["always_keep"], pa.array(plan.is_read)))
    failed = ledger.filter(pc.equal(ledger["reason"], FAILED))
    return sorted(failed.filter(pc.is_in(failed["row"], value_set=wanted.combine_chunks()))["id"].to_pylist())


def failure_kinds(error: pa.ChunkedArray) -> dict[str, int]:
    """Count failed photos by kind, from the column ``error`` of the ledger."""
    return counts(pc.list_element(pc.split_pattern(error.drop_null(), ":", max_splits=1), 0))
