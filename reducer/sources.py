"""Read photos where they lie, a local path or a URL: path to bytes, or a failure."""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Sequence
from concurrent.futures import Future
from functools import lru_cache
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from reducer.config import template_fields
from reducer.hashing import OUT_OF_MEMORY, PhotoError
from reducer.objects import FileState, PhotoFile, Transient, fetch, is_unchanged
from reducer.places import RETRY_SECONDS, Source, is_url, pauses
from reducer.types import PathRule

T = TypeVar("T")

#: A rule of thumb that bounds what is read into memory: no single photo of so many pixels is larger, a video or an
#: archive under a photo's name is.
MOST_BYTES_A_PIXEL = 8
LEAST_LIMIT = 2**30
#: Photos that are read and not yet hashed take at most so many bytes of a worker's memory, beside the next one.
READ_AHEAD_BYTES = 256 * 2**20


def paths_by_rule(rule: PathRule, ids: pa.ChunkedArray, labels: pa.ChunkedArray) -> pa.ChunkedArray:
    """Where photos lie.

    Parameters
    ----------
    rule : PathRule
        The rule.
    ids, labels : pyarrow.ChunkedArray of string, shape (photos,)
        Of each photo; long enough for the single characters that the template uses.

    Returns
    -------
    pyarrow.ChunkedArray of string, shape (photos,)
        Absolute paths or URLs.
    """
    parts: list[pa.ChunkedArray | str] = [f"{rule.root}/"]
    for text, name, character in template_fields(rule.template):
        parts.append(text)
        if name is not None:
            column = ids if name == "id" else labels
            parts.append(column if character is None else pc.utf8_slice_codeunits(column, character, character + 1))
    return pc.binary_join_element_wise(*parts, "")


def read_all(paths: Sequence[str], source: Source, *, max_pixels: int) -> Generator[PhotoFile | PhotoError]:
    """Read photos in turn, those of URLs ahead of time.

    Parameters
    ----------
    paths : sequence of str
        Local paths and URLs.
    source : Source
        How URLs are read.
    max_pixels : int
        The job's limit; a file with more bytes than any photo of so many pixels needs is not read.

    Yields
    ------
    PhotoFile or PhotoError
        One a path, in their order.
    """
    if any(map(is_url, paths)):
        yield from _read_ahead(paths, source, max_pixels)
        return
    for path in paths:
        try:
            yield read_photo(path, max_pixels=max_pixels)
        except PhotoError as error:
            yield error


def most_bytes(max_pixels: int) -> int:
    """Above so many bytes nothing is read that is to be a photo of at most so many pixels."""
    return max(LEAST_LIMIT, MOST_BYTES_A_PIXEL * max_pixels)


def _too_many_bytes(size: int, max_pixels: int) -> PhotoError:
    return PhotoError("too large", f"{size} bytes, over what --max-pixels {max_pixels} can need")


def read_photo(path: str, *, max_pixels: int) -> PhotoFile:
    """Read one local photo whole.

    Parameters
    ----------
    path : str
        A local path.
    max_pixels : int
        As for `read_all`.

    Raises
    ------
    PhotoError
        When it is missing, no regular file, or cannot be read.
    """
    try:
        # Looked at before it is opened: opening a named pipe would wait for ever.
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            what = "a directory" if stat.S_ISDIR(found.st_mode) else "no regular file"
            raise PhotoError("not a file", f"the path is {what}")
        if found.st_size > most_bytes(max_pixels):
            raise _too_many_bytes(found.st_size, max_pixels)
        with open(path, "rb", buffering=0) as file:
            return PhotoFile(file.readall(), found.st_mtime_ns)
    except FileNotFoundError:
        raise PhotoError("missing", "no such file") from None
    except NotADirectoryError:
        raise PhotoError("missing", "no such file") from None
    except MemoryError:
        raise PhotoError(OUT_OF_MEMORY, "reading it takes more than there is") from None
    except OSError as error:
        code = errno.errorcode.get(error.errno or 0, "OSError")
        raise PhotoError("unreadable", f"{error.strerror or error} ({code})") from None
    except ValueError as error:  # a NUL character in the path
        raise PhotoError("missing", f"no file can have this path ({error})") from None


class _Budget:
    """Bytes of photos that are read and not yet hashed, in one worker process. All of it runs in the loop's thread."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self.changed = asyncio.Condition()

    async def take(self, size: int, next_up: Callable[[], bool]) -> None:
        """Wait for room; the photo that is to be hashed next never waits, or all would."""
        async with self.changed:
            await self.changed.wait_for(lambda: self.used + size <= self.limit or next_up())
            self.used += size

    async def give_back(self, size: int) -> None:
        async with self.changed:
            self.used -= size
            self.changed.notify_all()


class _Shared:
    """What all threads of a process read with: fsspec's event loop, in its own thread, and a budget of bytes."""

    def __init__(self) -> None:
        from fsspec.asyn import get_loop

        self.loop: asyncio.AbstractEventLoop = get_loop()
        self.budget = _Budget(READ_AHEAD_BYTES)


@lru_cache(maxsize=1)
def _shared() -> _Shared:
    return _Shared()


def _read_ahead(paths: Sequence[str], source: Source, max_pixels: int) -> Generator[PhotoFile | PhotoError]:
    loop, budget = _shared().loop, _shared().budget
    hashed = 0  # how many are done with
    held: dict[int, int] = {}  # bytes by number; in the loop's thread only
    under_way: deque[Future[PhotoFile | PhotoError]] = deque()

    async def give_back(*numbers: int) -> None:
        await budget.give_back(sum(held.pop(number, 0) for number in numbers))

    async def give_all_back() -> None:
        await give_back(*held)

    async def read(number: int, path: str) -> PhotoFile | PhotoError:
        async def room(size: int) -> None:
            if size > most_bytes(max_pixels):
                raise _too_many_bytes(size, max_pixels)
            await budget.take(size - held.get(number, 0), lambda: number <= hashed)
            held[number] = size

        try:
            if not is_url(path):
                return await asyncio.to_thread(read_photo, path, max_pixels=max_pixels)
            return await _persistently(lambda: fetch(path, source, room))
        except PhotoError as error:
            await give_back(number)
            return error

    left = iter(enumerate(paths))
    try:
        while True:
            for number, path in left:
                under_way.append(asyncio.run_coroutine_threadsafe(read(number, path), loop))
                if len(under_way) >= source.read_ahead:
                    break
            if not under_way:
                return
            yield under_way.popleft().result()
            hashed += 1
            # Also where it held nothing: another is next up now.
            asyncio.run_coroutine_threadsafe(give_back(hashed - 1), loop)
    finally:
        for future in under_way:
            future.cancel()
        asyncio.run_coroutine_threadsafe(give_all_back(), loop)


def are_unchanged(paths: Sequence[str], states: Sequence[FileState], source: Source) -> list[bool]:
    """Whether files are as they were, told without reading them.

    Parameters
    ----------
    paths : sequence of str, n
        Local paths and URLs.
    states : sequence of FileState, n
        How they were.
    source : Source
        How URLs are opened.

    Returns
    -------
    list of bool, n
        True where the size is the same, and the etag of an object, or else the time of the last change. False also
        where that cannot be told.
    """
    if not any(map(is_url, paths)):
        return [_is_unchanged_here(path, state) for path, state in zip(paths, states, strict=True)]

    async def ask_all() -> list[bool]:
        gate = asyncio.Semaphore(source.read_ahead)

        async def ask(path: str, state: FileState) -> bool:
            async with gate:
                if not is_url(path):
                    return await asyncio.to_thread(_is_unchanged_here, path, state)
                try:
                    return await _persistently(lambda: is_unchanged(path, state, source))
                except PhotoError:  # reading it will tell what is wrong
                    return False

        return await asyncio.gather(*map(ask, paths, states))

    return asyncio.run_coroutine_threadsafe(ask_all(), _shared().loop).result()


def _is_unchanged_here(path: str, state: FileState) -> bool:
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return False
    return (found.st_size, found.st_mtime_ns) == (state.bytes, state.mtime_ns)


async def _persistently(request: Callable[[], Awaitable[T]]) -> T:
    """Make a request again while it fails for reasons that may pass."""
    for pause in pauses():
        try:
            return await request()
        except Transient:
            await asyncio.sleep(pause)
    try:
        return await request()
    except Transient as error:
        raise PhotoError("unreadable", f"again and again for {RETRY_SECONDS:g} s: {error}") from None
