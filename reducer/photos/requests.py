"""One request to a store for a photo or for its state: what may pass is told apart from what will not."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

from reducer.config.settings import Source
from reducer.errors import StoreError
from reducer.photos.hashing import OUT_OF_MEMORY, PhotoError
from reducer.storage.location import ByteRange, Location, PhotoRef, file_of
from reducer.storage.remote import (
    CREDENTIALS_ENDED,
    Transient,
    is_access_refused,
    may_pass,
    nanoseconds,
    obstore_at,
)

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

#: Bytes of a photo that are read before it is known how many are enough: what first scans of 800 x 600 pixels take,
#: with all that stands before them.
FIRST_BYTES = 2**15
#: HTTP status of an answer to a request for bytes behind the end of an object.
NO_SUCH_PART = 416
#: HTTP status and S3's code in the errors of obstore.
OBSTORE_STATUS, OBSTORE_CODE = re.compile(r"status code: (\d{3})"), re.compile(r"<Code>(\w+)</Code>")
#: Failure of a photo whose object is not in its store.
NO_OBJECT = ("missing", "no such object")

#: Waits until there is room for a number of bytes of a photo; room that was taken for it before is given back.
Room = Callable[[int], Awaitable[None]]
#: From the beginning of a file to the number of its bytes that are enough; None for all of them.
Enough = Callable[[bytes], int | None]


@dataclass(frozen=True)
class PhotoFile:
    """Bytes of a photo, and what its store tells of it.

    Attributes
    ----------
    content : bytes
        The whole file; of a `ByteRange` that part of it; or the beginning that was asked for.
    mtime_ns : int or None
        Time of the last change, nanoseconds since 1970 UTC.
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
        """Bytes of the photo, whether all of it was read or not."""
        return len(self.content) if self.size is None else self.size


@dataclass(frozen=True, slots=True)
class FileState:
    """State of a file when it was read: any change of the file changes one of these.

    Attributes
    ----------
    bytes : int or None
        Size of the file.
    mtime_ns : int or None
        Time of the last change, nanoseconds since 1970 UTC.
    etag : str or None
        Entity tag of an object in a store.
    """

    bytes: int | None
    mtime_ns: int | None
    etag: str | None

    def is_as(self, before: FileState) -> bool:
        """Tell whether the file is unchanged: equal size, and equal etag of an object, or else time of change."""
        same = self.mtime_ns == before.mtime_ns if before.etag is None else self.etag == before.etag
        return same and self.bytes == before.bytes


@dataclass(frozen=True)
class ObjectPage:
    """A page of a listing of S3.

    Attributes
    ----------
    root : str
        URL of the bucket.
    sizes : dict of str to int
        Bytes of the objects by their URLs.
    last : str or None
        URL of the last of them; None where no more follow.
    """

    root: str
    sizes: dict[str, int]
    last: str | None


class NoSuchPart(PhotoError):
    """An object ends before the part that was asked for begins."""

    def __init__(self) -> None:
        super().__init__("changed", "it ends before the bytes that were asked for")


class AccessRefused(PhotoError):
    """Access to a photo is refused; perhaps only to this one."""


class Unanswered(PhotoError):
    """No attempt to read a photo has succeeded; perhaps that of no other would."""


class CannotCopy(Exception):
    """A store does not copy an object itself."""


class StoreClient(Protocol):
    """One way to ask stores: each method makes one request, once.

    Notes
    -----
    fsspec's own methods are no such way for S3: ``_cat_file`` of s3fs and of obstore's ``FsspecStore`` gives bytes
    without their etag, time and length, so a second request (HEAD) would be needed for each photo, could tell of
    another object than the one that was read, and the bytes would be in memory before there is room for them.
    """

    async def get(self, location: Location, part: ByteRange | None, room: Room) -> PhotoFile:
        """Read an object or a part of it, with the size of the whole where that is told; wait for room first."""

    async def head(self, location: Location) -> FileState | None:
        """Return the state of an object; None from servers that need not tell."""

    def translated(self, error: Exception, location: Location) -> Exception:
        """Return `Transient` for an error that may pass, `NoSuchPart`, or one of Python's own; else the error."""


class _FsspecClient:
    """Any file system that fsspec knows; only the bytes are told alike by them all."""

    def __init__(self) -> None:
        self._systems: dict[str, AbstractFileSystem] = {}

    def open(self, location: Location) -> tuple[AbstractFileSystem, str]:
        """Return the file system, made once since that takes long, and the path in it."""
        key = json.dumps([location.path.partition("://")[0], location.options], sort_keys=True, default=repr)
        system = self._systems.get(key)
        if system is None:
            # Attempts are counted by the caller, not in the client too.
            system = self._systems[key] = location.open(attempts=1)[0]
        return system, system._strip_protocol(location.path)

    async def get(self, location: Location, part: ByteRange | None, room: Room) -> PhotoFile:
        system, path = self.open(location)
        start, end = (None, None) if part is None else (part.offset, part.offset + part.bytes)
        if system.async_impl:
            content = await system._cat_file(path, start=start, end=end)
        else:
            content = await asyncio.to_thread(system.cat_file, path, start=start, end=end)
        if part is not None and len(content) > part.bytes:
            raise PhotoError("unreadable", "the server gives no parts of files")
        await room(len(content))
        return PhotoFile(content, None)

    async def head(self, location: Location) -> FileState | None:
        return None

    async def size(self, location: Location) -> int | None:
        """Return the bytes of a file, where the server tells them."""
        system, path = self.open(location)
        info = await system._info(path) if system.async_impl else await asyncio.to_thread(system.info, path)
        if info["type"] == "directory":
            raise PhotoError("not a file", "the path is a directory")
        size: int | None = info["size"]
        return size

    def translated(self, error: Exception, location: Location) -> Exception:
        return error


class _S3fsClient(_FsspecClient):
    """S3 by the client that s3fs holds: s3fs's own methods make more requests, and retry by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self._connecting = asyncio.Lock()

    async def _client(self, location: Location) -> tuple[Any, dict[str, str]]:
        """Return aiobotocore's client, and the object as its methods are told of it."""
        system, path = self.open(location)
        bucket, key, _ = system.split_path(path)
        async with self._connecting:  # one at a time: the first makes the client
            await system.set_session()
        return await system.get_s3(bucket), {"Bucket": bucket, "Key": key}

    async def get(self, location: Location, part: ByteRange | None, room: Room) -> PhotoFile:
        client, request = await self._client(location)
        if part is not None:
            request["Range"] = f"bytes={part.offset}-{part.offset + part.bytes - 1}"
        answer = await client.get_object(**request)
        length = answer["ContentLength"]
        async with answer["Body"] as body:
            await room(length)
            content = await body.read()
        if len(content) != length:
            raise Transient(f"{len(content)} of {length} bytes came")
        total = answer.get("ContentRange", "").rpartition("/")[2]  # of "bytes 0-99/1234"
        state = self._state(answer)
        return PhotoFile(content, state.mtime_ns, state.etag, int(total) if total.isdigit() else None)

    async def head(self, location: Location) -> FileState:
        client, request = await self._client(location)
        return self._state(await client.head_object(**request))

    async def page(self, location: Location) -> ObjectPage:
        """List a page of objects from one on, in the order of their keys, which is that of their URLs."""
        client, request = await self._client(location)
        root = location.path.removesuffix(request["Key"])
        # Behind the key without its end, since what is named comes not with the answer itself.
        answer = await client.list_objects_v2(Bucket=request["Bucket"], StartAfter=request["Key"][:-1])
        sizes = {root + found["Key"]: found["Size"] for found in answer.get("Contents", ())}
        return ObjectPage(root, sizes, max(sizes) if answer["IsTruncated"] and sizes else None)

    async def copy(self, location: Location, target: Location, etag: str | None) -> None:
        """Let the store copy an object, if it still has the etag: none of its bytes comes here."""
        client, request = await self._client(target)
        _, source = await self._client(location)
        await client.copy_object(**request, CopySource=source, CopySourceIfMatch=f'"{etag}"')

    @staticmethod
    def _state(answer: Mapping[str, Any]) -> FileState:
        return FileState(answer["ContentLength"], nanoseconds(answer["LastModified"]), answer["ETag"].strip('"'))

    def translated(self, error: Exception, location: Location) -> Exception:
        import aiohttp
        import botocore.exceptions as botocore
        from s3fs.errors import translate_boto_error

        passing = (botocore.HTTPClientError, botocore.ConnectionError, aiohttp.ClientError, OSError)
        if isinstance(error, botocore.ClientError):
            status = error.response["ResponseMetadata"]["HTTPStatusCode"]
            code = error.response["Error"].get("Code")
            refused = _refusal(status, code, location.safe(error))
            return refused or (
                Transient(location.safe(error)) if may_pass(status, code) else translate_boto_error(error)
            )
        return Transient(location.safe(error)) if isinstance(error, passing) else error


class _ObstoreClient:
    """S3 by obstore."""

    @staticmethod
    def _store(location: Location) -> tuple[Any, str]:
        """Return obstore's store for the bucket, and the key in it."""
        bucket, _, key = location.path.partition("://")[2].partition("/")
        return obstore_at(bucket, location.options), key

    async def get(self, location: Location, part: ByteRange | None, room: Room) -> PhotoFile:
        store, key = self._store(location)
        options = {} if part is None else {"range": (part.offset, part.offset + part.bytes)}
        answer = await store.get_async(key, options=options)
        start, end = answer.range
        await room(end - start)
        content = bytes(await answer.bytes_async())
        state = self._state(answer.meta)
        return PhotoFile(content, state.mtime_ns, state.etag, state.bytes)

    async def head(self, location: Location) -> FileState:
        store, key = self._store(location)
        return self._state(await store.head_async(key))

    @staticmethod
    def _state(meta: Mapping[str, Any]) -> FileState:
        etag = meta["e_tag"]
        return FileState(meta["size"], nanoseconds(meta["last_modified"]), etag and etag.strip('"'))

    def translated(self, error: Exception, location: Location) -> Exception:
        from obstore.exceptions import GenericError

        text, line = str(error), location.safe(error)
        if found := OBSTORE_STATUS.search(text):
            status, code = int(found[1]), OBSTORE_CODE.search(text)
            if refused := _refusal(status, code and code[1], line):
                return refused
            if may_pass(status, code and code[1]):
                return Transient(line)
            return PhotoError("unreadable", line) if isinstance(error, GenericError) else error
        return Transient(line) if isinstance(error, GenericError) else error


def _refusal(status: int, code: str | None, message: str) -> Exception | None:
    """Return what an answer means that is no fault of the photo, or that may be none; None for others."""
    if code in CREDENTIALS_ENDED:
        return StoreError(f"the store takes the credentials no more ({message}): give others")
    if status == NO_SUCH_PART:
        return NoSuchPart()
    # The answer to HEAD has no body, so no code.
    if status in (401, 403) or (status == 400 and code in (None, "400")):
        return AccessRefused("unreadable", f"access is refused ({message})")
    return None


#: The clients of S3 by the names of ``--reader``.
S3_CLIENTS: dict[str, type[StoreClient]] = {"s3fs": _S3fsClient, "obstore": _ObstoreClient}


@cache
def _made(kind: type[StoreClient]) -> StoreClient:
    """Return the client of a kind, one per process; all of it runs in the loop's thread."""
    return kind()


@contextmanager
def _client_of(location: Location, reader: str) -> Iterator[StoreClient]:
    """Yield the client for a URL; any error becomes `Transient` where it may pass, else the failure of the photo."""
    client = _made(S3_CLIENTS[reader] if location.on_s3 else _FsspecClient)
    try:
        yield client
    except (PhotoError, Transient, CannotCopy, StoreError):
        raise
    except Exception as original:
        error = client.translated(original, location)
        if isinstance(error, PhotoError | Transient | StoreError):
            raise error from None
        if isinstance(error, FileNotFoundError):
            raise PhotoError(*NO_OBJECT) from None
        if isinstance(error, MemoryError):
            raise PhotoError(OUT_OF_MEMORY, "reading it takes more than there is") from None
        if is_access_refused(error):
            raise AccessRefused("unreadable", f"access is refused ({location.safe(error)})") from None
        raise PhotoError("unreadable", location.safe(error)) from None


async def fetch(ref: PhotoRef, source: Source, room: Room) -> PhotoFile:
    """Make one attempt to read a URL or a part of its file; a part that is not there whole is cut short."""
    return replace(await _fetch(ref, source, room), size=None)


async def fetch_start(path: str, source: Source, room: Room, enough: Enough) -> PhotoFile:
    """Make one attempt to read as much of an object on S3 as is enough, from its beginning.

    Parameters
    ----------
    path : str
        URL of the object.
    source : Source
        How URLs are read.
    room : callable
        Waits for room before bytes are read, as for `fetch`.
    enough : callable
        Tells from a beginning how many bytes are enough.
    """
    try:
        start = await _fetch(ByteRange(path, 0, FIRST_BYTES), source, room)
    except NoSuchPart:  # an empty object has no part
        return await fetch(path, source, room)
    if start.size is None:  # the server does not tell how much there is
        return await fetch(path, source, room)
    with _client_of(Location(path, source.options), source.reader):  # no memory, say
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
    """Wait for nothing: there is room for the whole photo already."""


async def _fetch(ref: PhotoRef, source: Source, room: Room) -> PhotoFile:
    """Make one attempt as `fetch`; of a part also the size of the whole is given, where that is told."""
    location = Location(file_of(ref), source.options)
    part = None if isinstance(ref, str) else ref
    if part is not None and not part.bytes:  # HTTP has no empty range
        return PhotoFile(b"", None)
    with _client_of(location, source.reader) as client:
        return await client.get(location, part, room)


async def state_of(path: str, source: Source) -> FileState | None:
    """Make one attempt to ask a store for the state of a file; None from stores other than S3: not all of them tell."""
    location = Location(path, source.options)
    with _client_of(location, source.reader) as client:
        return await client.head(location)


async def size_of(path: str, source: Source) -> int | None:
    """Make one attempt to ask a server for the bytes of a file; None where it does not tell."""
    location = Location(path, source.options)
    with _client_of(location, source.reader) as client:
        if isinstance(client, _FsspecClient) and not location.on_s3:
            return await client.size(location)
        state = await client.head(location)
        return None if state is None else state.bytes


async def page_from(path: str, source: Source) -> ObjectPage:
    """Make one attempt to list a page of objects of S3, from one on; s3fs's client does it for every reader."""
    location = Location(path, source.options)
    with _client_of(location, "s3fs") as client:
        assert isinstance(client, _S3fsClient)
        return await client.page(location)


async def copy_object(path: str, target: Location, state: FileState, source: Source) -> int:
    """Make one attempt to let a store copy an object itself: none of its bytes comes here.

    s3fs's client does it for every reader: obstore's copy has no condition on the etag.

    Parameters
    ----------
    path : str
        URL of the object.
    target : Location
        Where to, in the same store.
    state : FileState
        Bytes and etag that the object must have, as far as those are known.
    source : Source
        How the store is opened.

    Returns
    -------
    int
        Bytes of the object.

    Raises
    ------
    PhotoError
        If the object is not there, or is another one.
    CannotCopy
        If the store does not do that, or not for us.
    """
    location = Location(path, source.options)
    with _client_of(location, "s3fs") as client:
        assert isinstance(client, _S3fsClient)
        now = await client.head(location)
        assert now.bytes is not None
        if state.bytes not in (None, now.bytes):
            raise another_size(now.bytes, state.bytes)
        if state.etag not in (None, now.etag):
            raise another_object()
        try:
            await client.copy(location, target, now.etag)
        except Exception as original:
            error = client.translated(original, target)
            if isinstance(error, Transient):
                raise error from None
            raise CannotCopy(target.safe(error)) from None
    return now.bytes


def another_size(size: int, before: int | None) -> PhotoError:
    """Return the failure of a photo that is not the one that was listed; sizes in bytes."""
    return PhotoError("changed", f"it has {size:,} bytes, and had {before:,} when the run read or listed it")


def another_object() -> PhotoError:
    """Return the failure of a photo in a store that was written anew."""
    return PhotoError("changed", "it is not the object that the run read: its etag is another")
