"""`--decode fastest`: the first scan of large progressive JPEGs, on S3 read without the others."""

from __future__ import annotations

import contextlib
import io
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jobs import READERS, SERIAL, ledger
from photofiles import FORMATS, hashed, saved
from PIL import Image
from s3server import S3Server

import reducer.photos.reader
import reducer.photos.requests
from reducer import Job, reduce_images
from reducer.api.sample import draw_view
from reducer.config.resolved import resolve
from reducer.config.settings import HASH_NAMES
from reducer.photos.hashing import PhotoError, enough_of
from reducer.photos.progressive import bytes_needed, first_scan_only
from reducer.photos.requests import FIRST_BYTES, PhotoFile
from reducer.storage.location import ByteRange, PhotoRef

GRID, PIXELS = (9, 8), 10**8
VIEW = draw_view(np.random.default_rng(3))
#: How JPEGs are saved: libjpeg's own script leaves the last bit of the means to a later scan.
SAVED: list[dict[str, Any]] = [
    {"quality": 75},
    {"quality": 95, "subsampling": "4:4:4"},
    {"quality": 60, "subsampling": "4:2:2"},
    {"quality": 80, "restart_marker_blocks": 7},
    {"quality": 80, "comment": b"\xff\xda" * 200},
    {"quality": 80, "exif": b"Exif\0\0" + b"\xff\xd8\xff\xd9" * 9000},
]


def jpeg(image: Image.Image = VIEW, *, progressive: bool = True, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", progressive=progressive, **options)
    return buffer.getvalue()


def apart(one: bytes, other: bytes) -> int:
    return (int.from_bytes(one) ^ int.from_bytes(other)).bit_count()


@pytest.mark.parametrize("how", SAVED, ids="-".join)
def test_the_first_scan_is_enough(how: dict[str, Any]) -> None:
    content = jpeg(**how)
    needed = bytes_needed(content, GRID, PIXELS)
    assert needed is not None and needed < 0.6 * len(content)
    cut = first_scan_only(content, GRID, PIXELS)
    assert cut is not None and cut.startswith(content[:needed]) and cut.endswith(b"\xff\xd9")
    with Image.open(io.BytesIO(cut)) as image:
        assert image.size == VIEW.size
        image.load()  # complete, as far as libjpeg can tell
    found = hashed(content, "fastest")
    assert (found.width, found.height, found.format) == (*VIEW.size, "JPEG")
    # What follows is not looked at.
    assert (
        hashed(content[:needed] + b"\xff\xfe", "fastest") == hashed(content[:needed] + b"\xff\xc4", "fastest") == found
    )


def test_nearly_all_hashes_stay_within_two_bits() -> None:
    bits, without = [], []
    for seed in range(40):
        view = draw_view(np.random.default_rng(seed))
        content = jpeg(view, quality=80)
        exact = hashed(content).bits
        bits.append(apart(hashed(content, "fastest").bits, exact))
        first = content[: bytes_needed(content, GRID, PIXELS)] + b"\xff\xd9"
        without.append(apart(hashed(first, "fast").bits, exact))
    assert np.mean(np.array(bits) <= 2) >= 0.95
    assert np.mean(bits) <= np.mean(without)  # the last bit in turn is better than none


@pytest.mark.parametrize("size", [(577, 513), (800, 600), (1201, 641), (4000, 3000)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_every_size(size: tuple[int, int], mode: str) -> None:
    content = jpeg(VIEW.resize(size).convert(mode), quality=75)
    assert first_scan_only(content, GRID, PIXELS) is not None
    found = hashed(content, "fastest")
    assert (found.width, found.height) == size
    assert apart(found.bits, hashed(content).bits) <= 4


@pytest.mark.parametrize("name", HASH_NAMES)
@pytest.mark.parametrize("hash_size", [8, 16])
def test_all_hashes(name: str, hash_size: int) -> None:
    content = jpeg(VIEW.resize((2400, 2100)), quality=85)
    options: dict[str, Any] = {"hash": name, "hash_size": hash_size}
    enough = enough_of(resolve(Job("-", "-", decode="fastest", **options)).photo_settings)
    assert enough is not None
    needed = enough(content)
    # 64 x 64 pixels times 8 are more than it has blocks.
    assert (needed is None) == (options == {"hash": "phash", "hash_size": 16})
    assert apart(hashed(content, "fastest", **options).bits, hashed(content, **options).bits) <= hash_size
    assert (hashed(content, "fastest", **options) == hashed(content, "fast", **options)) or needed is not None


def test_a_photo_that_lies_on_its_side_is_turned() -> None:
    exif = Image.Exif()
    exif[274] = 6
    content = jpeg(VIEW.transpose(Image.Transpose.ROTATE_90), exif=exif, quality=85)
    assert first_scan_only(content, GRID, PIXELS) is not None
    upright = hashed(jpeg(quality=85))
    assert apart(hashed(content, "fastest", exif_orientation=True).bits, upright.bits) <= 3
    assert apart(hashed(content, "fastest").bits, upright.bits) > 12


@pytest.mark.parametrize(
    ("kind", "mode", "how"), FORMATS, ids=lambda value: value if isinstance(value, str) else "-".join(value)
)
def test_all_else_is_decoded_as_fast_does(kind: str, mode: str, how: dict[str, object]) -> None:
    content = saved(kind, mode, how)
    assert first_scan_only(content, GRID, PIXELS) is None and bytes_needed(content, GRID, PIXELS) is None
    assert hashed(content, "fastest") == hashed(content, "fast")


def test_what_is_left_whole() -> None:
    whole = {
        "baseline": jpeg(progressive=False),
        "small": jpeg(VIEW.resize((568, 520))),
        "low": jpeg(VIEW.resize((900, 500))),
        "CMYK": jpeg(VIEW.convert("CMYK")),
        "RGB": jpeg(keep_rgb=True),
        "several": jpeg().replace(b"\xff\xdb", b"\xff\xe2\x00\x06MPF\x00\xff\xdb", 1),
    }
    assert b"MPF\0" in whole["several"]
    for name, content in whole.items():
        assert first_scan_only(content, GRID, PIXELS) is None, name
        assert bytes_needed(content, GRID, PIXELS) is None, name
        assert hashed(content, "fastest") == hashed(content, "fast"), name


def test_a_beginning_that_is_too_short_asks_for_more_and_comes_to_the_same() -> None:
    content = jpeg(exif=b"Exif\0\0" + bytes(50_000))
    needed = bytes_needed(content, GRID, PIXELS)
    assert needed is not None
    for length in [*range(1, 50), 45_000, needed - 1, needed, needed + 1]:  # the next marker tells where a scan ends
        wanted = bytes_needed(content[:length], GRID, PIXELS)
        assert wanted is not None and wanted > length, length
    assert bytes_needed(content[: needed + 2], GRID, PIXELS) == needed
    with pytest.raises(PhotoError, match=r"^broken|^not an image"):
        hashed(content[: needed - 200], "fastest")


def test_a_photo_that_takes_too_much_memory_fails_alone() -> None:
    huge = jpeg(VIEW.resize((800, 600)))
    frame = huge.index(b"\xff\xc2") + 5
    declared = huge[:frame] + b"\xff\xdc\xff\xdc" + huge[frame + 4 :]  # 65500 x 65500
    with pytest.raises(PhotoError, match=r"^too large: 4290250000 pixels"):
        hashed(declared, "fastest", max_pixels=10**9)
    assert bytes_needed(declared, GRID, 10**9) is None
    program = (
        "import resource, sys; from test_progressive import jpeg, VIEW, hashed\n"
        "import reducer.photos.hashing\n"
        "content = jpeg()\n"
        "end = content.rindex(b'\\xff\\xd9')\n"
        "first = reducer.photos.progressive.bytes_needed(content, (9, 8), 10**8)\n"
        "content = content[:first] + b'\\0' * 2**28 + content[first:]\n"
        "size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size + 2**27,) * 2)\n"
        "try: hashed(content, 'fastest')\n"
        "except reducer.photos.hashing.PhotoError as error: print(error)\n"
    )
    if sys.platform == "linux":
        told = subprocess.check_output(
            [sys.executable, "-c", program],
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert told == "out of memory: decoding it takes more than there is\n"


def test_long_headers_are_passed_over_at_once() -> None:
    for content in (b"\xff\xd8" + b"\xff" * 2**25, b"\xff\xd8" + b"\xff\xe1\x00\x02" * 2**23):
        start = time.perf_counter()
        assert bytes_needed(content, GRID, PIXELS) in (None, 4 * len(content))
        assert time.perf_counter() - start < 2  # where it went byte by byte it took many times as long


def test_broken_files_fail_as_photos_do() -> None:
    content = bytearray(jpeg(VIEW.resize((640, 560))))
    generator = random.Random(0)
    for _ in range(300):
        broken = bytearray(content[: generator.choice([len(content), generator.randrange(2000)])])
        for _ in range(generator.randrange(1, 6)):
            if broken:
                broken[generator.randrange(min(1000, len(broken)))] = generator.randrange(256)
        with contextlib.suppress(PhotoError):
            hashed(bytes(broken), "fastest")


@pytest.fixture(scope="module")
def some_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large progressive photos, one with a long header, one small; others; an empty file and one that is cut off."""
    folder = tmp_path_factory.mktemp("progressive") / "train" / "a"
    folder.mkdir(parents=True)
    for number in range(6):
        view = draw_view(np.random.default_rng(number))
        (folder / f"large{number}.jpg").write_bytes(jpeg(view.resize((1200, 900)), quality=85))
        (folder / f"baseline{number}.jpg").write_bytes(jpeg(view, progressive=False))
    (folder / "header.jpg").write_bytes(jpeg(exif=b"Exif\0\0" + bytes(60_000), quality=95))
    (folder / "small.jpg").write_bytes(jpeg(VIEW.resize((200, 150))))
    (folder / "exact.jpg").write_bytes(jpeg(quality=95) + bytes(FIRST_BYTES))
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "cut.jpg").write_bytes(jpeg()[:3000])
    VIEW.save(folder / "other.png")
    return folder.parent


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known of beginnings yet."""
    monkeypatch.setattr(reducer.photos.reader._shared(), "starts", reducer.photos.reader._Starts())


@pytest.mark.usefixtures("starts")
@pytest.mark.parametrize("reader", READERS)
def test_on_s3_only_the_beginning_is_read(
    some_photos: Path, s3: S3Server, reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.upload_folder(some_photos, "trial", "progressive/")
    read: dict[str, int] = {}
    fetch = reducer.photos.requests._fetch

    async def counted(ref: PhotoRef, *rest: Any) -> PhotoFile:
        file = await fetch(ref, *rest)
        name = (ref.path if isinstance(ref, ByteRange) else ref).rpartition("/")[2]
        read[name] = read.get(name, 0) + len(file.content)
        return file

    monkeypatch.setattr(reducer.photos.requests, "_fetch", counted)
    common: dict[str, Any] = {"keep": 3, "decode": "fastest", "report": False, "max_failures": 0.5}
    there = {"storage_options": s3.options(), "reader": reader}
    local = reduce_images(Job(str(some_photos), str(tmp_path / "local"), **common), SERIAL, progress=False)
    reduce_images(Job("s3://trial/progressive", str(tmp_path / "there"), **common, **there), SERIAL, progress=False)
    columns = ["id", "hash", "bytes", "width", "height", "format", "rank", "error"]
    here = ledger(tmp_path / "local").select(columns)
    assert here.to_pylist() == ledger(tmp_path / "there").select(columns).to_pylist()
    assert local.summary["photos_failed"] == 2
    for photo, size in zip(here["id"].to_pylist(), here["bytes"].to_pylist(), strict=True):
        name = photo.rpartition("/")[2]
        if name.startswith("large"):
            assert read[name] < 0.5 * size
        else:
            assert name in ("exact.jpg", "header.jpg") or read[name] == size, name
    assert read["exact.jpg"] < (some_photos / "a" / "exact.jpg").stat().st_size


@pytest.mark.usefixtures("starts")
def test_where_beginnings_are_not_enough_they_are_not_asked_for_any_more(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    for number in range(80):
        (folder / f"{number}.jpg").write_bytes(
            jpeg(draw_view(np.random.default_rng(0)), progressive=False) + bytes([number])
        )
    s3.upload_folder(folder.parent, "trial", "baseline/")
    requests: list[PhotoRef] = []
    fetch = reducer.photos.requests._fetch

    async def counted(ref: PhotoRef, *rest: Any) -> PhotoFile:
        requests.append(ref)
        return await fetch(ref, *rest)

    monkeypatch.setattr(reducer.photos.requests, "_fetch", counted)
    job = Job(
        "s3://trial/baseline",
        str(tmp_path / "run"),
        keep=3,
        decode="fastest",
        report=False,
        storage_options=s3.options(),
        read_ahead=1,
    )
    reduce_images(job, SERIAL, progress=False)
    photos = [ref for ref in requests if (ref.path if isinstance(ref, ByteRange) else ref).endswith(".jpg")]
    assert 80 < len(photos) <= 80 + 16 + 80 // 16
