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
from PIL import Image

from reducer.config import DECODE_NAMES, PhotoSettings
from reducer.hashing import DRAFT_FLOOR, HASH_GRID, PhotoError, hash_photo, pillow_settings
from reducer.pipeline import look_at
from reducer.sample import draw_view

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


def hashed(content: bytes, decode: str = "exact", max_pixels: int = 10**8):
    with pillow_settings(max_pixels):
        return hash_photo(content, decode=decode, max_pixels=max_pixels)


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
    assert found.bits.hex() == str(expected)
    assert found.bits == np.packbits(expected.hash).tobytes()
    assert (found.width, found.height) == ((256, 192) if kind == "ICO" else (400, 300))
    assert found.format == kind
    if kind not in ("JPEG", "MPO"):
        assert hashed(content, "fast") == found


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


@pytest.mark.parametrize("size", [(100, 75), (144, 128), (287, 255), (288, 256), (600, 90), (9, 8), (1, 1)])
def test_fast_never_decodes_below_the_floor(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    real = imagehash.dhash

    def watched(image: Image.Image, hash_size: int):
        decoded.append(image.size)
        return real(image, hash_size)

    buffer = io.BytesIO()
    PHOTO.resize(size).save(buffer, "JPEG")
    monkeypatch.setattr(imagehash, "dhash", watched)
    fast, exact = hashed(buffer.getvalue(), "fast"), hashed(buffer.getvalue())
    floor = tuple(DRAFT_FLOOR * side for side in HASH_GRID)
    assert floor == (144, 128)
    halved = size[0] >= 2 * floor[0] and size[1] >= 2 * floor[1]
    assert decoded[0] == ((size[0] // 2, size[1] // 2) if halved else size)
    assert decoded[1] == size
    assert bits_apart(fast.bits, exact.bits) <= 3


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
    with pytest.raises(PhotoError, match=r"too large: .*memory"):
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
    files = sorted(path for path in (trial_files / "malformed").rglob("*") if path.is_file())
    assert len(files) > 900
    settings = PhotoSettings(keep=25, strategy="random", decode="exact", seed=0, max_pixels=200_000_000)
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, 100_000_000
    failed = 0
    try:
        for path in files:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    expected = str(imagehash.dhash(Image.open(path)))
            except Exception:
                expected = None
            with pillow_settings(settings.max_pixels):
                look = look_at(str(path), settings)
            assert (look.hash and look.hash.bits.hex()) == expected, path
            assert (look.error is None) == (expected is not None)
            failed += look.hash is None
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    assert 50 < failed < 200
