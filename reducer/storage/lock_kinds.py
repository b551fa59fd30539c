"""Kinds of locks: held by the kernel on a disk, by a condition on S3, elsewhere by whoever wrote last."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import time
import uuid
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from reducer.errors import InputError, LostLockError
from reducer.storage.location import Location

log = logging.getLogger("reducer")

LOCK = "lock.json"
#: Errors of a file system without locks.
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
#: Seconds after which a lock counts that several runs may have created, or broken, at the same time.
SETTLE_SECONDS = 1.0
#: Seconds in which a lock that is being written becomes readable.
HALF_WRITTEN_SECONDS = 0.5
#: Seconds in which others let go of the kernel's lock that only look whether it is held.
LOOK_SECONDS = 0.1
#: Attempts to take a lock that others take and give back meanwhile, and seconds between them.
ATTEMPTS, PAUSE = 10, 0.2


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock, as ``lock.json`` describes it.

    Attributes
    ----------
    host : str
        Name of its host.
    pid : int
        Its number on that host.
    since : str
        When it took the lock; ISO 8601, UTC.
    token : str
        Name of this lock and no other.
    alive : bool or None
        Whether it still runs; None if that cannot be told, such as from another host. Not in the file.
    """

    host: str
    pid: int
    since: str
    token: str
    alive: bool | None = field(default=None, compare=False)

    def to_json(self) -> bytes:
        """Return the content of ``lock.json``."""
        content = {"host": self.host, "pid": self.pid, "since": self.since, "token": self.token}
        return (json.dumps(content, indent=2) + "\n").encode()

    @property
    def is_here(self) -> bool:
        """True if it runs, or ran, on a host of the name of this one."""
        return self.host == socket.gethostname()

    def __str__(self) -> str:
        return f"host {self.host}, process {self.pid}, since {self.since}"


class Lock(ABC):
    """The lock of a folder: acquire it, check it before each write, release it.

    Parameters
    ----------
    location : Location
        The folder.
    kind : str
        What writes into the folder, as messages call it.

    Attributes
    ----------
    settles : bool
        Whether several runs may believe that the lock is theirs, until `SETTLE_SECONDS` have passed.
    written : bool
        Whether ``lock.json`` may be our own.
    """

    settles = written = False

    def __init__(self, location: Location, kind: str) -> None:
        self.location, self.kind = location, kind
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self.own = Holder(socket.gethostname(), os.getpid(), now, uuid.uuid4().hex)

    @abstractmethod
    def read(self) -> bytes | None:
        """Return the content of ``lock.json``; None if there is none."""

    @abstractmethod
    def create(self, content: bytes) -> None:
        """Write ``lock.json`` if there is none; `read` tells afterwards whose it is."""

    @abstractmethod
    def remove(self) -> None:
        """Remove ``lock.json``, whoever holds the lock."""

    def is_stale(self, content: bytes) -> bool:
        """Return whether the run that has left this ``lock.json`` has surely ended."""
        return False

    def holder(self) -> Holder | None:
        """Return who holds the lock; None if nobody does."""
        content = self.read()
        if content is None:
            return None
        found = _parse(content)
        if found is None:
            raise self.refusal(None)
        return replace(found, alive=_is_process(found.pid) if found.is_here else None)

    def acquire(self, *, break_lock: bool) -> None:
        """Take the lock; raise InputError if another run holds it and it is not to be broken."""
        # Only this lock is broken: not that of another run that breaks it at the same time.
        to_break = self.read() if break_lock else None
        warning: str | None = None
        for attempt in range(ATTEMPTS):
            content = self.read()
            if content is None:
                if attempt and warning is None:
                    time.sleep(PAUSE)
                self.written = True
                self.create(self.own.to_json())
                if self.settles:
                    time.sleep(SETTLE_SECONDS)
                continue
            # Whose the lock is stands in it, whatever the answer to a write was.
            found = _parse(content)
            if self._is_ours(found):
                if warning:
                    log.warning("%s: %s", self.location.path, warning)
                return
            stale = self.is_stale(content)
            # Once: what stands there after that is of a run that was faster.
            if warning is not None or not (stale or content == to_break):
                raise self.refusal(found)
            warning = _warning(found, self.kind, stale=stale)
            self.settles |= not stale
            self.remove()
        raise InputError(f"{self.location.path} cannot be locked: others take its lock and give it back all the time")

    def check(self) -> None:
        """Raise LostLockError if another run has taken the lock."""
        try:
            found = _parse(self.read())
        except OSError:  # where it cannot be read for a moment, writing will tell
            return
        if not self._is_ours(found):
            whose = f" ({found})" if found is not None else ""
            raise LostLockError(
                f"the lock of {self.location.path} was taken by another {self.kind}{whose}: this one ends, and writes "
                "nothing more"
            )

    def release(self, *, acquired: bool) -> None:
        """Remove ``lock.json`` if it is our own. Only logs what fails: the run itself may be failing now."""
        path = self.location.path
        try:
            found = _parse(self.read()) if self.written else None
            if self._is_ours(found):
                self.remove()
            elif acquired:
                whose = f" (now: {found})" if found is not None else ""
                lost = f"the lock of this {self.kind} was taken away{whose}: another {self.kind} may have written here"
                log.warning("%s: %s", path, lost)
        except Exception as error:
            reason = self.location.safe(error) if self.location.remote else getattr(error, "strerror", None) or error
            log.warning("%s: the lock (%s) could not be removed: %s", path, LOCK, reason)

    def refusal(self, found: Holder | None) -> InputError:
        """Return the error for a lock that another run holds; None stands for a damaged ``lock.json``."""
        path, kind = self.location.path, self.kind
        if found is None:
            return InputError(
                f"{path} holds a {LOCK} that cannot be read: another {kind} may be at work there. Wait until it ends "
                "or, if surely none is, give --break-lock"
            )
        gone = self.location.remote and found.is_here and not _is_process(found.pid)
        return InputError(
            f"{path} is locked by another {kind}: {found}{' (no such process runs here now)' if gone else ''}. Wait "
            "until it ends or, if it is surely gone, give --break-lock"
        )

    def _is_ours(self, found: Holder | None) -> bool:
        return found is not None and found.token == self.own.token


def _parse(content: bytes | None) -> Holder | None:
    """Return the holder that a ``lock.json`` describes; None if there is none, or half of one."""
    try:
        fields = json.loads(content or b"")
        found = Holder(**{name: fields[name] for name in ("host", "pid", "since", "token")})
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    if not isinstance(found.pid, int) or isinstance(found.pid, bool) or not 0 < found.pid < 2**31:
        return None
    texts = (found.host, found.since, found.token)
    return (
        found if all(isinstance(text, str) and text.isprintable() and 0 < len(text) < 300 for text in texts) else None
    )


def _warning(found: Holder | None, kind: str, *, stale: bool) -> str:
    """Return what is logged when the lock of another run has given way to ours."""
    if found is None:
        return "" if stale else f"a {LOCK} that cannot be read was replaced (--break-lock)"
    if stale:
        whose = f"(host {found.host}, pid {found.pid})"
        return f"the lock of a {kind} that ended without giving it back {whose} was taken over"
    return f"the lock of another {kind} ({found}) was broken (--break-lock)"


def _is_process(pid: int) -> bool:
    """Return whether a process of this number runs here, be it hidden, and be it another one than was meant."""
    if os.name != "posix":  # there a signal, even 0, ends a process
        import psutil

        return bool(psutil.pid_exists(pid))
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


class _LocalLock(Lock):
    """A ``lock.json`` that the kernel locks for this process, and lets go of when the process ends.

    The kernel's lock belongs to one opening of a file, so two runs of one process keep each other out as well. Who gets
    it looks whether the file still is ``lock.json``: or one run could lock a file that another has just removed. Where
    the file system (or Windows) has no such locks, the creation of ``lock.json``, which fails where there is one, keeps
    others out, and a lock is stale if its process is gone from this host.
    """

    _handle: int | None = None

    def __init__(self, location: Location, kind: str) -> None:
        super().__init__(location, kind)
        self._path = Path(location.path, LOCK)

    def read(self) -> bytes | None:
        stop = time.monotonic() + HALF_WRITTEN_SECONDS
        while True:
            try:
                content = self._path.read_bytes()
            except FileNotFoundError:
                return None
            if _parse(content) is not None or time.monotonic() > stop:
                return content
            time.sleep(0.02)

    def create(self, content: bytes) -> None:
        self._close()
        try:
            handle = self._handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return
        is_ours = self._lock(handle)
        if is_ours is False:
            return
        try:
            os.write(handle, content)
            os.fsync(handle)
        except OSError:
            self.remove()
            raise
        if is_ours is None:
            log.warning("%s: its file system has no locks, %s alone keeps others out", self.location.path, LOCK)
            self._close()

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)

    def is_stale(self, content: bytes) -> bool:
        """Return whether the run that has left this ``lock.json`` has surely ended, and keep others from taking it."""
        found = _parse(content)
        if content and (found is None or not found.is_here):  # the kernel may know nothing of locks of other hosts
            return False
        self._close()
        try:
            # NFS locks a file only if it is open for writing; that of another user cannot be.
            handle = self._handle = os.open(self._path, os.O_RDWR if os.access(self._path, os.W_OK) else os.O_RDONLY)
            is_ours = self._lock(handle)
        except OSError:
            return False
        if is_ours is None:
            self.settles = True
            return found is not None and not _is_process(found.pid)
        return is_ours

    def holder(self) -> Holder | None:
        is_free = None
        with suppress(OSError), open(self._path, "rb") as file:
            is_free = _flock(file.fileno(), exclusive=False)
        if is_free and not self.read():  # of a run that was killed as it took the lock
            return None
        found = super().holder()
        if found is None or is_free is None:
            return found
        return replace(found, alive=True if not is_free else False if found.is_here else None)

    def release(self, *, acquired: bool) -> None:
        super().release(acquired=acquired)
        self._close()

    def _lock(self, handle: int) -> bool | None:
        """Have the kernel lock ``lock.json``: False if another run has it locked, None if there are no such locks."""
        is_ours = _flock(handle)
        with suppress(FileNotFoundError):
            if is_ours is not False and os.path.samestat(os.fstat(handle), os.stat(self._path)):
                return is_ours
        self._close()
        return False

    def _close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def _flock(handle: int, *, exclusive: bool = True) -> bool | None:
    """Have the kernel lock an open file: False if another opening of it is locked, None if there are no such locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    stop = time.monotonic() + LOOK_SECONDS
    while True:
        try:
            fcntl.flock(handle, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > stop:
                return False
            time.sleep(0.01)
        except OSError as error:
            if error.errno in NO_LOCKS:
                return None
            raise


class _RemoteLock(Lock):
    """A ``lock.json`` on any file system of fsspec: of runs that write it at the same time, the last one has it."""

    settles = True

    def read(self) -> bytes | None:
        system, path = self._open()
        system.invalidate_cache(path.rpartition("/")[0])
        try:
            content: bytes = system.cat_file(path)
        except FileNotFoundError:
            return None
        return content

    def create(self, content: bytes) -> None:
        system, path = self._open()
        system.pipe_file(path, content)

    def remove(self) -> None:
        system, path = self._open()
        with suppress(FileNotFoundError):
            system.rm_file(path)

    def _open(self) -> tuple[Any, str]:
        return self.location.below(LOCK).open()


class _S3Lock(_RemoteLock):
    """A ``lock.json`` on S3, put on the condition that there is none."""

    settles = False

    def create(self, content: bytes) -> None:
        system, path = self._open()
        bucket, key, _ = system.split_path(path)
        try:
            system.call_s3("put_object", Bucket=bucket, Key=key, Body=content, IfNoneMatch="*")
        except OSError as error:
            # s3fs makes its own errors of those of S3.
            answer = getattr(error.__cause__, "response", {}).get("Error", {}).get("Code")
            if answer in ("NotImplemented", "501"):  # a store that knows no conditions
                self.settles = True
                super().create(content)
            elif answer not in ("PreconditionFailed", "412", "ConditionalRequestConflict", "409"):
                raise


def lock_of(location: Location, kind: str = "run") -> Lock:
    """Return the kind of lock that suits the place where a folder lies."""
    if location.on_s3:
        return _S3Lock(location, kind)
    return _RemoteLock(location, kind) if location.remote else _LocalLock(location, kind)
