"""Tell photos from other files by their names."""

from __future__ import annotations

import os

from PIL import Image


def is_photo(name: str) -> bool:
    """Tell whether the extension of a file name is one of Pillow's formats."""
    return os.path.splitext(name)[1].lower() in Image.registered_extensions()
