"""Measure what the README claims, side by side in one run; prints Markdown tables. Nothing here is asserted.

Examples:
    python scripts/bench.py speed                  # whole job against the notebook and against bare processes
    python scripts/bench.py memory                 # peak worker memory, small and large partitions
    python scripts/bench.py fidelity PHOTOS        # bits by which --decode fast differs from exact
    python scripts/bench.py quality PHOTOS         # near copies kept by each strategy; a folder a label
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import imagehash
import numpy as np
from PIL import Image

from reducer import ClusterSpec, Job, reduce_images
from reducer.config import STRATEGY_NAMES
from reducer.job import Result
from reducer.manifest import read_manifest
from reducer.pipeline import look_at_all
from reducer.sample import label_sizes, write_sample

NUM_SAMPLES_TO_COMPARE = 1000
NUM_SAMPLES_SAVE_PER_LANDMARK = 25
PROCESSES = 2


def table(header: list[str], rows: list[list[object]]) -> None:
    """Print a Markdown table."""
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row) + " |")
    print()


# The notebook's own code, as it stands, but for the names of its globals and the plots.


def notebook_hashes(paths: dict[str, str], image_names: list[str]) -> list[imagehash.ImageHash]:
    img_hash = []
    for name in image_names:
        img_hash.append(imagehash.dhash(Image.open(paths[name])))
    return img_hash


def notebook_get_matches(paths: dict[str, str]) -> list[tuple[str, int]]:
    image_names = list(paths)
    num_samples = min(len(image_names), NUM_SAMPLES_TO_COMPARE)
    image_names = random.sample(image_names, num_samples)
    img_hash = notebook_hashes(paths, image_names)

    match_pct = {}
    for i in range(len(img_hash)):
        base_name = image_names[i]
        for j in range(i + 1, len(img_hash)):
            curr_name = image_names[j]
            match_pct[f"{base_name}_{curr_name}"] = img_hash[i] - img_hash[j]

    return sorted(match_pct.items(), key=lambda item: item[1])


def notebook_f(label: tuple[str, dict[str, str]]) -> set[tuple[str, str]]:
    landmark_id, paths = label
    match_pct = notebook_get_matches(paths)
    filenames = set()
    for idx in range(len(match_pct)):
        pair = match_pct[-idx]
        id1, id2 = pair[0].split("_")
        filenames.add((id1, landmark_id))
        filenames.add((id2, landmark_id))
        if len(filenames) >= NUM_SAMPLES_SAVE_PER_LANDMARK:
            break
    return filenames


def notebook_only_hashes(label: tuple[str, dict[str, str]]) -> int:
    return len(notebook_hashes(label[1], list(label[1])))


def hash_only(work: tuple[list[str], str]) -> int:
    """A bare process: the job's own hash function over a list of paths, nothing else."""
    paths, decode = work
    settings = Job("-", "-", decode=decode).photo_settings
    return sum(look.hash is not None for look in look_at_all(paths, settings))


def linked_collection(folder: Path, photos: int) -> tuple[Path, dict[str, dict[str, str]]]:
    """So many hard links to a drawn sample, in labels that are all ranked; the manifest, and paths by label."""
    print(f"drawing 2000 photos and linking them {photos / 2000:g} times ...", file=sys.stderr)
    write_sample(str(folder / "sample"), labels=60, images=2000)
    originals = sorted((folder / "sample" / "train").rglob("*.jpg"))
    labels = max(2, photos // 150)
    sizes = NUM_SAMPLES_SAVE_PER_LANDMARK + 1 + label_sizes(labels, photos - 26 * labels)
    # None so large that candidates would be drawn: all photos are to be read by all.
    sizes = np.minimum(sizes, NUM_SAMPLES_TO_COMPARE)
    while left := photos - int(sizes.sum()):
        sizes[np.flatnonzero(sizes < NUM_SAMPLES_TO_COMPARE)[:left]] += 1
    by_label: dict[str, dict[str, str]] = defaultdict(dict)
    number = 0
    for label, size in enumerate(sizes.tolist()):
        (folder / "train" / str(label)).mkdir(parents=True)
        for _ in range(size):
            name = f"{number:016x}"
            path = folder / "train" / str(label) / f"{name}.jpg"
            os.link(originals[number % len(originals)], path)
            by_label[str(label)][name] = str(path)
            number += 1
    manifest = folder / "train.csv"
    with open(manifest, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "landmark_id"])
        writer.writerows((name, label) for label, paths in by_label.items() for name in paths)
    return manifest, by_label


def run_job(folder: Path, manifest: Path, name: str, workers: int = PROCESSES, **options: object) -> Result:
    shutil.rmtree(folder / name, ignore_errors=True)
    job = Job(
        str(folder / "train"), str(folder / name), manifest=str(manifest), path_template="{label}/{id}.jpg", **options
    )
    environment = dict(os.environ)
    try:
        return reduce_images(job, ClusterSpec(workers=workers))
    finally:
        # Dask leaves the variables of its workers in this process; what is measured next is not to run under them.
        os.environ.clear()
        os.environ.update(environment)


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def speed(photos: int) -> None:
    """The whole job against the notebook, against its hashing alone, and against bare processes."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        manifest, by_label = linked_collection(folder, photos)
        paths = [path for paths in by_label.values() for path in paths.values()]
        some = random.Random(0).sample(paths, min(300, photos))

        core: dict[str, list[float]] = defaultdict(list)
        for _ in range(6):
            core["notebook"].append(timed(lambda: [imagehash.dhash(Image.open(path)) for path in some]))
            for decode in ("exact", "fast"):
                core[decode].append(timed(lambda decode=decode: hash_only((some, decode))))
        per_photo = {name: float(np.median(times[1:])) / len(some) for name, times in core.items()}
        ratio = per_photo["notebook"] / per_photo["fast"]

        rates: dict[str, float] = {}
        starts = []
        labels = sorted(by_label.items(), key=lambda item: -len(item[1]))
        for decode in ("fast", "exact"):
            halves = [(paths[start::PROCESSES], decode) for start in range(PROCESSES)]
            with multiprocessing.get_context("spawn").Pool(PROCESSES) as pool:
                pool.map(hash_only, [(some[:20], decode)] * PROCESSES)
                rates[f"bare {decode}"] = photos / timed(lambda halves=halves, pool=pool: pool.map(hash_only, halves))
            timings = run_job(folder, manifest, decode, decode=decode).summary["timings"]
            starts.append(timings["cluster_start_seconds"])
            rates[f"job {decode}"] = photos / (timings["total_seconds"] - starts[-1])
        with multiprocessing.Pool(PROCESSES) as pool:
            rates["notebook hashes"] = photos / timed(lambda: list(pool.imap(notebook_only_hashes, labels)))
        with multiprocessing.Pool(PROCESSES) as pool:
            rates["notebook"] = photos / timed(lambda: list(pool.imap(notebook_f, labels)))

    print(f"{photos} photos (hard links to 2000 drawn ones, 800x600), {len(by_label)} labels, {machine()}\n")
    table(["one core", "ms a photo"], [[name, 1000 * seconds] for name, seconds in per_photo.items()])
    table([f"{PROCESSES} processes", "photos/s"], [[name, round(rate)] for name, rate in sorted(rates.items())])
    speedup = rates["job fast"] / rates["notebook"]
    table(
        ["ratio", "is"],
        [
            ["one core: notebook hash / fast hash", ratio],
            ["whole job fast / notebook", speedup],
            ["  of the one-core ratio", speedup / ratio],
            ["whole job exact / notebook", rates["job exact"] / rates["notebook"]],
            ["whole job exact / notebook's hashing alone", rates["job exact"] / rates["notebook hashes"]],
            ["whole job fast / bare processes", rates["job fast"] / rates["bare fast"]],
            ["whole job exact / bare processes", rates["job exact"] / rates["bare exact"]],
        ],
    )
    print(f"The job's rate is over all but the start of the cluster ({', '.join(f'{s:.1f} s' for s in starts)}).")


def memory(photos: int) -> None:
    """Peak memory of one worker with small and with large partitions."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        manifest, _ = linked_collection(folder, photos)
        for size in (200, photos):
            summary = run_job(folder, manifest, str(size), workers=1, partition_images=size).summary
            rows.append([size, summary["partitions"], summary["worker_peak_memory_bytes"] / 2**20])
    print(f"{photos} photos, one worker, {machine()}\n")
    table(["photos a partition", "partitions", "peak worker memory, MiB"], rows)
    table(["ratio", "is"], [["large / small partitions", rows[1][2] / rows[0][2]]])


def fidelity(photos: str) -> None:
    """Bits by which the fast decode's hash differs from the exact one's."""
    paths = read_manifest(Job(photos, "-")).table["path"].to_pylist()
    apart: dict[str, list[int]] = defaultdict(list)
    for path in paths:
        exact, fast = (
            next(look_at_all([path], Job("-", "-", decode=decode).photo_settings)).hash for decode in ("exact", "fast")
        )
        if exact is not None and fast is not None:
            bits = (int.from_bytes(exact.bits) ^ int.from_bytes(fast.bits)).bit_count()
            for name in (os.path.relpath(path, photos).split(os.sep)[0], "all"):
                apart[f"{name}, {exact.format}"].append(bits)
    rows = []
    for name, bits in sorted(apart.items()):
        found = np.array(bits)
        rows.append([name, len(found), float(found.mean()), float((found <= 2).mean()), int(found.max())])
    table(["files", "photos", "mean bits apart", "share within 2 bits", "most"], rows)


def quality(photos: str) -> None:
    """What each strategy keeps of a folder with a folder a label."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for strategy in STRATEGY_NAMES:
            job = Job(photos, f"{temporary}/{strategy}", strategy=strategy, keep=NUM_SAMPLES_SAVE_PER_LANDMARK)
            found = reduce_images(job, ClusterSpec(workers=0)).summary["quality"]["selection"]
            rows.append(
                [
                    strategy,
                    found["labels"],
                    found["near_copy_pairs"],
                    found["mean_smallest_pair_distance"],
                    found["mean_pair_distance"],
                ]
            )
    header = ["strategy", "labels", "near-copy pairs kept (<= 6 bits)", "smallest pair distance", "mean pair distance"]
    table(header, rows)


def machine() -> str:
    """The machine's processor and the versions that decide."""
    model = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = (line for line in cpuinfo.read_text().splitlines() if line.startswith("model name"))
        model = next(lines, model).partition(":")[2].strip() or model
    python = platform.python_version()
    return f"{os.cpu_count()} x {model}, Python {python}, Pillow {Image.__version__}, imagehash {imagehash.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("speed", help=speed.__doc__).add_argument("--photos", type=int, default=30_000)
    commands.add_parser("memory", help=memory.__doc__).add_argument("--photos", type=int, default=20_000)
    commands.add_parser("fidelity", help=fidelity.__doc__).add_argument("photos")
    commands.add_parser("quality", help=quality.__doc__).add_argument("photos")
    options = parser.parse_args()
    {"speed": speed, "memory": memory, "fidelity": fidelity, "quality": quality}[options.command](options.photos)


if __name__ == "__main__":
    main()
