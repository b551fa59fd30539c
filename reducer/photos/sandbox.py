"""Process photos in a process of their own, which a photo may kill; the worker then knows which photo."""

from __future__ import annotations

import os
import pickle
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from reducer.config.settings import PhotoSettings, Source
from reducer.photos.hashing import OUT_OF_MEMORY, PhotoError
from reducer.photos.process import PhotoResult, process_photos
from reducer.storage.location import PhotoRef

#: Sent by the process when it comes to its photos.
READY = "ready"
#: Kinds of failure.
KILLED, STALLED = "killed its worker", "stalled"
#: Share of a worker's memory limit that photos may take: Dask's nanny kills a worker at 0.95.
MEMORY_SHARE = 0.9
#: Least memory of a process of its own, in bytes, however full its worker is.
LEAST_MEMORY = 256 * 2**20
#: First code of the process, which finds our code where its worker does.
START = (
    "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); from reducer.photos.sandbox import serve; serve()"
)


class Died(Exception):
    """The process has ended."""


class CannotStart(Exception):
    """The process has ended before it came to a photo, so none is to blame."""


class TookTooLong(Exception):
    """One photo has taken too long."""


class _Process:
    """A process that processes photos in turn."""

    def __init__(self, refs: Sequence[PhotoRef], settings: PhotoSettings, source: Source, memory: int | None) -> None:
        # Not multiprocessing, which refuses to start processes in those of Dask's nannies. A session of its own: Ctrl-C
        # in a terminal must not look like a photo's doing.
        self.process = subprocess.Popen(
            [sys.executable, "-c", START], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        self.results: queue.SimpleQueue[PhotoResult | str | None] = queue.SimpleQueue()
        self.ready = False
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # told by `next`
            pickle.dump(sys.path, self.process.stdin)
            pickle.dump((list(refs), settings, source, memory), self.process.stdin)
            self.process.stdin.flush()

    def _read(self) -> None:
        assert self.process.stdout is not None
        try:
            with suppress(EOFError, OSError, pickle.UnpicklingError):
                while True:
                    self.results.put(pickle.load(self.process.stdout))
        finally:
            self.results.put(None)

    def next(self, patience: float, beat: Callable[[], None]) -> PhotoResult:
        """Return the result of the next photo.

        Raises
        ------
        Died
            If the process has ended; the message says how.
        CannotStart
            If it has ended before its first photo.
        TookTooLong
            After ``patience`` seconds.
        """
        stop = time.monotonic() + patience
        while True:
            left = stop - time.monotonic()
            if left <= 0:
                raise TookTooLong if self.ready else CannotStart(f"it did not start in {patience:g} s")
            try:
                result = self.results.get(timeout=min(left, 1.0))
            except queue.Empty:
                beat()
                continue
            if result is None:
                how = _how_it_ended(self.process.wait())
                raise Died(how) if self.ready else CannotStart(how)
            if isinstance(result, PhotoResult):
                return result
            self.ready = True
            stop = time.monotonic() + patience

    def close(self) -> None:
        """Kill the process and wait for its end."""
        self.process.kill()
        self.process.wait()
        self.reader.join()
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(OSError):  # what was not written any more
                if pipe is not None:
                    pipe.close()


@contextmanager
def _process(*arguments: Any) -> Iterator[_Process]:
    process = _Process(*arguments)
    try:
        yield process
    finally:
        process.close()


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"the process that looked at it ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"the process that looked at it was ended by {name}"


def process_in_sandbox(
    refs: Sequence[PhotoRef],
    settings: PhotoSettings,
    source: Source,
    *,
    memory: int | None,
    patience: float,
    beat: Callable[[], None],
) -> Iterator[PhotoResult]:
    """Read and hash photos as `reducer.photos.process.process_photos` does, in a process that a photo may kill.

    A photo at which the process dies, or which takes too long, is tried once more, alone in a process of its own: only
    a photo at which that happens again is to blame.

    Parameters
    ----------
    refs : sequence of str or ByteRange
        Where the photos lie.
    settings : PhotoSettings
        How they are hashed.
    source : Source
        How they are read.
    memory : int or None
        Bytes that the process may take.
    patience : float
        Seconds that a photo may take.
    beat : callable
        Called about every second while a photo takes that long.

    Yields
    ------
    PhotoResult
        One per photo.
    """
    done = 0
    while done < len(refs):
        with _process(refs[done:], settings, source, memory) as process:
            while done < len(refs):
                try:
                    result = process.next(patience, beat)
                except (Died, TookTooLong):
                    yield process_one_in_sandbox(
                        refs[done], settings, source, memory=memory, patience=patience, beat=beat
                    )
                    done += 1
                    break
                yield result
                done += 1


def refused_in_sandbox(
    refs: Sequence[PhotoRef], settings: PhotoSettings, source: Source, *, memory: int | None, patience: float
) -> dict[PhotoRef, str]:
    """Return the reasons not to decode photos in this process; parameters as for `process_in_sandbox`.

    Returns
    -------
    dict of str or ByteRange to str
        Reasons of one line, for the photos that are not to be decoded in this process.
    """
    refs = list(dict.fromkeys(refs))
    results = process_in_sandbox(refs, settings, source, memory=memory, patience=patience, beat=lambda: None)
    try:
        return {ref: result.error for ref, result in zip(refs, results, strict=True) if result.error is not None}
    except CannotStart as error:
        return dict.fromkeys(refs, f"not decoded: it cannot be tried in a process of its own: {error}")


def process_one_in_sandbox(
    ref: PhotoRef,
    settings: PhotoSettings,
    source: Source,
    *,
    memory: int | None,
    patience: float,
    beat: Callable[[], None],
) -> PhotoResult:
    """Process one photo, alone in a process of its own; parameters as for `process_in_sandbox`."""
    with _process([ref], settings, source, memory) as process:
        try:
            return process.next(patience, beat)
        except TookTooLong:
            return _stalled(patience)
        except Died as error:
            return PhotoResult(error=str(PhotoError(KILLED, str(error))))


def _stalled(patience: float) -> PhotoResult:
    return PhotoResult(error=str(PhotoError(STALLED, f"no end after {patience:g} s")))


def may_be_innocent(result: PhotoResult) -> bool:
    """Tell whether a photo may have failed because others had taken the memory."""
    if result.error is None or result.error.startswith(("missing", "not a file", "too large", "empty")):
        return False
    return result.error.startswith(OUT_OF_MEMORY) or memory_was_tight()


def serve() -> None:
    """Process the photos that standard input names, and write each result to standard output."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever libraries print
    refs, settings, source, memory = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with memory_bound(memory):
        pickle.dump(READY, out)
        out.flush()
        for result in process_photos(refs, settings, source):
            pickle.dump(result, out)
            out.flush()
    out.close()
    os._exit(0)  # without waiting for the thread that reads standard input


def _end_with_parent() -> None:
    """End this process with the worker, which holds the other end of standard input open while it lives."""
    while os.read(0, 1024):
        pass
    os._exit(1)


class _Bound:
    """Limit of address space of the process, changed while any thread processes photos."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self.before: tuple[int, int] | None = None


_bound = _Bound()


@contextmanager
def memory_bound(memory: int | None) -> Iterator[None]:
    """Let allocations beyond a limit fail, so that a photo which needs more is a `MemoryError` and not the end.

    Linux counts address space (``RLIMIT_AS``, setrlimit(2)); what is reserved already and not in use is added. Where
    the system has no such limit nothing is done. Threads share it: the first in sets it, the last out takes it back.

    Parameters
    ----------
    memory : int or None
        Bytes of resident memory that the process may have in all; None for no limit.
    """
    try:
        import resource
    except ImportError:  # Windows
        yield
        return
    with _bound.lock:
        _bound.users += 1
        if _bound.users == 1 and memory is not None and (used := _memory_used()) is not None:
            soft, hard = resource.getrlimit(resource.RLIMIT_AS)
            wanted = memory + max(0, used[0] - used[1])
            if soft == resource.RLIM_INFINITY or wanted < soft:
                with suppress(ValueError, OSError):
                    resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
                    _bound.before = (soft, hard)
    try:
        yield
    finally:
        with _bound.lock:
            _bound.users -= 1
            if _bound.users == 0 and _bound.before is not None:
                resource.setrlimit(resource.RLIMIT_AS, _bound.before)
                _bound.before = None


def memory_was_tight() -> bool:
    """Tell whether this process has come near its limit of address space, so that any allocation may have failed."""
    try:
        import resource

        with open("/proc/self/status") as file:
            peak = re.search(r"^VmPeak:\s*(\d+) kB$", file.read(), re.MULTILINE)
    except (ImportError, OSError):
        return False
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return peak is not None and limit != resource.RLIM_INFINITY and 1024 * int(peak[1]) > 0.8 * limit


def _memory_used() -> tuple[int, int] | None:
    """Return address space and resident memory of this process, in bytes."""
    try:
        with open("/proc/self/statm") as file:
            size, resident = file.read().split()[:2]
    except OSError:
        return None
    page = os.sysconf("SC_PAGE_SIZE")
    return int(size) * page, int(resident) * page


def memory_left(limit: int | None) -> int | None:
    """Return the bytes that a process beside this one may take so that both stay within a worker's limit."""
    if limit is None:
        return None
    used = _memory_used()
    return max(LEAST_MEMORY, int(MEMORY_SHARE * limit) - (used[1] if used else 0))
