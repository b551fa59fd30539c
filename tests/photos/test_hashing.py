from __future__ import annotations

import io
import struct
import threading
import warnings
import zlib
from pathlib import Path

import imagehash
import numpy as np
import pytest
from photofiles import FORMATS, PHOTO, hashed, saved
from PIL import ExifTags, Image, ImageOps

from reducer import InputError, Job
from reducer.api.sample import draw_view
from reducer.config.resolved import resolve
from reducer.config.settings import DECODE_NAMES, HASH_NAMES, near_copy_bits
from reducer.photos.formats import is_photo
from reducer.photos.hashing import FLAT_DEVIATION, HASHES, PhotoError, grey_deviation, pillow_settings
from reducer.photos.process import process_photos
from reducer.photos.seen import DEEP_MODES
from reducer.storage.codecs import from_hex, to_hex

IMAGEHASH = {
    "dhash": imagehash.dhash,
    "dhash-vertical": imagehash.dhash_vertical,
    "phash": imagehash.phash,
    "ahash": imagehash.average_hash,
    "whash": imagehash.whash,
}


@pytest.mark.parametrize(
    ("kind", "mode", "options"), FORMATS, ids=lambda value: value if isinstance(value, str) else "-".join(value)
)
def test_exact_is_imagehash_bit_for_bit(tmp_path: Path, kind: str, mode: str, options: dict[str, object]) -> None:
    content = saved(kind, mode, options)
    path = tmp_path / "photo"
    path.write_bytes(content)
    with Image.open(path) as image:
        assert image.mode == mode or kind not in ("PNG", "TIFF")
        expected = imagehash.dhash(image)
    found = hashed(content)
    assert to_hex(found.bits, 64) == found.bits.hex() == str(expected)
    assert found.bits == np.packbits(expected.hash).tobytes()
    assert (found.width, found.height) == ((256, 192) if kind == "ICO" else (400, 300))
    assert found.format == kind
    if kind not in ("JPEG", "MPO") and mode not in DEEP_MODES:
        assert hashed(content, "fast") == found
    for name, function in IMAGEHASH.items():
        with Image.open(path) as image:
            expected = function(image)
        assert to_hex(hashed(content, hash=name).bits, 64) == str(expected), name


def test_a_photo_s_content_chooses_no_program() -> None:
    """PostScript under a photo's name is not handed to Ghostscript, nor is anything else taken that is no photo."""
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n%%EOF\n"
    for content in (postscript, b"\x89HDF\r\n\x1a\n" + bytes(600), b"GRIB" + bytes(3) + b"\x01" + bytes(600)):
        with pytest.raises(PhotoError, match="no format of photos that Pillow reads begins like this file"):
            hashed(content)


def test_photos_by_name() -> None:
    assert all(map(is_photo, ("a.jpg", "A.JPEG", "b.webp", "c.tiff", "d.avif", "e.jp2", "f.tga", "g.mpo", "h.pcd")))
    assert not any(map(is_photo, ("a.pdf", "b.h5", "c.mpg", "d.eps", "e.ps", "f.wmf", "g.txt", "jpg", ".jpg", "h")))


def test_heic_is_read_where_its_package_is_installed() -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    file = io.BytesIO()
    pillow_heif.from_pillow(PHOTO).save(file, quality=95)
    assert is_photo("IMG_1.HEIC")
    found = hashed(file.getvalue())
    assert found.format == "HEIF"
    assert bits_apart(found.bits, hashed(saved("PNG", "RGB", {})).bits) <= 4


def test_at_least_twelve_formats() -> None:
    assert len({kind for kind, _, _ in FORMATS}) >= 12


def bits_apart(one: bytes, other: bytes) -> int:
    return (int.from_bytes(one) ^ int.from_bytes(other)).bit_count()


def test_fast_stays_close_to_exact_and_reports_the_full_size() -> None:
    apart = []
    for seed in range(20):
        buffer = io.BytesIO()
        draw_view(np.random.default_rng(seed)).save(buffer, "JPEG", quality=88)
        fast, exact = hashed(buffer.getvalue(), "fast"), hashed(buffer.getvalue())
        assert (fast.width, fast.height) == (800, 600)
        apart.append(bits_apart(fast.bits, exact.bits))
    assert max(apart) <= 3
    assert sum(apart) <= 20


@pytest.mark.parametrize("name", HASH_NAMES)
@pytest.mark.parametrize("size", [2, 3, 4, 5, 8, 16, 31, 32])
def test_every_hash_of_every_size_is_imagehash_s(name: str, size: int) -> None:
    """Sizes whose bits fill no whole bytes too: their hex is still that of imagehash."""
    if name == "whash" and size not in (2, 4, 8, 16, 32):
        with pytest.raises(InputError, match="whash needs a power of two"):
            Job("-", "-", hash=name, hash_size=size)
        return
    for content in (saved("JPEG", "RGB", {}), saved("PNG", "RGBA", {})):
        expected = IMAGEHASH[name](Image.open(io.BytesIO(content)), size)
        found = hashed(content, hash=name, hash_size=size)
        assert found.bits == np.packbits(expected.hash).tobytes()
        text = to_hex(found.bits, size**2)
        assert text == str(expected)
        assert from_hex(text, size**2) == from_hex(text.upper(), size**2) == found.bits
        fast = hashed(content, "fast", hash=name, hash_size=size)
        assert bits_apart(fast.bits, found.bits) <= near_copy_bits(size**2) // 2 + 1


def test_what_is_no_hash_is_not_read() -> None:
    for text in ("", "0" * 15, "0" * 17, "x" * 16, "0x" + "0" * 14, " " + "0" * 15, "-" + "0" * 15, "0_0" + "0" * 13):
        with pytest.raises(ValueError, match="is no hash of 64 bits: expected 16 hexadecimal digits"):
            from_hex(text, 64)
    with pytest.raises(ValueError, match="no hash of 9 bits"):
        from_hex("200", 9)
    assert from_hex("1ff", 9) == b"\xff\x80"


@pytest.mark.parametrize(
    ("name", "hash_size", "floor"),
    [
        ("dhash", 8, (144, 128)),
        ("dhash-vertical", 8, (128, 144)),
        ("ahash", 8, (128, 128)),
        ("whash", 8, (128, 128)),
        ("phash", 8, (512, 512)),
        ("dhash", 16, (272, 256)),
        ("phash", 2, (128, 128)),
    ],
)
def test_fast_never_decodes_below_the_floor(
    name: str, hash_size: int, floor: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    real = IMAGEHASH[name]

    def watched(image: Image.Image, hash_size: int):
        decoded.append(image.size)
        return real(image, hash_size)

    monkeypatch.setattr(imagehash, HASHES[name].function, watched)
    columns, rows = floor
    sizes = [(100, 75), floor, (2 * columns - 1, 2 * rows - 1), (2 * columns, 2 * rows), (5 * columns, rows - 38)]
    for size in [*sizes, (9, 8), (1, 1)]:
        buffer = io.BytesIO()
        PHOTO.resize(size).save(buffer, "JPEG")
        decoded.clear()
        fast, exact = (hashed(buffer.getvalue(), d, hash=name, hash_size=hash_size) for d in ("fast", "exact"))
        halved = size[0] >= 2 * columns and size[1] >= 2 * rows
        assert decoded[0] == ((size[0] // 2, size[1] // 2) if halved else size)
        assert decoded[1] == size
        assert bits_apart(fast.bits, exact.bits) <= near_copy_bits(hash_size**2) // 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_upright_when_asked(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    buffer = io.BytesIO()
    draw_view(np.random.default_rng(3)).save(buffer, kind, exif=exif)
    content = buffer.getvalue()
    for name, function in IMAGEHASH.items():
        upright = function(ImageOps.exif_transpose(Image.open(io.BytesIO(content))))
        found = hashed(content, hash=name, exif_orientation=True)
        assert to_hex(found.bits, 64) == str(upright)
        fast = hashed(content, "fast", hash=name, exif_orientation=True)
        assert bits_apart(fast.bits, found.bits) <= 3
        as_stored = hashed(content, hash=name)
        assert to_hex(as_stored.bits, 64) == str(function(Image.open(io.BytesIO(content))))
        # Pillow itself turns a TIFF upright while it decodes.
        assert (as_stored.bits == found.bits) == (orientation == 1 or kind == "TIFF")
        assert (found.width, found.height) == (as_stored.width, as_stored.height)


def test_the_floor_is_turned_with_the_photo(monkeypatch: pytest.MonkeyPatch) -> None:
    """256 x 288 as stored, 288 x 256 upright: just enough to be halved for a grid of 9 x 8."""
    sizes = []
    real = imagehash.dhash
    monkeypatch.setattr(imagehash, "dhash", lambda image, hash_size: sizes.append(image.size) or real(image, hash_size))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    buffer = io.BytesIO()
    PHOTO.resize((256, 288)).save(buffer, "JPEG", exif=exif)
    hashed(buffer.getvalue(), "fast", exif_orientation=True)
    hashed(buffer.getvalue(), "fast")
    assert sizes == [(144, 128), (256, 288)]


def test_broken_exif_data_cost_no_photo(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Image.Image) -> None:
        raise SyntaxError("not a TIFF file (header b'' not valid)")

    content = saved("JPEG", "RGB", {})
    expected = hashed(content)
    monkeypatch.setattr(Image.Image, "getexif", broken)
    assert hashed(content, exif_orientation=True) == expected


def test_flatness_does_not_hang_on_how_a_photo_is_hashed() -> None:
    """Noise is no detail, whether a decode at reduced size averages it away or not."""
    noise = np.random.default_rng(0).normal(128, 12, (1200, 1600)).clip(0, 255).astype(np.uint8)
    large = io.BytesIO()
    Image.fromarray(noise).save(large, "JPEG", quality=95)
    photo = saved("JPEG", "RGB", {})
    for decode in DECODE_NAMES:
        for name in HASH_NAMES:
            for size in (2, 16):
                options = {"hash": name, "hash_size": size, "drop_flat": True}
                assert hashed(large.getvalue(), decode, **options).flat
                assert not hashed(photo, decode, **options).flat


@pytest.mark.parametrize("grey", [0, 107, 255])
def test_one_colour_is_flat_at_any_size(grey: int) -> None:
    for size in [(1094, 1755), (1, 1), (3, 700), (64, 64)]:
        buffer = io.BytesIO()
        Image.new("L", size, grey).save(buffer, "PNG")
        assert hashed(buffer.getvalue(), drop_flat=True).flat


def test_photos_of_more_than_8_bits_are_never_called_flat() -> None:
    """Grey, Pillow clips them to white or black: that says nothing of what is to be seen."""
    for kind, mode in [("PNG", "I;16"), ("TIFF", "I;16"), ("TIFF", "I"), ("TIFF", "F")]:
        assert not hashed(saved(kind, mode, {}), drop_flat=True).flat


def test_flat_photos_are_found_only_when_asked() -> None:
    grey = np.asarray(PHOTO.convert("L")).astype(float)
    for kind in ("JPEG", "PNG"):
        for deviation, flat in [(0.0, True), (0.8 * FLAT_DEVIATION, True), (1.2 * FLAT_DEVIATION, False), (40, False)]:
            buffer = io.BytesIO()
            dull = (grey - grey.mean()) / grey_deviation(PHOTO) * deviation + 128
            Image.fromarray(dull.round().clip(0, 255).astype(np.uint8)).convert("RGB").save(buffer, kind)
            for decode in DECODE_NAMES:
                found = hashed(buffer.getvalue(), decode, drop_flat=True)
                assert found.flat is flat, (kind, deviation)
                plain = hashed(buffer.getvalue(), decode)
                assert plain.flat is False
                assert plain.bits == found.bits


def test_bad_content_is_one_line_that_names_its_kind() -> None:
    jpeg = saved("JPEG", "RGB", {})
    for content, kind in [(b"", "empty"), (b"<html>", "not an image"), (jpeg[:-3000], "broken"), (jpeg[:30], "broken")]:
        for decode in DECODE_NAMES:
            with pytest.raises(PhotoError) as caught:
                hashed(content, decode)
            message = str(caught.value)
            assert message.startswith(f"{kind}: ")
            assert "\n" not in message
            assert "0x" not in message


def test_too_many_pixels_are_not_decoded() -> None:
    content = saved("PNG", "1", {})
    assert hashed(content, max_pixels=400 * 300)
    with pytest.raises(PhotoError, match=r"^too large: 120000 pixels, over --max-pixels 119998$"):
        hashed(content, max_pixels=400 * 300 - 2)
    with pytest.raises(PhotoError, match=r"^too large: 400 x 300 pixels, over --max-pixels 119999$"):
        hashed(content, max_pixels=400 * 300 - 1)


def test_pixels_that_only_show_when_decoding_are_limited_too() -> None:
    """A TIFF of 16 x 16 pixels in one tile of 4000 x 4000, a large PNG in an ICNS that says it is small."""
    tile = zlib.compress(bytes(4000 * 4000))
    tags = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: 4000, 323: 4000, 324: 8, 325: len(tile)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    content = b"II*\0" + struct.pack("<I", 8 + len(tile)) + tile + directory
    assert (hashed(content).width, hashed(content).height) == (16, 16)
    with pytest.raises(PhotoError, match=r"^too large: 4000 x 4000 pixels, over --max-pixels 1000000$"):
        hashed(content, max_pixels=1_000_000)
    picture = io.BytesIO()
    Image.new("RGBA", (1024, 1024)).save(picture, "PNG")
    entry = b"ic07" + struct.pack(">I", 8 + len(picture.getvalue())) + picture.getvalue()  # 128 x 128, it says
    declared_small = b"icns" + struct.pack(">I", 8 + len(entry)) + entry
    with pytest.raises(PhotoError, match=r"^too large: 1048576 pixels, over --max-pixels 500000$"):
        hashed(declared_small, max_pixels=500_000)


def test_running_out_of_memory_is_a_failure_of_the_photo(monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy(image: Image.Image, hash_size: int) -> None:
        raise MemoryError

    monkeypatch.setattr(imagehash, "dhash", greedy)
    with pytest.raises(PhotoError, match=r"out of memory: decoding it takes more than there is"):
        hashed(saved("PNG", "L", {}))


def test_pillow_s_limit_is_ours_while_we_read_and_then_its_own_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    content = saved("PNG", "L", {})
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(content))
    inside, leave = threading.Event(), threading.Event()

    def other_thread() -> None:
        with pillow_settings(10**8):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other_thread)
    thread.start()
    inside.wait(10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert hashed(content).width == 400
    assert Image.MAX_IMAGE_PIXELS == 10**8 // 2  # the other thread still reads
    leave.set()
    thread.join()
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_every_malformed_file_gives_a_hash_or_an_error(trial_files: Path) -> None:
    """dHash for all, and each of the other hashes for every fourth."""
    files = sorted(path for path in (trial_files / "malformed").rglob("*") if path.is_file())
    assert len(files) > 900
    others = [name for name in HASH_NAMES if name != "dhash"]
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, 100_000_000
    failed = 0
    try:
        for number, path in enumerate(files):
            for name in ("dhash", others[number % len(others)]):
                settings = resolve(Job("-", "-", decode="exact", hash=name)).photo_settings
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        expected = str(IMAGEHASH[name](Image.open(path)))
                except Exception:
                    expected = None
                (look,) = process_photos([str(path)], settings)
                assert (look.hash and to_hex(look.hash.bits, 64)) == expected, (path, name)
                assert (look.error is None) == (expected is not None)
            failed += look.hash is None
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    assert 50 < failed < 200
