"""Measure what the README claims, side by side in one run; prints Markdown tables. Nothing here is asserted.

Examples:
    python scripts/bench.py speed                  # whole job against the notebook and against bare processes
    python scripts/bench.py memory                 # peak worker memory, small and large partitions
    python scripts/bench.py plan                   # checking and planning a manifest of GLDv2's size
    python scripts/bench.py ranking                # time and memory of each strategy for one large label
    python scripts/bench.py fidelity PHOTOS        # bits by which --decode fast differs from exact; a folder a label
    python scripts/bench.py quality PHOTOS         # what each strategy keeps, against random; a folder a label
    python scripts/bench.py s3                     # photos on S3 against a local folder; needs the extra "test"
    python scripts/bench.py tar                    # the same photos as single files and in tar shards; likewise
    python scripts/bench.py shards                 # peak memory of one worker that reads 8 GB of tar; likewise
    python scripts/bench.py flat PHOTOS            # hashes of photos without contrast; a folder a label
    python scripts/bench.py cut SIZES              # cutting a large ranked run, comparing its labels; SIZES: a TSV file
                                                   # with the columns images_in_class and n_classes
    python scripts/bench.py report SIZES           # the report of such a run
    python scripts/bench.py export                 # exporting photos, against cp -r and a server's own copy; likewise
"""

from __future__ import annotations

import argparse
import csv
import functools
import gzip
import io
import itertools
import multiprocessing
import os
import platform
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import tracemalloc
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import imagehash
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet
from PIL import Image

from reducer import ClusterSpec, Job, reduce_images
from reducer.config import DECODE_NAMES, HASH_NAMES, READER_NAMES, STORAGE_OPTIONS, near_copy_bits
from reducer.crosslabel import cross_label_table
from reducer.environment import versions
from reducer.errand import Errand
from reducer.hashing import FLAT_DEVIATION, JPEG_FORMATS, grey_deviation, hash_photo
from reducer.manifest import path_rule, read_manifest
from reducer.partition import assign, partition_count
from reducer.pipeline import Look, look_at_all, peak_memory
from reducer.plan import make_plan
from reducer.quality import certificate, figures, judge_again, spread
from reducer.ranking import STRATEGIES, nearest_kept
from reducer.result import Result
from reducer.sample import label_sizes, write_sample
from reducer.schemas import BEYOND_KEEP, FAILED, KEPT, LEDGER_SCHEMA, NOT_SAMPLED
from reducer.sources import paths_by_rule
from reducer.store import RunFolder
from reducer.summary import counts, failure_kinds
from reducer.tables import with_column
from reducer.types import Certificate, Quality, Spread

NUM_SAMPLES_TO_COMPARE = 1000
NUM_SAMPLES_SAVE_PER_LANDMARK = 25
PROCESSES = 2
#: For all that can be told, it is not the store that the photos come from.
OTHER_STORE = "--target-storage-option=region=us-east-1"
#: Starts a command and tells its seconds and its peak memory in KiB. A process counts as its own what the one that it
#: was forked from had in memory, so it is started from one that has nothing.
LAUNCHER = """
import resource, subprocess, sys, time
start = time.perf_counter()
subprocess.run(sys.argv[1:], check=True, stdout=sys.stderr)
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


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
    return notebook_pairs(image_names, notebook_hashes(paths, image_names))


def notebook_pairs(image_names: list[str], img_hash: list[imagehash.ImageHash]) -> list[tuple[str, int]]:
    match_pct = {}
    for i in range(len(img_hash)):
        base_name = image_names[i]
        for j in range(i + 1, len(img_hash)):
            curr_name = image_names[j]
            match_pct[f"{base_name}_{curr_name}"] = img_hash[i] - img_hash[j]

    return sorted(match_pct.items(), key=lambda item: item[1])


def notebook_f(label: tuple[str, dict[str, str]]) -> set[tuple[str, str]]:
    landmark_id, paths = label
    return notebook_keep(notebook_get_matches(paths), landmark_id)


def notebook_keep(match_pct: list[tuple[str, int]], landmark_id: str) -> set[tuple[str, str]]:
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
        str(folder / "train"),
        str(folder / name),
        manifest=str(manifest),
        path_template="{label}/{id}.jpg",
        report=False,
        **options,
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


def looks_at(paths: list[str], **options: object) -> list[Look]:
    return list(look_at_all(paths, Job("-", "-", **options).photo_settings))


def photos_by_label(photos: str) -> dict[str, list[tuple[str, str]]]:
    """(id, path) of each photo of a folder with a folder a label."""
    found = read_manifest(Job(photos, "-")).table
    labels: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for label, photo, path in zip(*(found[name].to_pylist() for name in ("label", "id", "path")), strict=True):
        labels[label].append((photo, path))
    return labels


def fidelity(photos: str) -> None:
    """Bits by which the fast decode's hash differs from the exact one's, for every hash and for dHash by folder."""
    paths = [path for label in photos_by_label(photos).values() for _, path in label]
    by_folder: dict[str, list[int]] = defaultdict(list)
    rows = []
    for name in HASH_NAMES:
        for size in (8, 16):
            looks, seconds = {}, {}
            for decode in DECODE_NAMES:
                start = time.perf_counter()
                looks[decode] = looks_at(paths, decode=decode, hash=name, hash_size=size)
                seconds[decode] = time.perf_counter() - start
            apart = []
            for path, fast, exact in zip(paths, looks["fast"], looks["exact"], strict=True):
                if fast.hash is None or exact.hash is None or exact.hash.format not in JPEG_FORMATS:
                    continue
                apart.append((int.from_bytes(exact.hash.bits) ^ int.from_bytes(fast.hash.bits)).bit_count())
                if (name, size) == ("dhash", 8):
                    by_folder[os.path.relpath(path, photos).split(os.sep)[0]].append(apart[-1])
            milliseconds = [1000 * seconds[decode] / len(paths) for decode in ("exact", "fast")]
            rows.append([name, size, *bits_apart_cells(apart), *milliseconds])
    header = ["mean bits apart", "share within 2 bits", "most"]
    print(f"JPEGs of {photos}, {machine()}\n")
    table(["files", "photos", *header], [[name, len(n), *bits_apart_cells(n)] for name, n in sorted(by_folder.items())])
    table(["hash", "size", *header, "exact, ms a photo", "fast, ms a photo"], rows)


def bits_apart_cells(bits: list[int]) -> list[object]:
    if not bits:
        sys.exit("no JPEG among the photos: fast is exact for all others")
    found = np.array(bits)
    return [float(found.mean()), float((found <= 2).mean()), int(found.max())]


def notebook_choice(hashes: np.ndarray) -> np.ndarray:
    """Positions that the notebook keeps of photos with these hashes, by its own code."""
    images = [imagehash.ImageHash(bits.reshape(8, 8)) for bits in np.unpackbits(hashes, axis=1).astype(bool)]
    image_names = random.sample([str(i) for i in range(len(images))], min(len(images), NUM_SAMPLES_TO_COMPARE))
    chosen = notebook_pairs(image_names, [images[int(name)] for name in image_names])
    return np.array(sorted(int(name) for name, _ in notebook_keep(chosen, "")))


def quality(photos: str) -> None:
    """What each strategy keeps of the labels of a folder with more photos than are kept; averages over labels."""
    keep = NUM_SAMPLES_SAVE_PER_LANDMARK
    worth: dict[str, list[Spread]] = defaultdict(list)
    certificates = []
    random.seed(0)
    for label, members in photos_by_label(photos).items():
        looks = looks_at([path for _, path in members])
        hashed = [(photo, look.hash.bits) for (photo, _), look in zip(members, looks, strict=True) if look.hash]
        if len(hashed) <= keep:
            continue
        ids = [photo for photo, _ in hashed]
        hashes = np.array([list(bits) for _, bits in hashed], dtype=np.uint8)
        chosen = {"the notebook as it stands": notebook_choice(hashes)}
        for name, strategy in STRATEGIES.items():
            ranking = strategy(hashes, ids, keep=keep, label=label)
            chosen[name] = ranking.order[:keep]
            if name == "farthest-first":
                certificates.append(certificate(hashes, 64, ranking.insertion_distance[:keep]))
        for name, kept in chosen.items():
            worth[name].append(spread(hashes[kept], 64, nearest_kept(hashes, ids, kept)[1]))
    if not certificates:
        sys.exit(f"no label of {photos} has more than {keep} photos: nothing to choose")
    rows = []
    for name, labels in worth.items():
        columns = [
            [found.smallest_sum for found in labels],
            [found.distance_sum / found.pairs for found in labels],
            [found.near_copies for found in labels],
            [found.radius_sum for found in labels],
            [found.nearest_sum / found.candidates for found in labels],
        ]
        rows.append([name, *(f"{np.mean(column):.1f}" for column in columns)])
    print(f"{len(certificates)} labels of {photos} with more than {keep} photos, K = {keep}, dHash-64, {machine()}\n")
    header = ["smallest pair distance", "mean pair distance", f"near-copy pairs (<= {near_copy_bits(64)} bits)"]
    table(["strategy", *header, "coverage radius", "mean distance to nearest kept"], rows)
    told = figures(Quality(certificate=sum(certificates, Certificate())), 64)["certificate"]
    print(
        f"farthest-first's smallest pair distance is at least {told['mean']:.1%} of what any choice could reach "
        f"(mean over labels; the worst {told['worst']:.1%})."
    )


def flat(photos: str) -> None:
    """What becomes of the hashes of photos whose contrast is lowered: where `FLAT_DEVIATION` comes from."""
    paths = [path for label in photos_by_label(photos).values() for _, path in label]
    looks = looks_at(paths, decode="exact")
    pictures = [(look.hash, path) for look, path in zip(looks, paths, strict=True) if look.hash]
    deviations = [grey_deviation(Image.open(path)) for _, path in pictures]
    some = random.Random(0).sample(pictures, min(100, len(pictures)))
    settings = Job("-", "-", decode="exact").photo_settings
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
            apart.append((int.from_bytes(other) ^ int.from_bytes(found.bits)).bit_count())
        rows.append([deviation, float(np.mean(apart)), f"{np.mean(np.array(apart) <= near_copy_bits(64)):.0%}"])
    print(
        f"{len(some)} photos of {photos}, their contrast lowered and saved again; a photo is flat under "
        f"{FLAT_DEVIATION:g}. The flattest of all {len(deviations)} has {min(deviations):.1f}, the median is "
        f"{np.median(deviations):.1f}.\n"
    )
    table(["grey standard deviation", "mean bits from the photo's hash", "still near copies"], rows)


def ranking(sizes: list[int]) -> None:
    """Time and peak memory of ranking one label: clustered hashes, about 20 near copies a view."""
    rows = []
    for count in sizes:
        generator = np.random.default_rng(0)
        views = generator.integers(0, 256, (max(1, count // 20), 8), dtype=np.uint8)
        noise = np.packbits(generator.random((count, 64)) < 0.04, axis=1)
        hashes = views[generator.integers(0, len(views), count)] ^ noise
        ids = [f"{i:07}" for i in range(count)]
        for name, strategy in STRATEGIES.items():
            rank_all = functools.partial(strategy, hashes, ids, keep=25)
            seconds = [timed(rank_all) for _ in range(3)]
            tracemalloc.start()
            rank_all()
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            rows.append([count, name, float(np.median(seconds)), peak / 2**20])
    print(f"dHash-64, one core, {machine()}\n")
    table(["candidates", "strategy", "seconds", "peak memory, MiB"], rows)


def plan(photos: int) -> None:
    """Time and peak memory of checking and planning a manifest of GLDv2's size and shape, in all its forms."""
    labels = max(1, round(photos / 19.44))
    generator = np.random.default_rng(0)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "train").mkdir()
        label = np.repeat(generator.permutation(5 * labels)[:labels], label_sizes(labels, photos))
        ids = [f"{number:016x}" for number in generator.integers(0, 2**63, photos)]
        listed: dict[int, list[str]] = defaultdict(list)
        for photo, its in zip(ids, label.tolist(), strict=True):
            listed[its].append(photo)
        url = "https://upload.wikimedia.org/wikipedia/commons"
        order = generator.permutation(photos).tolist()
        contents = {
            "train.csv": ("id,landmark_id\n", (f"{ids[i]},{label[i]}\n" for i in order)),
            "train-with-urls.csv": ("id,url,landmark_id\n", (f"{ids[i]},{url}/{i}.jpg,{label[i]}\n" for i in order)),
            "train_clean.csv": ("landmark_id,images\n", (f"{k},{' '.join(v)}\n" for k, v in listed.items())),
        }
        for name, (header, lines) in contents.items():
            with open(folder / name, "w") as file:
                file.write(header)
                file.writelines(lines)
        with open(folder / "train.csv", "rb") as file, gzip.open(folder / "train.csv.gz", "wb", 6) as zipped:
            shutil.copyfileobj(file, zipped)
        pa.parquet.write_table(pa.csv.read_csv(folder / "train.csv"), folder / "train.parquet")
        for name in [*contents, "train.csv.gz", "train.parquet"]:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                rows.append([name, *pool.apply(plan_one, (str(folder), name))])
    print(f"{photos} photos of {labels} labels, one process, {machine()}\n")
    table(["manifest", "photos to read", "partitions", "seconds", "peak memory, MiB"], rows)


def plan_one(folder: str, name: str) -> tuple[int, int, float, float]:
    start = time.perf_counter()
    planned = make_plan(Job(f"{folder}/train", f"{folder}/run", manifest=f"{folder}/{name}"))
    errand = Errand(planned.job, planned.numbered(PROCESSES).partitions())
    tasks = [errand.task(index) for index in errand.rows]
    return planned.read.num_rows, len(tasks), time.perf_counter() - start, peak_memory() / 2**20


def small_photos(folder: Path, photos: int) -> int:
    """So many photos of about 63 KB, in a folder a label below train/; their bytes in all."""
    by_label: dict[str, list[Path]] = defaultdict(list)
    write_sample(str(folder / "sample"), labels=20, images=min(photos, 600))
    for i, path in enumerate(itertools.islice(itertools.cycle(sorted((folder / "sample").rglob("*.jpg"))), photos)):
        label = folder / "train" / str(i % 30)
        label.mkdir(parents=True, exist_ok=True)
        copy = label / f"{i:06}.jpg"
        if i < 600:
            Image.open(path).save(copy, quality=70)
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


def tar(photos: int) -> None:
    """The same photos as single files and in tar shards, on disk and on a real S3 server, with and without 40 ms."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from faultproxy import FaultProxy
    from s3server import S3Server

    shards = 12
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        size = small_photos(folder, photos)
        paths = sorted((folder / "train").rglob("*.jpg"))
        with open(folder / "train.csv", "w") as manifest:
            manifest.write("id,landmark_id\n" + "".join(f"{path.stem},{path.parent.name}\n" for path in paths))
        random.Random(0).shuffle(paths)
        pack(paths, folder / "tars", shards)
        with S3Server(folder / "server") as server:
            server.make_bucket("photos")
            server.upload_folder(folder / "train", "photos", "train/")
            server.upload_folder(folder / "tars", "photos", "tars/")
            with FaultProxy(server.endpoint) as proxy:

                def rate(images: str, endpoint: str | None = None, **options: object) -> float:
                    if endpoint:
                        keys = {"key": server.key, "secret": server.secret, "endpoint_url": endpoint}
                        options["storage_options"] = keys
                    if images.endswith("train"):
                        options["path_template"] = "{label}/{id}.jpg"
                    job = Job(
                        images,
                        str(folder / "run"),
                        manifest=str(folder / "train.csv"),
                        overwrite=True,
                        report=False,
                        **options,
                    )
                    summary = reduce_images(job, ClusterSpec(workers=PROCESSES), progress=False).summary
                    assert (summary["photos_read"], summary["photos_failed"]) == (photos, 0)
                    return float(summary["photos_per_second"])

                base = rate(str(folder / "train"))
                rows.append(["single files on disk", round(base), 1.0, "", ""])
                local = rate(str(folder / "tars"))
                rows.append(["tar shards on disk", round(local), local / base, local / base, ""])
                for reader in READER_NAMES:
                    for where, endpoint in (("S3", server.endpoint), ("S3 through a proxy", proxy.endpoint)):
                        proxy.delay_get = 0.0
                        single, shard = (
                            rate(f"s3://photos/{kind}", endpoint, reader=reader) for kind in ("train", "tars")
                        )
                        rows.append([f"single files on {where}, {reader}", round(single), single / base, "", ""])
                        rows.append(
                            [f"tar shards on {where}, {reader}", round(shard), shard / base, shard / single, ""]
                        )
                    proxy.delay_get = 0.04
                    late = rate("s3://photos/tars", proxy.endpoint, reader=reader)
                    rows.append([f"the same, 40 ms on every GET, {reader}", round(late), late / base, "", late / shard])
    print(
        f"{photos} photos of {size / photos / 1e3:.0f} KB on average, or {shards} shards of {size / shards / 1e6:.0f} "
        f"MB, {PROCESSES} workers, server on the same machine, {machine()}\n"
    )
    table(["photos lie in", "photos/s", "of single files on disk", "of single files there", "of 0 ms"], rows)


def shards(gigabytes: float) -> None:
    """Peak memory of one worker that reads so much tar, on disk and from S3, most of its photos in the manifest."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from s3server import S3Server

    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_sample(str(folder / "sample"), labels=60, images=2000)
        originals = sorted((folder / "sample" / "train").rglob("*.jpg"))
        (folder / "tars").mkdir()
        written, number, ids = 0, 0, []
        while written < gigabytes * 1e9:
            path = folder / "tars" / f"images_{number:03}.tar"
            with tarfile.open(path, "w") as shard:
                while shard.offset < min(1e9, gigabytes * 1e9 - written):
                    ids.append(f"{len(ids):016x}")
                    shard.add(
                        originals[len(ids) % len(originals)], f"{ids[-1][0]}/{ids[-1][1]}/{ids[-1][2]}/{ids[-1]}.jpg"
                    )
            written += path.stat().st_size
            number += 1
        wanted = [photo for i, photo in enumerate(ids) if i % 5]
        lines = "".join(f"{photo},{i % max(1, len(wanted) // 150)}\n" for i, photo in enumerate(wanted))
        (folder / "train.csv").write_text("id,landmark_id\n" + lines)
        with S3Server(folder / "server") as server:
            server.make_bucket("photos")
            client = server.client()
            for path in sorted((folder / "tars").iterdir()):
                s3_put(client, path, "photos", f"tars/{path.name}")
            keys = {"key": server.key, "secret": server.secret, "endpoint_url": server.endpoint}
            places: list[tuple[str, dict[str, object]]] = [(str(folder / "tars"), {})]
            places += [("s3://photos/tars", {"storage_options": keys, "reader": reader}) for reader in READER_NAMES]
            for images, options in places:
                given = {"manifest": str(folder / "train.csv"), "overwrite": True, "report": False, **options}
                job = Job(images, str(folder / "run"), **given)
                summary = reduce_images(job, ClusterSpec(workers=1)).summary
                assert summary["photos_read"] == len(wanted)
                rate = written / 1e6 / summary["timings"]["hash_seconds"]
                peak = summary["worker_peak_memory_bytes"] / 2**20
                where = f"S3, {options['reader']}" if options else "disk"
                rows.append([where, summary["photos_per_second"], round(rate), round(peak)])
    print(
        f"{written / 1e9:.1f} GB in {number} shards, {len(ids)} photos, {len(wanted)} of them in the manifest, one "
        f"worker, server on the same machine, {machine()}\n"
    )
    table(["shards lie on", "photos/s", "MB of tar/s", "peak worker memory, MiB"], rows)


def s3_put(client: object, path: Path, bucket: str, key: str) -> None:
    """Put a large file in parts."""
    part = 64 * 2**20
    upload = client.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
    where = {"Bucket": bucket, "Key": key, "UploadId": upload}
    tags = []
    with open(path, "rb") as file:
        while block := file.read(part):
            answer = client.upload_part(**where, PartNumber=len(tags) + 1, Body=block)
            tags.append({"ETag": answer["ETag"], "PartNumber": len(tags) + 1})
    client.complete_multipart_upload(**where, MultipartUpload={"Parts": tags})


def s3(photos: int) -> None:
    """Photos on a real S3 server against the local folder, each reader, with and without 40 ms on every GET."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from faultproxy import FaultProxy
    from s3server import S3Server

    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        size = small_photos(folder, photos) / photos / 1e3
        with S3Server(folder / "server") as server:
            server.make_bucket("photos")
            server.upload_folder(folder / "train", "photos", "train/")
            with FaultProxy(server.endpoint) as proxy:

                def rate(images: str, endpoint: str | None = None, **options: object) -> float:
                    if endpoint:
                        keys = {"key": server.key, "secret": server.secret, "endpoint_url": endpoint}
                        options["storage_options"] = keys
                    job = Job(images, str(folder / "run"), overwrite=True, report=False, **options)
                    summary = reduce_images(job, ClusterSpec(workers=PROCESSES), progress=False).summary
                    assert summary["photos_read"] == photos
                    return float(summary["photos_per_second"])

                local = rate(str(folder / "train"))
                rows.append(["local folder", round(local), 1.0, ""])
                for reader in READER_NAMES:
                    direct = rate("s3://photos/train", server.endpoint, reader=reader)
                    rows.append([f"S3, {reader}", round(direct), direct / local, ""])
                    proxy.delay_get = 0.0
                    through = rate("s3://photos/train", proxy.endpoint, reader=reader)
                    proxy.delay_get = 0.04
                    late = rate("s3://photos/train", proxy.endpoint, reader=reader)
                    rows.append([f"S3 through a proxy, {reader}", round(through), through / local, ""])
                    rows.append(
                        [f"S3 through a proxy, 40 ms on every GET, {reader}", round(late), late / local, late / through]
                    )
    print(
        f"{photos} photos of {size:.0f} KB on average, {PROCESSES} workers, server on the same machine, {machine()}\n"
    )
    table(["photos lie in", "photos/s", "of the local folder's", "of 0 ms"], rows)


def write_run(folder: Path, summary: dict[str, object], parts: Iterator[pa.Table]) -> None:
    """Write a finished run: all that is known here of how a run folder is written."""
    run = RunFolder(str(folder))
    run.start(summary | {"status": "running"})
    for index, part in enumerate(parts):
        run.write_part(index, part)
    run.write_summary(summary | {"status": "done"})


def hex_digits(packed: np.ndarray) -> np.ndarray:
    """Rows of 8 bytes as 16 hex digits."""
    return np.frombuffer(packed.tobytes().hex().encode(), dtype="S16")


def generated_hashes(generator: np.random.Generator, label: np.ndarray, read: np.ndarray) -> np.ndarray:
    """64-bit hashes, as words: of each label some views with about 20 near copies each, and what goes wrong.

    One photo in 500 has the hash of a photo of another label, or one that is within 2 bits of it, and one in 5,000 is
    flat: no bit is set.
    """
    views = np.maximum(1, np.bincount(label, weights=read).astype(np.int64) // 20)
    view = (np.cumsum(views) - views)[label] + (generator.random(len(label)) * views[label]).astype(np.int64)
    # In whole numbers, since 64 floats a photo would take a gigabyte.
    noise = np.packbits(generator.integers(0, 25, (len(label), 64), dtype=np.uint8) == 0, axis=1)
    words = generator.integers(0, 2**64, int(views.sum()), dtype=np.uint64)[view] ^ noise.view(np.uint64)[:, 0]

    places = np.flatnonzero(read)
    wrong = -(-len(places) // 500)
    original, copy = generator.choice(places, (2, wrong), replace=False)
    original, copy = (side[label[original] != label[copy]] for side in (original, copy))
    words[copy] = words[original]
    for _ in range(2):
        bit = np.uint64(1) << generator.integers(0, 64, len(copy), dtype=np.uint64)
        words[copy] ^= bit * generator.integers(0, 2, len(copy), dtype=np.uint64)
    words[generator.choice(places, -(-len(places) // 5000), replace=False)] = 0
    return words


def generate_run(folder: Path, sizes: np.ndarray) -> None:
    """Write the folder of a run with ``--rank-all`` over labels of these sizes, without any photo.

    The ledger is as large and as varied as a real one, and no more: ranks are drawn, and insertion distances only fall
    with them as they would, whatever the hashes say; the nearest kept photo is just one of those kept.
    """
    job = Job("/photos/train", str(folder), manifest="/photos/train.csv", keep=25, candidates=1000, rank_all=True)
    generator = np.random.default_rng(0)
    labels, photos = len(sizes), int(sizes.sum())
    names = np.sort(generator.permutation(5 * labels)[:labels].astype(str))
    sizes = generator.permutation(sizes)
    drawn = np.minimum(sizes, job.candidates)
    partition = assign(drawn, partition_count(int(drawn.sum()), PROCESSES))
    # Labels in the order of the parts, so that each part is a slice.
    order = np.argsort(partition, kind="stable")
    names, sizes, drawn, partition = names[order], sizes[order], drawn[order], partition[order]

    label = np.repeat(np.arange(labels), sizes)
    # An odd number times different ones gives different ones, modulo any power of two.
    ids = generator.permutation(np.arange(1, photos + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    ids = ids[np.lexsort((ids, label))]
    by_rank = np.lexsort((generator.random(photos), label))
    starts = (np.cumsum(sizes) - sizes)[label]
    rank = np.empty(photos, dtype=np.int64)
    rank[by_rank] = np.arange(photos) - starts
    read = rank < job.candidates
    kept = rank < job.keep
    height = generator.uniform(30, 36, labels)[label]
    insertion = np.rint(height * (1 - rank / drawn[label]) ** 2)
    nearest = by_rank[starts + np.where(kept, rank, generator.integers(0, job.keep, photos) % drawn[label])]
    words = generated_hashes(generator, label, read)

    # Only of photos that were read.
    found = {
        "bytes": generator.lognormal(np.log(142_000) - 0.5**2 / 2, 0.5, photos).astype(np.int64),
        "width": np.full(photos, 800),
        "height": np.full(photos, 600),
        "format": np.full(photos, "JPEG"),
        "mtime": 1_600_000_000 * 10**9 + generator.integers(0, 10**16, photos),
        "hash": hex_digits(words),
        "rank": rank,
        "nearest_kept": hex_digits(ids.astype(">u8"))[nearest],
        "nearest_kept_distance": np.where(kept, 0, insertion),
    }
    columns = {name: pa.array(values, LEDGER_SCHEMA.field(name).type, mask=~read) for name, values in found.items()}
    columns["insertion_distance"] = pa.array(insertion, pa.float64(), mask=~read | (rank == 0))
    columns["row"] = pa.array(generator.permutation(photos))
    columns["id"] = pa.array(hex_digits(ids.astype(">u8")), pa.string())
    columns["label"] = pa.array(names.tolist(), pa.string()).take(pa.array(label))
    columns["path"] = paths_by_rule(path_rule(job), columns["id"], columns["label"])
    columns["kept"] = pa.array(kept)
    columns["reason"] = pa.array([KEPT, BEYOND_KEEP, NOT_SAMPLED]).take(pa.array(np.select([kept, read], [0, 1], 2)))
    ledger = pa.table([columns.get(f.name, pa.nulls(photos, f.type)) for f in LEDGER_SCHEMA], schema=LEDGER_SCHEMA)

    def parts() -> Iterator[pa.Table]:
        ranked, unread = ledger.filter(pa.array(read)), ledger.filter(pa.array(~read))
        ends = np.cumsum(np.bincount(partition, weights=drawn)).astype(np.int64).tolist()
        for start, end in itertools.pairwise([0, *ends]):
            yield ranked.slice(start, end - start)
        for start in range(0, unread.num_rows, 100_000):
            yield unread.slice(start, 100_000)

    reasons = pc.value_counts(ledger["reason"]).to_pylist()
    summary = {
        "run": "generated",
        "resumed": 0,
        "job": asdict(job) | {name: [] for name in STORAGE_OPTIONS},
        "manifest": {"rows": photos, "duplicate_rows": 0, "ids_under_several_labels": 0},
        "labels": labels,
        "photos": photos,
        "photos_to_read": int(read.sum()),
        "photos_read": int(read.sum()),
        "photos_failed": 0,
        "photos_kept": int(kept.sum()),
        "reasons": {pair["values"]: pair["counts"] for pair in reasons},
    }
    write_run(folder, summary, parts())


def cut(sizes: str, keep_in: str | None) -> None:
    """Time and peak memory of `reducer cut`, and of comparing all photos across labels, on a run made for it."""
    of_label = sizes_of(sizes)
    if keep_in and Path(keep_in).exists() and any(Path(keep_in).iterdir()):
        sys.exit(f"--keep-in {keep_in} is not empty: give another folder")
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        run = Path(keep_in) if keep_in else Path(temporary) / "run"
        print(f"generating a run of {of_label.sum()} photos ...", file=sys.stderr)
        print(f"generated in {timed(lambda: generate_run(run, of_label)):.1f} s", file=sys.stderr)
        for name, rules in [
            ("keep.csv", "--keep 25"),
            ("distance.csv", "--min-distance 12"),
            ("bytes.csv", "--max-bytes 20GB"),
            ("total.csv", "--total 500000 --min-per-label 2"),
            ("keep.parquet", "--keep 25"),
        ]:
            output = Path(temporary) / name
            command = [sys.executable, "-m", "reducer", "cut", str(run), "--output", str(output), *rules.split()]
            told = subprocess.check_output([sys.executable, "-c", LAUNCHER, *command], text=True).split()
            shown = f"`reducer cut RUN --output {name} {rules}`"
            rows.append([shown, photos_listed(output), float(told[0]), round(kibibytes(told[1]) / 2**10)])
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            compared = pool.apply(compare_across_labels, (str(run),))
    photos = f"{of_label.sum()} photos of {len(of_label)} labels"
    print(f"{photos}, without photos behind them and in the page cache, {machine()}\n")
    table(["command", "photos kept", "seconds", "peak memory, MiB"], rows)
    table(["in one process", "pairs", "seconds", "peak memory, MiB"], compared)


def sizes_of(path: str) -> np.ndarray:
    """Photos of each label, from a TSV file."""
    found = pa.csv.read_csv(path, parse_options=pa.csv.ParseOptions(delimiter="\t"))
    return np.repeat(found["images_in_class"].to_numpy(), found["n_classes"].to_numpy())


def complete_run(folder: Path, photos: list[str]) -> None:
    """Give a generated run what a report shows: quality, failures, near copies across labels, photos behind the paths.

    Parameters
    ----------
    folder : Path
        The run, from `generate_run`.
    photos : list of str
        Paths of photos; the photos of the run are these, in turn.
    """
    run = RunFolder(str(folder))
    summary = run.read_summary()
    settings = Job("-", "-", keep=summary["job"]["keep"]).photo_settings
    total = Quality()
    for name in run.parts():
        rows, tally = run.read_part(name)
        paths = pa.array(photos).take(pa.array(rows["row"].to_numpy() % len(photos)))
        rows = with_column(rows, "path", paths)
        if rows["hash"].null_count == rows.num_rows:
            broken = pc.equal(pc.bit_wise_and(rows["row"], 7), 0)  # one in eight of those that were not drawn
            rows = with_column(rows, "reason", pc.if_else(broken, FAILED, rows["reason"]))
            rows = with_column(rows, "error", pc.if_else(broken, "broken: OSError: image file is truncated", None))
        else:
            rows, found = judge_again(rows, np.zeros(rows.num_rows, dtype=bool), settings)
            total += found
        run.replace_part(name, rows, tally)
    run.write_cross_label(cross_label_table(run.ledger(["id", "label", "path", "hash"]), settings.bits))
    ledger = run.ledger(["kept", "bytes", "rank", "reason", "error", "label"])
    pairs = run.read_cross_label()
    run.write_summary(
        summary
        | {
            "started": "2026-01-01T00:00:00+00:00",
            "labels_ranked": pc.count_distinct(ledger.filter(pc.is_valid(ledger["rank"]))["label"]).as_py(),
            "labels_without_photos": [],
            "labels_short": [],
            "always_keep_failed": [],
            "reasons": counts(ledger["reason"]),
            "failures": failure_kinds(ledger["error"]),
            "bytes_read": pc.sum(ledger["bytes"]).as_py() or 0,
            "photos_per_second": None,
            "photos_reused": 0,
            "quality": figures(total, settings.bits),
            "cross_label_pairs": 0 if pairs is None else pairs.num_rows,
            "timings": {"cross_label_seconds": 0.0},
            "versions": versions(),
            "manifest": summary["manifest"] | {"skipped_files": {}},
        }
    )


def report(sizes: str) -> None:
    """Time, peak memory and size of `reducer report`, on a run made for it."""
    of_label = sizes_of(sizes)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        run = Path(temporary) / "run"
        print(f"generating a run of {of_label.sum()} photos ...", file=sys.stderr)
        write_sample(str(Path(temporary) / "sample"), labels=20, images=500)
        photos = sorted(map(str, (Path(temporary) / "sample" / "train").rglob("*.jpg")))
        generate_run(run, of_label)
        complete_run(run, photos)
        for given in ("", "--gallery-photos 0", "--gallery-photos 2000"):
            command = [sys.executable, "-m", "reducer", "report", str(run), "--quiet", *given.split()]
            told = subprocess.check_output([sys.executable, "-c", LAUNCHER, *command], text=True).split()
            size = (run / "report.html").stat().st_size
            pictures = (run / "report.html").read_text().count("<img")
            shown = f"`reducer report RUN {given}`".replace(" `", "`")
            rows.append([shown, pictures, float(told[0]), round(kibibytes(told[1]) / 2**10), size / 1e6])
    print(f"{of_label.sum()} photos of {len(of_label)} labels, in the page cache, {machine()}\n")
    table(["command", "pictures", "seconds", "peak memory, MiB", "MB"], rows)


def export(photos: int) -> None:
    """`reducer export` against `cp -r` and against an S3 server's own copy; commands, their start included."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from s3server import S3Server

    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        size = small_photos(folder, photos)
        paths = sorted((folder / "train").rglob("*.jpg"))
        for path in paths:  # links to a few files would be copied faster
            content = path.read_bytes()
            path.unlink()
            path.write_bytes(content)
        with open(folder / "train.csv", "w") as manifest:
            manifest.write("id,landmark_id\n" + "".join(f"{path.stem},{path.parent.name}\n" for path in paths))
        pack(paths, folder / "tars", 12)
        with S3Server(folder / "server") as server:
            keys = {"key": server.key, "secret": server.secret, "endpoint_url": server.endpoint}
            for bucket in ("photos", "copies"):
                server.make_bucket(bucket)
            server.upload_folder(folder / "train", "photos", "train/")
            server.upload_folder(folder / "tars", "photos", "tars/")

            def run(name: str, images: str) -> None:
                options = {"keep": photos, "candidates": None, "report": False}
                if images.endswith("/train"):
                    options["path_template"] = "{label}/{id}.jpg"
                if "://" in images:
                    options["storage_options"] = keys
                job = Job(images, str(folder / name), manifest=str(folder / "train.csv"), **options)
                reduce_images(job, ClusterSpec(workers=0), progress=False)

            def row(what: str, seconds: float, base: float | None = None) -> float:
                rows.append(
                    [what, seconds, round(photos / seconds), size / seconds / 1e6, base / seconds if base else ""]
                )
                return seconds

            def exported(run: str, target: str, *given: str) -> float:
                whose = ["--storage-option"] if run != "local" else []
                whose += ["--target-storage-option"] if "://" in target else []
                flags = [f"{name}={key}={value}" for key, value in keys.items() for name in whose]
                command = [sys.executable, "-m", "reducer", "export", str(folder / run), target, "--quiet", *given]
                return timed(lambda: subprocess.run([*command, *flags], check=True))

            def served(prefix: str) -> float:
                """The server's own copy, 32 requests at a time."""
                client = server.client(max_pool_connections=32)
                found = server.list_keys("photos", prefix)

                def copy(key: str) -> None:
                    client.copy_object(Bucket="copies", Key=f"own/{key}", CopySource={"Bucket": "photos", "Key": key})

                with ThreadPoolExecutor(32) as pool:
                    return timed(lambda: list(pool.map(copy, found)))

            run("local", str(folder / "train"))
            run("there", "s3://photos/train")
            run("shards", "s3://photos/tars")
            base = row(
                "`cp -r`", timed(lambda: subprocess.run(["cp", "-r", folder / "train", folder / "cp"], check=True))
            )
            for given in ("", "--link", "--layout by-label", "--layout tar", "--resize 512"):
                name = "-".join(given.split()).strip("-") or "same"
                seconds = exported("local", str(folder / f"out-{name}"), *given.split())
                row(f"folder to folder {given}".strip(), seconds, base)
            row("folder to S3", exported("local", "s3://copies/up"), base)
            row("S3 to folder", exported("there", str(folder / "down")), base)
            own = row("the server's own copy", served("train/"))
            for what, given in (("by the server's own copy", ""), ("through the workers", OTHER_STORE)):
                for workers in (0, PROCESSES):
                    target = f"s3://copies/{len(given)}-{workers}"
                    seconds = exported("there", target, "--workers", str(workers), *given.split())
                    row(f"S3 to S3 {what}, {workers or 'no'} workers", seconds, own)
            tars = ("--layout", "tar", "--shard-bytes", f"{size // 12}", "--workers", str(PROCESSES))
            row(f"tar on S3 to tar on S3, {PROCESSES} workers", exported("shards", "s3://copies/tars", *tars), own)
    print(
        f"{photos} photos of {size / photos / 1e3:.0f} KB on average, all exported, server on the same machine, "
        f"{machine()}\n"
    )
    table(["what", "seconds", "photos/s", "MB/s", "rate, of cp -r's or the server's own copy's"], rows)


def photos_listed(path: Path) -> int:
    """Photos of a reduced list."""
    if path.suffix == ".parquet":
        return pa.parquet.read_metadata(path).num_rows
    with open(path, newline="") as file:
        return sum(1 for _ in csv.reader(file)) - 1


def kibibytes(maxrss: str) -> int:
    """What `getrusage` tells, which is in bytes on macOS."""
    return int(maxrss) // (2**10 if sys.platform == "darwin" else 1)


def compare_across_labels(folder: str) -> list[list[object]]:
    start = time.perf_counter()
    ledger = RunFolder(folder).ledger(["id", "label", "path", "hash"])
    rows = [["reading the ledger", "", time.perf_counter() - start, round(peak_memory() / 2**20)]]
    start = time.perf_counter()
    pairs = cross_label_table(ledger, 64).num_rows
    return [*rows, ["`cross_label_table`", pairs, time.perf_counter() - start, round(peak_memory() / 2**20)]]


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
    subparsers = parser.add_subparsers(dest="command", required=True)
    for command, default in (
        (speed, 30_000),
        (memory, 20_000),
        (plan, 1_580_470),
        (s3, 3_000),
        (tar, 3_000),
        (export, 6_000),
    ):
        subparsers.add_parser(command.__name__, help=command.__doc__).add_argument(
            "--photos", type=int, default=default
        )
    for command in (fidelity, quality, flat):
        subparsers.add_parser(command.__name__, help=command.__doc__).add_argument("photos")
    candidates = subparsers.add_parser("ranking", help=ranking.__doc__).add_argument
    candidates("sizes", metavar="candidates", type=int, nargs="*", default=[1_000, 6_272, 20_000])
    read = subparsers.add_parser("shards", help=shards.__doc__).add_argument
    read("--gigabytes", type=float, default=8.0, help="10^9 bytes, in shards of one")
    large_run = subparsers.add_parser("cut", help=cut.__doc__).add_argument
    large_run("sizes", help="TSV file: images_in_class, and n_classes for how many labels have so many")
    large_run("--keep-in", metavar="DIR", help="leave the generated run here (default: a temporary directory)")
    reported = subparsers.add_parser("report", help=report.__doc__).add_argument
    reported("sizes", help="as for cut")
    options = vars(parser.parse_args())
    measured = (speed, memory, plan, fidelity, quality, flat, ranking, s3, tar, shards, cut, report, export)
    commands = {f.__name__: f for f in measured}
    commands[options.pop("command")](**options)


if __name__ == "__main__":
    main()
