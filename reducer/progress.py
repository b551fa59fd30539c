"""How far a run is, from what it has written; the run itself is not asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from reducer.errors import InputError
from reducer.lock import holder
from reducer.places import Place
from reducer.store import RunFolder
from reducer.summary import failure_kinds
from reducer.types import Tally


@dataclass(frozen=True)
class Status:
    """How far a run is.

    Attributes
    ----------
    state : str
        In words: at work, done, or how it ended and how to go on.
    done, to_read : int
        Photos of the partitions that are done, and of all.
    reused : int
        Those of them whose hashes came from an earlier run.
    partitions_done, partitions : int
        Likewise.
    failures : dict of str to int
        Photos that failed, by kind.
    rate : float or None
        Photos read a second, as last noted; None if it is not known.
    seconds_left : float or None
        What is left at this rate; None unless it is at work.
    """

    state: str
    done: int
    to_read: int
    reused: int
    partitions_done: int
    partitions: int
    failures: dict[str, int]
    rate: float | None
    seconds_left: float | None


def status(run: Path | str, *, storage_options: Mapping[str, Any] | None = None) -> Status:
    """Look how far a run is.

    Parameters
    ----------
    run : path
        The run folder, a local path or a URL.
    storage_options : mapping, optional
        What opens it where it is a URL.

    Raises
    ------
    InputError
        If it is no run folder.
    """
    folder = RunFolder(Place(str(run), storage_options or {}))
    summary = folder.summary()
    names = folder.done_partitions()
    footers = folder.footers()
    tally = sum((footers[name][1] for name in names.values() if name in footers), Tally())
    saved = folder.read_plan()
    partitions = len(names) if saved is None else pc.count_distinct(saved[0]["partition"]).as_py()
    done, to_read = tally.read + tally.reused, summary["photos_to_read"]
    state, at_work = _state(folder, summary)
    rate = summary.get("photos_per_second")
    return Status(
        state=state,
        done=done,
        to_read=to_read,
        reused=tally.reused,
        partitions_done=len(names),
        partitions=partitions,
        failures=failure_kinds(folder.ledger(["error"])["error"]),
        rate=rate,
        seconds_left=(to_read - done) / rate if rate and at_work else None,
    )


def _state(folder: RunFolder, summary: dict[str, Any]) -> tuple[str, bool]:
    """What a run is at, in words; and whether it is at work."""
    if summary["status"] == "done":
        return "done", False
    try:
        held = holder(folder.place)
    except InputError as error:  # an unreadable lock
        return f"perhaps at work ({error})", False
    if held is not None and held.alive is not False:
        unsure = "" if held.alive else "; whether it still runs cannot be seen from here"
        return f"at work ({held}{unsure})", True
    ended = "stopped" if summary["status"] == "stopped" else "ended without a word (killed?)"
    held_still = " --break-lock" if held is not None and folder.place.remote else ""
    return f"{ended}; go on with: reducer resume {folder.path}{held_still}", False
