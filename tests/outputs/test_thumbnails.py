"""Small pictures of photos: what Pillow reads, where it lies, on workers that die or hang."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from deployments import DaskProcesses
from distributed import Client, LocalCluster
from killerphotos import KILLER, killer_env
from PIL import Image, PngImagePlugin
from s3server import S3Server
from tarfiles import packed, photos_below, write_tars

from reducer import Job
from reducer.config.resolved import resolve
from reducer.config.settings import Source
from reducer.outputs.report import thumbnails
from reducer.outputs.report.thumbnails import PictureBatch, PictureRequest, PictureSettings, draw, draw_on
from reducer.photos.hashing import PhotoError, pillow_settings
from reducer.photos.resize import SMALLEST_SIDE, Thumbnail, thumbnail
from reducer.storage.location import ByteRange

LIMITS = {"max_pixels": 10**8, "most_bytes": 40_000}
SETTINGS = resolve(Job("-", "-", max_pixels=10**8)).photo_settings


def small(content: bytes, side: int = 120, most_bytes: int = 40_000, max_pixels: int = 10**8) -> Image.Image:
    with pillow_settings(max_pixels):
        found = thumbnail(content, side, max_pixels=max_pixels, most_bytes=most_bytes)
    picture = Image.open(io.BytesIO(found.content))
    picture.load()
    assert picture.format == "JPEG"
    assert picture.size == (found.width, found.height)
    assert len(found.content) <= most_bytes
    return picture


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def corners(width: int = 400, height: int = 300) -> Image.Image:
    """Red, green, blue and white quarters."""
    image = Image.new("RGB", (width, height))
    for place, colour in enumerate(("red", "lime", "blue", "white")):
        left, top = place % 2 * width // 2, place // 2 * height // 2
        image.paste(colour, (left, top, left + width // 2, top + height // 2))
    return image


def seen(picture: Image.Image) -> list[str]:
    """What colours its quarters have: by their nearest."""
    names = {"red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255), "white": (255,) * 3, "black": (0,) * 3}
    picture = picture.convert("RGB")
    width, height = picture.size
    found = []
    for x, y in ((1, 1), (3, 1), (1, 3), (3, 3)):
        pixel = picture.getpixel((x * width // 4, y * height // 4))
        far = {name: sum((a - b) ** 2 for a, b in zip(pixel, colour, strict=True)) for name, colour in names.items()}
        found.append(min(far, key=far.__getitem__))
    return found


@pytest.mark.parametrize(
    ("size", "side", "expected"),
    [
        ((400, 300), 120, (120, 90)),
        ((300, 400), 120, (90, 120)),
        ((60, 40), 120, (60, 40)),  # never larger than it is
        ((5000, 10), 120, (120, 1)),
        ((4000, 3000), 240, (240, 180)),
    ],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_it_keeps_the_shape(size: tuple[int, int], side: int, expected: tuple[int, int], kind: str) -> None:
    picture = small(saved(Image.new("RGB", size, "red"), kind), side)
    assert picture.size == expected
    assert seen(picture) == ["red"] * 4


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_it_is_upright(orientation: int, kind: str) -> None:
    turned = {
        1: lambda image: image,
        2: lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: lambda image: image.transpose(Image.Transpose.ROTATE_180),
        4: lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: lambda image: image.transpose(Image.Transpose.TRANSPOSE),
        6: lambda image: image.transpose(Image.Transpose.ROTATE_90),
        7: lambda image: image.transpose(Image.Transpose.TRANSVERSE),
        8: lambda image: image.transpose(Image.Transpose.ROTATE_270),
    }[orientation](corners())
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = small(saved(turned, kind, exif=exif))
    assert picture.size == (120, 90)
    assert seen(picture) == ["red", "lime", "blue", "white"]
    assert picture.getexif().get(0x0112) is None


def test_broken_exif_data_cost_no_picture() -> None:
    content = saved(corners(), "JPEG", exif=b"Exif\x00\x00II*\x00" + b"\xff" * 20)
    assert seen(small(content)) == ["red", "lime", "blue", "white"]


def test_nothing_but_the_picture_is_in_it() -> None:
    exif = Image.Exif()
    exif[0x010E] = "SECRET description"
    content = saved(corners(), "JPEG", exif=exif, comment=b"SECRET comment", icc_profile=b"SECRET profile")
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "SECRET text")
    for given in (content, saved(corners(), "PNG", pnginfo=text)):
        with pillow_settings(10**8):
            assert b"SECRET" not in thumbnail(given, 120, **LIMITS).content


MODES = {
    "1": lambda: corners().convert("L").point(lambda level: 255 * (level > 100)).convert("1"),
    "L": lambda: corners().convert("L"),
    "LA": lambda: corners().convert("LA"),
    "P": lambda: corners().quantize(8),
    "RGBA": lambda: corners().convert("RGBA"),
    "CMYK": lambda: corners().convert("CMYK"),
    "YCbCr": lambda: corners().convert("YCbCr"),
    "I;16": lambda: Image.fromarray((np.asarray(corners().convert("L"), np.uint16) * 4) + 300),
    "I": lambda: Image.fromarray(np.asarray(corners().convert("L"), np.int32) * 1000 - 5000),
    "F": lambda: Image.fromarray(np.asarray(corners().convert("L"), np.float32) / 255),
}
COLOURED = ("P", "RGBA", "CMYK", "YCbCr")


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_seen(mode: str) -> None:
    image = MODES[mode]()
    assert image.mode == mode
    kind = "JPEG" if mode in ("CMYK", "YCbCr") else "TIFF" if mode in ("I", "F", "I;16") else "PNG"
    picture = small(saved(image, kind))
    if mode in COLOURED:
        assert seen(picture) == ["red", "lime", "blue", "white"]
        return
    # Grey: blue is the darkest, white the brightest, whatever their levels are.
    levels = [picture.convert("L").getpixel((x * 30, y * 22)) for x, y in ((1, 1), (3, 1), (1, 3), (3, 3))]
    assert levels[3] > 240
    if mode != "1":
        assert levels[2] < levels[0] < levels[1] < levels[3]
    if mode in ("I;16", "I", "F"):
        assert levels[2] < 15


def test_lab_and_levels_that_are_no_numbers() -> None:
    lab = Image.merge("LAB", [corners().convert("L").point(lambda v: v)] + [Image.new("L", (400, 300), 128)] * 2)
    picture = small(saved(lab, "TIFF"))
    assert picture.convert("L").getpixel((90, 66)) > 240
    levels = np.asarray(corners().convert("L"), np.float32)
    levels[:5], levels[5:10], levels[10:15] = np.nan, np.inf, -np.inf
    picture = small(saved(Image.fromarray(levels), "TIFF"))
    assert picture.size == (120, 90)
    blue, white = (picture.convert("L").getpixel(place) for place in ((30, 66), (90, 66)))
    assert blue < 15
    assert white > 240
    for nothing in (np.nan, np.inf):
        assert small(saved(Image.fromarray(np.full((90, 120), nothing, np.float32)), "TIFF")).size == (120, 90)


def test_what_is_transparent_is_white() -> None:
    clear = Image.new("RGBA", (200, 200), (255, 0, 0, 0))
    half = Image.new("RGBA", (200, 200), (0, 0, 0, 128))
    for image in (clear, clear.quantize(4)):
        assert seen(small(saved(image, "PNG"))) == ["white"] * 4
    assert 120 < small(saved(half, "PNG")).convert("L").getpixel((50, 50)) < 135
    known = Image.new("P", (200, 200), 3)
    known.putpalette([0, 0, 0] * 256)
    assert seen(small(saved(known, "GIF", transparency=3))) == ["white"] * 4


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_picture_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (200, 200), colour) for colour in ("red", "blue", "lime")]
    content = saved(frames[0], kind, save_all=True, append_images=frames[1:], duration=100)
    assert seen(small(content)) == ["red"] * 4


@pytest.mark.parametrize("most", [40_000, 6_000, 2_500, 1_500])
def test_it_is_as_small_as_is_asked(most: int) -> None:
    noise = Image.effect_noise((800, 600), 120).convert("RGB")
    content = saved(noise, "PNG")
    first, second = small(content, 240, most), small(content, 240, most)
    assert first.tobytes() == second.tobytes()
    assert (max(first.size) == 240) == (most >= 6_000)  # lower quality comes first
    assert abs(first.width / first.height - 4 / 3) < 0.1


def test_it_ends_where_nothing_is_small_enough() -> None:
    noise = saved(Image.effect_noise((800, 600), 120), "PNG")
    with pillow_settings(10**8):
        found = thumbnail(noise, 240, max_pixels=10**8, most_bytes=10)
    assert max(found.width, found.height) == SMALLEST_SIDE


@pytest.mark.parametrize(
    ("content", "max_pixels", "message"),
    [
        (b"", 10**8, "empty: the file has 0 bytes"),
        (b"no picture", 10**8, "not an image: no format of photos that Pillow reads begins like this file"),
        (saved(corners(), "JPEG")[:1500], 10**8, "broken: OSError: image file is truncated"),
        (saved(corners(), "PNG"), 119_999, "too large: 400 x 300 pixels, over --max-pixels 119999"),
    ],
    ids=["empty", "no image", "cut off", "too large"],
)
def test_why_there_is_no_picture(content: bytes, max_pixels: int, message: str) -> None:
    with pillow_settings(max_pixels), pytest.raises(PhotoError) as caught:
        thumbnail(content, 120, max_pixels=max_pixels, most_bytes=40_000)
    assert str(caught.value).startswith(message)


def test_odd_and_broken_files_give_a_picture_or_a_reason(trial_files: Path) -> None:
    files = sorted(map(str, (trial_files / "malformed").rglob("*")))
    files = [file for file in files if Path(file).is_file()]
    before = Image.MAX_IMAGE_PIXELS
    wanted = [PictureRequest(file, 100, is_known=True) for file in files]
    found = list(draw(wanted, Source(), SETTINGS, most_bytes=20_000))
    assert before == Image.MAX_IMAGE_PIXELS
    assert [number for number, _ in found] == list(range(len(files)))
    pictures = [one for _, one in found if isinstance(one, Thumbnail)]
    assert 700 < len(pictures) < len(files) - 50
    for one in pictures:
        assert max(one.width, one.height) <= 100
        assert len(one.content) <= 20_000
    for reason in (one for _, one in found if isinstance(one, str)):
        assert reason.split(":")[0] in ("broken", "empty", "not an image", "too large")
        assert len(reason.splitlines()) == 1


@pytest.fixture(scope="module")
def places(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str | ByteRange]:
    """Twelve files, two photos in a tar, and five that are none."""
    folder = tmp_path_factory.mktemp("places")
    names = photos_below(tiny / "train")
    first = dict(sorted(names.items())[:12])
    refs: list[str | ByteRange] = []
    for name, content in first.items():
        (folder / f"{name}.jpg").write_bytes(content)
        refs.append(str(folder / f"{name}.jpg"))
    write_tars(folder / "tars", packed(first, 1))
    (shard,) = (folder / "tars").iterdir()
    whole = shard.read_bytes()
    refs += [ByteRange(str(shard), whole.index(content), len(content)) for content in list(first.values())[:2]]
    (folder / "text.jpg").write_bytes(b"no photo")
    changed = ByteRange(str(shard), whole.index(first[min(first)]), 100, mtime_ns=1)
    return [*refs, str(folder / "missing.jpg"), str(folder), str(folder / "text.jpg"), changed, "\0"]


def test_photos_are_drawn_from_where_they_lie(places: list[str | ByteRange]) -> None:
    found = dict(draw([PictureRequest(ref, 100) for ref in places], Source(), SETTINGS, most_bytes=40_000))
    assert all(isinstance(found[number], Thumbnail) for number in range(14))
    assert (found[12], found[13]) == (found[0], found[1])
    reasons = [str(found[number]) for number in range(14, 19)]
    assert [reason.split(":")[0] for reason in reasons] == [
        "missing",
        "not a file",
        "not an image",
        "changed",
        "missing",
    ]


def test_photos_on_s3(tiny: Path, s3: S3Server) -> None:
    name, content = sorted(photos_below(tiny / "train").items())[0]
    s3.make_bucket("drawn")
    s3.client().put_object(Bucket="drawn", Key=f"{name}.jpg", Body=content)
    s3.client().put_object(Bucket="drawn", Key="shard.tar", Body=b"\0" * 512 + content + b"\0" * 512)
    source = Source(s3.options())
    refs = [f"s3://drawn/{name}.jpg", ByteRange("s3://drawn/shard.tar", 512, len(content)), "s3://drawn/none.jpg"]
    (_, one), (_, part), (_, missing) = draw(
        [PictureRequest(ref, 100) for ref in refs], source, SETTINGS, most_bytes=40_000
    )
    with pillow_settings(10**8):
        assert one == part == thumbnail(content, 100, **LIMITS)
    assert str(missing).startswith("missing: ")


def test_a_task_tells_no_secret_and_no_path() -> None:
    source = Source({"secret": "PLANTED", "key": "PLANTED"})
    shown = repr(PictureBatch((0,), (PictureRequest("/planted/path", 1),))) + repr(PictureSettings(source, SETTINGS, 1))
    assert "PLANTED" not in shown
    assert "planted" not in shown


@pytest.fixture
def dask(tmp_path: Path) -> Iterator[DaskProcesses]:
    with DaskProcesses(tmp_path) as processes:
        yield processes
        for process in list(processes.logs):
            processes.kill(process)


def on(client: Client, wanted: list[PictureRequest], **options: object) -> list[Thumbnail | str]:
    found = dict(draw_on(client, wanted, Source(), SETTINGS, most_bytes=40_000, **options))  # type: ignore[arg-type]
    assert sorted(found) == list(range(len(wanted)))
    return [found[number] for number in range(len(wanted))]


def test_a_cluster_draws_the_same(places: list[str | ByteRange]) -> None:
    wanted = [PictureRequest(ref, side) for ref in places for side in (60, 120)]
    expected = [picture for _, picture in draw(wanted, Source(), SETTINGS, most_bytes=40_000)]
    with (
        LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        assert on(client, wanted) == expected
        assert on(client, []) == []
        (worker,) = client.scheduler_info()["workers"]
        assert on(client, wanted[:3], avoid=[worker]) == ["not drawn: the cluster has no worker for it"] * 3
        assert on(client, wanted[:3], avoid=["tcp://127.0.0.1:1"]) == expected[:3]
    found = on(client, wanted[:3])  # which is closed by now
    assert all(str(reason).startswith("not drawn: ") for reason in found)


def test_photos_that_no_one_has_decoded_yet_cost_no_worker(
    places: list[str | ByteRange], tmp_path: Path, dask: DaskProcesses
) -> None:
    for how in ("signal", "hang"):
        (tmp_path / f"{how}.jpg").write_bytes(f"KILLER {how}".encode())
    good = [PictureRequest(ref, 60, is_known=True) for ref in places[:12]]
    expected = [picture for _, picture in draw(good, Source(), SETTINGS, most_bytes=40_000)]
    address = dask.scheduler(env={"DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "0"})
    dask.registered(*(dask.worker(address, env=killer_env(tmp_path), nanny=False) for _ in range(2)))
    with Client(address) as client:
        workers = set(client.scheduler_info()["workers"])
        found = on(client, [PictureRequest(str(tmp_path / "signal.jpg"), 60), *good])
        assert found == ["killed its worker: the process that looked at it was ended by SIGKILL", *expected]
        assert set(client.scheduler_info()["workers"]) == workers
        # One that was decoded before, and kills all the same, costs its own task at least; the others end too.
        found = on(client, [PictureRequest(str(tmp_path / "signal.jpg"), 60, is_known=True), *good], patience=30.0)
        assert str(found[0]).startswith("not drawn: ")
        assert all(
            one == its or str(one).startswith("not drawn: ") for one, its in zip(found[1:], expected, strict=True)
        )
        # And one that hangs.
        started = time.monotonic()
        found = on(client, [*good, PictureRequest(str(tmp_path / "hang.jpg"), 60, is_known=True)], patience=3.0)
        assert time.monotonic() - started < 20
        assert set(found[:-1]) <= {*expected, found[-1]}
        assert found[-1] == "not drawn: the workers gave no more pictures in 3 s"


def test_a_photo_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The good photo behind it needs less, and a process that is started for it, on a busy machine too.
    monkeypatch.setattr(thumbnails, "TRIED", 6.0)
    monkeypatch.setenv("PYTHONPATH", KILLER)
    (tmp_path / "hang.jpg").write_bytes(b"KILLER hang")
    (tmp_path / "good.png").write_bytes(saved(corners(), "PNG"))
    wanted = [PictureRequest(str(tmp_path / name), 60) for name in ("hang.jpg", "good.png")]
    hanging, good = (picture for _, picture in draw(wanted, Source(), SETTINGS, most_bytes=40_000))
    assert hanging == "stalled: no end after 6 s"
    assert isinstance(good, Thumbnail)
