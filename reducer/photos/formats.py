"""Formats of photos: which files are taken for photos by their names, and what a photo's content is decoded as."""

from __future__ import annotations

import importlib
import os
from contextlib import suppress
from functools import cache

from PIL import Image

#: Formats that photos come in, by Pillow's names, in the order in which they are tried. Pillow knows more, but others
#: are no photos, or Pillow does not decode them itself: it hands PostScript to Ghostscript, a program that does what a
#: file says, and of HDF5, GRIB, BUFR, MPEG and WMF it knows the name alone. HEIF and JXL come with plugins.
PHOTO_FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "DIB", "AVIF", "HEIF", "JXL", "JPEG2000"),
    *("PPM", "QOI", "PSD", "PCD", "DDS", "ICO", "ICNS", "SGI", "SUN", "PCX", "SPIDER", "TGA"),
)
#: Formats that are opened as another one.
OPENED_AS = {"MPO": "JPEG"}
#: Packages that teach Pillow a format where they are installed, and the functions that do it.
PLUGINS = {"pillow_heif": "register_heif_opener"}
#: What makes files readable that Pillow cannot decode by itself, by their extensions.
REMEDIES = {
    **dict.fromkeys((".heic", ".heics", ".heif", ".heifs", ".hif"), "pip install pillow-heif reads it"),
    ".avif": "a Pillow with AVIF reads it",
    **dict.fromkeys(
        (".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2"), "a camera's raw file: export it as JPEG"
    ),
}


@cache
def _load_plugins() -> None:
    for name, function in PLUGINS.items():
        with suppress(ImportError):
            getattr(importlib.import_module(name), function)()


def why_unreadable(extension: str) -> str:
    """Say that a file is left out for its extension, with its dot and in small letters, and what would read it."""
    remedy = f" ({REMEDIES[extension]})" if extension in REMEDIES else ""
    return f"file ending in {extension}{remedy}"


def is_photo(name: str) -> bool:
    """Tell whether the extension of a file name is one of a format of photos that can be decoded here."""
    return is_extension(os.path.splitext(name)[1])


def is_extension(extension: str) -> bool:
    """Tell whether an extension, with its dot, is one of a format of photos that can be decoded here."""
    _load_plugins()
    form = Image.registered_extensions().get(extension.lower(), "")
    form = OPENED_AS.get(form, form)
    return form in PHOTO_FORMATS and form in Image.OPEN


def readable_formats() -> list[str]:
    """Return those of `PHOTO_FORMATS` that can be decoded here, for ``Image.open(..., formats=...)``."""
    _load_plugins()
    Image.init()
    return [form for form in PHOTO_FORMATS if form in Image.OPEN]
