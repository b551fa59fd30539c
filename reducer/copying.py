"""Photos written to where they are to lie: read, checked, made smaller, put; in this process or on a cluster."""

from __future__ import annotations

import errno
import io
import os
import queue
import tarfile
import time
import uuid
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from reducer.config import PhotoSettings
from reducer.errors import ClusterError, ReducerError, one_line
from reducer.files import whole_file, whole_object, write_file
from reducer.hashing import PhotoError, pillow_settings
from reducer.isolation import memory_bound, refused_apart
from reducer.layouts import Beside
from reducer.objects import PhotoFile
from reducer.places import ByteRange, PhotoRef, Place, Source, file_of, is_url
from reducer.resizing import resized
from reducer.sources import read_all, read_photo

if TYPE_CHECKING:
    from distributed import Client
    from distributed import Future as Sent

T = TypeVar("T")

#: Photos that are read and not yet written take at most so many bytes, beside the next one.
HELD_BYTES = 128 * 2**20
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
#: Groups that are with the scheduler at a time, for each worker thread.
WINDOW = 4
#: Seconds between two looks at the cluster, and that its scheduler may take to answer.
TICK, ANSWER = 5.0, 10.0


@dataclass(frozen=True, slots=True)
class Copy:
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
    beside : tuple of (str, bytes)
        In a shard, files that go with it: extensions and contents.
    """

    ref: PhotoRef
    path: str
    bytes: int | None
    is_known: bool = True
    beside: Beside = ()


@dataclass(frozen=True, slots=True)
class Copied:
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


@dataclass(frozen=True)
class Way:
    """How photos are written; travels to the workers.

    Attributes
    ----------
    source : Source
        How they are read.
    target : Place
        The folder to write to.
    settings : PhotoSettings
        ``max_pixels`` bounds what is read; by the others photos are tried.
    resize : int, optional
        Pixels of the longest side.
    link : bool
        Whether to make hard links.
    threads : int
        At a time in this process.
    """

    source: Source
    target: Place
    settings: PhotoSettings
    resize: int | None = None
    link: bool = False
    threads: int = PUTS


@dataclass(frozen=True)
class Group:
    """Photos that are written together; travels inside a Dask task, which may be printed.

    Attributes
    ----------
    numbers : tuple of int
        What who sends them calls them.
    copies : tuple of Copy
    shard : str or None
        The shard that all of them are written into.
    """

    numbers: tuple[int, ...] = field(repr=False)
    copies: tuple[Copy, ...] = field(repr=False)
    shard: str | None = None


def write_group(group: Group, way: Way, *, memory_beside: int | None = None) -> Generator[Copied]:
    """Write photos in this process.

    Parameters
    ----------
    group : Group
        Which.
    way : Way
        How.
    memory_beside : int, optional
        Bytes that a process may take in which photos are tried that no one has decoded yet.

    Yields
    ------
    Copied
        One a photo, in their order; of a shard, when it is whole.

    Raises
    ------
    ReducerError
        If the target cannot be written.
    """
    unknown = [copy.ref for copy in group.copies if not copy.is_known] if way.resize else []
    refused = refused_apart(unknown, way.settings, way.source, memory=memory_beside, patience=TRIED) if unknown else {}
    if group.shard is None:
        yield from _each(group.copies, way, partial(_write_file, way=way, refused=refused))
    else:
        yield from _write_shard(group.shard, group.copies, way, refused)


Act = Callable[[Copy, PhotoFile | PhotoError | None], T]


def _each(copies: Sequence[Copy], way: Way, act: Act[T]) -> Generator[T]:
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


def _content(copy: Copy, file: PhotoFile | PhotoError | None, way: Way) -> tuple[bytes, int, int | None]:
    """What is to be written, how many bytes were read for it, and when the photo was last changed.

    Raises
    ------
    PhotoError
        If it cannot be.
    """
    if isinstance(file, PhotoError):
        raise file
    if file is None:
        file = read_photo(copy.ref, max_pixels=way.settings.max_pixels)
    size = len(file.content)
    if copy.bytes is not None and size != copy.bytes:
        raise PhotoError("changed", f"it has {size:,} bytes, and had {copy.bytes:,} when the run read or listed it")
    content = file.content
    if way.resize is not None:
        content = resized(content, way.resize, max_pixels=way.settings.max_pixels)
    mtime_ns = copy.ref.mtime_ns if isinstance(copy.ref, ByteRange) else None
    return content, size, file.mtime_ns if mtime_ns is None else mtime_ns


def _write_file(copy: Copy, file: PhotoFile | PhotoError | None, way: Way, refused: dict[PhotoRef, str]) -> Copied:
    if copy.ref in refused:
        return Copied(error=refused[copy.ref])
    try:
        if way.link and (linked := _link(copy, way)) is not None:
            return linked
        content, read, mtime_ns = _content(copy, file, way)
    except PhotoError as error:
        return Copied(error=str(error))
    place = way.target.below(copy.path)
    if place.remote:
        write_file(place, content)
    else:
        try:
            _put(Path(place.path), content, mtime_ns)
        except OSError as error:
            if error.errno in OF_THE_NAME:
                return Copied(error=f"not written: {error.strerror}")
            raise disk_failure(way.target, error) from None
    return Copied(read, len(content), copied_not_linked=way.link)


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


def _link(copy: Copy, way: Way) -> Copied | None:
    """Make a hard link; None where that cannot be done here.

    Raises
    ------
    PhotoError
        If there is no such photo.
    """
    source, path = os.path.realpath(file_of(copy.ref)), Path(way.target.below(copy.path).path)
    try:
        size = read_size(source)
        if copy.bytes is not None and size != copy.bytes:
            raise PhotoError("changed", f"it has {size:,} bytes, and had {copy.bytes:,} when the run found it")
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            path.unlink()
        os.link(source, path)
    except OSError as error:
        if error.errno in NO_LINK:
            return None
        if error.errno in OF_THE_NAME:
            return Copied(error=f"not written: {error.strerror}")
        raise disk_failure(way.target, error) from None
    return Copied(size, size)


def read_size(path: str) -> int:
    """Bytes of a local file.

    Raises
    ------
    PhotoError
        If it is not there.
    """
    if not os.path.isfile(path):
        raise PhotoError("missing", "no such file")
    return os.stat(path).st_size


def disk_failure(target: Place, error: OSError) -> ReducerError:
    """That of a target which cannot be written any more."""
    if error.errno in FULL:
        return ReducerError(
            f"the disk of {target.path} is full: what is there is whole. Make room, then give the same command again: "
            "it goes on from here"
        )
    return ReducerError(f"{target.path} cannot be written: {error.strerror or error}")


def _write_shard(name: str, copies: Sequence[Copy], way: Way, refused: dict[PhotoRef, str]) -> list[Copied]:
    place = way.target.below(name)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return _write_shard_once(place, copies, way, refused)
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


def _write_shard_once(place: Place, copies: Sequence[Copy], way: Way, refused: dict[PhotoRef, str]) -> list[Copied]:
    """A tar whose bytes depend on its photos only."""

    def content(copy: Copy, file: PhotoFile | PhotoError | None) -> tuple[bytes, int] | str:
        if copy.ref in refused:
            return refused[copy.ref]
        try:
            return _content(copy, file, way)[:2]
        except PhotoError as error:
            return str(error)

    done = []
    with (
        _sink(place) as sink,
        closing(_each(copies, way, content)) as contents,
        tarfile.open(fileobj=sink, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for copy, found in zip(copies, contents, strict=True):
            if isinstance(found, str):
                done.append(Copied(error=found))
                continue
            stem = copy.path.rpartition(".")[0]
            for path, part in ((copy.path, found[0]), *((stem + ending, part) for ending, part in copy.beside)):
                member = tarfile.TarInfo(path)
                member.size = len(part)
                tar.addfile(member, io.BytesIO(part))
            done.append(Copied(found[1], len(found[0])))
    return done


def _sink(place: Place) -> AbstractContextManager[IO[bytes]]:
    return whole_object(place) if place.remote else whole_file(Path(place.path))


def _write_group_there(group: Group, way: Way) -> list[Copied] | str:
    """What runs on a worker: what came of the photos, or why the target cannot be written."""
    from distributed import get_worker

    from reducer.worker import memory_beside, memory_for_photos

    worker = get_worker()
    try:
        with memory_bound(memory_for_photos(worker) if way.resize else None):
            return list(write_group(group, way, memory_beside=memory_beside(worker)))
    except ReducerError as error:
        return str(error)


def write_on(
    client: Client, groups: Iterable[Group], way: Way, *, wait: float
) -> Generator[tuple[tuple[int, ...], list[Copied]]]:
    """Write photos on a cluster.

    Parameters
    ----------
    client : distributed.Client
        Of the cluster.
    groups : iterable of Group
        The photos. Few are with the cluster at a time.
    way : Way
        How.
    wait : float
        Seconds without any worker after which it is given up.

    Yields
    ------
    tuple of int, list of Copied
        Numbers, and what came of those photos, as they are done. Photos with which workers die again and again have
        failed.

    Raises
    ------
    ReducerError
        If the target cannot be written.
    ClusterError
        If the cluster is gone.
    """
    done: queue.SimpleQueue[Sent[Any]] = queue.SimpleQueue()
    sent: dict[Any, tuple[Sent[Any], Group]] = {}
    waiting = iter(groups)
    name = uuid.uuid4().hex
    scheduler: Any = client.scheduler
    last_seen, next_look, threads = time.monotonic(), float("-inf"), 0
    try:
        while True:
            now = time.monotonic()
            if now >= next_look:
                next_look = now + TICK
                try:
                    threads = sum(client.sync(scheduler.ncores, callback_timeout=ANSWER).values())
                except Exception as error:
                    raise ClusterError(f"the scheduler is gone: {one_line(error)}") from None
                last_seen = now if threads else last_seen
                if now - last_seen > wait:
                    raise ClusterError(f"no worker has been there for {wait:g} s (workers: wait)")
            while len(sent) < WINDOW * max(1, threads) and (group := next(waiting, None)) is not None:
                future = client.submit(
                    _write_group_there, group, way, key=f"export-{name}-{group.numbers[0]}", pure=False
                )
                sent[future.key] = (future, group)
                future.add_done_callback(done.put)
            if not sent:
                return
            try:
                future, group = sent.pop(done.get(timeout=TICK).key)
            except queue.Empty:
                continue
            yield group.numbers, _outcome(future, group)
    finally:
        with suppress(Exception):
            client.cancel([future for future, _ in sent.values()], force=True)


def _outcome(future: Sent[Any], group: Group) -> list[Copied]:
    if future.status == "finished":
        found: list[Copied] | str = future.result(timeout=ANSWER)
        future.release()
        if isinstance(found, str):
            raise ReducerError(found)
        return found
    if future.status != "error":
        raise ClusterError("the cluster has lost what it was to do")
    error = future.exception(timeout=ANSWER)
    if type(error).__name__ == "KilledWorker":
        return [Copied(error="not written: workers died with it and the photos beside it")] * len(group.copies)
    raise ClusterError(f"a worker failed: {one_line(error)}") from None


def in_this_process(groups: Iterable[Group], way: Way) -> Generator[tuple[tuple[int, ...], list[Copied]]]:
    """Write photos here; results as from `write_on`, but a photo at a time where there are no shards."""
    for group in groups:
        with closing(write_group(group, way)) as results:
            if group.shard is not None:
                yield group.numbers, list(results)
                continue
            for number, found in zip(group.numbers, results, strict=True):
                yield (number,), [found]
