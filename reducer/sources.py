"""Read photos where they lie, a local path or a URL: path to bytes, or a failure."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import stat
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from reducer.config import template_fields
from reducer.hashing import OUT_OF_MEMORY, PhotoError
from reducer.places import RETRY_SECONDS, Place, Source, is_refused, is_url, obstore_at, pauses
from reducer.types import PathRule

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

#: A rule of thumb that bounds what is read into memory: no single photo of so many pixels is larger, a video or an
#: archive under a photo's name is.
MOST_BYTES_A_PIXEL = 8
LEAST_LIMIT = 2**30
#: Photos that are read and not yet hashed take at most so many bytes of a worker's memory, beside the next one.
READ_AHEAD_BYTES = 256 * 2**20


@dataclass(frozen=True)
class PhotoFile:
    """A photo's bytes and what the place it lies in knows of it.

    Attributes
    ----------
    content : bytes
        The whole file.
    mtime_ns : int or None
        Time of its last change, nanoseconds since 1970 UTC.
    etag : str or None
        Entity tag of an object in a store.
    """

    content: bytes
    mtime_ns: int | None
    etag: str | None = None


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


class Transient(Exception):
    """A request failed for a reason that may pass."""


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
    """What all threads of a process read with: fsspec's event loop, in a thread of its own, and what belongs to it."""

    def __init__(self) -> None:
        from fsspec.asyn import get_loop

        self.loop: asyncio.AbstractEventLoop = get_loop()
        self.budget = _Budget(READ_AHEAD_BYTES)
        self.connecting = asyncio.Lock()
        self._systems: dict[str, AbstractFileSystem] = {}

    def open(self, place: Place) -> tuple[AbstractFileSystem, str]:
        """The file system, made once, since that takes longer than it seems, and the path in it."""
        key = json.dumps([place.path.partition("://")[0], place.options], sort_keys=True, default=repr)
        system = self._systems.get(key)
        if system is None:
            # Attempts are counted here (`_persistently`), not in the client too.
            system = self._systems[key] = place.open(attempts=1)[0]
        return system, system._strip_protocol(place.path)


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
            return await _persistently(lambda: _fetch(path, source, room))
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


async def _persistently(read: Callable[[], Awaitable[PhotoFile]]) -> PhotoFile:
    """Make a request again while it fails for reasons that may pass."""
    for pause in pauses():
        try:
            return await read()
        except Transient:
            await asyncio.sleep(pause)
    try:
        return await read()
    except Transient as error:
        raise PhotoError("unreadable", f"again and again for {RETRY_SECONDS:g} s: {error}") from None


Room = Callable[[int], Awaitable[None]]


async def _fetch(path: str, source: Source, room: Room) -> PhotoFile:
    """One attempt to read a URL."""
    place = Place(path, source.options)
    if not place.on_s3:
        fetch = _fetch_fsspec
    elif source.reader == "obstore":
        fetch = _fetch_obstore
    else:
        fetch = _fetch_s3fs
    try:
        return await fetch(place, room)
    except (PhotoError, Transient):
        raise
    except FileNotFoundError:
        raise PhotoError("missing", "no such object") from None
    except MemoryError:
        raise PhotoError(OUT_OF_MEMORY, "reading it takes more than there is") from None
    except Exception as error:
        if is_refused(error):
            raise PhotoError("unreadable", f"access is refused ({place.safe(error)})") from None
        raise PhotoError("unreadable", place.safe(error)) from None


async def _fetch_s3fs(place: Place, room: Room) -> PhotoFile:
    """One GET, by s3fs's own client: its ``cat_file`` asks for the size first, and has retries of its own."""
    import aiohttp
    import botocore.exceptions as botocore
    from s3fs.errors import translate_boto_error

    system, path = _shared().open(place)
    bucket, key, _ = system.split_path(path)
    try:
        async with _shared().connecting:  # one at a time: the first makes the client
            await system.set_session()
        client = await system.get_s3(bucket)
        answer = await client.get_object(Bucket=bucket, Key=key)
        async with answer["Body"] as body:
            await room(answer["ContentLength"])
            content = await body.read()
    except botocore.ClientError as error:
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        if status >= 500 or status in (408, 429) or error.response["Error"].get("Code") == "RequestTimeout":
            raise Transient(place.safe(error)) from None
        raise translate_boto_error(error) from None
    except (botocore.HTTPClientError, botocore.ConnectionError, aiohttp.ClientError, OSError) as error:
        raise Transient(place.safe(error)) from None
    if len(content) != answer["ContentLength"]:
        raise Transient(f"{len(content)} of {answer['ContentLength']} bytes came")
    return PhotoFile(content, _nanoseconds(answer["LastModified"]), answer["ETag"].strip('"'))


async def _fetch_obstore(place: Place, room: Room) -> PhotoFile:
    import obstore
    from obstore.exceptions import GenericError

    _, _, rest = place.path.partition("://")
    bucket, _, key = rest.partition("/")
    try:
        answer = await obstore.get_async(obstore_at(bucket, place.options), key)
        await room(answer.meta["size"])
        content = bytes(await answer.bytes_async())
    except GenericError as error:
        raise Transient(place.safe(error)) from None
    etag = answer.meta["e_tag"]
    return PhotoFile(content, _nanoseconds(answer.meta["last_modified"]), etag and etag.strip('"'))


async def _fetch_fsspec(place: Place, room: Room) -> PhotoFile:
    """Any other file system that fsspec knows; only the bytes can be told alike of them all."""
    system, path = _shared().open(place)
    if system.async_impl:
        content = await system._cat_file(path)
    else:
        content = await asyncio.to_thread(system.cat_file, path)
    await room(len(content))
    return PhotoFile(content, None)


def _nanoseconds(moment: datetime) -> int:
    """Since 1970 UTC; stores know whole seconds, or milliseconds."""
    return 1_000_000 * round(1000 * moment.timestamp())
