"""The lock of a folder: two runs that write into one folder would mix their files, so the second is refused.

On a local disk the kernel holds the lock (``flock`` on ``lock.json``) for as long as the process lives, however it
ends. On S3 the lock is an object that is put on condition (``If-None-Match``) and stays until it is removed: a run
that is killed leaves it behind, and a person has to break it, by ``--break-lock``. In either case ``lock.json`` says
who holds the lock, and since when.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from reducer.storage.location import Location, explaining_errors
from reducer.storage.lock_kinds import LOCK, Holder, lock_of


def holder(location: Location) -> Holder | None:
    """Return who holds the lock of a run folder.

    Parameters
    ----------
    location : Location
        The run folder; need not exist.

    Returns
    -------
    Holder or None
        None if there is no ``lock.json``. A run that was killed leaves one: see `Holder.alive`.

    Raises
    ------
    InputError
        If the folder, or its ``lock.json``, cannot be read.
    """
    with _explaining(location):
        return lock_of(location).holder()


def check_unlocked(location: Location, *, break_lock: bool = False) -> None:
    """Refuse a run folder that another run has locked; takes no lock.

    Parameters
    ----------
    location : Location
        The run folder; need not exist.
    break_lock : bool
        Whether its lock will be broken: then nothing is refused.

    Raises
    ------
    InputError
        If `locked` would refuse it now.
    """
    held_by = None if break_lock else holder(location)
    if held_by is not None and (location.remote or held_by.alive is not False):
        raise lock_of(location).refusal(held_by)


@contextmanager
def locked(location: Location, *, break_lock: bool = False, kind: str = "run") -> Iterator[Callable[[], None]]:
    """Keep other runs out of a folder.

    Parameters
    ----------
    location : Location
        The folder, which must exist (on S3 there are no folders).
    break_lock : bool
        Whether to take the lock from a run that holds it.
    kind : {"run", "export"}
        What writes into the folder, as messages call it.

    Yields
    ------
    callable
        Raises LostLockError if another run has taken the lock: to be called before each write.

    Raises
    ------
    InputError
        If another run holds the lock, or the folder cannot be written.
    """
    lock, process, acquired = lock_of(location, kind), os.getpid(), False
    try:
        with _explaining(location, kind):
            lock.acquire(break_lock=break_lock)
        acquired = True
        yield lock.check
    finally:
        # Also if it was not acquired: an answer may have been lost, or Ctrl-C came in between.
        if process == os.getpid():  # not in a forked process
            lock.release(acquired=acquired)


def is_of_lock(name: str) -> bool:
    """Return whether a file in a folder is its lock, or what earlier versions may have left of one."""
    return name == LOCK or (name.startswith(f".{LOCK}.") and name.endswith(".tmp"))


def _explaining(location: Location, kind: str = "run") -> AbstractContextManager[None]:
    folder = "TARGET" if kind == "export" else f"the {kind} folder"
    return explaining_errors(location, f"{folder} {location.path} cannot be used")
