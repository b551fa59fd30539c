"""Photos made smaller: never larger, and they lie as they lay."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms

from reducer.photos.hashing import PhotoError, pillow_settings
from reducer.photos.resize import resized

PIXELS = 10**8


def picture(mode: str = "RGB", size: tuple[int, int] = (400, 300)) -> Image.Image:
    """Dark above, bright to the right below."""
    across, down = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    levels = np.uint8(255 * across * down)
    image = Image.fromarray(np.dstack([levels, levels // 2, 255 - levels]))
    if mode == "I;16":
        return Image.fromarray((across * down * 60000).astype(np.uint16))
    if mode == "F":
        return Image.fromarray((across * down).astype(np.float32))
    return image.convert(mode)


def file_of(image: Image.Image, form: str, **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, form, **options)
    return sink.getvalue()


def smaller(content: bytes, side: int = 100) -> tuple[bytes, Image.Image]:
    with pillow_settings(PIXELS):
        made = resized(content, side, max_pixels=PIXELS)
    image = Image.open(io.BytesIO(made))
    image.load()
    return made, image


@pytest.mark.parametrize(
    ("form", "mode", "becomes"),
    [
        *(("JPEG", mode, "JPEG") for mode in ("RGB", "L", "CMYK")),
        *(("PNG", mode, "PNG") for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")),
        *(("TIFF", mode, "TIFF") for mode in ("RGB", "CMYK", "I;16", "F", "1", "LAB")),
        *(("WEBP", "RGB", "WEBP"), ("WEBP", "RGBA", "WEBP"), ("GIF", "P", "GIF"), ("BMP", "RGB", "BMP")),
        *(("PPM", "RGB", "PPM"), ("JPEG2000", "RGB", "JPEG2000"), ("TGA", "RGB", "PNG"), ("PCX", "P", "PNG")),
    ],
)
def test_every_kind_of_picture(form: str, mode: str, becomes: str) -> None:
    before = picture("RGB").convert("RGB") if mode == "LAB" else picture(mode)
    if mode == "LAB":
        to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
        before = ImageCms.applyTransform(before, to_lab)
    _, image = smaller(file_of(before, form))
    assert image.format == becomes
    assert image.size == (100, 75)
    grey = np.asarray(
        image
        if mode in ("I;16", "F")
        else image.convert("RGB").convert("L")
        if mode != "LAB"
        else image.getchannel("L")
    )
    whole = np.asarray(
        before
        if mode in ("I;16", "F")
        else before.convert("RGB").convert("L")
        if mode != "LAB"
        else before.getchannel("L")
    )
    assert abs(grey.mean() / whole.mean() - 1) < 0.1  # it is the same picture


def test_transparency_stays() -> None:
    image = picture("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    _, made = smaller(file_of(image, "PNG"))
    assert made.mode == "RGBA"
    assert made.getpixel((0, 0))[3] < 10
    assert made.getpixel((0, 74))[3] > 245
    palette = picture("P")
    palette.paste(7, (0, 0, 200, 200))
    _, made = smaller(file_of(palette, "PNG", transparency=7))
    assert made.convert("RGBA").getpixel((0, 0))[3] == 0


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_photo_lies_as_it_lay(form: str, turn: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = turn
    exif[ExifTags.Base.Artist] = "someone"
    content = file_of(picture(), form, exif=exif)
    _, made = smaller(content)
    with Image.open(io.BytesIO(content)) as before:
        before.load()
        assert made.size == ((75, 100) if before.height > before.width else (100, 75))
        assert made.getexif().get(ExifTags.Base.Orientation, 1) == before.getexif().get(ExifTags.Base.Orientation, 1)
        old, new = (np.asarray(image.convert("L").resize((8, 8))).astype(int) for image in (before, made))
    assert np.abs(old - new).max() < 30
    assert ExifTags.Base.Artist not in made.getexif()


def test_colours_keep_their_profile_and_comments_go() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    made, image = smaller(file_of(picture(), "JPEG", icc_profile=profile, comment=b"a secret"))
    assert image.info["icc_profile"] == profile
    assert b"a secret" not in made


@pytest.mark.parametrize("side", [400, 401, 5000])
def test_small_photos_stay_as_they_are(side: int) -> None:
    content = file_of(picture(), "JPEG", quality=33)
    assert smaller(content, side)[0] == content


def test_the_longest_side_counts() -> None:
    assert smaller(file_of(picture(size=(30, 3000)), "PNG"), 300)[1].size == (3, 300)
    assert smaller(file_of(picture(size=(3000, 2)), "PNG"), 10)[1].size == (10, 1)
    assert smaller(file_of(picture(), "JPEG"), 1)[1].size == (1, 1)


def test_of_an_animation_the_first_picture() -> None:
    frames = [picture("L").point(lambda level, by=by: level // by) for by in (1, 2, 3)]
    for form in ("GIF", "WEBP", "PNG", "TIFF"):
        _, image = smaller(file_of(frames[0], form, save_all=True, append_images=frames[1:]))
        assert getattr(image, "n_frames", 1) == 1
        assert np.asarray(image.convert("L")).max() > 120


@pytest.mark.parametrize("side", [100, 1000])
def test_what_cannot_be_decoded(side: int) -> None:
    content = file_of(picture(), "JPEG")
    for bad, why in ((b"", "empty"), (b"no photo", "not an image"), (content[: len(content) // 2], "broken")):
        with pytest.raises(PhotoError, match=why):
            smaller(bad, side)
    with pytest.raises(PhotoError, match="too large"), pillow_settings(1000):
        resized(content, side, max_pixels=1000)
