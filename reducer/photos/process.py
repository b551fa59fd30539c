"""One photo, start to end: read, hash, embed; whatever is wrong with it is in its result."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

from reducer.config.settings import EmbedSettings, PhotoSettings, Source
from reducer.photos.hashing import PhotoError, PhotoHash, enough_of, hash_photo, pillow_settings
from reducer.photos.model import Picture, picture_of, vectors_of
from reducer.photos.reader import read_all
from reducer.photos.requests import PhotoFile
from reducer.storage.codecs import NO_VECTOR
from reducer.storage.location import PhotoRef


@dataclass(frozen=True, slots=True)
class PhotoResult:
    """What one look at a photo gave: its hash, or why there is none."""

    hash: PhotoHash | None = None
    bytes: int | None = None
    mtime_ns: int | None = None
    etag: str | None = None
    error: str | None = None
    #: The photo as a model is to see it, until that has made a vector of it.
    picture: Picture | None = None
    #: Unit vector, as bytes of float16 numbers.
    vector: builtins.bytes | None = None


#: Looks at photos in turn: `process_photos`, or something that does so with more care.
ProcessPhotos = Callable[[Sequence[PhotoRef], PhotoSettings, Source], Iterator[PhotoResult]]


def process_photos(
    refs: Sequence[PhotoRef], settings: PhotoSettings, source: Source | None = None
) -> Iterator[PhotoResult]:
    """Read and hash photos in turn; whatever is wrong with one is in its result."""
    with (
        pillow_settings(settings.max_pixels),
        closing(
            read_all(
                refs,
                source or Source(),
                max_pixels=settings.max_pixels,
                enough=enough_of(settings),
            )
        ) as files,
    ):
        for file in files:
            yield process_photo(file, settings)


def process_photo(file: PhotoFile | PhotoError, settings: PhotoSettings) -> PhotoResult:
    """Hash a photo that was read; whatever is wrong with it is in the result."""
    if isinstance(file, PhotoError):
        return PhotoResult(error=str(file))
    seen = PhotoResult(bytes=file.bytes, mtime_ns=file.mtime_ns, etag=file.etag)
    try:
        found = hash_photo(file.content, settings)
        picture = None if settings.embed is None else picture_of(file.content, settings)
        return replace(seen, hash=found, picture=picture)
    except PhotoError as error:
        return replace(seen, error=str(error))


def embedded(looks: Iterable[PhotoResult], settings: PhotoSettings) -> Iterator[PhotoResult]:
    """Put vectors in the place of pictures, a batch at a time; in the order of the looks."""
    if settings.embed is None:
        yield from looks
        return
    waiting: list[PhotoResult] = []
    pictures = 0
    for look in looks:
        waiting.append(look)
        pictures += look.picture is not None
        if pictures == settings.embed.batch:
            yield from with_vectors(waiting, settings.embed)
            waiting, pictures = [], 0
    yield from with_vectors(waiting, settings.embed)


def with_vectors(looks: Sequence[PhotoResult], settings: EmbedSettings) -> list[PhotoResult]:
    """Looks with vectors in the place of their pictures; where a model gives none, that is the photo's failure."""
    found = iter(vectors_of([look.picture for look in looks if look.picture is not None], settings))
    return [look if look.picture is None else _with_vector(look, next(found)) for look in looks]


def _with_vector(look: PhotoResult, found: bytes | str) -> PhotoResult:
    if isinstance(found, str):
        return replace(look, hash=None, picture=None, error=str(PhotoError(NO_VECTOR, found)))
    return replace(look, picture=None, vector=found)
