"""Read photos and shards from a local disk, and limit their sizes."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Generator, Iterator
from contextlib import contextmanager

from reducer.photos.hashing import OUT_OF_MEMORY, PhotoError
from reducer.photos.requests import FileState, PhotoFile
from reducer.storage.location import PhotoRef, Shard, file_of

#: A rule of thumb that bounds the bytes read into memory: no photo has more bytes per pixel, but a video or an archive
#: under the name of a photo has.
MOST_BYTES_PER_PIXEL = 8
LEAST_LIMIT = 2**30
#: Bytes of a block of a shard, and bytes that the disk is asked for ahead.
DISK_BLOCK, DISK_AHEAD = 2**20, 16 * 2**20


def most_bytes(max_pixels: int) -> int:
    """Return the most bytes that a photo of at most ``max_pixels`` pixels can have; larger files are not read."""
    return max(LEAST_LIMIT, MOST_BYTES_PER_PIXEL * max_pixels)


def too_large(size: int, max_pixels: int) -> PhotoError | None:
    """Return the failure of a photo of too many bytes; None where the size is right."""
    if size <= most_bytes(max_pixels):
        return None
    return PhotoError("too large", f"{size} bytes, over what --max-pixels {max_pixels} can need")


def check_file(path: str) -> os.stat_result:
    """Return the state of a local file.

    Raises
    ------
    PhotoError
        When it is missing, no regular file, or its folder cannot be used.
    """
    with _disk_failures():
        status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "no regular file"
        raise PhotoError("not a file", f"the path is {kind}")
    return status


def read_photo(ref: PhotoRef, *, max_pixels: int) -> PhotoFile:
    """Read one local photo whole.

    Parameters
    ----------
    ref : str or ByteRange
        A local path, or a part of the file there.
    max_pixels : int
        The job's limit, as for `read_all`.

    Raises
    ------
    PhotoError
        When the file is missing, no regular file, or cannot be read.
    """
    path = file_of(ref)
    # Before the file is opened: opening a named pipe would wait for ever.
    status = check_file(path)
    with _disk_failures():
        size = status.st_size if isinstance(ref, str) else ref.bytes
        if error := too_large(size, max_pixels):
            raise error
        with open(path, "rb", buffering=0) as file:
            if isinstance(ref, str):
                return PhotoFile(file.readall(), status.st_mtime_ns)
            if ref.mtime_ns not in (None, status.st_mtime_ns):
                raise changed(ref.path)
            file.seek(ref.offset)
            return PhotoFile(file.read(size), status.st_mtime_ns)


@contextmanager
def _disk_failures() -> Iterator[None]:
    """Turn any error of a file on a disk into the failure of the photo."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise PhotoError("missing", "no such file") from None
    except MemoryError:
        raise PhotoError(OUT_OF_MEMORY, "reading it takes more than there is") from None
    except OSError as error:
        code = errno.errorcode.get(error.errno or 0, "OSError")
        raise PhotoError("unreadable", f"{error.strerror or error} ({code})") from None
    except ValueError as error:  # a NUL character in the path
        raise PhotoError("missing", f"no file can have this path ({error})") from None


def changed(path: str) -> PhotoError:
    """Return the failure of a shard, or a photo in it, that was changed."""
    return PhotoError("changed", f"{path} is not what it was when the run began")


def disk_blocks(shard: Shard, offset: int) -> Generator[bytes]:
    """Read the bytes of a shard from an offset on, in blocks."""
    with _disk_failures(), open(shard.path, "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        if (status.st_size, status.st_mtime_ns) != (shard.bytes, shard.mtime_ns):
            raise changed(shard.path)
        file.seek(offset)
        while block := file.read(DISK_BLOCK):
            if hasattr(os, "posix_fadvise"):  # a disk is to be read while photos are hashed
                os.posix_fadvise(file.fileno(), file.tell(), DISK_AHEAD, os.POSIX_FADV_WILLNEED)
            yield block


def state_on_disk(path: str) -> FileState | None:
    """Return the state of a local file; None where there is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return FileState(status.st_size, status.st_mtime_ns, None)
