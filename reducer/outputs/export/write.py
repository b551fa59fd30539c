"""Photos written to where they are to lie: read, checked, made smaller, put; in this process or on a cluster."""

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
from reducer.photos.hashing import PhotoError, pillow_settings
from reducer.photos.reader import copy_in_store, read_all, read_photo
from reducer.photos.requests import FileState, PhotoFile, another_object, another_size
from reducer.photos.resize import resized
from reducer.photos.sandbox import refused_in_sandbox
from reducer.storage.atomic import whole_file, whole_object, write_file
from reducer.storage.location import ByteRange, Location, PhotoRef, file_of, is_url

T = TypeVar("T")

#: Photos that are read and not yet written take at most so many bytes, beside the next one.
HELD_BYTES = 64 * 2**20
#: Puts to a store that are under way at a time.
PUTS = 32
#: Seconds that a photo which no one has decoded yet may take, twice.
TRIED = 30.0
#: What is wrong with a file's name or what lies at its place, and not with the disk.
OF_THE_NAME = (
    errno.ENAMETOOLONG,
    errno.EINVAL,
    errno.EILSEQ,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENOTEMPTY,
)
#: Why a file cannot be linked, and is copied.
NO_LINK = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOSYS, errno.EOPNOTSUPP)
FULL = (errno.ENOSPC, errno.EDQUOT)
#: A shard that fails on its way to a store is sent anew, so often in all.
ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class CopyRequest:
    """A photo to be written.

    Attributes
    ----------
    ref : str or ByteRange
        Where it lies.
    path : str
        Where it is to lie, below the target; in a shard, what it is to be called.
    bytes : int or None
        The size that it must have; None where that is not known.
    is_known : bool
        Whether it was decoded before: then it is not tried in a process of its own first.
    side_files : tuple of (str, bytes)
        In a shard, files that go with it: extensions and contents.
    etag : str or None
        Entity tag that it must have; None where that is not known.
    """

    ref: PhotoRef
    path: str
    bytes: int | None
    is_known: bool = True
    side_files: SideFiles = ()
    etag: str | None = None


@dataclass(frozen=True, slots=True)
class CopyResult:
    """What came of it.

    Attributes
    ----------
    read, written : int
        Bytes; 0 where it failed.
    error : str or None
        Why it is not there, in one line.
    copied_not_linked : bool
        Whether it is a copy where a link was wanted.
    """

    read: int = 0
    written: int = 0
    error: str | None = None
    copied_not_linked: bool = False


@dataclass(frozen=True, slots=True)
class Encoded:
    """What is written for a photo.

    Attributes
    ----------
    content : bytes
    read : int
        Bytes that it was made from.
    mtime_ns : int or None
        When the photo, or its shard, was last changed, nanoseconds since 1970 UTC.
    """

    content: bytes = field(repr=False)
    read: int
    mtime_ns: int | None


@dataclass(frozen=True)
class CopySettings:
    """How photos are written; travels to the workers.

    Attributes
    ----------
    source : Source
        How they are read.
    target : Location
        The folder to write to.
    settings : PhotoSettings
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
    settings: PhotoSettings
    resize: int | None = None
    link: bool = False
    threads: int = PUTS
    decoders: int = 1

    def in_store(self, copy: CopyRequest) -> bool:
        """Whether the store may copy a photo itself: it is one store, as far as can be told, and the bytes stay."""
        place = Location(copy.ref) if isinstance(copy.ref, str) else None
        both = place is not None and place.on_s3 and self.target.on_s3
        return both and self.resize is None and self.source.options == self.target.options


@dataclass(frozen=True)
class Batch:
    """Photos that are written together; travels inside a Dask task, which may be printed.

    Attributes
    ----------
    numbers : tuple of int
        What who sends them calls them.
    copies : tuple of CopyRequest
    shard : str or None
        The shard that all of them are written into.
    """

    numbers: tuple[int, ...] = field(repr=False)
    copies: tuple[CopyRequest, ...] = field(repr=False)
    shard: str | None = None


def write_group(group: Batch, way: CopySettings, *, memory_beside: int | None = None) -> Generator[CopyResult]:
    """Write photos in this process.

    Parameters
    ----------
    group : Batch
        Which.
    way : CopySettings
        How.
    memory_beside : int, optional
        Bytes that a process may take in which photos are tried that no one has decoded yet.

    Yields
    ------
    CopyResult
        One a photo, in their order; of a shard, when it is whole.

    Raises
    ------
    ReducerError
        If the target cannot be written.
    """
    unknown = [copy.ref for copy in group.copies if not copy.is_known] if way.resize else []
    refused = (
        refused_in_sandbox(unknown, way.settings, way.source, memory=memory_beside, patience=TRIED) if unknown else {}
    )
    make = _Maker(way, refused)
    if group.shard is None:
        own = _copied_in_store(group.copies, way)
        rest = [copy for copy, done in zip(group.copies, own, strict=True) if done is None]
        with closing(_each(rest, way, partial(_write_file, way=way, make=make))) as written:
            for done in own:
                yield next(written) if done is None else done
    else:
        yield from _write_shard(group.shard, group.copies, way, make)


def _copied_in_store(copies: Sequence[CopyRequest], way: CopySettings) -> list[CopyResult | None]:
    """What has come of the photos that the store has copied itself; None of others."""
    own = [copy for copy in copies if way.in_store(copy)]
    found = iter(
        copy_in_store(
            [file_of(copy.ref) for copy in own],
            [way.target.below(copy.path) for copy in own],
            [FileState(copy.bytes, None, copy.etag) for copy in own],
            way.source,
            at_a_time=way.threads,
        )
        if own
        else ()
    )
    results = [next(found) if way.in_store(copy) else None for copy in copies]
    return [
        CopyResult(error=str(one)) if isinstance(one, PhotoError) else None if one is None else CopyResult(one, one)
        for one in results
    ]


Act = Callable[[CopyRequest, PhotoFile | PhotoError | None], T]


def _each(copies: Sequence[CopyRequest], way: CopySettings, act: Act[T]) -> Generator[T]:
    """Do something with each photo, in threads; gives the results in their order.

    Photos of a disk are read by the threads themselves: then None is what they are given.
    """
    ahead = any(is_url(file_of(copy.ref)) for copy in copies)
    max_pixels = way.settings.max_pixels
    refs = [copy.ref for copy in copies] if ahead else []
    waiting: deque[tuple[Future[T], int]] = deque()
    held = 0
    with (
        pillow_settings(max_pixels),
        closing(read_all(refs, way.source, max_pixels=max_pixels)) as files,
        ThreadPoolExecutor(way.threads) as pool,
    ):
        try:
            for copy in copies:
                file = next(files) if ahead else None
                size = len(file.content) if isinstance(file, PhotoFile) else copy.bytes or 0
                while waiting and (len(waiting) >= 2 * way.threads or held + size > HELD_BYTES):
                    future, its = waiting.popleft()
                    yield future.result()
                    held -= its
                waiting.append((pool.submit(act, copy, file), size))
                held += size
            while waiting:
                yield waiting.popleft()[0].result()
        finally:
            for future, _ in waiting:
                future.cancel()


class _Maker:
    """Makes of a photo what is to be written; in threads.

    Parameters
    ----------
    way : CopySettings
        How.
    refused : dict
        Why photos are not to be decoded.
    """

    def __init__(self, way: CopySettings, refused: dict[PhotoRef, str]) -> None:
        self.way, self.refused = way, refused
        self.gate = threading.BoundedSemaphore(way.decoders)

    def __call__(self, copy: CopyRequest, file: PhotoFile | PhotoError | None) -> Encoded | str:
        """What is to be written, or in one line why not."""
        if copy.ref in self.refused:
            return self.refused[copy.ref]
        max_pixels = self.way.settings.max_pixels
        try:
            if file is None:
                file = read_photo(copy.ref, max_pixels=max_pixels)
            elif isinstance(file, PhotoError):
                return str(file)
            content, size = file.content, len(file.content)
            check_size(size, copy)
            if copy.etag is not None and file.etag not in (None, copy.etag):
                raise another_object()
            if self.way.resize is not None:
                with self.gate:
                    content = resized(content, self.way.resize, max_pixels=max_pixels)
        except PhotoError as error:
            return str(error)
        mtime_ns = copy.ref.mtime_ns if isinstance(copy.ref, ByteRange) else None
        return Encoded(content, size, file.mtime_ns if mtime_ns is None else mtime_ns)


def check_size(size: int, copy: CopyRequest) -> None:
    """Refuse a photo that is not the one that was listed.

    Raises
    ------
    PhotoError
        If it has another size.
    """
    if copy.bytes is not None and size != copy.bytes:
        raise another_size(size, copy.bytes)


def _write_file(copy: CopyRequest, file: PhotoFile | PhotoError | None, way: CopySettings, make: _Maker) -> CopyResult:
    if way.link and (linked := _link(copy, way)) is not None:
        return linked
    made = make(copy, file)
    if isinstance(made, str):
        return CopyResult(error=made)
    place = way.target.below(copy.path)
    if place.remote:
        write_file(place, made.content)
    else:
        try:
            _put(Path(place.path), made.content, made.mtime_ns)
        except OSError as error:
            return _refusal(way.target, error)
    return CopyResult(made.read, len(made.content), copied_not_linked=way.link)


def _refusal(target: Location, error: OSError) -> CopyResult:
    """What comes of a photo that cannot be written.

    Raises
    ------
    ReducerError
        If nothing else could be either.
    """
    if error.errno in OF_THE_NAME:
        return CopyResult(error=f"not written: {error.strerror}")
    raise disk_failure(target, error) from None


def _put(path: Path, content: bytes, mtime_ns: int | None) -> None:
    # Not synced: a disk takes milliseconds for each. What a crash of the machine cuts short is told by its size.
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


def _link(copy: CopyRequest, way: CopySettings) -> CopyResult | None:
    """Make a hard link; None where that cannot be done here."""
    source, path = os.path.realpath(file_of(copy.ref)), Path(way.target.below(copy.path).path)
    if not os.path.isfile(source):  # reading it tells what is wrong
        return None
    try:
        size = os.stat(source).st_size
        check_size(size, copy)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        os.link(source, path)
    except PhotoError as error:
        return CopyResult(error=str(error))
    except OSError as error:
        return None if error.errno in NO_LINK else _refusal(way.target, error)
    return CopyResult(size, size)


def disk_failure(target: Location, error: OSError) -> ReducerError:
    """That of a target which cannot be written any more."""
    if error.errno in FULL:
        return ReducerError(
            f"the disk of {target.path} is full: what is there is whole. Make room, then give the same command again: "
            "it goes on from here"
        )
    return ReducerError(f"{target.path} cannot be written: {error.strerror or error}")


def _write_shard(name: str, copies: Sequence[CopyRequest], way: CopySettings, make: _Maker) -> list[CopyResult]:
    place = way.target.below(name)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return _write_shard_once(place, copies, way, make)
        except OSError as error:
            if not place.remote:
                raise disk_failure(way.target, error) from None
            if attempt == ATTEMPTS:
                raise ReducerError(f"{place.path} cannot be written: {place.safe(error)}") from None
        except Exception as error:
            if attempt == ATTEMPTS or not place.remote:
                raise ReducerError(f"{place.path} cannot be written: {place.safe(error)}") from None
        time.sleep(2.0**attempt)
    raise AssertionError


def _write_shard_once(
    place: Location, copies: Sequence[CopyRequest], way: CopySettings, make: _Maker
) -> list[CopyResult]:
    """A tar whose bytes depend on its photos only."""
    done = []
    with (
        _sink(place) as sink,
        closing(_each(copies, way, make)) as files,
        tarfile.open(fileobj=sink, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for copy, made in zip(copies, files, strict=True):
            if isinstance(made, str):
                done.append(CopyResult(error=made))
                continue
            with_it = ((in_shard(copy.path, ending), part) for ending, part in copy.side_files)
            for path, part in ((copy.path, made.content), *with_it):
                member = tarfile.TarInfo(path)
                member.size = len(part)
                tar.addfile(member, io.BytesIO(part))
            done.append(CopyResult(made.read, len(made.content)))
    return done


def _sink(place: Location) -> AbstractContextManager[IO[bytes]]:
    return whole_object(place) if place.remote else whole_file(Path(place.path))
