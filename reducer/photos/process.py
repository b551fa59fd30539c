"""Read, hash and embed photos; what is wrong with a photo is in its result."""

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
    """Result of one photo: the hash, or the reason why there is none."""

    hash: PhotoHash | None = None
    bytes: int | None = None
    mtime_ns: int | None = None
    etag: str | None = None
    error: str | None = None
    #: Pixels for a model, until it has made a vector of them.
    picture: Picture | None = None
    #: Unit vector, as bytes of float16 numbers.
    vector: builtins.bytes | None = None


#: Processes photos in turn: `process_photos`, or the sandbox.
ProcessPhotos = Callable[[Sequence[PhotoRef], PhotoSettings, Source], Iterator[PhotoResult]]


def process_photos(
    refs: Sequence[PhotoRef], settings: PhotoSettings, source: Source | None = None
) -> Iterator[PhotoResult]:
    """Read and hash photos in turn; what is wrong with a photo is in its result."""
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
    """Hash a photo that was read; what is wrong with it is in the result."""
    if isinstance(file, PhotoError):
        return PhotoResult(error=str(file))
    result = PhotoResult(bytes=file.bytes, mtime_ns=file.mtime_ns, etag=file.etag)
    try:
        photo_hash = hash_photo(file.content, settings)
        picture = None if settings.embed is None else picture_of(file.content, settings)
        return replace(result, hash=photo_hash, picture=picture)
    except PhotoError as error:
        return replace(result, error=str(error))


def embedded(results: Iterable[PhotoResult], settings: PhotoSettings) -> Iterator[PhotoResult]:
    """Replace pictures by vectors, one batch at a time, in the order of the results."""
    if settings.embed is None:
        yield from results
        return
    waiting: list[PhotoResult] = []
    pictures = 0
    for result in results:
        waiting.append(result)
        pictures += result.picture is not None
        if pictures == settings.embed.batch:
            yield from with_vectors(waiting, settings.embed)
            waiting, pictures = [], 0
    yield from with_vectors(waiting, settings.embed)


def with_vectors(results: Sequence[PhotoResult], settings: EmbedSettings) -> list[PhotoResult]:
    """Return results with vectors instead of pictures; a photo of which the model gives none has failed."""
    vectors = iter(vectors_of([result.picture for result in results if result.picture is not None], settings))
    return [result if result.picture is None else _with_vector(result, next(vectors)) for result in results]


def _with_vector(result: PhotoResult, vector: bytes | str) -> PhotoResult:
    if isinstance(vector, str):
        return replace(result, hash=None, picture=None, error=str(PhotoError(NO_VECTOR, vector)))
    return replace(result, picture=None, vector=vector)
