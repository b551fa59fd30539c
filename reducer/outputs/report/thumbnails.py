"""Small pictures of photos, drawn from where those lie, in this process or on a cluster."""

from __future__ import annotations

import logging
import queue
import uuid
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from reducer.config.settings import PhotoSettings, Source
from reducer.errors import one_line
from reducer.photos.hashing import PhotoError, pillow_settings
from reducer.photos.reader import read_all
from reducer.photos.resize import Thumbnail, thumbnail
from reducer.photos.sandbox import memory_bound, refused_in_sandbox
from reducer.storage.location import PhotoRef

if TYPE_CHECKING:
    from reducer.run.dask.connect import Client, Future

log = logging.getLogger("reducer")

#: Photos that a task draws, and of those that no one has decoded yet.
GROUP, UNKNOWN_GROUP = 8, 4
#: Why there is no picture where no worker is there to draw it.
NO_WORKER = "not drawn: the cluster has no worker for it"
#: Seconds that a photo which no one has decoded yet may take, twice: a task of those alone must not be given up.
TRIED = 7.0
#: Seconds that a cluster may take to give the next pictures, the scheduler to answer, and a worker to hand some over.
PATIENCE, ANSWER, HAND_OVER = 60.0, 10.0, 30.0


@dataclass(frozen=True, slots=True)
class PictureRequest:
    """A picture to draw.

    Attributes
    ----------
    ref : str or ByteRange
        Where the photo lies.
    side : int
        Pixels of the picture's longest side at most.
    is_known : bool
        Whether it was decoded before: then it is not tried in a process of its own first.
    """

    ref: PhotoRef
    side: int
    is_known: bool = False


def draw(
    wanted: Sequence[PictureRequest],
    source: Source,
    settings: PhotoSettings,
    *,
    most_bytes: int,
    memory: int | None = None,
    memory_beside: int | None = None,
) -> Generator[tuple[int, Thumbnail | str]]:
    """Draw photos in this process; those that no one has decoded yet are tried in another one first.

    Parameters
    ----------
    wanted : sequence of PictureRequest
        Which.
    source : Source
        How they are read.
    settings : PhotoSettings
        ``max_pixels`` is as for `thumbnail`; by the others photos are tried.
    most_bytes : int
        As for `thumbnail`.
    memory, memory_beside : int, optional
        Bytes that this process may take, and the other one.

    Yields
    ------
    int
        Which of them, in their order.
    Thumbnail or str
        The picture, or in one line why there is none.
    """
    max_pixels = settings.max_pixels
    unknown = [one.ref for one in wanted if not one.is_known]
    refused = refused_in_sandbox(unknown, settings, source, memory=memory_beside, patience=TRIED)
    refs = [one.ref for one in wanted if one.ref not in refused]
    with (
        memory_bound(memory),
        closing(read_all(refs, source, max_pixels=max_pixels)) as files,
        pillow_settings(max_pixels),
    ):
        for number, one in enumerate(wanted):
            if one.ref in refused:
                yield number, refused[one.ref]
                continue
            file = next(files)
            if isinstance(file, PhotoError):
                yield number, str(file)
                continue
            try:
                yield number, thumbnail(file.content, one.side, max_pixels=max_pixels, most_bytes=most_bytes)
            except PhotoError as error:
                yield number, str(error)


@dataclass(frozen=True)
class _Group:
    """Some of the photos; travels inside a Dask task, which may be printed."""

    wanted: tuple[PictureRequest, ...] = field(repr=False)
    source: Source = field(repr=False)
    settings: PhotoSettings
    most_bytes: int


def _draw_group(group: _Group) -> list[Thumbnail | str]:
    """What runs on a worker."""
    from distributed import get_worker

    from reducer.run.dask.worker import memory_beside, memory_for_photos

    worker = get_worker()
    drawn = draw(
        group.wanted,
        group.source,
        group.settings,
        most_bytes=group.most_bytes,
        memory=memory_for_photos(worker),
        memory_beside=memory_beside(worker),
    )
    return [picture for _, picture in drawn]


def draw_on(
    client: Client,
    wanted: Sequence[PictureRequest],
    source: Source,
    settings: PhotoSettings,
    *,
    most_bytes: int,
    avoid: Collection[str] = (),
    patience: float = PATIENCE,
) -> Generator[tuple[int, Thumbnail | str]]:
    """Draw photos on a cluster. Whatever becomes of its workers, this ends.

    Parameters
    ----------
    client : distributed.Client
        Of the cluster.
    wanted, source, settings, most_bytes
        As for `draw`.
    avoid : collection of str
        Addresses of workers that draw none.
    patience : float
        Seconds without any picture after which the rest is given up.

    Yields
    ------
    int
        Which of them, as they come.
    Thumbnail or str
        As for `draw`.
    """
    done: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
    sent: dict[Any, tuple[Future[Any], list[int]]] = {}
    left = set(range(len(wanted)))
    why = NO_WORKER
    try:
        scheduler: Any = client.scheduler
        there = client.sync(scheduler.ncores, callback_timeout=ANSWER)
        workers = [worker for worker in there if worker not in avoid]
        name = uuid.uuid4().hex
        for own in _groups(wanted) if workers else ():
            group = _Group(tuple(wanted[number] for number in own), source, settings, most_bytes)
            future = client.submit(
                _draw_group, group, key=f"thumbnails-{name}-{own[0]}", workers=workers if avoid else None, pure=False
            )
            sent[future.key] = (future, own)
            future.add_done_callback(done.put)
        while sent:
            try:
                future, own = sent.pop(done.get(timeout=patience).key)
                pictures = _pictures_of(future, len(own))
            except (queue.Empty, TimeoutError):
                why = f"not drawn: the workers gave no more pictures in {patience:g} s"
                break
            left -= set(own)
            yield from zip(own, pictures, strict=True)
    except Exception as error:  # the scheduler is gone, say: as good as no worker
        log.debug("the scheduler: %s", one_line(error))
    finally:
        with suppress(Exception):
            client.cancel([future for future, _ in sent.values()], force=True)
    for number in sorted(left):
        yield number, why


def _groups(wanted: Sequence[PictureRequest]) -> Iterator[list[int]]:
    """Which photos a task draws; those that may hang come last and have tasks of their own."""
    for is_known, size in ((True, GROUP), (False, UNKNOWN_GROUP)):
        own = [number for number, one in enumerate(wanted) if one.is_known == is_known]
        for start in range(0, len(own), size):
            yield own[start : start + size]


def _pictures_of(future: Future[Any], count: int) -> list[Thumbnail | str]:
    """What has come of a task.

    Raises
    ------
    TimeoutError
        If the worker that holds it does not hand it over; the next might not either.
    """
    if future.status == "finished":
        found: list[Thumbnail | str] = future.result(timeout=HAND_OVER)
        future.release()
        return found
    if future.status != "error":  # cancelled, or lost with the scheduler
        return [NO_WORKER] * count
    error = future.exception(timeout=HAND_OVER)
    dead = type(error).__name__ == "KilledWorker"  # whose message tells the worker's address
    return ["not drawn: a worker died with it" if dead else f"not drawn: {one_line(error)}"] * count
