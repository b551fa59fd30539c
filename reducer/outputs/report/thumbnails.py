"""Small pictures of photos, drawn from where those lie, in this process or on a cluster."""

from __future__ import annotations

import logging
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from reducer.config.settings import PhotoSettings, Source
from reducer.errors import one_line
from reducer.photos.hashing import PhotoError, pillow_settings
from reducer.photos.reader import read_all
from reducer.photos.resize import Thumbnail, thumbnail
from reducer.photos.sandbox import memory_bound, refused_in_sandbox
from reducer.run.dask.pool import (
    NotHandedOver,
    NothingCame,
    Outcome,
    TaskLost,
    WorkersGone,
    map_unordered,
    threads_of_workers,
)
from reducer.run.dask.worker import memory_here
from reducer.storage.location import PhotoRef

if TYPE_CHECKING:
    from reducer.run.dask.connect import Client

log = logging.getLogger("reducer")

#: Photos per task, and those per task that no one has decoded yet.
BATCH, UNKNOWN_BATCH = 8, 4
#: Why there is no picture where no worker is there to draw it.
NO_WORKER = "not drawn: the cluster has no worker for it"
#: Seconds that a photo which no one has decoded yet may take, twice: a task of those alone must not be given up.
TRIED = 7.0
#: Seconds that a cluster may take to give the next pictures.
PATIENCE = 60.0


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
        The pictures.
    source : Source
        How the photos are read.
    settings : PhotoSettings
        ``max_pixels`` bounds what is decoded; by the others photos are tried.
    most_bytes : int
        Bytes of a picture at most.
    memory, memory_beside : int, optional
        Bytes that this process may take, and the other one.

    Yields
    ------
    int
        Index in ``wanted``, in order.
    Thumbnail or str
        The picture, or in one line why there is none.
    """
    max_pixels = settings.max_pixels
    unknown = [request.ref for request in wanted if not request.is_known]
    refused = refused_in_sandbox(unknown, settings, source, memory=memory_beside, patience=TRIED)
    refs = [request.ref for request in wanted if request.ref not in refused]
    with (
        memory_bound(memory),
        closing(read_all(refs, source, max_pixels=max_pixels)) as files,
        pillow_settings(max_pixels),
    ):
        for number, request in enumerate(wanted):
            if request.ref in refused:
                yield number, refused[request.ref]
                continue
            file = next(files)
            if isinstance(file, PhotoError):
                yield number, str(file)
                continue
            try:
                yield number, thumbnail(file.content, request.side, max_pixels=max_pixels, most_bytes=most_bytes)
            except PhotoError as error:
                yield number, str(error)


@dataclass(frozen=True)
class PictureBatch:
    """Pictures that are drawn together; travels inside a Dask task, which may be printed.

    Attributes
    ----------
    numbers : tuple of int
        What the sender calls the pictures.
    requests : tuple of PictureRequest
        The pictures.
    """

    numbers: tuple[int, ...]
    requests: tuple[PictureRequest, ...] = field(repr=False)


@dataclass(frozen=True)
class PictureSettings:
    """Settings of pictures that workers draw; travels inside a Dask task, which may be printed.

    Attributes
    ----------
    source : Source
        How photos are read.
    settings : PhotoSettings
        ``max_pixels`` bounds what is decoded; by the others photos are tried.
    most_bytes : int
        Bytes of a picture at most.
    """

    source: Source = field(repr=False)
    settings: PhotoSettings
    most_bytes: int


def draw_there(batch: PictureBatch, how: PictureSettings) -> list[Thumbnail | str]:
    """Draw photos on the worker that this is called on."""
    memory, memory_beside = memory_here()
    drawn = draw(
        batch.requests,
        how.source,
        how.settings,
        most_bytes=how.most_bytes,
        memory=memory,
        memory_beside=memory_beside,
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
        Passed to `draw`.
    avoid : collection of str
        Addresses of workers that draw none.
    patience : float
        Seconds without any picture after which the rest is given up.

    Yields
    ------
    int
        Index in ``wanted``, as the pictures come.
    Thumbnail or str
        The picture, or in one line why there is none.
    """
    missing = set(range(len(wanted)))
    reason = NO_WORKER
    late = f"not drawn: the workers gave no more pictures in {patience:g} s"
    how = PictureSettings(source, settings, most_bytes)
    try:
        batches = _batches(wanted) if threads_of_workers(client).keys() - set(avoid) else ()
        outcomes = map_unordered(client, draw_there, batches, how, name="thumbnails", avoid=avoid, patience=patience)
        with closing(outcomes):
            for outcome in outcomes:
                if isinstance(outcome.error, NotHandedOver):  # the next worker might not either
                    reason = late
                    break
                missing.difference_update(outcome.item.numbers)
                yield from zip(outcome.item.numbers, _pictures_of(outcome), strict=True)
    except NothingCame:
        reason = late
    except Exception as error:  # the scheduler is gone, say: as good as no worker
        log.debug("the scheduler: %s", one_line(error))
    for number in sorted(missing):
        yield number, reason


def _batches(wanted: Sequence[PictureRequest]) -> Iterator[PictureBatch]:
    """Divide photos into tasks; those that may hang come last and have tasks of their own."""
    for is_known, size in ((True, BATCH), (False, UNKNOWN_BATCH)):
        numbers = [number for number, request in enumerate(wanted) if request.is_known == is_known]
        for start in range(0, len(numbers), size):
            batch = tuple(numbers[start : start + size])
            yield PictureBatch(batch, tuple(wanted[number] for number in batch))


def _pictures_of(outcome: Outcome[PictureBatch]) -> list[Thumbnail | str]:
    if outcome.error is None:
        pictures: list[Thumbnail | str] = outcome.result
        return pictures
    if outcome.killed_workers:  # its message tells the worker's address
        reason = "not drawn: a worker died with it"
    elif isinstance(outcome.error, TaskLost) and not isinstance(outcome.error, WorkersGone):
        reason = NO_WORKER
    else:
        reason = f"not drawn: {one_line(outcome.error)}"
    return [reason] * len(outcome.item.numbers)
