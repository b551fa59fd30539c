"""The progress of a run, from what it has written; the run itself is not asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from reducer.errors import InputError
from reducer.run.counters import counters_so_far
from reducer.run.folder import RunFolder
from reducer.run.plan.plan import pieced_partitions
from reducer.run.summary import failure_kinds
from reducer.storage.codecs import VectorSpool
from reducer.storage.location import Location
from reducer.storage.lock import holder


@dataclass(frozen=True)
class Status:
    """Progress of a run.

    Attributes
    ----------
    state : str
        In words: at work, done, or how it ended and how to continue it.
    done : int
        Photos that are hashed.
    to_read : int or None
        Photos to be hashed in all; None where shards have yet to tell.
    reused : int
        Photos whose hashes came from an earlier run.
    partitions_done, partitions : int
        Partitions that are ranked, and partitions in all.
    shards_done, shards : int
        Tar shards that are read, and shards in all; 0 for single files.
    failures : dict of str to int
        Photos that failed, by kind.
    rate : float or None
        Photos read per second, as last noted; None if it is not known.
    seconds_left : float or None
        Seconds left at this rate; None unless the run is at work.
    """

    state: str
    done: int
    to_read: int | None
    reused: int
    partitions_done: int
    partitions: int
    shards_done: int
    shards: int
    failures: dict[str, int]
    rate: float | None
    seconds_left: float | None


def status(run: Path | str, *, storage_options: Mapping[str, Any] | None = None) -> Status:
    """Read how far a run is.

    Parameters
    ----------
    run : path
        The run folder, a local path or a URL.
    storage_options : mapping, optional
        fsspec options that open ``run`` where it is a URL.

    Raises
    ------
    InputError
        If it is no run folder.
    """
    folder = RunFolder(Location(str(run), storage_options or {}))
    summary = folder.summary()
    saved, shards = folder.plan.read(), folder.plan.read_shards() or ()
    names, footers, reports = folder.parts.done(), folder.parts.footers(), folder.pieces.reports()
    done = {number: footers[name][1] for number, name in names.items() if name in footers}
    errors = folder.parts.ledger(["error"])["error"]
    pieced: frozenset[int] | None = None
    partitions = len(names)
    if saved is not None and saved[1]["is_listed"]:
        pieced = pieced_partitions(saved[0], bool(shards))
        partitions = pc.count_distinct(saved[0]["partition"]).as_py()
    unranked = reports and not (pieced is not None and pieced <= done.keys())
    tally = counters_so_far(done, {number: report.tally for number, report in reports.items()}, pieced)
    if unranked:
        errors = pa.chunked_array([*errors.chunks, *folder.pieces.read_all(VectorSpool())["error"].chunks], pa.string())
    hashed, to_read = tally.tried, summary["photos_to_read"]
    state, at_work = _state(folder, summary)
    rate = summary.get("photos_per_second")
    seconds_left = None
    if rate and at_work:
        seconds_left = None if to_read is None else (to_read - hashed) / rate
        size = sum(shard.bytes for shard in shards)
        read = sum(shard.bytes for shard in shards if shard.number in reports)
        if read:  # how many photos a shard holds is not known before it is read
            seconds_left = hashed / rate * (size - read) / read
    return Status(
        state=state,
        done=hashed,
        to_read=to_read,
        reused=tally.reused,
        partitions_done=len(names),
        partitions=partitions,
        shards_done=len(reports) if shards else 0,
        shards=len(shards),
        failures=failure_kinds(errors),
        rate=rate,
        seconds_left=seconds_left,
    )


def _state(folder: RunFolder, summary: dict[str, Any]) -> tuple[str, bool]:
    """Return the state of a run in words, and whether it is at work."""
    if summary["status"] == "done":
        return "done", False
    try:
        owner = holder(folder.location)
    except InputError as error:  # an unreadable lock
        return f"perhaps at work ({error})", False
    if owner is not None and owner.alive is not False:
        unsure = "" if owner.alive else "; whether it still runs cannot be seen from here"
        return f"at work ({owner}{unsure})", True
    ended = "stopped" if summary["status"] == "stopped" else "ended without a word (killed?)"
    break_lock = " --break-lock" if owner is not None and folder.location.remote else ""
    return f"{ended}; go on with: reducer resume {folder.path}{break_lock}", False
