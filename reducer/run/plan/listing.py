"""The photos of a folder or of a bucket, by listing it."""

from __future__ import annotations

import os
import stat
from collections import Counter

import pyarrow as pa

from reducer.config.job import Job
from reducer.errors import InputError
from reducer.photos.formats import is_photo
from reducer.storage.location import Location, explaining_errors
from reducer.storage.schemas import MANIFEST_SCHEMA


def check_images(job: Job) -> None:
    """Look whether the photos' folder is there.

    Raises
    ------
    InputError
        If it is not, or may not be listed.
    """
    if job.manifest is not None and not job.hashes_photos:
        return  # no photo is read
    if job.images_location.remote:
        _check_remote(job.images_location)
        return
    try:
        is_folder = stat.S_ISDIR(os.stat(job.images).st_mode)
    except FileNotFoundError:
        raise InputError(f"IMAGES {job.images} does not exist: give the folder that holds the photos") from None
    except OSError as error:
        raise InputError(f"IMAGES {job.images}: {error.strerror or error}") from None
    if not is_folder:
        raise InputError(f"IMAGES {job.images} is no folder: give the folder that holds the photos")
    if not _is_text(os.path.abspath(job.images)):
        raise InputError(f"IMAGES {os.fsencode(job.images)!r} is not UTF-8 text: rename the folder")


def _check_remote(place: Location) -> None:
    """Ask once whether there is such a place and it may be listed."""
    with explaining_errors(place, f"IMAGES {place.path} cannot be listed"):
        if not place.holds_something():
            raise InputError(f"IMAGES {place.path} holds nothing: give the folder that holds the photos")


def _list_remote(place: Location) -> tuple[pa.Table, dict[str, int]]:
    """Every photo file below a URL, by the extensions that Pillow knows."""
    with explaining_errors(place, f"IMAGES {place.path} cannot be listed"):
        system, root = place.open()
        found = system.find(root, detail=True)
    start = len(root.rstrip("/")) + 1
    photos: dict[str, int | None] = {}
    skipped: Counter[str] = Counter()
    for path, details in found.items():
        name = path[start:]
        if any(part.startswith(".") for part in name.split("/")):
            skipped["hidden file"] += 1
        elif not is_photo(name):
            skipped["file without a photo's extension"] += 1
        else:
            photos[name] = details.get("size")
    return _photos_below(place.path, place.path.rstrip("/"), photos, skipped)


def _list_folder(images: str) -> tuple[pa.Table, dict[str, int]]:
    """Every photo file below a folder, by the extensions that Pillow knows."""
    root = os.path.abspath(images)
    photos: dict[str, int | None] = {}
    skipped: Counter[str] = Counter()

    def walk(folder: str, prefix: str, above: frozenset[tuple[int, int]]) -> None:
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise InputError(f"IMAGES: the folder {folder} cannot be listed: {error.strerror}") from None
        for entry in entries:
            try:
                found = entry.stat()
            except OSError:
                found = None  # a link to nowhere or to itself, say: reading it will tell
            if found is not None and stat.S_ISDIR(found.st_mode):
                if entry.name.startswith("."):
                    skipped["hidden folder"] += 1
                elif (found.st_dev, found.st_ino) in above:
                    skipped["folder link that leads back"] += 1
                else:
                    walk(entry.path, f"{prefix}{entry.name}/", above | {(found.st_dev, found.st_ino)})
            elif entry.name.startswith("."):
                skipped["hidden file"] += 1
            elif not is_photo(entry.name):
                skipped["file without a photo's extension"] += 1
            else:
                photos[prefix + entry.name] = None if found is None else found.st_size

    top = os.stat(root)
    walk(root, "", frozenset([(top.st_dev, top.st_ino)]))
    return _photos_below(images, root, photos, skipped)


def _photos_below(
    images: str, root: str, photos: dict[str, int | None], skipped: Counter[str]
) -> tuple[pa.Table, dict[str, int]]:
    """Rows for `check` of photo files, given by relative path with their sizes."""
    odd = [name for name in photos if not _is_text(name)]
    if odd:
        raise InputError(
            f"IMAGES: {len(odd)} file names are not UTF-8 text, the first is {os.fsencode(odd[0])!r}: rename them, "
            "or give a --manifest that leaves them out"
        )
    if not photos:
        found = ", ".join(f"{count} x {why}" for why, count in skipped.items() if count) or "nothing"
        raise InputError(f"IMAGES {images} holds no photo; found {found}")
    ids = sorted(photos)
    columns = {
        "id": ids,
        # A photo that lies in IMAGES itself is labelled ".", as a relative path to its folder would be.
        "label": [name.rpartition("/")[0] or "." for name in ids],
        "path": [f"{root}/{name}" for name in ids],
        "bytes": [photos[name] for name in ids],
    }
    arrays = {name: pa.array(column, MANIFEST_SCHEMA.field(name).type) for name, column in columns.items()}
    return pa.table(arrays), {why: n for why, n in skipped.items() if n}


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
