"""Read photos from local paths and URLs: a path to bytes, or a failure."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Iterable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from functools import lru_cache
from typing import Any, TypeVar

from reducer.config.settings import Source
from reducer.errors import StoreError
from reducer.photos.disk import changed, disk_blocks, read_photo, state_on_disk, too_large
from reducer.photos.hashing import PhotoError
from reducer.photos.requests import (
    AccessRefused,
    CannotCopy,
    Enough,
    FileState,
    PhotoFile,
    Unanswered,
    copy_object,
    fetch,
    fetch_start,
    size_of,
    state_of,
)
from reducer.storage.location import ByteRange, Location, PhotoRef, Shard, file_of, is_url
from reducer.storage.remote import RETRY_SECONDS, Transient, with_async_retries

T = TypeVar("T")

#: Most bytes of a worker's memory for photos that are read and not yet hashed, beside the next one.
READ_AHEAD_BYTES = 256 * 2**20
#: Bytes of a block of a shard in a store.
STORE_BLOCK = 4 * 2**20
#: Photos that one block of a store takes the place of in `Source.read_ahead`: by default 8 blocks are under way, enough
#: that a round trip of 100 ms costs nothing at the speed of hashing.
PHOTOS_PER_BLOCK = 4

#: Attempts to find out whether a photo can still be read that was read before, and seconds that each may take.
PROOFS, PROOF_SECONDS = 2, 10

#: Reading the beginnings of objects first is worth it where at least one object in `WORTH_A_START` is not read whole;
#: elsewhere one object in `STARTS_TO_TRY` is still read so.
STARTS_TO_TRY, WORTH_A_START = 16, 4


def read_all(
    refs: Sequence[PhotoRef], source: Source, *, max_pixels: int, enough: Enough | None = None
) -> Generator[PhotoFile | PhotoError]:
    """Read photos in turn, URLs ahead of time.

    Parameters
    ----------
    refs : sequence of str or ByteRange
        Local paths and URLs, or parts of what lies there.
    source : Source
        How URLs are read.
    max_pixels : int
        The job's limit; a file of more bytes than any photo of that size needs is not read.
    enough : callable, optional
        From the beginning of a file to the number of its bytes that are enough (None for all): of objects on S3 no
        more is read, or little more.

    Yields
    ------
    PhotoFile or PhotoError
        One per photo, in their order.
    """
    if any(is_url(file_of(ref)) for ref in refs):
        yield from _read_ahead(refs, source, max_pixels, source.read_ahead, enough)
        return
    for ref in refs:
        try:
            yield read_photo(ref, max_pixels=max_pixels)
        except PhotoError as error:
            yield error


class _Budget:
    """Bytes of photos that are read and not yet hashed, in one worker process; used in the loop's thread only."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self.changed = asyncio.Condition()

    async def take(self, size: int, next_up: Callable[[], bool]) -> None:
        """Wait for room for a number of bytes; the photo that is to be hashed next never waits, or all would."""
        async with self.changed:
            await self.changed.wait_for(lambda: self.used + size <= self.limit or next_up())
            self.used += size

    async def give_back(self, size: int) -> None:
        """Give room back, in bytes."""
        async with self.changed:
            self.used -= size
            self.changed.notify_all()


class _Starts:
    """Choice of reading the beginnings of objects first, in one worker process: not where hardly any is enough.

    The choice decides the number of requests and nothing else. Used in the loop's thread only.
    """

    def __init__(self) -> None:
        self.photos = self.asked = self.saved = 0

    async def fetch(
        self, path: str, source: Source, room: Callable[[int], Awaitable[None]], enough: Enough
    ) -> PhotoFile:
        """Make one attempt to read an object, by its beginning first or at once whole."""
        self.photos += 1
        few = self.asked >= STARTS_TO_TRY and self.saved * WORTH_A_START < self.asked
        if few and self.photos % STARTS_TO_TRY:
            return await fetch(path, source, room)
        self.asked += 1
        file = await fetch_start(path, source, room, enough)
        self.saved += len(file.content) < file.bytes
        return file


class _Proof:
    """What tells a store that lets nobody read from a photo that cannot be read, for one store in one process.

    Used in the loop's thread only.
    """

    def __init__(self) -> None:
        self.path: str | None = None  # of a photo that could be read
        self.answered = False  # whether the store has let us read, or said that something is not there
        self.under_way = self.waiting = 0
        self.changed, self.trying = asyncio.Condition(), asyncio.Lock()
        self.tried, self.can_be_read = -math.inf, False

    @asynccontextmanager
    async def request(self) -> AsyncIterator[None]:
        """Count a request as long as it is under way."""
        self.under_way += 1
        try:
            yield
        finally:
            self.under_way -= 1
            await self._tell()

    async def note(self, path: str | None) -> None:
        """Note that a photo can be read, or that the store has said of one that it is not there (None)."""
        self.path, self.answered = path or self.path, True
        await self._tell()

    async def _tell(self) -> None:
        if self.waiting:
            async with self.changed:
                self.changed.notify_all()

    async def require(self, source: Source, error: PhotoError) -> None:
        """Find out whether others can be read where one is refused, or gets no answer.

        Raises
        ------
        StoreError
            If not.
        """
        now = time.monotonic()
        async with self.changed:  # if none was read yet, perhaps one of those under way can be
            self.waiting += 1
            self.changed.notify_all()
            try:
                await self.changed.wait_for(lambda: self.answered or self.waiting >= self.under_way)
            finally:
                self.waiting -= 1
        if self.path is not None:
            async with self.trying:  # one attempt answers all that have failed before it
                if self.tried < now:
                    self.tried = time.monotonic()
                    self.can_be_read = await _is_answered(self.path, source)
            if self.can_be_read:
                return
        elif self.answered:
            return
        read_before = "" if self.path is None else ", not even one that was read before"
        raise StoreError(f"the store gives no photo{read_before}: {error}")


async def _is_answered(path: str, source: Source) -> bool:
    """Tell whether a store tells of a photo that could be read before."""
    for _ in range(PROOFS):
        try:
            await asyncio.wait_for(size_of(path, source), PROOF_SECONDS)
        except (Transient, TimeoutError):
            await asyncio.sleep(1)
        except (PhotoError, StoreError):
            return False
        else:
            return True
    return False


class _Shared:
    """Shared by all threads of a process that read: fsspec's event loop, in its own thread, and a budget of bytes."""

    def __init__(self) -> None:
        from fsspec.asyn import get_loop

        self.loop: asyncio.AbstractEventLoop = get_loop()
        self.budget = _Budget(READ_AHEAD_BYTES)
        self.starts = _Starts()
        self.proofs: dict[str, _Proof] = {}

    def proof_of(self, path: str, source: Source) -> _Proof:
        """Return what is known of the store of a URL."""
        store = "/".join(path.split("/", 3)[:3])
        return self.proofs.setdefault(json.dumps([store, source.options], sort_keys=True, default=repr), _Proof())


@lru_cache(maxsize=1)
def _shared() -> _Shared:
    return _Shared()


def _read_ahead(
    refs: Iterable[PhotoRef], source: Source, max_pixels: int, under_way_at_most: int, enough: Enough | None = None
) -> Generator[PhotoFile | PhotoError]:
    shared = _shared()
    loop, budget, starts = shared.loop, shared.budget, shared.starts
    hashed = 0  # photos that the caller is done with
    held: dict[int, int] = {}  # bytes by number of the photo; in the loop's thread only
    under_way: deque[Future[PhotoFile | PhotoError]] = deque()

    async def give_back(*numbers: int) -> None:
        await budget.give_back(sum(held.pop(number, 0) for number in numbers))

    async def give_all_back() -> None:
        await give_back(*held)

    async def read(number: int, ref: PhotoRef) -> PhotoFile | PhotoError:
        async def room(size: int) -> None:
            await shared.proof_of(file_of(ref), source).note(file_of(ref))
            if error := too_large(size, max_pixels):
                raise error
            more = size - held.get(number, 0)
            if more < 0:
                await budget.give_back(-more)
            else:
                await budget.take(more, lambda: number <= hashed)
            held[number] = size

        if not is_url(file_of(ref)):
            try:
                return await asyncio.to_thread(read_photo, ref, max_pixels=max_pixels)
            except PhotoError as error:
                return error

        def request() -> Awaitable[PhotoFile]:
            if enough is not None and isinstance(ref, str) and Location(ref).on_s3:
                return starts.fetch(ref, source, room, enough)
            return fetch(ref, source, room)

        try:
            file = await from_store(file_of(ref), source, request)
            if isinstance(ref, ByteRange) and ref.etag is not None and file.etag not in (None, ref.etag):
                raise changed(ref.path)
            return file
        except PhotoError as error:
            await give_back(number)
            return error
        except StoreError:
            await give_back(number)
            raise

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
            # Also where the photo held nothing: another is next up now.
            asyncio.run_coroutine_threadsafe(give_back(hashed - 1), loop)
    finally:
        for future in under_way:
            future.cancel()
        asyncio.run_coroutine_threadsafe(give_all_back(), loop)


class Shards:
    """Shards that are read in turn, each from its start; from a store ahead of time, beyond the end of a shard too.

    Parameters
    ----------
    shards : sequence of Shard
        Either all of a store, or none.
    source : Source
        How URLs are read.
    max_pixels : int
        The job's limit, as for `read_all`.
    """

    def __init__(self, shards: Sequence[Shard], source: Source, *, max_pixels: int) -> None:
        self.shards, self.source, self.max_pixels = shards, source, max_pixels
        self._blocks: Generator[PhotoFile | PhotoError] | None = None
        #: Number of the shard whose blocks come next, and blocks that are left of the one before.
        self._next, self._left = 0, 0

    def blocks_from(self, number: int, offset: int) -> Generator[bytes]:
        """Read the bytes of a shard from an offset on.

        Parameters
        ----------
        number : int
            Number of the shard; never less than in the call before.
        offset : int
            Offset of the first byte; 0 in a store.

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
            yield from disk_blocks(shard, offset)
            return
        assert offset == 0
        if self._blocks is None or self._left or self._next != number:  # the one before was not read to its end
            self.close()
            refs = (ref for other in self.shards[number:] for ref in _blocks_of(other))
            under_way = max(1, self.source.read_ahead // PHOTOS_PER_BLOCK)
            self._blocks = _read_ahead(refs, self.source, self.max_pixels, under_way)
        self._next, self._left = number + 1, len(_blocks_of(shard))
        for ref in _blocks_of(shard):
            self._left -= 1
            block = next(self._blocks)
            if isinstance(block, PhotoError):
                self._left += 1  # a block that fails leaves the others under way
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


def are_unchanged(paths: Sequence[str], states: Sequence[FileState], source: Source) -> list[bool]:
    """Tell whether files are unchanged, without reading them.

    Parameters
    ----------
    paths : sequence of str, n
        Local paths and URLs.
    states : sequence of FileState, n
        States of the files before.
    source : Source
        How URLs are opened.

    Returns
    -------
    list of bool, n
        True for equal size, and equal etag of an object or else time of change; False also where that cannot be told.
    """
    return [now is not None and now.is_as(before) for now, before in zip(states_of(paths, source), states, strict=True)]


def states_of(paths: Sequence[str], source: Source) -> list[FileState | None]:
    """Return the present states of files, without reading them.

    Parameters
    ----------
    paths : sequence of str, n
        Local paths and URLs.
    source : Source
        How URLs are opened.

    Returns
    -------
    list of FileState or None, n
        None where the state cannot be told: reading the file will tell why.
    """
    if not any(map(is_url, paths)):
        return [state_on_disk(path) for path in paths]

    async def ask_all() -> list[FileState | None]:
        gate = asyncio.Semaphore(source.read_ahead)

        async def ask(path: str) -> FileState | None:
            async with gate:
                if not is_url(path):
                    return await asyncio.to_thread(state_on_disk, path)
                try:
                    return await persistently(lambda: state_of(path, source))
                except PhotoError:
                    return None

        return await asyncio.gather(*map(ask, paths))

    return in_reading_loop(ask_all())


def copy_in_store(
    paths: Sequence[str], targets: Sequence[Location], states: Sequence[FileState], source: Source, *, at_a_time: int
) -> list[int | PhotoError | None]:
    """Let a store copy objects itself: none of their bytes comes here.

    Parameters
    ----------
    paths : sequence of str, n
        URLs.
    targets : sequence of Location, n
        Where to, in the same store.
    states : sequence of FileState, n
        Bytes and etags that the objects must have, as far as those are known.
    source : Source
        How the store is opened.
    at_a_time : int
        Most copies under way.

    Returns
    -------
    list of int or PhotoError or None, n
        Bytes of each object, or its failure; None where the store does not copy.
    """

    async def copy_all() -> list[int | PhotoError | None]:
        gate = asyncio.Semaphore(at_a_time)
        can = True

        async def copy(path: str, target: Location, state: FileState) -> int | PhotoError | None:
            nonlocal can
            async with gate:
                try:
                    return await persistently(lambda: copy_object(path, target, state, source)) if can else None
                except PhotoError as error:
                    return error
                except CannotCopy:
                    can = False
                    return None

        return await asyncio.gather(*map(copy, paths, targets, states))

    return in_reading_loop(copy_all())


async def from_store(path: str, source: Source, request: Callable[[], Awaitable[T]]) -> T:
    """Ask a store for a photo, with retries.

    Raises
    ------
    PhotoError
        If the photo is to blame.
    StoreError
        If the store gives no photo any more.
    """
    proof = _shared().proof_of(path, source)
    async with proof.request():
        try:
            answer = await persistently(request)
        except (AccessRefused, Unanswered) as error:
            await proof.require(source, error)
            raise
        except PhotoError as error:
            if error.kind == "missing":
                await proof.note(None)
            raise
        await proof.note(path)
        return answer


def in_reading_loop(work: Coroutine[Any, Any, T]) -> T:
    """Wait for a coroutine, in the event loop that all reading shares."""
    return asyncio.run_coroutine_threadsafe(work, _shared().loop).result()


async def persistently(request: Callable[[], Awaitable[T]]) -> T:
    """Make a request with retries; the photo fails when they end."""
    try:
        return await with_async_retries(request)
    except Transient as error:
        raise Unanswered("unreadable", f"again and again for {RETRY_SECONDS:g} s: {error}") from None
