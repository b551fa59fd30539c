"""Pictures are hashed, embedded and shown as a person sees them; opaque ones of 8 bits are left alone."""

from __future__ import annotations

import io

import numpy as np
import pytest
from photofiles import PHOTO, hashed
from PIL import Image, ImageOps

from reducer.photos.seen import as_seen

GREY = ImageOps.autocontrast(PHOTO.convert("L"))
LEVELS = np.asarray(GREY)


def file_of(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


@pytest.mark.parametrize(
    ("kind", "deep"),
    [
        ("PNG", LEVELS.astype(np.uint16) * 257),
        ("PNG", LEVELS.astype(np.uint16) * 16 + 3),  # 12 bits in 16
        ("TIFF", LEVELS.astype(">u2") * 200),
        ("TIFF", LEVELS.astype(np.int32) * 70_000 - 1_000_000),
        ("TIFF", LEVELS.astype(np.float32) / 255),
        ("TIFF", np.where(LEVELS == 255, np.inf, np.where(LEVELS == 0, np.nan, LEVELS)).astype(np.float32)),
    ],
    ids=["16", "12", "big-endian", "32", "float", "not-finite"],
)
def test_deep_levels_are_scaled_to_what_they_hold(kind: str, deep: np.ndarray) -> None:
    content = file_of(Image.fromarray(deep), kind)
    seen = as_seen(opened(content))
    assert seen.mode == "L"
    assert np.abs(np.asarray(seen).astype(int) - LEVELS).max() <= 2
    found, expected = hashed(content, "fast").bits, hashed(file_of(GREY, "PNG")).bits
    assert sum(int(byte).bit_count() for byte in np.bitwise_xor(*map(np.frombuffer, (found, expected), "BB"))) <= 1


def test_deep_pictures_without_a_range_are_black_and_flat() -> None:
    for levels in (np.full((50, 60), 700, np.uint16), np.full((50, 60), np.nan, np.float32)):
        content = file_of(Image.fromarray(levels), "TIFF")
        assert as_seen(opened(content)).getextrema() == (0, 0)
        assert hashed(content, "fast", drop_flat=True).flat


def test_transparency_is_white() -> None:
    alpha = Image.linear_gradient("L").resize(PHOTO.size)
    layered = PHOTO.convert("RGB")
    layered.putalpha(alpha)
    seen = np.asarray(as_seen(opened(file_of(layered, "PNG")))).astype(float)
    share = np.asarray(alpha)[..., None] / 255
    assert np.abs(seen - (np.asarray(PHOTO.convert("RGB")) * share + 255 * (1 - share))).max() <= 1

    palette = PHOTO.convert("P")
    index = palette.getpixel((10, 10))
    seen = as_seen(opened(file_of(palette, "PNG", transparency=index)))
    where = np.asarray(palette) == index
    assert (np.asarray(seen)[where] == 255).all()
    assert (np.asarray(seen)[~where] == np.asarray(palette.convert("RGB"))[~where]).all()

    deep = LEVELS.astype(np.uint16) * 100
    deep[:40] = 65_535  # transparent, and no part of what the levels hold
    seen = np.asarray(as_seen(opened(file_of(Image.fromarray(deep), "PNG", transparency=65_535))))
    assert (seen[:40] == 255).all()
    assert np.abs(seen[40:].astype(int) - np.rint(ImageOps.autocontrast(GREY.crop((0, 40, *GREY.size))))).max() <= 1


def test_hidden_colours_do_not_decide_a_hash() -> None:
    """Two cut-outs that look alike, whose transparent pixels hold something else."""
    mask = Image.new("L", PHOTO.size, 0)
    mask.paste(255, (100, 50, 300, 250))
    hashes = {}
    for decode in ("fast", "exact"):
        contents = []
        for hidden in (PHOTO, ImageOps.mirror(PHOTO)):
            picture = Image.composite(PHOTO, hidden, mask).convert("RGBA")
            picture.putalpha(mask)
            contents.append(file_of(picture, "PNG"))
        hashes[decode] = {hashed(content, decode).bits for content in contents}
    assert len(hashes["fast"]) == 1
    assert len(hashes["exact"]) == 2  # as imagehash does


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_opaque_pictures_of_8_bits_are_left_alone(mode: str) -> None:
    picture = PHOTO.convert(mode)
    assert as_seen(picture) is picture
