"""Show a decoded photo as a person would see it: deep levels scaled to what they hold, transparency on white; pure."""

from __future__ import annotations

import numpy as np
from PIL import Image

#: Number of the way in which pictures become hashes and vectors unless they are decoded exactly. 1 took levels of more
#: than 8 bits as 8 bits, so that most became white, and left transparency out; 2 is `as_seen`.
DECODE_POLICY = 2
#: Formats, by Pillow's names, of which all policies make the same: they have 8 bits and no transparency.
SAME_BY_ALL_POLICIES = ("JPEG", "MPO")
#: Modes of more than 8 bits, grey all of them: Pillow itself clips them to 255.
DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
#: Rows of a deep picture that are scaled at a time, so that memory holds few numbers of 8 bytes.
ROWS = 256


def as_seen(image: Image.Image) -> Image.Image:
    """Return a picture as a person would see it on white paper.

    Parameters
    ----------
    image : PIL.Image.Image
        As decoded, of any mode.

    Returns
    -------
    PIL.Image.Image
        Of a mode of `DEEP_MODES` in grey of 8 bits, from black for the darkest level that is there to white for the
        brightest; of LAB its lightness; where anything is transparent in RGB, on white; else the picture itself.
    """
    if image.mode in DEEP_MODES:
        return _scaled(image)
    if image.mode == "LAB":  # for which Pillow has no way to grey or RGB without a profile
        return image.getchannel("L")
    if not image.has_transparency_data:
        return image
    coloured = image if image.mode == "RGBA" else image.convert("RGBA")
    alpha = coloured.getchannel("A")
    if alpha.getextrema()[0] == 255:
        return image
    ground = Image.new("RGB", image.size, "white")
    ground.paste(coloured, mask=alpha)
    return ground


def _scaled(image: Image.Image) -> Image.Image:
    """Return a picture of deep levels, which mean whatever they mean, in grey; what is transparent becomes white."""
    levels = np.asarray(image)
    transparent = image.info.get("transparency")
    is_shown = np.isfinite(levels)
    if isinstance(transparent, int):
        is_shown &= levels != transparent
    shown = levels[is_shown]
    low, high = (float(shown.min()), float(shown.max())) if shown.size else (0.0, 0.0)
    scale = 255 / ((high - low) or 1)
    grey = np.empty(levels.shape, dtype=np.uint8)
    for start in range(0, len(levels), ROWS):
        rows = np.nan_to_num(levels[start : start + ROWS].astype(np.float64), nan=low, posinf=high, neginf=low)
        grey[start : start + ROWS] = np.rint((np.clip(rows, low, high) - low) * scale)
    if isinstance(transparent, int):
        grey[levels == transparent] = 255
    return Image.fromarray(grey)
