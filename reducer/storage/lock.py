"""The lock of a run folder: two runs that write into one folder would mix their files, so the second is refused.

``lock.json`` in the folder says who writes into it. It is made in one step that fails where there is one already: a
hard link on a local disk, a put on condition (``If-None-Match``) on S3. A run that is killed leaves it behind: on a
local disk of the same host the next run sees that its process is gone and takes it over. Where that cannot be seen, a
person has to say so, by ``--break-lock``.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from reducer.errors import InputError, LostLockError
from reducer.storage.location import Location, explaining_errors

log = logging.getLogger("reducer")

LOCK = "lock.json"
#: Two times of a process's start that differ by less, in seconds, are of the same process.
SAME_START = 2.0
#: Without a step that only one can do: who still finds its own lock after so many seconds has it.
SETTLE_SECONDS = 1.0
#: So long, in seconds, others that take the lock are waited for.
GUARD_SECONDS = 5.0
#: A lock that cannot be read is looked at again for so many seconds: it may be half-written.
HALF_WRITTEN_SECONDS = 0.5
#: A lock that comes and goes is asked for so often, with a pause of so many seconds.
ATTEMPTS, PAUSE = 10, 0.2

#: The tokens of the locks of this process.
_held: set[str] = set()


@dataclass(frozen=True)
class Holder:
    """Who writes into a run folder: what ``lock.json`` holds.

    Attributes
    ----------
    host : str
        Name of its host.
    pid : int
        Its process there.
    process_started : float
        When that process started, in seconds since the epoch.
    host_started : float
        When its host started, by the same clock.
    since : str
        When it took the lock; ISO 8601, UTC.
    token : str
        Of this lock and no other.
    """

    host: str
    pid: int
    process_started: float
    host_started: float
    since: str
    token: str

    @property
    def alive(self) -> bool | None:
        """Whether its process runs; None if that cannot be told, such as on another host."""
        if self.host != socket.gethostname():
            return None
        if self.pid == os.getpid():
            return self.token in _held
        import psutil

        try:
            # In this order: older psutil counts every process's start from the host's start that was asked for last.
            host_started: float = psutil.boot_time()
            process = psutil.Process(self.pid)
            started: float = process.create_time()
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
        except psutil.NoSuchProcess:
            return None if _is_hidden(self.pid) else False
        except psutil.AccessDenied:
            return None
        # A clock that was set meanwhile moves both starts; where they are not reckoned by it, it moves neither.
        uptime, uptime_then = started - host_started, self.process_started - self.host_started
        return abs(started - self.process_started) < SAME_START or abs(uptime - uptime_then) < SAME_START

    def __str__(self) -> str:
        return f"host {self.host}, process {self.pid}, since {self.since}"


def holder(place: Location) -> Holder | None:
    """Who has the lock of a run folder.

    Parameters
    ----------
    place : Location
        The run folder; need not be there.

    Returns
    -------
    Holder or None
        None if nobody has it. A run that was killed has it still: see `Holder.alive`.

    Raises
    ------
    InputError
        If the folder cannot be read, or its ``lock.json`` is none.
    """
    with _explained(place):
        found = _lock_of(place).read()
    if found is None:
        return None
    held = _parse(found)
    if held is None:
        raise _refusal(place, None)
    return held


def check_unlocked(place: Location, *, break_lock: bool = False) -> None:
    """Refuse a run folder that another run has locked; takes no lock.

    Parameters
    ----------
    place : Location
        The run folder; need not be there.
    break_lock : bool
        Whether its lock will be broken: then nothing is refused.

    Raises
    ------
    InputError
        If `locked` would refuse it now.
    """
    if break_lock:
        return
    held = holder(place)
    if held is not None and not (_lock_of(place).of_this_host and held.alive is False):
        raise _refusal(place, held)


@contextmanager
def locked(place: Location, *, break_lock: bool = False) -> Iterator[Callable[[], None]]:
    """Keep other runs out of a run folder.

    Parameters
    ----------
    place : Location
        The run folder, which must be there (on S3 there are no folders).
    break_lock : bool
        Whether to take the lock whoever has it now.

    Yields
    ------
    callable
        Raises LostLockError if another run has taken the lock meanwhile: to be called before each write.

    Raises
    ------
    InputError
        If another run has the lock, or the folder cannot be written.
    """
    own = _new_holder()
    lock = _lock_of(place)
    taken = False
    _held.add(own.token)
    try:
        with _explained(place):
            _take(lock, own, break_lock=break_lock)
        taken = True
        yield partial(_check_ours, lock, own)
    finally:
        # Also if it was not taken: the answer may have been lost, or Ctrl-C came in between. Not in a forked process.
        if lock.written and own.pid == os.getpid():
            _give_back(lock, own, taken=taken)
        _held.discard(own.token)


def is_of_lock(name: str) -> bool:
    """Whether a name in a run folder is that of a lock, or of what a killed run may leave of one."""
    return name == LOCK or (name.startswith(f".{LOCK}.") and name.endswith(".tmp"))


def _new_holder() -> Holder:
    import psutil

    return Holder(
        host=socket.gethostname(),
        pid=os.getpid(),
        host_started=psutil.boot_time(),
        process_started=psutil.Process().create_time(),
        since=datetime.now(UTC).isoformat(timespec="seconds"),
        token=uuid.uuid4().hex,
    )


def _is_hidden(pid: int) -> bool:
    """Whether there is such a process though it does not show: of another user, where ``/proc`` is mounted so."""
    if os.name != "posix":  # elsewhere this would end the process
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        pass
    return False


def _parse(content: bytes) -> Holder | None:
    """What a ``lock.json`` holds; None if it is none, or half of one."""
    kinds: dict[str, Any] = {"pid": int, "process_started": int | float, "host_started": int | float}
    try:
        found = json.loads(content)
        held = Holder(**{name: found[name] for name in Holder.__dataclass_fields__})
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    for name, value in asdict(held).items():
        if not isinstance(value, kinds.get(name, str)) or isinstance(value, bool):
            return None
        if isinstance(value, str) and not (value.isprintable() and 0 < len(value) < 300):
            return None
    return held if 0 < held.pid < 2**31 else None


def _explained(place: Location) -> AbstractContextManager[None]:
    return explaining_errors(place, f"the run folder {place.path} cannot be used")


def _refusal(place: Location, held: Holder | None) -> InputError:
    if held is None:
        return InputError(
            f"{place.path} holds a {LOCK} that cannot be read: another run may be at work there. Wait until "
            "it ends or, if surely none is, give --break-lock"
        )
    gone = " (no such process runs here now)" if held.alive is False else ""
    return InputError(
        f"{place.path} is locked by another run: {held}{gone}. Wait until it ends or, if it is surely gone, "
        "give --break-lock"
    )


def _take(lock: _Lock, own: Holder, *, break_lock: bool) -> None:
    content = (json.dumps(asdict(own), indent=2) + "\n").encode()
    warning = ""
    # What is broken is the lock of before: not that of another who breaks it at the same time.
    to_break = lock.read() if break_lock else None
    with lock.guarded() as guarded:
        for attempt in range(ATTEMPTS):
            # Who has it is what is there, whatever the answer to a write was.
            found = lock.read()
            held = None if found is None else _parse(found)
            if held is not None and held.token == own.token:
                if warning:
                    log.warning("%s: %s", lock.place.path, warning)
                return
            if found is None:
                if attempt:
                    time.sleep(PAUSE)
                lock.written = True
                lock.create(content)
                continue
            gone = lock.of_this_host and held is not None and held.alive is False
            # Once: what is there after that is of one that was as quick.
            if warning or not (gone or found == to_break):
                raise _refusal(lock.place, held)
            warning = _warning(held, gone)
            lock.written = True
            lock.replace(content)
            if not guarded:
                time.sleep(SETTLE_SECONDS)
    raise InputError(f"{lock.place.path} cannot be locked: others take its lock and give it back all the time")


def _check_ours(lock: _Lock, own: Holder) -> None:
    try:
        found = lock.read()
    except OSError:  # where it cannot be read for a moment, writing will tell
        return
    held = None if found is None else _parse(found)
    if held is None or held.token != own.token:
        whose = f" ({held})" if held is not None else ""
        raise LostLockError(
            f"the lock of {lock.place.path} was taken by another run{whose}: this one ends, and writes nothing more"
        )


def _warning(held: Holder | None, gone: bool) -> str:
    if held is None:
        return f"a {LOCK} that cannot be read was replaced (--break-lock)"
    if gone:
        return f"the lock of a run that ended without giving it back (host {held.host}, pid {held.pid}) was taken over"
    return f"the lock of another run ({held}) was broken (--break-lock)"


def _give_back(lock: _Lock, own: Holder, *, taken: bool) -> None:
    """Remove the lock if it is our own. Never fails, only says what went wrong: the run itself may be failing now."""
    path = lock.place.path
    try:
        with lock.guarded():
            found = lock.read()
            held = None if found is None else _parse(found)
            if held is not None and held.token == own.token:
                lock.remove()
            elif taken:
                whose = f" (now: {held})" if held is not None else ""
                log.warning("%s: the lock of this run was taken away%s: another run may have written here", path, whose)
    except Exception as error:
        reason = lock.place.safe(error) if lock.place.remote else getattr(error, "strerror", None) or error
        log.warning("%s: the lock (%s) could not be removed: %s", path, LOCK, reason)


def _lock_of(place: Location) -> _Lock:
    if place.on_s3:
        return _S3Lock(place)
    return _RemoteLock(place) if place.remote else _LocalLock(place)


class _Lock(ABC):
    """A ``lock.json``, whoever's it is.

    Attributes
    ----------
    place : Location
        The run folder.
    of_this_host : bool
        Whether a lock of this host is surely of a process that would show here.
    written : bool
        Whether ours may have been written.
    """

    of_this_host = False

    def __init__(self, place: Location) -> None:
        self.place = place
        self.written = False

    def guarded(self) -> AbstractContextManager[bool]:
        """Keep others from writing it meanwhile, where that can be; gives whether it can."""
        return nullcontext(False)

    @abstractmethod
    def read(self) -> bytes | None:
        """What is there; None if nothing."""

    @abstractmethod
    def create(self, content: bytes) -> None:
        """Write it if there is none: `read` says whose it is then."""

    @abstractmethod
    def replace(self, content: bytes) -> None:
        """Write it whatever is there."""

    @abstractmethod
    def remove(self) -> None:
        """Take it away."""


class _LocalLock(_Lock):
    of_this_host = True

    def __init__(self, place: Location) -> None:
        super().__init__(place)
        self._path = Path(place.path, LOCK)

    @contextmanager
    def guarded(self) -> Iterator[bool]:
        try:
            import fcntl
        except ImportError:  # Windows
            yield False
            return
        folder = os.open(self.place.path, os.O_RDONLY)
        try:
            guarded = False
            stop = time.monotonic() + GUARD_SECONDS
            while not guarded:
                try:
                    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    guarded = True
                except BlockingIOError:
                    # Kept for longer than taking a lock takes: by something else, such as `flock RUN reducer run ...`.
                    if time.monotonic() > stop:
                        break
                    time.sleep(0.01)
                except OSError:  # NFS has none for folders
                    break
            try:
                if guarded:  # then nobody else is writing, and what is half-done was left by one that was killed
                    for left in self._path.parent.glob(f".{LOCK}.*.tmp"):
                        left.unlink(missing_ok=True)
                yield guarded
            finally:
                if guarded:  # closing is not enough if a process was forked meanwhile
                    fcntl.flock(folder, fcntl.LOCK_UN)
        finally:
            os.close(folder)

    def read(self) -> bytes | None:
        stop = time.monotonic() + HALF_WRITTEN_SECONDS
        while True:
            try:
                content = self._path.read_bytes()
            except FileNotFoundError:
                return None
            # Half-written: where there are no hard links, for a moment.
            if _parse(content) is not None or time.monotonic() > stop:
                return content
            time.sleep(0.02)

    def create(self, content: bytes) -> None:
        with self._written(content) as temporary:
            try:
                os.link(temporary, self._path)
            except FileExistsError:
                pass
            except OSError:
                self._create_in_place(content)

    def _create_in_place(self, content: bytes) -> None:
        """For file systems without hard links: such as FAT, and some of networks."""
        with suppress(FileExistsError), open(self._path, "xb", buffering=0) as file:
            try:
                file.write(content)
            except OSError:
                self.remove()
                raise

    def replace(self, content: bytes) -> None:
        with self._written(content) as temporary:
            temporary.replace(self._path)

    @contextmanager
    def _written(self, content: bytes) -> Iterator[Path]:
        """A temporary file of the content."""
        temporary = self._path.with_name(f".{LOCK}.{uuid.uuid4().hex}.tmp")
        try:
            with open(temporary, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


class _RemoteLock(_Lock):
    """By what every file system of fsspec has: of two that write at the same time, the later one has the lock."""

    def read(self) -> bytes | None:
        system, path = self._open()
        system.invalidate_cache(path.rpartition("/")[0])
        try:
            content: bytes = system.cat_file(path)
        except FileNotFoundError:
            return None
        return content

    def create(self, content: bytes) -> None:
        self.replace(content)
        time.sleep(SETTLE_SECONDS)

    def replace(self, content: bytes) -> None:
        system, path = self._open()
        system.pipe_file(path, content)

    def remove(self) -> None:
        system, path = self._open()
        with suppress(FileNotFoundError):
            system.rm_file(path)

    def _open(self) -> tuple[Any, str]:
        return self.place.below(LOCK).open()


class _S3Lock(_RemoteLock):
    def create(self, content: bytes) -> None:
        system, path = self._open()
        bucket, key, _ = system.split_path(path)
        try:
            system.call_s3("put_object", Bucket=bucket, Key=key, Body=content, IfNoneMatch="*")
        except OSError as error:
            # s3fs makes its own errors of those of S3.
            answer = getattr(error.__cause__, "response", {}).get("Error", {}).get("Code")
            if answer in ("NotImplemented", "501"):  # a store that knows no conditions
                super().create(content)
            elif answer not in ("PreconditionFailed", "412", "ConditionalRequestConflict", "409"):
                raise
