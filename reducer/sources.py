"""Read photos where they lie: path to bytes, or a failure."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass

from reducer.hashing import PhotoError

#: A rule of thumb that bounds what is read into memory: no single photo of so many pixels is larger, a video or an
#: archive under a photo's name is.
MOST_BYTES_A_PIXEL = 8
LEAST_LIMIT = 2**30


@dataclass(frozen=True)
class PhotoFile:
    """A photo's bytes and what the place it lies in knows of it.

    Attributes
    ----------
    content : bytes
        The whole file.
    mtime_ns : int
        Time of its last change, nanoseconds since 1970 UTC.
    """

    content: bytes
    mtime_ns: int


def read_photo(path: str, *, max_pixels: int) -> PhotoFile:
    """Read one photo whole.

    Parameters
    ----------
    path : str
        A local path.
    max_pixels : int
        The job's limit; a file with more bytes than any photo of so many pixels needs is not read.

    Raises
    ------
    PhotoError
        When it is missing, no regular file, or cannot be read.
    """
    try:
        # Looked at before it is opened: opening a named pipe would wait for ever.
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            what = "a directory" if stat.S_ISDIR(found.st_mode) else "no regular file"
            raise PhotoError("not a file", f"the path is {what}")
        limit = max(LEAST_LIMIT, MOST_BYTES_A_PIXEL * max_pixels)
        if found.st_size > limit:
            raise PhotoError("too large", f"{found.st_size} bytes, over what --max-pixels {max_pixels} can need")
        with open(path, "rb", buffering=0) as file:
            return PhotoFile(file.readall(), found.st_mtime_ns)
    except FileNotFoundError:
        raise PhotoError("missing", "no such file") from None
    except NotADirectoryError:
        raise PhotoError("missing", "no such file") from None
    except MemoryError:
        raise PhotoError("too large", "reading it takes more memory than there is") from None
    except OSError as error:
        code = errno.errorcode.get(error.errno or 0, "OSError")
        raise PhotoError("unreadable", f"{error.strerror or error} ({code})") from None
    except ValueError as error:  # a NUL character in the path
        raise PhotoError("missing", f"no file can have this path ({error})") from None
