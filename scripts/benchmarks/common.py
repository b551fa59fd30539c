"""What all benchmarks share: how a thing is measured, how it is told, and what it is measured on."""

from __future__ import annotations

import csv
import json
import math
import os
import platform
import random
import shutil
import statistics
import sys
import tarfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
import pyarrow as pa
import pyarrow.csv
from PIL import Image

from reducer import ClusterSpec, Job, reduce_images
from reducer.api.sample import label_sizes, write_sample
from reducer.config.resolved import resolve
from reducer.photos.process import PhotoResult, process_photos
from reducer.run.plan.manifest import read_manifest
from reducer.run.tasks.environment import versions

PROCESSES = 2
REPETITIONS = 5
KEEP, CANDIDATES = 25, 1000
#: Different photos of a collection of links.
DRAWN = 2000
#: Starts a command and tells its seconds and its peak memory in KiB. A process counts as its own what the one that it
#: was forked from had in memory, so it is started from one that has nothing.
LAUNCHER = """
import resource, subprocess, sys, time
start = time.perf_counter()
subprocess.run(sys.argv[1:], check=True, stdout=sys.stderr)
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
#: All that was told so far, for ``--json``.
told: list[dict[str, object]] = []


def table(header: list[str], rows: list[list[object]]) -> None:
    """Print a Markdown table."""
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row) + " |")
    print(flush=True)
    told.append({"header": header, "rows": [[_plain(cell) for cell in row] for row in rows]})


def say(text: str) -> None:
    """Print a paragraph."""
    print(f"{text}\n", flush=True)
    told.append({"text": text})


def _plain(cell: object) -> object:
    if isinstance(cell, Figure):
        return {"median": cell.median, "least": cell.least, "most": cell.most, "repetitions": cell.repetitions}
    if isinstance(cell, np.generic):
        return cell.item()
    return cell if isinstance(cell, int | float | str | None) else str(cell)


def write_json(path: Path, command: str, options: Mapping[str, object]) -> None:
    """Write all that was told, with what it was measured on."""
    content = {
        "command": command,
        "options": {name: str(value) for name, value in options.items()},
        "machine": machine(),
        "versions": versions(),
        "told": told,
    }
    path.write_text(json.dumps(content, indent=2) + "\n")


@dataclass(frozen=True)
class Figure:
    """A figure that was measured several times."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle of all."""
        return statistics.median(self.values)

    @property
    def least(self) -> float:
        """The smallest."""
        return min(self.values)

    @property
    def most(self) -> float:
        """The largest."""
        return max(self.values)

    @property
    def repetitions(self) -> int:
        """How often it was measured."""
        return len(self.values)

    def __str__(self) -> str:
        return f"{_short(self.median)} ({_short(self.least)} to {_short(self.most)})"

    def __rtruediv__(self, number: float) -> Figure:
        return Figure(tuple(number / value for value in self.values))

    def __mul__(self, number: float) -> Figure:
        return Figure(tuple(number * value for value in self.values))

    def __truediv__(self, other: Figure) -> Figure:
        """Round by round: what makes the whole machine slow for a while makes both slow."""
        return Figure(tuple(own / its for own, its in zip(self.values, other.values, strict=True)))


def _short(value: float) -> str:
    """Three digits, and all those before the point."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def measured(
    ways: Mapping[str, Callable[[], float | None]], repetitions: int = REPETITIONS, *, warm_up: bool = True
) -> dict[str, Figure]:
    """Measure several ways side by side: each once to warm up, then all of them in turn, again and again.

    Parameters
    ----------
    ways : dict of str to callable
        What is measured; what it returns, or else its seconds.
    repetitions : int
        Rounds.
    warm_up : bool
        Whether a first round is not counted; not so of a single one, which is a trial.

    Returns
    -------
    dict of str to Figure
        In their order.
    """
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(-1 if warm_up and repetitions > 1 else 0, repetitions):
        for name, way in ways.items():
            start = time.perf_counter()
            own = way()
            value = time.perf_counter() - start if own is None else own
            if number >= 0:
                found[name].append(value)
            print(f"  {name}: {value:.4g}{'' if number >= 0 else ' (to warm up)'}", file=sys.stderr, flush=True)
    return {name: Figure(tuple(values)) for name, values in found.items()}


def timed(call: Callable[[], object]) -> float:
    """Its seconds."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def machine() -> str:
    """The machine's processor and the versions that decide."""
    model = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = (line for line in cpuinfo.read_text().splitlines() if line.startswith("model name"))
        model = next(lines, model).partition(":")[2].strip() or model
    python = platform.python_version()
    return f"{os.cpu_count()} x {model}, Python {python}, Pillow {Image.__version__}, imagehash {imagehash.__version__}"


def kibibytes(maxrss: str) -> int:
    """What `getrusage` tells, which is in bytes on macOS."""
    return int(maxrss) // (2**10 if sys.platform == "darwin" else 1)


def linked_collection(folder: Path, photos: int, large: int = 0) -> tuple[Path, dict[str, dict[str, str]]]:
    """So many hard links to a drawn sample, in labels that are all ranked; the manifest, and paths by label.

    One link in ``large``, if that is given, is to a photo of 12 megapixels.
    """
    drawn = min(DRAWN, photos)
    print(f"drawing {drawn} photos and linking them {photos / drawn:g} times ...", file=sys.stderr)
    write_sample(str(folder / "sample"), labels=max(1, drawn // 33), images=drawn)
    originals = sorted((folder / "sample" / "train").rglob("*.jpg"))
    huge = []
    for i in range(8 if large else 0):
        huge.append(folder / "sample" / f"large{i}.jpg")
        Image.open(originals[i]).resize((4000, 3000), Image.Resampling.BICUBIC).save(huge[-1], quality=92)
    labels = max(2, photos // 150)
    sizes = KEEP + 1 + label_sizes(labels, photos - (KEEP + 1) * labels)
    # None so large that candidates would be drawn: all photos are to be read by all.
    sizes = np.minimum(sizes, CANDIDATES)
    while left := photos - int(sizes.sum()):
        sizes[np.flatnonzero(sizes < CANDIDATES)[:left]] += 1
    by_label: dict[str, dict[str, str]] = defaultdict(dict)
    number = 0
    for label, size in enumerate(sizes.tolist()):
        (folder / "train" / str(label)).mkdir(parents=True)
        for _ in range(size):
            name = f"{number:016x}"
            path = folder / "train" / str(label) / f"{name}.jpg"
            other = large and number % large == 0
            os.link(huge[number // large % len(huge)] if other else originals[number % len(originals)], path)
            by_label[str(label)][name] = str(path)
            number += 1
    return _manifest(folder, by_label), by_label


def copied_collection(folder: Path, photos: str) -> tuple[Path, dict[str, dict[str, str]]]:
    """Copies of the photos of a folder with a folder a label, under ids of ours, as `linked_collection` gives them."""
    by_label: dict[str, dict[str, str]] = defaultdict(dict)
    number = 0
    for label, members in enumerate(photos_by_label(photos).values()):
        (folder / "train" / str(label)).mkdir(parents=True)
        for _, original in members[:CANDIDATES]:  # all photos are to be read by all
            name = f"{number:016x}"
            path = folder / "train" / str(label) / f"{name}.jpg"
            shutil.copyfile(original, path)
            by_label[str(label)][name] = str(path)
            number += 1
    return _manifest(folder, by_label), by_label


def _manifest(folder: Path, by_label: Mapping[str, Mapping[str, str]]) -> Path:
    manifest = folder / "train.csv"
    with open(manifest, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "landmark_id"])
        writer.writerows((name, label) for label, paths in by_label.items() for name in paths)
    return manifest


def reduced(job: Job, workers: int = PROCESSES) -> dict[str, Any]:
    """The summary of a run on a LocalCluster."""
    environment = dict(os.environ)
    try:
        return reduce_images(job, ClusterSpec(workers=workers), progress=False).summary
    finally:
        # Dask leaves the variables of its workers in this process; what is measured next is not to run under them.
        os.environ.clear()
        os.environ.update(environment)


def run_job(folder: Path, manifest: Path, name: str, workers: int = PROCESSES, **options: object) -> dict[str, Any]:
    """The summary of a run over a collection from `linked_collection`."""
    shutil.rmtree(folder / name, ignore_errors=True)
    job = Job(
        str(folder / "train"),
        str(folder / name),
        manifest=str(manifest),
        path_template="{label}/{id}.jpg",
        report=False,
        **options,
    )
    return reduced(job, workers)


def looks_at(paths: list[str], **options: object) -> list[PhotoResult]:
    """Look at photos in this process."""
    return list(process_photos(paths, resolve(Job("-", "-", **options)).photo_settings))


def photos_by_label(photos: str) -> dict[str, list[tuple[str, str]]]:
    """(id, path) of each photo of a folder with a folder a label."""
    found = read_manifest(Job(photos, "-")).table
    labels: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for label, photo, path in zip(*(found[name].to_pylist() for name in ("label", "id", "path")), strict=True):
        labels[label].append((photo, path))
    return labels


def small_photos(folder: Path, photos: int) -> int:
    """So many photos of about 63 KB, in a folder a label below train/; their bytes in all."""
    by_label: dict[str, list[Path]] = defaultdict(list)
    write_sample(str(folder / "sample"), labels=20, images=min(photos, 600))
    originals = sorted((folder / "sample").rglob("*.jpg"))
    for i in range(photos):
        label = folder / "train" / str(i % 30)
        label.mkdir(parents=True, exist_ok=True)
        copy = label / f"{i:06}.jpg"
        if i < 600:
            Image.open(originals[i % len(originals)]).save(copy, quality=70)
        else:
            os.link(by_label[str(i % 30)][i // 30 % 20], copy)
        by_label[label.name].append(copy)
    return sum(path.stat().st_size for paths in by_label.values() for path in paths)


def pack(photos: list[Path], shards: Path, count: int) -> None:
    """Photos dealt out to so many tar shards, under their names."""
    shards.mkdir()
    for number in range(count):
        # Photos that are hard links to one file are files of their own in a shard.
        with tarfile.open(shards / f"images_{number:03}.tar", "w", dereference=True) as shard:
            for photo in photos[number::count]:
                shard.add(photo, photo.name)


def sizes_of(path: str) -> np.ndarray:
    """Photos of each label, from a TSV file."""
    found = pa.csv.read_csv(path, parse_options=pa.csv.ParseOptions(delimiter="\t"))
    return np.repeat(found["images_in_class"].to_numpy(), found["n_classes"].to_numpy())


def some_of(paths: list[str], count: int) -> list[str]:
    """So many of them, always the same."""
    return random.Random(0).sample(paths, min(count, len(paths)))
