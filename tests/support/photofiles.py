"""One photo in every format, and its hash."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from reducer import Job
from reducer.api.sample import draw_view
from reducer.config.resolved import resolve
from reducer.photos.hashing import hash_photo, pillow_settings

PHOTO = draw_view(np.random.default_rng(7)).resize((400, 300))
#: (format, mode, how it is saved)
FORMATS = [
    ("JPEG", "RGB", {}),
    ("JPEG", "RGB", {"progressive": True, "quality": 60}),
    ("JPEG", "L", {}),
    ("JPEG", "CMYK", {}),
    ("MPO", "RGB", {"save_all": True, "append_images": [PHOTO]}),
    ("PNG", "1", {}),
    ("PNG", "L", {}),
    ("PNG", "LA", {}),
    ("PNG", "P", {}),
    ("PNG", "RGB", {}),
    ("PNG", "RGBA", {}),
    ("PNG", "I;16", {}),
    ("GIF", "P", {}),
    ("BMP", "RGB", {}),
    ("BMP", "P", {}),
    ("DIB", "RGB", {}),
    ("TIFF", "RGB", {}),
    ("TIFF", "CMYK", {}),
    ("TIFF", "F", {}),
    ("TIFF", "I", {}),
    ("TIFF", "1", {"compression": "group4"}),
    ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    ("WEBP", "RGB", {}),
    ("WEBP", "RGBA", {"lossless": True}),
    ("AVIF", "RGB", {}),
    ("JPEG2000", "RGB", {}),
    ("PPM", "RGB", {}),
    ("PPM", "L", {}),
    ("TGA", "RGBA", {}),
    ("PCX", "RGB", {}),
    ("SGI", "RGB", {}),
    ("ICO", "RGBA", {}),
    ("DDS", "RGBA", {}),
    ("QOI", "RGB", {}),
    ("SPIDER", "F", {}),
]


def as_mode(mode: str) -> Image.Image:
    if mode == "I;16":
        return Image.fromarray(np.asarray(PHOTO.convert("L")).astype(np.uint16) * 200)
    return PHOTO.convert(mode)


def saved(kind: str, mode: str, options: dict[str, object]) -> bytes:
    buffer = io.BytesIO()
    as_mode(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def hashed(content: bytes, decode: str = "exact", max_pixels: int = 10**8, **options: object):
    settings = resolve(Job("-", "-", decode=decode, max_pixels=max_pixels, **options)).photo_settings
    with pillow_settings(max_pixels):
        return hash_photo(content, settings)
