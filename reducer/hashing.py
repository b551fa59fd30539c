"""From the bytes of a photo to packed hash bits. No I/O beyond the bytes that it is given."""

from __future__ import annotations

import io
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TILELENGTH, TILEWIDTH, TiffImageFile

HASH_SIZE = 8
#: dHash compares neighbours in a grid one column wider than the hash.
HASH_GRID = (HASH_SIZE + 1, HASH_SIZE)
#: `fast` never decodes a JPEG to fewer pixels than this many times the grid, in each direction.
DRAFT_FLOOR = 16
JPEG_FORMATS = ("JPEG", "MPO")


class PhotoError(Exception):
    """One photo cannot be used; the message is one line, ``kind: what was found``."""

    def __init__(self, kind: str, detail: str) -> None:
        line = re.sub(r"\s+", " ", f"{kind}: {detail}").strip()
        # An object's address differs on every run; the ledger must not.
        line = re.sub(r"<[\w.]+(?: object)? at 0x[0-9a-f]+>", "the file", line)
        super().__init__(line.encode("utf-8", "backslashreplace").decode()[:300])


@dataclass(frozen=True, slots=True)
class PhotoHash:
    """What is learnt from a photo's bytes.

    Attributes
    ----------
    bits : bytes
        The hash, row by row, 8 bits a byte (`numpy.packbits`); its hex is imagehash's ``str()``.
    width, height : int
        As stored, in pixels.
    format : str
        Pillow's name of the format.
    """

    bits: bytes
    width: int
    height: int
    format: str


class _PillowSettings:
    """What is changed in Pillow while we read; global to the process, so threads share one change."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self.limit: int | None = None
        self.warnings = warnings.catch_warnings()


_shared = _PillowSettings()


@contextmanager
def pillow_settings(max_pixels: int) -> Iterator[None]:
    """Put our pixel limit in the place of Pillow's own, and its warnings out of the way; then all as it was.

    The first thread in makes the change, the last out undoes it. The limit is Pillow's too, not only `hash_photo`'s
    own: some formats hold pictures whose size shows only when they are decoded (PNGs in an ICNS, say).

    Parameters
    ----------
    max_pixels : int
        Of threads with different limits the largest holds.
    """
    # Pillow refuses what is more than twice its limit, and warns of what is more than once.
    limit = -(-max_pixels // 2)
    with _shared.lock:
        if _shared.users == 0:
            _shared.limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, limit
            _shared.warnings = warnings.catch_warnings()
            _shared.warnings.__enter__()
            warnings.simplefilter("ignore")
        _shared.users += 1
        Image.MAX_IMAGE_PIXELS = max(limit, Image.MAX_IMAGE_PIXELS or 0)
    try:
        yield
    finally:
        with _shared.lock:
            _shared.users -= 1
            if _shared.users == 0:
                Image.MAX_IMAGE_PIXELS = _shared.limit
                _shared.warnings.__exit__(None, None, None)


def _tile_size(image: Image.Image) -> tuple[int, int]:
    """Columns and rows of a TIFF's tiles, each of which libtiff decodes whole however small the image is."""
    if not isinstance(image, TiffImageFile):
        return 0, 0
    return image.tag_v2.get(TILEWIDTH, 0), image.tag_v2.get(TILELENGTH, 0)


def hash_photo(content: bytes, *, decode: str = "fast", max_pixels: int) -> PhotoHash:
    """dHash of a photo (imagehash's own function).

    Parameters
    ----------
    content : bytes
        The whole file.
    decode : {"fast", "exact"}
        ``exact`` is bit for bit ``imagehash.dhash(Image.open(path))``. ``fast`` lets libjpeg decode a JPEG to
        grey at 1/2, 1/4 or 1/8 of its size (Pillow's draft mode), never below `DRAFT_FLOOR` times the hash
        grid; other formats are decoded exactly.
    max_pixels : int
        A photo that declares more pixels than this is not decoded. Call inside ``with pillow_settings(max_pixels):``,
        or Pillow's own limit holds too.

    Returns
    -------
    PhotoHash

    Raises
    ------
    PhotoError
        For anything that Pillow or the limit refuses, `MemoryError` included.
    """
    if not content:
        raise PhotoError("empty", "the file has 0 bytes")
    try:
        with Image.open(io.BytesIO(content)) as image:
            width, height = image.size
            for columns, rows in (image.size, _tile_size(image)):
                if columns * rows > max_pixels:
                    raise PhotoError("too large", f"{columns} x {rows} pixels, over --max-pixels {max_pixels}")
            if decode == "fast" and image.format in JPEG_FORMATS:
                image.draft("L", (DRAFT_FLOOR * HASH_GRID[0], DRAFT_FLOOR * HASH_GRID[1]))
            bits: NDArray[np.bool_] = imagehash.dhash(image, hash_size=HASH_SIZE).hash
            return PhotoHash(np.packbits(bits).tobytes(), width, height, image.format or "unknown")
    except PhotoError:
        raise
    except Image.DecompressionBombError as error:
        found = re.search(r"\d+", str(error))
        raise PhotoError("too large", f"{found[0] if found else '?'} pixels, over --max-pixels {max_pixels}") from None
    except UnidentifiedImageError:
        raise PhotoError("not an image", "Pillow knows no format that begins like this file") from None
    except MemoryError:
        raise PhotoError("too large", "decoding it takes more memory than there is") from None
    except Exception as error:  # Pillow's plugins raise whatever a broken file makes them stumble on
        raise PhotoError("broken", f"{type(error).__name__}: {error}") from error
