"""Write photos to TARGET: read, check, make smaller, put; in this process, which may be a worker."""

from __future__ import annotations

import errno
import io
import os
import tarfile
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, TypeVar

from reducer.config.settings import PhotoSettings, Source
from reducer.errors import ReducerError
from reducer.outputs.export.layout import SideFiles, in_shard
from reducer.photos.disk import read_photo
from reducer.photos.hashing import PhotoError, pillow_settings
from reducer.photos.reader import copy_in_store, read_all
from reducer.photos.requests import FileState, PhotoFile, another_object, another_size
from reducer.photos.resize import resized
from reducer.photos.sandbox import refused_in_sandbox
from reducer.storage.atomic import whole_file, whole_object, write_file
from reducer.storage.location import ByteRange, Location, PhotoRef, file_of, is_url

T = TypeVar("T")

#: Bytes of photos that are read and not yet written, at most, besides the next one.
HELD_BYTES = 64 * 2**20
#: Puts to a store at a time.
PUTS = 32
#: Seconds that a photo may take that was never decoded before, twice.
TRIED = 30.0
#: Errors of a file's name, or of what lies in its place, and not of the disk.
OF_THE_NAME = (
    errno.ENAMETOOLONG,
    errno.EINVAL,
    errno.EILSEQ,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENOTEMPTY,
)
#: Errors for which a file is copied instead of linked.
NO_LINK = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOSYS, errno.EOPNOTSUPP)
FULL = (errno.ENOSPC, errno.EDQUOT)
#: Attempts to send a shard to a store.
ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class CopyRequest:
    """A photo to be written.

    Attributes
    ----------
    ref : str or ByteRange
        Where the photo lies.
    path : str
        Where to write it, below the target; in a shard, its name there.
    bytes : int or None
        Size that it must have; None if unknown.
    is_known : bool
        Whether it was decoded before: then it is not tried in a process of its own first.
    side_files : tuple of (str, bytes)
        In a shard, files that go with it: extensions and contents.
    etag : str or None
        Entity tag that it must have; None if unknown.
    """

    ref: PhotoRef
    path: str
    bytes: int | None
    is_known: bool = True
    side_files: SideFiles = ()
    etag: str | None = None


@dataclass(frozen=True, slots=True)
class CopyResult:
    """Result of a `CopyRequest`.

    Attributes
    ----------
    read, written : int
        Bytes; 0 if it failed.
    error : str or None
        Why the photo is not there, in one line.
    copied_not_linked : bool
        Whether it is a copy though a link was asked for.
    """

    read: int = 0
    written: int = 0
    error: str | None = None
    copied_not_linked: bool = False


@dataclass(frozen=True, slots=True)
class Encoded:
    """Bytes to write for a photo.

    Attributes
    ----------
    content : bytes
        The bytes.
    read : int
        Bytes of the photo that they were made from.
    mtime_ns : int or None
        Time of the last change of the photo, or its shard, nanoseconds since 1970 UTC.
    """

    content: bytes = field(repr=False)
    read: int
    mtime_ns: int | None


@dataclass(frozen=True)
class CopySettings:
    """Settings by which photos are written; travels to the workers.

    Attributes
    ----------
    source : Source
        How photos are read.
    target : Location
        Folder to write to.
    photo_settings : PhotoSettings
        ``max_pixels`` bounds what is read; by the others photos are tried.
    resize : int, optional
        Pixels of the longest side.
    link : bool
        Whether to make hard links.
    threads : int
        Photos that are written at a time.
    decoders : int
        Photos that are decoded at a time: each takes a core, and memory by its pixels.
    """

    source: Source
    target: Location
    photo_settings: PhotoSettings
    resize: int | None = None
    link: bool = False
    threads: int = PUTS
    decoders: int = 1

    def in_store(self, request: CopyRequest) -> bool:
        """Return whether the store may copy a photo itself: it is one store, as far as can be told, and no resize."""
        location = Location(request.ref) if isinstance(request.ref, str) else None
        both = location is not None and location.on_s3 and self.target.on_s3
        return both and self.resize is None and self.source.options == self.target.options


@dataclass(frozen=True)
class Batch:
    """Photos that are written together; travels inside a Dask task, which may be printed.

    Attributes
    ----------
    numbers : tuple of int
        Number of each photo for the caller.
    copies : tuple of CopyRequest
        The photos, in the same order.
    shard : str or None
        Shard that all of them are written into; None for single files.
    """

    numbers: tuple[int, ...] = field(repr=False)
    copies: tuple[CopyRequest, ...] = field(repr=False)
    shard: str | None = None


def write_batch(batch: Batch, settings: CopySettings, *, memory_beside: int | None = None) -> Generator[CopyResult]:
    """Write photos in this process.

    Parameters
    ----------
    batch : Batch
        The photos.
    settings : CopySettings
        How they are written.
    memory_beside : int, optional
        Bytes for the process in which photos are tried that were never decoded before.

    Yields
    ------
    CopyResult
        Result of each photo, in their order; with a shard, once it is whole.

    Raises
    ------
    ReducerError
        If the target cannot be written.
    """
    unknown = [request.ref for request in batch.copies if not request.is_known] if settings.resize else []
    refused = {}
    if unknown:
        refused = refused_in_sandbox(
            unknown, settings.photo_settings, settings.source, memory=memory_beside, patience=TRIED
        )
    encode = _Encoder(settings, refused)
    if batch.shard is not None:
        yield from _write_shard(batch.shard, batch.copies, settings, encode)
        return
    copied = _copied_in_store(batch.copies, settings)
    rest = [request for request, result in zip(batch.copies, copied, strict=True) if result is None]
    with closing(_each(rest, settings, partial(_write_file, settings=settings, encode=encode))) as written:
        for result in copied:
            yield next(written) if result is None else result


def _copied_in_store(requests: Sequence[CopyRequest], settings: CopySettings) -> list[CopyResult | None]:
    """Return the results of the photos that the store has copied itself; None for others."""
    by_store = [number for number, request in enumerate(requests) if settings.in_store(request)]
    results: list[CopyResult | None] = [None] * len(requests)
    if not by_store:
        return results
    copies = [requests[number] for number in by_store]
    sizes = copy_in_store(
        [file_of(request.ref) for request in copies],
        [settings.target.below(request.path) for request in copies],
        [FileState(request.bytes, None, request.etag) for request in copies],
        settings.source,
        at_a_time=settings.threads,
    )
    for number, size in zip(by_store, sizes, strict=True):
        if isinstance(size, PhotoError):
            results[number] = CopyResult(error=str(size))
        elif size is not None:
            results[number] = CopyResult(size, size)
    return results


Act = Callable[[CopyRequest, PhotoFile | PhotoError | None], T]


def _each(requests: Sequence[CopyRequest], settings: CopySettings, act: Act[T]) -> Generator[T]:
    """Call a function for each photo, in threads, and yield the results in order.

    It is given the photo's bytes, read ahead; None for photos of a disk, which the threads read themselves.
    """
    ahead = any(is_url(file_of(request.ref)) for request in requests)
    max_pixels = settings.photo_settings.max_pixels
    refs = [request.ref for request in requests] if ahead else []
    waiting: deque[tuple[Future[T], int]] = deque()
    held = 0
    with (
        pillow_settings(max_pixels),
        closing(read_all(refs, settings.source, max_pixels=max_pixels)) as files,
        ThreadPoolExecutor(settings.threads) as pool,
    ):
        try:
            for request in requests:
                file = next(files) if ahead else None
                size = len(file.content) if isinstance(file, PhotoFile) else request.bytes or 0
                while waiting and (len(waiting) >= 2 * settings.threads or held + size > HELD_BYTES):
                    future, held_size = waiting.popleft()
                    yield future.result()
                    held -= held_size
                waiting.append((pool.submit(act, request, file), size))
                held += size
            while waiting:
                yield waiting.popleft()[0].result()
        finally:
            for future, _ in waiting:
                future.cancel()


class _Encoder:
    """Reads and checks photos, and makes them smaller where that is asked for; in threads.

    Parameters
    ----------
    settings : CopySettings
        How photos are written.
    refused : dict
        Photos that must not be decoded, and why.
    """

    def __init__(self, settings: CopySettings, refused: dict[PhotoRef, str]) -> None:
        self.settings, self.refused = settings, refused
        self.gate = threading.BoundedSemaphore(settings.decoders)

    def __call__(self, request: CopyRequest, file: PhotoFile | PhotoError | None) -> Encoded | str:
        """Return the bytes to write for a photo, or in one line why there are none."""
        if request.ref in self.refused:
            return self.refused[request.ref]
        max_pixels = self.settings.photo_settings.max_pixels
        try:
            if file is None:
                file = read_photo(request.ref, max_pixels=max_pixels)
            elif isinstance(file, PhotoError):
                return str(file)
            content, size = file.content, len(file.content)
            check_size(size, request)
            if request.etag is not None and file.etag not in (None, request.etag):
                raise another_object()
            if self.settings.resize is not None:
                with self.gate:
                    content = resized(content, self.settings.resize, max_pixels=max_pixels)
        except PhotoError as error:
            return str(error)
        mtime_ns = request.ref.mtime_ns if isinstance(request.ref, ByteRange) else None
        return Encoded(content, size, file.mtime_ns if mtime_ns is None else mtime_ns)


def check_size(size: int, request: CopyRequest) -> None:
    """Refuse a photo that is not the one that was listed.

    Raises
    ------
    PhotoError
        If it has another size.
    """
    if request.bytes is not None and size != request.bytes:
        raise another_size(size, request.bytes)


def _write_file(
    request: CopyRequest, file: PhotoFile | PhotoError | None, settings: CopySettings, encode: _Encoder
) -> CopyResult:
    if settings.link and (linked := _link(request, settings)) is not None:
        return linked
    encoded = encode(request, file)
    if isinstance(encoded, str):
        return CopyResult(error=encoded)
    location = settings.target.below(request.path)
    if location.remote:
        write_file(location, encoded.content)
    else:
        try:
            _put(Path(location.path), encoded.content, encoded.mtime_ns)
        except OSError as error:
            return _refusal(settings.target, error)
    return CopyResult(encoded.read, len(encoded.content), copied_not_linked=settings.link)


def _refusal(target: Location, error: OSError) -> CopyResult:
    """Return the result of a photo that cannot be written.

    Raises
    ------
    ReducerError
        If no other photo could be written either.
    """
    if error.errno in OF_THE_NAME:
        return CopyResult(error=f"not written: {error.strerror}")
    raise disk_failure(target, error) from None


def _put(path: Path, content: bytes, mtime_ns: int | None) -> None:
    # Not synced: a disk takes milliseconds for each. A file that a crash of the machine cuts short has another size.
    for again in (True, False):
        try:
            with whole_file(path, synced=False, mtime_ns=mtime_ns) as file:
                file.write(content)
        except FileNotFoundError:
            if not again:
                raise
            path.parent.mkdir(parents=True, exist_ok=True)
        else:
            return


def _link(request: CopyRequest, settings: CopySettings) -> CopyResult | None:
    """Make a hard link, and return its result; None where it cannot be made."""
    source, path = os.path.realpath(file_of(request.ref)), Path(settings.target.below(request.path).path)
    if not os.path.isfile(source):  # reading it tells what is wrong
        return None
    try:
        size = os.stat(source).st_size
        check_size(size, request)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        os.link(source, path)
    except PhotoError as error:
        return CopyResult(error=str(error))
    except OSError as error:
        return None if error.errno in NO_LINK else _refusal(settings.target, error)
    return CopyResult(size, size)


def disk_failure(target: Location, error: OSError) -> ReducerError:
    """Return the error to raise when a target cannot be written any more."""
    if error.errno in FULL:
        return ReducerError(
            f"the disk of {target.path} is full: what is there is whole. Make room, then give the same command again: "
            "it goes on from here"
        )
    return ReducerError(f"{target.path} cannot be written: {error.strerror or error}")


def _write_shard(
    name: str, requests: Sequence[CopyRequest], settings: CopySettings, encode: _Encoder
) -> list[CopyResult]:
    location = settings.target.below(name)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return _write_shard_once(location, requests, settings, encode)
        except OSError as error:
            if not location.remote:
                raise disk_failure(settings.target, error) from None
            if attempt == ATTEMPTS:
                raise ReducerError(f"{location.path} cannot be written: {location.safe(error)}") from None
        except Exception as error:
            if attempt == ATTEMPTS or not location.remote:
                raise ReducerError(f"{location.path} cannot be written: {location.safe(error)}") from None
        time.sleep(2.0**attempt)
    raise AssertionError


def _write_shard_once(
    location: Location, requests: Sequence[CopyRequest], settings: CopySettings, encode: _Encoder
) -> list[CopyResult]:
    """Write a tar whose bytes depend on its photos only, and return their results."""
    results = []
    with (
        _sink(location) as sink,
        closing(_each(requests, settings, encode)) as files,
        tarfile.open(fileobj=sink, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for request, encoded in zip(requests, files, strict=True):
            if isinstance(encoded, str):
                results.append(CopyResult(error=encoded))
                continue
            side_files = ((in_shard(request.path, ending), part) for ending, part in request.side_files)
            for name, content in ((request.path, encoded.content), *side_files):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            results.append(CopyResult(encoded.read, len(encoded.content)))
    return results


def _sink(location: Location) -> AbstractContextManager[IO[bytes]]:
    return whole_object(location) if location.remote else whole_file(Path(location.path))
