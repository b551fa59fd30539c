"""Tell of photos that are not read whether they are there: by a stat, a HEAD, or a listing of S3."""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress

from reducer.config.settings import Source
from reducer.photos.disk import check_file
from reducer.photos.hashing import EMPTY, PhotoError
from reducer.photos.reader import from_store, in_reading_loop, persistently
from reducer.photos.requests import NO_OBJECT, ObjectPage, page_from, size_of
from reducer.storage.location import Location, is_url

#: Answers to HEAD requests that cost as much as one page of a listing, by the prices of S3 (2024: 0.005 $ for 1,000
#: pages, 0.0004 $ for 1,000 answers).
HEADS_PER_PAGE = 12.5
#: Objects that are asked for one by one where listing them is not worth it, before a listing is tried again.
BY_HEAD = 1000


#: Number of the first photo among those that are looked for, and their paths.
Batch = tuple[int, list[str]]


def absent_in(batch: Batch, source: Source) -> dict[int, str]:
    """Return the failures of photos that are not there, by their places in the batch; see `absences`."""
    errors = absences(batch[1], source)
    return {place: error for place, error in enumerate(errors) if error is not None}


def absences(paths: Sequence[str], source: Source) -> list[str | None]:
    """Tell which photos are not there, without reading any.

    Parameters
    ----------
    paths : sequence of str, n
        Local paths and URLs, those of a folder together: then S3 is listed where that costs less.
    source : Source
        How URLs are opened.

    Returns
    -------
    list of str or None, n
        None for a file of at least one byte, else the failure, in the words of reading it.
    """
    if not any(map(is_url, paths)):
        return [_absence_on_disk(path) for path in paths]
    return in_reading_loop(_absences_of_urls(paths, source))


def _absence_on_disk(path: str) -> str | None:
    try:
        return _empty(check_file(path).st_size)
    except PhotoError as error:
        return str(error)


def _empty(size: int | None) -> str | None:
    """Return the failure of a photo by its size in bytes; None where that may be right or is not known."""
    return str(PhotoError(*EMPTY)) if size == 0 else None


async def _absences_of_urls(paths: Sequence[str], source: Source) -> list[str | None]:
    found: dict[str, str | None] = {}
    gate = asyncio.Semaphore(source.read_ahead)

    async def ask(path: str) -> None:
        async with gate:
            if not is_url(path):
                found[path] = await asyncio.to_thread(_absence_on_disk, path)
                return
            try:
                found[path] = _empty(await from_store(path, source, lambda: size_of(path, source)))
            except PhotoError as error:
                found[path] = str(error)

    left = sorted({path for path in paths if Location(path).on_s3})
    others = set(paths).difference(left)
    while left:
        listed = await _listed(left, source)
        worth_it = len(listed) > HEADS_PER_PAGE
        found |= listed
        left = left[len(listed) :]
        if not worth_it:
            await asyncio.gather(*map(ask, left[:BY_HEAD]))
            left = left[BY_HEAD:]
    await asyncio.gather(*map(ask, others))
    return [found[path] for path in paths]


async def _listed(paths: Sequence[str], source: Source) -> dict[str, str | None]:
    """List one page of S3 from the first of some objects on; nothing where that is not allowed.

    Returns
    -------
    dict of str to str or None
        Failures of the first of the objects, as many as the page covers.
    """
    page: ObjectPage | None = None
    with suppress(PhotoError):  # whoever may not list may still read
        page = await persistently(lambda: page_from(paths[0], source))
    if page is None:
        return {}
    bucket_end = bisect_right(paths, page.root + "\U0010ffff")
    covered = bucket_end if page.last is None else bisect_right(paths, page.last, hi=bucket_end)
    missing = str(PhotoError(*NO_OBJECT))
    return {path: _empty(page.sizes[path]) if path in page.sizes else missing for path in paths[:covered]}
