"""The built-in sample: a drawn collection in Google Landmarks v2's layout, with the truth about its copies."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from tqdm.auto import tqdm

from reducer.errors import InputError
from reducer.run.dask.connect import CPU_COUNT

WIDTH, HEIGHT = 800, 600
#: Photos per landmark in GLDv2-clean (81,313 landmarks) at these shares of the landmarks.
GLDV2_QUANTILES = (
    (0.0, 2),
    (0.1, 3),
    (0.2, 4),
    (0.3, 6),
    (0.4, 7),
    (0.5, 9),
    (0.6, 12),
    (0.7, 17),
    (0.8, 24),
    (0.9, 42),
    (0.95, 67),
    (0.98, 111),
    (0.99, 157),
    (0.995, 218),
    (0.998, 311),
    (0.999, 397),
    (0.9999, 966),
    (1.0, 6272),
)
#: Photos per view of a landmark: one shows the view first, the others are copies of it.
PHOTOS_PER_VIEW = 3
#: Changes that make copies, and their shares. To dHash crops and flips are no near copies, the others are.
CHANGES = {"brightness": 0.3, "quality": 0.25, "resize": 0.25, "crop": 0.12, "flip": 0.08}
#: Bounds of the size of an encoded photo, in bytes.
FEWEST_BYTES, MOST_BYTES = 60_000, 150_000


@dataclass(frozen=True)
class SamplePhoto:
    """One photo to draw."""

    id: str
    landmark: str
    view: str
    change: str


def label_sizes(labels: int, images: int) -> NDArray[np.int64]:
    """Return the photos per label, in the shape of GLDv2's histogram scaled to a number of photos.

    Parameters
    ----------
    labels, images : int
        Numbers of labels and photos, ``images`` at least twice ``labels``.

    Returns
    -------
    ndarray of int64, shape (labels,)
        Photos per label, rising, at least 2 each, ``images`` in all.
    """
    shares, sizes = np.array(GLDV2_QUANTILES).T
    at = (np.arange(labels) + 0.5) / labels
    wanted = np.exp(np.interp(at, shares, np.log(sizes)))
    # Every label has 2; what is left goes by size, remainders to the largest.
    beyond = np.maximum(wanted - 2, 1e-9)
    exact = beyond * (images - 2 * labels) / beyond.sum()
    extra = np.floor(exact).astype(np.int64)
    left = images - 2 * labels - int(extra.sum())
    extra[np.argsort(-(exact - extra), kind="stable")[:left]] += 1
    return np.sort(2 + extra)


def plan_sample(labels: int, images: int, seed: int) -> list[SamplePhoto]:
    """Return the photos to draw: their ids, views and changes, in the order of ``train.csv``."""
    photos = []
    for label, size in enumerate(label_sizes(labels, images).tolist()):
        random = _random(seed, "label", label)
        landmark = str(1 + label * 203_093 // labels + int(random.integers(203_093 // labels)))
        views = max(2, round(size / PHOTOS_PER_VIEW))
        for number in range(size):
            if number < views:
                view, change = number, "original"
            else:
                view = int(random.integers(views))
                change = str(random.choice(list(CHANGES), p=list(CHANGES.values())))
            name = hashlib.blake2b(f"{seed}/{landmark}/{number}".encode(), digest_size=8).hexdigest()
            photos.append(SamplePhoto(name, landmark, f"{landmark}-{view}", change))
    order = _random(seed, "order").permutation(len(photos))
    return [photos[i] for i in order]


def write_sample(directory: str, *, labels: int = 60, images: int = 2000, seed: int = 0, progress: bool = True) -> int:
    """Draw a collection: ``train/a/b/c/ID.jpg``, ``train.csv`` and ``truth.csv``.

    Parameters
    ----------
    directory : str
        Folder to write; made if it is not there, refused if it holds something.
    labels, images : int
        Landmarks, and photos in all (at least two per landmark).
    seed : int
        Seed of the collection: an equal seed draws equal files, with equal versions of numpy and Pillow.
    progress : bool
        Whether to show a progress bar.

    Returns
    -------
    int
        Bytes of all photos.

    Raises
    ------
    InputError
        If the numbers do not fit, or the folder is not empty.
    """
    if labels < 1 or labels > 10_000:
        raise InputError(f"--labels is {labels}: expected 1 to 10000")
    if images < 2 * labels:
        raise InputError(f"--images is {images}: {labels} labels need at least {2 * labels}, two each")
    target = _empty_folder(directory)
    photos = plan_sample(labels, images, seed)
    total = _draw_photos(photos, target, seed, progress)
    _write_csv(target / "train.csv", ("id", "landmark_id"), [(p.id, p.landmark) for p in photos])
    _write_csv(target / "truth.csv", ("id", "view", "change"), [(p.id, p.view, p.change) for p in photos])
    return total


def _empty_folder(directory: str) -> Path:
    """Make a folder, refusing one that holds something."""
    target = Path(directory)
    try:
        target.mkdir(parents=True, exist_ok=True)
        is_empty = not any(target.iterdir())
    except OSError as error:
        raise InputError(f"DIR {directory} cannot be used: {error.strerror or error}") from None
    if not is_empty:
        raise InputError(f"DIR {directory} is there already and not empty: give another folder")
    return target


def _draw_photos(photos: list[SamplePhoto], target: Path, seed: int, progress: bool) -> int:
    """Write the photos of all views, and return their size in bytes."""
    by_view: dict[str, list[SamplePhoto]] = {}
    for photo in photos:
        by_view.setdefault(photo.view, []).append(photo)
        (target / "train" / "/".join(photo.id[:3])).mkdir(parents=True, exist_ok=True)

    def draw(view: str) -> int:
        base = draw_view(_random(seed, "view", view))
        size = 0
        for photo in by_view[view]:
            content = encode(CHANGE_FUNCTIONS[photo.change](base, _random(seed, "photo", photo.id)), photo.change)
            (target / "train" / "/".join(photo.id[:3]) / f"{photo.id}.jpg").write_bytes(content)
            size += len(content)
            bar.update()
        return size

    # Pillow lets go of the interpreter lock while it resizes and encodes, so threads are enough.
    with (
        tqdm(total=len(photos), unit=" photos", desc="drawing", disable=not progress) as bar,
        ThreadPoolExecutor(CPU_COUNT) as pool,
    ):
        try:
            return sum(pool.map(draw, by_view))
        except BaseException:
            pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for what is not begun
            raise


def draw_view(random: np.random.Generator) -> Image.Image:
    """Draw one view: clouds of noise at every scale (as photos have), and some buildings before them."""
    coarse = sum(
        weight * _noise(random, columns) for columns, weight in ((3, 44), (6, 32), (12, 19), (50, 10), (200, 8))
    )
    light = np.asarray(Image.fromarray(np.asarray(coarse)).resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR))
    grain = random.integers(-10, 11, (HEIGHT, WIDTH), dtype=np.int8)
    grey = Image.fromarray(np.clip(light + grain + 125, 0, 255).astype(np.uint8))
    tints = [12 * _noise(random, 4) + 7 * _noise(random, 12) + 128 for _ in range(2)]
    colours = [Image.fromarray(np.clip(tint, 0, 255).astype(np.uint8)) for tint in tints]
    planes = [grey, *(colour.resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR) for colour in colours)]
    image = Image.merge("YCbCr", planes).convert("RGB")
    pen = ImageDraw.Draw(image, "RGBA")
    for _ in range(int(random.integers(3, 8))):
        width, height = random.integers(50, 220), random.integers(80, 420)
        left = int(random.integers(-40, WIDTH - 40))
        colour = tuple(int(c) for c in random.integers(30, 225, 3))
        pen.rectangle((left, int(HEIGHT - height), int(left + width), HEIGHT), fill=(*colour, 150))
        for x in range(left + 10, int(left + width) - 14, 26):
            for y in range(int(HEIGHT - height) + 12, HEIGHT, 34):
                pen.rectangle((x, y, x + 11, y + 17), fill=(20, 25, 40, 150))
    return image


def _noise(random: np.random.Generator, columns: int) -> NDArray[np.float32]:
    """Draw smooth noise with a number of random points per row, at a quarter of the photo's size."""
    rows = max(2, columns * HEIGHT // WIDTH)
    small = Image.fromarray(random.standard_normal((rows, columns), dtype=np.float32))
    return np.asarray(small.resize((WIDTH // 4, HEIGHT // 4), Image.Resampling.BICUBIC))


def _brightness(image: Image.Image, random: np.random.Generator) -> Image.Image:
    factor = float(random.choice([0.7, 0.8, 1.15, 1.25]))
    return image.point([min(255, round(level * factor)) for level in range(256)] * 3)


def _resize(image: Image.Image, random: np.random.Generator) -> Image.Image:
    width = int(random.choice([720, 880, 960]))
    return image.resize((width, width * HEIGHT // WIDTH), Image.Resampling.BILINEAR)


def _crop(image: Image.Image, random: np.random.Generator) -> Image.Image:
    left, top = int(random.integers(WIDTH // 8)), int(random.integers(HEIGHT // 8))
    box = (left, top, left + WIDTH * 7 // 8, top + HEIGHT * 7 // 8)
    return image.resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR, box=box)


CHANGE_FUNCTIONS: dict[str, Callable[[Image.Image, np.random.Generator], Image.Image]] = {
    "original": lambda image, random: image,
    "quality": lambda image, random: image,
    "brightness": _brightness,
    "resize": _resize,
    "crop": _crop,
    "flip": lambda image, random: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
}


def encode(image: Image.Image, change: str) -> bytes:
    """Encode as JPEG, by the first of three qualities that gives `FEWEST_BYTES` to `MOST_BYTES`, else by the last."""
    for quality in (74, 80, 66) if change == "quality" else (90, 82, 94):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        if FEWEST_BYTES <= buffer.tell() <= MOST_BYTES:
            break
    return buffer.getvalue()


def _random(seed: int, *key: object) -> np.random.Generator:
    """Return the random numbers of a key."""
    digest = hashlib.blake2b(repr((seed, *key)).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


def _write_csv(path: Path, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
