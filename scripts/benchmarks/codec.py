"""Decoding: where its time goes, how far the fast ways are from the exact one, what is flat."""

from __future__ import annotations

import io
import os
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
from benchmarks.common import looks_at, machine, measured, photos_by_label, say, some_of, table, timed
from PIL import Image

from reducer import Job
from reducer.config.resolved import resolve
from reducer.config.settings import DECODE_NAMES, HASH_NAMES, PhotoSettings, near_copy_bits
from reducer.photos.disk import read_photo
from reducer.photos.hashing import DRAFT_FLOOR, FLAT_DEVIATION, JPEG_FORMATS, enough_of, grey_deviation, hash_photo
from reducer.photos.process import PhotoResult
from reducer.photos.progressive import first_scan_only

#: So many photos of a folder are saved in other ways.
MOST_SAVED = 300
MOST_PIXELS = Job("-", "-").max_pixels


def codec(photos: str, repetitions: int) -> None:
    """Where one core's time goes, photo by photo: reading, opening, decoding, grey, resizing, the hash."""
    paths = some_of(jpegs_of(photos), 125)
    contents = [Path(path).read_bytes() for path in paths]
    progressive = [as_progressive(content, "keep") for content in contents]
    rows = []
    for kind, files, decode in (
        ("as they are", contents, "exact"),
        ("as they are", contents, "fast"),
        ("saved progressively", progressive, "fast"),
        ("saved progressively", progressive, "fastest"),
    ):
        settings = resolve(Job("-", "-", decode=decode)).photo_settings

        def opened(content: bytes, decode: str = decode) -> Image.Image:
            if decode == "fastest":
                content = first_scan_only(content, (9, 8), MOST_PIXELS) or content
            image = Image.open(io.BytesIO(content))
            if decode != "exact":
                image.draft("L", (DRAFT_FLOOR * 9, DRAFT_FLOOR * 8))
            return image

        def decoded(content: bytes, opened: Callable[[bytes], Image.Image] = opened) -> Image.Image:
            image = opened(content)
            image.load()
            return image

        def grey(content: bytes, decoded: Callable[[bytes], Image.Image] = decoded) -> Image.Image:
            return decoded(content).convert("L")

        def resized(content: bytes, grey: Callable[[bytes], Image.Image] = grey) -> object:
            return grey(content).resize((9, 8), Image.Resampling.LANCZOS)

        def hashed(content: bytes, settings: PhotoSettings = settings) -> object:
            return hash_photo(content, settings)

        steps: dict[str, Callable[[bytes], object]] = {
            "open": opened,
            "decode": decoded,
            "to grey": grey,
            "resize": resized,
            "the rest": hashed,
        }

        def each(step: Callable[[bytes], object], files: list[bytes] = files) -> float:
            start = time.perf_counter()
            for content in files:
                step(content)
            return 1000 * (time.perf_counter() - start) / len(files)

        ways = {name: (lambda step=step: each(step)) for name, step in steps.items()}
        reading = {"read": lambda: 1000 * timed(lambda: [read_photo(p, max_pixels=10**9) for p in paths]) / len(paths)}
        found = measured(reading | ways, repetitions)
        upto = [figure.median for name, figure in found.items() if name != "read"]
        own = np.diff([0.0, *upto])
        total = found["read"].median + upto[-1]
        shares = [f"{100 * spent / total:.0f} %" for spent in (found["read"].median, *own)]
        rows.append([kind, decode, total, *shares])
    size = sum(map(len, contents)) / len(contents) / 1e3
    say(
        f"{len(paths)} photos of {photos}, {size:.0f} KB on average, one core, in the page cache, median of "
        f"{repetitions} rounds; a step is what all up to it take, less what those before it take; {machine()}"
    )
    table(["files", "`--decode`", "ms a photo", "read", *steps], rows)


def as_progressive(content: bytes, quality: str | int) -> bytes:
    """A photo saved as a progressive JPEG, by libjpeg's own script; ``"keep"`` keeps its quantization."""
    target = io.BytesIO()
    with Image.open(io.BytesIO(content)) as image:
        jpeg = image.format == "JPEG"
        if quality == "keep" and not jpeg:
            quality = 90
        (image if jpeg else image.convert("RGB")).save(target, "JPEG", progressive=True, quality=quality)
    return target.getvalue()


def fidelity(photos: str, repetitions: int) -> None:
    """Bits by which the fast ways to decode are from the exact one: of every hash, and by kind of file."""
    paths = [path for label in photos_by_label(photos).values() for _, path in label]
    rows = []
    for name in HASH_NAMES:
        for size in (8, 16):
            looks: dict[str, list[PhotoResult]] = {}

            def look(
                decode: str, name: str = name, size: int = size, looks: dict[str, list[PhotoResult]] = looks
            ) -> float:
                start = time.perf_counter()
                looks[decode] = looks_at(paths, decode=decode, hash=name, hash_size=size)
                return 1000 * (time.perf_counter() - start) / len(paths)

            ways = {decode: (lambda decode=decode, look=look: look(decode)) for decode in ("exact", "fast")}
            found = measured(ways, 1)  # the bits are what is asked here
            bits = [bits_apart(*pair) for pair in zip(looks["exact"], looks["fast"], strict=True)]
            rows.append([name, size**2, *bits_apart_cells([n for n in bits if n is not None]), *found.values()])
    header = ["mean bits apart", "share within 2 bits", "most"]
    say(f"JPEGs of {photos}, one round, {machine()}")
    table(
        ["hash", "bits", *header, "exact, ms a photo", "fast, ms a photo"],
        [[*row[:-2], *(figure.median for figure in row[-2:])] for row in rows],
    )

    kinds: dict[tuple[str, str], list[bytes]] = defaultdict(list)
    for path in jpegs_of(photos):
        content, folder = Path(path).read_bytes(), os.path.relpath(path, photos).split(os.sep)[0]
        kinds[folder, "as they are"].append(content)
        if len(kinds[folder, "saved progressively"]) < MOST_SAVED:
            kinds[folder, "saved progressively"].append(as_progressive(content, "keep"))
            kinds[folder, "saved progressively, quality 80"].append(as_progressive(content, 80))
    rows = []
    for (folder, kind), contents in sorted(kinds.items()):
        hashes: dict[str, list[bytes]] = {}

        def run_hash_stage(
            decode: str, contents: list[bytes] = contents, hashes: dict[str, list[bytes]] = hashes
        ) -> float:
            settings = resolve(Job("-", "-", decode=decode)).photo_settings
            start = time.perf_counter()
            hashes[decode] = [hash_photo(content, settings).bits for content in contents]
            return 1000 * (time.perf_counter() - start) / len(contents)

        ways = {
            decode: (lambda decode=decode, run_hash_stage=run_hash_stage: run_hash_stage(decode))
            for decode in DECODE_NAMES
        }
        milliseconds = measured(ways, repetitions, warm_up=False)
        settings = resolve(Job("-", "-", decode="fastest")).photo_settings
        enough = enough_of(settings) or len
        needed = [min(enough(content) or len(content), len(content)) for content in contents]
        share = f"{100 * sum(needed) / sum(map(len, contents)):.0f} %"
        for decode in ("fast", "fastest"):
            apart = [differing(*pair) for pair in zip(hashes["exact"], hashes[decode], strict=True)]
            cells = [*bits_apart_cells(apart), milliseconds[decode], milliseconds["exact"] / milliseconds[decode]]
            rows.append([folder, kind, len(contents), decode, *cells, share if decode == "fastest" else ""])
    say(f"dHash, 64 bits, median of {repetitions} rounds")
    table(
        ["files", "how", "photos", "`--decode`", *header, "ms a photo", "exact's, times", "of their bytes it needs"],
        rows,
    )


def jpegs_of(photos: str) -> list[str]:
    """The JPEGs of a folder that can be decoded."""
    paths = [path for label in photos_by_label(photos).values() for _, path in label]
    looks = looks_at(paths)
    return [path for path, look in zip(paths, looks, strict=True) if look.hash and look.hash.format in JPEG_FORMATS]


def differing(one: bytes, other: bytes) -> int:
    """Bits that are not the same."""
    return (int.from_bytes(one) ^ int.from_bytes(other)).bit_count()


def bits_apart(exact: PhotoResult, fast: PhotoResult) -> int | None:
    """The same of what two looks at a JPEG gave; None for other files."""
    if fast.hash is None or exact.hash is None or exact.hash.format not in JPEG_FORMATS:
        return None
    return differing(exact.hash.bits, fast.hash.bits)


def bits_apart_cells(bits: list[int]) -> list[object]:
    """Cells of a table."""
    if not bits:
        sys.exit("no JPEG among the photos: fast is exact for all others")
    found = np.array(bits)
    return [float(found.mean()), f"{100 * (found <= 2).mean():.1f} %", int(found.max())]


def flat(photos: str) -> None:
    """What becomes of the hashes of photos whose contrast is lowered: where `FLAT_DEVIATION` comes from."""
    paths = [path for label in photos_by_label(photos).values() for _, path in label]
    looks = looks_at(paths, decode="exact")
    pictures = [(look.hash, path) for look, path in zip(looks, paths, strict=True) if look.hash]
    deviations = [grey_deviation(Image.open(path)) for _, path in pictures]
    some = random.Random(0).sample(pictures, min(100, len(pictures)))
    settings = resolve(Job("-", "-", decode="exact")).photo_settings
    rows = []
    for deviation in (1, 2, 3, 4, 5, 6, 8, 12, 24):
        apart = []
        for found, path in some:
            with Image.open(path) as image:
                image.draft("L", (400, 400))
                picture = image.convert("L")
            grey = np.asarray(picture).astype(float)
            dull = (grey - grey.mean()) / max(grey_deviation(picture), 1e-9) * deviation + 128
            content = io.BytesIO()
            Image.fromarray(dull.round().clip(0, 255).astype(np.uint8)).save(content, "JPEG", quality=90)
            other = hash_photo(content.getvalue(), settings).bits
            apart.append(differing(other, found.bits))
        rows.append([deviation, float(np.mean(apart)), f"{np.mean(np.array(apart) <= near_copy_bits(64)):.0%}"])
    say(
        f"{len(some)} photos of {photos}, their contrast lowered and saved again; a photo is flat under "
        f"{FLAT_DEVIATION:g}. The flattest of all {len(deviations)} has {min(deviations):.1f}, the median is "
        f"{np.median(deviations):.1f}."
    )
    table(["grey standard deviation", "mean bits from the photo's hash", "still near copies"], rows)
