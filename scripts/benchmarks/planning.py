"""Without photos: planning, and whole runs whose hashes are stored ones."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from benchmarks import stored
from benchmarks.common import PROCESSES, machine, measured, say, sizes_of, table

from reducer import ClusterSpec, Job, reduce_images
from reducer.api.sample import label_sizes
from reducer.config.resolved import resolve
from reducer.run.plan.plan import make_plan
from reducer.run.tasks.photo_results import peak_memory
from reducer.run.tasks.tasks import PartitionTasks

#: Runs a function of this module in a process of its own, whose peak memory is its own too.
ALONE = """
import importlib, json, sys
print(json.dumps(getattr(importlib.import_module(sys.argv[1]), sys.argv[2])(*sys.argv[3:])))
"""


def plan(photos: int, repetitions: int) -> None:
    """Time and peak memory of checking and planning a manifest of GLDv2's size and shape, in all its forms."""
    labels = max(1, round(photos / 19.44))
    generator = np.random.default_rng(0)
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
        found: dict[str, tuple[int, int, float, float]] = {}

        def planned(name: str) -> float:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                own = found[name] = pool.apply(plan_one, (str(folder), name))
            return own[2]

        names = [*contents, "train.csv.gz", "train.parquet"]
        seconds = measured({name: (lambda name=name: planned(name)) for name in names}, repetitions)
    say(f"{photos} photos of {labels} labels, one process, median of {repetitions} rounds, {machine()}")
    rows = [[name, *found[name][:2], seconds[name], found[name][3]] for name in names]
    table(["manifest", "photos to read", "partitions", "seconds", "peak memory, MiB"], rows)


def plan_one(folder: str, name: str) -> tuple[int, int, float, float]:
    """Plan a manifest: photos to read, partitions, seconds, peak memory in MiB."""
    start = time.perf_counter()
    planned = make_plan(resolve(Job(f"{folder}/train", f"{folder}/run", manifest=f"{folder}/{name}")))
    partition_tasks = PartitionTasks(planned.job, planned.numbered(PROCESSES).partitions())
    for index in partition_tasks.rows:
        partition_tasks.task(index)
    return int(planned.is_read.sum()), len(partition_tasks.rows), time.perf_counter() - start, peak_memory() / 2**20


def write_manifest(folder: Path, sizes: np.ndarray, times: int, *, hashes: bool) -> int:
    """Write ``train.csv`` with labels of these sizes, so many times over; its rows. Stored hashes beside it.

    The rows of each time stand in random order. Each label has some views, with about 8 near copies each.
    """
    (folder / "train").mkdir(parents=True)
    generator = np.random.default_rng(0)
    photos, labels = int(sizes.sum()), len(sizes)
    kept = np.lib.format.open_memmap(folder / "hashes.npy", "w+", np.uint8, (photos * times, 8)) if hashes else None
    digits = np.frombuffer(b"0123456789abcdef", dtype=np.uint8)
    with open(folder / "train.csv", "wb") as file:
        for turn in range(times):
            label = np.repeat(5 * labels * turn + generator.permutation(5 * labels)[:labels], sizes)
            number = np.arange(turn * photos, (turn + 1) * photos, dtype=np.uint64)
            own = (generator.integers(0, 2**32, photos, dtype=np.uint64) << np.uint64(32) | number).astype(">u8")
            own_bytes = own.view(np.uint8).reshape(photos, 8)
            text = digits[np.stack([own_bytes >> 4, own_bytes & 15], axis=-1)].reshape(-1)
            offsets = np.arange(0, 16 * (photos + 1), 16, dtype=np.int32)
            ids = pa.Array.from_buffers(pa.string(), photos, [None, pa.py_buffer(offsets), pa.py_buffer(text)])
            order = pa.array(generator.permutation(photos))
            rows = pa.table({"id": ids.take(order), "landmark_id": pa.array(label).take(order)})
            options = pa.csv.WriteOptions(include_header=turn == 0, quoting_style="none")
            pa.csv.write_csv(rows, file, options)
            if kept is not None:
                views = generator.integers(0, 2**63, (photos // 64 + 1) * 8, dtype=np.uint64)
                # The photos of a label stand together, and so do its views.
                view = views[np.arange(photos) // 64 * 8 + generator.integers(0, 8, photos)]
                noise = np.packbits(generator.integers(0, 25, (photos, 64), dtype=np.uint8) == 0, axis=1)
                kept[turn * photos : (turn + 1) * photos] = view.view(np.uint8).reshape(-1, 8) ^ noise
    return photos * times


def run_without_photos(folder: str) -> dict[str, float]:
    """A whole run on two workers of a LocalCluster, with stored hashes in the place of photos."""
    from reducer.run.dask.connect import LOCAL_SETTINGS

    start = time.perf_counter()
    os.environ[stored.VARIABLE] = f"{folder}/hashes.npy"
    LOCAL_SETTINGS["distributed.worker.preload"].append(stored.__file__)
    shutil.rmtree(f"{folder}/run", ignore_errors=True)
    job = Job(f"{folder}/train", f"{folder}/run", manifest=f"{folder}/train.csv", report=False, check=False)
    summary = reduce_images(job, ClusterSpec(workers=PROCESSES), progress=False).summary
    return {
        "seconds": time.perf_counter() - start,
        "peak": peak_memory() / 2**30,
        "worker_peak": summary["worker_peak_memory_bytes"] / 2**30,
        **{name: summary[name] for name in ("photos", "labels", "photos_read", "photos_kept")},
        **summary["timings"],
    }


def alone(function: str, *given: str, module: str = __name__) -> object:
    """What a function of a module of ours returns in a process of its own."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", ALONE, module, function, *given]
    return json.loads(subprocess.check_output(command, text=True, env={**os.environ, "PYTHONPATH": path}))


def scale(sizes: str, times: list[int], plan_times: int, repetitions: int) -> None:
    """Runs without photos, from the manifest to ``reduced.csv``, and the plan of a still larger manifest."""
    of_label = sizes_of(sizes)
    runs: dict[int, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for number in times:
            folder = Path(temporary) / str(number)
            print(f"writing a manifest of {number} x {of_label.sum()} photos ...", file=sys.stderr)
            write_manifest(folder, of_label, number, hashes=True)
            runs[number] = []
        ways = {}
        for number in times:

            def run(number: int = number) -> float:
                found = alone("run_without_photos", str(Path(temporary) / str(number)))
                runs[number].append(found)
                return found["seconds"]

            ways[f"{number * int(of_label.sum()):,} rows"] = run
        seconds = measured(ways, repetitions, warm_up=False)
        for number in times:
            shutil.rmtree(Path(temporary) / str(number))
        planned = []
        if plan_times:
            print(f"writing a manifest of {plan_times} x {of_label.sum()} photos ...", file=sys.stderr)
            folder = Path(temporary) / "plan"
            count = write_manifest(folder, of_label, plan_times, hashes=False)
            read, partitions, took, peak = alone("plan_one", str(folder), "train.csv")
            planned.append([f"{count:,}", read, partitions, took, 1e6 * took / count, peak / 2**10])
    say(
        f"LocalCluster of {PROCESSES} workers, stored hashes in the place of photos, without a report, median of "
        f"{repetitions} rounds, {machine()}"
    )
    rows = []
    first = next(iter(seconds.values())).median / (times[0] * of_label.sum())
    for (name, figure), found in zip(seconds.items(), runs.values(), strict=True):
        last = found[-1]
        peak = max(one["peak"] for one in found)
        each = 1e6 * figure.median / last["photos"]
        steps = [last[f"{step}_seconds"] for step in ("plan", "hash", "write")]
        kept = (f"{last[column]:,}" for column in ("labels", "photos_read", "photos_kept"))
        rows.append([name, *kept, figure, *steps, each, each / 1e6 / first, peak, last["worker_peak"]])
    header = ["manifest", "labels", "looked up", "kept", "seconds", "planning (last round)", "ranking", "writing"]
    table([*header, "µs a row", "of the first's", "peak client memory, GiB", "a worker's, GiB"], rows)
    if planned:
        header = ["manifest, rows", "photos to read", "partitions", "seconds", "µs a row", "peak memory, GiB"]
        table([f"planned only: {header[0]}", *header[1:]], planned)
