"""Make photos smaller, bytes to bytes; pure."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from PIL import ExifTags, Image

from reducer.photos.hashing import JPEG_FORMATS, opened_photo, turned
from reducer.photos.seen import DEEP_MODES, as_seen

#: Of JPEG, WebP and AVIF.
QUALITY = 90
#: Options to write each format with; other formats become PNG.
OPTIONS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": QUALITY, "optimize": True},
    "PNG": {},
    "WEBP": {"quality": QUALITY},
    "TIFF": {"compression": "tiff_lzw"},
    "AVIF": {"quality": QUALITY},
    "GIF": {},
    "BMP": {},
    "PPM": {},
    "JPEG2000": {},
}
#: Least ratio of the size that a photo is decoded at to the size that it gets, where its format can do that.
REDUCING_GAP = 3.0


#: Qualities of JPEG that are tried in turn until a picture is small enough, and the scale that follows after them.
QUALITIES = (75, 50, 30)
SMALLER = 0.7
#: Pixels; a picture is made no smaller than that.
SMALLEST_SIDE = 32
#: Least ratio of the size that a JPEG is decoded at to the size of its thumbnail: something is to be averaged.
DECODED = 2


def resized(content: bytes, side: int, *, max_pixels: int) -> bytes:
    """Make a photo smaller, never larger, and leave it turned as it is.

    Its pixels are not turned: its EXIF orientation is kept beside them, and its colour profile. All else that stands
    beside the pixels is left out, and of an animation the first picture is kept.

    Parameters
    ----------
    content : bytes
        The whole file.
    side : int
        Pixels of the longest side at most.
    max_pixels : int
        A photo that declares more pixels is not decoded. Call inside ``with pillow_settings(max_pixels):``.

    Returns
    -------
    bytes
        A file of the same format where Pillow writes it, else a PNG. The content itself if the photo is small enough.

    Raises
    ------
    PhotoError
        For anything that Pillow or the limit refuses, `MemoryError` included.
    """
    with opened_photo(content, max_pixels) as photo:
        if max(photo.width, photo.height) <= side:
            photo.image.load()  # what is broken is not handed on
            return content
        kind = "JPEG" if photo.image.format in JPEG_FORMATS else str(photo.image.format)
        extras: dict[str, Any] = {}
        if profile := photo.image.info.get("icc_profile"):
            extras["icc_profile"] = profile
        if photo.turn != 1:
            exif = Image.Exif()
            exif[ExifTags.Base.Orientation] = photo.turn
            extras["exif"] = exif
        image = _smaller(photo.image, side).copy()  # of no format: a TIFF hands on all of its tags
        image.info.clear()  # a comment would be saved too
        for form, picture in _attempts(kind, image):
            file = io.BytesIO()
            try:
                picture.save(file, form, **OPTIONS[form], **extras)
            except (OSError, ValueError, KeyError):  # how Pillow says that a format does not take such pixels
                continue
            return file.getvalue()
        raise OSError(f"no format takes what mode {image.mode} becomes")


def _smaller(image: Image.Image, side: int) -> Image.Image:
    if image.mode in DEEP_MODES:
        scale = side / max(image.size)
        size = (max(1, round(scale * image.width)), max(1, round(scale * image.height)))
        resample = Image.Resampling.NEAREST if image.mode.startswith("I;16") else Image.Resampling.BOX
        return image.resize(size, resample)
    if image.mode in ("P", "PA", "1") or image.info.get("transparency") is not None:
        image = image.convert("RGBA" if image.has_transparency_data else "L" if image.mode == "1" else "RGB")
    image.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=REDUCING_GAP)
    return image


def _attempts(kind: str, image: Image.Image) -> Iterator[tuple[str, Image.Image]]:
    """Yield formats and pictures to try, the best first."""
    Image.init()
    if kind in OPTIONS and kind in Image.SAVE:
        yield kind, image
    if image.mode in DEEP_MODES:
        yield "TIFF", image
        return
    yield "PNG", image
    yield "PNG", image.convert("RGBA" if image.has_transparency_data else "RGB")


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """A small picture.

    Attributes
    ----------
    content : bytes
        A JPEG file.
    width, height : int
        In pixels.
    """

    content: bytes = field(repr=False)
    width: int
    height: int


def thumbnail(content: bytes, side: int, *, max_pixels: int, most_bytes: int) -> Thumbnail:
    """Draw a photo small and upright, what is transparent on white, of an animation the first picture.

    Parameters
    ----------
    content : bytes
        The whole file.
    side : int
        Pixels of the longest side at most; a smaller photo is not enlarged.
    max_pixels : int
        A photo that declares more pixels is not decoded. Call inside ``with pillow_settings(max_pixels):``.
    most_bytes : int
        Bytes of the JPEG file at most: its quality is lowered, then its size, until it has no more or the longest side
        has `SMALLEST_SIDE` pixels.

    Raises
    ------
    PhotoError
        For anything that Pillow or the limit refuses, `MemoryError` included.
    """
    with opened_photo(content, max_pixels, draft=(None, (DECODED * side, DECODED * side))) as photo:
        photo.image.load()
        image = turned(_shrunk(photo.image, side), photo.turn)
        image.info.clear()  # a comment would be saved too
        while True:
            for quality in QUALITIES:
                file = io.BytesIO()
                image.save(file, "JPEG", quality=quality, optimize=True)
                if file.tell() <= most_bytes:
                    return Thumbnail(file.getvalue(), *image.size)
            if max(image.size) <= SMALLEST_SIDE:
                return Thumbnail(file.getvalue(), *image.size)
            less = max(SMALLEST_SIDE, int(SMALLER * max(image.size)))
            image.thumbnail((less, less), Image.Resampling.LANCZOS)


def _shrunk(image: Image.Image, side: int) -> Image.Image:
    """Return a picture no larger than a side, in colour or grey as JPEG knows them."""
    image = as_seen(image)
    if image.mode not in ("RGB", "L"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    image.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
    return image
