"""List the photos of a folder or a bucket."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Callable

import pyarrow as pa

from reducer.config.job import Job
from reducer.errors import InputError
from reducer.photos.formats import is_photo, why_unreadable
from reducer.storage.location import Location, explaining_errors
from reducer.storage.schemas import MANIFEST_SCHEMA

#: Folders that systems and network disks make for themselves, with thumbnails, copies and what was deleted.
SYSTEM_FOLDERS = (
    *("__macosx", "@eadir", "@recently-snapshot", "@recycle", "@tmp", "#recycle", "#snapshot", "$recycle.bin"),
    *("found.000", "lost+found", "recycler", "system volume information", "__pycache__"),
)
#: Files that systems keep in folders of photos.
SYSTEM_FILES = ("desktop.ini", "ehthumbs.db", "thumbs.db")
EXCLUDED = "left out by --exclude"


def _why_skipped(name: str, *, is_folder: bool = False) -> str | None:
    """Return why a file or folder of a name is no photo and no label; None where it may be."""
    kind = "folder" if is_folder else "file"
    if name.startswith("."):
        return f"hidden {kind}"
    if name.lower() in (SYSTEM_FOLDERS if is_folder else SYSTEM_FILES):
        return f"{kind} of a system"
    if is_folder or is_photo(name):
        return None
    extension = os.path.splitext(name)[1].lower()
    return why_unreadable(extension) if extension else "file without an extension"


def check_images(job: Job) -> None:
    """Check that the folder of the photos is there.

    Raises
    ------
    InputError
        If it is not there, or may not be listed.
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


def _check_remote(location: Location) -> None:
    """Refuse a URL that cannot be listed or holds nothing, by one request."""
    with explaining_errors(location, f"IMAGES {location.path} cannot be listed"):
        if not location.holds_something():
            raise InputError(f"IMAGES {location.path} holds nothing: give the folder that holds the photos")


def list_remote(location: Location, is_excluded: Callable[[str], bool]) -> tuple[pa.Table, dict[str, int]]:
    """List every photo file below a URL, by the extensions that Pillow knows.

    Parameters
    ----------
    location : Location
        The URL.
    is_excluded : callable
        Tells whether a file, or a folder whose name ends in ``/``, is left out, by its path below the URL.

    Returns
    -------
    pyarrow.Table
        ``id``, ``label``, ``path`` and ``bytes``.
    dict of str to int
        Files that are left out, counted by reason.

    Raises
    ------
    InputError
        If the URL cannot be listed, or holds no photo.
    """
    with explaining_errors(location, f"IMAGES {location.path} cannot be listed"):
        system, root = location.open()
        files = system.find(root, detail=True)
    start = len(root.rstrip("/")) + 1
    photos: dict[str, int | None] = {}
    skipped: Counter[str] = Counter()
    for path, details in files.items():
        name = path[start:]
        *folders, file = name.split("/")
        if is_excluded(name):
            why: str | None = EXCLUDED
        else:
            reasons = [_why_skipped(part, is_folder=True) for part in folders]
            why = next(filter(None, [*reasons, _why_skipped(file)]), None)
        if why is not None:
            skipped[why] += 1
        else:
            photos[name] = details.get("size")
    return _photos_below(location.path, location.path.rstrip("/"), photos, skipped)


def list_folder(images: str, is_excluded: Callable[[str], bool]) -> tuple[pa.Table, dict[str, int]]:
    """List every photo file below a local folder; parameters, results and errors as for `list_remote`."""
    root = os.path.abspath(images)
    photos: dict[str, int | None] = {}
    skipped: Counter[str] = Counter()

    def walk(folder: str, prefix: str, above: frozenset[tuple[int, int]]) -> None:
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            leave_out = f"; to leave it out: --exclude '/{prefix}'" if prefix else ""
            raise InputError(f"IMAGES: the folder {folder} cannot be listed: {error.strerror}{leave_out}") from None
        for entry in entries:
            try:
                state = entry.stat()
            except OSError:
                state = None  # such as a link to nowhere or to itself: it fails when it is read
            is_folder = state is not None and stat.S_ISDIR(state.st_mode)
            name = f"{prefix}{entry.name}{'/' if is_folder else ''}"
            why = EXCLUDED if is_excluded(name) else _why_skipped(entry.name, is_folder=is_folder)
            if why is not None:
                skipped[why] += 1
            elif state is None or not is_folder:
                photos[name] = None if state is None else state.st_size
            elif (state.st_dev, state.st_ino) in above:
                skipped["folder link that leads back"] += 1
            else:
                walk(entry.path, name, above | {(state.st_dev, state.st_ino)})

    top = os.stat(root)
    walk(root, "", frozenset([(top.st_dev, top.st_ino)]))
    return _photos_below(images, root, photos, skipped)


def _photos_below(
    images: str, root: str, photos: dict[str, int | None], skipped: Counter[str]
) -> tuple[pa.Table, dict[str, int]]:
    """Return rows of photo files, given by relative path with their sizes in bytes."""
    not_text = [name for name in photos if not _is_text(name)]
    if not_text:
        raise InputError(
            f"IMAGES: {len(not_text)} file names are not UTF-8 text, the first is {os.fsencode(not_text[0])!r}: rename "
            "them, or give a --manifest that leaves them out"
        )
    if not photos:
        others = ", ".join(f"{count} x {why}" for why, count in skipped.items() if count) or "nothing"
        raise InputError(f"IMAGES {images} holds no photo; found {others}")
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
    """Tell whether a file name can be written as UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
