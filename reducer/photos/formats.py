"""Which files are photos, by their names."""

from __future__ import annotations

import os

from PIL import Image


def is_photo(name: str) -> bool:
    """Whether a file is called as Pillow's formats are."""
    return os.path.splitext(name)[1].lower() in Image.registered_extensions()
