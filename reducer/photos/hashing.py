"""Decode the bytes of a photo and hash them to packed bits; no I/O beyond the given bytes."""

from __future__ import annotations

import io
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TILELENGTH, TILEWIDTH, TiffImageFile

from reducer.config.settings import PhotoSettings
from reducer.photos.formats import readable_formats
from reducer.photos.progressive import bytes_needed, first_scan_only
from reducer.photos.seen import DEEP_MODES, as_seen


@dataclass(frozen=True, slots=True)
class HashKind:
    """One of the hash functions of imagehash.

    Attributes
    ----------
    function : str
        Name of the function.
    grid : callable
        From the hash size to the grid (columns, rows), in pixels, that it resizes a photo to. (whash resizes it to a
        power of two near its own size first, and comes to this grid by averaging.)
    """

    function: str
    grid: Callable[[int], tuple[int, int]]


HASHES = {
    "dhash": HashKind("dhash", lambda size: (size + 1, size)),
    "dhash-vertical": HashKind("dhash_vertical", lambda size: (size, size + 1)),
    "phash": HashKind("phash", lambda size: (4 * size, 4 * size)),
    "ahash": HashKind("average_hash", lambda size: (size, size)),
    "whash": HashKind("whash", lambda size: (size, size)),
}
#: Kind of the failure of a photo that takes more memory than there is.
OUT_OF_MEMORY = "out of memory"
#: Failure of a file without a byte.
EMPTY = ("empty", "the file has 0 bytes")
#: `fast` never decodes a JPEG to fewer pixels than this many times the grid, in each direction.
DRAFT_FLOOR = 16
JPEG_FORMATS = ("JPEG", "MPO")
#: Side in pixels of the grey square that the flatness of a photo is told from, at any size of decoding.
FLAT_SIDE = 64
#: Grey standard deviation, in levels of 0 to 255, under which a photo is flat: its hash says more of noise than of what
#: is to be seen. Of photos whose contrast is lowered so far, more than a quarter are no near copies of themselves any
#: more; the flattest of 1,669 real photos has 8.2 (`scripts/bench.py flat`).
FLAT_DEVIATION = 4.0
#: How a photo is to be turned or mirrored for each EXIF orientation (EXIF 2.32, tag 274).
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class PhotoError(Exception):
    """One photo cannot be used; the message is one line, ``kind: what was found``."""

    def __init__(self, kind: str, detail: str) -> None:
        self.kind = kind
        line = re.sub(r"\s+", " ", f"{kind}: {detail}").strip()
        # An object's address differs on every run; the ledger must not.
        line = re.sub(r"<[\w.]+(?: object)? at 0x[0-9a-f]+>", "the file", line)
        super().__init__(line.encode("utf-8", "backslashreplace").decode()[:300])


@dataclass(frozen=True, slots=True)
class PhotoHash:
    """Hash of a photo, and facts told by decoding it.

    Attributes
    ----------
    bits : bytes
        The hash, row by row, 8 bits per byte (`numpy.packbits`); `to_hex` gives imagehash's ``str()``.
    width, height : int
        As stored, in pixels.
    format : str
        Pillow's name of the format.
    flat : bool
        Whether the grey standard deviation is under `FLAT_DEVIATION`; False where that is not asked.
    """

    bits: bytes
    width: int
    height: int
    format: str
    flat: bool = False


class _PillowSettings:
    """Settings of Pillow that hold while photos are read; global to the process, so threads share one change."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self.limit: int | None = None
        self.warnings = warnings.catch_warnings()


_shared = _PillowSettings()


@contextmanager
def pillow_settings(max_pixels: int) -> Iterator[None]:
    """Replace Pillow's pixel limit and silence its warnings within the block.

    The first thread in makes the change, the last out undoes it. Pillow checks the limit too, not only
    `hash_photo`: some formats hold pictures whose size shows only when they are decoded (PNGs in an ICNS, say).

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
    """Return columns and rows of the tiles of a TIFF: libtiff decodes whole tiles however small the image is."""
    if not isinstance(image, TiffImageFile):
        return 0, 0
    return image.tag_v2.get(TILEWIDTH, 0), image.tag_v2.get(TILELENGTH, 0)


def grey_deviation(image: Image.Image) -> float:
    """Return the detail of a photo: the standard deviation of its grey levels, averaged down to a small square.

    Parameters
    ----------
    image : PIL.Image.Image
        Of any size and mode.

    Returns
    -------
    float
        In levels of 0 to 255; infinite for `DEEP_MODES`, which Pillow clips.
    """
    if image.mode in DEEP_MODES:
        return float("inf")
    small = image.convert("L").resize((FLAT_SIDE, FLAT_SIDE), Image.Resampling.BOX)
    return float(np.asarray(small).std(dtype=np.float64))


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of a photo, 1 to 8; 1 where there is none, or none that can be read."""
    try:
        turn = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # broken EXIF data must not cost a photo that can be decoded
        return 1
    return turn if turn in TURNS else 1


def hash_photo(content: bytes, settings: PhotoSettings) -> PhotoHash:
    """Return the perceptual hash of a photo, by one of imagehash's functions.

    Parameters
    ----------
    content : bytes
        The whole file, or as much of it as `enough_of` tells.
    settings : PhotoSettings
        ``hash`` and ``hash_size`` say which. With ``decode="exact"`` it is bit for bit imagehash's function of
        ``Image.open(path)``; ``"fast"`` lets libjpeg decode a JPEG to grey at 1/2, 1/4 or 1/8 of its size (Pillow's
        draft mode), never below `DRAFT_FLOOR` times the grid that the hash resizes to; other formats are decoded
        exactly, and hashed `as_seen`. ``"fastest"`` is ``"fast"``, but that a large progressive JPEG is decoded by its
        first scan only (`reducer.photos.progressive`): what follows is not even looked at. With ``exif_orientation``
        the photo is turned upright first. A photo that declares more pixels than ``max_pixels`` is not decoded. Call
        inside ``with pillow_settings(max_pixels):``, or Pillow's own limit holds too.

    Returns
    -------
    PhotoHash
        Of ``hash_size`` squared bits.

    Raises
    ------
    PhotoError
        For anything that Pillow or the limit refuses, `MemoryError` included.
    """
    kind = HASHES[settings.hash]
    if settings.decode == "fastest":
        with _photo_failures(settings.max_pixels):
            content = first_scan_only(content, largest_grid(settings), settings.max_pixels) or content
    draft = None
    if settings.decode != "exact":
        columns, rows = kind.grid(settings.hash_size)
        draft = ("L", (DRAFT_FLOOR * columns, DRAFT_FLOOR * rows))
    with opened_photo(content, settings.max_pixels, oriented=settings.exif_orientation, draft=draft) as photo:
        image = photo.upright() if settings.decode == "exact" else as_seen(photo.upright())
        flat = settings.drop_flat and grey_deviation(image) < FLAT_DEVIATION
        bits: NDArray[np.bool_] = getattr(imagehash, kind.function)(image, hash_size=settings.hash_size).hash
        format_name = photo.image.format or "unknown"
        return PhotoHash(np.packbits(bits).tobytes(), photo.width, photo.height, format_name, flat)


def largest_grid(settings: PhotoSettings) -> tuple[int, int]:
    """Return the columns and rows, in pixels, that a photo is resized to at most, upright or lying on its side."""
    columns, rows = HASHES[settings.hash].grid(settings.hash_size)
    return (max(columns, rows),) * 2 if settings.exif_orientation else (columns, rows)


def enough_of(settings: PhotoSettings) -> Callable[[bytes], int | None] | None:
    """Return a function that tells from the beginning of a file how many of its bytes are enough for `hash_photo`.

    Parameters
    ----------
    settings : PhotoSettings
        Settings of the hash, as for `hash_photo`.

    Returns
    -------
    callable or None
        As `reducer.photos.progressive.bytes_needed` tells; None where all of them are needed, as for a model's vectors.
    """
    if settings.decode != "fastest" or settings.embed is not None:
        return None
    return partial(bytes_needed, grid=largest_grid(settings), max_pixels=settings.max_pixels)


@dataclass(frozen=True, slots=True)
class OpenedPhoto:
    """A photo that is about to be decoded.

    Attributes
    ----------
    image : PIL.Image.Image
        As stored, not turned; a JPEG is not decoded yet.
    width, height : int
        As stored, in pixels, whatever size it is decoded at.
    turn : int
        EXIF orientation, 1 to 8; 1 also where nobody asked for it.
    """

    image: Image.Image
    width: int
    height: int
    turn: int

    def upright(self) -> Image.Image:
        """Return the photo as it is to be looked at, decoded if it must be turned."""
        return turned(self.image, self.turn)


def turned(image: Image.Image, turn: int) -> Image.Image:
    """Return a picture turned and mirrored as an EXIF orientation (1 to 8) demands; the picture itself for 1."""
    return image if turn == 1 else image.transpose(TURNS[turn])


@contextmanager
def opened_photo(
    content: bytes, max_pixels: int, *, oriented: bool = True, draft: tuple[str | None, tuple[int, int]] | None = None
) -> Iterator[OpenedPhoto]:
    """Open a photo for decoding; any error until the end of the block becomes the failure of the photo.

    Parameters
    ----------
    content : bytes
        The whole file.
    max_pixels : int
        A photo that declares more pixels is refused.
    oriented : bool
        Whether the EXIF orientation is read. Formats other than JPEG are decoded for that: some tell it behind the
        pixels only.
    draft : (str or None, (int, int)), optional
        For a JPEG: the mode to decode to (None for the mode of the file), and the least columns and rows, in pixels, of
        the upright photo: libjpeg decodes at 1/2, 1/4 or 1/8 of the size where that is no smaller.

    Yields
    ------
    OpenedPhoto
        The photo, and its EXIF orientation.

    Raises
    ------
    PhotoError
        For anything that Pillow or the limit refuses, `MemoryError` included.
    """
    if not content:
        raise PhotoError(*EMPTY)
    with _photo_failures(max_pixels), Image.open(io.BytesIO(content), formats=readable_formats()) as image:
        width, height = image.size
        for columns, rows in ((width, height), _tile_size(image)):
            if columns * rows > max_pixels:
                raise PhotoError("too large", f"{columns} x {rows} pixels, over --max-pixels {max_pixels}")
        jpeg = image.format in JPEG_FORMATS
        if oriented and not jpeg:
            image.load()
        turn = orientation(image) if oriented else 1
        if draft is not None and jpeg:
            mode, (columns, rows) = draft
            # Of a photo that is stored lying on its side, columns are rows.
            image.draft(mode, (rows, columns) if turn >= 5 else (columns, rows))
        yield OpenedPhoto(image, width, height, turn)


@contextmanager
def _photo_failures(max_pixels: int) -> Iterator[None]:
    """Turn any error within the block into the failure of the photo."""
    try:
        yield
    except PhotoError:
        raise
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))
        raise PhotoError(
            "too large", f"{pixels[0] if pixels else '?'} pixels, over --max-pixels {max_pixels}"
        ) from None
    except UnidentifiedImageError:
        raise PhotoError("not an image", "no format of photos that Pillow reads begins like this file") from None
    except MemoryError:
        raise PhotoError(OUT_OF_MEMORY, "decoding it takes more than there is") from None
    except Exception as error:  # Pillow's plugins raise errors of all kinds on broken files
        raise PhotoError("broken", f"{type(error).__name__}: {error}") from error
