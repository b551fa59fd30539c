"""Read photos where they lie, a local path or a URL: path to bytes, or a failure."""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import lru_cache
from typing import TypeVar

from reducer.config.settings import Source
from reducer.photos.hashing import OUT_OF_MEMORY, PhotoError
from reducer.photos.requests import (
    CannotCopy,
    Enough,
    FileState,
    PhotoFile,
    copy_object,
    fetch,
    fetch_start,
    state_of,
)
from reducer.storage.location import ByteRange, Location, PhotoRef, Shard, file_of, is_url
from reducer.storage.remote import RETRY_SECONDS, Transient, with_async_retries

T = TypeVar("T")

#: A rule of thumb that bounds what is read into memory: no single photo of so many pixels is larger, a video or an
#: archive under a photo's name is.
MOST_BYTES_A_PIXEL = 8
LEAST_LIMIT = 2**30
#: Photos that are read and not yet hashed take at most so many bytes of a worker's memory, beside the next one.
READ_AHEAD_BYTES = 256 * 2**20
#: A shard is read in blocks of so many bytes, from a disk and from a store, and of a disk so many bytes are asked for
#: ahead.
DISK_BLOCK, STORE_BLOCK, DISK_AHEAD = 2**20, 4 * 2**20, 16 * 2**20
#: A block of a store is under way in the place of so many photos (`Source.read_ahead`): by default 8 of them, enough
#: that a round trip of 100 ms costs nothing at the speed of hashing.
PHOTOS_A_BLOCK = 4

#: Of every so many objects one is read by its beginning first even where that has not been worth it, which it is where
#: of at least one in so many not all is read.
STARTS_TO_TRY, WORTH_A_START = 16, 4


def read_all(
    refs: Sequence[PhotoRef], source: Source, *, max_pixels: int, enough: Enough | None = None
) -> Generator[PhotoFile | PhotoError]:
    """Read photos in turn, those of URLs ahead of time.

    Parameters
    ----------
    refs : sequence of str or ByteRange
        Local paths and URLs, or parts of what lies there.
    source : Source
        How URLs are read.
    max_pixels : int
        The job's limit; a file with more bytes than any photo of so many pixels needs is not read.
    enough : callable, optional
        From the beginning of a file to how many of its bytes are enough (None for all): of objects on S3 no more is
        read, or little more.

    Yields
    ------
    PhotoFile or PhotoError
        One a photo, in their order.
    """
    if any(is_url(file_of(ref)) for ref in refs):
        yield from _read_ahead(refs, source, max_pixels, source.read_ahead, enough)
        return
    for ref in refs:
        try:
            yield read_photo(ref, max_pixels=max_pixels)
        except PhotoError as error:
            yield error


def most_bytes(max_pixels: int) -> int:
    """Above so many bytes nothing is read that is to be a photo of at most so many pixels."""
    return max(LEAST_LIMIT, MOST_BYTES_A_PIXEL * max_pixels)


def too_large(size: int, max_pixels: int) -> PhotoError | None:
    """The failure of a photo of so many bytes, if it is one."""
    if size <= most_bytes(max_pixels):
        return None
    return PhotoError("too large", f"{size} bytes, over what --max-pixels {max_pixels} can need")


def read_photo(ref: PhotoRef, *, max_pixels: int) -> PhotoFile:
    """Read one local photo whole.

    Parameters
    ----------
    ref : str or ByteRange
        A local path, or a part of the file there.
    max_pixels : int
        As for `read_all`.

    Raises
    ------
    PhotoError
        When it is missing, no regular file, or cannot be read.
    """
    path = file_of(ref)
    with _disk_failures():
        # Looked at before it is opened: opening a named pipe would wait for ever.
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            what = "a directory" if stat.S_ISDIR(found.st_mode) else "no regular file"
            raise PhotoError("not a file", f"the path is {what}")
        size = found.st_size if isinstance(ref, str) else ref.bytes
        if error := too_large(size, max_pixels):
            raise error
        with open(path, "rb", buffering=0) as file:
            if isinstance(ref, str):
                return PhotoFile(file.readall(), found.st_mtime_ns)
            if ref.mtime_ns not in (None, found.st_mtime_ns):
                raise changed(ref.path)
            file.seek(ref.offset)
            return PhotoFile(file.read(size), found.st_mtime_ns)


@contextmanager
def _disk_failures() -> Iterator[None]:
    """Turn what goes wrong with a file on a disk into the photo's failure."""
    try:
        yield
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


class _Starts:
    """Whether to ask for the beginnings of objects first, in one worker process: not where hardly any is enough.

    That decides how many requests there are, and nothing else. All of it runs in the loop's thread.
    """

    def __init__(self) -> None:
        self.photos = self.asked = self.saved = 0

    async def fetch(
        self, path: str, source: Source, room: Callable[[int], Awaitable[None]], enough: Enough
    ) -> PhotoFile:
        self.photos += 1
        few = self.asked >= STARTS_TO_TRY and self.saved * WORTH_A_START < self.asked
        if few and self.photos % STARTS_TO_TRY:
            return await fetch(path, source, room)
        self.asked += 1
        file = await fetch_start(path, source, room, enough)
        self.saved += len(file.content) < file.bytes
        return file


class _Shared:
    """What all threads of a process read with: fsspec's event loop, in its own thread, and a budget of bytes."""

    def __init__(self) -> None:
        from fsspec.asyn import get_loop

        self.loop: asyncio.AbstractEventLoop = get_loop()
        self.budget = _Budget(READ_AHEAD_BYTES)
        self.starts = _Starts()


@lru_cache(maxsize=1)
def _shared() -> _Shared:
    return _Shared()


def _read_ahead(
    refs: Iterable[PhotoRef], source: Source, max_pixels: int, under_way_at_most: int, enough: Enough | None = None
) -> Generator[PhotoFile | PhotoError]:
    loop, budget, starts = _shared().loop, _shared().budget, _shared().starts
    hashed = 0  # how many are done with
    held: dict[int, int] = {}  # bytes by number; in the loop's thread only
    under_way: deque[Future[PhotoFile | PhotoError]] = deque()

    async def give_back(*numbers: int) -> None:
        await budget.give_back(sum(held.pop(number, 0) for number in numbers))

    async def give_all_back() -> None:
        await give_back(*held)

    async def read(number: int, ref: PhotoRef) -> PhotoFile | PhotoError:
        async def room(size: int) -> None:
            if error := too_large(size, max_pixels):
                raise error
            more = size - held.get(number, 0)
            if more < 0:
                await budget.give_back(-more)
            else:
                await budget.take(more, lambda: number <= hashed)
            held[number] = size

        try:
            if not is_url(file_of(ref)):
                return await asyncio.to_thread(read_photo, ref, max_pixels=max_pixels)
            if enough is not None and isinstance(ref, str) and Location(ref).on_s3:
                return await _persistently(lambda: starts.fetch(ref, source, room, enough))
            file = await _persistently(lambda: fetch(ref, source, room))
            if isinstance(ref, ByteRange) and ref.etag is not None and file.etag not in (None, ref.etag):
                raise changed(ref.path)
            return file
        except PhotoError as error:
            await give_back(number)
            return error

    left = iter(enumerate(refs))
    try:
        while True:
            for number, ref in left:
                under_way.append(asyncio.run_coroutine_threadsafe(read(number, ref), loop))
                if len(under_way) >= under_way_at_most:
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


class Shards:
    """Reads shards in turn, each from its start; those of a store ahead of time, also beyond the end of one.

    Parameters
    ----------
    shards : sequence of Shard
        Either all of a store, or none.
    source : Source
        How URLs are read.
    max_pixels : int
        As for `read_all`.
    """

    def __init__(self, shards: Sequence[Shard], source: Source, *, max_pixels: int) -> None:
        self.shards, self.source, self.max_pixels = shards, source, max_pixels
        self._blocks: Generator[PhotoFile | PhotoError] | None = None
        #: Which shard's blocks come next, and how many of them are left.
        self._next, self._left = 0, 0

    def blocks_from(self, number: int, offset: int) -> Generator[bytes]:
        """The bytes of a shard from one of them on.

        Parameters
        ----------
        number : int
            Which of the shards, not before an earlier one.
        offset : int
            Of the first byte; 0 in a store.

        Yields
        ------
        bytes
            Blocks, in their order.

        Raises
        ------
        PhotoError
            When the shard cannot be read, or is not the one that was listed.
        """
        shard = self.shards[number]
        if not is_url(shard.path):
            yield from _disk_blocks(shard, offset)
            return
        assert offset == 0
        if self._blocks is None or self._left or self._next != number:  # the one before was not read to its end
            self.close()
            refs = (ref for other in self.shards[number:] for ref in _blocks_of(other))
            under_way = max(1, self.source.read_ahead // PHOTOS_A_BLOCK)
            self._blocks = _read_ahead(refs, self.source, self.max_pixels, under_way)
        self._next, self._left = number + 1, len(_blocks_of(shard))
        for ref in _blocks_of(shard):
            self._left -= 1
            block = next(self._blocks)
            if isinstance(block, PhotoError):
                self._left += 1  # lest the others are waited for
                raise block
            yield block.content
            if len(block.content) < ref.bytes:
                raise changed(shard.path)

    def close(self) -> None:
        """Give up what is under way."""
        if self._blocks is not None:
            self._blocks.close()
        self._blocks, self._left = None, 0


def _blocks_of(shard: Shard) -> list[ByteRange]:
    starts = range(0, shard.bytes, STORE_BLOCK)
    return [
        ByteRange(shard.path, start, min(STORE_BLOCK, shard.bytes - start), shard.mtime_ns, shard.etag)
        for start in starts
    ]


def changed(path: str) -> PhotoError:
    """The failure of a shard, or a photo in it, that is not what it was."""
    return PhotoError("changed", f"{path} is not what it was when the run began")


def _disk_blocks(shard: Shard, offset: int) -> Generator[bytes]:
    with _disk_failures(), open(shard.path, "rb", buffering=0) as file:
        found = os.fstat(file.fileno())
        if (found.st_size, found.st_mtime_ns) != (shard.bytes, shard.mtime_ns):
            raise changed(shard.path)
        file.seek(offset)
        while block := file.read(DISK_BLOCK):
            if hasattr(os, "posix_fadvise"):  # a disk is to be read while photos are hashed
                os.posix_fadvise(file.fileno(), file.tell(), DISK_AHEAD, os.POSIX_FADV_WILLNEED)
            yield block


def are_unchanged(paths: Sequence[str], states: Sequence[FileState], source: Source) -> list[bool]:
    """Whether files are as they were, told without reading them.

    Parameters
    ----------
    paths, source
        As for `states_of`.
    states : sequence of FileState, n
        How they were.

    Returns
    -------
    list of bool, n
        True where the size is the same, and the etag of an object, or else the time of the last change. False also
        where that cannot be told.
    """
    return [now is not None and now.is_as(before) for now, before in zip(states_of(paths, source), states, strict=True)]


def states_of(paths: Sequence[str], source: Source) -> list[FileState | None]:
    """How files are now, told without reading them.

    Parameters
    ----------
    paths : sequence of str, n
        Local paths and URLs.
    source : Source
        How URLs are opened.

    Returns
    -------
    list of FileState or None, n
        None where that cannot be told: reading the file will tell what is wrong.
    """
    if not any(map(is_url, paths)):
        return [_state_here(path) for path in paths]

    async def ask_all() -> list[FileState | None]:
        gate = asyncio.Semaphore(source.read_ahead)

        async def ask(path: str) -> FileState | None:
            async with gate:
                if not is_url(path):
                    return await asyncio.to_thread(_state_here, path)
                try:
                    return await _persistently(lambda: state_of(path, source))
                except PhotoError:
                    return None

        return await asyncio.gather(*map(ask, paths))

    return asyncio.run_coroutine_threadsafe(ask_all(), _shared().loop).result()


def copy_in_store(
    paths: Sequence[str], targets: Sequence[Location], states: Sequence[FileState], source: Source, *, at_a_time: int
) -> list[int | PhotoError | None]:
    """Let a store copy objects itself.

    Parameters
    ----------
    paths : sequence of str, n
        URLs.
    targets : sequence of Location, n
        Where to, in the same store.
    states : sequence of FileState, n
        Bytes and etags that they must have, as far as those are known.
    source : Source
        How the store is opened.
    at_a_time : int
        So many.

    Returns
    -------
    list of int or PhotoError or None, n
        Their bytes, or what is wrong with them; None where the store does not do it.
    """

    async def copy_all() -> list[int | PhotoError | None]:
        gate = asyncio.Semaphore(at_a_time)
        can = True

        async def copy(path: str, target: Location, state: FileState) -> int | PhotoError | None:
            nonlocal can
            async with gate:
                try:
                    return await _persistently(lambda: copy_object(path, target, state, source)) if can else None
                except PhotoError as error:
                    return error
                except CannotCopy:
                    can = False
                    return None

        return await asyncio.gather(*map(copy, paths, targets, states))

    return asyncio.run_coroutine_threadsafe(copy_all(), _shared().loop).result()


def _state_here(path: str) -> FileState | None:
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return FileState(found.st_size, found.st_mtime_ns, None)


async def _persistently(request: Callable[[], Awaitable[T]]) -> T:
    """Make a request with retries; the photo fails when they end."""
    try:
        return await with_async_retries(request)
    except Transient as error:
        raise PhotoError("unreadable", f"again and again for {RETRY_SECONDS:g} s: {error}") from None
