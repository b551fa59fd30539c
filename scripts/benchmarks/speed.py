"""Whole jobs: against the notebook and others, against the floor, their start, their memory."""

from __future__ import annotations

import importlib.util
import logging
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import imagehash
from benchmarks.common import (
    DRAWN,
    PROCESSES,
    Figure,
    copied_collection,
    linked_collection,
    looks_at,
    machine,
    measured,
    run_job,
    say,
    some_of,
    table,
    timed,
)
from benchmarks.notebook import notebook_f, notebook_only_hashes
from PIL import Image

from reducer.api.sample import write_sample

#: What all is compared to.
OURS = "`reducer run`"
#: What is measured beside Reducer, where it is installed.
PEERS = {"imagededup": "imagededup's DHash", "cleanvision": "CleanVision's near duplicates"}


def hash_only(work: tuple[list[str], str]) -> int:
    """A bare process: the job's own hash function over a list of paths, nothing else."""
    paths, decode = work
    return sum(look.hash is not None for look in looks_at(paths, decode=decode))


def speed(photos: int, folder_of_photos: str | None, repetitions: int, without: list[str]) -> None:
    """The whole job against the notebook and, where they are installed, imagededup and CleanVision."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if folder_of_photos:
            manifest, by_label = copied_collection(folder, folder_of_photos)
        else:
            manifest, by_label = linked_collection(folder, photos)
        paths = [path for its in by_label.values() for path in its.values()]
        photos = len(paths)
        some = some_of(paths, 300)
        core: dict[str, Callable[[], float | None]] = {
            "the notebook": lambda: timed(lambda: [imagehash.dhash(Image.open(path)) for path in some]),
            "`--decode exact`": lambda: timed(lambda: hash_only((some, "exact"))),
            "`--decode fast`": lambda: timed(lambda: hash_only((some, "fast"))),
        }
        per_photo = {name: figure * (1000 / len(some)) for name, figure in measured(core, repetitions).items()}
        labels = sorted(by_label.items(), key=lambda item: -len(item[1]))
        starts: list[float] = []

        def job(decode: str) -> float:
            timings = run_job(folder, manifest, "run", decode=decode, keep=25, rank_all=True)["timings"]
            starts.append(timings["cluster_start_seconds"])
            return without_the_cluster(timings)

        def pooled(function: Callable[..., object]) -> float:
            with multiprocessing.Pool(PROCESSES) as pool:
                return timed(lambda: list(pool.imap(function, labels)))

        ways: dict[str, Callable[[], float | None]] = {
            OURS: lambda: job("fast"),
            "`reducer run --decode exact`": lambda: job("exact"),
            "the notebook": lambda: pooled(notebook_f),
            "the notebook's hashing alone": lambda: pooled(notebook_only_hashes),
            PEERS["imagededup"]: lambda: imagededup(folder / "train"),
            PEERS["cleanvision"]: lambda: cleanvision(folder / "train"),
        }
        for module, name in PEERS.items():
            if importlib.util.find_spec(module) is None:
                print(f"{name}: not installed", file=sys.stderr)
                del ways[name]
        ways = {name: way for name, way in ways.items() if name == OURS or not any(part in name for part in without)}
        rates = {name: photos / figure for name, figure in measured(ways, repetitions).items()}

    what = (
        f"copies of those of {folder_of_photos}"
        if folder_of_photos
        else f"hard links to {min(DRAWN, photos)} drawn ones, 720 to 960 pixels wide"
    )
    say(
        f"{photos} photos ({what}), {len(by_label)} labels, median of {repetitions} rounds (least to most), {machine()}"
    )
    table(
        ["one core, files in the page cache", "ms a photo", "the notebook's, times"],
        [[name, figure, per_photo["the notebook"] / figure] for name, figure in per_photo.items()],
    )
    table(
        [f"{PROCESSES} processes", "photos/s", "of it, `reducer run` does times"],
        [[name, rate, rates[OURS] / rate] for name, rate in rates.items()],
    )
    say(
        "Reducer's rate is over all that a job does but for the start and the end of the cluster; the start took "
        f"{Figure(tuple(starts))} s."
    )


def without_the_cluster(timings: dict[str, float]) -> float:
    """Seconds of a job but for the start and the end of its cluster."""
    return timings["total_seconds"] - timings["cluster_start_seconds"] - timings["cluster_close_seconds"]


def imagededup(folder: Path) -> float:
    """Seconds in which imagededup hashes a folder; it compares nothing yet."""
    from imagededup.methods import DHash

    hasher = DHash(verbose=False)
    return timed(lambda: hasher.encode_images(image_dir=str(folder), recursive=True, num_enc_workers=PROCESSES))


def cleanvision(folder: Path) -> float:
    """Seconds in which CleanVision looks for near duplicates."""
    from cleanvision import Imagelab

    logging.disable(logging.WARNING)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        lab = Imagelab(data_path=str(folder))
        seconds = timed(lambda: lab.find_issues({"near_duplicates": {}}, n_jobs=PROCESSES, verbose=False))
    logging.disable(logging.NOTSET)
    return seconds


def floor(photos: int, decode: list[str], repetitions: int) -> None:
    """The job against as many bare processes that only decode and hash, and where the rest of its time goes."""
    rows, where = [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        manifest, by_label = linked_collection(folder, photos)
        paths = [path for its in by_label.values() for path in its.values()]
        with multiprocessing.get_context("spawn").Pool(PROCESSES) as pool:
            pool.map(hash_only, [(paths[:20], "fast")] * PROCESSES)
            for way in decode:
                halves = [(paths[start::PROCESSES], way) for start in range(PROCESSES)]
                spent: dict[str, list[float]] = defaultdict(list)

                def bare(halves: list[tuple[list[str], str]] = halves) -> float:
                    return timed(lambda: pool.map(hash_only, halves))

                def job(way: str = way, spent: dict[str, list[float]] = spent) -> float:
                    timings = run_job(folder, manifest, "run", decode=way, rank_all=True)["timings"]
                    total = without_the_cluster(timings)
                    idle = PROCESSES * timings["hash_seconds"] - timings["worker_seconds"]
                    rest = total - sum(timings[f"{name}_seconds"] for name in ("plan", "hash", "write"))
                    spent["planning the job"].append(timings["plan_seconds"])
                    spent["asking the workers whether they hash alike, their imports"].append(rest)
                    spent["workers without work, a worker"].append(idle / PROCESSES)
                    spent["writing the results"].append(timings["write_seconds"])
                    spent["work, a worker"].append(timings["worker_seconds"] / PROCESSES)
                    return total

                found = measured({"bare processes": bare, "job": job}, repetitions)
                rates = {name: photos / figure for name, figure in found.items()}
                rows.append([way, *rates.values(), rates["job"] / rates["bare processes"]])
                for name, seconds in spent.items():
                    own = Figure(tuple(seconds[-repetitions:]))  # not the one to warm up
                    base = found["bare processes"] if name.startswith("work,") else None
                    where.append([way, name, own, own / base if base else ""])
    say(
        f"{photos} photos (hard links to {min(DRAWN, photos)} drawn ones, 720 to 960 pixels wide), median of "
        f"{repetitions} rounds, {machine()}"
    )
    table(
        ["`--decode`", f"{PROCESSES} bare processes, photos/s", f"the job on {PROCESSES} workers, photos/s", "ratio"],
        rows,
    )
    table(["`--decode`", "the job's time goes into", "seconds", "of the bare processes' time"], where)


def startup(repetitions: int) -> None:
    """How long commands take that have little to do: their start."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_sample(str(folder / "photos"), labels=5, images=100)
        run = [
            *("run", str(folder / "photos" / "train"), "--manifest", str(folder / "photos" / "train.csv")),
            *("--keep", "10", "--output", str(folder / "run"), "--overwrite", "--quiet"),
        ]
        commands = {
            "`reducer --help`": ["--help"],
            "`reducer run` on 100 photos": run,
            "the same, `--no-report`": [*run, "--no-report"],
            "the same, `--workers 0`": [*run, "--no-report", "--workers", "0"],
        }

        def seconds(given: list[str]) -> float:
            shutil.rmtree(folder / "run", ignore_errors=True)
            command = [sys.executable, "-m", "reducer", *given]
            return timed(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))

        ways = {name: lambda given=given: seconds(given) for name, given in commands.items()}
        found = measured(ways, repetitions)
    say(f"median of {repetitions} rounds (least to most), {machine()}")
    table(["command", "seconds"], [[name, figure] for name, figure in found.items()])


def memory(photos: int) -> None:
    """Peak memory of a worker: with small and with large partitions, and with photos of 12 megapixels among others."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        manifest, _ = linked_collection(folder, photos)
        for size in (200, photos):
            summary = run_job(folder, manifest, "run", workers=1, partition_images=size)
            rows.append([f"partitions of about {size}", "fast", 1, summary["worker_peak_memory_bytes"] / 2**20])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        manifest, _ = linked_collection(folder, photos, large=50)
        for decode in ("fast", "exact"):
            summary = run_job(folder, manifest, "run", decode=decode)
            peak = summary["worker_peak_memory_bytes"] / 2**20
            rows.append(["one in 50 of 12 megapixels", decode, PROCESSES, peak])
    say(f"{photos} photos, workers of one thread, {machine()}")
    table(["photos", "`--decode`", "workers", "peak memory of a worker, MiB"], rows)
