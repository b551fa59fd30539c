"""One request for a photo in a store, or for how it is there: what may pass is told from what will not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from reducer.config.settings import Source
from reducer.photos.hashing import OUT_OF_MEMORY, PhotoError
from reducer.storage.location import ByteRange, Location, PhotoRef, file_of
from reducer.storage.remote import is_access_refused, nanoseconds, obstore_at

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem


@dataclass(frozen=True)
class PhotoFile:
    """A photo's bytes and what the place it lies in knows of it.

    Attributes
    ----------
    content : bytes
        The whole file, or of a `ByteRange` that part of it, or as much of its beginning as was asked for.
    mtime_ns : int or None
        Time of its last change, nanoseconds since 1970 UTC.
    etag : str or None
        Entity tag of an object in a store.
    size : int or None
        Bytes of the whole file, where ``content`` may be only its beginning.
    """

    content: bytes
    mtime_ns: int | None
    etag: str | None = None
    size: int | None = None

    @property
    def bytes(self) -> int:
        """Of the photo, whether all of it was read or not."""
        return len(self.content) if self.size is None else self.size


@dataclass(frozen=True, slots=True)
class FileState:
    """How a file was when it was read: whatever changes it changes one of these.

    Attributes
    ----------
    bytes : int or None
        Its size.
    mtime_ns, etag
        As for `PhotoFile`.
    """

    bytes: int | None
    mtime_ns: int | None
    etag: str | None

    def is_as(self, before: FileState) -> bool:
        """Whether the file is as it was: the same size, and the same etag of an object, or else time of change."""
        same = self.mtime_ns == before.mtime_ns if before.etag is None else self.etag == before.etag
        return same and self.bytes == before.bytes


class Transient(Exception):
    """A request failed for a reason that may pass."""


class NoSuchPart(PhotoError):
    """An object ends before the part that was asked for begins."""

    def __init__(self) -> None:
        super().__init__("changed", "it ends before the bytes that were asked for")


class CannotCopy(Exception):
    """A store does not copy an object itself."""


class _Clients:
    """File systems of one process, made once, since that takes longer than it seems."""

    def __init__(self) -> None:
        self.connecting = asyncio.Lock()
        self._systems: dict[str, AbstractFileSystem] = {}

    def open(self, place: Location) -> tuple[AbstractFileSystem, str]:
        """The file system, and the path in it."""
        key = json.dumps([place.path.partition("://")[0], place.options], sort_keys=True, default=repr)
        system = self._systems.get(key)
        if system is None:
            # Attempts are counted by who asks, not in the client too.
            system = self._systems[key] = place.open(attempts=1)[0]
        return system, system._strip_protocol(place.path)


@lru_cache(maxsize=1)
def _clients() -> _Clients:
    return _Clients()


#: So much of a photo is read before it is known how much is enough: what first scans of 800 x 600 pixels take, with all
#: that stands before them.
FIRST_BYTES = 2**15
#: The status of an answer to a request for bytes behind an object's end.
NO_SUCH_PART = 416

#: Waits until there is room for so many bytes of a photo; what was asked for before is given back.
Room = Callable[[int], Awaitable[None]]
#: From the beginning of a file to how many of its bytes are enough; None for all of them.
Enough = Callable[[bytes], int | None]


async def fetch(ref: PhotoRef, source: Source, room: Room) -> PhotoFile:
    """One attempt to read a URL, or a part of what lies there; a part that is not there whole is cut short."""
    return replace(await _fetch(ref, source, room), size=None)


async def fetch_start(path: str, source: Source, room: Room, enough: Enough) -> PhotoFile:
    """One attempt to read as much of an object on S3 as is enough, from its beginning.

    Parameters
    ----------
    path : str
        Its URL.
    source : Source
        How it is read.
    room : callable
        As for `fetch`.
    enough : callable
        Tells from a beginning how much is enough.
    """
    try:
        start = await _fetch(ByteRange(path, 0, FIRST_BYTES), source, room)
    except NoSuchPart:  # an empty object has no part
        return await fetch(path, source, room)
    if start.size is None:  # the server does not tell how much there is
        return await fetch(path, source, room)
    with _failures_of(Location(path, source.options)):  # no memory, say
        await room(start.size)  # refuses what is too large
        content = start.content
        while len(content) < start.size:
            wanted = enough(content)
            if wanted is not None and wanted <= len(content):
                break
            end = start.size if wanted is None else min(wanted, start.size)
            more = await _fetch(ByteRange(path, len(content), end - len(content)), source, _no_more_room)
            if (more.etag, more.mtime_ns, more.size) != (start.etag, start.mtime_ns, start.size) or not more.content:
                raise Transient("it was written anew while it was read")
            content += more.content
        await room(len(content))
        return replace(start, content=content)


async def _no_more_room(size: int) -> None:
    """Nothing to wait for: there is room for the whole photo already."""


async def _fetch(ref: PhotoRef, source: Source, room: Room) -> PhotoFile:
    """The same as `fetch`, of a part with the size of the whole where that is told."""
    place = Location(file_of(ref), source.options)
    part = None if isinstance(ref, str) else ref
    if part is not None and not part.bytes:  # HTTP has no empty range
        return PhotoFile(b"", None)
    if not place.on_s3:
        get = _fetch_fsspec
    elif source.reader == "obstore":
        get = _fetch_obstore
    else:
        get = _fetch_s3fs
    with _failures_of(place):
        return await get(place, room, part)


@contextmanager
def _failures_of(place: Location) -> Iterator[None]:
    """Turn what goes wrong with a request, and will not pass, into the photo's failure."""
    try:
        yield
    except (PhotoError, Transient):
        raise
    except FileNotFoundError:
        raise PhotoError("missing", "no such object") from None
    except MemoryError:
        raise PhotoError(OUT_OF_MEMORY, "reading it takes more than there is") from None
    except Exception as error:
        if is_access_refused(error):
            raise PhotoError("unreadable", f"access is refused ({place.safe(error)})") from None
        raise PhotoError("unreadable", place.safe(error)) from None


@contextmanager
def _s3fs_failures(place: Location) -> Iterator[None]:
    """Tell what may pass from what will not, where s3fs's own client fails."""
    import aiohttp
    import botocore.exceptions as botocore
    from s3fs.errors import translate_boto_error

    try:
        yield
    except botocore.ClientError as error:
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        if status == NO_SUCH_PART:
            raise NoSuchPart from None
        if status >= 500 or status in (408, 429) or error.response["Error"].get("Code") == "RequestTimeout":
            raise Transient(place.safe(error)) from None
        raise translate_boto_error(error) from None
    except (botocore.HTTPClientError, botocore.ConnectionError, aiohttp.ClientError, OSError) as error:
        raise Transient(place.safe(error)) from None


async def _s3fs_client(place: Location) -> tuple[Any, dict[str, str]]:
    """s3fs's own client, and how it is told of an object."""
    system, path = _clients().open(place)
    bucket, key, _ = system.split_path(path)
    async with _clients().connecting:  # one at a time: the first makes the client
        await system.set_session()
    return await system.get_s3(bucket), {"Bucket": bucket, "Key": key}


async def _fetch_s3fs(place: Location, room: Room, part: ByteRange | None) -> PhotoFile:
    """One GET, by s3fs's own client: its ``cat_file`` asks for the size first, and has retries of its own."""
    with _s3fs_failures(place):
        client, where = await _s3fs_client(place)
        if part is not None:
            where["Range"] = f"bytes={part.offset}-{part.offset + part.bytes - 1}"
        answer = await client.get_object(**where)
        async with answer["Body"] as body:
            await room(answer["ContentLength"])
            content = await body.read()
    if len(content) != answer["ContentLength"]:
        raise Transient(f"{len(content)} of {answer['ContentLength']} bytes came")
    total = answer.get("ContentRange", "").rpartition("/")[2]  # of "bytes 0-99/1234"
    size = int(total) if total.isdigit() else None
    return PhotoFile(content, nanoseconds(answer["LastModified"]), answer["ETag"].strip('"'), size)


async def _head_s3fs(place: Location) -> FileState:
    with _s3fs_failures(place):
        client, where = await _s3fs_client(place)
        answer = await client.head_object(**where)
    return FileState(answer["ContentLength"], nanoseconds(answer["LastModified"]), answer["ETag"].strip('"'))


@contextmanager
def _obstore_failures(place: Location) -> Iterator[tuple[Any, str]]:
    """obstore's store and an object's key in it; what may pass is told from what will not."""
    from obstore.exceptions import GenericError

    bucket, _, key = place.path.partition("://")[2].partition("/")
    try:
        yield obstore_at(bucket, place.options), key
    except GenericError as error:
        if f"{NO_SUCH_PART} Range Not Satisfiable" in str(error):
            raise NoSuchPart from None
        raise Transient(place.safe(error)) from None


async def _fetch_obstore(place: Location, room: Room, part: ByteRange | None) -> PhotoFile:
    import obstore

    options: Any = {} if part is None else {"range": (part.offset, part.offset + part.bytes)}
    with _obstore_failures(place) as (store, key):
        answer = await obstore.get_async(store, key, options=options)
        start, end = answer.range
        await room(end - start)
        content = bytes(await answer.bytes_async())
    state = _obstore_state(answer.meta)
    return PhotoFile(content, state.mtime_ns, state.etag, None if part is None else state.bytes)


async def _head_obstore(place: Location) -> FileState:
    import obstore

    with _obstore_failures(place) as (store, key):
        return _obstore_state(await obstore.head_async(store, key))


def _obstore_state(meta: Mapping[str, Any]) -> FileState:
    etag = meta["e_tag"]
    return FileState(meta["size"], nanoseconds(meta["last_modified"]), etag and etag.strip('"'))


async def _fetch_fsspec(place: Location, room: Room, part: ByteRange | None) -> PhotoFile:
    """Any other file system that fsspec knows; only the bytes can be told alike of them all."""
    system, path = _clients().open(place)
    start, end = (None, None) if part is None else (part.offset, part.offset + part.bytes)
    if system.async_impl:
        content = await system._cat_file(path, start=start, end=end)
    else:
        content = await asyncio.to_thread(system.cat_file, path, start=start, end=end)
    if part is not None and len(content) > part.bytes:
        raise PhotoError("unreadable", "the server gives no parts of files")
    await room(len(content))
    return PhotoFile(content, None)


async def state_of(path: str, source: Source) -> FileState | None:
    """One attempt to ask a store how a file is; None of other servers, not all of which tell."""
    place = Location(path, source.options)
    if not place.on_s3:
        return None
    head = _head_obstore if source.reader == "obstore" else _head_s3fs
    with _failures_of(place):
        return await head(place)


async def copy_object(path: str, target: Location, state: FileState, source: Source) -> int:
    """One attempt to let a store copy an object itself: none of its bytes comes here.

    Parameters
    ----------
    path : str
        Its URL.
    target : Location
        Where to, in the same store.
    state : FileState
        Bytes and etag that it must have, as far as those are known.
    source : Source
        How the store is opened.

    Returns
    -------
    int
        Its bytes.

    Raises
    ------
    PhotoError
        If it is not there, or is another one.
    CannotCopy
        If the store does not do that, or not for us.
    """
    place = Location(path, source.options)
    with _failures_of(place), _s3fs_failures(place):
        client, where = await _s3fs_client(place)
        head = await client.head_object(**where)
    if state.bytes not in (None, head["ContentLength"]):
        raise another_size(head["ContentLength"], state.bytes)
    if state.etag not in (None, head["ETag"].strip('"')):
        raise another_object()
    try:
        with _s3fs_failures(target):
            _, there = await _s3fs_client(target)
            await client.copy_object(**there, CopySource=where, CopySourceIfMatch=head["ETag"])
    except Transient:
        raise
    except Exception as error:
        raise CannotCopy(target.safe(error)) from None
    found: int = head["ContentLength"]
    return found


def another_size(size: int, before: int | None) -> PhotoError:
    """The failure of a photo that is not the one that was listed; sizes in bytes."""
    return PhotoError("changed", f"it has {size:,} bytes, and had {before:,} when the run read or listed it")


def another_object() -> PhotoError:
    """The failure of a photo in a store that was written anew."""
    return PhotoError("changed", "it is not the object that the run read: its etag is another")
